"""RULER: thirteen synthetic tasks at any length, as NVIDIA/RULER defines them.

Six need nothing from outside but the word lists of wonderwords; five hide needles in essays,
where a user's file or English from a grammar stands in for the essays that upstream downloads;
two ask questions of SQuAD and HotpotQA, whose files the user has. README.md says what that
does to comparisons.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from operator import mul
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .._files import quote
from ._ruler_lists import CommonWords, FrequentWords, VariableTracking
from ._ruler_niah import Niah
from ._ruler_qa import QA
from ._ruler_task import Count, Filler, Sample, Setting, Task
from ._sources import Haystack
from .suite import (
    Document,
    Example,
    Prompting,
    check_count,
    check_lengths,
    check_prefix,
    file_name,
)

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer
    from .results import Results

__all__ = [
    "TASKS", "CommonWords", "FrequentWords", "Niah", "QA", "Sample", "Suite", "Task",
    "VariableTracking", "match_all", "match_part", "overall", "samples",
]  # fmt: skip

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Niah("niah_single_1", "noise"),
        Niah("niah_single_2", "essay"),
        Niah("niah_single_3", "essay", values="uuids"),
        Niah("niah_multikey_1", "essay", n_keys=4),
        Niah("niah_multikey_2", "needle"),
        Niah("niah_multikey_3", "needle", keys="uuids", values="uuids"),
        Niah("niah_multivalue", "essay", n_values=4),
        Niah("niah_multiquery", "essay", n_queries=4),
        VariableTracking(),
        CommonWords(),
        FrequentWords(),
        QA("qa_1", "squad"),
        QA("qa_2", "hotpot"),
    )
}
EFFECTIVE = 0.856  # the mean of the thirteen that a length counts as mastered from


class Suite:
    """RULER at some lengths.

    tasks: names of TASKS or tasks of one's own; by default all whose files are given. lengths:
    tokens of prompt and answer together, which no sample exceeds. samples: of each task at each
    length (upstream has 500). seed: sample i is a function of it and i. prefix: "raw",
    "prefill" or "none" (see Prompting). haystack: a text file for the essays, None for English
    from a grammar. squad, hotpot: files of the questions. words: more words for cwe past 8,166, one a
    line or RULER's english_words.json. max_new_tokens: in place of each task's own, where the
    model should explain itself (prefix "none").
    """

    def __init__(
        self,
        *,
        tasks: Sequence[str | Task] | None = None,
        lengths: Sequence[int] = (4096,),
        samples: int = 50,
        seed: int = 42,
        prefix: str = "prefill",
        haystack: str | Path | None = None,
        squad: str | Path | None = None,
        hotpot: str | Path | None = None,
        words: str | Path | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        given = {"squad": squad, "hotpot": hotpot}
        if tasks is None:
            tasks = [t for t in TASKS.values() if not isinstance(t, QA) or given[t.dataset]]
        self.tasks = tuple(map(_task, tasks))
        names = [t.name for t in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks: must be at least one, each once, got {quote(names)}")
        self.lengths = check_lengths(lengths)
        self.samples = check_count(samples, "samples")
        self.seed, self.prefix = seed, check_prefix(prefix)
        self.haystack = Haystack(haystack)
        self._files = {k: None if p is None else str(p) for k, p in given.items()}
        self._files["words"] = None if words is None else str(words)
        for task in self.tasks:
            if isinstance(task, QA) and self.samples > (n := task.size(self._files)):
                raise ValueError(
                    f"samples: must be at most {n}, the questions of {task.name}, got {samples}"
                )
        self._max_new = max_new_tokens and check_count(max_new_tokens, "max_new_tokens")
        self.max_context = max(self.lengths) + max(map(self._extra, self.tasks))

    def settings(self) -> dict[str, Any]:
        """All that defines the examples beside the tokenizer."""
        names = {t.name for t in self.tasks}
        files = {k: file_name(p) for k, p in self._files.items() if p is not None}
        return {
            "suite": "ruler",
            "tasks": {t.name: _parameters(t) for t in self.tasks},
            "left_out": [name for name in TASKS if name not in names],
            "lengths": list(self.lengths),
            "samples": self.samples,
            "seed": self.seed,
            "prefix": self.prefix,
            "haystack": self.haystack.name,
            "words": "wonderwords, past 8,166 its adjective-noun pairs",
            **files,
            "max_new_tokens": self._max_new,
        }

    def documents(self, tokenizer: "Tokenizer") -> list[Document]:
        """One document a sample: by length, then task, then index."""
        prompting = Prompting(tokenizer, self.prefix)
        return [
            self._document(task, length, i, partial(filler, task, length), prompting)
            for filler in [cache(partial(self._filler, count=prompting.count))]
            for length in self.lengths
            for task in self.tasks
            for i in range(self.samples)
        ]

    def _document(
        self,
        task: Task,
        length: int,
        index: int,
        filler: Callable[[], Filler],
        prompting: Prompting,
    ) -> Document:
        name = f"{task.name}/{length}/{index}"

        def make() -> list[Example]:
            sample = filler().sample(index)
            ids = prompting.ids(sample.input, sample.opening)
            n_new = self._max_new or task.max_new_tokens
            return [
                Example(name, task.name, length, ids, n_new, sample.answers, sample.details)
            ]

        return Document((name,), length, make)

    def _filler(self, task: Task, length: int, count: Count) -> Filler:
        return Filler(task, Setting(length, count, self.seed, self.haystack, **self._files))

    def _extra(self, task: Task) -> int:
        """Tokens past the length that an answer of max_new_tokens takes."""
        return max(0, (self._max_new or 0) - task.max_new_tokens)

    def grade(self, example: Example, answer: str) -> dict[str, Any]:
        """The share of the answers found, or whether any is."""
        task = next(t for t in self.tasks if t.name == example.task)
        match = match_all if task.match == "all" else match_part
        return {"score": match(answer, example.references)}


def samples(
    task: str | Task,
    length: int,
    count: Count,
    *,
    n: int,
    seed: int = 42,
    haystack: str | Path | None = None,
    squad: str | Path | None = None,
    hotpot: str | Path | None = None,
    words: str | Path | None = None,
) -> Iterator[Sample]:
    """Samples of a task without a model; arguments as in Suite.

    count: (input, opening) -> tokens of the prompt.
    """
    files = {"squad": squad, "hotpot": hotpot, "words": words}
    paths = {k: None if p is None else str(p) for k, p in files.items()}
    filler = Filler(_task(task), Setting(length, count, seed, Haystack(haystack), **paths))
    return map(filler.sample, range(n))


def _task(task: str | Task) -> Task:
    if not isinstance(task, str):
        return task
    if task not in TASKS:
        raise ValueError(f"tasks: must be of {', '.join(TASKS)}, got {quote(task)}")
    return TASKS[task]


def _parameters(task: Task) -> dict[str, Any]:
    return {k: v for k, v in vars(task).items() if k != "name"}


# ---- scores ------------------------------------------------------------------------------


def match_all(answer: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the answer, whatever their case."""
    found = _clean(answer)
    return fmean(ref.lower() in found for ref in references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """1.0 where any of the references stands in the answer, whatever its case."""
    found = _clean(answer)
    return float(any(ref.lower() in found for ref in references))


def _clean(answer: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()


def overall(results: "Results") -> dict[str, Any]:
    """What RULER says of all lengths, where its thirteen tasks were run; else nothing.

    effective_length: the longest length whose mean exceeds 85.6 %, or None. weighted_up,
    weighted_down: the mean with weights that grow, or fall, by one from length to length.
    """
    if {row.task for row in results.rows} != set(TASKS):
        return {}
    means = {length: mean for length, (mean, _) in results.means().items()}
    up = range(1, len(means) + 1)
    return {
        "effective_length": max((n for n, m in means.items() if m > EFFECTIVE), default=None),
        "weighted_up": sum(map(mul, up, means.values())) / sum(up),
        "weighted_down": sum(map(mul, reversed(up), means.values())) / sum(up),
    }
