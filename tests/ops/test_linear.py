"""linear against the float64 specification, and that only the operands decide its bits."""

import ml_dtypes
import numpy as np
import pytest
from kimi_linear import reference
from products import BF16, CUDA_FORMATS, bound, relative, rows, weight
from variants import CUDA, every_device, on, ops, same_bits, same_sums

# Tiles of 3, 4 or 6 rows with every remainder, both sides of the 64 rows up to which a weight is
# read in place, more than one block of 252.
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 65, 300)
# (K, O): shorter than a vector, than a group, just over; O no multiple of a tile's four rows.
SHAPES = ((1, 1), (7, 5), (31, 9), (33, 64), (100, 37))


def tolerance(dtype):
    return 1e-6 if dtype == np.float32 else 4e-3  # of CUDA, where the order of sums may change


def linear(x, w, dtype=np.float32):
    """ops.linear into the middle of a poisoned array, which must stay so around it."""
    poisoned = np.full((len(x) + 2, w.shape[0]), np.nan, dtype)
    out = poisoned[1:-1]
    assert ops.linear(x, w, out=out) is out
    assert np.isnan(poisoned[[0, -1]].astype(np.float32)).all()
    return out


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_matches_float64(variant, format, dtype):
    r = np.random.default_rng(1)
    for K, O in SHAPES:
        w, dense = weight(r, O, K, format=format)
        for T in TOKENS:
            x = rows(r, T, K, dtype)
            error = np.abs(linear(x, w) - reference.linear(x, dense))
            assert (error <= bound(x, dense, variant)).all(), (K, O, T)


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_long_rows(variant, format, dtype):
    """Packed tiles put their lanes aside between blocks of columns; here are some blocks."""
    r = np.random.default_rng(2)
    w, dense = weight(r, 13, 2564, format=format)
    x = rows(r, 70, 2564, dtype)
    got = linear(x, w)
    assert (np.abs(got - reference.linear(x, dense)) <= bound(x, dense, variant)).all()
    for t in (0, 69):
        assert same_sums(linear(x[t : t + 1], w)[0], got[t], tolerance(dtype))


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_a_row_has_its_bits_alone_in_any_batch_and_for_any_threads(variant, format, dtype):
    r = np.random.default_rng(3)
    w, _ = weight(r, 37, 100, format=format)
    x = rows(r, 300, 100, dtype)
    with on(variant, threads=2):
        whole = linear(x, w)
        assert same_bits(linear(x, w), whole)
        for T in TOKENS:
            last = slice(T - 1, T)
            assert same_sums(linear(x[:T], w), whole[:T], tolerance(dtype)), T
            assert same_sums(linear(x[last], w), whole[last], tolerance(dtype)), T
    for threads in (1, 7):
        with on(variant, threads=threads):
            assert same_bits(linear(x, w), whole)
            assert same_sums(linear(x[:5], w), whole[:5], tolerance(dtype))


# Rows that CUDA cuts into halves (256 divides them), and others, with a step for each warp or two.
@every_device
@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("K, O", [(1024, 70), (1088, 70), (2304, 37), (2368, 37), (8192, 24)])
def test_a_single_row_meets_weights_that_are_not_rounded(format, K, O):
    """To the precision of float32 sums, also where bf16 would round a weight (1.7e-3)."""
    r = np.random.default_rng(11)
    w, dense = weight(r, O, K, format=format)
    x = rows(r, 1, K, BF16, pad=8)
    got = linear(x, w)
    assert relative(got, reference.linear(x, dense)) < 2e-6
    assert same_bits(linear(x, w), got)


@every_device
@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("K", [1024, 1088])
def test_what_is_not_finite_shows_in_a_single_row(format, K):
    r = np.random.default_rng(12)
    w, _ = weight(r, 37, K, format=format)
    for value in (np.nan, np.inf, -np.inf):
        x = rows(r, 1, K, BF16, pad=8)
        x[0, K - 1] = value
        assert not np.isfinite(linear(x, w)).any()


@every_device
@pytest.mark.parametrize("format", CUDA_FORMATS)
def test_a_row_of_the_weight_has_its_bits_alone(format):
    r = np.random.default_rng(4)
    values = r.standard_normal((37, 100)).astype(np.float32)
    x = rows(r, 65, 100, BF16)
    whole = linear(x, ops.quantize(values, format))
    for o in (0, 3, 36):
        alone = ops.quantize(values[o : o + 1], format)
        assert same_sums(linear(x, alone)[:, 0], whole[:, o], tolerance(BF16))


@pytest.mark.parametrize("T", [1, 65])
def test_bf16_results_are_the_f32_ones_rounded(variant, T):
    r = np.random.default_rng(5)
    w, _ = weight(r, 37, 100, format="int8")
    x = rows(r, T, 100, BF16)
    assert same_bits(linear(x, w, BF16), linear(x, w).astype(BF16))


@every_device
@pytest.mark.parametrize("T", [1, 70])
def test_nan_and_infinity_stay_in_their_row(T):
    r = np.random.default_rng(6)
    w, _ = weight(r, 9, 40, format="f32")
    x = rows(r, T + 2, 40)
    clean = linear(x, w)
    x[0, 39], x[T + 1, 3] = np.nan, np.inf
    got = linear(x, w)
    assert np.isnan(got[0]).all() and not np.isfinite(got[T + 1]).any()
    assert same_bits(got[1 : T + 1], clean[1 : T + 1])


@every_device
def test_arrays_are_weights_too():
    r = np.random.default_rng(7)
    x, w = r.standard_normal((2, 3, 40)).astype(np.float32), rows(r, 9, 40, pad=0)
    for given in (w, w.astype(BF16)):
        got = ops.linear(x, given)
        assert got.shape == (2, 3, 9) and got.dtype == np.float32
        want = x.astype(np.float64) @ given.T.astype(np.float64)
        np.testing.assert_allclose(got, want, atol=1e-5)


# Tiles of CUDA's tensor cores: 128 rows of the weight by up to 320 of x, 64 columns a step.
@every_device
@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("K, O", [(72, 130), (64, 8), (200, 321)])
def test_tiles(format, K, O):
    r = np.random.default_rng(9)
    w, dense = weight(r, O, K, format=format)
    for T in (33, 65, 160, 161, 320, 321, 700):
        x = rows(r, T, K, BF16, pad=8)
        got = linear(x, w)
        error = np.abs(got - reference.linear(x, dense))
        assert (error <= bound(x, dense, "cuda")).all(), T
        if format not in ("f32", "bf16"):  # those are another library's
            assert same_bits(linear(x, w, BF16), got.astype(BF16)), T


# Columns that tensor cores can take, rows of x that can be read in wide pieces: less than a group,
# a group and a half, the turns of a block's warps with a rest. O: no multiple of a tile's 16.
STREAMED = ((8, 5), (64, 33), (200, 16), (784, 19), (1024, 37), (2304, 48), (4104, 19))


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("T", [1, 8, 40, 65])
def test_streamed_sizes(variant, format, T):
    r = np.random.default_rng(8)
    for K, O in STREAMED:
        w, dense = weight(r, O, K, format=format)
        x = rows(r, T, K, BF16, pad=8)
        error = np.abs(linear(x, w) - reference.linear(x, dense))
        assert (error <= bound(x, dense, variant)).all(), (K, O)


@pytest.mark.parametrize("device", [CUDA], indirect=True)
@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("T", [1, 5, 16])
def test_more_tiles_than_a_gpu_holds_blocks(device, format, T):
    """A block goes from tile to tile, with the next one's weights on their way already."""
    r = np.random.default_rng(10)
    for K, O in ((136, 9001), (2304, 5000)):
        w, dense = weight(r, O, K, format=format)
        x = rows(r, T, K, BF16, pad=8)
        assert (np.abs(linear(x, w) - reference.linear(x, dense)) <= bound(x, dense, device)).all()


@every_device
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_weights_of_one_byte_are_exact(format):
    """Every number of the format, also the subnormal ones of e4m3, by rows that pick a column."""
    w = np.zeros((3, 256), np.float32)
    numbers = np.arange(-127, 128) if format == "int8" else e4m3_numbers()
    w[1, : len(numbers)] = numbers
    w[2, : len(numbers)] = numbers[::-1]
    w[:, ::64] = numbers.max()  # the scale of each group is 1
    x = np.zeros((256, 256), BF16)
    np.fill_diagonal(x, 1)
    for first in range(0, 256, 8):
        got = linear(x[first : first + 8], ops.quantize(w, format))
        assert same_bits(got, w[:, first : first + 8].T.copy()), first


def e4m3_numbers():
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return numbers[np.isfinite(numbers)] + np.float32(0)  # one zero
