"""RULER's generators and scores: upstream's facts, properties, and solvers that search."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from ruler_facts import GOLDEN, solve, summary, word_count, write_files

from kimi_linear import Tokenizer
from kimi_linear.evals import _ruler_niah, ruler
from kimi_linear.evals._fit import largest
from kimi_linear.evals._ruler_lists import zeta
from kimi_linear.evals._sources import Haystack, sentences, words
from kimi_linear.evals.results import Results
from kimi_linear.evals.suite import Prompting
from kimi_linear.model import SMALL_MODEL

SIX = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"]
ESSAYS = [
    f"niah_{name}" for name in "single_2 single_3 multikey_1 multivalue multiquery".split()
]
NEEDLES = {  # keys, values of a key, keys asked for
    "niah_single_1": (1, 1, 1), "niah_single_2": (1, 1, 1), "niah_single_3": (1, 1, 1),
    "niah_multikey_1": (4, 1, 1), "niah_multikey_2": (1, 1, 1), "niah_multikey_3": (1, 1, 1),
    "niah_multivalue": (1, 4, 1), "niah_multiquery": (4, 1, 4),
}  # fmt: skip
N = 50


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_dir(SMALL_MODEL)


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "squad.json"
    articles = [
        {"paragraphs": [
            {"context": f"doc {a} {p} " + "word " * 40, "qas": [
                {"question": f"q{a}{p}?", "is_impossible": False, "answers": [{"text": f"doc {a} {p}"}]},
                {"question": "no answer?", "is_impossible": True, "answers": []},
            ]} for p in range(4)
        ]} for a in range(30)
    ]  # fmt: skip
    path.write_text(json.dumps({"data": articles}))
    return path


@pytest.fixture(scope="module")
def hotpot(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "hotpot.json"
    items = [
        {"question": f"who is {i}?", "answer": f"Name{i}x",
         "context": [[f"T{i}.{j}", ["One. ", f"Name{i}x two." if j == 3 else "Two."]] for j in range(10)]}
        for i in range(60)
    ]  # fmt: skip
    path.write_text(json.dumps(items))
    return path


# ---- definition --------------------------------------------------------------------------


def test_the_thirteen_tasks():
    assert list(ruler.TASKS) == [*list(NEEDLES), "vt", "cwe", "fwe", "qa_1", "qa_2"]
    budgets = {t.name: t.max_new_tokens for t in ruler.TASKS.values()}
    assert budgets == dict.fromkeys(NEEDLES, 128) | {
        "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32,
    }  # fmt: skip
    assert [t.name for t in ruler.TASKS.values() if t.match == "part"] == ["qa_1", "qa_2"]


@pytest.mark.parametrize("length", [2048, 4096])
def test_fifty_samples_are_upstreams_but_for_the_seed(length, tmp_path):
    """Of each task: what NVIDIA/RULER c3f5e3b's own scripts write, run with the same words as
    tokens and the same files (ruler_facts.py), in everything that its seed does not decide:
    templates, openings, needles, kinds of keys and values, order and number of answers, counts
    of words, units of filling."""
    files = write_files(tmp_path)
    for task, upstream in json.loads(GOLDEN.read_text())[str(length)].items():
        made = ruler.samples(task, length, word_count, n=N, **files)
        found = summary((task, s.input, s.opening, s.answers) for s in made)
        assert found["shape"] == upstream["shape"], task
        # Some of cwe's words are two, so that its size hangs on those of one sample.
        assert abs(found["size"] - upstream["size"]) <= (1 if task == "cwe" else 0), task


# Lengths of the samples that NVIDIA/RULER c3f5e3b makes where a token is a word between white
# space, answers included: its own scripts were run with that tokenizer.
UPSTREAM = {
    2048: {
        "niah_single_1": 2048,
        "niah_multikey_3": 2046,
        "vt": 2041,
        "fwe": 2004,
        "qa_1": 2015,
    },
    4096: {
        "niah_single_1": 4081,
        "niah_multikey_3": 4096,
        "vt": 4093,
        "fwe": 3990,
        "qa_1": 4085,
    },
    9000: {
        "niah_single_1": 8983,
        "niah_multikey_3": 8996,
        "vt": 8995,
        "fwe": 8748,
        "qa_1": 8990,
    },
}


@pytest.mark.parametrize("length", UPSTREAM)
def test_samples_are_as_long_as_upstreams(length, squad):
    found = {}
    for task in UPSTREAM[length]:
        budget = ruler.TASKS[task].max_new_tokens
        for sample in ruler.samples(task, length, word_count, n=3, squad=squad):
            found.setdefault(task, set()).add(word_count(sample.input, sample.opening) + budget)
    assert found == {task: {n} for task, n in UPSTREAM[length].items()}


@pytest.mark.parametrize("length", [2048, 4096, 9000])
def test_essays_are_filled_to_the_last_word(length):
    """Where a word is a token and all needles have as many, upstream's are full, too."""
    for task in ("niah_single_2", "niah_multivalue", "niah_multiquery"):
        for sample in ruler.samples(task, length, word_count, n=3):
            assert word_count(sample.input, sample.opening) + 128 == length


def test_a_needle_prompt_word_by_word():
    (sample,) = ruler.samples("niah_single_1", 300, word_count, n=1)
    key = re.search(r"number for (.+) mentioned", sample.input)[1]
    (value,) = sample.answers
    lines = sample.input.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert (
        lines[-1]
        == f"What is the special magic number for {key} mentioned in the provided text?"
    )
    assert (
        sample.opening
        == f" The special magic number for {key} mentioned in the provided text is"
    )
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    middle = sorted(set(lines[1:-1]))
    assert middle == [f"One of the special magic numbers for {key} is: {value}.", noise]


def test_several_answers_are_asked_for_in_the_plural():
    (sample,) = ruler.samples("niah_multiquery", 1000, word_count, n=1)
    keys = re.findall(r"special magic numbers for (.+?) is: (\d{7})\.", sample.input)
    assert sample.input.startswith("Some special magic numbers are hidden within the following")
    asked = re.search(r"What are all the special magic numbers for (.*) mentioned in the provided text\?$",
                      sample.input)[1]  # fmt: skip
    names = re.fullmatch(r"(.+), (.+), (.+), and (.+)", asked).groups()
    assert sample.answers == [dict(keys)[name] for name in names]
    assert sample.opening == (
        f" The special magic numbers for {asked} mentioned in the provided text are"
    )


def test_word_lists_are_wonderwords():
    assert (len(words().nouns), len(words().adjectives), len(words().all)) == (6782, 910, 8166)


@pytest.mark.parametrize(
    "s,want", [(1.5, 2.612375348685488), (2.0, 1.6449340668482264), (3.0, 1.2020569031595943)]
)
def test_zeta(s, want):
    assert abs(zeta(s) - want) < 1e-14


# ---- properties --------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*SIX, *ESSAYS])
def test_fifty_samples_of_a_task(task, tokenizer):
    """Never longer than asked, never much shorter, alike in structure, solved by searching."""
    length, prompting = 4096 if task == "cwe" else 2048, Prompting(tokenizer, "prefill")
    budget = ruler.TASKS[task].max_new_tokens
    made = list(ruler.samples(task, length, prompting.count, n=N))
    tokens = [prompting.count(s.input, s.opening) + budget for s in made]
    assert max(tokens) <= length
    assert min(tokens) > 0.8 * length
    assert len({s.input for s in made}) == N
    for sample in made:
        found = solve(task, sample.input)
        assert ruler.match_all(" ".join(found), sample.answers) == 1.0
        assert sorted(found) == sorted(sample.answers)


@pytest.mark.parametrize("task", [t for t in NEEDLES if t != "niah_multivalue"])
def test_needles_lie_everywhere(task):
    """Of several values the first has the same rank in every sample, as upstream."""
    depths = sorted(s.details["depth"] for s in ruler.samples(task, 1024, word_count, n=60))
    assert depths[0] < 0.15 and depths[-1] > 0.85
    assert 0.38 < sum(depths) / 60 < 0.62  # 3 sigma of a uniform depth's mean


def test_a_hidden_key_has_no_second_value(monkeypatch):
    """Here one line in twenty would have the hidden key by chance."""
    monkeypatch.setitem(_ruler_niah.KINDS, "words", lambda r: f"key{r.randrange(20)}")
    for sample in ruler.samples("niah_multikey_2", 2000, word_count, n=5):
        key = re.search(r"What is the special magic number for (\w+) ", sample.input)[1]
        assert sample.input.count(f"for {key} is: ") == 1


@pytest.mark.parametrize("task,file", [("qa_1", "squad"), ("qa_2", "hotpot")])
def test_questions_of_documents(task, file, squad, hotpot):
    files = {"squad": squad, "hotpot": hotpot}
    made = list(ruler.samples(task, 1500, word_count, n=N, **files))
    for i, sample in enumerate(made):
        assert word_count(sample.input, sample.opening) + 32 <= 1500
        assert sample.opening == " Answer:"
        blocks = re.split(r"Document (\d+):\n", sample.input)
        assert blocks[1::2] == [str(n + 1) for n in range(sample.details["units"])]
        assert sum(sample.answers[0] in b for b in blocks[2::2]) == 1
        want = f"q{i // 4}{i % 4}?" if file == "squad" else f"who is {i}?"
        assert sample.input.endswith(f"Question: {want}")
    assert len({s.input for s in made}) == N


def test_more_documents_than_there_are_are_repeated(squad):
    (sample,) = ruler.samples("qa_1", 20_000, word_count, n=1, squad=squad)
    assert sample.details["units"] > 120
    assert sample.input.count("doc 3 1 ") > 1


def test_a_sample_depends_on_the_seed_and_its_index_alone():
    def texts(n, **options):
        return [
            s.input for s in ruler.samples("niah_multikey_1", 700, word_count, n=n, **options)
        ]

    assert texts(5)[:3] == texts(3) == texts(3, seed=42)
    assert not set(texts(3)) & set(texts(3, seed=43))


def test_samples_do_not_depend_on_the_process():
    code = (
        "from kimi_linear.evals import ruler\n"
        "for task in ('niah_multikey_2', 'vt', 'cwe', 'fwe'):\n"
        "    for s in ruler.samples(task, 800, lambda a, b: len((a + b).split()), n=2):\n"
        "        print(s)"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True,
                       check=True, env=os.environ | {"PYTHONHASHSEED": str(i)}).stdout
        for i in range(2)
    }  # fmt: skip
    assert len(runs) == 1 and len(runs.pop()) > 10_000


def test_parameters_of_ones_own():
    task = ruler.VariableTracking("vt_2x6", chains=2, hops=6)
    (sample,) = ruler.samples(task, 900, word_count, n=1)
    assert len(sample.answers) == 7
    assert "7 variables are assigned the value" in sample.opening
    text = sample.input[sample.input.rindex("Memorize and track") :]
    assert text.count("VAR ") == 2 * (7 + 6)
    task = ruler.Niah("mine", "noise", keys="uuids", values="words", n_keys=3, n_queries=2)
    (sample,) = ruler.samples(task, 900, word_count, n=1)
    assert len(sample.answers) == 2 and all(re.fullmatch(r"\D+", a) for a in sample.answers)


def test_common_words_past_the_list(tmp_path):
    """Past 8,166 words: pairs of words, or a list of the user's."""
    made, listed = {}, tmp_path / "english.json"
    listed.write_text(json.dumps({str(i): f"w{i}" for i in range(30_000)}))
    for name, path in (("pairs", None), ("file", listed)):
        (made[name],) = ruler.samples("cwe", 70_000, word_count, n=1, words=path)
        assert made[name].details["units"] > 8166
        text = made[name].input[made[name].input.rindex("Below is") :]
        numbered = re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", text)
        often = {w for w, n in Counter(numbered).items() if n == 30}
        assert set(made[name].answers) == often
    assert "-" in made["pairs"].input and re.search(r" w\d+ ", made["file"].input)


# ---- haystacks ---------------------------------------------------------------------------


def test_a_haystack_of_ones_own(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text('Mr. Bingley came\n\nin May.  He smiled. "Did he?" Yes!')
    book = Haystack(path)
    assert book.words(7) == "Mr. Bingley came in May. He smiled.".split()
    assert book.words(12) == [*book.words(10), "Mr.", "Bingley"]
    assert sentences(" ".join(book.words(10))) == [
        "Mr. Bingley came in May.", "He smiled.", "\"Did he?\"", "Yes!",
    ]  # fmt: skip
    assert re.fullmatch(r"book.txt sha256:[0-9a-f]{12}", book.name)
    (tmp_path / "essays.json").write_text('{"text": "From a  json file."}')
    assert Haystack(tmp_path / "essays.json").words(4) == ["From", "a", "json", "file."]
    suite = ruler.Suite(tasks=["niah_single_2"], haystack=path)
    assert suite.settings()["haystack"] == book.name
    assert ruler.Suite().settings()["haystack"] == "grammar"


def test_the_grammars_haystack_is_the_same_text_at_every_size():
    assert Haystack(None).words(500)[:100] == Haystack(None).words(100)
    text = Haystack(None).words(30_000)
    assert len(text) == 30_000 and len(set(sentences(" ".join(text)))) > 2500


# ---- scores ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer,references,all_of,part",
    [
        ("It is 12 and 13.", ["12", "13"], 1.0, 1.0),
        ("It is 12.", ["12", "13"], 0.5, 1.0),
        ("none", ["12", "13", "14"], 0.0, 0.0),
        ("PARIS", ["paris"], 1.0, 1.0),
        ("paris", ["Paris", "Lyon"], 0.5, 1.0),
        ("x1234y", ["123"], 1.0, 1.0),  # no borders of words
        ("a\tb", ["a b"], 0.0, 0.0),
        ("a\x07b", ["a\nb"], 1.0, 1.0),  # control characters are newlines
        (" \x00 ", [""], 1.0, 1.0),
        ("", ["x"], 0.0, 0.0),
        ("aa", ["a", "a", "b"], 2 / 3, 1.0),  # no penalty, and equal references count twice
    ],
)
def test_matching(answer, references, all_of, part):
    assert ruler.match_all(answer, references) == pytest.approx(all_of, abs=1e-15)
    assert ruler.match_part(answer, references) == part


def test_scores_of_all_lengths():
    def results(scores, tasks):
        records = [
            {"task": t, "length": n, "score": s, "document": 0, "answer": "a", "truncated": False}
            for n, s in scores.items() for t in tasks
        ]  # fmt: skip
        return Results({"examples": len(records), "settings": {"suite": "ruler"}}, records)

    scores = {4096: 0.9, 8192: 0.87, 16384: 0.856, 32768: 0.5}
    found = ruler.overall(results(scores, ruler.TASKS))
    assert found["effective_length"] == 8192  # 85.6 must be exceeded
    assert found["weighted_up"] == pytest.approx((0.9 + 2 * 0.87 + 3 * 0.856 + 4 * 0.5) / 10)
    assert found["weighted_down"] == pytest.approx((4 * 0.9 + 3 * 0.87 + 2 * 0.856 + 0.5) / 10)
    assert ruler.overall(results(scores, SIX)) == {}  # not RULER's average


# ---- fitting -----------------------------------------------------------------------------


def test_largest_is_what_a_plain_search_finds_in_few_probes():
    r = random.Random(0)
    for _ in range(300):
        fixed, each = r.randrange(500), r.choice([0.3, 1, 7.5, 24, 30.1])
        jump, least = r.choice([0, 0, 3000]), r.randrange(1, 20)
        probes = []

        def cost(n):
            probes.append(n)
            return int(fixed + each * n + (jump if n > 700 else 0))  # noqa: B023

        budget = r.choice([600, 4096, 100_000, 1 << 20])
        if cost(least) > budget:
            with pytest.raises(ValueError, match="smallest prompt"):
                largest(cost, budget, least)
            continue
        probes.clear()
        n = largest(cost, budget, least)
        assert n >= least and cost(n) <= budget < cost(n + 1)
        assert len(probes) < 24, probes


# ---- prompts and arguments ---------------------------------------------------------------


def test_the_three_prefixes(tokenizer):
    def text(prefix):
        return tokenizer.decode(Prompting(tokenizer, prefix).ids("Q?", " The answer is"))

    assert text("raw") == "Q? The answer is"
    chat = "<|im_user|>user<|im_middle|>Q?<|im_end|><|im_assistant|>assistant<|im_middle|>"
    assert text("none") == chat
    assert text("prefill") == f"{chat}The answer is"


def test_documents_are_named_and_ordered(tokenizer):
    suite = ruler.Suite(tasks=["vt", "fwe"], lengths=[800, 600], samples=2)
    documents = suite.documents(tokenizer)
    assert [d.ids for d in documents] == [
        (f"{task}/{n}/{i}",) for n in (600, 800) for task in ("vt", "fwe") for i in range(2)
    ]  # fmt: skip
    (example,) = documents[3].make()
    assert (example.task, example.length, example.id) == ("fwe", 600, "fwe/600/1")
    assert len(example.prompt_ids) + example.max_new_tokens <= 600
    assert example.prompt_ids == documents[3].make()[0].prompt_ids


@pytest.mark.parametrize(
    "options,message",
    [
        ({"tasks": ["niah"]}, "tasks: must be of niah_single_1"),
        ({"tasks": []}, "tasks: must be at least one"),
        ({"tasks": ["vt", "vt"]}, "each once"),
        ({"lengths": []}, "lengths"),
        ({"lengths": [0]}, "lengths"),
        ({"samples": 0}, "samples: must be an integer of at least 1"),
        ({"samples": True}, "samples"),
        ({"prefix": "chat"}, "prefix: must be one of raw, prefill, none"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ruler.Suite(**options)


def test_questions_need_their_files(hotpot, tmp_path):
    assert set(ruler.Suite().settings()["left_out"]) == {"qa_1", "qa_2"}
    with pytest.raises(ValueError, match="qa_1: needs the file of its questions, squad="):
        ruler.Suite(tasks=["qa_1"])
    assert ruler.Suite(hotpot=hotpot, samples=60).settings()["left_out"] == ["qa_1"]
    with pytest.raises(ValueError, match="samples: must be at most 60, the questions of qa_2"):
        ruler.Suite(hotpot=hotpot, samples=61)
    bad = tmp_path / "bad.json"
    bad.write_text('{"data": [{}]}')
    with pytest.raises(ValueError, match="bad.json: must be squad's JSON"):
        list(ruler.samples("qa_1", 4096, word_count, n=1, squad=bad))


def test_a_length_that_nothing_fits(tokenizer):
    (document, *_) = ruler.Suite(tasks=["niah_single_1"], lengths=[150]).documents(tokenizer)
    with pytest.raises(
        ValueError, match="niah_single_1 at 150 tokens: the smallest prompt has"
    ):
        document.make()
