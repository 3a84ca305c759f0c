"""Kimi Delta Attention, one token after the other as the paper states it, and in chunks.

Kimi Linear technical report (arXiv 2510.26692), section 3 and equations 1-9. Axes: T tokens,
N sequences, H value heads, Hk key heads (H a multiple of Hk), K key and V value channels.
The state S [V, K] of a head is an associative memory from keys to values: each token lets
every key channel fade at its own rate, then corrects what the memory answers to its key.

A scalar gate, one rate for all channels of a head, makes this the gated delta rule (Gated
DeltaNet, arXiv 2412.06464): pass g as [T, H] or [T, H, 1].
"""

from typing import Any

import numpy as np

from .ragged import count, spans

NORM_EPS = 1e-6  # added to the sum of squares, inside the root


def sigmoid(x: Any) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))


def log_decay(g: Any, gate: str = "direct", *, A_log: Any = None, dt_bias: Any = None,
              lower_bound: float = -5.0) -> np.ndarray:  # fmt: skip
    """The log-decay of each channel, <= 0, from the gate's input.

    direct     g
    softplus   -exp(A_log[h]) * log(1 + exp(g + dt_bias[h, k]))     Kimi Linear; unbounded
    bounded    lower_bound * sigmoid(exp(A_log[h]) * (g + dt_bias[h, k]))

    g [T, H, K], [T, H, 1] or [T, H] for one rate a head; A_log of H elements (may be absent
    for bounded: exp(A_log) = 1); dt_bias of H * K (or H) elements, or None.
    Returns [T, H, K or 1]. Raises ValueError for an unknown gate, and for softplus without
    A_log.
    Source: report section 4; flash-linear-attention, fla/ops/kda/gate.py.
    """
    g = np.asarray(g, np.float64)
    g = g[..., None] if g.ndim == 2 else g
    if gate == "direct":
        return g
    if dt_bias is not None:
        g = g + np.asarray(dt_bias, np.float64).reshape(g.shape[1], -1)
    rate = None if A_log is None else np.exp(np.asarray(A_log, np.float64).reshape(-1, 1))
    if gate == "softplus":
        if rate is None:
            raise ValueError("A_log must be given with gate='softplus'")
        return -rate * np.logaddexp(0.0, g)
    if gate == "bounded":
        return lower_bound * sigmoid(g if rate is None else rate * g)
    raise ValueError(f"gate must be 'direct', 'softplus' or 'bounded', got {gate!r}")


def l2_normalize(x: np.ndarray) -> np.ndarray:
    """x / sqrt(sum x^2 + 1e-6) over the last axis."""
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + NORM_EPS)


def _inputs(q, k, v, g, beta, scale, gate, A_log, dt_bias, lower_bound, normalize, beta_logits):
    """Everything in float64, per value head: q (scaled), k [T,H,K], v, log-decay [T,H,K], b."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    g = log_decay(g, gate, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound)
    beta = sigmoid(beta) if beta_logits else np.asarray(beta, np.float64)
    if normalize:
        q, k = l2_normalize(q), l2_normalize(k)
    group, rest = divmod(v.shape[1], k.shape[1])
    if rest:
        raise ValueError(f"v.shape[1] must be a multiple of {k.shape[1]}, got {v.shape[1]}")
    q, k = (np.repeat(x, group, axis=1) for x in (q, k))  # head h reads key head h // group
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return q * scale, k, v, np.broadcast_to(g, k.shape), beta


def _token(S, q, k, v, g, beta):
    """One token. S [..., V, K]; q, k, g [..., K]; v [..., V]; beta [...] -> (o [..., V], S)."""
    S = S * np.exp(g)[..., None, :]  # forget
    u = beta[..., None] * (v - (S @ k[..., None])[..., 0])  # what S does not hold yet
    S = S + u[..., :, None] * k[..., None, :]  # the delta rule
    return (S @ q[..., None])[..., 0], S  # read the updated state


def _states(initial_state, cu_seqlens, H, V, K):
    if initial_state is None:
        return np.zeros((count(cu_seqlens), H, V, K))
    return np.array(initial_state, np.float64)  # a copy: the caller's stays as it is


def kda_prefill(q, k, v, g, beta, *, scale=None, initial_state=None, cu_seqlens=None,
                gate="direct", A_log=None, dt_bias=None, lower_bound=-5.0, normalize=False,
                beta_logits=False, checkpoint_every=None) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Kimi Delta Attention over packed sequences, by its definition.

        a    = exp(log_decay(g))
        q, k = q / sqrt(sum q^2 + 1e-6), the same for k       where `normalize`
        b    = sigmoid(beta)                                  where `beta_logits`
        S   <- S diag(a);  u = b (v - S k);  S <- S + u k^T;  o = scale S q

    q, k [T, Hk, K]; v [T, H, V]; g [T, H, K]; beta [T, H]; initial_state [N, H, V, K] or None
    for zeros; cu_seqlens [N+1]; A_log [H]; dt_bias [H, K]; scale: None for K**-0.5.
    Returns o [T, H, V] and the final states [N, H, V, K]; with checkpoint_every = E also the
    states after every E tokens [T // E, H, V, K]: row cu_seqlens[n] // E + c is sequence n after
    (c + 1) E tokens, rows that no sequence has are zeros. Raises ValueError for shapes that do not
    fit together.
    """
    q, k, v, g, beta = _inputs(q, k, v, g, beta, scale, gate, A_log, dt_bias, lower_bound,
                               normalize, beta_logits)  # fmt: skip
    states = _states(initial_state, cu_seqlens, *v.shape[1:], k.shape[-1])
    o = np.empty_like(v)
    checkpoints = np.zeros((len(q) // (checkpoint_every or len(q) + 1), *states.shape[1:]))
    for n, span in spans(len(q), cu_seqlens):
        for t in range(span.start, span.stop):
            o[t], states[n] = _token(states[n], q[t], k[t], v[t], g[t], beta[t])
            done = t + 1 - span.start
            if checkpoint_every is not None and done % checkpoint_every == 0:
                row = span.start // checkpoint_every + done // checkpoint_every - 1
                checkpoints[row] = states[n]
    return (o, states) if checkpoint_every is None else (o, states, checkpoints)


def kda_decode(q, k, v, g, beta, state, *, slots=None, scale=None, gate="direct", A_log=None,
               dt_bias=None, lower_bound=-5.0, normalize=False,
               beta_logits=False) -> np.ndarray:  # fmt: skip
    """One token for each of N sequences; the formula of `kda_prefill`.

    q, k [N, Hk, K]; v [N, H, V]; g [N, H, K]; beta [N, H]; state [S, H, V, K], updated in place
    at `slots` [N] (distinct; None: row n has slot n), other slots untouched. Returns o
    [N, H, V].
    """
    q, k, v, g, beta = _inputs(q, k, v, g, beta, scale, gate, A_log, dt_bias, lower_bound,
                               normalize, beta_logits)  # fmt: skip
    slots = np.arange(len(q)) if slots is None else np.asarray(slots)
    o, state[slots] = _token(state[slots].astype(np.float64), q, k, v, g, beta)
    return o


def _chunk(S, q, k, v, g, beta):
    """One chunk of one sequence. S [H, V, K]; q, k, g [H, C, K]; v [H, C, V]; beta [H, C].

    Unrolled over the chunk, the corrections u solve a unit lower triangular system (the UT
    transform). With G the running sum of g, inclusive:
        A[i, j] = b_i sum_d k_i k_j exp(G_i - G_j)   j <  i
        M[i, j] =     sum_d q_i k_j exp(G_i - G_j)   j <= i
        (1 + A) U = b (V - (K exp G) S^T)
        O  = (Q exp G) S^T + M U
        S' = S diag(exp G_C) + U^T (K exp(G_C - G))
    G falls, so every exponent is <= 0: strong decay underflows to the exact limit, 0. Splitting
    exp(G_i - G_j) into exp(G_i) exp(-G_j) would overflow at 88 nat in float32.
    """
    G = np.cumsum(g, axis=1)
    C = G.shape[1]
    order = np.tri(C, dtype=bool)[None, :, :, None]
    decay = np.exp(np.where(order, G[:, :, None] - G[:, None], -np.inf))  # [H, C, C, K]
    A = beta[..., None] * np.einsum("hik,hjk,hijk->hij", k, k, decay) * np.tri(C, k=-1)
    M = np.einsum("hik,hjk,hijk->hij", q, k, decay)
    U = beta[..., None] * (v - (k * np.exp(G)) @ S.swapaxes(1, 2))
    for i in range(1, C):  # forward substitution
        U[:, i] -= (A[:, i, None, :i] @ U[:, :i])[:, 0]
    o = (q * np.exp(G)) @ S.swapaxes(1, 2) + M @ U
    fade = np.exp(G[:, -1:] - G)
    return o, S * np.exp(G[:, -1:]) + U.swapaxes(1, 2) @ (k * fade)


def kda_chunked(q, k, v, g, beta, *, scale=None, initial_state=None, cu_seqlens=None,
                gate="direct", A_log=None, dt_bias=None, lower_bound=-5.0, normalize=False,
                beta_logits=False, chunk=16) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """`kda_prefill` computed `chunk` tokens at a time: the form that fast kernels use.

    Same arguments and results; equal to rounding. Source: report equations 6-9 (Listing 1);
    the derivation is in `_chunk`.
    """
    q, k, v, g, beta = _inputs(q, k, v, g, beta, scale, gate, A_log, dt_bias, lower_bound,
                               normalize, beta_logits)  # fmt: skip
    states = _states(initial_state, cu_seqlens, *v.shape[1:], k.shape[-1])
    o = np.empty_like(v)
    for n, span in spans(len(q), cu_seqlens):
        for start in range(span.start, span.stop, chunk):
            c = slice(start, min(start + chunk, span.stop))
            rows = [x[c].swapaxes(0, 1) for x in (q, k, v, g, beta)]
            out, states[n] = _chunk(states[n], *rows)
            o[c] = out.swapaxes(0, 1)
    return o, states
