"""What a run came to: scores with their errors, as a table and as JSON."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from statistics import fmean, stdev
from typing import Any

MODULES = {"mrcr-synth": "mrcr"}  # suites whose module is named otherwise


@dataclass(frozen=True)
class Row:
    """A task at a length.

    score, error: mean and its standard error, 0 .. 1; error is None for a single document,
    since questions of the same document are no independent samples. empty: answers without
    text. truncated: answers cut by max_context; they must be 0. floor: what an answer taken at
    random among the look-alikes would score, where the suite knows it.
    """

    task: str
    length: int
    score: float
    error: float | None
    n: int
    empty: int
    truncated: int
    floor: float | None


class Results:
    """Scores of a run.

    header: all that defines it. records: one dict an example, as in merged.jsonl. rows: one Row
    for each task at each length. complete: whether every example is there.
    """

    def __init__(self, header: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> None:
        self.header, self.records = header, records
        cells: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
        for record in records:
            cells[record["length"], record["task"]].append(record)
        self.rows = [_row(task, length, found) for (length, task), found in cells.items()]
        self.complete = len(records) == header["examples"]

    def means(self) -> dict[int, tuple[float, float | None]]:
        """{length: (plain mean of its tasks, standard error)}."""
        by_length: dict[int, list[Row]] = defaultdict(list)
        for row in self.rows:
            by_length[row.length].append(row)
        return {
            length: (fmean(r.score for r in rows), _error_of_mean([r.error for r in rows]))
            for length, rows in sorted(by_length.items())
        }

    def to_dict(self) -> dict[str, Any]:
        """The header, the rows, the means and what the suite says of all, as JSON."""
        means = [
            {"length": length, "score": score, "error": error}
            for length, (score, error) in self.means().items()
        ]
        rows = [asdict(row) for row in self.rows]
        return {**self.header, "rows": rows, "means": means, "overall": self._overall()}

    def _overall(self) -> dict[str, Any]:
        """What the suite's module says of all cells together."""
        suite = self.header["settings"]["suite"]
        module = import_module(f".{MODULES.get(suite, suite)}", __package__)
        return module.overall(self) if hasattr(module, "overall") else {}

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *table(self._cells()), "", *self._foot()])

    def _head(self) -> Iterable[str]:
        settings, model = self.header["settings"], self.header["model"]
        yield f"{settings['suite']}: {len(self.records)} of {self.header['examples']} examples"
        yield (
            f"model {model['name']}, {model['parameters']:,} parameters, {storage(model)}, "
            f"{model['device']}"
        )
        yield f"tokenizer {self.header['tokenizer']}"
        hidden = ("suite", "tasks", "lengths")
        shown = {**settings, **self.header["sampling"]}
        yield ", ".join(
            f"{k} {plain(v)}"
            for k, v in shown.items()
            if k not in hidden and v not in (None, [])
        )

    def _cells(self) -> list[list[str]]:
        """The table: a line a task, a column a length."""
        means = self.means()
        scores = {(r.task, r.length): percent(r.score, r.error) for r in self.rows}
        floors = {r.task for r in self.rows if r.floor is not None}
        lines = [["task", *(f"{n:,}" for n in means)]]
        for task in dict.fromkeys(r.task for r in self.rows):
            lines.append([task, *(scores.get((task, n), "") for n in means)])
            if task in floors:
                by_length = {r.length: r.floor for r in self.rows if r.task == task}
                lines.append(["  floor", *(percent(by_length.get(n), None) for n in means)])
        if len(lines) > 2:
            lines.append(["mean", *(percent(*m) for m in means.values())])
        return lines

    def _foot(self) -> Iterable[str]:
        sizes = {r.n for r in self.rows} or {0}
        n = f"{min(sizes)}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}"
        repeats = self.header["settings"].get("repeats")
        draws = f", avg@{repeats}" if repeats else ""
        empty, truncated = (
            sum(getattr(r, k) for r in self.rows) for k in ("empty", "truncated")
        )
        yield (
            f"per cent \N{PLUS-MINUS SIGN} standard error; n {n} a cell{draws}, "
            f"empty answers {empty}, truncations {truncated}"
        )
        for name, value in self._overall().items():
            if not isinstance(value, dict):  # tables of a suite's own stay in results.json
                yield f"{name} {plain(value)}"
        if truncated:
            yield "answers were cut by max_context: these scores do not count"
        if not self.complete:
            yield "examples are missing: these scores are preliminary"


def storage(model: Mapping[str, Any]) -> str:
    """How a header's model keeps its weights, and its latents where these have 8 bits."""
    latents = ", fp8 latents" if model.get("kv_cache_dtype") == "fp8" else ""
    return f"{model['dtype']}{latents}"


def _row(task: str, length: int, records: Sequence[Mapping[str, Any]]) -> Row:
    by_document: dict[int, list[float]] = defaultdict(list)
    for record in records:
        by_document[record["document"]].append(record["score"])
    documents = [fmean(scores) for scores in by_document.values()]
    floors = [r["floor"] for r in records if "floor" in r]
    return Row(
        task=task,
        length=length,
        score=fmean(r["score"] for r in records),
        error=stdev(documents) / math.sqrt(len(documents)) if len(documents) > 1 else None,
        n=len(records),
        empty=sum(not r["answer"].strip() for r in records),
        truncated=sum(r["truncated"] for r in records),
        floor=fmean(floors) if floors else None,
    )


def _error_of_mean(errors: Sequence[float | None]) -> float | None:
    known = [e for e in errors if e is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def percent(score: float | None, error: float | None) -> str:
    if score is None:
        return ""
    text = f"{100 * score:.2f}"
    return text if error is None else f"{text} \N{PLUS-MINUS SIGN}{100 * error:.2f}"


def plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(lines: list[list[str]]) -> list[str]:
    """Columns wide enough for their texts; the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
