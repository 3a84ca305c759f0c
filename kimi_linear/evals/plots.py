"""Pictures of runs, as matplotlib Figures: score against length, needles by depth and length.

    evals.plots.scores(results).savefig("scores.png")

A notebook shows what a cell ends with. Needs matplotlib (pip install 'kimi_linear[plots]').
"""

import io
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ._published import PUBLISHED
from .reports import names

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator
except ImportError:
    raise ModuleNotFoundError(
        "plots: need matplotlib (pip install 'kimi_linear[plots]')"
    ) from None

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .results import Results

__all__ = ["Picture", "has_needles", "needles", "scores"]

INK, GREY = "#20242c", "#7d838e"
LINES = "tab20"  # as many colours as RULER has tasks, and more
COLOURS = "RdYlBu"  # told apart by those who do not tell red from green


class Picture(Figure):
    """A Figure that a notebook shows without pyplot's state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


# ---- score against length ----------------------------------------------------------------


def scores(*runs: "Results", published: bool = True) -> Picture:
    """Score against length with standard errors, in per cent.

    One run: a line a task and their mean; several of one suite: the mean of each. published:
    the figures of others as marks; `evals.report` says what compares. Raises ValueError for no
    run and for runs of different suites.
    """
    suites = {run.header["settings"]["suite"] for run in runs}
    if len(suites) != 1:
        raise ValueError(f"runs: must be of one suite, got {sorted(suites) or 'none'}")
    figure, axes = _picture(8.0, 4.6)
    axes.set_prop_cycle(color=[colormaps[LINES](i) for i in range(colormaps[LINES].N)])
    if len(runs) == 1:
        _task_lines(axes, runs[0])
        _line(axes, _means(runs[0]), "mean", color=INK, linewidth=2.6, marker="o")
    else:
        for name, run in zip(names(runs), runs, strict=True):
            _line(axes, _means(run), name, linewidth=1.8, marker="o")
    (suite,) = suites
    if published:
        _marks(axes, suite)
    _length_axis(axes, {n for run in runs for n in run.means()}, suite if published else None)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("score, per cent")
    axes.set_title(suite, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return figure


Point = tuple[int, float, float]  # length, score and its error in per cent


def _means(run: "Results") -> list[Point]:
    return [(n, 100 * mean, 100 * (e or 0.0)) for n, (mean, e) in run.means().items()]


def _task_lines(axes: "Axes", run: "Results") -> None:
    tasks = list(dict.fromkeys(row.task for row in run.rows))
    if len(tasks) == 1:
        return  # it is the mean
    for task in tasks:
        points = [
            (row.length, 100 * row.score, 100 * (row.error or 0.0))
            for row in run.rows
            if row.task == task
        ]
        _line(axes, sorted(points), task, linewidth=1.1, alpha=0.75, marker=".")


def _line(axes: "Axes", points: Sequence[Point], label: str, **style: Any) -> None:
    lengths, values, errors = zip(*points, strict=True)
    axes.errorbar(lengths, values, errors, label=label, capsize=2, **style)


def _marks(axes: "Axes", suite: str) -> None:
    """Published figures; their lengths widen the axis."""
    models = dict.fromkeys(p.model for p in PUBLISHED.get(suite, []))
    for model, marker in zip(models, "Dx+1*", strict=False):
        points = [(p.length, p.score) for p in PUBLISHED[suite] if p.model == model]
        lengths, values = zip(*points, strict=True)
        # Not scatter: a legend lists what errorbar drew last.
        axes.errorbar(lengths, values, fmt=marker, color=GREY, label=f"published: {model}")


def _length_axis(axes: "Axes", lengths: set[int], suite: str | None) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted(lengths | {p.length for p in PUBLISHED.get(suite or "", [])})
    axes.set_xticks(ticks, [_short(n) for n in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of the context")


# ---- needles -----------------------------------------------------------------------------


def needles(run: "Results", task: str | None = None, *, bins: int = 10) -> Picture:
    """A heat map: score by the depth at which the answer stands and by length.

    task: one of the run's; by default all that have one answer at a depth, together. bins: of
    the depth. Raises ValueError where no example has a depth.
    """
    if bins < 1:
        raise ValueError(f"bins: must be at least 1, got {bins}")
    records = _with_depth(run, task)
    if not records:
        wanted = "one answer at a depth" if task is None else f"task {task!r} and a depth"
        raise ValueError(f"run: must have examples of {wanted}, has none")
    lengths = sorted({r["length"] for r in records})
    figure, axes = _picture(2.2 + 0.9 * len(lengths), 4.6)
    _cells(figure, axes, _grid(records, lengths, bins))
    axes.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
    edges = [round(100 * i / bins) for i in range(bins)]
    axes.set_yticks(range(bins), [f"{edge} %" for edge in edges])
    axes.set_xlabel("tokens of the context")
    axes.set_ylabel("depth of the answer, from")
    suite = run.header["settings"]["suite"]
    axes.set_title(
        f"{suite}: {task or 'answers at one depth'}, n {len(records)}", loc="left", fontsize=10
    )
    return figure


def has_needles(run: "Results") -> bool:
    """Whether `needles` has something to show."""
    return bool(_with_depth(run, None))


def _with_depth(run: "Results", task: str | None) -> list[Mapping[str, Any]]:
    """Records of a task, or with a single answer, that stands at a depth."""
    return [
        r
        for r in run.records
        if "depth" in r and (len(r["references"]) == 1 if task is None else r["task"] == task)
    ]


Grid = list[list[float]]  # by depth, then length; NaN where there is no example


def _grid(records: Sequence[Any], lengths: Sequence[int], bins: int) -> Grid:
    found: dict[tuple[int, int], list[float]] = {}
    for r in records:
        place = min(int(r["depth"] * bins), bins - 1)
        found.setdefault((place, r["length"]), []).append(100 * r["score"])
    return [
        [fmean(found.get((place, length), [float("nan")])) for length in lengths]
        for place in range(bins)
    ]


def _cells(figure: Picture, axes: "Axes", grid: Grid) -> None:
    axes.set_facecolor("#e6e7ea")  # no example there
    image = axes.imshow(grid, cmap=COLOURS, vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                light = value < 15 or value > 85
                colour = "white" if light else INK
                axes.text(
                    x, y, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8
                )
    figure.colorbar(image, ax=axes, label="score, per cent")


# ---- both --------------------------------------------------------------------------------


def _picture(width: float, height: float) -> "tuple[Picture, Axes]":
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.grid(visible=False)
    return figure, axes


def _short(tokens: int) -> str:
    """4096 as 4K, 1048576 as 1M, 600 as 600."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"
