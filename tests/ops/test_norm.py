"""rms_norm and gated_rms_norm against float64, and their properties."""

import ml_dtypes
import numpy as np
import pytest
from kimi_linear import reference
from variants import error, every_device, on, ops, same_bits

BF16 = ml_dtypes.bfloat16
DTYPES = [np.float32, BF16]
BOUND = {np.float32: 3e-7, BF16: 2.5e-3}  # bf16: half an ulp of the result
EPS = 1e-5
WIDTHS = (1, 7, 64, 129, 1000)


def make_row(shape, dtype, seed=0):
    r = np.random.default_rng(seed)
    return (3 * r.standard_normal(shape)).astype(dtype)


def weight(D):
    return np.random.default_rng(9).standard_normal(D).astype(np.float32)


def exact(x):
    return np.asarray(x, np.float64)


def poisoned(x):
    return np.full(x.shape, np.nan, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(variant, dtype):
    for D in WIDTHS:
        x = make_row((5, D), dtype)
        y = ops.rms_norm(x, weight(D), eps=EPS, out=poisoned(x))
        assert error(y, reference.rms_norm(exact(x), weight(D), eps=EPS)) < BOUND[dtype], D


@every_device
def test_epsilon_is_added_to_the_mean():
    x = np.full((1, 64), 1e-3, np.float32)
    y = ops.rms_norm(x, np.ones(64, np.float32), eps=3e-6)
    assert np.allclose(y, 1e-3 / np.sqrt(1e-6 + 3e-6), rtol=1e-6)
    y = ops.gated_rms_norm(x, np.zeros_like(x), np.ones(64, np.float32), eps=3e-6)
    assert np.allclose(y, 0.5e-3 / np.sqrt(1e-6 + 3e-6), rtol=1e-6)
    assert not ops.rms_norm(np.zeros_like(x), np.ones(64, np.float32), eps=EPS).any()


@pytest.mark.parametrize("stored", ["float32", "as x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual(variant, dtype, stored):
    for D in WIDTHS:
        x = make_row((5, D), dtype)
        residual = make_row((5, D), np.float32 if stored == "float32" else dtype, seed=1)
        before = residual.copy()
        y, r = ops.rms_norm(x, weight(D), eps=EPS, residual=residual, out=poisoned(x))
        assert same_bits(residual, before)
        total = x.astype(np.float32) + residual.astype(np.float32)
        assert same_bits(r, total.astype(residual.dtype)), D
        # The norm is of the sum as it is stored: what a later norm of it would see.
        assert error(y, reference.rms_norm(exact(r), weight(D), eps=EPS)) < BOUND[dtype], D


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_rms_norm(variant, dtype):
    for D in WIDTHS:
        x, z = make_row((5, 3, D), dtype), make_row((5, 3, D), dtype, seed=1)
        z[0] = np.linspace(-100, 100, 3 * D).reshape(3, D)  # both ends of the sigmoid
        y = ops.gated_rms_norm(x, z, weight(D), eps=EPS, out=poisoned(x))
        want = reference.gated_rms_norm(exact(x), exact(z), weight(D), eps=EPS)
        assert error(y, want) < BOUND[dtype], D
        assert np.isfinite(y.astype(np.float32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_itself(variant, dtype):
    """Alone, in a batch, on any number of threads, strided, in place, again: the same bits."""
    T, H, D = 300, 3, 129
    x, z, w = make_row((T, H, D), dtype), make_row((T, H, D), dtype, seed=1), weight(D)
    calls = (
        lambda x, z, out: ops.rms_norm(x, w, eps=EPS, out=out),
        lambda x, z, out: ops.gated_rms_norm(x, z, w, eps=EPS, out=out),
    )
    for call in calls:
        with on(variant, threads=1):
            want = call(x, z, poisoned(x))
            assert same_bits(call(x, z, poisoned(x)), want)
            for t in (0, 7, T - 1):
                row = slice(t, t + 1)
                assert same_bits(call(x[row], z[row], poisoned(x[row])), want[row])
            wide = np.full((T, H, D + 3), np.nan, dtype)
            wide[..., :D] = x
            assert same_bits(call(wide[..., :D], z, poisoned(x)), want)
            own = x.copy()
            assert call(own, z, own) is own
            assert same_bits(own, want)
        for threads in (2, 7):
            with on(variant, threads=threads):
                assert same_bits(call(x, z, poisoned(x)), want)


def test_nan_stays_in_its_row(variant):
    x, z = make_row((6, 50), np.float32), make_row((6, 50), np.float32, seed=1)
    w = weight(50)
    clean = ops.rms_norm(x, w, eps=EPS), ops.gated_rms_norm(x, z, w, eps=EPS)
    x[2, 13] = np.nan
    z[4, 49] = np.nan
    plain, gated = ops.rms_norm(x, w, eps=EPS), ops.gated_rms_norm(x, z, w, eps=EPS)
    assert np.isnan(plain[2]).all()
    assert np.isnan(gated[2]).all()
    others = np.arange(6) != 2
    assert same_bits(plain[others], clean[0][others])
    assert np.isnan(gated[4, 49])
    gated[4, 49] = clean[1][4, 49]
    assert same_bits(gated[others], clean[1][others])


@every_device
def test_no_rows():
    x = np.empty((0, 64), np.float32)
    assert ops.rms_norm(x, weight(64), eps=EPS).shape == (0, 64)
    assert ops.gated_rms_norm(x, x, weight(64)).shape == (0, 64)


@every_device
def test_gated_rms_norm_of_slices_of_a_projection():
    """Tokens that lie apart, heads side by side: taken as they are, also on a GPU."""
    T, H, D = 5, 3, 48
    wide = np.random.default_rng(3).standard_normal((T, 2 * H * D + 7)).astype(np.float32)
    x, z = (np.lib.stride_tricks.as_strided(
        wide[:, i * H * D :], (T, H, D), (wide.strides[0], 4 * D, 4)) for i in (0, 1))  # fmt: skip
    want = reference.gated_rms_norm(x, z, weight(D), eps=EPS)
    for a, b in ((x, z), (x.copy(), z), (x, z.copy())):
        assert error(ops.gated_rms_norm(a, b, weight(D), eps=EPS), want) < 1e-6
