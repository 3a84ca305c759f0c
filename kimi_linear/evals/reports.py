"""Runs told to a reader: their tables, one beside the other, beside what was published."""

from collections.abc import Iterator, Sequence

from . import _published
from .results import Results, percent, storage, table


def report(*runs: Results) -> str:
    """The table of each run, the means side by side, published figures and what compares.

    runs: of `evals.run`, or of `evals.merge(folder, partial=True)`.
    """
    if not runs:
        raise ValueError("runs: must be at least one, got none")
    parts = []
    for name, run in zip(names(runs), runs, strict=True):
        parts.append(str(run) if len(runs) == 1 else f"{name}\n{run}")
    for suite in dict.fromkeys(_suite(run) for run in runs):
        parts.append("\n".join(_suite_lines(suite, runs)))
    return "\n\n".join(parts)


def names(runs: Sequence[Results]) -> list[str]:
    """What each run is called beside others."""
    if len(runs) == 1:
        return ["this run"]
    return [
        f"run {i}: {run.header['model']['name']}, {storage(run.header['model'])}"
        for i, run in enumerate(runs, 1)
    ]


def _suite(run: Results) -> str:
    return str(run.header["settings"]["suite"])


def _suite_lines(suite: str, runs: Sequence[Results]) -> Iterator[str]:
    """The means of a suite's runs beside those published, then what compares."""
    mine = [(n, run) for n, run in zip(names(runs), runs, strict=True) if _suite(run) == suite]
    published = _published.PUBLISHED.get(suite, [])
    if published or len(mine) > 1:
        yield from table(_means(suite, mine))
        yield ""
    if unlike := _unlike([run for _, run in mine]):
        yield f"the runs differ in: {', '.join(unlike)}"
    if not published:
        yield f"{suite}: nothing published compares"
        return
    for name, run in mine:
        yield from _comparison(name, run)
    yield f"the Kimi Linear report does not state: {_published.UNSTATED[suite]}"


def _means(suite: str, runs: Sequence[tuple[str, Results]]) -> list[list[str]]:
    """A line a run and a published model, a column a length."""
    published = _published.PUBLISHED.get(suite, [])
    lengths = sorted(
        {n for _, run in runs for n in run.means()} | {p.length for p in published}
    )
    lines = [[f"{suite}, means", *(f"{n:,}" for n in lengths)]]
    for name, run in runs:
        means = run.means()
        lines.append([name, *(percent(*means.get(n, (None, None))) for n in lengths)])
    for model in dict.fromkeys(p.model for p in published):
        scores = {p.length: f"{p.score:.1f}" for p in published if p.model == model}
        lines.append([model, *(scores.get(n, "") for n in lengths)])
    return lines


def _unlike(runs: Sequence[Results]) -> list[str]:
    """Settings that are not the same in all runs, which a comparison of their means forgets."""
    found = [
        {
            "tokenizer": run.header["tokenizer"],
            **run.header["settings"],
            **run.header["sampling"],
        }
        for run in runs
    ]
    keys = dict.fromkeys(key for settings in found for key in settings)
    return [k for k in keys if any(s.get(k) != found[0].get(k) for s in found)]


def _comparison(name: str, run: Results) -> Iterator[str]:
    yield f"{name} and the published figures"
    for label, found in (
        ("in common", _published.agreements(run)),
        ("not comparable", _published.differences(run)),
    ):
        lines = list(found) or ["nothing"]
        yield f"  {label}:"
        yield from (f"    {line}" for line in lines)
