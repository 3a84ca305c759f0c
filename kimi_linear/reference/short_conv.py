"""The short causal convolution before KDA's queries, keys and values."""

from typing import Any

import numpy as np

from .kda import sigmoid
from .ragged import count, spans


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def short_conv(x: Any, weight: Any, *, state: Any = None, cu_seqlens: Any = None,
               activation: str | None = "silu") -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Depthwise causal convolution over time, one filter of W taps a channel.

        y[t, c] = act( sum_j weight[c, j] * x[t - (W-1) + j, c] )

    weight[c, W-1] multiplies the current token. x [T, C]; weight [C, W]; state [N, C, W-1], the
    last W-1 inputs of each sequence, oldest first (None: zeros); activation "silu" or None.
    Returns y [T, C] and the new state, leaving `state` as it was. Raises ValueError for another
    activation. Source: report section 4; flash-linear-attention, fla/modules/convolution.py.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    C, W = weight.shape
    shape = (count(cu_seqlens), C, W - 1)
    new_state = np.zeros(shape) if state is None else np.array(state, np.float64)
    y = np.empty_like(x)
    for n, span in spans(len(x), cu_seqlens):
        window = np.concatenate([new_state[n].T, x[span]])  # [W-1 + tokens, C]
        T = span.stop - span.start
        y[span] = sum(weight[:, j] * window[j : j + T] for j in range(W))
        new_state[n] = window[T:].T
    return (silu(y) if activation == "silu" else y), new_state
