"""Wrong arguments of kl.ops, each refused with its name; and memory that cannot be had."""

import sys

import numpy as np
import pytest
from ops_cases import (
    CASES,
    D,
    E,
    H,
    I,
    K,
    KDA,
    MLA,
    P,
    RANK,
    ROPE,
    T,
    V,
    W,
    as_list,
    call,
    copied,
    f32,
    mapped,
    strided,
)

from kimi_linear import _core, ops

bf16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


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


def refused(error, case, changes, message):
    op, args, options = copied(case)
    args = {n: changes.get(n, a) for n, a in args.items()}
    options |= {n: v for n, v in changes.items() if n not in args}
    with pytest.raises(error, match=f"{op}: .*{message}"):
        call(ops, op, args, options)


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
    refused(ValueError, case, changes, message)


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
    refused(TypeError, case, changes, message)


def test_activations_of_two_kinds():
    with pytest.raises((TypeError, ValueError), match="kda_prefill: .*bfloat16"):
        ops.kda_prefill(**(KDA | {"v": KDA["v"].astype(bf16)}))
    with pytest.raises((TypeError, ValueError), match="mla_prefill: latent .*bfloat16"):
        ops.mla_prefill(MLA["q"], MLA["latent"].astype(bf16), MLA["w_kv_b"])


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
