"""The CPU backends that this machine can run, and how results are compared."""

import kimi_linear as kl
import numpy as np
from kimi_linear._backends import backend


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


VARIANTS = available()


def error(got, want):
    """Relative RMS error; of NaN, NaN, which no bound admits."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))


def same_bits(got, want):
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()
