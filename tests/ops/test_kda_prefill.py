"""kda_prefill in bf16 with 128 key channels, which CUDA computes in chunks: every tail of a chunk,
every kind of batch, every gate at its ends, and memory that belongs to nobody.

tests/ops/test_kda.py asks the same of float32 and of odd sizes, closer to the truth.
"""

import functools

import ml_dtypes
import numpy as np
import pytest
from kimi_linear import reference
from profiles import PROFILES, PUBLISHED, checkpoints, make_case
from variants import error, every_device, ops, same_bits

BF16 = ml_dtypes.bfloat16
K = 128
BY_TOKEN = ("q", "k", "v", "g", "beta")
# Of rounding the output once: half a unit of bf16. CUDA may round operands to bf16, too; 5e-3 is
# what peers ask of their own kernels in their tests.
BOUND = {"cpu": (2.5e-3, 1e-6), "cuda": (5e-3, 5e-3)}
# A chunk is 16 tokens on the CPU and 32 or 64 on CUDA: lengths around the borders of both.
BORDERS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129)

pytestmark = every_device


def rounded(case, gates=np.float32):
    """The case with its activations in bf16, g in `gates`."""
    types = dict.fromkeys(("q", "k", "v", "beta"), BF16) | {"g": gates}
    return case | {name: case[name].astype(dtype) for name, dtype in types.items()}


def exact(case):
    return {n: x.astype(np.float64) if n in BY_TOKEN else x for n, x in case.items()}


def make(profile, T, *, gates=np.float32, **sizes):
    return rounded(make_case(profile, T, **{"H": 2, "K": K, "V": 32} | sizes), gates)


@functools.cache
def case_and_truth(profile, T, cu=None, gates=np.float32, **sizes):
    case = make(profile, T, gates=gates, **sizes)
    if cu is not None:
        case["cu_seqlens"] = np.array(cu, np.int32)
    return case, reference.kda_prefill(**exact(case))


def prefill(case, **changes):
    case = case | changes
    out = np.full(case["v"].shape, np.nan, BF16)
    N = len(case.get("cu_seqlens", (0, 0))) - 1
    final = np.full((N, *case["v"].shape[1:], K), np.nan, np.float32)
    ops.kda_prefill(**case, out=out, final_state=final)
    return out, final


def off(got, want):
    """Errors of output and state; NaN where anything is not finite."""
    return tuple(error(g, w) if w.size else 0.0 for g, w in zip(got, want, strict=True))


def close(got, want):
    bounds = BOUND[ops.device]
    return all(e < bound for e, bound in zip(off(got, want), bounds, strict=True))


def both_match(got, want):
    return all(same_bits(g, w) for g, w in zip(got, want, strict=True))


def part(case, start, stop, n=None, state=None):
    """The call for some tokens, from state n of the case or from `state`."""
    cut = {name: case[name][start:stop] for name in BY_TOKEN}
    rest = {name: x for name, x in case.items() if name != "cu_seqlens"}
    if n is not None:
        state = case["initial_state"][n : n + 1]
    return rest | cut | ({} if state is None else {"initial_state": state})


# ---- lengths and batches ---------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["init", "slow", "strong"])
def test_every_tail(profile):
    """1 to 70 tokens, then around more borders: each as good as the whole, and itself alone."""
    lengths = [*range(1, 71), *(n for n in BORDERS if n > 70)]
    cu = (0, *np.cumsum(lengths).tolist())
    case, want = case_and_truth(profile, cu[-1], cu, H=1, N=len(lengths))
    o, states = prefill(case)
    assert close((o, states), want)
    for n, (start, stop) in enumerate(zip(cu, cu[1:], strict=False)):
        own = o[start:stop], states[n : n + 1]
        assert close(own, (want[0][start:stop], want[1][n : n + 1])), lengths[n]
        assert both_match(prefill(part(case, start, stop, n)), own), lengths[n]


@pytest.mark.parametrize("N", [1, 2, 5, 300])
def test_ragged_batches_with_empty_sequences(N):
    r = np.random.default_rng(N)
    lengths = r.integers(1, 14, N) if N > 5 else r.integers(1, 150, N)
    lengths[r.random(N) < 0.3] = 0
    lengths[-1] = 0 if N > 1 else 77
    cu = (0, *np.cumsum(lengths).tolist())
    case, want = case_and_truth("init", cu[-1], cu, H=2, N=N)
    got = prefill(case)
    assert close(got, want)
    empty = lengths == 0
    assert same_bits(got[1][empty], case["initial_state"][empty])


@pytest.mark.parametrize("profile", ["init", "slow"])
def test_cut_at_borders_of_chunks(profile):
    T = 200
    case, want = case_and_truth(profile, T)
    whole = prefill(case)
    for cut in (64, 128, 192):
        first, middle = prefill(part(case, 0, cut))
        second, final = prefill(part(case, cut, T, state=middle))
        pieces = np.concatenate([first, second]), final
        if ops.device == "cpu":
            assert both_match(pieces, whole), cut
        # On CUDA segments of a long sequence may be combined in another order: what a float32
        # rounding of the state makes of bf16 roundings after it.
        assert max(off(pieces, whole)) < 1e-3, cut
        assert close(pieces, want), cut


@pytest.mark.parametrize("profile", ["init", "slow"])
def test_long_sequences_of_few_heads(profile):
    """Too little to fill a GPU side by side, where the parts of a sequence may be."""
    cu = (0, 4161, 4228, 9345)  # one with a last token of its own
    case, want = case_and_truth(profile, cu[-1], cu, H=1, N=3)
    got = prefill(case)
    assert close(got, want)
    assert both_match(prefill(case), got)


def test_the_same_call_twice():
    cu = (0, 70, 70, 199, 231)
    case, _ = case_and_truth("init", cu[-1], cu, H=4, V=128, N=4)
    assert both_match(prefill(case), prefill(case))


# ---- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 3, 4])
def test_value_heads_share_key_heads(group):
    case, want = case_and_truth("init", 97, H=2 * group, Hk=2, V=64)
    assert close(prefill(case), want)


@pytest.mark.parametrize("V", [1, 16, 32, 40, 64, 96, 128, 160, 256])
def test_value_channels(V):
    case, want = case_and_truth("mixed", 97, V=V)
    assert close(prefill(case), want)


@pytest.mark.parametrize("keys", [64, 100, 256])
def test_other_key_channels(keys):
    case = rounded(make_case("init", 97, H=2, K=keys, V=64))
    want = reference.kda_prefill(**exact(case))
    out = np.full(case["v"].shape, np.nan, BF16)
    final = np.full(case["initial_state"].shape, np.nan, np.float32)
    assert close(ops.kda_prefill(**case, out=out, final_state=final), want)


# ---- gates and steps -------------------------------------------------------------------------


@pytest.mark.parametrize("gates", [np.float32, BF16])
@pytest.mark.parametrize("profile", PROFILES)
def test_profiles(profile, gates):
    case, want = case_and_truth(profile, 150, gates=gates)
    assert close(prefill(case), want)


def test_what_strong_decay_leaves_of_the_output():
    """It is (q_i k_i) u_i: bf16 for u and the output makes 2.4e-3, for q_i k_i as well 2.9e-3."""
    case, want = case_and_truth("strong", 512, H=4, V=64)
    assert off(prefill(case), want)[0] < 2.6e-3


def test_one_key_with_steps_to_two():
    """What a token writes the next may turn into its negative: terms of the inverse cancel."""
    case = make_case("none", 150, H=2, K=K, V=32)
    case["k"][:] = case["k"][0]
    case["beta"] = 2 * np.random.default_rng(1).random(case["beta"].shape, np.float32)
    case = rounded(case)
    # Of length one at most: bf16 makes some keys longer, and then reflections grow.
    case["k"] = (case["k"].astype(np.float32) * 0.99).astype(BF16)
    assert close(prefill(case), reference.kda_prefill(**exact(case)))


GATES = [
    {"gate": "softplus", "A_log": True, "dt_bias": True}, {"gate": "softplus", "A_log": True},
    {"gate": "bounded", "A_log": True, "dt_bias": True, "lower_bound": -4.0},
    {"gate": "bounded", "lower_bound": -0.01},
]  # fmt: skip


@pytest.mark.parametrize("gates", [np.float32, BF16])
@pytest.mark.parametrize("gate", GATES)
def test_gates_norms_and_logits(gate, gates):
    T, H = 97, 2
    r = np.random.default_rng(3)
    case = make_case("none", T, H=H, K=K, V=32)
    case["g"] = (4 * r.standard_normal((T, H, K))).astype(np.float32)
    case["q"] *= 7
    case["k"] *= 0.01  # where the epsilon of the norm counts
    case["beta"] = (3 * r.standard_normal((T, H))).astype(np.float32)
    arrays = {"A_log": 2 * r.random(H), "dt_bias": r.standard_normal((H, K))}
    options = {n: arrays[n].astype(np.float32) if x is True else x for n, x in gate.items()}
    options |= {"normalize": True, "beta_logits": True, "scale": 0.7}
    case = rounded(case, gates) | options
    assert close(prefill(case), reference.kda_prefill(**exact(case)))


HUGE = 3e38  # two of them add up to infinity
ENDS = {
    "direct": ((0.0, -1e-30, -1e-4, -1.0, -87.0, -104.0, -1e30, -HUGE), {}),
    "softplus": ((-HUGE, -1e4, -88.0, 0.0, 30.0, 1e4, HUGE), {"A_log": 5.0}),
    "bounded": (
        (-HUGE, -1e4, -88.0, 0.0, 88.0, 1e4, HUGE),
        {"A_log": 5.0, "lower_bound": -1e30},
    ),
}


@pytest.mark.parametrize("T", [40, 150])
@pytest.mark.parametrize("gate", ENDS)
def test_gates_at_their_ends(gate, T):
    """No finite input makes a NaN: keep all and forget all, beside each other."""
    r = np.random.default_rng(5)
    case = make_case("none", T, H=4, K=K, V=32)
    values, options = ENDS[gate]
    g = r.choice(np.array(values, np.float32), (T, 4, K))
    g[:, 1] = values[0]
    g[:, 2] = values[-1]
    g[:, 3] = np.where(np.arange(T) % 33 == 32, values[-1], values[0])[:, None]
    case["g"] = g
    if "A_log" in options:
        options = options | {"A_log": np.full(4, options["A_log"], np.float32)}
    case = rounded(case) | {"gate": gate} | options
    with np.errstate(over="ignore"):
        want = reference.kda_prefill(**exact(case))
    assert close(prefill(case), want)


def test_nothing_to_normalise_and_steps_at_their_ends():
    case = make_case("init", 97, H=2, K=K, V=32)
    case["q"][3:40] = 0
    case["k"][20:70] = 0
    case["v"][50:60] = 0
    case["beta"] = np.random.default_rng(0).choice([-HUGE, -1e4, 0, 1e4, HUGE], (97, 2))
    case = rounded(case) | {"normalize": True, "beta_logits": True}
    assert close(prefill(case), reference.kda_prefill(**exact(case)))


@pytest.mark.parametrize("profile", ["init", "mixed"])
def test_rows_of_any_length(profile):
    """Come to length 1: of lengths that a chunk works with, and beside others that it cannot."""
    T, H = 170, 2
    r = np.random.default_rng(11)
    case = make_case(profile, T, H=H, K=K, V=32)
    reach = np.where(np.arange(T) // 40 % 2, 12, 2)[:, None, None]
    for name in "qk":
        case[name] = case[name] * 10.0 ** (reach * r.uniform(-1, 1, (T, H, 1)))
    case = rounded(case) | {"normalize": True}
    assert close(prefill(case), reference.kda_prefill(**exact(case)))


@pytest.mark.parametrize("profile", ["init", "slow", "strong"])
@pytest.mark.parametrize("T, H", [(40, 4), (193, 4), (3300, 1)])  # the last in segments on CUDA
def test_values_and_states_of_any_size(profile, T, H):
    """Output and state are linear in both, and a power of two changes no digit."""
    case = make(profile, T, H=H)
    o, final = prefill(case)
    for power in (60, 100, 124):

        def times(x, scale=np.float32(2.0**power)):
            return (x.astype(np.float32) * scale).astype(x.dtype)

        big = case | {name: times(case[name]) for name in ("v", "initial_state")}
        assert both_match(prefill(big), (times(o), times(final))), power


def test_large_values_of_short_keys():
    """Lengths may be divided out last: what is kept until then is a length's inverse larger."""
    case, _ = case_and_truth("init", 150)
    case = case | {"v": (case["v"].astype(np.float32) * 1e30).astype(BF16), "normalize": True}
    case["k"] = (case["k"].astype(np.float32) * 1e-2).astype(BF16)
    assert close(prefill(case), reference.kda_prefill(**exact(case)))


@pytest.mark.parametrize("T, H", [(40, 2), (193, 2), (3300, 1)])
def test_the_largest_values_and_states(T, H):
    """3e38 once in a channel, in v or in the state, is a number like others. In channels where sums
    leave float32 what is finite is right, and no other channel sees it."""
    case = make("slow", T, H=H)
    o, final = prefill(case)
    r = np.random.default_rng(2)
    v, state = case["v"].copy(), case["initial_state"].copy()
    v[:, :, :16], state[:, :, :16] = 0, 0
    for c in range(8):
        v[r.integers(T), :, c] = HUGE * (-1) ** c
        state[0, :, 8 + c, r.integers(K)] = HUGE * (-1) ** c
    v[:, :, 16:24] = HUGE * r.choice([-1, 1], (T, H, 8))
    state[:, :, 16:24] = HUGE
    huge = case | {"v": v, "initial_state": state}
    got, want = prefill(huge), reference.kda_prefill(**exact(huge))
    assert close((got[0][..., :16], got[1][:, :, :16]), (want[0][..., :16], want[1][:, :, :16]))
    assert both_match((got[0][..., 24:], got[1][:, :, 24:]), (o[..., 24:], final[:, :, 24:]))
    lost = got[0][..., 16:24].astype(np.float64), want[0][..., 16:24]
    assert not np.isfinite(lost[0]).all()
    assert (np.abs(lost[0] - lost[1])[np.isfinite(lost[0])] < 5e-3 * np.abs(lost[1]).max()).all()


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [64, 192])
def test_checkpoints_are_what_shorter_calls_end_with(every):
    """To the bit also on CUDA, where no sequence here is so long that it has segments."""
    cu = (0, 63, 300, 300, 428, 429, 1069, 1262)
    case, _ = case_and_truth("init", cu[-1], cu, H=2, V=64, N=len(cu) - 1)
    given = np.full((cu[-1] // every, 2, 64, K), np.nan, np.float32)
    o, final, kept = ops.kda_prefill(**case, checkpoint_every=every, checkpoints=given)
    assert kept is given and both_match((o, final), prefill(case))
    written = set()
    for n, start, end, row in checkpoints(cu, every):
        cut = part(case, start, end, n)
        assert same_bits(given[row], prefill(cut)[1][0]), (n, end)
        assert error(given[row], reference.kda_prefill(**exact(cut))[1][0]) < BOUND[ops.device][1]
        written.add(row)
    others = np.delete(given, list(written), 0)
    assert len(others) and np.isnan(others).all()


@pytest.mark.parametrize("T, H", [(97, 3), (3300, 1)])
@pytest.mark.parametrize("name", BY_TOKEN)
def test_rows_far_apart(name, T, H):
    """Every second row of a wider array, NaN between them. (beta is in no piece of 16 bytes.)"""
    case = make("init", T, H=H)
    x = case[name]
    wide = np.full((2 * T, 2 * H, *x.shape[2:]), np.nan, x.dtype)
    wide[::2, :H] = x
    assert both_match(prefill(case | {name: wide[::2, :H]}), prefill(case))


def test_states_in_place_and_from_nothing():
    cu = np.array([0, 70, 71, 71, 150], np.int32)
    case = make("init", 150, N=4) | {"cu_seqlens": cu}
    o, final = prefill(case)
    state = case["initial_state"].copy()
    in_place, same = ops.kda_prefill(**case | {"initial_state": state}, final_state=state)
    assert same is state and both_match((in_place, state), (o, final))
    zeros = prefill(case, initial_state=np.zeros_like(state))
    del case["initial_state"]
    assert both_match(prefill(case), zeros)


def within(x, rows=70, fill=np.nan):
    """x as the middle of memory full of NaN: (the view, all of it)."""
    memory = np.full((rows + len(x) + rows, *x.shape[1:]), fill, x.dtype)
    memory[rows : rows + len(x)] = x
    return memory[rows : rows + len(x)], memory


@pytest.mark.parametrize("T", [1, 31, 33, 64, 65, 150])
def test_memory_around_the_arrays(T):
    """Tokens before the first and after the last are NaN and stay what they are."""
    cu = np.array([0, T // 3, T], np.int32)
    case = make("init", T, H=2, N=2) | {"cu_seqlens": cu}
    want = prefill(case)
    around = {name: within(case[name]) for name in BY_TOKEN}
    out, out_memory = within(np.full(case["v"].shape, np.nan, BF16))
    final, final_memory = within(np.full_like(case["initial_state"], np.nan), 2)
    ops.kda_prefill(
        **case | {name: view for name, (view, _) in around.items()}, out=out, final_state=final
    )
    assert both_match((out, final), want)
    for memory, rows in ((out_memory, 70), (final_memory, 2)):
        assert np.isnan(memory[:rows].astype(np.float32)).all()
        assert np.isnan(memory[-rows:].astype(np.float32)).all()


@pytest.mark.parametrize("name", [*BY_TOKEN, "initial_state"])
def test_a_sequence_of_nan_beside_others(name):
    cu = np.array([0, 33, 70, 71, 140], np.int32)
    case = make("bounded", 140, N=4) | {"cu_seqlens": cu}
    o, states = prefill(case)
    for n in range(4):
        bad = case | {name: case[name].copy()}
        bad[name][n if name == "initial_state" else slice(cu[n], cu[n + 1])] = np.nan
        bad_o, bad_states = prefill(bad)
        others = np.ones(140, bool)
        others[cu[n] : cu[n + 1]] = False
        assert same_bits(bad_o[others], o[others])
        assert same_bits(np.delete(bad_states, n, 0), np.delete(states, n, 0))
        assert np.isnan(bad_o[~others].astype(np.float32)).all()


@pytest.mark.parametrize("at, after", [(8, 16), (0, 8), (0, 6), (3, 5)])
def test_rows_of_one_wide_product(at, after):
    """q, k and v as slices of one matrix, in rows of 16-byte pieces and not, NaN between them."""
    T, H, V = 97, 3, 32
    case, want = case_and_truth("init", T, H=H, V=V)
    dense, strided = prefill(case), dict(case)
    wide = np.full((T, at + H * (2 * K + V) + after), np.nan, BF16)
    in_pieces = at % 8 == 0 and wide.shape[1] % 8 == 0
    for name in ("q", "k", "v"):
        flat = case[name].reshape(T, -1)
        view = wide[:, at : at + flat.shape[1]]
        view[:] = flat
        strided[name] = np.lib.stride_tricks.as_strided(
            view, case[name].shape, (wide.strides[0], *case[name].strides[1:])
        )
        at += flat.shape[1]
    got = prefill(strided)
    assert close(got, want)
    if ops.device == "cpu" or in_pieces:  # else another kernel, whose sums have another order
        assert both_match(got, dense)


# ---- as good as others -----------------------------------------------------------------------


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_cases(published):
    """All with 128 channels; benchmarks/kda_cuda.py has them with their own, too."""
    _, H, _, scale, divisor, left_out = published
    r = np.random.default_rng(42)
    cu = np.array(published.cu, np.int32)
    T = int(cu[-1])
    case = make_case("none", T, H=H, K=K, V=128, N=len(cu) - 1)
    g = -np.logaddexp(0, -r.standard_normal((T, H, K))) / divisor
    case["g"] = np.where(r.random(g.shape) > left_out, g, 0).astype(np.float32)
    case["v"] = r.random(case["v"].shape, np.float32)
    case = rounded(case) | {"cu_seqlens": cu, "scale": scale or K**-0.5}
    assert close(prefill(case), reference.kda_prefill(**exact(case)))
