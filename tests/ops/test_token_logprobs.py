"""token_logprobs against the specification, ties, and what is not a number."""

import numpy as np
import pytest
from kimi_linear import reference
from products import BF16, CUDA_FORMATS, rows, weight
from variants import every_device, on, ops, same_bits

# T, D, rows of the head, alternatives: pieces of the head are 4096 rows, blocks 252 tokens.
CASES = ((1, 33, 5, 5), (7, 16, 9001, 256), (65, 64, 4097, 3), (300, 33, 4300, 20))


def same_row(got, want):
    """On CUDA the order of sums may depend on the other rows; here no two logits are so near
    that their order would."""
    if ops.device == "cuda" and got.dtype == np.float32:
        return np.allclose(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    return same_bits(got, want)


def ids32(*values):
    return np.array(values, np.int32)


def make_case(T, D, vocab, *, format="f32", dtype=np.float32, seed=0):
    r = np.random.default_rng(seed)
    lm_head, dense = weight(r, vocab, D, format=format)
    hidden = 3 * rows(r, T, D, dtype, pad=0)
    targets = r.integers(-1, vocab, T).astype(np.int32)
    best = np.argmax(hidden.astype(np.float64) @ dense.T, axis=1)
    targets[::2] = best[::2]
    return hidden.astype(dtype), lm_head, targets, dense


def tolerance(variant, dtype, format, logits):
    """CUDA's tensor cores take bf16 by bf16, to which weights of other formats are rounded."""
    rounds = variant == "cuda" and dtype == BF16 and format != "bf16"
    return 4e-3 * np.abs(logits).max() if rounds else 2e-5


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_matches_float64(variant, format, dtype):
    for T, D, vocab, top in CASES if variant != "scalar" else CASES[:3]:
        hidden, lm_head, targets, dense = make_case(T, D, vocab, format=format, dtype=dtype)
        got = ops.token_logprobs(hidden, lm_head, targets, top=top)
        want = reference.token_logprobs(hidden, dense, targets, top=top)
        logits = hidden.astype(np.float64) @ dense.T
        atol = tolerance(variant, dtype, format, logits)
        np.testing.assert_allclose(got[0], want[0], atol=atol, equal_nan=True)
        np.testing.assert_allclose(got[3], want[3], atol=atol)
        assert (np.diff(got[3], axis=1) <= 0).all()
        # neighbours closer than a rounding may change places, and only they
        exact = np.take_along_axis(logits, got[2].astype(np.int64), 1)
        assert (np.diff(exact, axis=1) < atol).all()
        if atol == 2e-5:
            assert (got[2] != want[2]).mean() < 0.005
            np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("format", ["f32", "bf16", "int4"])
def test_a_row_has_its_bits_alone_and_for_any_threads(variant, format):
    hidden, lm_head, targets, _ = make_case(270, 33, 4300, format=format, dtype=BF16)
    with on(variant, threads=2):
        whole = ops.token_logprobs(hidden, lm_head, targets, top=9)
        for t in (0, 100, 269):
            alone = ops.token_logprobs(hidden[t : t + 1], lm_head, targets[t : t + 1], top=9)
            assert all(same_row(a[0], w[t]) for a, w in zip(alone, whole, strict=True))
        without = ops.token_logprobs(hidden, lm_head, targets)
        assert all(same_row(a, w) for a, w in zip(without, whole, strict=False))
    for threads in (1, 7):
        with on(variant, threads=threads):
            again = ops.token_logprobs(hidden, lm_head, targets, top=9)
        assert all(same_bits(a, w) for a, w in zip(again, whole, strict=True))


def test_the_lower_id_wins_a_tie(variant):
    """3000 copies of two rows, so the best ones lie in both pieces of the head."""
    lm_head = np.tile(np.eye(4, dtype=np.float32)[:2], (3000, 1))
    hidden = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]], np.float32)
    _, greedy, ids, _ = ops.token_logprobs(hidden, lm_head, ids32(1, 2, 0, 5001), top=4)
    assert greedy.tolist() == [True, False, True, False]
    assert ids.tolist() == [[1, 3, 5, 7], [0, 2, 4, 6], [0, 1, 2, 3], [1, 3, 5, 7]]


@every_device
def test_no_target_is_nan_and_not_greedy():
    hidden, lm_head, _, _ = make_case(3, 16, 50)
    logprobs, greedy = ops.token_logprobs(hidden, lm_head, ids32(-1, 4, -1))
    assert np.isnan(logprobs).tolist() == [True, False, True]
    assert not greedy[0] and not greedy[2]


def test_a_nan_spoils_its_row_alone(variant):
    """In the hidden state, and in one row of the head, in the second piece."""
    hidden, lm_head, targets, dense = make_case(9, 16, 5000)
    clean = ops.token_logprobs(hidden, lm_head, targets)
    hidden[4, 3] = np.nan
    logprobs, greedy = ops.token_logprobs(hidden, lm_head, np.abs(targets))
    assert np.isnan(logprobs[4]) and not greedy[4]
    keep = (np.arange(9) != 4) & (targets >= 0)
    assert same_bits(logprobs[keep], clean[0][keep])

    broken = dense.astype(np.float32)
    broken[4999] = np.nan
    logprobs, greedy = ops.token_logprobs(hidden, broken, np.zeros(9, np.int32))
    assert np.isnan(logprobs).all() and not greedy.any()


@every_device
def test_logits_of_any_size():
    """No exponential overflows, and a sum of one term is exact."""
    lm_head = np.array([[1.0], [0.0], [-1.0]], np.float32)
    hidden = np.array([[30000.0], [-30000.0], [0.0]], np.float32)
    logprobs, _ = ops.token_logprobs(hidden, lm_head, ids32(0, 0, 1))
    np.testing.assert_allclose(logprobs, [0.0, -60000.0, -np.log(3.0)], rtol=1e-6)
