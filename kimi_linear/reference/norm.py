"""Root-mean-square norms."""

from typing import Any

import numpy as np

from .kda import sigmoid


def rms_norm(x: Any, weight: Any, *, eps: float, residual: Any = None) -> Any:
    """r / sqrt(mean(r^2) + eps) * weight over the last axis, with r = x, or residual + x.

    x, residual [..., D]; weight [D]. Returns y [..., D]; with a residual (y, r), for r is what
    the next layer adds to. Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    r = x if residual is None else x + residual
    y = r / np.sqrt(np.mean(r * r, axis=-1, keepdims=True) + eps) * weight
    return y if residual is None else (y, r)


def gated_rms_norm(x: Any, z: Any, weight: Any, *, eps: float = 1e-5) -> np.ndarray:
    """KDA's output gate: rms_norm(x) * sigmoid(z), the norm over each head's channels.

    x, z [..., D]; weight [D], shared by the heads. The gate is a sigmoid, not a SiLU (report,
    table 1), and comes after the norm.
    """
    return rms_norm(x, weight, eps=eps) * sigmoid(z)
