"""Which backend an operation runs on, and how a CPU backend is opened.

A device's backend is opened by the first call that needs it and shared by all later ones. The
environment is read here and nowhere else: KIMI_LINEAR_CPU and KIMI_LINEAR_GPU (the instruction set
of the CPU's and of the CUDA backend), KIMI_LINEAR_THREADS, else OMP_NUM_THREADS (the CPU's threads).
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from . import _core

CUDA_LIBRARY = str(Path(__file__).parent / "_cuda.so")

_lock = threading.Lock()
_opened: dict[tuple[str, int], _core.Backend] = {}
_cpu_override: ContextVar[_core.Backend | None] = ContextVar("kimi_linear_cpu", default=None)


def cpu_threads() -> int:
    """Threads of a CPU backend as the environment has it; 0, all this process may use, if not.

    Raises ValueError where KIMI_LINEAR_THREADS is not a number of threads. OMP_NUM_THREADS is
    written for other programs, so a form of it that is not understood is passed over.
    """
    if text := os.environ.get("KIMI_LINEAR_THREADS"):
        if not text.isascii() or not text.isdigit() or not 0 < int(text[:9]) <= 256:
            raise ValueError(f"KIMI_LINEAR_THREADS must lie in [1, 256], got {text!r}")
        return int(text)
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(text), 256) if text.isascii() and text.isdigit() and len(text) < 9 else 0


def cpu_variant() -> str | None:
    """The instruction set that KIMI_LINEAR_CPU names, or None: the widest this CPU has."""
    return os.environ.get("KIMI_LINEAR_CPU") or None


def gpu_variant() -> str | None:
    """The instruction set that KIMI_LINEAR_GPU names, or None: sm_90a where the device has it."""
    return os.environ.get("KIMI_LINEAR_GPU") or None


def open_backend(name: str, index: int = 0, *, threads: int | None = None,
                 cpu: str | None = None, batch_invariant: bool = False) -> _core.Backend:  # fmt: skip
    """A backend of one's own. threads, cpu: None for what the environment says. batch_invariant:
    a row's result does not depend on which rows share its call; the CPU is so always.

    Raises DeviceError where the device, its driver or the instruction set is not there,
    ValueError for a name or number that no backend has.
    """
    if name != "cpu":
        return _core.Backend(name, index, 0, gpu_variant(), CUDA_LIBRARY, batch_invariant)
    threads = cpu_threads() if threads is None else threads
    return _core.Backend("cpu", index, threads, cpu or cpu_variant(), CUDA_LIBRARY)


def shared(name: str, index: int = 0) -> _core.Backend:
    """The backend that all operations on a device share, opened at its first use."""
    if name == "cpu" and (override := _cpu_override.get()) is not None:
        return override
    found = _opened.get((name, index))
    if found is None:
        with _lock:
            found = _opened.get((name, index))
            if found is None:
                found = _opened[name, index] = open_backend(name, index)
    return found


def of_engine(name: str, index: int, *, batch_invariant: bool) -> _core.Backend:
    """The backend of a model. On CUDA one of its own, for the stream of the shared one is what
    the caller of an operation makes it; gone with the model, and its memory with it."""
    if name == "cpu":
        return shared(name, index)
    return open_backend(name, index, batch_invariant=batch_invariant)


def of(array: Any) -> _core.Backend:
    """The shared backend of the device that an array is on."""
    return shared(*_core.device_of(array))


@contextmanager
def backend(*, threads: int = 0, cpu: str | None = None) -> Iterator[_core.Backend]:
    """Within the block, operations on the CPU use a backend of their own: for tests.

    threads: worker threads, the caller's included; 0 for all. cpu: "scalar", "avx2", "avx512"
    or "avx512bf16"; None for the widest. Raises DeviceError where this CPU lacks the
    instruction set. Holds for the calling thread and the tasks it starts.
    """
    own = _core.Backend("cpu", 0, threads, cpu, CUDA_LIBRARY)
    token = _cpu_override.set(own)
    try:
        yield own
    finally:
        _cpu_override.reset(token)
