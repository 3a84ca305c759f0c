"""What others published, and what a run has in common with it.

Every figure is from the Kimi Linear technical report (arXiv 2510.26692): table 9 for the
released Instruct checkpoint, table 5 for models of 1.4T tokens, which nobody can download.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .results import plain

if TYPE_CHECKING:
    from .results import Results

RELEASED = "Kimi Linear 48B-A3B Instruct (table 9)"
TRAINED = [
    f"{name}, 1.4T tokens (table 5)" for name in ("Kimi Linear", "MLA", "GDN-H", "KL-RoPE")
]
K128, M1 = 1 << 17, 1 << 20
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Published:
    """A score in per cent of a model at a length of the context."""

    model: str
    length: int
    score: float


def _table5(*scores: float) -> list[Published]:
    return [Published(m, K128, score) for m, score in zip(TRAINED, scores, strict=True)]


PUBLISHED: dict[str, list[Published]] = {
    "ruler": [
        Published(RELEASED, K128, 95.4),
        Published(RELEASED, M1, 94.8),
        *_table5(84.3, 81.3, 80.5, 78.8),
    ],
    "mrcr": _table5(29.6, 22.6, 23.9, 22.0),
    "repoqa": _table5(68.5, 63.0, 63.0, 66.5),
}
UNSTATED = {
    "ruler": "the number of samples, the prefix, whose tokens fill the context",
    "mrcr": "which numbers of needles and which bins the average is of",
    "repoqa": "the size of the context in whose tokens, the threshold",
}


def agreements(results: "Results") -> Iterator[str]:
    """What the run has in common with the published one."""
    suite, settings = results.header["settings"]["suite"], results.header["settings"]
    if suite == "ruler":
        yield "upstream's prompts, filling and scores"
        if not settings["left_out"]:
            yield "all thirteen tasks"
    if suite == "mrcr":
        yield "the publisher's conversations and grader"
    if suite == "repoqa":
        yield "the publisher's needles, prompt and similarity"
    for length in sorted({p.length for p in PUBLISHED[suite]} & set(results.means())):
        yield f"a context of {length:,} tokens"
    if results.header["sampling"]["temperature"] == TEMPERATURE:
        yield f"temperature {plain(TEMPERATURE)}"


def differences(results: "Results") -> Iterator[str]:
    """What a comparison would be wrong about."""
    suite = results.header["settings"]["suite"]
    yield from _model(results)
    if not {p.length for p in PUBLISHED[suite]} & set(results.means()):
        yield "lengths: nothing is published for the run's"
    yield from DIFFERENCES[suite](results)
    sampling = results.header["sampling"]
    if sampling["temperature"] != TEMPERATURE:
        yield f"temperature {plain(sampling['temperature'])}, published {plain(TEMPERATURE)}"
    if not results.complete:
        yield "examples are missing"
    if any(row.truncated for row in results.rows):
        yield "answers were cut by max_context"


def _model(results: "Results") -> Iterator[str]:
    from ..config import KimiLinearConfig

    model = results.header["model"]
    published = KimiLinearConfig.kimi_linear_48b().parameter_count()
    if model["parameters"] != published:
        yield f"the model: {model['parameters']:,} parameters, published {published:,}"
    if model["dtype"] != "bf16":
        yield f"the weights: stored as {model['dtype']}, the checkpoint's are bf16"
    if model.get("kv_cache_dtype") == "fp8":
        yield "the latents: stored as fp8, bf16 is what the checkpoint was made for"


def _ruler(results: "Results") -> Iterator[str]:
    from .ruler import TASKS

    settings = results.header["settings"]
    if settings["left_out"]:
        n = len(TASKS) - len(settings["left_out"])
        yield f"tasks: {n} of {len(TASKS)}, without {' '.join(settings['left_out'])}"
    if own := sorted(set(settings["tasks"]) - set(TASKS)):
        yield f"tasks: {' '.join(own)} are not RULER's"
    if any(task.get("haystack") == "essay" for task in settings["tasks"].values()):
        yield f"the essays: {settings['haystack']}, upstream has Paul Graham's"
    if settings["samples"] < 500:
        yield f"samples: {settings['samples']} of a task, upstream has 500"


def _mrcr(results: "Results") -> Iterator[str]:
    files = results.header["settings"]["data"]
    if any(".csv " in name for name in files):
        yield "the files: Google's second version, published is of OpenAI's"
    else:
        yield "the files: published is of those before their correction of December 2025"


def _repoqa(results: "Results") -> Iterator[str]:
    others = [n for n in results.header["settings"]["languages"] if n != "python"]
    if others:
        yield f"functions in answers of {' '.join(others)} are found by another rule"


DIFFERENCES: dict[str, Callable[["Results"], Iterator[str]]] = {
    "ruler": _ruler,
    "mrcr": _mrcr,
    "repoqa": _repoqa,
}
