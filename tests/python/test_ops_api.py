"""kl.ops as a user meets it: every operation against the reference, in the caller's own kind of
array, with outputs of the caller's."""

import inspect

import numpy as np
import pytest
from ops_cases import (
    ACTIVATIONS,
    CASES,
    D,
    EXPERTS,
    H,
    I,
    K,
    KDA,
    MLA,
    NOPE,
    RANK,
    ROPE,
    T,
    V,
    as_list,
    call,
    copied,
    f32,
    mapped,
    relative,
    strided,
)

from kimi_linear import DeviceError, NumericalError, _backends, _core, ops, reference

torch = pytest.importorskip("torch")
bf16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


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
