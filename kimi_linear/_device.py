"""Which device, and which storage of the weights."""

import re
import warnings
from dataclasses import dataclass
from typing import Any

from . import _core
from ._backends import of_engine
from ._files import quote
from .config import KimiLinearConfig
from .errors import DeviceError, OutOfMemory
from .memory import MemoryPlan, gib

DTYPES = ("f32", "bf16", "int8", "int4")  # widest first
KV_CACHE_DTYPES = ("auto", "fp8")


@dataclass(frozen=True)
class Options:
    """Checked arguments of `load` and `plan` that size a model; 0 leaves it to the planner."""

    device: str
    dtype: str
    max_context: int
    max_batch: int
    cache_bytes: int
    batch_invariant: bool = False
    kv_cache_dtype: str = "auto"

    def core(self, dtype: str) -> dict[str, Any]:
        """The core's ``kl_engine_options``."""
        return {
            "format": dtype,
            "kv_cache_dtype": self.kv_cache_dtype,
            "max_context": self.max_context,
            "max_batch": self.max_batch,
            "step_tokens": 0,
            "cache_bytes": self.cache_bytes,
            "budget_bytes": 0,
        }


@dataclass(frozen=True)
class Choice:
    """An open device, the storage that fits it, the plan, and what was decided on the way."""

    backend: "_core.Backend"
    dtype: str
    plan: MemoryPlan
    notes: tuple[str, ...]


def check_options(
    device: Any,
    dtype: Any,
    max_context: Any,
    max_batch: Any,
    cache_bytes: Any,
    batch_invariant: Any = False,
    kv_cache_dtype: Any = "auto",
) -> Options:
    """Raises TypeError or ValueError naming the argument."""
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant: must be a bool, got {quote(batch_invariant)}")
    if not isinstance(device, str):
        raise TypeError(
            f"device: must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r:.60}"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", device):
        raise ValueError(
            f"device: must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {quote(device)}"
        )
    if not isinstance(dtype, str) or dtype not in ("auto", "fp8", *DTYPES):
        names = ", ".join(map(repr, ("auto", *DTYPES, "fp8")))
        raise ValueError(f"dtype: must be one of {names}, got {quote(dtype)}")
    if dtype == "f32" and device.startswith("cuda"):
        raise ValueError("dtype: 'f32' needs device='cpu'")
    if dtype == "fp8" and device == "cpu":
        raise ValueError("dtype: 'fp8' needs device='cuda'")
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype not in KV_CACHE_DTYPES:
        names = " or ".join(map(repr, KV_CACHE_DTYPES))
        raise ValueError(f"kv_cache_dtype: must be {names}, got {quote(kv_cache_dtype)}")
    return Options(
        device,
        dtype,
        _count("max_context", max_context),
        _count("max_batch", max_batch),
        _count("cache_bytes", cache_bytes),
        batch_invariant,
        kv_cache_dtype,
    )


def _count(name: str, value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: must be a positive integer or None, got {quote(value)}")
    value = value.__index__()
    if not 0 < value < 1 << 62:
        raise ValueError(f"{name}: must be a positive integer or None, got {quote(value)}")
    return value


def choose(config: KimiLinearConfig, stored: str, options: Options) -> Choice:
    """Open the device and plan for it; "auto" tries what is best first.

    stored: the checkpoint's own dtype. The plan of the last try, where nothing fits. Raises
    DeviceError where the device is not there.
    """
    if options.device != "auto":
        return _choose_dtype(config, stored, options, options.device, ())
    try:
        choice = _choose_dtype(config, stored, options, "cuda", ())
        problem = choice.plan.problem
    except DeviceError as e:
        problem = str(e)
    if problem is None:
        return choice
    return _choose_dtype(config, stored, options, "cpu", (f"not on CUDA: {problem}",))


def require_fit(choice: Choice) -> Choice:
    """Raises OutOfMemory with the figures."""
    if choice.plan.problem is not None:
        raise OutOfMemory(choice.plan.problem)
    return choice


def _choose_dtype(
    config: KimiLinearConfig, stored: str, options: Options, device: str, notes: tuple[str, ...]
) -> Choice:
    kind, _, number = device.partition(":")
    on_cuda = kind == "cuda"
    backend = of_engine(kind, int(number or 0), batch_invariant=options.batch_invariant)
    candidates = [options.dtype]
    if options.dtype == "auto":
        widest = "bf16" if on_cuda else stored
        candidates = list(DTYPES[DTYPES.index(widest) :])
    elif options.dtype == ("f32" if on_cuda else "fp8"):
        raise DeviceError(f"dtype {options.dtype!r} does not run on {device}")
    for dtype in candidates:
        core = _core.plan(backend, config.to_core(), options.core(dtype))
        plan = MemoryPlan.from_core(device, dtype, core)
        if plan.fits:
            break
        notes += (f"{dtype} weights do not fit: {plan.problem}",)
    if plan.fits and dtype != candidates[0]:
        warnings.warn(
            f"weights are stored as {dtype}: {candidates[0]} does not fit in "
            f"{gib(plan.free)} (pass dtype= to choose)",
            stacklevel=4,
        )
    return Choice(backend, dtype, plan, notes)
