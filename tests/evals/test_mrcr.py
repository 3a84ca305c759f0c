"""MRCR: the publishers' graders and files, and the conversations made here."""

import csv
import json
import random
import re
from difflib import SequenceMatcher

import pytest

from kimi_linear import Tokenizer
from kimi_linear.evals import mrcr
from kimi_linear.evals._mrcr_synth import ORDINALS
from kimi_linear.model import SMALL_MODEL

CODE = "aB3dE6gH9j"
LONG = "abcdefghijklm"[:12]  # Google's codes have twelve characters


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_dir(SMALL_MODEL)


# ---- graders -----------------------------------------------------------------------------
# difflib's ratio is 2 M / T: M matching characters of T in both. Where the second text has 200
# or more, characters that make up over 1 % of it count only next to other matches (autojunk).


@pytest.mark.parametrize(
    "response,answer,want",
    [
        (CODE + "abcd", CODE + "abcd", 1.0),
        (CODE + "abxd", CODE + "abcd", 6 / 8),  # ab, d
        (CODE + "", CODE + "abcd", 0.0),
        (CODE, CODE, 1.0),
        ("abcd", CODE + "abcd", 0.0),  # no code
        (" " + CODE + "abcd", CODE + "abcd", 0.0),  # not at the beginning
        (CODE[:-1] + "abcd", CODE + "abcd", 0.0),
        (CODE + CODE + "ab", CODE + "ab", 4 / 14),  # one code is taken away
        (CODE + "x" + "a" * 300, CODE + "a" * 300, 0.0),  # 600 / 601 without autojunk
        (CODE + "x" + "a" * 300, CODE + "a" * 199, 398 / 500),  # 0.0 the other way round
        (CODE + "a" * 300 + "x", CODE + "a" * 300, 600 / 601),
    ],
)
def test_openais_grader(response, answer, want):
    assert mrcr.grade_openai(response, answer, CODE) == want


@pytest.mark.parametrize(
    "prediction,target,want",
    [
        (LONG + "abcd", LONG + "abcd", 1.0),
        (
            f"  Sure: {LONG} abcd \n",
            f"{LONG} abcd",
            1.0,
        ),  # anywhere, and white space is nothing
        (f"{LONG}zz {LONG}abxd", LONG + "abcd", 6 / 8),  # the last one counts
        ("abcd", LONG + "abcd", 0.0),
        ("", LONG + "abcd", 0.0),
        (LONG, LONG[:11], 0.0),  # no code in the target
        (LONG + "x" + "a" * 300, LONG + "a" * 199, 0.0),  # the prediction comes second
        (LONG + "a" * 199, LONG + "x" + "a" * 300, 398 / 500),
    ],
)
def test_googles_grader(prediction, target, want):
    assert mrcr.grade_google(prediction, target) == want


def test_graders_are_difflib_to_the_last_digit():
    r = random.Random(3)
    for _ in range(40):
        a, b = ("".join(r.choices("ab cde", k=r.randrange(400))) for _ in "ab")
        assert (
            mrcr.grade_openai(CODE + a, CODE + b, CODE) == SequenceMatcher(None, a, b).ratio()
        )
        want = SequenceMatcher(None, b.strip(), a.strip()).ratio()
        assert mrcr.grade_google(LONG + a, LONG + b) == want


# ---- files -------------------------------------------------------------------------------


def openai_row(n_words, n_needles=2):
    messages = [
        {"role": "user", "content": "word " * n_words},
        {"role": "assistant", "content": "a poem"},
        {
            "role": "user",
            "content": f"Prepend {CODE} to the 2nd (1 indexed) poem about tapirs.",
        },
    ]
    return {
        "prompt": json.dumps(messages), "answer": CODE + "a poem", "n_needles": n_needles,
        "random_string_to_prepend": CODE, "desired_msg_index": 1, "total_messages": 3,
    }  # fmt: skip


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_openais_files(tmp_path, tokenizer, suffix):
    rows = [openai_row(size, n) for size in (100, 110) for n in (2, 8)]
    path = tmp_path / f"2needle{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    found = list(mrcr.load(path))
    assert [(r.number, r.kind, r.n_needles, r.prepend) for r in found] == [
        (0, "openai", 2, CODE), (1, "openai", 8, CODE), (2, "openai", 2, CODE), (3, "openai", 8, CODE),
    ]  # fmt: skip
    assert found[3].prompt == json.loads(rows[3]["prompt"])
    suite = mrcr.Suite(path, lengths=[8192], count=lambda text: 50 * len(text.split()))
    documents = suite.documents(tokenizer)
    assert [d.ids for d in documents] == [("2 needles/0/0",), ("2 needles/0/2",),
                                          ("8 needles/0/1",), ("8 needles/0/3",)]  # fmt: skip
    (example,) = documents[0].make()
    assert example.prompt_ids == tokenizer.apply_chat_template(found[0].prompt)
    assert suite.grade(example, CODE + "a poem") == {"score": 1.0}
    assert suite.grade(example, "a poem") == {"score": 0.0}


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pyarrow \(pip install .*convert it"):
        list(mrcr.load(tmp_path / "x.parquet"))


def test_googles_files(tmp_path, tokenizer):
    path = tmp_path / "mrcr.csv"
    text = "User: Write a poem about ducks in formal style.\n\nAssistant: Quack\n\n" * 3000
    rows = [
        {"queries": text + f"User: Prepend {LONG} to the second poem.\n\nAssistant:",
         "answer": f" {LONG}Quack ", "relevant_context_positions": "[(3, 5), (7, 9), (11, 12), (20, 21)]",
         "context_len": 9}
    ]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    limit = csv.field_size_limit()
    (row,) = mrcr.load(path)
    assert csv.field_size_limit() == limit
    assert (row.kind, row.n_needles, row.prepend, row.answer) == (
        "google",
        4,
        LONG,
        LONG + "Quack",
    )
    suite = mrcr.Suite(path, prefix="raw")
    (document,) = suite.documents(tokenizer)
    (example,) = document.make()
    assert tokenizer.decode(example.prompt_ids) == rows[0]["queries"]
    n = len(tokenizer.encode(rows[0]["queries"] + row.answer))
    assert example.task == "4 needles" and example.length // 2 < n <= example.length
    assert suite.grade(example, f"ok {LONG} Quack") == {"score": 1.0}


def test_bins(tmp_path, tokenizer):
    """Closed above and open below, but the first holds both its ends."""
    sizes = [4095, 4096, 8192, 8193, 16384, 16385, 40000]
    path = write_jsonl(tmp_path / "x.jsonl", [openai_row(1) for _ in sizes])

    def count_of(longest):
        """The whole number for a row's first text and none for the two others and the answer;
        past the longest bin nothing more of a row is counted."""
        counts = iter(
            n if i == 0 else 0 for n in sizes for i in range(4 if n <= longest else 1)
        )
        return lambda text: next(counts)

    def bins(lengths):
        suite = mrcr.Suite(path, lengths=lengths, count=count_of(lengths[-1]))
        return [(d.length, d.ids[0]) for d in suite.documents(tokenizer)]

    want = [(8192, 1), (8192, 2), (16384, 3), (16384, 4)]
    assert bins([8192, 16384]) == [(n, f"2 needles/0/{i}") for n, i in want]
    assert bins([8192, 65536]) == [(n, f"2 needles/0/{i}") for n, i in [*want[:2], (65536, 6)]]


def test_questions_that_do_not_fit_are_counted(tmp_path, tokenizer):
    path = write_jsonl(
        tmp_path / "x.jsonl", [openai_row(100), openai_row(3000), openai_row(3100)]
    )
    options = {"lengths": [1024, 8192], "limit": 3500, "max_new_tokens": 64}
    suite = mrcr.Suite(path, count=lambda text: 6 * len(text.split()), **options)
    assert suite.max_context == 3500 and not suite.documents(tokenizer)[1:]
    assert suite.settings()["too_long"] == 0  # 18,000 tokens are in no bin
    suite = mrcr.Suite(path, count=lambda text: 2 * len(text.split()), **options)
    assert suite.documents(tokenizer) == [] and suite.settings()["too_long"] == 2
    suite = mrcr.Suite(path, count=lambda text: 2 * len(text.split()), lengths=[8192])
    assert len(suite.documents(tokenizer)) == 2 and suite.settings()["too_long"] == 0
    assert suite.max_context == 8192 * 9 // 8 + 2048


def test_at_most_so_many_samples(tmp_path, tokenizer):
    path = write_jsonl(
        tmp_path / "x.jsonl", [openai_row(10, n) for n in (2, 4) for _ in range(5)]
    )
    suite = mrcr.Suite(path, lengths=[8192], samples=3, count=lambda text: 1300)
    assert [d.ids[0] for d in suite.documents(tokenizer)] == [
        f"{n} needles/0/{i}" for n, first in ((2, 0), (4, 5)) for i in range(first, first + 3)
    ]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"answer": "without"}, r"row 1: .*does not begin with"),
        ({"prompt": "{"}, "row 1"),
        ({"n_needles": "many"}, "row 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    path = write_jsonl(tmp_path / "x.jsonl", [openai_row(1), openai_row(1) | change])
    with pytest.raises(ValueError, match=message):
        list(mrcr.load(path))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="data: must be a .parquet"):
        list(mrcr.load("x.txt"))
    path = write_jsonl(tmp_path / "x.jsonl", [])
    with pytest.raises(ValueError, match="prefix: must be none or raw"):
        mrcr.Suite(path, prefix="prefill")
    with pytest.raises(FileNotFoundError, match="data: must be files, /nowhere is none"):
        mrcr.Suite([path, "/nowhere"])
    for options, message in (
        ({"needles": []}, "needles"), ({"needles": [9]}, "needles"), ({"needles": [0, 2]}, "needles"),
        ({"questions": 3}, "questions: must be at most 2"), ({"n_sentences": 0}, "n_sentences"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mrcr.Synth(**options)


# ---- mrcr-synth --------------------------------------------------------------------------


def examples(suite, tokenizer):
    return [e for d in suite.documents(tokenizer) for e in d.make()]


def solve(text):
    """The answer, from the conversation alone: (answer, how many like requests)."""
    code, nth, form, topic = re.search(
        r"Prepend (\w{10}) to the (\w+) (\w+) about the (\w+)\. Do not include any other text in "
        r"your response\.<\|im_end\|><\|im_assistant\|>assistant<\|im_middle\|>$", text
    ).groups()  # fmt: skip
    ask = rf"user<\|im_middle\|>Write an? {form} about the {topic}\.<\|im_end\|>"
    answers = re.findall(
        ask + r"<\|im_assistant\|>assistant<\|im_middle\|>(.*?)<\|im_end\|>", text
    )
    return code + answers[ORDINALS.index(nth)], answers


def test_conversations_by_their_own_words(tokenizer):
    suite = mrcr.Synth(lengths=[1024], samples=25, questions=2, n_sentences=1)
    made = examples(suite, tokenizer)
    assert len(made) == 3 * 25 * 2
    asked = set()
    for e in made:
        used = len(e.prompt_ids) + e.max_new_tokens
        assert 1024 - 80 < used <= 1024  # a turn more would not have fitted
        answer, answers = solve(tokenizer.decode(e.prompt_ids))
        assert len(answers) == len(set(answers)) == int(e.task.split()[0])
        assert [answer] == e.references and suite.grade(e, answer) == {"score": 1.0}
        assert suite.grade(e, answer[10:]) == {"score": 0.0}
        asked.add((e.task, e.details["position"]))
        floor = sum(SequenceMatcher(None, a, answer[10:]).ratio() for a in answers) / len(
            answers
        )
        assert e.details["floor"] == round(floor, 4) < 0.95
    assert len(asked) == 14  # every position of 2, 4 and 8
    assert len({e.references[0] for e in made}) == len(made)


def test_questions_of_a_conversation_share_it(tokenizer):
    suite = mrcr.Synth(lengths=[1024], samples=2, questions=2, n_sentences=1, needles=[4])
    for document in suite.documents(tokenizer):
        one, two = document.make()
        common = next(
            i
            for i, (a, b) in enumerate(zip(one.prompt_ids, two.prompt_ids, strict=False))
            if a != b
        )
        assert common > 0.9 * len(one.prompt_ids)
        assert one.details["position"] != two.details["position"]


def test_depths_are_spread(tokenizer):
    suite = mrcr.Synth(lengths=[700], samples=120, needles=[2], n_sentences=1)
    depths = sorted(e.details["depth"] for e in examples(suite, tokenizer))
    assert depths[0] < 0.1 and depths[-1] > 0.85
    assert 0.4 < sum(depths) / len(depths) < 0.6  # 3.8 sigma of the mean of a uniform one


def test_the_seed_makes_the_conversations(tokenizer):
    def prompts(**options):
        options = {"lengths": [700], "samples": 2, "needles": [2], "n_sentences": 1, **options}
        return [e.prompt_ids for e in examples(mrcr.Synth(**options), tokenizer)]

    assert prompts() == prompts() == prompts(samples=5)[:2]
    assert prompts() != prompts(seed=1)


def test_passages_of_a_book(tmp_path, tokenizer):
    r = random.Random(0)
    words = [f"{chr(97 + i % 26)}word{i}" for i in range(400)]
    book = ["It is {}.".format(" ".join(r.choices(words, k=12))) for _ in range(400)]
    path = tmp_path / "book.txt"
    path.write_text("\n".join(book))
    suite = mrcr.Synth(lengths=[8192], samples=2, needles=[8], texts=path)
    assert suite.settings()["texts"].startswith("book.txt sha256:")
    for e in examples(suite, tokenizer):
        assert len(e.prompt_ids) + e.max_new_tokens <= 8192
        _, answers = solve(tokenizer.decode(e.prompt_ids))
        assert len(set(answers)) == 8
        assert all(400 <= len(a) <= 1200 and a.startswith("It is") for a in answers)
    path.write_text("Too short.")
    with pytest.raises(ValueError, match="eight passages"):
        mrcr.Synth(texts=path)
