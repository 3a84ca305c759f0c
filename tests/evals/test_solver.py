"""A model that searches the text of the question scores 100 % on every retrieval task: through
the whole of `run`, from token ids back to answers."""

import json
import re
from types import SimpleNamespace

import fake_engine
import pytest
from ruler_facts import solve, write_files

from kimi_linear import Tokenizer
from kimi_linear.evals import jsonkv, mrcr, ruler, run
from kimi_linear.evals._mrcr_synth import ORDINALS
from kimi_linear.model import SMALL_MODEL
from kimi_linear.results import Completion, Stats

TURN = re.compile(
    r"<\|im_(user|assistant)\|>\w+<\|im_middle\|>(.*?)(?:<\|im_end\|>|$)", re.DOTALL
)
STATS = Stats(1, 0, 1, 0.0, 0.0, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_dir(SMALL_MODEL)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr("kimi_linear.engine.Engine", fake_engine.Engine)


class Searcher(fake_engine.Model):
    """Answers the last user's turn of a prompt by `search`(turns)."""

    path, dtype, device = SMALL_MODEL, "f32", "cpu"
    config = SimpleNamespace(parameter_count=lambda: 0, vocab_size=1)
    plan = SimpleNamespace(max_context=1 << 20, max_batch=8)

    def __init__(self, tokenizer, search):
        self.tokenizer, self.search = tokenizer, search

    def answer(self, ids, options):
        text = self.search(TURN.findall(self.tokenizer.decode(ids)))
        return Completion(text, self.tokenizer.encode(text), ids, "stop", None, STATS)


def certain(results):
    return {(row.task, row.length): (row.score, row.truncated) for row in results.rows}


@pytest.mark.parametrize("task", ruler.TASKS)
def test_ruler(task, tokenizer, tmp_path):
    def search(turns):
        (_, question), (_, opening) = turns
        assert opening.startswith(("The special magic", "Answer:"))
        return " ".join(solve(task, question))

    suite = ruler.Suite(tasks=[task], lengths=[1024, 4096], samples=4, **write_files(tmp_path))
    found = certain(run(Searcher(tokenizer, search), suite))
    assert found == {(task, n): (1.0, 0) for n in (1024, 4096)}


def test_mrcr_synth(tokenizer):
    def search(turns):
        code, ordinal, what = re.fullmatch(
            r"Prepend (\w{10}) to the (\w+) (.+)\. Do not include any other text .*",
            turns[-2][1],
        ).groups()
        assert turns[-1] == ("assistant", "")
        asks = [i for i, (role, text) in enumerate(turns[:-2])
                if role == "user" and re.fullmatch(rf"Write an? {re.escape(what)}\.", text)]  # fmt: skip
        return code + turns[asks[ORDINALS.index(ordinal)] + 1][1]

    suite = mrcr.Synth(lengths=[3000], samples=4, questions=2)
    found = certain(run(Searcher(tokenizer, search), suite))
    assert found == {(f"{n} needles", 3000): (1.0, 0) for n in (2, 4, 8)}


def test_json_objects(tokenizer):
    def search(turns):
        data, _, key = turns[0][1].partition("JSON data:\n")[2].rpartition("\n\nKey: ")
        return json.loads(data)[json.loads(key)]

    results = run(
        Searcher(tokenizer, search), jsonkv.Suite(lengths=[2048], samples=8, questions=3)
    )
    assert certain(results) == {("jsonkv", 2048): (1.0, 0)}
