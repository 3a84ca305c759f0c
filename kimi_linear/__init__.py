"""Kimi Linear on CPU and CUDA: kernels, and the whole model.

Importing the package imports nothing else: no NumPy, no torch, no device, no thread. Every name
below is loaded at its first use.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {  # public name -> module that defines it
    "load": "model",
    "plan": "model",
    "Model": "model",
    "MemoryPlan": "memory",
    "Completion": "results",
    "Chunk": "results",
    "Stats": "results",
    "Logprobs": "results",
    "TokenLogprob": "results",
    "KimiLinearConfig": "config",
    "LinearAttnConfig": "config",
    "Tokenizer": "tokenizer",
    "show_config": "about",
    "KimiLinearError": "errors",
    "ConfigError": "errors",
    "WeightsError": "errors",
    "TokenizerError": "errors",
    "DeviceError": "errors",
    "OutOfMemory": "errors",
    "NumericalError": "errors",
}
_MODULES = ("errors", "ops", "reference", "testing", "torch")

__all__ = ["__version__", *_HOMES, "errors", "ops", "reference", "testing"]

if TYPE_CHECKING:
    from . import errors, ops, reference, testing
    from .about import show_config
    from .config import KimiLinearConfig, LinearAttnConfig
    from .errors import (
        ConfigError,
        DeviceError,
        KimiLinearError,
        NumericalError,
        OutOfMemory,
        TokenizerError,
        WeightsError,
    )
    from .model import Model, load, plan
    from .memory import MemoryPlan
    from .results import Chunk, Completion, Logprobs, Stats, TokenLogprob
    from .tokenizer import Tokenizer


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(_import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = _import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
