"""Running a suite: documents in turn, some questions at once, a record an example."""

import hashlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from .. import __version__
from .._files import quote
from .._progress import is_watched
from .._sampling import check_sampling
from .results import Results
from .shards import Record, Shard, check_shard, merge, shard_of
from .suite import Document, Example, Repeated, Suite, check_count, tokenizer_name

if TYPE_CHECKING:
    from ..engine import Engine, Request
    from ..model import Model
    from ..results import Completion

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
TICK = 10.0  # seconds between lines of progress, where no answer comes
Report = Callable[[int, int], Any]  # (examples done, of how many)


def run(
    model: "Model",
    suite: Suite,
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    world: int | None = None,
    batch: int | None = None,
    repeats: int = 1,
    progress: bool | Report | None = None,
    **sampling: float,
) -> Results:
    """Ask a model the questions of a suite.

    out: a folder for the answers, written as they come; a run that was interrupted goes on
    there. None keeps them in memory. rank, world: this process takes the documents i with
    i % world == rank; by default from the launcher's variables (torchrun, Slurm, MPI). batch:
    questions put to the model at once, by default its max_batch. repeats: draws of each answer,
    whose scores are averaged (avg@k); more than one needs a temperature. progress: None (lines
    on a terminal), True, False or callable(done, total). sampling: temperature, top_k, top_p,
    min_p, repetition_penalty; greedy by default. With a temperature each example is drawn from
    a seed of its own, the suite's and its id's. The model's prefix cache is on meanwhile.

    Returns the results of what `out` holds by then: of the whole suite in a world of one, and
    in the last of several processes, which writes merged.jsonl and results.json, too. Raises
    ValueError or TypeError naming the argument, and ValueError where the model's context is too
    short, or the folder holds another run.
    """
    if unknown := set(sampling) - set(SAMPLING):
        raise TypeError(f"run: unknown argument {quote(min(unknown))}")
    check_sampling(model.config.vocab_size, (), **sampling)  # type: ignore[arg-type]
    if (rank is None) != (world is None):
        raise ValueError(
            f"rank, world: must be given together, got rank {rank} of {world}"
        )
    if rank is None or world is None:
        rank, world = shard_of()
    if check_count(repeats, "repeats") > 1:
        if not sampling.get("temperature"):
            raise ValueError(f"repeats: must be 1 for greedy answers, all alike, got {repeats}")
        suite = Repeated(suite, repeats)
    check_shard(rank, world)
    if world > 1 and out is None:
        raise ValueError(f"out: must be a folder for process {rank} of {world}")
    if suite.max_context > model.plan.max_context:
        raise ValueError(
            f"max_context: must be at least {suite.max_context} for this suite, "
            f"the model has {model.plan.max_context}"
        )
    documents = list(_number(suite.documents(model.tokenizer)))
    header = _header(model, suite, documents, sampling)
    batch = check_count(model.plan.max_batch if batch is None else batch, "batch")
    asking = _Asking(model, suite, sampling, batch)
    mine = [d for d in documents if d.number % world == rank]
    with nullcontext(None) if out is None else Shard(out, rank, world, header) as shard:
        done = shard.done if shard else set()
        report = _Progress(progress, header["settings"]["suite"], mine, done)
        records: list[Record] = []
        with closing(asking.records(_questions(mine, done))) as answers:
            for found in answers:
                if shard and found:
                    shard.append(found)
                records += found
                report.add(found)
    if out is None:
        return Results(header, sorted(records, key=lambda record: record["index"]))
    results = merge(out, partial=True)
    return merge(out) if results.complete else results


@dataclass(frozen=True)
class _Numbered:
    """A document, its number, and that of its first example."""

    document: Document
    number: int
    first: int


def _number(documents: list[Document]) -> Iterator[_Numbered]:
    first = 0
    for number, document in enumerate(documents):
        yield _Numbered(document, number, first)
        first += len(document.ids)


def _header(
    model: "Model", suite: Suite, documents: list[_Numbered], sampling: dict[str, float]
) -> dict[str, Any]:
    """All that defines a run; two files with the same header may be joined."""
    return {
        "kimi_linear": __version__,
        "settings": suite.settings(),
        "examples": sum(len(d.document.ids) for d in documents),
        "tokenizer": tokenizer_name(model.tokenizer),
        "sampling": {"temperature": 0.0, **sampling},
        "model": {
            "name": model.path.name if model.path else "random weights",
            "parameters": model.config.parameter_count(),
            "dtype": model.dtype,
            "kv_cache_dtype": model.kv_cache_dtype,
            "device": model.device.partition(":")[0],
        },
    }


@dataclass(frozen=True)
class _Question:
    """An example, the number of its document, and its own."""

    document: int
    index: int
    example: Example


def _questions(documents: list[_Numbered], done: set[str]) -> Iterator[_Question]:
    """What is not done; a document is made when the question before its first was taken."""
    for numbered in documents:
        if not done.issuperset(numbered.document.ids):
            for i, example in enumerate(numbered.document.make()):
                if example.id not in done:
                    yield _Question(numbered.number, numbered.first + i, example)


class _Asking:
    """Puts questions to a model, some at once, and gives records as answers come.

    An engine runs them: one that ends early makes room for the next, and the next document is
    made while it works. With the prefix cache a text that several share is read once.
    """

    def __init__(
        self, model: "Model", suite: Suite, sampling: dict[str, float], batch: int
    ) -> None:
        self._model, self._suite, self._sampling, self._batch = model, suite, sampling, batch
        self._seed = suite.settings().get("seed", 0)
        self._answered: SimpleQueue[tuple[_Question, Request]] = SimpleQueue()

    def records(self, questions: Iterator[_Question]) -> Generator[list[Record], None, None]:
        """One record as it comes, or none where TICK seconds went by without any."""
        from ..engine import Engine

        asked = 0
        with _prefixes_kept(self._model), Engine(self._model) as engine:
            for question in questions:
                while asked == self._batch:
                    found = self._next()
                    asked -= len(found)
                    yield found
                self._ask(engine, question)
                asked += 1
            while asked:
                found = self._next()
                asked -= len(found)
                yield found

    def _ask(self, engine: "Engine", question: _Question) -> None:
        example = question.example
        options: dict[str, Any] = {**self._sampling, "max_new_tokens": example.max_new_tokens}
        if self._sampling.get("temperature"):
            options["seed"] = _seed(self._seed, example.id)
        request = engine.submit(example.prompt_ids, **options)
        request.add_done_callback(lambda r: self._answered.put((question, r)))

    def _next(self) -> list[Record]:
        try:
            question, request = self._answered.get(timeout=TICK)
        except Empty:
            return []
        return [_record(question, request.result(), self._suite)]


@contextmanager
def _prefixes_kept(model: "Model") -> Iterator[None]:
    before = model.prefix_cache
    model.prefix_cache = True
    try:
        yield
    finally:
        model.prefix_cache = before


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def _record(question: _Question, answer: "Completion", suite: Suite) -> Record:
    example, n_new = question.example, len(answer.token_ids)
    return {
        "id": example.id,
        "index": question.index,
        "document": question.document,
        "task": example.task,
        "length": example.length,
        **suite.grade(example, answer.text),
        "answer": answer.text,
        "references": example.references,
        "prompt_tokens": len(example.prompt_ids),
        "new_tokens": n_new,
        "finish_reason": answer.finish_reason,
        "truncated": answer.finish_reason == "length" and n_new < example.max_new_tokens,
        **example.details,
    }


def _shows(progress: bool | Report | None) -> bool:
    return progress is True or (progress is None and is_watched())


class _Progress:
    """Lines on stderr, one in TICK seconds, with the end as the tokens so far foretell it."""

    def __init__(
        self,
        progress: bool | Report | None,
        name: str,
        documents: list[_Numbered],
        done: set[str],
    ) -> None:
        self._call = progress if callable(progress) else None
        self._shows = _shows(progress)
        if progress not in (None, True, False) and self._call is None:
            raise TypeError(
                f"progress: must be None, True, False or a callable, got {progress!r:.60}"
            )
        self._name = name
        lengths = {i: d.document.length for d in documents for i in d.document.ids}
        self._total, self._done = len(lengths), sum(i in done for i in lengths)
        self._left = sum(n for i, n in lengths.items() if i not in done)
        self._tokens, self._lengths = 0, lengths
        self._start = self._shown = time.monotonic()
        if self._shows and self._done:
            print(f"{name}: {self._done} of {self._total} examples are done", file=sys.stderr)

    def add(self, records: list[Record]) -> None:
        self._done += len(records)
        self._tokens += sum(self._lengths[r["id"]] for r in records)
        if self._call and records:
            self._call(self._done, self._total)
        now = time.monotonic()
        if self._shows and (now - self._shown >= TICK or self._done == self._total):
            self._shown = now
            elapsed = now - self._start
            text = f"{self._done} of {self._total} examples, {_clock(elapsed)} so far"
            if self._tokens:
                left = elapsed * (self._left / self._tokens - 1)
                text += f", about {_clock(left)} to go"
            print(f"{self._name}: {text}", file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"
