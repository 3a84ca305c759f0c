"""Runs: shards, interruptions, merges and the table, with a model that costs nothing."""

import json
import multiprocessing
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fake_engine
import pytest

import kimi_linear as kl
from kimi_linear import evals
from kimi_linear.evals.shards import Shard
from kimi_linear.evals.suite import Document, Example
from kimi_linear.results import Completion, Stats

TOKENIZER = SimpleNamespace(
    vocab_size=3, control_tokens={"[EOS]": 2}, token_bytes=lambda i: b"ab"[i : i + 1]
)
STATS = Stats(1, 0, 1, 0.0, 0.0, 0)


class Toy:
    """Documents of one to three questions, whose answers are numbers."""

    max_context = 100

    def __init__(self, n=30, seed=0):
        self.n, self.seed, self.made = n, seed, []

    def settings(self):
        return {"suite": "jsonkv", "seed": self.seed, "n": self.n}

    def documents(self, tokenizer):
        return [
            Document(tuple(f"{i}/{q}" for q in range(1 + i % 3)), 50, lambda i=i: self.make(i))
            for i in range(self.n)
        ]

    def make(self, i):
        self.made.append(i)
        return [
            Example(f"{i}/{q}", "odd" if i % 2 else "even", 50, [i, q, self.seed], 5 if i < self.n // 2 else 7,
                    [str(i)], {"units": i})
            for q in range(1 + i % 3)
        ]  # fmt: skip

    def grade(self, example, answer):
        return {"score": float(answer == example.references[0])}


@pytest.fixture(autouse=True, scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kimi_linear.engine.Engine", fake_engine.Engine)
        yield


class Parrot(fake_engine.Model):
    """Says the first id of a prompt, wrong for every seventh; may fail at a call or be slow."""

    path, dtype, device, tokenizer = Path("/models/parrot"), "f32", "cpu:0", TOKENIZER
    plan = SimpleNamespace(max_context=100, max_batch=4)
    config = SimpleNamespace(parameter_count=lambda: 12, vocab_size=3)

    def __init__(self, fail_at=None, seconds=0.0):
        self.calls, self.fail_at, self.seconds = [], fail_at, seconds

    def asked(self, prompt, options):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((prompt, options))

    def answer(self, prompt, options):
        time.sleep(self.seconds)
        text = "-" if prompt[0] % 7 == 6 else str(prompt[0])
        if options.get("temperature"):
            text += f" {options['seed']}"
        return Completion(text, [1] * options["max_new_tokens"], prompt, "length", None, STATS)


def merged(folder):
    return (Path(folder) / "merged.jsonl").read_bytes()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The merged file of an undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("single")
    evals.run(Parrot(), Toy(), folder)
    return merged(folder)


# ---- a run -------------------------------------------------------------------------------


def test_a_run_answers_every_example_once():
    model, suite = Parrot(), Toy()
    results = evals.run(model, suite)
    assert results.complete and len(results.records) == 60
    assert [r["index"] for r in results.records] == list(range(60))
    assert suite.made == list(range(30))
    record = results.records[-1]
    assert record == {
        "id": "29/2", "index": 59, "document": 29, "task": "odd", "length": 50, "score": 1.0,
        "answer": "29", "references": ["29"], "prompt_tokens": 3, "new_tokens": 7,
        "finish_reason": "length", "truncated": False, "units": 29,
    }  # fmt: skip
    assert results.header["model"] == {
        "name": "parrot", "parameters": 12, "dtype": "f32", "kv_cache_dtype": "f32",
        "device": "cpu",
    }  # fmt: skip


@pytest.mark.parametrize("batch", [1, 4])
def test_questions_are_put_in_their_order_some_at_once(batch):
    class Counting(Parrot):
        under_way, most, lock = 0, 0, threading.Lock()

        def asked(self, prompt, options):
            super().asked(prompt, options)
            with self.lock:
                self.under_way += 1
                self.most = max(self.most, self.under_way)

        def answer(self, prompt, options):
            end = time.monotonic() + 20
            while self.most < batch and time.monotonic() < end:
                time.sleep(0.01)  # until as many are there as may be
            time.sleep(0.005)  # and one more could be
            with self.lock:
                self.under_way -= 1
            return super().answer(prompt, options)

    model = Counting()
    evals.run(model, Toy(), batch=batch)
    assert [p for p, _ in model.calls] == [
        e.prompt_ids for i in range(30) for e in Toy().make(i)
    ]  # so those of a document stand side by side, and only the first reads it
    assert model.most == batch
    for prompt, options in model.calls:
        assert options == {"max_new_tokens": 5 if prompt[0] < 15 else 7}
    assert model.prefix_cache is False  # again


def test_an_answer_is_written_when_it_comes(tmp_path):
    """Not when those before it have come: they would be lost with a process that is killed."""

    class Late(Parrot):
        def answer(self, prompt, options):
            if prompt[:2] == [0, 0]:
                shard = tmp_path / "shard-00000-of-00001.jsonl"
                deadline = time.monotonic() + 10
                while b'"id": "1/0"' not in shard.read_bytes() and time.monotonic() < deadline:
                    time.sleep(0.01)
                self.seen = shard.read_bytes()
            return super().answer(prompt, options)

    model = Late()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_engine, "ThreadPoolExecutor", lambda n: ThreadPoolExecutor(2))
        evals.run(model, Toy(), tmp_path, batch=4)
    assert b'"id": "1/0"' in model.seen and b'"id": "0/0"' not in model.seen


def test_an_error_of_an_answer_ends_the_run(tmp_path):
    class Broken(Parrot):
        def answer(self, prompt, options):
            if prompt[0] == 5:
                raise kl.NumericalError("logits: must be finite")
            return super().answer(prompt, options)

    model = Broken()
    with pytest.raises(kl.NumericalError, match="logits"):
        evals.run(model, Toy(), tmp_path)
    assert model.prefix_cache is False
    assert evals.merge(tmp_path, partial=True).records[-1]["document"] <= 5


def test_with_a_temperature_an_answer_is_the_same_in_every_batch(tmp_path):
    answers = [
        {
            r["id"]: r["answer"]
            for r in evals.run(Parrot(), Toy(), batch=n, temperature=0.7).records
        }
        for n in (1, 4)
    ]
    assert answers[0] == answers[1]
    assert len(set(answers[0].values())) > 50  # each id has its own seed
    assert answers[0] != {
        r["id"]: r["answer"] for r in evals.run(Parrot(), Toy(seed=1), temperature=0.7).records
    }


def test_several_draws_of_an_answer(tmp_path):
    """avg@3: three answers of each question from seeds of their own, errors of documents."""

    class Lucky(Parrot):
        def answer(self, prompt, options):
            said = str(prompt[0]) if options["seed"] % 2 else "-"
            return Completion(said, [1], prompt, "stop", None, STATS)

    suite = Toy(n=8)
    results = evals.run(Lucky(), suite, tmp_path, temperature=1.0, repeats=3)
    assert results.complete and len(results.records) == 45
    assert [r["id"] for r in results.records[:4]] == ["0/0~0", "0/0~1", "0/0~2", "1/0~0"]
    assert results.header["settings"]["repeats"] == 3
    assert suite.made == list(range(8))  # a document is made once
    (even, odd) = results.rows
    assert (even.n, odd.n) == (21, 24) and 0 < even.score < 1
    documents = {}
    for r in results.records:
        if r["task"] == "even":
            documents.setdefault(r["document"], []).append(r["score"])
    means = [sum(x) / len(x) for x in documents.values()]
    assert even.error == pytest.approx(statistics.stdev(means) / 2)  # of four documents
    assert "n 21 to 24 a cell, avg@3," in str(results) and "repeats 3" in str(results)
    first = merged(tmp_path)
    evals.run(Lucky(), Toy(n=8), tmp_path, temperature=1.0, repeats=3)
    assert merged(tmp_path) == first
    with pytest.raises(ValueError, match="another run: examples was 45, now 15"):
        evals.run(Lucky(), Toy(n=8), tmp_path, temperature=1.0)
    once = evals.run(Lucky(), Toy(n=8), temperature=1.0)
    assert "repeats" not in once.header["settings"] and "avg@" not in str(once)


# ---- shards ------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 7, 40])
def test_shares_join_to_the_single_run(tmp_path, single, world):
    for rank in random.Random(world).sample(range(world), world):
        suite = Toy()
        share = evals.run(Parrot(), suite, tmp_path, rank=rank, world=world)
        assert suite.made == list(range(rank, 30, world))
        assert share.complete == (len(list(tmp_path.glob("shard-*"))) == world)
    assert evals.merge(tmp_path).complete
    assert merged(tmp_path) == single
    ids = [json.loads(line)["id"] for line in single.splitlines()[1:]]
    assert ids == [i for d in Toy().documents(TOKENIZER) for i in d.ids]


def test_interrupted_anywhere_and_taken_up_by_others(tmp_path, single):
    """Ctrl-C after some calls, then another number of processes, until all is done."""
    r = random.Random(5)
    for scenario in range(12):
        folder = tmp_path / str(scenario)
        lost = 0
        for _ in range(r.randrange(1, 6)):
            world = r.choice([1, 1, 2, 3])
            model = Parrot(fail_at=r.randrange(0, 6))
            try:
                evals.run(model, Toy(), folder, rank=r.randrange(world), world=world)
            except KeyboardInterrupt:
                lost += 1
        found = b"".join(p.read_bytes() for p in folder.glob("shard-*")).count(b'{"id"')
        last = Parrot()
        results = evals.run(last, Toy(), folder)
        assert results.complete and merged(folder) == single
        assert len(last.calls) == 60 - found
        again = Parrot()
        evals.run(again, Toy(), folder)
        assert again.calls == []


def run_slowly(folder):
    evals.run(Parrot(seconds=0.004), Toy(), folder)


def test_killed_ten_times(tmp_path, single):
    """SIGKILL at random moments; an example is asked again only if it was in flight."""
    r, kills, context = random.Random(), 0, multiprocessing.get_context("fork")
    shard = tmp_path / "shard-00000-of-00001.jsonl"
    before = 0
    while kills < 10:
        process = context.Process(target=run_slowly, args=(tmp_path,))
        process.start()
        time.sleep(r.uniform(0.0, 0.03))
        process.kill()
        process.join()
        kills += process.exitcode == -9
        if process.exitcode == 0:  # it was faster
            assert merged(tmp_path) == single
            for path in tmp_path.iterdir():
                path.unlink()
            before = 0
        lines = shard.read_bytes().count(b"\n") if shard.exists() else 0
        assert lines >= before
        before = lines
    evals.run(Parrot(), Toy(), tmp_path)
    assert merged(tmp_path) == single


def test_a_torn_line_is_asked_again(tmp_path, single):
    evals.run(Parrot(), Toy(), tmp_path)
    shard = tmp_path / "shard-00000-of-00001.jsonl"
    whole = shard.read_bytes()
    for cut in (
        len(whole) - 1,
        len(whole) - 30,
        whole.index(b"\n") + 5,
        whole.index(b"\n"),
        3,
        0,
    ):
        shard.write_bytes(whole[:cut])
        evals.run(Parrot(), Toy(), tmp_path)
        assert merged(tmp_path) == single and shard.read_bytes().endswith(b"\n")


def test_a_document_half_done_is_finished(tmp_path, single):
    evals.run(Parrot(), Toy(), tmp_path)
    shard = tmp_path / "shard-00000-of-00001.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join(line for line in lines if b'"id": "2/1"' not in line))
    model = Parrot()
    evals.run(model, Toy(), tmp_path)
    assert [p for p, _ in model.calls] == [[2, 1, 0]]
    assert merged(tmp_path) == single


# ---- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda: evals.run(Parrot(), Toy(seed=1), OUT), "another run: seed was 0, now 1"),
        (lambda: evals.run(Parrot(), Toy(n=31), OUT), "another run: examples was 60, now"),
        (
            lambda: evals.run(Parrot(), Toy(), OUT, top_p=0.5),
            "another run: top_p was None, now 0.5",
        ),
    ],
)
def test_a_folder_of_another_run(tmp_path, monkeypatch, change, message):
    monkeypatch.setitem(globals(), "OUT", tmp_path)
    evals.run(Parrot(), Toy(), tmp_path)
    with pytest.raises(ValueError, match=message):
        change()


def test_a_run_that_failed_before_its_first_answer_leaves_the_folder_free(tmp_path, monkeypatch):
    suite = Toy(seed=1)
    monkeypatch.setattr(suite, "make", lambda i: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evals.run(Parrot(), suite, tmp_path)
    assert evals.run(Parrot(), Toy(), tmp_path).complete


def test_what_cannot_be_merged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of a run"):
        evals.merge(tmp_path)
    evals.run(Parrot(), Toy(), tmp_path, rank=0, world=2)
    with pytest.raises(ValueError, match="30 of 60 examples are missing"):
        evals.merge(tmp_path)
    part = evals.merge(tmp_path, partial=True)
    assert not part.complete and "preliminary" in str(part)
    assert not (tmp_path / "merged.jsonl").exists()
    (shard,) = tmp_path.glob("shard-*")
    other = tmp_path / "shard-00001-of-00002.jsonl"
    other.write_bytes(shard.read_bytes().replace(b'"answer": "2"', b'"answer": "3"'))
    with pytest.raises(ValueError, match="answers 2/0 otherwise"):
        evals.merge(tmp_path)
    other.write_bytes(shard.read_bytes().replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(ValueError, match="another run: seed was 1, now 0"):
        evals.merge(tmp_path)
    other.write_bytes(shard.read_bytes() + b"{nonsense\n")
    with pytest.raises(ValueError, match=r"shard-00001-of-00002.jsonl: line 32: must be JSON"):
        evals.merge(tmp_path)


def test_the_merged_file_is_enough(tmp_path, single):
    (tmp_path / "merged.jsonl").write_bytes(single)
    results = evals.merge(tmp_path, partial=True)
    assert results.complete and len(results.records) == 60
    assert {p.name for p in tmp_path.iterdir()} == {"merged.jsonl"}


def test_one_file_has_one_writer(tmp_path):
    header = {"examples": 0}
    with Shard(tmp_path, 0, 1, header), pytest.raises(ValueError, match="another process"):
        Shard(tmp_path, 0, 1, header)
    Shard(tmp_path, 0, 1, header).__exit__()


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"rank": 2, "world": 2}, ValueError, "rank 2 of 2"),
        ({"rank": 1}, ValueError, "rank, world: must be given together"),
        ({"world": 3}, ValueError, "rank, world: must be given together"),
        ({"rank": 0, "world": 2}, ValueError, "out: must be a folder"),
        ({"batch": -1}, ValueError, "batch"),
        ({"progress": 3}, TypeError, "progress"),
        ({"repeats": 0, "temperature": 1.0}, ValueError, "repeats: must be an integer of"),
        ({"repeats": 2}, ValueError, "repeats: must be 1 for greedy answers"),
        ({"max_tokens": 3}, TypeError, "unknown argument 'max_tokens'"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        evals.run(Parrot(), Toy(), **options)


def test_a_wrong_temperature_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="temperature: must be a number in"):
        evals.run(Parrot(), Toy(), tmp_path / "run", temperature=-1)
    assert evals.run(Parrot(), Toy(), tmp_path / "run", temperature=0.5).complete


def test_a_context_that_is_too_short():
    suite = Toy()
    suite.max_context = 101
    with pytest.raises(
        ValueError, match="max_context: must be at least 101 .*the model has 100"
    ):
        evals.run(Parrot(), suite)


# ---- results -----------------------------------------------------------------------------


def test_the_table_and_its_numbers(tmp_path):
    results = evals.run(Parrot(), Toy(n=8), tmp_path)
    even, odd = results.rows
    # Documents 0, 2, 4, 6 with 1, 3, 2, 1 questions, of which number 6 is wrong.
    assert (even.task, even.n, even.score) == ("even", 7, 6 / 7)
    assert even.error == pytest.approx(0.25)  # of the documents' means 1, 1, 1, 0
    assert (odd.n, odd.score, odd.error) == (8, 1.0, 0.0)
    assert results.means() == {50: (pytest.approx(13 / 14), pytest.approx(0.125))}
    text = str(results)
    for line in (
        "jsonkv: 15 of 15 examples", "model parrot, 12 parameters, f32, cpu",
        "even  85.71 \N{PLUS-MINUS SIGN}25.00", "odd   100.00 \N{PLUS-MINUS SIGN}0.00",
        "mean  92.86 \N{PLUS-MINUS SIGN}12.50", "n 7 to 8 a cell", "truncations 0", "seed 0", "temperature 0",
    ):  # fmt: skip
        assert line in text, text
    assert "tokenizer tiktoken of 3 ids sha256:" in text
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["rows"][0]["score"] == 6 / 7 and saved["examples"] == 15
    assert saved["means"] == [{"length": 50, "score": 13 / 14, "error": pytest.approx(0.125)}]


def test_a_single_document_has_no_error():
    results = evals.run(Parrot(), Toy(n=1))
    assert results.rows[0].error is None and results.means()[50] == (1.0, None)
    assert "\N{PLUS-MINUS SIGN}0" not in str(results)


def test_cut_and_empty_answers_are_counted():
    class Cut(Parrot):
        def answer(self, prompt, options):
            text, n = ("", 2) if prompt[0] == 3 else ("3", options["max_new_tokens"])
            return Completion(text, [1] * n, prompt, "length", None, STATS)

    results = evals.run(Cut(), Toy(n=4))
    assert [(r.empty, r.truncated) for r in results.rows] == [(0, 0), (1, 1)]
    assert "truncations 1" in str(results) and "do not count" in str(results)


def test_progress(tmp_path, capsys):
    seen = []
    evals.run(Parrot(), Toy(n=8), progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (15, 15) and seen == sorted(seen)
    evals.run(Parrot(fail_at=None), Toy(n=8), tmp_path, progress=True)
    evals.run(Parrot(), Toy(n=8), tmp_path, progress=True)
    errors = capsys.readouterr().err
    assert "jsonkv: 15 of 15 examples, 0:00:00 so far, about 0:00:00 to go" in errors
    assert "jsonkv: 15 of 15 examples are done" in errors


def test_importing_the_package_imports_none_of_it():
    import subprocess
    import sys

    code = (
        "import sys, kimi_linear.evals as e\n"
        "assert not [m for m in sys.modules if m.startswith('kimi_linear.evals.')]\n"
        "e.run; e.merge; assert 'numpy' not in sys.modules\n"
        "print(*dir(e))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == set(evals.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        evals.nothing  # noqa: B018


def test_the_package_is_a_name_of_kimi_linear():
    assert kl.evals is evals and "evals" in dir(kl)
