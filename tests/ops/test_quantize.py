"""quantize against the specification, bit for bit, and what it must refuse."""

import numpy as np
import pytest
from kimi_linear import NumericalError, reference
from kimi_linear.reference.linear import round_e4m3
from products import BF16, FORMATS, rows
from variants import CPU_VARIANTS, CUDA, every_device, on, ops, same_bits

GROUP = {"int8": 64, "int4": 32}
LEVELS = {"int8": 127, "int4": 7}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_same_bits_as_the_specification(variant, format, dtype):
    r = np.random.default_rng(1)
    for n, k in ((1, 1), (7, 5), (5, 31), (64, 33), (37, 100), (3, 129), (700, 130)):
        sizes = np.exp(3 * r.standard_normal((n, 1)))
        w = (rows(r, n, k, pad=0) * sizes).astype(dtype)
        w[n // 2] = 0.0
        packed = ops.quantize(w, format)
        assert packed.shape == (n, k) and packed.format == format
        want = reference.quantize(w.astype(np.float32), format).dequantize()
        assert same_bits(packed.dequantize(), want.astype(np.float32)), (n, k)


@every_device
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_error_is_half_a_step(format):
    r = np.random.default_rng(2)
    w = r.standard_normal((20, 2 * GROUP[format])).astype(np.float32)
    groups = w.reshape(20, 2, -1)
    got = ops.quantize(w, format).dequantize().reshape(groups.shape)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    # the scale is rounded to 8 bits: half a step of the largest scale, or the clamp at its edge
    step = largest / LEVELS[format] * (1 + 2.0**-8)
    assert (np.abs(got - groups) <= np.maximum(0.5 * step, largest * 2.0**-8)).all()
    assert np.abs(got).max() > 0


@every_device
def test_numbers_of_every_size():
    """Largest, smallest and subnormal groups; scales that round to zero give zeros."""
    sizes = np.array([3e38, 1e-30, 1e-39, 1e-45, -3e38], np.float32)
    w = np.repeat(sizes[:, None], 40, axis=1)
    for format in ("int8", "int4"):
        got = ops.quantize(w, format).dequantize()
        assert same_bits(got, reference.quantize(w, format).dequantize().astype(np.float32))
        assert np.isfinite(got).all()


@every_device
def test_a_stack_is_its_matrices():
    w = np.random.default_rng(3).standard_normal((3, 9, 50)).astype(np.float32)
    for format in FORMATS:
        whole = ops.quantize(w, format).dequantize()
        for e in range(3):
            assert same_bits(whole[e], ops.quantize(w[e], format).dequantize())


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_what_is_not_finite_by_place(variant, format, bad):
    w = np.ones((3000, 100), np.float32)
    w[2900, 3], w[1234, 77], w[1234, 99] = bad, bad, bad
    with (
        on(variant, threads=7),
        pytest.raises(NumericalError, match="row 1234, column 77"),
    ):
        ops.quantize(w, format)


@every_device
def test_the_float_formats_keep_what_is_not_finite():
    w = np.array([[np.nan, np.inf, -np.inf, -0.0, 1.5]], np.float32)
    for format in ("f32", "bf16"):
        got = ops.quantize(w, format).dequantize()
        np.testing.assert_array_equal(got, w)
        assert np.signbit(got[0, 3])


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_that_is_not_finite_reads_as_nan_on_cuda(device, format, bad):
    w = np.ones((3, 200), np.float32)
    w[1, 77] = bad
    size = 32 if format == "int4" else 64
    with on(device):
        got = ops.quantize(w, format).dequantize()
    spoilt = np.zeros(w.shape, bool)
    spoilt[1, 77 // size * size : (77 // size + 1) * size] = True
    assert np.isnan(got[spoilt]).all() and (abs(got[~spoilt] - 1) < 0.01).all()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_fp8_has_the_bits_of_the_specification(device, dtype):
    r = np.random.default_rng(6)
    for n, k in ((1, 1), (7, 5), (64, 33), (3, 129), (700, 130)):
        w = (rows(r, n, k, pad=0) * np.exp(3 * r.standard_normal((n, 1)))).astype(dtype)
        w[n // 2] = 0.0
        with on(device):
            got = ops.quantize(w, "fp8").dequantize()
        want = reference.quantize(w.astype(np.float32), "fp8").dequantize()
        assert same_bits(got, want.astype(np.float32)), (n, k)


def test_fp8_is_refused_by_the_cpu():
    with pytest.raises(ValueError, match="pack_weight: the cpu backend does not compute with fp8"):
        ops.quantize(np.ones((4, 70), np.float32), "fp8")


def test_e4m3_of_the_specification():
    """Its 256 numbers stay what they are, and others go to the nearest one."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    every = every[np.isfinite(every)]
    assert len(every) == 254 and (round_e4m3(every) == every).all()
    x = np.random.default_rng(4).uniform(-450, 450, 4000).astype(np.float32)
    x *= np.exp2(-np.random.default_rng(5).integers(0, 20, 4000)).astype(np.float32)
    want = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert (round_e4m3(x) == want).all()
