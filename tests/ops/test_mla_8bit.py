"""8-bit latents: the same calls, on what 8 bits keep of the latents."""

import numpy as np
import pytest
from kimi_linear import reference
from mla_cases import (
    BF16,
    LENGTHS,
    NO_ROPE,
    ODD,
    SCALE,
    decode,
    make_case,
    prefill,
    to_pages,
    tolerance,
    value_width,
    whole_latents,
)
from variants import every_device, ops, same_bits, same_sums

LATENT_DIMS = {"ODD": ODD, "NO_ROPE": NO_ROPE, "GROUPS": (3, 16, 8, 300, 21),
               "MODEL": (33, 128, 64, 512, 128)}  # fmt: skip


def make_8bit(spans, dims, *, dtype=np.float32, seed=0):
    """A case whose latents are far from equal in size, and the same with what 8 bits keep."""
    case = make_case(spans, dims, dtype=dtype, w_dtype=dtype, seed=seed)
    rank, rope = dims[3], dims[2]
    sizes = np.exp2(np.random.default_rng(seed).integers(-6, 6, (rank + rope)))
    case["latent"] = (case["latent"] * sizes).astype(dtype)
    case["past"] = [(rows * sizes).astype(dtype) for rows in case["past"]]
    kept = {**case, "latent": kept_of(case["latent"], rank)}
    kept["past"] = [kept_of(rows, rank) for rows in case["past"]]
    return case, kept


def kept_of(rows, rank):
    packed = reference.pack_latents(rows, rank)
    return reference.unpack_latents(packed, rank, rows.shape[1] - rank).astype(rows.dtype)


@every_device
@pytest.mark.parametrize("dims", LATENT_DIMS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_prefill_of_8_bits_is_that_of_what_they_keep(dims, dtype):
    spans = [(0, n) for n in (1, 63, 65, 150)] + [(100, 30), (70, 1), (0, 0), (300, 130)]
    case, kept = make_8bit(spans, LATENT_DIMS[dims], dtype=dtype)
    got, want = prefill(case, kv_cache_dtype="fp8"), prefill(kept)
    assert not same_bits(got, prefill(case))
    assert same_sums(got, want, tolerance(dtype))


@every_device
@pytest.mark.parametrize("dims", LATENT_DIMS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_decode_of_8_bits_is_that_of_what_they_keep(dims, dtype):
    H, _, rope, rank, _ = LATENT_DIMS[dims]
    case, kept = make_8bit([(n - 1, 1) for n in (*LENGTHS, 1000, 4100)], LATENT_DIMS[dims],
                           dtype=dtype)  # fmt: skip
    pages, table, lengths = to_pages(whole_latents(case))
    packed = reference.pack_latents(pages, rank)
    packed[np.isnan(pages.astype(np.float32)).all(axis=2)] = 255  # codes and scales are NaN
    out = np.full((len(case["q"]), H, value_width(case)), np.nan, dtype)
    call = (packed, table, lengths, case["w_kv_b"])
    ops.mla_decode(case["q"], *call, scale=SCALE, rope=rope, out=out)
    assert same_sums(out, decode(kept, whole_latents(kept)), tolerance(dtype))
    assert same_bits(ops.mla_decode(case["q"], *call, scale=SCALE, rope=rope), out)


@every_device
def test_8_bits_read_back_as_nan_where_they_cannot_keep():
    """A latent that is not finite, or is beyond the scales, reaches its own sequence alone."""
    case, _ = make_8bit([(10, 70), (64, 66), (3, 2), (5, 1)], ODD)
    want = prefill(case, kv_cache_dtype="fp8")
    for value in (np.nan, np.inf, -58000.0):
        case["past"][1][3, 7] = value
        got = prefill(case, kv_cache_dtype="fp8")
        assert np.isnan(got[70:136]).all()
        assert same_bits(got[:70], want[:70]) and same_bits(got[136:], want[136:])
    case["past"][1][3, 7] = 57344.0
    assert np.isfinite(prefill(case, kv_cache_dtype="fp8")).all()


@every_device
@pytest.mark.parametrize("dims", ["ODD", "MODEL"])
def test_a_step_reads_nan_in_its_own_sequence_alone(dims):
    rope, rank = LATENT_DIMS[dims][2:4]
    case, _ = make_8bit([(n - 1, 1) for n in (64, 200, 70)], LATENT_DIMS[dims], dtype=BF16)
    latents = whole_latents(case)
    results = []
    for value in (1.0, np.nan):
        latents[1][70, rank // 2] = value
        pages, table, lengths = to_pages(latents)
        packed = reference.pack_latents(pages, rank)
        results.append(ops.mla_decode(case["q"], packed, table, lengths, case["w_kv_b"],
                                      scale=SCALE, rope=rope).astype(np.float32))  # fmt: skip
    want, got = results
    assert np.isnan(got[1]).all() and np.isfinite(want).all()
    assert same_bits(got[[0, 2]], want[[0, 2]])


def test_8_bits_in_numbers():
    rows = np.random.default_rng(0).standard_normal((50, 300)).astype(np.float32)
    rows[:, :9] = [0, 448, -448, 2**-9, 1.5 * 2**-9, -0.0, 464, 1, 17]
    rows[7] = 0
    rows[8] = rows[9] * np.float32(2.0**-110)
    kept = reference.unpack_latents(reference.pack_latents(rows, 256), 256, 44)
    scale = 2.0**-100 * np.exp2(np.arange(108))
    most = np.abs(rows[:, :256]).reshape(50, 2, 128).max(axis=2)
    scale = np.array([[scale[np.argmax(448 * scale >= m)] for m in row] for row in most])
    error = np.abs(kept - rows)[:, :256].reshape(50, 2, 128)
    bound = np.maximum(np.abs(rows[:, :256].reshape(50, 2, 128)) / 16, scale[..., None] / 1024)
    assert (error <= bound).all()
    assert same_bits(kept.astype(BF16).astype(np.float32), kept)
    assert same_bits(kept[:, 256:], rows[:, 256:].astype(BF16).astype(np.float32))


def test_8_bit_pages_are_told_apart():
    case = make_case([(5, 1)], ODD)
    pages, table, lengths = to_pages(whole_latents(case))
    packed = reference.pack_latents(pages, ODD[3])
    rest = (table, lengths, case["w_kv_b"])
    with pytest.raises(ValueError, match="rope must be given with pages of uint8"):
        ops.mla_decode(case["q"], packed, *rest)
    with pytest.raises(ValueError, match="rope must not be given with pages of float32"):
        ops.mla_decode(case["q"], pages, *rest, rope=5)
    with pytest.raises(ValueError, match=r"pages.shape\[2\] must be 80, got 64"):
        ops.mla_decode(case["q"], np.ascontiguousarray(packed[..., :64]), *rest, rope=5)
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        prefill(case, kv_cache_dtype="int8")
