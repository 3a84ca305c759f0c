"""Sequences packed into one array of tokens."""

from collections.abc import Iterator
from typing import Any

import numpy as np


def spans(tokens: int, cu_seqlens: Any = None) -> Iterator[tuple[int, slice]]:
    """The sequences of a packed batch as (index, slice of tokens); one of all when None.

    cu_seqlens [N+1] integers: sequence n owns tokens cu_seqlens[n] .. cu_seqlens[n+1] - 1, and
    may be empty. Raises ValueError unless it rises from 0 to `tokens`.
    """
    cu = np.array([0, tokens]) if cu_seqlens is None else np.asarray(cu_seqlens)
    if cu.ndim != 1 or len(cu) < 1 or cu[0] != 0 or cu[-1] != tokens or np.any(np.diff(cu) < 0):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, got {cu.tolist()}")
    for n in range(len(cu) - 1):
        yield n, slice(int(cu[n]), int(cu[n + 1]))


def count(cu_seqlens: Any = None) -> int:
    """Number of sequences."""
    return 1 if cu_seqlens is None else len(np.asarray(cu_seqlens)) - 1
