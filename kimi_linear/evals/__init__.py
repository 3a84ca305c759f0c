"""Evaluations: RULER, MRCR, RepoQA, JSON key-value, and the report's synthetic tasks.

    from kimi_linear import evals
    suite = evals.ruler.Suite(lengths=[4096, 8192], samples=20)
    print(evals.run(model, suite, "ruler-run"))

Importing this package imports nothing else; every name below is loaded at its first use.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

_HOMES = {  # public name -> module that defines it
    "run": "runner",
    "merge": "shards",
    "local_device": "shards",
    "report": "reports",
    "Example": "suite",
    "Document": "suite",
    "Results": "results",
}
_MODULES = ("jsonkv", "mrcr", "plots", "repoqa", "ruler", "synthetic")

__all__ = [*_HOMES, *_MODULES]

if TYPE_CHECKING:
    from . import jsonkv as jsonkv
    from . import mrcr as mrcr
    from . import plots as plots
    from . import repoqa as repoqa
    from . import ruler as ruler
    from . import synthetic as synthetic
    from .reports import report as report
    from .results import Results as Results
    from .runner import run as run
    from .shards import local_device as local_device
    from .shards import merge as merge
    from .suite import Document as Document
    from .suite import Example as Example


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: Any = _import_module(f".{_HOMES.get(name, name)}", __name__)
    value = getattr(value, name) if name in _HOMES else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
