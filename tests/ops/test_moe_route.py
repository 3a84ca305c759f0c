"""moe_route against the float64 specification."""

import numpy as np
import pytest
from kimi_linear import reference
from variants import every_device, on, ops


def make_logits(T, E, seed=0):
    """Rows of evenly spaced values, shuffled: no two scores fall together in float32."""
    r = np.random.default_rng(seed)
    return r.permuted(np.tile(np.linspace(-4, 4, E), (T, 1)), axis=1).astype(np.float32)


def make_bias(E, seed=52):
    """With this seed no two chosen scores of test_matches_float64 lie within 1e-6."""
    return (0.1 * np.random.default_rng(seed).standard_normal(E)).astype(np.float32)


def check(logits, bias, **args):
    ids, weights = ops.moe_route(logits, bias, scaling=2.446, **args)
    want_ids, want = reference.moe_route(logits, bias, scaling=2.446, **args)
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    assert (ids == want_ids).all()
    np.testing.assert_allclose(weights, want, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    "E,top_k,groups,top_groups",
    [(256, 8, 1, 1), (256, 8, 8, 4), (1024, 64, 1, 1), (33, 5, 1, 1), (6, 2, 3, 2),
     (7, 7, 1, 1)],
)  # fmt: skip
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_matches_float64(variant, E, top_k, groups, top_groups, score):
    logits = make_logits(60, E)
    args = {"top_k": top_k, "groups": groups, "top_groups": top_groups, "score": score}
    check(logits, make_bias(E), **args)
    check(logits, None, renormalize=False, **args)


@every_device
def test_the_bias_chooses_and_does_not_weigh():
    logits, bias = make_logits(20, 16), np.zeros(16, np.float32)
    bias[5] = 10
    ids, weights = ops.moe_route(logits, bias, top_k=3, scaling=1.0, renormalize=False)
    assert (ids[:, 0] == 5).all()
    want = 1 / (1 + np.exp(-logits[:, 5].astype(float)))
    np.testing.assert_allclose(weights[:, 0], want, rtol=1e-6)


@every_device
def test_lower_id_on_a_tie():
    logits = np.zeros((2, 9), np.float32)
    logits[1, [3, 7]] = 1
    ids, _ = ops.moe_route(logits, None, top_k=4, scaling=1.0)
    assert ids.tolist() == [[0, 1, 2, 3], [3, 7, 0, 1]]


@every_device
def test_groups_are_ranked_by_their_two_best():
    """Group 0 has the best expert, group 1 the best pair."""
    logits = np.array([[4, -4, -4, 2, 2, -4, 1, 1, 0]], np.float32)
    args = {"top_k": 2, "scaling": 1.0, "groups": 3}
    assert ops.moe_route(logits, None, top_groups=1, **args)[0].tolist() == [[3, 4]]
    assert ops.moe_route(logits, None, top_groups=2, **args)[0].tolist() == [[3, 4]]
    assert ops.moe_route(logits, None, top_groups=3, **args)[0].tolist() == [[0, 3]]


@every_device
def test_weights_sum_to_the_scaling():
    _, weights = ops.moe_route(make_logits(50, 64), make_bias(64), top_k=6, scaling=2.446)
    np.testing.assert_allclose(weights.sum(axis=1), 2.446, rtol=1e-6)


@every_device
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_extreme_logits(score):
    logits = np.array([[-200, 200, 90, -90, 0], [-1e30, -2e30, -3e30, 1e30, 0]], np.float32)
    ids, weights = ops.moe_route(logits, None, top_k=2, scaling=1.0, score=score)
    assert ids[:, 0].tolist() == [1, 3]
    assert np.isfinite(weights).all()
    # All scores underflow: the weights are zero, not 0 / 0.
    low = np.full((1, 5), -200, np.float32)
    _, weights = ops.moe_route(low, None, top_k=2, scaling=1.0)
    assert np.isfinite(weights).all()


@every_device
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups,top_groups", [(1, 1), (4, 2)])
def test_nan_stays_in_range_and_shows(score, groups, top_groups):
    logits = make_logits(6, 16)
    logits[1, 11] = np.nan
    logits[2] = np.nan
    logits[3] = np.inf
    logits[4, 2] = -np.inf
    ids, weights = ops.moe_route(
        logits, make_bias(16), top_k=8, scaling=1.0, score=score, groups=groups,
        top_groups=top_groups,
    )  # fmt: skip
    assert ((ids >= 0) & (ids < 16)).all()
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert np.isnan(weights[1:3]).all()
    assert np.isfinite(weights[[0, 4, 5]]).all()


def test_rows_and_threads_are_independent(device):
    logits, bias = make_logits(3000, 40), make_bias(40)
    results = []
    for threads in (1, 2, 7):
        with on(device, threads=threads):
            results.append(ops.moe_route(logits, bias, top_k=5, scaling=1.0))
    for ids, weights in results[1:]:
        assert (ids == results[0][0]).all() and (weights == results[0][1]).all()
    ids, weights = ops.moe_route(logits[777:778], bias, top_k=5, scaling=1.0)
    assert (ids == results[0][0][777]).all() and (weights == results[0][1][777]).all()


@every_device
def test_no_tokens():
    ids, weights = ops.moe_route(make_logits(0, 8), None, top_k=2, scaling=1.0)
    assert ids.shape == weights.shape == (0, 2)
