"""What the tests of matrix products share: weights and the bound on their error."""

import ml_dtypes
import numpy as np
from kimi_linear import reference
from variants import ops

BF16 = ml_dtypes.bfloat16
FORMATS = ("f32", "bf16", "int8", "int4")
CUDA_FORMATS = (*FORMATS, "fp8")  # a test of fp8 anywhere but on CUDA is deselected (conftest.py)
LANES = {"scalar": 1, "avx2": 8, "avx512": 16, "avx512bf16": 16, "cuda": 1}


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
    return ops.quantize(w, format), dense.astype(np.float64)


def bound(x, w, variant, out_dtype=np.float32):
    """The largest error of x w^T that rounding can explain. A lane adds ceil(K / lanes)
    products, one rounding each, the lanes are added in log2(lanes) more; each is at most 2^-24
    of what a sum of magnitudes reaches. CUDA may add in any order; its tensor cores multiply
    bf16 by bf16, to which weights of other formats are rounded (eight digits, so by 2^-8 of a
    weight at most), and cut sums off instead of rounding them."""
    on_tensor_cores = variant == "cuda" and x.dtype == BF16
    rounds_weights = on_tensor_cores and not np.array_equal(w, w.astype(BF16))
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(w)
    lanes = LANES[variant]
    roundings = -(-x.shape[-1] // lanes) + np.log2(lanes) + 1
    error = 1.01 * roundings * 2.0 ** (-23 if on_tensor_cores else -24) * (x @ w.T)
    error += rounds_weights * 2.0**-8 * (x @ w.T)
    if out_dtype == BF16:
        error += 2.0**-8 * np.abs(x @ w.T)
    return error + 1e-37


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
