"""Where operations can run on this machine, and how results are compared.

A test takes the fixture `variant` (each instruction set, and CUDA) or `device` (the CPU as it is,
and CUDA) and calls `ops`, which is kl.ops on NumPy arrays wherever the fixture says.
"""

from contextlib import contextmanager

import kimi_linear as kl
import numpy as np
import pytest
from kimi_linear._backends import backend
from on_cuda import has_cuda, on_device, sample


def available():
    """Names of the instruction sets, the plainest first."""
    found = []
    for name in ("scalar", "avx2", "avx512", "avx512bf16"):
        try:
            with backend(threads=1, cpu=name):
                found.append(name)
        except kl.DeviceError:
            pass
    return found


CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device and torch")
)
CPU_VARIANTS = available()
VARIANTS = [*CPU_VARIANTS, CUDA]
DEVICES = ["cpu", CUDA]

every_device = pytest.mark.usefixtures("device")  # on the CPU as it is, and on CUDA


class Ops:
    """kl.ops, and sample, on the device of the innermost `on`."""

    device = "cpu"

    def __getattr__(self, name):
        function = sample if name == "sample" else getattr(kl.ops, name)
        return on_device(function) if self.device == "cuda" else function


ops = Ops()


@contextmanager
def on(variant, *, threads=2):
    """Within the block `ops` runs there. "cpu" is the CPU's widest instruction set."""
    before, ops.device = ops.device, "cuda" if variant == "cuda" else "cpu"
    try:
        if variant == "cuda":
            yield
        else:
            with backend(threads=threads, cpu=None if variant == "cpu" else variant):
                yield
    finally:
        ops.device = before


def error(got, want):
    """Relative RMS error; of NaN, NaN, which no bound admits."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))


def same_bits(got, want):
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def same_sums(got, want, bound):
    """For what the CPU promises to the bit: one order of accumulation whatever else is in the
    call. CUDA picks its tiles by the shapes of a call, and promises it within rounding."""
    return error(got, want) < bound if ops.device == "cuda" else same_bits(got, want)
