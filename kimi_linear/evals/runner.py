"""Running a suite: documents in turn, batches through the model, a record an example."""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .._files import quote
from .._progress import is_watched
from .results import Results
from .shards import Record, Shard, check_shard, merge, shard_of
from .suite import Document, Example, Repeated, Suite, check_count, tokenizer_name

if TYPE_CHECKING:
    from ..model import Model
    from ..results import Completion

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
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
    examples in one call of the model, by default its max_batch; a document's questions always
    go together. repeats: draws of each answer, whose scores are averaged (avg@k); more than
    one needs a temperature. progress: None (lines on a terminal), True, False or
    callable(done, total). sampling: temperature, top_k, top_p, min_p, repetition_penalty; greedy by default. With a
    temperature each example is drawn alone, from a seed of the suite's and its id.

    Returns the results of what `out` holds by then: of the whole suite in a world of one, and
    in the last of several processes, which writes merged.jsonl and results.json, too. Raises
    ValueError where the model's context is too short, or the folder holds another run.
    """
    if unknown := set(sampling) - set(SAMPLING):
        raise TypeError(f"run: unknown argument {quote(min(unknown))}")
    if rank is None and world is None:
        rank, world = shard_of()
    if check_count(repeats, "repeats") > 1:
        if not sampling.get("temperature"):
            raise ValueError(f"repeats: must be 1 for greedy answers, all alike, got {repeats}")
        suite = Repeated(suite, repeats)
    rank, world = check_shard(rank or 0, 1 if world is None else world)
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
    work = _Work(model, suite, sampling, batch, bars=_shows(progress))
    mine = [d for d in documents if d.number % world == rank]
    with nullcontext(None) if out is None else Shard(out, rank, world, header) as shard:
        done = shard.done if shard else set()
        report = _Progress(progress, header["settings"]["suite"], mine, done)
        records: list[Record] = []
        for found in work.records(mine, done):
            if shard:
                shard.append(found)
            else:
                records += found
            report.add(found)
    if out is None:
        return Results(header, records)
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
            "device": model.device.partition(":")[0],
        },
    }


class _Work:
    """Turns documents into records."""

    def __init__(
        self,
        model: "Model",
        suite: Suite,
        sampling: dict[str, float],
        batch: int,
        *,
        bars: bool,
    ) -> None:
        self._model, self._suite = model, suite
        self._sampling, self._batch = sampling, batch
        self._progress = None if bars else False  # of a long prompt, where somebody looks
        self._seed = suite.settings().get("seed", 0)

    def records(self, documents: list[_Numbered], done: set[str]) -> Iterator[list[Record]]:
        """Records of what is not done, call by call."""
        waiting: list[tuple[_Numbered, int, Example]] = []
        for numbered in documents:
            if done.issuperset(numbered.document.ids):
                continue
            new = [
                (numbered, numbered.first + i, example)
                for i, example in enumerate(numbered.document.make())
                if example.id not in done
            ]
            if waiting and not self._fits_together([*waiting, *new]):
                yield self._ask(waiting)
                waiting = []
            waiting += new
        if waiting:
            yield self._ask(waiting)

    def _fits_together(self, questions: list[tuple[_Numbered, int, Example]]) -> bool:
        budgets = {example.max_new_tokens for _, _, example in questions}
        return len(questions) <= self._batch and len(budgets) == 1

    def _ask(self, questions: list[tuple[_Numbered, int, Example]]) -> list[Record]:
        examples = [example for _, _, example in questions]
        answers = self._answers(examples)
        return [
            _record(numbered.number, index, example, answer, self._suite)
            for (numbered, index, example), answer in zip(questions, answers, strict=True)
        ]

    def _answers(self, examples: list[Example]) -> "list[Completion]":
        """One call of the model, in which a document's questions stand side by side."""
        prompts = [e.prompt_ids for e in examples]
        options: dict[str, Any] = {**self._sampling, "progress": self._progress}
        options["max_new_tokens"] = examples[0].max_new_tokens
        if not self._sampling.get("temperature"):
            answers = self._model.generate(prompts, **options)
            assert isinstance(answers, list)
            return answers
        # Rows of a batch draw from (seed, row): alone, an answer is the same in every batch.
        alone = [
            self._model.generate(e.prompt_ids, seed=_seed(self._seed, e.id), **options)
            for e in examples
        ]
        return [answer for answer in alone if not isinstance(answer, list)]


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def _record(
    document: int, index: int, example: Example, answer: "Completion", suite: Suite
) -> Record:
    n_new = len(answer.token_ids)
    return {
        "id": example.id,
        "index": index,
        "document": document,
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
    """Lines on stderr, one in SECONDS, with the end as the tokens so far foretell it."""

    SECONDS = 10.0

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
        if self._call:
            self._call(self._done, self._total)
        now = time.monotonic()
        if self._shows and (now - self._shown >= self.SECONDS or self._done == self._total):
            self._shown = now
            elapsed = now - self._start
            left = elapsed * (self._left / max(self._tokens, 1) - 1)
            print(
                f"{self._name}: {self._done} of {self._total} examples, "
                f"{_clock(elapsed)} so far, about {_clock(left)} to go",
                file=sys.stderr,
            )


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"
