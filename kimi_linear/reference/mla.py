"""Multi-head latent attention without positional encoding, plain and absorbed.

DeepSeek-V2 (arXiv 2405.04434), section 2.1, with the rotation left out (Kimi Linear report,
section 4): the `rope` channels are ordinary key channels that all heads share. What is kept of
a token is its latent [c | k_pe]: `rank` normalised channels, from which keys and values are
made by w_kv_b, and `rope` raw ones.
"""

from typing import Any

import numpy as np

from .linear import round_bf16, round_e4m3
from .ragged import spans

GROUP = 128  # channels of an 8-bit latent that share a scale


def _dims(q, latent, w_kv_b):
    """(rank, nope) from the shapes of the three."""
    rank = w_kv_b.shape[2]
    return rank, q.shape[2] - (latent.shape[-1] - rank)


def _softmax_causal(scores, first):
    """Softmax over the last axis of scores [H, T, L]; row i sees positions 0 .. first + i."""
    H, T, L = scores.shape
    seen = np.arange(L)[None, :] <= first + np.arange(T)[:, None]
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def attend_plain(q, latent, w_kv_b, scale, first) -> np.ndarray:
    """Attention with keys and values made from the latents: cheap per pair, for prefill.

        k[h] = [W_UK[h] c | k_pe],  v[h] = W_UV[h] c,  o[h] = softmax(scale q[h] k[h]^T) v[h]

    q [T, H, nope+rope]; latent [L, rank+rope]; w_kv_b [H, nope+V, rank] = [W_UK; W_UV]; query
    i stands at position first + i. Returns [T, H, V].
    """
    rank, nope = _dims(q, latent, w_kv_b)
    c, k_pe = latent[:, :rank], latent[:, rank:]
    kv = np.einsum("hor,lr->hlo", w_kv_b, c)
    k_pe = np.broadcast_to(k_pe, (len(w_kv_b), *k_pe.shape))
    k = np.concatenate([kv[..., :nope], k_pe], axis=-1)
    p = _softmax_causal(scale * np.einsum("thd,hld->htl", q, k), first)
    return np.einsum("htl,hlv->thv", p, kv[..., nope:])


def attend_absorbed(q, latent, w_kv_b, scale, first) -> np.ndarray:
    """The same with w_kv_b moved to the query and the result: one shared key head, for decode.

        q'[h] = [W_UK[h]^T q_nope[h] | q_pe[h]],  x[h] = softmax(scale q'[h] latent^T) c
        o[h]  = W_UV[h] x[h]

    Arguments and result as in `attend_plain`; the latents are read once for all heads.
    """
    rank, nope = _dims(q, latent, w_kv_b)
    absorbed = np.einsum("thn,hnr->thr", q[..., :nope], w_kv_b[:, :nope])
    query = np.concatenate([absorbed, q[..., nope:]], axis=-1)
    p = _softmax_causal(scale * np.einsum("thd,ld->htl", query, latent), first)
    context = np.einsum("htl,lr->thr", p, latent[:, :rank])
    return np.einsum("thr,hvr->thv", context, w_kv_b[:, nope:])


def _parts(rank, rope):
    """Bytes of a row of 8-bit latents before its rope channels, its scales, and its end."""
    rope_at = -(-rank // 16) * 16
    scales_at = rope_at + -(-2 * rope // 16) * 16
    return rope_at, scales_at, scales_at + -(-4 * -(-rank // GROUP) // 16) * 16


def pack_latents(latents: Any, rank: int) -> np.ndarray:
    """Rows [..., rank+rope] as csrc/base/latents.h stores them, uint8 [..., row bytes].

    The first `rank` channels become e4m3 numbers q with c ~ q * scale, where scale is the
    smallest power of two, 2**-100 at the least, with max|c| <= 448 * scale over 128 of them; NaN
    where that is not finite or beyond 448 * 128. |c - q * scale| <= max(|c| / 16, scale / 1024).
    The others become bfloat16.
    """
    latents = np.asarray(latents, np.float32)
    lead, rope = latents.shape[:-1], latents.shape[-1] - rank
    rope_at, scales_at, end = _parts(rank, rope)
    padded = np.pad(latents[..., :rank], [(0, 0)] * len(lead) + [(0, -rank % GROUP)])
    groups = padded.reshape(*lead, -(-rank // GROUP), GROUP)
    most = np.abs(groups).max(axis=-1)
    fits = most <= 448 * 128
    fraction, exponent = np.frexp(np.where(fits, most, 1))
    exponent = np.maximum(exponent - 9 + (fraction > 0.875), -100)
    scales = np.where(fits, np.ldexp(np.float32(1), exponent), np.nan).astype(np.float32)
    ratios = np.where(fits[..., None], groups / scales[..., None], 0)
    codes = _e4m3_bits(round_e4m3(ratios)).reshape(padded.shape)[..., :rank]
    out = np.zeros((*lead, end), np.uint8)
    out[..., :rank] = codes
    halves = (round_bf16(latents[..., rank:]).view(np.uint32) >> 16).astype("<u2")
    out[..., rope_at : rope_at + 2 * rope] = np.ascontiguousarray(halves).view(np.uint8)
    out[..., scales_at : scales_at + 4 * scales.shape[-1]] = scales.astype("<f4").view(np.uint8)
    return out


def unpack_latents(rows: Any, rank: int, rope: int) -> np.ndarray:
    """What rows of 8-bit latents, uint8 [..., row bytes], hold: float32 [..., rank+rope], every
    value a bfloat16. Raises ValueError for rows of another length."""
    rows = np.asarray(rows, np.uint8)
    rope_at, scales_at, end = _parts(rank, rope)
    if rows.shape[-1] != end:
        raise ValueError(f"rows must have {end} bytes, got {rows.shape[-1]}")
    n_groups = -(-rank // GROUP)
    scales = np.ascontiguousarray(rows[..., scales_at : scales_at + 4 * n_groups]).view("<f4")
    size = (rows[..., :rank] & 127).astype(np.int32)
    q = np.where(size < 8, np.ldexp(size, -9), np.ldexp(8 + size % 8, size // 8 - 10))
    q = np.where(rows[..., :rank] > 127, -q, q).astype(np.float32)
    c = q * np.repeat(scales, GROUP, axis=-1)[..., :rank]
    halves = np.ascontiguousarray(rows[..., rope_at : rope_at + 2 * rope]).view("<u2")
    k_pe = (halves.astype(np.uint32) << 16).view(np.float32)
    return np.concatenate([c, k_pe], axis=-1)


def _e4m3_bits(x):
    """The bytes of e4m3 numbers that are given as float32."""
    fraction, exponent = np.frexp(np.abs(x))
    normal = np.abs(x) >= 2**-6
    code = np.where(normal, (exponent + 6) * 8 + fraction * 16 - 8, np.abs(x) * 512)
    return (code.astype(np.uint8) | np.signbit(x) * np.uint8(128)).astype(np.uint8)


def _float64(q, w_kv_b, scale):
    q, w_kv_b = np.asarray(q, np.float64), np.asarray(w_kv_b, np.float64)
    return q, w_kv_b, q.shape[2] ** -0.5 if scale is None else scale


def _past_of(past, n, latent):
    """The earlier latents of sequence n: past is None, an array (one sequence), or a list."""
    past = past[n] if isinstance(past, list | tuple) else past
    return latent[:0] if past is None else np.asarray(past, np.float64)


def mla_prefill(q: Any, latent: Any, w_kv_b: Any, *, cu_seqlens: Any = None, past: Any = None,
                scale: float | None = None) -> np.ndarray:  # fmt: skip
    """Causal attention of new tokens over themselves and their past, in the plain form.

    q [T, H, nope+rope]; latent [T, rank+rope], normalised part first; w_kv_b
    [H, nope+V, rank]; past: latents before these, [P, rank+rope] of the only sequence or a list
    with such an array or None for each; scale: None for (nope+rope)**-0.5. Returns [T, H, V].
    """
    q, w_kv_b, scale = _float64(q, w_kv_b, scale)
    latent = np.asarray(latent, np.float64)
    out = np.empty((*q.shape[:2], w_kv_b.shape[1] - _dims(q, latent, w_kv_b)[1]))
    for n, span in spans(len(q), cu_seqlens):
        if span.start == span.stop:
            continue
        before = _past_of(past, n, latent)
        rows = np.concatenate([before, latent[span]])
        out[span] = attend_plain(q[span], rows, w_kv_b, scale, len(before))
    return out


def mla_decode(q: Any, pages: Any, block_table: Any, lengths: Any, w_kv_b: Any, *,
               scale: float | None = None) -> np.ndarray:  # fmt: skip
    """One token for each of N sequences over paged latents, in the absorbed form.

    q [N, H, nope+rope]; pages [P, 64, rank+rope]; block_table [N, B]: position p of sequence n
    is row p % 64 of page block_table[n, p // 64]; lengths [N]: context including this token.
    Rows and table entries past a sequence's length are never looked at. Returns [N, H, V].
    """
    q, w_kv_b, scale = _float64(q, w_kv_b, scale)
    pages = np.asarray(pages)
    out = np.empty((*q.shape[:2], w_kv_b.shape[1] - _dims(q, pages, w_kv_b)[1]))
    for n, length in enumerate(np.asarray(lengths).tolist()):
        used = np.asarray(block_table)[n, : -(-length // pages.shape[1])]
        rows = pages[used].astype(np.float64).reshape(-1, pages.shape[2])[:length]
        out[n] = attend_absorbed(q[n : n + 1], rows, w_kv_b, scale, length - 1)[0]
    return out
