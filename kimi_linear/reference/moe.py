"""Mixture of experts: the router, and the experts it chooses."""

from typing import Any

import numpy as np

from .kda import sigmoid
from .linear import dense
from .short_conv import silu


def _softmax(x):
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def _best(values, n):
    """Ids of the n largest of the last axis, best first, lower id on a tie."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :n]


def moe_route(logits: Any, bias: Any, *, top_k: int, scaling: float, renormalize: bool = True,
              score: str = "sigmoid", groups: int = 1,
              top_groups: int = 1) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Choose top_k experts for each token.

        s = sigmoid(logits) or softmax(logits);   c = s + bias
        ids = the top_k largest c, best first, lower id on a tie; with groups > 1 only among
              the top_groups groups whose two best c have the largest sums
        weights = s[ids], renormalised to sum 1 if asked (+ 1e-20), times scaling

    The bias steers the choice alone; it does not enter the weights (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2). logits [T, E]; bias [E] or None. Returns ids int32 and weights
    [T, top_k].
    """
    logits = np.asarray(logits, np.float64)
    if score not in ("sigmoid", "softmax"):
        raise ValueError(f"score must be 'sigmoid' or 'softmax', got {score!r}")
    s = sigmoid(logits) if score == "sigmoid" else _softmax(logits)
    c = s if bias is None else s + np.asarray(bias, np.float64)
    if groups > 1:
        T, E = c.shape
        grouped = c.reshape(T, groups, E // groups)
        totals = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        allowed = np.zeros((T, groups, 1), bool)
        np.put_along_axis(allowed, _best(totals, top_groups)[..., None], True, axis=1)
        c = np.where(allowed, grouped, -np.inf).reshape(T, E)
    ids = _best(c, top_k)
    weights = np.take_along_axis(s, ids, axis=-1)
    if renormalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return ids.astype(np.int32), weights * scaling


def mlp(x: Any, w1: Any, w3: Any, w2: Any) -> np.ndarray:
    """A gated feed-forward layer (SwiGLU): (silu(x w1^T) * (x w3^T)) w2^T.

    x [T, D]; w1 (gate), w3 (up) [I, D]; w2 (down) [D, I]. Source: arXiv 2002.05202.
    """
    x, w1, w3, w2 = np.asarray(x, np.float64), dense(w1), dense(w3), dense(w2)
    return (silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def moe_experts(x: Any, ids: Any, weights: Any, w1: Any, w3: Any, w2: Any, *,
                shared: Any = None) -> np.ndarray:  # fmt: skip
    """out[t] = sum_j weights[t, j] * mlp(x[t]; expert ids[t, j])  +  mlp(x[t]; shared).

    x [T, D]; ids, weights [T, top_k]; w1 (gate), w3 (up) [E, I, D]; w2 (down) [E, D, I];
    shared: None or the (w1, w3, w2) of the expert that every token passes, [I', D] and
    [D, I'], which has no weight. Returns [T, D].
    """
    x, ids = np.asarray(x, np.float64), np.asarray(ids)
    weights = np.asarray(weights, np.float64)
    w1, w3, w2 = dense(w1), dense(w3), dense(w2)
    out = np.zeros_like(x) if shared is None else mlp(x, *shared)
    for e in np.unique(ids):
        token, place = np.nonzero(ids == e)
        y = weights[token, place, None] * mlp(x[token], w1[e], w3[e], w2[e])
        np.add.at(out, token, y)
    return out
