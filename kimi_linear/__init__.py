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
    "State": "state",
    "Engine": "engine",
    "EngineStats": "engine",
    "Request": "engine",
    "MemoryPlan": "memory",
    "Completion": "results",
    "Chunk": "results",
    "Stats": "results",
    "Logprobs": "results",
    "TokenLogprob": "results",
    "Checkpoint": "checkpoint",
    "KimiLinearConfig": "config",
    "LinearAttnConfig": "config",
    "Tokenizer": "tokenizer",
    "show_config": "about",
    "KimiLinearError": "errors",
    "ConfigError": "errors",
    "WeightsError": "errors",
    "TokenizerError": "errors",
    "DeviceError": "errors",
    "EngineFull": "errors",
    "OutOfMemory": "errors",
    "StateError": "errors",
    "NumericalError": "errors",
}
_MODULES = ("errors", "evals", "ops", "reference", "testing", "torch")

__all__ = ["__version__", *_HOMES, "errors", "evals", "ops", "reference", "testing"]

if TYPE_CHECKING:
    from . import errors as errors
    from . import evals as evals
    from . import ops as ops
    from . import reference as reference
    from . import testing as testing
    from .about import show_config as show_config
    from .checkpoint import Checkpoint as Checkpoint
    from .config import KimiLinearConfig as KimiLinearConfig
    from .config import LinearAttnConfig as LinearAttnConfig
    from .engine import Engine as Engine
    from .engine import EngineStats as EngineStats
    from .engine import Request as Request
    from .errors import ConfigError as ConfigError
    from .errors import DeviceError as DeviceError
    from .errors import EngineFull as EngineFull
    from .errors import KimiLinearError as KimiLinearError
    from .errors import NumericalError as NumericalError
    from .errors import OutOfMemory as OutOfMemory
    from .errors import StateError as StateError
    from .errors import TokenizerError as TokenizerError
    from .errors import WeightsError as WeightsError
    from .memory import MemoryPlan as MemoryPlan
    from .model import Model as Model
    from .model import load as load
    from .model import plan as plan
    from .results import Chunk as Chunk
    from .results import Completion as Completion
    from .results import Logprobs as Logprobs
    from .results import Stats as Stats
    from .results import TokenLogprob as TokenLogprob
    from .state import State as State
    from .tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in (*_MODULES, "_core"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value: Any = _import_module(f".{_HOMES.get(name, name)}", __name__)
    except ModuleNotFoundError as e:
        if e.name != f"{__name__}._core":
            raise
        raise ModuleNotFoundError(
            f"{__file__}: the C core is not built beside it; run Python outside the checkout, "
            f"where the installed package is found, or build in place with pip install -e .",
            name=e.name,
        ) from None
    value = getattr(value, name) if name in _HOMES else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
