"""sample against the float64 specification, by statistics, and its properties."""

import numpy as np
import pytest
from kimi_linear import reference
from kimi_linear.reference import Sampling
from variants import every_device, on, ops

VOCABULARY = 163_840


def sample(logits, params, *, seen=None, top=0):
    return ops.sample(logits, [tuple(p) for p in params], seen, top)


def f32(x):
    """A float that float32 holds: the C side rounds parameters to it."""
    return float(np.float32(x))


def bits_of(ids, V):
    words = np.zeros(-(-V // 32), np.uint32)
    for i in ids:
        words[i // 32] |= np.uint32(1 << i % 32)
    return words.view(np.int32)


# ---- against the specification ---------------------------------------------------------------


def random_params(r, N):
    def pick(*values):
        return values[r.integers(len(values))]

    return [
        Sampling(
            temperature=f32(pick(0, 0.3, 1, 2)), top_k=pick(0, 1, 3, 40, 10_000),
            top_p=f32(pick(1, 0.9, 0.5, 1e-9)), min_p=f32(pick(0, 0.05, 1)),
            repetition_penalty=f32(pick(1, 1.3, 0.7)), seed=int(r.integers(2**63)),
            position=int(r.integers(2**40)),
        )
        for _ in range(N)
    ]  # fmt: skip


@pytest.mark.parametrize("V", [1, 5, 31, 100, 5000])
def test_same_ids_as_the_specification(variant, V):
    N, top = 200, min(V, 7)
    r = np.random.default_rng(V)
    logits = (r.standard_normal((N, V)) * r.choice([0.1, 1, 4, 20], (N, 1))).astype(np.float32)
    logits[r.random((N, V)) < 0.1] = -np.inf
    logits[:, 0] = 1  # one that is finite
    logits[::3, V // 2 : V // 2 + 3] = logits[::3, V // 2 : V // 2 + 1]  # and ties
    params = random_params(r, N)
    seen = r.integers(-(2**31), 2**31, (N, -(-V // 32))).astype(np.int32)
    got = sample(logits, params, seen=seen, top=top)
    want = reference.sample(logits, params, seen=seen, top=top)
    assert (got[0] == want[0]).all() and (got[2] == want[2]).all()
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[3], want[3], rtol=1e-6, atol=1e-6)


@every_device
@pytest.mark.parametrize(
    "p",
    [
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=f32(0.8), top_p=f32(0.95), seed=4),
        Sampling(temperature=f32(0.8), top_k=50, seed=5),
        Sampling(temperature=f32(0.7), top_k=4000, top_p=f32(0.9), min_p=f32(0.01), seed=6),
    ],
)
@pytest.mark.parametrize("spread", [3.0, 0.01, 0.0])
def test_a_whole_vocabulary(p, spread):
    """Peaked, nearly flat, and all ties: one bucket holds everything."""
    logits = np.random.default_rng(1).standard_normal((3, VOCABULARY)).astype(np.float32)
    logits *= np.float32(spread)
    params = [p._replace(position=i) for i in range(3)]
    got, want = sample(logits, params, top=20), reference.sample(logits, params, top=20)
    assert (got[0] == want[0]).all() and (got[2] == want[2]).all()
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


@every_device
@pytest.mark.parametrize("V", [8191, 32_769, 262_144, 262_145])
def test_rows_of_any_length(V):
    """Up to 262,144 logits lie in the shared memory of a GPU's cluster, more do not."""
    logits = np.random.default_rng(V).standard_normal((2, V)).astype(np.float32) * 4
    logits[1, [0, V - 1]] = logits[1].max() + 1  # a tie of the first and the last
    for p in (Sampling(), Sampling(temperature=f32(0.9), seed=V)):
        got, want = sample(logits, [p, p], top=3), reference.sample(logits, [p, p], top=3)
        assert (got[0] == want[0]).all() and (got[2] == want[2]).all()
        np.testing.assert_allclose(got[1], want[1], rtol=1e-6, atol=1e-6)


# ---- by statistics ---------------------------------------------------------------------------


def chi_square(counts, p):
    return float(((counts - counts.sum() * p) ** 2 / (counts.sum() * p)).sum())


@every_device
@pytest.mark.parametrize(
    "temperature,top_k,top_p", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.75)]
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    """20,000 draws, one seed, positions in a row. With 29 degrees of freedom or fewer the
    statistic exceeds 70 once in 30,000 runs; the seed is fixed."""
    V, N = 30, 20_000
    z = np.random.default_rng(2).standard_normal(V).astype(np.float32)
    params = [Sampling(temperature, top_k, top_p, seed=11, position=i) for i in range(N)]
    ids, _ = sample(np.tile(z, (N, 1)), params)
    order = np.argsort(-z, kind="stable")
    p = np.exp(z[order].astype(float) / temperature)
    p /= p.sum()
    kept = top_k or int(np.searchsorted(np.cumsum(p), top_p) + 1)
    counts = np.bincount(ids, minlength=V)[order]
    assert counts[kept:].sum() == 0
    p = p[:kept] / p[:kept].sum()
    assert chi_square(counts[: len(p)], p) < 70
    # The test can fail: the draws do not follow a distribution a little warmer.
    warmer = p**0.9 / (p**0.9).sum()
    assert len(p) < 10 or chi_square(counts[: len(p)], warmer) > 70


@every_device
def test_seeds_and_positions_give_other_draws():
    z = np.zeros((400, 1000), np.float32)
    by_position = sample(z, [Sampling(1.0, seed=5, position=i) for i in range(400)])[0]
    by_seed = sample(z, [Sampling(1.0, seed=i, position=5) for i in range(400)])[0]
    assert len(set(by_position.tolist())) > 250 and len(set(by_seed.tolist())) > 250


# ---- edges -----------------------------------------------------------------------------------


@every_device
def test_cuts_that_leave_the_argmax():
    z = np.random.default_rng(3).standard_normal((50, 77)).astype(np.float32)
    for p in (Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-7), Sampling(2.0, min_p=1.0),
              Sampling(0.0, top_k=9), Sampling(1e-30)):  # fmt: skip
        ids, _ = sample(z, [p._replace(seed=i) for i in range(50)])
        assert (ids == z.argmax(axis=1)).all()


@every_device
def test_argmax_takes_the_lowest_id_of_a_tie():
    z = np.zeros((1, 100), np.float32)
    z[0, [40, 41, 99]] = 2
    assert sample(z, [Sampling()])[0].tolist() == [40]


@every_device
def test_min_p_of_one_keeps_the_ties_of_the_maximum():
    z = np.random.default_rng(4).standard_normal(60).astype(np.float32)
    z[[7, 30, 59]] = 5
    params = [Sampling(1.0, min_p=1.0, seed=i) for i in range(300)]
    ids, _ = sample(np.tile(z, (300, 1)), params)
    assert set(ids.tolist()) == {7, 30, 59}


@every_device
def test_penalty_moves_towards_less_likely():
    z = np.array([[2.0, 1.5, -1.0, -1.2]], np.float32)
    seen = bits_of([0, 2], 4)[None]
    p = Sampling(repetition_penalty=2.0)
    assert sample(z, [p], seen=seen)[0].tolist() == [1]  # 2 / 2 < 1.5
    below = np.array([[-9.0, -9.0, -1.0, -1.2]], np.float32)
    ids, logprobs = sample(below, [p], seen=seen)
    assert ids.tolist() == [3]  # -1 * 2 < -1.2
    want = -1.2 - np.log(np.exp(below[0].astype(float)).sum())
    np.testing.assert_allclose(logprobs, want, rtol=1e-6)  # of the logits as given


@every_device
def test_penalty_needs_seen():
    z = np.array([[2.0, 1.5]], np.float32)
    assert sample(z, [Sampling(repetition_penalty=9.0)])[0].tolist() == [0]


@every_device
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_have_no_answer(temperature):
    z = np.random.default_rng(5).standard_normal((5, 100)).astype(np.float32)
    z[1, 97] = np.nan
    z[2] = -np.inf
    z[3, 50] = np.inf  # its softmax is NaN
    ids, logprobs, top_ids, top_logprobs = sample(z, [Sampling(temperature)] * 5, top=3)
    assert (ids[1:4] == -1).all() and np.isnan(logprobs[1:4]).all()
    assert (top_ids[1:4] == -1).all() and np.isnan(top_logprobs[1:4]).all()
    assert (ids[[0, 4]] >= 0).all() and np.isfinite(logprobs[[0, 4]]).all()


@every_device
def test_masked_tokens_are_never_drawn():
    z = np.full((500, 64), -np.inf, np.float32)
    z[:, [3, 63]] = 1e4, 1e4 - 0.5
    ids, _ = sample(z, [Sampling(1.5, seed=i) for i in range(500)])
    assert set(ids.tolist()) == {3, 63}


@every_device
def test_best_alternatives():
    z = np.zeros((1, 10), np.float32)
    z[0, [2, 5]] = -np.inf, 3
    _, _, ids, logprobs = sample(z, [Sampling(1.0)], top=10)
    assert ids.tolist() == [[5, 0, 1, 3, 4, 6, 7, 8, 9, 2]]
    assert logprobs[0, -1] == -np.inf
    np.testing.assert_allclose(np.exp(logprobs.astype(float)).sum(), 1, rtol=1e-6)


def test_rows_and_threads_are_independent(device):
    r = np.random.default_rng(6)
    z = (3 * r.standard_normal((40, 3000))).astype(np.float32)
    params = random_params(r, 40)
    with on(device, threads=1):
        one = sample(z, params, top=3)
    for threads in (2, 7, 64):
        with on(device, threads=threads):
            other = sample(z, params, top=3)
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
    alone = sample(z[17:18], params[17:18], top=3)
    assert all((a[17] == b[0]).all() for a, b in zip(one, alone, strict=True))


@every_device
def test_no_rows():
    ids, logprobs = sample(np.zeros((0, 5), np.float32), [])
    assert ids.shape == logprobs.shape == (0,)
