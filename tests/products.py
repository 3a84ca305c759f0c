"""What the tests of matrix products share: variants, weights and the bound on their error."""

import kimi_linear as kl
import ml_dtypes
import numpy as np
from kimi_linear import reference
from kimi_linear._backends import backend

BF16 = ml_dtypes.bfloat16
FORMATS = ("f32", "bf16", "int8", "int4")
LANES = {"scalar": 1, "avx2": 8, "avx512": 16, "avx512bf16": 16}


def available_variants():
    found = []
    for name in LANES:
        try:
            with backend(threads=1, cpu=name):
                found.append(name)
        except kl.DeviceError:
            pass
    return found


VARIANTS = available_variants()


def rows(r, n, k, dtype=np.float32, *, pad=5):
    """[n, k] in a wider array whose other columns are NaN: what is read past a row shows."""
    wide = np.full((n, k + pad), np.nan, dtype)
    wide[:, :k] = r.standard_normal((n, k)).astype(dtype)
    return wide[:, :k]


def weight(r, *shape, format):
    """(what kl.ops takes, the float64 matrix it stands for). The second is the specification's
    own quantisation, so a wrong kl.ops.quantize shows here too."""
    w = r.standard_normal(shape).astype(np.float32) / np.float32(shape[-1] ** 0.5)
    dense = reference.quantize(w, format).dequantize()
    return kl.ops.quantize(w, format), dense.astype(np.float64)


def bound(x, w, variant, out_dtype=np.float32):
    """The largest error of x w^T that rounding can explain. A lane adds ceil(K / lanes)
    products, one rounding each, the lanes are added in log2(lanes) more; each is at most 2^-24
    of what a sum of magnitudes reaches."""
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(w)
    lanes = LANES[variant]
    roundings = -(-x.shape[-1] // lanes) + np.log2(lanes) + 1
    error = 1.01 * roundings * 2.0**-24 * (x @ w.T)
    if out_dtype == BF16:
        error += 2.0**-8 * np.abs(x @ w.T)
    return error + 1e-37


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


def same_bits(a, b):
    return np.array_equal(bits(a), bits(b))
