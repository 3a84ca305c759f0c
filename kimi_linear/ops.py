"""The operations of the model, one function each, on NumPy, torch, JAX, CuPy or plain buffers.

Arrays are anything with DLPack or the buffer protocol; results come back as the kind of array
that the first argument is, on its device, and `kimi_linear.reference` defines what they hold.
Activations are float32 or bfloat16, all of one call alike; sums are taken in float32. On a CPU
nothing depends on the number of threads or on what else is in the batch. On a GPU the same call
has the same bits; tiles, and with them the order of sums, depend on the shapes of a call, and
bfloat16 activations meet weights rounded to bfloat16 on its tensor cores.

T counts tokens of N sequences, packed without padding: `cu_seqlens` [N+1] (int32 or int64) says
that sequence n owns tokens cu_seqlens[n] .. cu_seqlens[n+1] - 1. Without it T is one sequence.

On a CPU, strided inputs are copied where an operation needs them dense. Arrays that are written
to (`out`, `state`, `final_state`) must be dense and writable and share no memory with the
inputs, save where a function says so. `stream` is an integer CUDA stream, by default the
current one of the caller's framework.

On a GPU inputs are dense, or have dense rows where the operation allows it. Ids, targets, lengths
and `cu_seqlens` may be int32 arrays there, which are not checked, for reading them would wait;
those on the host are checked and sent. Calls with torch tensors wait for nothing and can be
captured in a CUDA graph, save for `quantize` and host arrays of more than 2 KiB.

Every function raises TypeError for a wrong dtype or kind of argument, ValueError for a shape or
a value that does not fit, BufferError for memory that cannot be used as it is, and DeviceError
where the device lacks the operation.
"""

from typing import Any

from . import _backends, _core
from ._core import PackedWeight

__all__ = [
    "PackedWeight",
    "gated_rms_norm",
    "kda_decode",
    "kda_prefill",
    "linear",
    "mla_decode",
    "mla_prefill",
    "moe_experts",
    "moe_route",
    "quantize",
    "rms_norm",
    "short_conv",
    "token_logprobs",
]


def kda_prefill(q: Any, k: Any, v: Any, g: Any, beta: Any, *, scale: float | None = None,
                initial_state: Any = None, cu_seqlens: Any = None, gate: str = "direct",
                A_log: Any = None, dt_bias: Any = None, lower_bound: float = -5.0,
                normalize: bool = False, beta_logits: bool = False, out: Any = None,
                final_state: Any = None, checkpoint_every: int | None = None,
                checkpoints: Any = None,
                stream: int | None = None) -> tuple[Any, ...]:  # fmt: skip
    """Kimi Delta Attention over sequences of any length.

    Per head and token, with the state S [V, K]:

        a = exp(g);  S <- S diag(a);  u = beta (v - S k);  S <- S + u k^T;  o = scale S q

    Args:
        q, k: [T, Hk, K], K <= 256; the H value heads share them evenly (H a multiple of Hk).
        v: [T, H, V].
        g: [T, H, K], natural log of each key channel's decay (<= 0), or what `gate` makes
            into one; float32 or the dtype of q.
        beta: [T, H], step size, in (0, 1) as a rule; float32 or the dtype of q.
        scale: of the output; None for K ** -0.5.
        initial_state: [N, H, V, K] float32; None for zeros. Left alone unless it is also
            `final_state`.
        cu_seqlens: [N+1].
        gate: "direct": g as it is; "softplus": -exp(A_log) * softplus(g + dt_bias);
            "bounded": lower_bound * sigmoid(exp(A_log) * (g + dt_bias)).
        A_log: [H] float32, for "softplus" and "bounded".
        dt_bias: [H, K] float32 or None.
        lower_bound: the least log-decay of "bounded", < 0.
        normalize: divide q and k by sqrt(sum of squares + 1e-6) first.
        beta_logits: take sigmoid(beta) first.
        out: [T, H, V], dtype of q; None for a new array.
        final_state: [N, H, V, K] float32, may be initial_state itself; None for a new array.
        checkpoint_every: E, a multiple of 64: keep the states after every E tokens of a sequence
            as well.
        checkpoints: [T // E, H, V, K] float32; None for a new array. Row cu_seqlens[n] // E + c
            is what sequence n holds after (c + 1) E tokens; other rows are left alone (in a new
            array, zeros).

    Returns:
        (o [T, H, V], final_state), with checkpoint_every (o, final_state, checkpoints). Cutting a
        sequence at a multiple of 16 tokens (64 on a GPU) and passing the state on changes no bit
        of the result; on a GPU, that of a long sequence of few heads only where the backend is
        batch-invariant.

    Source: Kimi Linear, arXiv 2510.26692, section 3; csrc/backend/ops.h.
    """
    return _core.kda_prefill(
        _backends.of(q), q, k, v, g, beta, scale, initial_state, cu_seqlens, gate, A_log,
        dt_bias, lower_bound, normalize, beta_logits, out, final_state, checkpoint_every,
        checkpoints, stream,
    )  # fmt: skip


def kda_decode(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, *, slots: Any = None,
               scale: float | None = None, gate: str = "direct", A_log: Any = None,
               dt_bias: Any = None, lower_bound: float = -5.0, normalize: bool = False,
               beta_logits: bool = False, out: Any = None,
               stream: int | None = None) -> Any:  # fmt: skip
    """One token of Kimi Delta Attention for each of N sequences.

    Args:
        q, k, v, g, beta: as in `kda_prefill`, with T = N.
        state: [S, H, V, K] float32, dense and writable, updated in place.
        slots: [N], where in `state` each sequence's state lies, distinct; None for 0 .. N-1.
            On a GPU they are int32 there and are not checked.
        scale, gate, A_log, dt_bias, lower_bound, normalize, beta_logits: as in `kda_prefill`.
        out: [N, H, V], dtype of q; None for a new array.

    Returns:
        o [N, H, V].

    Source: Kimi Linear, arXiv 2510.26692, section 3; csrc/backend/ops.h.
    """
    return _core.kda_decode(
        _backends.of(q), q, k, v, g, beta, state, slots, scale, gate, A_log, dt_bias,
        lower_bound, normalize, beta_logits, out, stream,
    )  # fmt: skip


def short_conv(x: Any, weight: Any, *, state: Any = None, cu_seqlens: Any = None,
               activation: str | None = "silu", out: Any = None,
               stream: int | None = None) -> tuple[Any, Any]:  # fmt: skip
    """Depthwise causal convolution:  y[t] = act(sum_j weight[:, j] * x[t - (W-1) + j]).

    Args:
        x: [T, C].
        weight: [C, W] float32, W in 1 .. 8; weight[:, W-1] multiplies the current token.
        state: [N, C, W-1], dtype of x: each sequence's last W-1 inputs, oldest first; None for
            zeros. Left alone.
        cu_seqlens: [N+1].
        activation: "silu" or None.
        out: [T, C], dtype of x; None for a new array.

    Returns:
        (y [T, C], the new state [N, C, W-1]).

    Source: Kimi Linear, arXiv 2510.26692, section 4; csrc/backend/ops.h.
    """
    return _core.short_conv(
        _backends.of(x), x, weight, state, cu_seqlens, activation, out, stream
    )


def gated_rms_norm(x: Any, z: Any, weight: Any, *, eps: float = 1e-5, out: Any = None,
                   stream: int | None = None) -> Any:  # fmt: skip
    """KDA's output gate:  x / sqrt(mean(x^2) + eps) * weight * sigmoid(z)  over the last axis.

    Args:
        x, z: [..., D].
        weight: [D] float32.
        eps: added to the mean square.
        out: shape and dtype of x, may be x itself; None for a new array.

    Returns:
        An array of the shape and dtype of x.

    Source: Kimi Linear, arXiv 2510.26692, section 4; csrc/backend/ops.h.
    """
    return _core.gated_rms_norm(_backends.of(x), x, z, weight, eps, out, stream)


def rms_norm(x: Any, weight: Any, *, eps: float, residual: Any = None, out: Any = None,
             stream: int | None = None) -> Any:  # fmt: skip
    """r / sqrt(mean(r^2) + eps) * weight  over the last axis, with r = x, or residual + x.

    Args:
        x: [..., D].
        weight: [D] float32.
        eps: added to the mean square.
        residual: shape of x, float32 or the dtype of x; left alone.
        out: shape and dtype of x, may be x itself; None for a new array.

    Returns:
        y, shape and dtype of x; with a residual (y, r), r in the dtype of the residual.

    Source: Zhang and Sennrich, arXiv 1910.07467; csrc/backend/ops.h.
    """
    return _core.rms_norm(_backends.of(x), x, weight, eps, residual, out, stream)


def mla_prefill(q: Any, latent: Any, w_kv_b: Any, *, cu_seqlens: Any = None, past: Any = None,
                scale: float | None = None, kv_cache_dtype: str = "auto", out: Any = None,
                stream: int | None = None) -> Any:  # fmt: skip
    """Causal latent attention (MLA without rotation) of new tokens over themselves and a past.

    Per head, with w_kv_b[h] = [W_UK; W_UV] and latents [c | k_pe]:

        k = [W_UK c | k_pe];  v = W_UV c;  o = softmax(scale q k^T) v

    Args:
        q: [T, H, nope+rope].
        latent: [T, rank+rope], dtype of q, the normalised part first.
        w_kv_b: [H, nope+V, rank], float32 or bfloat16.
        cu_seqlens: [N+1].
        past: the latents before these: [P, rank+rope] where there is one sequence, else a list
            with such an array or None for each; None for no past.
        scale: of the scores; None for (nope+rope) ** -0.5.
        kv_cache_dtype: "fp8": the latents are rounded to 8 bits first, as a model with 8-bit
            pages keeps them (csrc/base/latents.h).
        out: [T, H, V], dtype of q; None for a new array.

    Returns:
        o [T, H, V].

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; csrc/backend/ops.h.
    """
    return _core.mla_prefill(
        _backends.of(q), q, latent, w_kv_b, cu_seqlens, past, scale, kv_cache_dtype, out, stream
    )


def mla_decode(q: Any, pages: Any, block_table: Any, lengths: Any, w_kv_b: Any, *,
               scale: float | None = None, rope: int | None = None, out: Any = None,
               stream: int | None = None) -> Any:  # fmt: skip
    """Latent attention of one token for each of N sequences, over latents in pages.

    Args:
        q: [N, H, nope+rope].
        pages: [P, 64, rank+rope], dtype of q; or of 8 bits, uint8 [P, 64, row bytes], rows as
            csrc/base/latents.h and `kimi_linear.reference.pack_latents` have them.
        block_table: [N, B]: position p of sequence n is row p % 64 of page
            block_table[n, p // 64]. Entries past a sequence's length are not looked at.
        lengths: [N], tokens of context including this one, >= 1.
        w_kv_b: [H, nope+V, rank], float32 or bfloat16.
        scale: of the scores; None for (nope+rope) ** -0.5.
        rope: how many channels of a latent are not normalised, with 8-bit pages; else None.
        out: [N, H, V], dtype of q; None for a new array.

    Returns:
        o [N, H, V].

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; csrc/backend/ops.h.
    """
    return _core.mla_decode(
        _backends.of(q), q, pages, block_table, lengths, w_kv_b, scale, rope, out, stream
    )


def moe_route(logits: Any, bias: Any, *, top_k: int, scaling: float, renormalize: bool = True,
              score: str = "sigmoid", groups: int = 1, top_groups: int = 1,
              stream: int | None = None) -> tuple[Any, Any]:  # fmt: skip
    """Choose the experts of each token:  s = score(logits);  ids = the top_k largest s + bias.

    Args:
        logits: [T, E] float32.
        bias: [E] float32 or None; steers the choice and does not enter the weights.
        top_k: experts of a token, 1 .. E.
        scaling: factor of the weights, after renormalising.
        renormalize: divide a token's weights by their sum + 1e-20.
        score: "sigmoid" or "softmax".
        groups, top_groups: only experts of the top_groups groups with the largest sums of their
            two best s + bias are chosen from; 1 and 1 for all.

    Returns:
        (ids [T, top_k] int32, best first, lower id on a tie; weights [T, top_k] float32).

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; csrc/backend/ops.h.
    """
    return _core.moe_route(
        _backends.of(logits), logits, bias, top_k, scaling, renormalize, score, groups,
        top_groups, stream,
    )  # fmt: skip


def moe_experts(x: Any, ids: Any, weights: Any, w1: Any, w3: Any, w2: Any, *,
                shared: tuple[Any, Any, Any] | None = None, out: Any = None,
                stream: int | None = None) -> Any:  # fmt: skip
    """sum_j weights[t, j] * expert_{ids[t, j]}(x[t]) + shared(x[t]),
    with expert(x) = (silu(x w1^T) * (x w3^T)) w2^T.

    Args:
        x: [T, D].
        ids: [T, top_k], in [0, E).
        weights: [T, top_k] float32.
        w1, w3, w2: [E, I, D] gate, [E, I, D] up, [E, D, I] down; PackedWeight or arrays.
        shared: (w1, w3, w2) of the expert that every token passes: [I', D], [I', D], [D, I'].
        out: [T, D], dtype of x; None for a new array.

    Returns:
        y [T, D].

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2; csrc/backend/ops.h.
    """
    return _core.moe_experts(
        _backends.of(x), x, ids, weights, w1, w3, w2, shared, out, stream
    )


def linear(x: Any, w: Any, *, out: Any = None, stream: int | None = None) -> Any:
    """x w^T.

    Args:
        x: [..., in].
        w: [out, in], PackedWeight or array.
        out: [..., out], dtype of x, or float32; None for a new array in the dtype of x.

    Returns:
        [..., out].

    Source: csrc/backend/ops.h.
    """
    return _core.linear(_backends.of(x), x, w, out, stream)


def quantize(w: Any, dtype: str) -> PackedWeight:
    """Store a matrix, or a stack of them, in a weight format.

    Args:
        w: [out, in] or [count, out, in].
        dtype: "f32", "bf16", "int8" (groups of 64 columns), "int4" (groups of 32) or, on CUDA
            only, "fp8" (e4m3, groups of 64); each group with a bfloat16 scale.

    Returns:
        A PackedWeight, accepted wherever a `w` is; `.dequantize()` gives the matrix that the
        operations see. A group that is not finite reads as NaN on CUDA.

    Raises:
        NumericalError: a group is not finite (CPU), with the row and column.

    Source: csrc/base/weight.h.
    """
    return _core.quantize(_backends.of(w), w, dtype)


def token_logprobs(hidden: Any, lm_head: Any, targets: Any, *, top: int = 0,
                   stream: int | None = None) -> tuple[Any, ...]:  # fmt: skip
    """Log-probabilities of given next tokens, without a [T, rows] matrix of logits:
    z = hidden lm_head^T;  logprobs[t] = z[targets[t]] - logsumexp(z).

    Args:
        hidden: [T, D].
        lm_head: [rows, D], PackedWeight or array.
        targets: [T], in [-1, rows); -1 asks for none (NaN and False).
        top: also return this many of the best tokens, at most 256.

    Returns:
        (logprobs [T] float32, greedy [T] bool: the target is the argmax) and, with top > 0,
        (top_ids [T, top] int32, top_logprobs [T, top] float32), best first.

    Source: csrc/backend/ops.h.
    """
    return _core.token_logprobs(_backends.of(hidden), hidden, lm_head, targets, top, stream)
