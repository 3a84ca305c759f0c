"""moe_experts, and through its shared expert the dense layer, against the specification."""

import numpy as np
import pytest
from kimi_linear import reference
from products import BF16, CUDA_FORMATS, relative, rows, weight
from variants import every_device, on, ops, same_bits, same_sums

# T, D, I, I' (0: no shared expert), E, top_k: D and I unequal and no multiples of a vector; one
# expert for all; every expert for all; more tokens than a block of 512; more pairs than a wave.
CASES = (
    (1, 33, 7, 9, 5, 2),
    (3, 64, 31, 0, 4, 3),
    (9, 100, 37, 64, 8, 8),
    (70, 40, 24, 20, 1, 1),
    (300, 24, 10, 0, 6, 4),
    (515, 24, 16, 8, 9, 2),
)


def make_case(T, D, inner, shared, E, top_k, *, format="f32", dtype=np.float32, seed=0):
    """(arguments of ops.moe_experts, the same with float64 weights)."""
    r = np.random.default_rng(seed)
    ids = np.stack([r.permutation(E)[:top_k] for _ in range(T)]).astype(np.int32)
    given = {
        "x": rows(r, T, D, dtype, pad=0),
        "ids": ids,
        "weights": r.random((T, top_k)).astype(np.float32),
    }
    want = dict(given)
    for name, shape in (("w1", (E, inner, D)), ("w3", (E, inner, D)), ("w2", (E, D, inner))):
        given[name], want[name] = weight(r, *shape, format=format)
    if shared:
        shapes = ((shared, D), (shared, D), (D, shared))
        pairs = [weight(r, *shape, format=format) for shape in shapes]
        given["shared"], want["shared"] = (tuple(p[i] for p in pairs) for i in (0, 1))
    return given, want


def run(case, **changes):
    case = {**case, **changes}
    out = np.full(case["x"].shape, np.nan, case["x"].dtype)
    assert ops.moe_experts(**case, out=out) is out
    return out


def tokens(case, begin, end):
    return {name: case[name][begin:end] for name in ("x", "ids", "weights")}


def tolerance(dtype):
    return 2e-6 if dtype == np.float32 else 4e-3  # two roundings to bfloat16


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_matches_float64(variant, format, dtype):
    for shape in CASES:
        given, want = make_case(*shape, format=format, dtype=dtype)
        got = run(given)
        assert relative(got, reference.moe_experts(**want)) < tolerance(dtype), shape


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_a_token_has_its_bits_alone_and_for_any_threads(variant, format, dtype):
    for shape in (CASES[2], CASES[4], CASES[5]):
        given, _ = make_case(*shape, format=format, dtype=dtype)
        T = shape[0]
        with on(variant, threads=2):
            whole = run(given)
            for t in (0, T // 2, T - 1):
                alone = run(given, **tokens(given, t, t + 1))[0]
                assert same_sums(alone, whole[t], tolerance(dtype))
            others = run(given, **tokens(given, 1, T))
            assert same_sums(others, whole[1:], tolerance(dtype))
        for threads in (1, 7):
            with on(variant, threads=threads):
                assert same_bits(run(given), whole)


@every_device
def test_one_expert_named_twice():
    """Nothing forbids it: both weights count, in the order of the slots."""
    given, want = make_case(300, 24, 10, 0, 6, 4)
    ids = np.full((300, 4), 3, np.int32)
    got = run(given, ids=ids)
    assert relative(got, reference.moe_experts(**{**want, "ids": ids})) < 2e-6


@every_device
def test_weights_of_unchosen_experts_are_not_read():
    given, _ = make_case(5, 24, 10, 0, 6, 2)
    clean = run(given, ids=given["ids"] % 3)
    w = {n: given[n].dequantize() for n in ("w1", "w3", "w2")}
    for array in w.values():
        array[3:] = np.nan
    assert same_bits(run(given, ids=given["ids"] % 3, **w), clean)


@every_device
def test_a_nan_stays_in_its_token():
    given, _ = make_case(70, 40, 24, 20, 4, 2)
    clean = run(given)
    x = given["x"].copy()
    x[5, 0] = np.nan
    got = run(given, x=x)
    assert np.isnan(got[5]).all()
    keep = np.arange(70) != 5
    assert same_bits(got[keep], clean[keep])


@every_device
@pytest.mark.parametrize("gate", [-200.0, 200.0])
def test_silu_far_from_zero(gate):
    """silu(-200) is 0 and silu(200) is 200: no infinity over infinity."""
    one = np.ones((1, 1, 1), np.float32)
    given = {
        "x": np.full((1, 1), gate, np.float32),
        "ids": np.zeros((1, 1), np.int32),
        "weights": np.ones((1, 1), np.float32),
    }
    got = run({**given, "w1": one, "w3": one, "w2": one})
    want = gate * gate if gate > 0 else 0.0
    assert got[0, 0] == pytest.approx(want, abs=1e-30)


@every_device
@pytest.mark.parametrize("shared_format", CUDA_FORMATS)
def test_formats_may_differ(shared_format):
    """The router's neighbours are often kept wider than the experts."""
    given, want = make_case(9, 40, 24, 0, 4, 2, format="int4", dtype=BF16)
    r = np.random.default_rng(9)
    pairs = [weight(r, *s, format=shared_format) for s in ((20, 40), (20, 40), (40, 20))]
    given["shared"], want["shared"] = (tuple(p[i] for p in pairs) for i in (0, 1))
    assert relative(run(given), reference.moe_experts(**want)) < 4e-3


# Multiples of 64, which the tensor cores take on CUDA: a single token, with and without a shared
# expert of another width, few pairs an expert, also of matrices too wide for their kernel, up to 32
# an expert, tiles of some sizes up to 320 rows, more than those.
TILED = (
    (1, 192, 64, 128, 16, 2), (1, 64, 192, 0, 8, 8), (1, 320, 192, 64, 5, 3), (2, 128, 64, 64, 4, 2),
    (9, 192, 64, 128, 16, 2), (4, 2624, 64, 64, 4, 2), (4, 64, 2624, 0, 4, 2),
    (60, 128, 64, 64, 16, 4), (300, 128, 64, 64, 16, 4), (700, 64, 128, 64, 9, 2),
    (1400, 64, 64, 64, 5, 2),
)  # fmt: skip


FIVE_ROUNDINGS = 4.5e-3
SEVEN_ROUNDINGS = 5.3e-3


@every_device
@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("shape", TILED)
def test_tiled_sizes(format, shape):
    """Weights may be rounded to bfloat16 there. A rounding costs 1.66e-3 of relative RMS: three
    weights 2.8e-3 together, inner product and output 2.3e-3, all five 3.7e-3 in wide matrices;
    the bound leaves a fifth for the spread of narrow ones."""
    given, want = make_case(*shape, format=format, dtype=BF16)
    got = run(given)
    assert relative(got, reference.moe_experts(**want)) < FIVE_ROUNDINGS
    assert same_bits(run(given), got)


@every_device
@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("counts", [
    (1, 0, 31, 32, 33, 95, 129, 160, 161, 225, 257, 289, 320, 321, 650, 0, 1000),
    (1, 0, 31, 32, 33, 63, 64, 65, 129, 200, *14 * (0,)),
    (7, 8, 9, 16, 17, 0, 1, *14 * (0,)),
])  # fmt: skip
def test_experts_of_any_number_of_rows(format, counts):
    """From none to more than three tiles of each kind; some fill 32, 64, ... rows, some one more."""
    T = sum(counts)
    given, want = make_case(T, 64, 128, 0, len(counts), 1, format=format, dtype=BF16)
    ids = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    ids = np.random.default_rng(1).permutation(ids)[:, None]
    got = run(given, ids=ids)
    assert relative(got, reference.moe_experts(**{**want, "ids": ids})) < FIVE_ROUNDINGS


@every_device
@pytest.mark.parametrize("shape", [s for s in TILED if s[0] > 5])
def test_a_nan_stays_in_its_row_of_a_tile(shape):
    given, _ = make_case(*shape, format="bf16", dtype=BF16)
    clean = run(given)
    x = given["x"].copy()
    x[5, 0] = np.nan
    got = run(given, x=x)
    assert np.isnan(got[5].astype(np.float32)).all()
    keep = np.arange(shape[0]) != 5
    assert same_bits(got[keep], clean[keep])


@every_device
@pytest.mark.parametrize("format", CUDA_FORMATS)
def test_a_single_token_is_a_row_of_two(format):
    """Alone it has kernels of its own on CUDA, which take int4 as it is where those of two tokens
    round its three weights (test_tiled_sizes); inner product and output are rounded in both calls:
    sqrt(7) 1.66e-3 = 4.4e-3, and a fifth for the spread of narrow matrices. Its experts may be
    named twice."""
    given, _ = make_case(2, 192, 128, 64, 16, 4, format=format, dtype=BF16)
    bound = SEVEN_ROUNDINGS if format == "int4" else tolerance(BF16)
    given["ids"][1] = (3, 7, 3, 0)
    both = run(given)
    for t in (0, 1):
        assert same_sums(run(given, **tokens(given, t, t + 1))[0], both[t], bound)


@every_device
@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("largest, meets", [(64, False), (1e4, False), (1e4, True)])
def test_one_x_far_above_its_neighbours(format, largest, meets):
    """Of a single token, which CUDA multiplies with weights that are whole numbers as a whole
    number itself, of 30 bits for the largest of a group: the others, of 1e-3, are off by up to
    2^-30 of it (device/digits.cuh; half of int4's columns have 4 bits less), in gate and in up. It
    shows where no weight `meets` it."""
    given, want = make_case(1, 192, 128, 0, 12, 4, format=format, dtype=BF16)
    x = given["x"] * BF16(1e-3)
    x[0, 5], x[0, 128:160] = largest, 0
    for name in () if meets else ("w1", "w3"):
        w = want[name].astype(np.float32)
        w[..., 5] = 0
        given[name], want[name] = ops.quantize(w, format), reference.quantize(w, format).dequantize()
    got = run(given, x=x)
    bits = {"int8": 30, "int4": 26}
    off = 0 if meets or format not in bits else 2 * 2.0 ** -bits[format] * largest / 1e-3
    assert relative(got, reference.moe_experts(**{**want, "x": x})) < tolerance(BF16) + off
    x[0, 5] = np.nan
    assert np.isnan(run(given, x=x).astype(np.float32)).all()


@every_device
@pytest.mark.parametrize("T, E, top_k", [(1024, 33, 4), (1025, 33, 4), (3000, 300, 3)])
def test_many_pairs(T, E, top_k):
    """More of them than a block of CUDA's plan takes: 4096, and the first past it."""
    given, want = make_case(T, 8, 4, 4, E, top_k)
    got = run(given)
    assert relative(got, reference.moe_experts(**want)) < 2e-6
    alone = [run({**given, **tokens(given, t, t + 1)})[0] for t in (0, T // 2, T - 1)]
    assert same_sums(np.array(alone), got[[0, T // 2, T - 1]], 2e-6)


@every_device
def test_infinite_weights_of_one_expert_stay_in_its_tokens():
    given, _ = make_case(2, 128, 64, 64, 8, 2, format="bf16", dtype=BF16)
    w1 = np.array(given["w1"].dequantize(), np.float32)
    w1[5] = np.inf
    given["w1"], given["ids"] = w1.astype(BF16), np.array([[0, 5], [1, 2]], np.int32)
    given["w3"] = np.array(given["w3"].dequantize(), np.float32).astype(BF16)
    for t in (0, 1):
        alone = run(given, **tokens(given, t, t + 1))[0].astype(np.float32)
        assert np.isnan(alone).all() if t == 0 else np.isfinite(alone).all()
