"""RepoQA: contexts, prompt, and scores beside NLTK's numbers."""

import gzip
import json

import pytest

from kimi_linear import Tokenizer
from kimi_linear.evals import repoqa
from kimi_linear.evals._bleu import bleu
from kimi_linear.evals.results import Results
from kimi_linear.model import SMALL_MODEL

FUNCTION = "def f{i}(x):\n    y = x + {i}\n    z = y * {i}\n    return f'{i}{{z}}'\n"


def repository():
    content, needles = {}, []
    for i in range(4):
        path, head = f"src/m{i}.py", f"# module {i} ü\nimport os\n\n"
        code = FUNCTION.format(i=i)
        content[path] = head + code + f"\nEND = {i}\n"
        start = len(head.encode())
        needles.append(
            {"name": f"f{i}", "path": path, "description": f" It adds {i}.", "start_line": 3,
             "end_line": 7, "start_byte": start, "end_byte": start + len(code.encode())}
        )  # fmt: skip
    graph = {
        "src/m3.py": ["src/m1.py"],
        "src/m1.py": ["src/m0.py"],
        "src/m0.py": [],
        "src/m2.py": [],
    }
    return {"repo": "a/b", "content": content, "dependency": graph, "needles": needles}


def words(text):
    return len(text.split())


# ---- context -----------------------------------------------------------------------------


def test_the_whole_repository_in_the_order_of_its_dependencies():
    r = repository()
    found = repoqa.code_context("python", r, r["needles"][3], 10_000, 0.5, words)
    # The line that the needle begins is cut before it, as upstream does: an empty line here.
    parts = [f"# Path: src/m{i}.py\n{r['content'][f'src/m{i}.py']}\n" for i in (0, 1, 3, 2)]
    parts[2] = parts[2].replace("def f3", "\ndef f3", 1)
    assert found == "".join(parts)


def test_a_context_of_a_size():
    r = repository()
    needle = r["needles"][1]
    found = repoqa.code_context("python", r, needle, 60, 0.5, words)
    assert FUNCTION.format(i=1) in found
    assert words(found) <= 60 + 1  # the mark of a cut comes on top
    assert found.rstrip().endswith("...")
    start = words(found[: found.index("def f1")])
    middle = (start + words(FUNCTION.format(i=1)) / 2) / 60
    assert abs(middle - 0.5) < 0.15
    early = repoqa.code_context("python", r, needle, 60, 0.2, words)
    assert words(early[: early.index("def f1")]) < start


def test_dependencies_may_be_cyclic():
    assert repoqa._order({"a": ["b"], "b": ["c", "a"], "c": [], "d": ["a"]}) == [
        "c",
        "b",
        "a",
        "d",
    ]


def test_the_prompt():
    assert repoqa.prompt("CODE\n", " It adds.") == (
        f"{repoqa.INSTRUCTION}CODE\n\nFunction Description: It adds.\n{repoqa.INSTRUCTION}"
    )


# ---- scores ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference,candidate,want",
    [  # values of NLTK 3.10's sentence_bleu with method4
        ("a b c d e f", "a b c d e f", 1.0),
        ("a b c d e f", "a b x d e", 0.14034530985157564),
        ("a b c d", "x y z", 0.0),
        ("a", "a", 1.0),
        ("a b c d e", "", 0.0),
    ],
)
def test_bleu(reference, candidate, want):
    assert bleu(reference.split(), candidate.split()) == pytest.approx(want, abs=1e-15)


def test_bleu_by_hand():
    """Four words of which one matches: 1/4, then orders without a match at ln 4 / (5 * 2^k)."""
    ln = 1.3862943611198906
    want = (1 / 4 * (ln / 10 / 3) * (ln / 20 / 2) * (ln / 40 / 1)) ** 0.25
    assert bleu("a b c d".split(), "a x y z".split()) == pytest.approx(want, rel=1e-14)
    shorter = want * 2.718281828459045 ** (1 - 8 / 4)  # brevity
    assert bleu("a b c d e f g h".split(), "a x y z".split()) == pytest.approx(
        shorter, rel=1e-14
    )


@pytest.mark.parametrize(
    "answer,language,want",
    [
        ("no block", "python", "no block"),
        ("Here:\n```python\nimport os\n@dec\ndef f(x):\n    return x\n\ndef g(): pass\n```\nDone.",
         "python", "def f(x):\n    return x"),
        ("```\nx = 1\n```\n```py\nclass A:\n    async def f(self):\n        pass\n```", "python",
         "async def f(self):\n        pass"),
        ("```\nx = 1\n```\n```\ny = 2\n```", "python", "x = 1\n"),
        ("```python\ndef f(x:\n```", "python", "def f(x:\n"),
        ("```rust\nfn f() {}\n```", "rust", "fn f() {}\n"),
        ("```def f(): pass```", "python", "```def f(): pass```"),  # not on lines of its own
    ],
)  # fmt: skip
def test_the_function_of_an_answer(answer, language, want):
    assert repoqa.function_in(answer, language) == want


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "repoqa.json.gz"
    other = {"repo": "c/d", "content": {}, "dependency": {}}  # one without needles
    path.write_bytes(gzip.compress(json.dumps({"python": [other, repository()]}).encode()))
    return repoqa.Suite(path, lengths=[300])


def test_answers_and_their_scores(suite):
    documents = suite.documents(Tokenizer.from_dir(SMALL_MODEL))
    assert [d.ids[0] for d in documents] == [f"python/a/b/f{i}/300" for i in range(4)]
    (example,) = documents[2].make()
    assert example.details == {"needle": "f2", "depth": 2.5 / 4}
    assert example.references == [FUNCTION.format(i=2).rstrip("\n")]

    def grade(text):
        return suite.grade(example, f"```python\n{text}```")

    right = grade(FUNCTION.format(i=2))
    assert (right["score"], right["best"]) == (1.0, "f2") and right["bleu"] > 0.99
    other = grade(FUNCTION.format(i=1))
    assert (other["score"], other["best"]) == (0.0, "f1")
    part = grade("def f2(x):\n    y = x + 2\n")  # the right one, but too little of it
    assert (part["score"], part["best"]) == (0.0, "f2") and part["bleu"] < 0.8
    assert suite.grade(example, "nonsense") == {"score": 0.0, "bleu": 0.0, "best": None}


def test_thresholds():
    records = [
        {"task": "python", "length": 300, "score": 0.0, "document": i, "answer": "a", "truncated": False,
         "needle": "f", "best": best, "bleu": value}
        for i, (best, value) in enumerate([("f", 0.55), ("f", 1.0), ("g", 1.0), ("f", 0.8)])
    ]  # fmt: skip
    results = Results({"examples": 4, "settings": {"suite": "repoqa"}}, records)
    shares = repoqa.overall(results)["thresholds"]["300"]
    assert shares["0.0"] == 0.75 and shares["0.6"] == 0.5 and shares["0.8"] == 0.5
    assert shares["1.0"] == 0.25


def test_wrong_files_and_languages(suite, tmp_path):
    with pytest.raises(ValueError, match="languages: must be of python, got go"):
        repoqa.Suite(suite.path, languages=["go"])
    (tmp_path / "x.json").write_text('{"go": [{"needles": [], "repo": "r", "content": {}}]}')
    with pytest.raises(ValueError, match="x.json: go: a repository lacks dependency"):
        repoqa.load(tmp_path / "x.json")
