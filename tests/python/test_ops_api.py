"""kl.ops as a user meets it: every operation against the reference, in the caller's own kind of
array, with outputs of the caller's; and wrong arguments, each refused with its name."""

import inspect
import sys

import numpy as np
import pytest

from kimi_linear import DeviceError, NumericalError, _backends, _core, ops, reference

torch = pytest.importorskip("torch")
bf16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)

rng = np.random.default_rng(5)
T, H, K, V, W, RANK, ROPE, NOPE, E, D, I, P = 23, 4, 8, 12, 4, 16, 4, 8, 6, 10, 7, 5
CU = np.array([0, 7, 7, 8, T])
N = 4


def f32(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.isfinite(got).all()
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


KDA = dict(q=unit(f32(T, H, K)), k=unit(f32(T, H, K)), v=f32(T, H, V),
           g=-np.abs(f32(T, H, K)), beta=sigmoid(f32(T, H)))  # fmt: skip
MLA = dict(q=f32(T, H, NOPE + ROPE), latent=f32(T, RANK + ROPE), w_kv_b=f32(H, NOPE + V, RANK))
PAST = [f32(70, RANK + ROPE), f32(1, RANK + ROPE), f32(64, RANK + ROPE), f32(3, RANK + ROPE)]
DECODE_MLA = dict(
    q=f32(3, H, NOPE + ROPE), pages=f32(P, 64, RANK + ROPE),
    block_table=np.array([[4, 1, -9], [2, 2**30, -1], [0, 3, 1]]),
    lengths=np.array([65, 64, 130]), w_kv_b=MLA["w_kv_b"],
)  # fmt: skip
EXPERTS = dict(
    x=f32(T, D), ids=rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :3],
    weights=f32(T, 3), w1=f32(E, I, D), w3=f32(E, I, D), w2=f32(E, D, I),
)  # fmt: skip

# name of the case -> (operation, arguments, options)
CASES = {
    "kda_prefill": ("kda_prefill", KDA, {}),
    "kda_prefill, all options": ("kda_prefill", KDA, dict(
        scale=0.7, cu_seqlens=CU, initial_state=f32(N, H, V, K), gate="softplus",
        A_log=f32(H), dt_bias=f32(H, K), normalize=True, beta_logits=True)),
    "kda_prefill, bounded": ("kda_prefill", KDA, dict(
        gate="bounded", lower_bound=-3.0, A_log=f32(H), dt_bias=f32(H, K))),
    "kda_prefill, grouped heads": ("kda_prefill", KDA | {
        "q": KDA["q"][:, :2], "k": KDA["k"][:, :2]}, {}),
    "kda_decode": ("kda_decode", {n: a[:3] for n, a in KDA.items()} | {
        "state": f32(6, H, V, K)}, dict(slots=np.array([5, 0, 2]))),
    "short_conv": ("short_conv", dict(x=f32(T, D), weight=f32(D, W)), {}),
    "short_conv, all options": ("short_conv", dict(x=f32(T, D), weight=f32(D, W)), dict(
        state=f32(N, D, W - 1), cu_seqlens=CU, activation=None)),
    "gated_rms_norm": ("gated_rms_norm", dict(
        x=f32(3, H, V), z=f32(3, H, V), weight=f32(V)), {}),
    "rms_norm": ("rms_norm", dict(x=f32(3, 2, V), weight=f32(V)), dict(eps=1e-3)),
    "rms_norm, residual": ("rms_norm", dict(x=f32(6, V), weight=f32(V)), dict(
        eps=1e-3, residual=f32(6, V))),
    "mla_prefill": ("mla_prefill", MLA, {}),
    "mla_prefill, all options": ("mla_prefill", MLA, dict(cu_seqlens=CU, past=PAST, scale=0.3)),
    "mla_prefill, one past": ("mla_prefill", MLA, dict(past=PAST[0])),
    "mla_decode": ("mla_decode", DECODE_MLA, dict(scale=0.2)),
    "moe_route": ("moe_route", dict(logits=f32(T, E), bias=f32(E)), dict(top_k=3, scaling=2.5)),
    "moe_route, all options": ("moe_route", dict(logits=f32(T, E), bias=f32(E)), dict(
        top_k=2, scaling=0.5, renormalize=False, score="softmax", groups=3, top_groups=2)),
    "moe_experts": ("moe_experts", EXPERTS, {}),
    "moe_experts, shared": ("moe_experts", EXPERTS, dict(
        shared=(f32(9, D), f32(9, D), f32(D, 9)))),
    "linear": ("linear", dict(x=f32(3, 2, D), w=f32(I, D)), {}),
    "token_logprobs": ("token_logprobs", dict(
        hidden=f32(T, D), lm_head=f32(50, D), targets=np.arange(T)), dict(top=4)),
}  # fmt: skip

ACTIVATIONS = {"q", "k", "v", "x", "z", "latent", "pages", "past", "hidden"}


def mapped(case, change):
    """The case with change(name, value) for each array in it, also in lists and tuples."""

    def each(name, value):
        if isinstance(value, list | tuple):
            return type(value)(each(name, v) for v in value)
        return change(name, value) if isinstance(value, np.ndarray) else value

    op, args, options = CASES[case]
    args = {n: each(n, a) for n, a in args.items()}
    return op, args, {n: each(n, a) for n, a in options.items()}


def call(module, op, args, options):
    return getattr(module, op)(*args.values(), **options)


def as_list(result):
    return list(result) if isinstance(result, tuple) else [result]


def copied(case):
    return mapped(case, lambda name, a: a.copy())


@pytest.mark.parametrize("case", CASES)
def test_against_the_reference(case):
    (op, args, options), ref = copied(case), copied(case)
    got, want = as_list(call(ops, op, args, options)), as_list(call(reference, *ref))
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert type(g) is np.ndarray and g.flags.c_contiguous
        assert g.dtype == (np.float32 if w.dtype == np.float64 else w.dtype)
        assert relative(g, w) < 2e-5
    for name in args:  # inputs are left alone, save the state of a decode step
        if name == "state":
            assert relative(args[name], ref[1][name]) < 2e-5
        else:
            assert (args[name] == CASES[case][1][name]).all()
    for name, value in options.items():
        if isinstance(value, np.ndarray):
            assert (value == CASES[case][2][name]).all()


@pytest.mark.parametrize("case", CASES)
def test_in_bfloat16(case):
    if case.startswith("moe_route"):
        pytest.skip("logits are float32")
    state = {"state"} if case.startswith("short_conv") else set()

    def lower(name, a):
        return a.astype(bf16) if name in ACTIVATIONS | state else a.copy()

    op, args, options = mapped(case, lower)
    wide = mapped(case, lambda n, a: lower(n, a).astype(np.float32) if lower(n, a).dtype == bf16
                  else a.copy())  # fmt: skip
    first = next(iter(args.values()))
    got, want = as_list(call(ops, op, args, options)), as_list(call(reference, *wide))
    assert got[0].dtype == (np.float32 if op == "token_logprobs" else first.dtype)
    for g, w in zip(got, want, strict=True):
        if np.asarray(g).dtype.kind in "ib":
            continue
        assert relative(g.astype(np.float64), w) < 2e-2


@pytest.mark.parametrize("case", CASES)
def test_torch_in_torch_out_with_the_same_bits(case):
    want = as_list(call(ops, *copied(case)))
    got = as_list(call(ops, *mapped(case, lambda n, a: torch.from_numpy(a.copy()))))
    for g, w in zip(got, want, strict=True):
        assert type(g) is torch.Tensor
        np.testing.assert_array_equal(g.numpy(), w)


def strided(name, a):
    """The same values in every second element; a state is written to and stays as it is."""
    if name == "state":
        return a.copy()
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), 77, a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


@pytest.mark.parametrize("case", CASES)
def test_strided_inputs_give_the_same_bits(case):
    want = as_list(call(ops, *copied(case)))
    got = as_list(call(ops, *mapped(case, strided)))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_threads_and_repetition_give_the_same_bits(case):
    want = as_list(call(ops, *copied(case)))
    for threads in (1, 3):
        with _backends.backend(threads=threads):
            for g, w in zip(as_list(call(ops, *copied(case))), want, strict=True):
                np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("case", CASES)
def test_given_outputs_are_filled_and_returned(case):
    op, args, options = copied(case)
    if "out" not in inspect.signature(getattr(ops, op)).parameters:
        pytest.skip("has no out=")
    want = as_list(call(ops, *copied(case)))
    given = {"out": np.full_like(want[0], np.nan)}
    if op == "kda_prefill":
        given["final_state"] = np.full_like(want[1], np.nan)
    got = as_list(call(ops, op, args, options | given))
    assert all(g is w for g, w in zip(got, given.values(), strict=False))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


# ---- states ----------------------------------------------------------------------------------


def test_final_state_may_be_the_initial_state():
    start = f32(1, H, V, K)
    o, end = ops.kda_prefill(**KDA, initial_state=start)
    assert end is not start and not np.shares_memory(end, start)
    state = start.copy()
    o2, same = ops.kda_prefill(**KDA, initial_state=state, final_state=state)
    assert same is state
    np.testing.assert_array_equal(state, end)
    np.testing.assert_array_equal(o2, o)


def test_states_that_overlap_otherwise_are_refused():
    block = np.zeros(2 * H * V * K, np.float32)
    a = block[: H * V * K].reshape(1, H, V, K)
    b = block[1 : H * V * K + 1].reshape(1, H, V, K)
    with pytest.raises(ValueError, match="final_state must not share memory"):
        ops.kda_prefill(**KDA, initial_state=a, final_state=b)
    with pytest.raises(ValueError, match="out must not share memory with"):
        ops.kda_prefill(**KDA, out=KDA["v"])


def test_decode_touches_only_its_slots():
    pool = np.full((5, H, V, K), np.nan, np.float32)
    pool[[3, 1]] = 0
    step = {n: a[:2] for n, a in KDA.items()}
    o = ops.kda_decode(**step, state=pool, slots=np.array([3, 1], np.int32))
    assert np.isfinite(o).all() and np.isfinite(pool[[3, 1]]).all() and (pool[3] != 0).any()
    assert np.isnan(pool[[0, 2, 4]]).all()


def test_one_token_at_a_time_is_prefill():
    o, end = ops.kda_prefill(**KDA)
    state = np.zeros((1, H, V, K), np.float32)
    steps = [ops.kda_decode(*(a[t : t + 1] for a in KDA.values()), state) for t in range(T)]
    assert relative(np.concatenate(steps), o) < 1e-5 and relative(state, end) < 1e-5


def test_past_in_pieces():
    """Lists with None, and more arrays than a call has room for without an allocation."""
    n = 60
    q, latent = f32(n, H, NOPE + ROPE), f32(n, RANK + ROPE)
    past = [f32(i, RANK + ROPE) if i % 3 else None for i in range(n)]
    whole = [np.zeros((0, RANK + ROPE)) if p is None else p for p in past]
    cu = np.arange(n + 1)
    got = ops.mla_prefill(q, latent, MLA["w_kv_b"], cu_seqlens=cu, past=past)
    want = reference.mla_prefill(q, latent, MLA["w_kv_b"], cu_seqlens=cu, past=whole)
    assert relative(got, want) < 1e-5


# ---- weights ---------------------------------------------------------------------------------

FORMATS = {"f32": (4.0, 0), "bf16": (2.0, 0.004), "int8": (1.1, 0.01), "int4": (0.6, 0.15)}


@pytest.mark.parametrize("format", FORMATS)
def test_packed_weights(format):
    w = f32(3, 17, 130)
    bytes_each, error = FORMATS[format]
    packed = ops.quantize(w, format)
    assert type(packed) is ops.PackedWeight and packed.shape == w.shape
    assert packed.format == format and "(3, 17, 130)" in repr(packed)
    assert 0.4 * w.size < packed.nbytes <= bytes_each * 17 * 3 * 192  # whole groups of 64
    seen = packed.dequantize()
    assert seen.dtype == np.float32 and relative(seen, w) <= error
    np.testing.assert_allclose(seen, reference.quantize(w, format).dequantize(), rtol=0, atol=0)
    one = ops.quantize(w[1], format)
    assert one.shape == (17, 130)
    np.testing.assert_array_equal(one.dequantize(), seen[1])
    x = f32(5, 130)
    assert relative(ops.linear(x, one), x.astype(float) @ seen[1].T.astype(float)) < 1e-5
    with pytest.raises(ValueError, match="linear: w must be one matrix, got a stack of 3"):
        ops.linear(x, packed)


@pytest.mark.parametrize("format, group_bytes, scales", [("int8", 64, 15), ("int4", 16, 27)])
def test_an_odd_number_of_scales_is_counted_as_it_is(format, group_bytes, scales):
    w = f32(scales // 3, 3, 32)
    packed = ops.quantize(w, format)
    assert packed.shape == w.shape and packed.nbytes == scales * (group_bytes + 2)
    np.testing.assert_array_equal(packed.dequantize(), reference.quantize(w, format).dequantize())
    alone = ops.quantize(w[-1, -1:], format)
    assert alone.nbytes == group_bytes + 2
    np.testing.assert_array_equal(alone.dequantize(), packed.dequantize()[-1, -1:])


def test_packed_weights_everywhere():
    packed = EXPERTS | {n: ops.quantize(EXPERTS[n], "int8") for n in ("w1", "w3", "w2")}
    dense = EXPERTS | {n: packed[n].dequantize() for n in ("w1", "w3", "w2")}
    assert relative(ops.moe_experts(**packed), reference.moe_experts(**dense)) < 1e-5
    head = ops.quantize(f32(50, D), "int4")
    hidden, targets = f32(T, D), np.arange(T)
    got = ops.token_logprobs(hidden, head, targets)[0]
    assert relative(got, reference.token_logprobs(hidden, head.dequantize(), targets)[0]) < 1e-5
    w = ops.quantize(MLA["w_kv_b"], "bf16")
    got = ops.mla_prefill(MLA["q"], MLA["latent"], w)
    assert relative(got, reference.mla_prefill(MLA["q"], MLA["latent"], w.dequantize())) < 1e-5
    with pytest.raises(TypeError, match="mla_prefill: w_kv_b must be float32 or bfloat16"):
        ops.mla_prefill(MLA["q"], MLA["latent"], ops.quantize(MLA["w_kv_b"], "int8"))


def test_packed_weight_outlives_its_source():
    w = f32(I, D)
    packed = ops.quantize(w, "f32")
    x, want = f32(2, D), w.copy()
    w[:] = np.nan
    assert relative(ops.linear(x, packed), x.astype(float) @ want.T.astype(float)) < 1e-5


@pytest.mark.parametrize(
    ("w", "dtype", "error"),
    [
        (f32(2, 3), "int3", ValueError),
        (f32(2, 3), "fp8", ValueError),
        (f32(2, 3), None, TypeError),
        (f32(3), "int8", ValueError),
        (f32(2, 2, 2, 2), "int8", ValueError),
        (f32(2, 3).astype(np.float64), "int8", TypeError),
        (np.full((2, 3), np.nan, np.float32), "int8", NumericalError),
    ],
)
def test_quantize_refuses(w, dtype, error):
    with pytest.raises(error, match="quantize|pack_weight"):
        ops.quantize(w, dtype)


# ---- wrong arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("case", [
    "kda_prefill, all options", "kda_decode", "short_conv", "short_conv, all options",
    "gated_rms_norm", "rms_norm, residual", "mla_prefill, all options", "mla_decode",
    "moe_route", "moe_experts, shared", "linear", "token_logprobs",
])  # fmt: skip
def test_float64_is_refused_by_name(case):
    _, args, options = CASES[case]
    named = {n: a for n, a in (args | options).items() if isinstance(a, np.ndarray)}
    for wrong in [n for n, a in named.items() if a.dtype == np.float32 and n != "past"]:
        op, a, o = mapped(case, lambda n, v, w=wrong: v.astype(float) if n == w else v.copy())
        with pytest.raises(TypeError, match=f"{op}: {wrong} must be float32.*got float64"):
            call(ops, op, a, o)
        op, a, o = mapped(case, lambda n, v, w=wrong: v[None] if n == w else v.copy())
        if wrong not in ("x", "z", "residual") or "norm" not in op and op != "linear":
            with pytest.raises(ValueError, match=f"{op}: {wrong} must have .* axes, got shape"):
                call(ops, op, a, o)


def bad(case, message, **changes):
    return pytest.param(case, changes, message, id=f"{case}: {message[:40]}")


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        bad("kda_prefill", "cu_seqlens must start at 0", cu_seqlens=np.array([1, T])),
        bad("kda_prefill", f"end at T = {T}", cu_seqlens=np.array([0, T - 1])),
        bad("kda_prefill", "must lie in \\[0, 23\\], got 24 at 1",
            cu_seqlens=np.array([0, T + 1])),
        bad("kda_prefill", "got -1 at 1", cu_seqlens=np.array([0, -1, T])),
        bad("kda_prefill", "must lie", cu_seqlens=np.array([0, 2**32 + 5, T])),
        bad("kda_prefill", "must not fall, got 3 after 9", cu_seqlens=np.array([0, 9, 3, T])),
        bad("kda_prefill", "cu_seqlens", cu_seqlens=np.array([], np.int32)),
        bad("kda_prefill", "cu_seqlens", cu_seqlens=np.array([0])),
        bad("kda_prefill", "gate must be one of 'direct', 'softplus', 'bounded'", gate="gelu"),
        bad("kda_prefill", "A_log", gate="softplus"),
        bad("kda_prefill", "lower_bound", gate="bounded", A_log=f32(H), lower_bound=0.5),
        bad("kda_prefill", "scale must be a finite float32", scale=float("inf")),
        bad("kda_prefill", "scale must be a finite float32", scale=1e39),
        bad("kda_prefill", "initial_state.shape\\[0\\] must be 1",
            initial_state=f32(2, H, V, K)),
        bad("kda_prefill", "initial_state.shape\\[2\\] must be 12",
            initial_state=f32(1, H, K, V)),
        bad("kda_prefill", "final_state must have shape", final_state=f32(1, H, K, V)),
        bad("kda_prefill", "k", k=f32(T, H, K + 1)),
        bad("kda_prefill", "beta", beta=f32(T, H + 1)),
        bad("kda_prefill", "dt_bias", gate="bounded", A_log=f32(H), dt_bias=f32(H, V)),
        bad("kda_decode", "slots must be distinct, got 0 twice", slots=np.array([5, 0, 0])),
        bad("kda_decode", "must lie in \\[0, 5\\], got 6 at 2", slots=np.array([5, 0, 6])),
        bad("kda_decode", "got -1", slots=np.array([-1, 0, 2])),
        bad("kda_decode", "slots must have shape \\(3,\\)", slots=np.array([0, 1])),
        bad("kda_decode", "state", slots=None, state=f32(2, H, V, K)),
        bad("short_conv", "activation must be one of 'silu', got 'relu'", activation="relu"),
        bad("short_conv", "state.shape\\[2\\] must be 3", state=f32(1, D, W)),
        bad("short_conv", "weight", weight=f32(D + 1, W)),
        bad("rms_norm", "eps", eps=float("nan")),
        bad("rms_norm", "weight", weight=f32(V + 1)),
        bad("rms_norm, residual", "residual must have the shape of x", residual=f32(5, V)),
        bad("mla_prefill", "latent must have 23 rows, got 22", latent=f32(T - 1, RANK + ROPE)),
        bad("mla_prefill", "must fit", latent=f32(T, RANK - 1)),
        bad("mla_prefill", "must fit", latent=f32(T, 100)),
        bad("mla_prefill", "must hold 1 sequences, got 2", past=[None, None]),
        bad("mla_prefill", "past must have 20 columns, got 19", past=f32(3, RANK + ROPE - 1)),
        bad("mla_decode", "block_table\\[0, 1\\] must lie in \\[0, 5\\), got 5",
            block_table=np.array([[4, 5, 0], [2, 0, 0], [0, 3, 1]])),
        bad("mla_decode", "block_table\\[2, 2\\] must lie in \\[0, 5\\), got -1",
            block_table=np.array([[4, 1, 0], [2, 0, 0], [0, 3, 2**40]])),
        bad("mla_decode", "block_table must have 3 rows", block_table=np.zeros((2, 3), int)),
        bad("mla_decode", "must lie in \\[1, 192\\], got 0", lengths=np.array([65, 0, 1])),
        bad("mla_decode", "lengths must lie in \\[1, 192\\], got 193",
            lengths=np.array([193, 1, 1])),
        bad("mla_decode", "pages", pages=f32(P, 32, RANK + ROPE)),
        bad("moe_route", "top_k must lie in \\[1, 6\\], got 7", top_k=7),
        bad("moe_route", "top_k", top_k=0),
        bad("moe_route", "score must be one of", score="tanh"),
        bad("moe_route", "groups", groups=4),
        bad("moe_route", "bias", bias=f32(E + 1)),
        bad("moe_experts", "ids must lie in \\[0, 5\\], got 6", ids=np.full((T, 3), E)),
        bad("moe_experts", "got -1", ids=np.full((T, 3), -1)),
        bad("moe_experts", "w", w3=f32(E, I + 1, D)),
        bad("moe_experts", "weights", weights=f32(T, 2)),
        bad("token_logprobs", "must lie in \\[-1, 49\\], got 50", targets=np.full(T, 50)),
        bad("token_logprobs", "targets", targets=np.zeros(T - 1, np.int32)),
        bad("token_logprobs", "top must lie in \\[0, 256\\], got 257", top=257),
        bad("token_logprobs", "top", top=51),
    ],
)  # fmt: skip
def test_wrong_values(case, changes, message):
    op, args, options = copied(case)
    args = {n: changes.get(n, a) for n, a in args.items()}
    options |= {n: v for n, v in changes.items() if n not in args}
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        call(ops, op, args, options)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        bad("kda_prefill", "scale must be a number", scale="big"),
        bad("kda_prefill", "normalize must be True or False", normalize=1),
        bad("kda_prefill", "gate must be one of", gate=None),
        bad("moe_route", "top_k must be an int", top_k=2.0),
        bad("moe_route", "top_k must be an int", top_k=True),
        bad("moe_experts", "shared must be None or", shared=[1, 2, 3]),
        bad("linear", "stream must be an int", stream="0"),
        bad("linear", "w must be an array", w=None),
        bad("token_logprobs", "targets must be int32 or int64, got float32", targets=f32(T)),
    ],
)
def test_wrong_types(case, changes, message):
    op, args, options = copied(case)
    args = {n: changes.get(n, a) for n, a in args.items()}
    options |= {n: v for n, v in changes.items() if n not in args}
    with pytest.raises(TypeError, match=f"{op}: .*{message}"):
        call(ops, op, args, options)


def test_activations_of_two_kinds():
    with pytest.raises((TypeError, ValueError), match="kda_prefill: .*bfloat16"):
        ops.kda_prefill(**(KDA | {"v": KDA["v"].astype(bf16)}))
    with pytest.raises((TypeError, ValueError), match="mla_prefill: latent .*bfloat16"):
        ops.mla_prefill(MLA["q"], MLA["latent"].astype(bf16), MLA["w_kv_b"])


# ---- sample ----------------------------------------------------------------------------------

GREEDY = (0.0, 0, 1.0, 0.0, 1.0, 0, 0)


def draw(logits, params, seen=None, top=0):
    return _core.sample(_backends.shared("cpu"), logits, params, seen, top)


def test_sample():
    z = f32(3, 40)
    rows = [GREEDY, (0.7, 5, 0.9, 0.0, 1.0, 123, 4), (1.3, 0, 1.0, 0.05, 1.2, 2**64 - 1, 2**40)]
    seen = np.zeros((3, 2), np.int32)
    seen[:, 0] = 0x0F0F
    for s in (None, seen):
        got, want = draw(z, rows, s, 3), reference.sample(z, rows, seen=s, top=3)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[2], want[2])
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
        np.testing.assert_allclose(got[3], want[3], rtol=1e-5)
    assert len(draw(z, rows)) == 2


@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        (0, -1.0, ValueError), (0, float("nan"), ValueError), (0, "hot", TypeError),
        (1, -1, ValueError), (1, 1.5, TypeError), (2, 0.0, ValueError), (2, 1.1, ValueError),
        (3, -0.1, ValueError), (3, 1.1, ValueError), (4, 0.0, ValueError),
        (4, float("inf"), ValueError), (5, -1, OverflowError), (5, 2**64, OverflowError),
        (5, 1.0, TypeError), (6, -1, ValueError),
    ],
)  # fmt: skip
def test_sample_refuses(place, value, error):
    row = [*GREEDY]
    row[place] = value
    with pytest.raises(error):
        draw(f32(1, 8), [tuple(row)])


def test_sample_refuses_other_shapes():
    z = f32(2, 40)
    for params in ([GREEDY], [GREEDY] * 3, [GREEDY[:6]] * 2, [None] * 2, None):
        with pytest.raises((TypeError, ValueError)):
            draw(z, params)
    for seen in (np.zeros((2, 1), np.int32), np.zeros(2, np.int32), np.zeros((2, 2))):
        with pytest.raises((TypeError, ValueError)):
            draw(z, [GREEDY] * 2, seen)
    for top in (-1, 257, 41):
        with pytest.raises(ValueError):
            draw(z, [GREEDY] * 2, None, top)


# ---- backends --------------------------------------------------------------------------------


def test_override_holds_within_its_block():
    usual = _backends.shared("cpu")
    with _backends.backend(threads=3, cpu="scalar") as own:
        assert _backends.of(f32(1)) is own and own is not usual
        assert (own.info()["threads"], own.info()["variant"]) == (3, "scalar")
    assert _backends.of(f32(1)) is usual and usual.info()["backend"] == "cpu"


@pytest.mark.parametrize("variant", ["scalar", "avx2", "avx512", "avx512bf16"])
def test_variants_agree(variant):
    try:
        chosen = _backends.backend(threads=2, cpu=variant)
        with chosen:
            o, s = ops.kda_prefill(**KDA)
            y = ops.linear(f32(3, D), np.eye(D, dtype=np.float32))
    except DeviceError:
        pytest.skip(f"this CPU has no {variant}")
    want = reference.kda_prefill(**KDA)
    assert relative(o, want[0]) < 1e-5 and relative(s, want[1]) < 1e-5 and y.shape == (3, D)


def test_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    monkeypatch.delenv("KIMI_LINEAR_THREADS", raising=False)
    monkeypatch.setenv("KIMI_LINEAR_CPU", "scalar")
    info = _backends.open_backend("cpu").info()
    assert (info["threads"], info["variant"]) == (3, "scalar")
    monkeypatch.setenv("KIMI_LINEAR_THREADS", "5")
    assert _backends.open_backend("cpu").info()["threads"] == 5
    for junk in ["0", "-1", "many", "257", "1e3", "9" * 40]:
        monkeypatch.setenv("KIMI_LINEAR_THREADS", junk)
        with pytest.raises(ValueError, match="KIMI_LINEAR_THREADS must lie in"):
            _backends.open_backend("cpu")
    monkeypatch.delenv("KIMI_LINEAR_THREADS")
    for junk in ["", "many", "-1", "9" * 40]:
        monkeypatch.setenv("OMP_NUM_THREADS", junk)
        assert _backends.open_backend("cpu").info()["threads"] >= 1
    monkeypatch.setenv("KIMI_LINEAR_CPU", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        _backends.open_backend("cpu")


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (("gpu", 0, 0, None, ""), ValueError),
        (("cpu", 1, 0, None, ""), ValueError),
        (("cpu", -1, 0, None, ""), ValueError),
        (("cpu", 0, -1, None, ""), ValueError),
        (("cpu", 0, 257, None, ""), ValueError),
        (("cpu", 0, 0, "mmx", ""), ValueError),
        (("cpu", 0, 2**40, None, ""), OverflowError),
        (("cpu",), TypeError),
        (("cuda", 0, 0, None, "/nowhere/_cuda.so"), DeviceError),
    ],
)
def test_backend_refuses(args, error):
    with pytest.raises(error):
        _core.Backend(*args)


def test_every_operation_is_documented():
    for name in ops.__all__:
        text = inspect.getdoc(getattr(ops, name))
        assert text, name
        if name != "PackedWeight":
            for parameter in inspect.signature(getattr(ops, name)).parameters:
                assert parameter in text or parameter == "stream", (name, parameter)
            assert "Source:" in text and "Returns:" in text, name


# ---- memory that cannot be had ---------------------------------------------------------------


@pytest.mark.skipif(not _core.FAULT_INJECTION, reason="built without -DKL_FAULT_INJECTION")
@pytest.mark.parametrize("change", [lambda name, a: a.copy(), strided])
@pytest.mark.parametrize("case", CASES)
def test_every_allocation_may_fail(case, change):
    """Fail the k-th allocation, for every k: MemoryError each time, nothing is held on to, and
    the first call that has its memory gives the same bits."""
    want = as_list(call(ops, *copied(case)))
    for k in range(1, 200):
        op, args, options = mapped(case, change)
        arrays = [a for a in (*args.values(), *options.values()) if isinstance(a, np.ndarray)]
        held = [sys.getrefcount(a) for a in arrays]
        _core.fault_arm(k)
        try:
            got = as_list(call(ops, op, args, options))
            break
        except MemoryError:
            pass  # its traceback goes, and with it the frames that hold arguments
        finally:
            _core.fault_arm(0)
        assert [sys.getrefcount(a) for a in arrays] == held
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)
    assert k > 1 or "norm" in case or case == "moe_route"  # those may need no memory
