"""mla_prefill and mla_decode against the float64 specification, and their properties."""

import numpy as np
import pytest
from kimi_linear import reference
from mla_cases import (
    BF16,
    LENGTHS,
    MANY_HEADS,
    NO_ROPE,
    ODD,
    PAGE,
    SCALE,
    decode,
    make_case,
    prefill,
    rel,
    to_pages,
    tolerance,
    whole_latents,
)
from variants import every_device, on, ops, same_bits, same_sums


# ---- is it accurate --------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [ODD, NO_ROPE, MANY_HEADS])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_prefill_matches_float64(variant, dims, dtype):
    new = [(0, n) for n in LENGTHS] + [(0, 0), (7, 0)]
    after = [(1, 1), (64, 1), (63, 2), (64, 65), (100, 30), (300, 70)]
    case = make_case(new + after, dims, dtype=dtype, w_dtype=dtype)
    got = prefill(case)
    assert rel(got, reference.mla_prefill(**case, scale=SCALE)) < tolerance(dtype)


@pytest.mark.parametrize("dims", [ODD, NO_ROPE, MANY_HEADS])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_decode_matches_float64(variant, dims, dtype):
    case = make_case([(n - 1, 1) for n in (*LENGTHS, 1000)], dims, dtype=dtype, w_dtype=dtype)
    latents = whole_latents(case)
    got = decode(case, latents)
    pages, table, lengths = to_pages(latents)
    want = reference.mla_decode(case["q"], pages, table, lengths, case["w_kv_b"], scale=SCALE)
    assert rel(got, want) < tolerance(dtype)


@every_device
def test_weights_may_have_another_dtype():
    case = make_case([(10, 100), (200, 1)], ODD, dtype=np.float32, w_dtype=BF16)
    assert rel(prefill(case), reference.mla_prefill(**case, scale=SCALE)) < 1e-6


@every_device
def test_default_scale():
    case = make_case([(0, 20)], ODD)
    got = ops.mla_prefill(**case)
    assert rel(got, reference.mla_prefill(**case)) < 1e-6


@every_device
@pytest.mark.parametrize("length", [8192, 8193, 12345])
def test_decode_merges_many_parts(length):
    """Beyond 8,192 tokens the parts of a context grow instead of becoming more."""
    case = make_case([(length - 1, 1)], NO_ROPE)
    want = reference.mla_prefill(**case, scale=SCALE)
    assert rel(decode(case, whole_latents(case)), want) < 1e-6


@every_device
@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("name", ["ODD", "MODEL"])
def test_a_wider_table_changes_no_bit(name, dtype):
    """The runner widens it to a power of two, for steps of one shape."""
    spans = [(n - 1, 1) for n in (*LENGTHS, 3000)]
    case = make_case(spans, globals()[name], dtype=dtype, w_dtype=dtype)
    pages, table, lengths = to_pages(whole_latents(case))
    found = []
    for width in (len(table.T), 64, 1024):
        wide = np.pad(table, ((0, 0), (0, width - len(table.T))), constant_values=2**30)
        found.append(ops.mla_decode(case["q"], pages, wide, lengths, case["w_kv_b"], scale=SCALE))
    assert all(same_bits(o, found[0]) for o in found)


@every_device
def test_decode_of_more_rows_than_fit_at_once():
    spans = [(int(n), 1) for n in np.random.default_rng(5).integers(0, 700, 150)]
    case = make_case(spans, NO_ROPE)
    want = reference.mla_prefill(**case, scale=SCALE)
    assert rel(decode(case, whole_latents(case)), want) < 1e-6


@every_device
def test_prefill_of_several_groups():
    """More than 32 tiles: the pages are expanded once for each group."""
    case = make_case([(70, 2200)], NO_ROPE)
    got = prefill(case)
    tail = {**case, "q": case["q"][-90:], "latent": case["latent"][-90:], "cu_seqlens": None}
    tail["past"] = np.concatenate([case["past"][0], case["latent"][:-90]])
    assert rel(got[-90:], reference.mla_prefill(**tail, scale=SCALE)) < 1e-6
    head = {**case, "q": case["q"][:90], "latent": case["latent"][:90], "cu_seqlens": None}
    assert rel(got[:90], reference.mla_prefill(**head, scale=SCALE)) < 1e-6


@every_device
@pytest.mark.parametrize("factor", [1e3, 1e-6])
def test_sharp_and_flat_scores(factor):
    case = make_case([(100, 90), (200, 1)], ODD)
    case["q"] *= np.float32(factor)
    want = reference.mla_prefill(**case, scale=SCALE)
    # Scores in the thousands carry f32's own error, 1e-7 of their size, into the exponent.
    assert rel(prefill(case), want) < (1e-3 if factor > 1 else 1e-6)


# ---- the two forms are one function ----------------------------------------------------------


@every_device
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_decode_is_the_prefill_of_one_token(dtype):
    case = make_case([(n - 1, 1) for n in (*LENGTHS, 500)], ODD, dtype=dtype)
    assert same_sums(prefill(case), decode(case, whole_latents(case)), tolerance(dtype))


@every_device
@pytest.mark.parametrize("past,new", [(3, 16), (60, 20), (64, 9), (200, 2)])
def test_few_tokens_are_decode_steps(past, new):
    """Up to 16 tokens within a page have the bits of as many single steps."""
    case = make_case([(past, new)], ODD)
    assert same_sums(run_in_chunks(case, range(1, new)), prefill(case), 1e-6)


def test_plain_and_absorbed_agree(device):
    """A token among 40 goes through the plain form, alone through the absorbed one."""
    case = make_case([(300, 40)], ODD)
    steps = run_in_chunks(case, range(1, 40))
    if device == "cpu":
        assert (steps != prefill(case)).any()  # or it would be one form
    assert rel(prefill(case), steps.astype(float)) < 1e-6


# ---- properties ------------------------------------------------------------------------------


def run_in_chunks(case, cuts):
    """One sequence, its new tokens cut at `cuts`."""
    bounds = [0, *cuts, len(case["q"])]
    parts = []
    for a, b in zip(bounds, bounds[1:], strict=False):
        past = np.concatenate([case["past"][0], case["latent"][:a]])
        parts.append(prefill(case, q=case["q"][a:b], latent=case["latent"][a:b], past=past,
                             cu_seqlens=None))  # fmt: skip
    return np.concatenate(parts)


@every_device
@pytest.mark.parametrize("past", [0, 30, 64])
def test_chunks_at_pages_change_no_bit(past):
    case = make_case([(past, 260)], ODD)
    whole = prefill(case)
    first = -past % PAGE or PAGE
    for cuts in ([first], [first + 64], [first, first + 64, first + 128]):
        assert same_sums(run_in_chunks(case, cuts), whole, 1e-6)


@every_device
@pytest.mark.parametrize(
    "cuts", [[1], [63], [65], [100], [199], [7, 8, 9, 120], list(range(1, 200))]
)
def test_chunks_elsewhere_agree(cuts):
    case = make_case([(20, 200)], ODD)
    assert rel(run_in_chunks(case, cuts), prefill(case).astype(float)) < 1e-6


@every_device
def test_a_row_of_a_batch_is_the_row_alone():
    spans = [(0, 70), (0, 0), (130, 1), (0, 1), (65, 64), (3, 129)]
    case = make_case(spans, ODD)
    together = prefill(case)
    for n, (a, b) in enumerate(zip(case["cu_seqlens"], case["cu_seqlens"][1:], strict=False)):
        alone = prefill(case, q=case["q"][a:b], latent=case["latent"][a:b],
                        past=case["past"][n], cu_seqlens=None)  # fmt: skip
        assert a == b or same_sums(alone, together[a:b], 1e-6)


@every_device
def test_a_row_of_a_decode_batch_is_the_row_alone():
    case = make_case([(n - 1, 1) for n in (1, 64, 65, 700, 3000)], MANY_HEADS)
    latents = whole_latents(case)
    together = decode(case, latents)
    for n, rows in enumerate(latents):
        alone = decode({**case, "q": case["q"][n : n + 1]}, [rows])
        assert same_sums(alone[0], together[n], 1e-6)


def test_threads_change_no_bit(variant):
    case = make_case([(0, 150), (500, 1), (90, 330)], ODD)
    steps = make_case([(1500, 1), (3, 1)], MANY_HEADS)
    results = []
    for threads in (1, 2, 7):
        with on(variant, threads=threads):
            results.append((prefill(case), decode(steps, whole_latents(steps))))
    for other in results[1:]:
        assert (other[0] == results[0][0]).all() and (other[1] == results[0][1]).all()


def test_group_sizes_change_no_bit():
    """With more threads than heads, groups of tiles become smaller."""
    case = make_case([(0, 1000)], (1, 5, 3, 9, 6))
    with on("cpu", threads=1):
        one = prefill(case)
    with on("cpu", threads=13):
        assert (prefill(case) == one).all()


@every_device
def test_the_future_is_not_read():
    """Not even multiplied by zero: NaN there must not reach earlier tokens."""
    case = make_case([(10, 150)], ODD)
    want = prefill(case)
    case["latent"][100:] = np.nan
    got = prefill(case)
    assert (got[:100] == want[:100]).all()
    assert np.isnan(got[100:]).all()


@every_device
def test_a_nan_stays_in_its_sequence():
    case = make_case([(10, 70), (64, 66), (5, 1)], ODD)
    want = prefill(case)
    case["past"][1][3] = np.nan
    got = prefill(case)
    assert (got[:70] == want[:70]).all() and (got[-1] == want[-1]).all()
    assert np.isnan(got[70:-1]).all()


@every_device
def test_twice_the_same_and_inputs_untouched():
    case = make_case([(70, 100), (200, 1)], ODD)
    before = {k: np.copy(v) for k, v in case.items() if k != "past"}
    assert (prefill(case) == prefill(case)).all()
    assert all((case[k] == v).all() for k, v in before.items())


@every_device
def test_strided_queries():
    case = make_case([(5, 80), (90, 1)], ODD)
    wide = np.full((len(case["q"]), 2, *case["q"].shape[1:]), np.nan, np.float32)
    wide[:, 0] = case["q"]
    assert (prefill(case, q=wide[:, 0]) == prefill(case)).all()


@every_device
def test_nothing_to_do():
    case = make_case([(5, 0), (0, 0)], ODD)
    assert prefill(case).shape == (0, 3, 21)


# ---- the model's dimensions in bfloat16, which CUDA has kernels of its own for -----------------

MODEL = (2, 128, 64, 512, 128)
# Keys, values and weights of the softmax are rounded to bfloat16 before they are summed.
ROUNDED = 5e-3


def expected_rows(case, n, rows):
    """Rows (of a sequence's new tokens) of sequence n."""
    begin, end = case["cu_seqlens"][n : n + 2]
    past = case["past"][n]
    latents = np.concatenate([past, case["latent"][begin:end]]).astype(np.float32)
    w = case["w_kv_b"].astype(np.float32)
    c, k_pe = latents[:, :512], latents[:, 512:]
    want = []
    for i in rows:
        q = case["q"][begin + i].astype(np.float32)
        seen = len(past) + i + 1
        absorbed = np.einsum("hn,hnr->hr", q[:, :128], w[:, :128])
        scores = SCALE * (absorbed @ c[:seen].T + q[:, 128:] @ k_pe[:seen].T)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        want.append(np.einsum("hr,hvr->hv", p @ c[:seen] / p.sum(axis=1)[:, None], w[:, 128:]))
    return np.array(want)


def check_tiles(case):
    got = prefill(case)
    assert np.isfinite(got.astype(np.float32)).all()
    for n, (begin, end) in enumerate(zip(case["cu_seqlens"], case["cu_seqlens"][1:], strict=False)):
        if begin == end:
            continue
        rows = np.unique(np.linspace(0, end - begin - 1, 24).astype(int))
        assert rel(got[begin:end][rows], expected_rows(case, n, rows)) < ROUNDED
    return got


@every_device
@pytest.mark.parametrize(
    "heads,lengths",
    [(2, [1]), (2, [12345]), (2, [4000, 70]), (1, [1, 2000, 65]), (1, [70] * 17),
     (1, [1, 8449, 64, 65, 3000, 127]), (37, [64] * 40), (3, [*range(3, 400, 9), 2000])],
)  # fmt: skip
def test_steps_whose_pages_are_shared_out(heads, lengths):
    """CUDA gives each of its blocks as many pages, of one sequence or several."""
    dims = (heads, *MODEL[1:])
    case = make_case([(n - 1, 1) for n in lengths], dims, dtype=BF16, w_dtype=BF16)
    latents = whole_latents(case)
    got = decode(case, latents)
    want = np.concatenate([expected_rows(case, n, [0]) for n in range(len(lengths))])
    assert np.isfinite(got.astype(np.float32)).all()
    assert rel(got, want) < ROUNDED
    assert same_bits(decode(case, latents), got)


@every_device
def test_ragged_tiles():
    spans = [(0, n) for n in (1, 16, 17, 63, 64, 65, 128, 129)]
    spans += [(0, 0), (7, 0), (63, 2), (50, 17), (50, 16), (100, 30), (300, 200)]
    check_tiles(make_case(spans, MODEL, dtype=BF16, w_dtype=BF16))


@every_device
@pytest.mark.parametrize("past", [0, 50, 64])
def test_tiles_of_a_batch_are_the_tiles_alone(past):
    """Also where a chunk ends at a page: there nothing differs but the batch."""
    spans = [(past, 150), (10, 70), (200, PAGE)]
    case = make_case(spans, MODEL, dtype=BF16, w_dtype=BF16)
    together = prefill(case)
    for n, (a, b) in enumerate(zip(case["cu_seqlens"], case["cu_seqlens"][1:], strict=False)):
        alone = prefill(case, q=case["q"][a:b], latent=case["latent"][a:b],
                        past=case["past"][n], cu_seqlens=None)  # fmt: skip
        assert (together[a:b] == alone).all()


@every_device
def test_contexts_longer_than_a_window():
    """CUDA makes the keys and values of 8,192 tokens at a time, of one sequence or several."""
    spans = [(9000, 100), (20, 90), (0, 0), (16400, 30), (8192, 64), (300, 1)]
    check_tiles(make_case(spans, (1, *MODEL[1:]), dtype=BF16, w_dtype=BF16))
