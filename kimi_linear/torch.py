"""The operations as torch custom operators: ``torch.ops.kimi_linear.<name>``.

Importing this module imports torch and registers the operators, with fake implementations, so
that `torch.compile`, `torch.export` and FakeTensor see through them. The functions below call
the operators and have the arguments of `kimi_linear.ops`, less `out`, `final_state` and
`stream`; arrays are tensors, weights too. There are no gradients: a tensor that requires one is
refused outside `torch.no_grad()`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = [
    "gated_rms_norm",
    "kda_decode",
    "kda_prefill",
    "linear",
    "mla_decode",
    "mla_prefill",
    "moe_experts",
    "moe_route",
    "rms_norm",
    "short_conv",
    "token_logprobs",
]

_GATE = (
    'str gate="direct", Tensor? A_log=None, Tensor? dt_bias=None, float lower_bound=-5.0, '
    "bool normalize=False, bool beta_logits=False"
)
_SCHEMAS = {
    "kda_prefill": "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, *, "
    f"float? scale=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, {_GATE}) "
    "-> (Tensor, Tensor)",
    "kda_decode": "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, *, "
    f"Tensor? slots=None, float? scale=None, {_GATE}) -> Tensor",
    "short_conv": "(Tensor x, Tensor weight, *, Tensor? state=None, Tensor? cu_seqlens=None, "
    'str? activation="silu") -> (Tensor, Tensor)',
    "gated_rms_norm": "(Tensor x, Tensor z, Tensor weight, *, float eps=1e-5) -> Tensor",
    "rms_norm": "(Tensor x, Tensor weight, *, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor weight, Tensor residual, *, float eps) "
    "-> (Tensor, Tensor)",
    "mla_prefill": "(Tensor q, Tensor latent, Tensor w_kv_b, *, Tensor? cu_seqlens=None, "
    'Tensor[]? past=None, float? scale=None, str kv_cache_dtype="auto") -> Tensor',
    "mla_decode": "(Tensor q, Tensor pages, Tensor block_table, Tensor lengths, Tensor w_kv_b, "
    "*, float? scale=None, int? rope=None) -> Tensor",
    "moe_route": "(Tensor logits, Tensor? bias, *, int top_k, float scaling, "
    'bool renormalize=True, str score="sigmoid", int groups=1, int top_groups=1) '
    "-> (Tensor, Tensor)",
    "moe_experts": "(Tensor x, Tensor ids, Tensor weights, Tensor w1, Tensor w3, Tensor w2, *, "
    "Tensor[]? shared=None) -> Tensor",
    "linear": "(Tensor x, Tensor w) -> Tensor",
    "token_logprobs": "(Tensor hidden, Tensor lm_head, Tensor targets, *, int top=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
}

# ---- what the operators do -------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """An argument without its history, which DLPack cannot carry."""
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    if torch.is_grad_enabled():
        raise RuntimeError("kimi_linear has no gradients: call it under torch.no_grad()")
    return value.detach()


def _on_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        plain = {name: _plain(value) for name, value in options.items()}
        return function(*map(_plain, args), **plain)

    return call


def _add_rms_norm(x: Tensor, weight: Tensor, residual: Tensor, *, eps: float) -> Any:
    return ops.rms_norm(x, weight, eps=eps, residual=residual)


def _token_logprobs(hidden: Tensor, lm_head: Tensor, targets: Tensor, *, top: int = 0) -> Any:
    got = ops.token_logprobs(hidden, lm_head, targets, top=top)
    shape = (len(hidden), 0)
    if top:
        return got
    ids = hidden.new_empty(shape, dtype=torch.int32)
    return (*got, ids, hidden.new_empty(shape, dtype=torch.float32))


_ADAPTED = {
    "add_rms_norm": _add_rms_norm,
    "token_logprobs": _token_logprobs,
}

# ---- what their outputs look like ------------------------------------------------------------


def _count(cu_seqlens: Tensor | None) -> Any:
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake_kda_prefill(q, k, v, g, beta, *, cu_seqlens=None, **_):
    T, H, V = q.shape[0], v.shape[1], v.shape[2]
    state = q.new_empty((_count(cu_seqlens), H, V, q.shape[2]), dtype=torch.float32)
    return q.new_empty((T, H, V)), state


def _fake_kda_decode(q, k, v, g, beta, state, **_):
    return q.new_empty((q.shape[0], v.shape[1], v.shape[2]))


def _fake_short_conv(x, weight, *, cu_seqlens=None, **_):
    return x.new_empty(x.shape), x.new_empty(
        (_count(cu_seqlens), x.shape[1], weight.shape[1] - 1)
    )


def _fake_like_first(x, *_, **__):
    return x.new_empty(x.shape)


def _fake_add_rms_norm(x, weight, residual, *, eps):
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


def _fake_mla(q, latent, *args, rope=None, **_):
    w_kv_b = args[-1]  # last in both: mla_decode has the table and lengths before it
    nope = q.shape[2] - (latent.shape[-1] - w_kv_b.shape[2] if rope is None else rope)
    return q.new_empty((q.shape[0], q.shape[1], w_kv_b.shape[1] - nope))


def _fake_moe_route(logits, bias, *, top_k, **_):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)


def _fake_linear(x, w):
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _fake_token_logprobs(hidden, lm_head, targets, *, top=0):
    T = hidden.shape[0]
    return (
        hidden.new_empty(T, dtype=torch.float32),
        hidden.new_empty(T, dtype=torch.bool),
        hidden.new_empty((T, top), dtype=torch.int32),
        hidden.new_empty((T, top), dtype=torch.float32),
    )


_FAKES = {
    "kda_prefill": _fake_kda_prefill,
    "kda_decode": _fake_kda_decode,
    "short_conv": _fake_short_conv,
    "gated_rms_norm": _fake_like_first,
    "rms_norm": _fake_like_first,
    "add_rms_norm": _fake_add_rms_norm,
    "mla_prefill": _fake_mla,
    "mla_decode": _fake_mla,
    "moe_route": _fake_moe_route,
    "moe_experts": _fake_like_first,
    "linear": _fake_linear,
    "token_logprobs": _fake_token_logprobs,
}


def _register() -> torch.library.Library:
    library = torch.library.Library("kimi_linear", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        function = _on_tensors(_ADAPTED.get(name) or getattr(ops, name))
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        torch.library.register_fake(f"kimi_linear::{name}", _FAKES[name], lib=library)
    return library


if "_library" not in globals():  # operators live as long as it does; reload() keeps the first
    _library = _register()

_op = torch.ops.kimi_linear

# ---- functions -------------------------------------------------------------------------------


def kda_prefill(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
                **options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kimi_linear.ops.kda_prefill` as an operator, without checkpoints; the same keywords."""
    return _op.kda_prefill(q, k, v, g, beta, **options)


def kda_decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor,
               **options: Any) -> Tensor:  # fmt: skip
    """`kimi_linear.ops.kda_decode` as an operator that mutates `state`; the same keywords."""
    return _op.kda_decode(q, k, v, g, beta, state, **options)


def short_conv(x: Tensor, weight: Tensor, *, state: Tensor | None = None,
               cu_seqlens: Tensor | None = None,
               activation: str | None = "silu") -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kimi_linear.ops.short_conv` as an operator."""
    return _op.short_conv(x, weight, state=state, cu_seqlens=cu_seqlens, activation=activation)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    """`kimi_linear.ops.gated_rms_norm` as an operator."""
    return _op.gated_rms_norm(x, z, weight, eps=eps)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float,
             residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`kimi_linear.ops.rms_norm` as an operator: rms_norm, or add_rms_norm with a residual."""
    if residual is None:
        return _op.rms_norm(x, weight, eps=eps)
    return _op.add_rms_norm(x, weight, residual, eps=eps)


def mla_prefill(q: Tensor, latent: Tensor, w_kv_b: Tensor, *, cu_seqlens: Tensor | None = None,
                past: Tensor | Sequence[Tensor | None] | None = None,
                scale: float | None = None,
                kv_cache_dtype: str = "auto") -> Tensor:  # fmt: skip
    """`kimi_linear.ops.mla_prefill` as an operator."""
    if past is not None:
        listed = [past] if isinstance(past, Tensor) else past
        past = [latent.new_empty((0, latent.shape[1])) if p is None else p for p in listed]
    return _op.mla_prefill(
        q, latent, w_kv_b, cu_seqlens=cu_seqlens, past=past, scale=scale,
        kv_cache_dtype=kv_cache_dtype,
    )  # fmt: skip


def mla_decode(q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, w_kv_b: Tensor,
               *, scale: float | None = None,
               rope: int | None = None) -> Tensor:  # fmt: skip
    """`kimi_linear.ops.mla_decode` as an operator."""
    return _op.mla_decode(q, pages, block_table, lengths, w_kv_b, scale=scale, rope=rope)


def moe_route(logits: Tensor, bias: Tensor | None, *, top_k: int, scaling: float,
              renormalize: bool = True, score: str = "sigmoid", groups: int = 1,
              top_groups: int = 1) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kimi_linear.ops.moe_route` as an operator."""
    return _op.moe_route(
        logits, bias, top_k=top_k, scaling=scaling, renormalize=renormalize, score=score,
        groups=groups, top_groups=top_groups,
    )  # fmt: skip


def moe_experts(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, *,
                shared: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:  # fmt: skip
    """`kimi_linear.ops.moe_experts` as an operator."""
    return _op.moe_experts(x, ids, weights, w1, w3, w2, shared=shared)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """`kimi_linear.ops.linear` as an operator."""
    return _op.linear(x, w)


def token_logprobs(hidden: Tensor, lm_head: Tensor, targets: Tensor, *,
                   top: int = 0) -> tuple[Tensor, ...]:  # fmt: skip
    """`kimi_linear.ops.token_logprobs` as an operator (which always has four outputs)."""
    got = _op.token_logprobs(hidden, lm_head, targets, top=top)
    return got if top else got[:2]
