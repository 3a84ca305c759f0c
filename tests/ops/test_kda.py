"""kda_prefill and kda_decode against the float64 recurrence, and their properties.

Outputs are full of NaN before each call, so that an element not written shows.
"""

import functools

import ml_dtypes
import numpy as np
import pytest
from kimi_linear import reference
from profiles import PROFILES, checkpoints, make_case
from variants import error, every_device, on, ops, same_bits, same_sums

BF16 = ml_dtypes.bfloat16
CHUNK = 16  # KL_KDA_CHUNK of csrc/backend/ops.h
BY_TOKEN = ("q", "k", "v", "g", "beta")
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 300)


def prefill(case, **changes):
    case = {**case, **changes}
    out = np.full(case["v"].shape, np.nan, case["v"].dtype)
    final = np.full(case["initial_state"].shape, np.nan, np.float32)
    got = ops.kda_prefill(**case, out=out, final_state=final)
    assert got[0] is out and got[1] is final
    return out, final


def decode(case, state, **changes):
    """One token for each row of the case; the state is updated in place."""
    case = {name: x for name, x in {**case, **changes}.items() if name != "initial_state"}
    return ops.kda_decode(
        **case, state=state, out=np.full(case["v"].shape, np.nan, case["v"].dtype)
    )


def tokens(case, start, stop, state=None):
    """The same call for a part of the tokens."""
    part = {**case, **{name: case[name][start:stop] for name in BY_TOKEN}}
    return part if state is None else {**part, "initial_state": state}


def both_match(got, want):
    return all(same_bits(g, w) for g, w in zip(got, want, strict=True))


def both_agree(got, want):
    return all(same_sums(g, w, 2e-6) for g, w in zip(got, want, strict=True) if w.size)


@functools.cache
def case_and_truth(profile, T, **sizes):
    case = make_case(profile, T, **sizes)
    return case, reference.kda_prefill(**case)


# ---- is it accurate ----------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_matches_the_recurrence(profile, variant):
    for T in LENGTHS:
        case, (want, want_state) = case_and_truth(profile, T)
        o, state = prefill(case)
        assert error(o, want) < 2e-6, T
        assert error(state, want_state) < 2e-6, T


@every_device
@pytest.mark.parametrize("profile", PROFILES)
def test_errors_do_not_pile_up(profile):
    case, (want, want_state) = case_and_truth(profile, 8192)
    o, state = prefill(case)
    assert error(o, want) < 1e-5
    assert error(state, want_state) < 1e-5
    if profile in ("slow", "constant", "decay alone"):  # a rounded decay a token: over 1e-4
        assert error(o[-100:], want[-100:]) < 1.5e-6
        assert error(state, want_state) < 1.5e-6


@every_device
def test_decoding_does_not_drift():
    case, (want, want_state) = case_and_truth("decay alone", 8192, H=1, K=16, V=8)
    state = case["initial_state"].copy()
    steps = [{n: case[n][t : t + 1].copy() for n in BY_TOKEN} for t in range(8192)]
    o = np.concatenate([decode({**case, **step}, state) for step in steps])
    assert error(o, want) < 1e-5  # with e^g rounded to float32 first: 1e-4
    assert error(state, want_state) < 1e-5


@pytest.mark.parametrize("K, V", [(1, 1), (256, 3), (3, 130), (33, 17), (128, 128)])
def test_any_size(variant, K, V):
    case, (want, want_state) = case_and_truth("slow", 35, H=1, K=K, V=V)
    o, state = prefill(case)
    assert error(o, want) < 1e-6
    assert error(state, want_state) < 1e-6
    at_once = decode(tokens(case, 0, 1), case["initial_state"].copy())
    assert error(at_once, want[:1]) < 1e-6


@pytest.mark.parametrize("dtype, K, V", [(np.float32, 16, 8), (BF16, 128, 32)])
def test_small_softplus_is_not_lost(variant, dtype, K, V):
    """e^-17 is below half an ulp of 1: log of 1 + e^-17 in float32 would never decay. Sixteen
    times it is 11.1 half ulps: decays rounded token by token would be a hundredth off."""
    T = 4096
    case = make_case("decay alone", T, H=1, K=K, V=V)
    for name in ("q", "k", "v", "beta"):
        case[name] = case[name].astype(dtype)
    raw = {"g": np.full((T, 1, K), -17, np.float32), "gate": "softplus",
           "A_log": np.full(1, np.log(16), np.float32)}  # fmt: skip
    _, state = prefill(case, **raw)
    lost = case["initial_state"] - state
    want = case["initial_state"] * -np.expm1(-T * 16 * np.log1p(np.exp(-17.0)))
    assert error(lost, want) < 3e-3  # itself a difference of float32 states


@pytest.mark.parametrize("gate", [
    {"gate": "softplus", "A_log": 2, "dt_bias": True}, {"gate": "softplus", "A_log": 2},
    {"gate": "bounded", "A_log": 1, "dt_bias": True, "lower_bound": -3.0}, {"gate": "bounded"},
])  # fmt: skip
def test_gates_over_a_wide_range(variant, gate):
    T, H, K = 50, 2, 33
    r = np.random.default_rng(0)
    case = make_case("none", T, H=H, K=K, V=17)
    case["g"] = np.linspace(-95, 95, T * H * K, dtype=np.float32).reshape(T, H, K)
    gate = dict(gate)
    if "A_log" in gate:
        gate["A_log"] = (gate["A_log"] * r.random(H)).astype(np.float32)
    if "dt_bias" in gate:
        gate["dt_bias"] = r.standard_normal((H, K)).astype(np.float32)
    want, want_state = reference.kda_prefill(**{**case, **gate})
    o, state = prefill(case, **gate)
    assert error(o, want) < 1e-6
    assert error(state, want_state) < 1e-6


def test_decay_beyond_float32_ends_in_zero(variant):
    case = make_case("none", 40)
    case["g"][:] = -1e4
    case["beta"][:-1] = 0
    want, want_state = reference.kda_prefill(**case)
    o, state = prefill(case)
    assert not o[:-1].any()  # nothing held, nothing written
    assert error(o[-1], want[-1]) < 1e-6
    assert error(state, want_state) < 1e-6


@pytest.mark.parametrize("T", [1, 40])
def test_normalised_grouped_heads_and_beta_logits(variant, T):
    case = make_case("bounded", T, H=6, Hk=2, K=33, V=17)
    case["q"] *= 7
    case["k"] *= 0.01  # where the epsilon counts
    case["beta"] = 40 * case["beta"] - 20
    options = {"normalize": True, "beta_logits": True, "scale": 0.7}
    want, want_state = reference.kda_prefill(**case, **options)
    o, state = prefill(case, **options)
    assert error(o, want) < 1e-6
    assert error(state, want_state) < 1e-6


@pytest.mark.parametrize("gates", [np.float32, BF16])
def test_bfloat16(variant, gates):
    case = make_case("init", 40, H=4, Hk=2, K=20, V=70)
    for name in BY_TOKEN:
        case[name] = case[name].astype(gates if name in ("g", "beta") else BF16)
    exact = {n: x.astype(np.float64) if n in BY_TOKEN else x for n, x in case.items()}
    want, want_state = reference.kda_prefill(**exact)
    o, state = prefill(case)
    if variant == "cuda":  # which may multiply what it has rounded to bf16
        assert error(o, want) < 5e-3 and error(state, want_state) < 5e-3
        return
    assert error(state, want_state) < 1e-6
    # Rounded once, where it is stored: half an ulp, and an ulp where the two straddle a tie.
    assert np.all(np.abs(o.astype(np.float64) - want) <= np.abs(want) * 2**-8 * 1.01 + 1e-6)
    assert error(o, want) < 2.5e-3


# The errors of flash-linear-attention 0.6.0 on an H100 in the setting of the test below: relative
# RMS of output and final state, known to two digits after the point of a percentage.
PEERS = {"init": (4.2e-3, 3.6e-3), "bounded": (3.3e-3, 2.3e-3), "mixed": (4.5e-3, 3.7e-3),
         "slow": (5.0e-3, 4.3e-3), "strong": (2.9e-3, 1.6e-3)}  # fmt: skip


@every_device
@pytest.mark.parametrize("profile", PEERS)
def test_bfloat16_is_no_further_off_than_others(profile):
    case = make_case(profile, 1024, H=8, K=128, V=128)
    case["initial_state"][:] = 0
    for name in ("q", "k", "v", "beta"):
        case[name] = case[name].astype(BF16)
    exact = {n: x.astype(np.float64) if n in BY_TOKEN else x for n, x in case.items()}
    for got, want, peer in zip(prefill(case), reference.kda_prefill(**exact), PEERS[profile]):
        assert error(got, want) < peer + 5e-5


# ---- is it the same ----------------------------------------------------------------------


def test_threads_and_repetition_change_no_bit(variant):
    case = make_case("init", 70, H=3, K=20, V=150)
    with on(variant, threads=1):
        want = prefill(case)
        assert both_match(prefill(case), want)
    for threads in (2, 7):  # more than there are heads: V is split
        with on(variant, threads=threads):
            assert both_match(prefill(case), want), threads


@pytest.mark.parametrize("profile", ["init", "strong", "near keys"])
def test_cut_anywhere(profile, variant):
    T = 100
    case, (want, want_state) = case_and_truth(profile, T, H=4, Hk=2, K=20, V=70)
    whole = prefill(case)
    for cut in (1, 7, CHUNK, 3 * CHUNK, 65, 6 * CHUNK, T - 1):
        first, middle = prefill(tokens(case, 0, cut))
        second, final = prefill(tokens(case, cut, T, middle))
        o = np.concatenate([first, second])
        if cut % CHUNK == 0:
            assert both_agree((o, final), whole), cut
        assert error(o, want) < 2e-6, cut
        assert error(final, want_state) < 2e-6, cut


def test_decode_is_prefill_of_one_token(variant):
    case = make_case("init", 97, H=4, Hk=2, K=20, V=70)
    whole = prefill(case)
    before, state = prefill(tokens(case, 0, 96))
    last = decode(tokens(case, 96, 97), state)
    assert both_agree((np.concatenate([before, last]), state), whole)

    state = case["initial_state"].copy()
    o = np.concatenate([decode(tokens(case, t, t + 1), state) for t in range(97)])
    assert error(o, whole[0]) < 1e-6
    assert error(state, whole[1]) < 1e-6


def test_a_sequence_in_a_batch_is_itself(variant):
    lengths = [0, 1, 33, 0, 16, 1, 17, 15, 2, 0]
    cu = np.cumsum([0, *lengths])
    case = make_case("init", cu[-1], H=4, Hk=2, K=20, V=70, N=len(lengths))
    want, want_state = reference.kda_prefill(**case, cu_seqlens=cu)
    o, states = prefill(case, cu_seqlens=cu)
    assert error(o, want) < 1e-6
    assert error(states, want_state) < 1e-6
    for n, (start, stop) in enumerate(zip(cu, cu[1:], strict=False)):
        alone = prefill(tokens(case, start, stop, case["initial_state"][n : n + 1]))
        assert both_agree(alone, (o[start:stop], states[n : n + 1])), n


def test_decode_keeps_to_its_slots(variant):
    N, S = 5, 9
    case = make_case("init", N, H=3, K=20, V=37, N=S)
    slots = np.array([7, 0, 3, 8, 2], np.int32)
    pool = case["initial_state"].copy()
    unused = np.setdiff1d(np.arange(S), slots)
    pool[unused] = np.nan
    o = decode(case, pool, slots=slots)
    for n, slot in enumerate(slots):
        own = case["initial_state"][slot : slot + 1].copy()
        alone = decode(tokens(case, n, n + 1), own)
        assert both_match((alone, own), (o[n : n + 1], pool[slot : slot + 1])), n
    assert np.isnan(pool[unused]).all()
    want = reference.kda_decode(
        **{n: x for n, x in case.items() if n != "initial_state"},
        state=case["initial_state"].astype(np.float64), slots=slots,
    )  # fmt: skip
    assert error(o, want) < 1e-6


@pytest.mark.parametrize("name", BY_TOKEN)
def test_nan_reaches_only_later_tokens_of_its_head(variant, name):
    cu = np.array([0, 20, 60, 61, 80])
    case = make_case("bounded", 80, H=4, Hk=2, K=20, V=37, N=4)
    o, states = prefill(case, cu_seqlens=cu)
    for t, n in ((41, 1), (60, 2)):  # inside a chunk, and alone
        poisoned = {**case, name: case[name].copy()}
        poisoned[name][t, 1] = np.nan
        heads = slice(2, 4) if name in ("q", "k") else slice(1, 2)
        reached = np.zeros(o.shape, bool)
        reached[t : cu[n + 1], heads] = True
        bad_o, bad_states = prefill(poisoned, cu_seqlens=cu)
        assert same_bits(bad_o[~reached], o[~reached])
        assert np.isnan(bad_o[t, heads]).all()
        reached = np.zeros(states.shape, bool)
        reached[n, heads] = name != "q"  # a query writes nothing
        assert same_bits(bad_states[~reached], states[~reached])
        assert np.isnan(bad_states[reached]).all()


# ---- does it take what it says -----------------------------------------------------------


@every_device
def test_a_transposed_state_is_refused():
    case = make_case("init", 5)
    case["initial_state"] = case["initial_state"].swapaxes(2, 3).copy()
    with pytest.raises(ValueError, match="initial_state"):
        ops.kda_prefill(**case)
    with pytest.raises(ValueError, match="must be"):
        decode(tokens(case, 0, 1), case["initial_state"])


@every_device
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_rows_of_one_wide_product(dtype):
    """q, k and v as slices of one matrix, as a model has them."""
    T, H, K, V = 40, 3, 20, 37
    dense = make_case("init", T, H=H, K=K, V=V)
    for name in ("q", "k", "v"):
        dense[name] = dense[name].astype(dtype)
    wide = np.full((T, H * (2 * K + V) + 5), np.nan, dtype)
    case, at = dict(dense), 3
    for name in ("q", "k", "v"):
        flat = dense[name].reshape(T, -1)
        view = wide[:, at : at + flat.shape[1]]
        view[:] = flat
        case[name] = np.lib.stride_tricks.as_strided(
            view, dense[name].shape, (wide.strides[0], *dense[name].strides[1:])
        )
        at += flat.shape[1]
    assert both_match(prefill(case), prefill(dense))
    first, want = (tokens(c, 0, 1) for c in (case, dense))
    a, b = case["initial_state"].copy(), case["initial_state"].copy()
    assert both_match((decode(first, a), a), (decode(want, b), b))


@every_device
def test_state_in_place_and_from_nothing():
    case = make_case("init", 40)
    o, final = prefill(case)
    state = case["initial_state"].copy()
    in_place, same = ops.kda_prefill(**{**case, "initial_state": state}, final_state=state)
    assert same is state
    assert both_match((in_place, state), (o, final))
    del case["initial_state"]
    want, want_state = reference.kda_prefill(**case)
    o, final = ops.kda_prefill(**case)
    assert error(o, want) < 1e-6
    assert error(final, want_state) < 1e-6


@every_device
def test_no_tokens():
    case = tokens(make_case("init", 3, N=2), 0, 0)
    o, final = prefill(case, cu_seqlens=np.zeros(3, np.int32))
    assert o.shape == (0, 2, 40)
    assert same_bits(final, case["initial_state"])


@every_device
@pytest.mark.parametrize("E", [64, 128])
def test_checkpoints_are_what_shorter_calls_end_with(E):
    cu = np.array([0, 63, 300, 300, 428, 429, 621], np.int32)  # two sequences end at a multiple
    case = make_case("init", cu[-1], H=4, Hk=2, K=20, V=70, N=6)
    given = np.full((cu[-1] // E, 4, 70, 20), np.nan, np.float32)
    o, final, kept = ops.kda_prefill(**case, cu_seqlens=cu, checkpoint_every=E, checkpoints=given)
    assert kept is given
    assert both_match((o, final), prefill(case, cu_seqlens=cu))
    wanted = reference.kda_prefill(**case, cu_seqlens=cu, checkpoint_every=E)[2]
    left_alone = np.ones(len(given), bool)
    for n, start, end, row in checkpoints(cu, E):
        cut = tokens(case, start, end, case["initial_state"][n : n + 1])
        assert same_sums(given[row], prefill(cut)[1][0], 2e-6), (n, end)
        assert error(given[row], wanted[row]) < 2e-6
        left_alone[row] = False
    assert np.isnan(given[left_alone]).all() and not wanted[left_alone].any()
    assert left_alone.any() and not left_alone.all()
    new = ops.kda_prefill(**case, cu_seqlens=cu, checkpoint_every=E)[2]
    assert same_bits(new, np.where(left_alone[:, None, None, None], np.float32(0), given))


@every_device
def test_checkpoints_are_refused_where_they_cannot_be():
    case = make_case("init", 130)
    with pytest.raises(ValueError, match="checkpoint_every must be a multiple of 64, got 96"):
        ops.kda_prefill(**case, checkpoint_every=96)
    with pytest.raises(TypeError, match="checkpoint_every"):
        ops.kda_prefill(**case, checkpoints=np.empty((2, 2, 40, 48), np.float32))
    with pytest.raises(ValueError, match="checkpoints must have shape"):
        ops.kda_prefill(**case, checkpoint_every=64, checkpoints=np.empty((3, 2, 40, 48), np.float32))
