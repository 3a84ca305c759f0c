"""Drawing the next token."""

from typing import Any, NamedTuple

import numpy as np

from .logprobs import log_softmax

MASK32 = 0xFFFFFFFF


class Sampling(NamedTuple):
    """What one row is drawn with; the order of csrc/backend/ops.h."""

    temperature: float = 0.0  # 0: argmax
    top_k: int = 0  # 0: all
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # in [0, 1]
    repetition_penalty: float = 1.0  # > 0
    seed: int = 0  # of this row's own generator
    position: int = 0  # which draw of it


def philox(seed: int, index: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 with key = seed and counter = index, both 64 bits: four random words.

    A number depends on (seed, index) alone, so rows and devices need no common order. Source:
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c = [index & MASK32, index >> 32 & MASK32, 0, 0]
    k = [seed & MASK32, seed >> 32 & MASK32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & MASK32, p0 >> 32 ^ c[3] ^ k[1], p0 & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return tuple(c)


def uniform(seed: int, index: int) -> float:
    """Number `index` of a seed: a float in [0, 1) with 53 random bits."""
    high, low, _, _ = philox(seed, index)
    return ((high << 32 | low) >> 11) * 2.0**-53


def _penalize(z, penalty, seen_bits):
    """Lower the ids in a bit set: z / penalty where z > 0, else z * penalty."""
    words = np.asarray(seen_bits).view(np.uint32)
    seen = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(z)].astype(bool)
    return np.where(seen, np.where(z > 0, z / penalty, z * penalty), z)


def draw(z: np.ndarray, s: Sampling) -> int:
    """One token from a row of logits [V] after the penalty; see `sample`."""
    order = np.argsort(-z, kind="stable")  # falling, lower id first on a tie
    if s.temperature == 0:
        return int(order[0])
    p = np.exp(log_softmax(z[order] / s.temperature))
    keep = np.arange(len(p)) < (s.top_k or len(p))
    keep &= np.cumsum(p) - p < s.top_p  # the mass before this one does not suffice
    keep &= p >= s.min_p * p[0]
    mass = np.cumsum(p[keep])
    place = np.searchsorted(mass, uniform(s.seed, s.position) * mass[-1], side="right")
    return int(order[min(place, len(mass) - 1)])


def sample(
    logits: Any, params: Any, *, seen: Any = None, top: int = 0
) -> tuple[np.ndarray, ...]:
    """Draw one token a row.

        z: logits; for ids in `seen`: z > 0 ? z / penalty : z * penalty
        temperature 0: the argmax, lowest id on a tie
        else p = softmax(z / temperature); keep the top_k largest; then the smallest set whose
        mass is >= top_p; then those with p >= min_p * max p; draw by inverse CDF in order of
        falling p (lower id first on a tie) with uniform(seed, position)

    logits [N, V]; params: one Sampling (or tuple in its order) a row; seen: bit sets int32
    [N, ceil(V / 32)] or None. Returns ids int32 [N] (-1: a NaN, +inf, or no finite logit) and
    logprobs [N], the log softmax of the logits as given at those ids; with top > 0 also ids and
    logprobs [N, top] of the best.
    """
    logits = np.asarray(logits, np.float64)
    N = len(logits)
    ids, logprobs = np.full(N, -1, np.int32), np.full(N, np.nan)
    top_ids, top_logprobs = np.zeros((N, top), np.int32), np.full((N, top), np.nan)
    for n, (z, s) in enumerate(zip(logits, params, strict=True)):
        if not np.isfinite(z.max()):
            continue
        s = Sampling(*s)
        ids[n] = draw(z if seen is None else _penalize(z, s.repetition_penalty, seen[n]), s)
        lp = log_softmax(z)
        logprobs[n] = lp[ids[n]]
        top_ids[n] = np.argsort(-lp, kind="stable")[:top]
        top_logprobs[n] = lp[top_ids[n]]
    return (ids, logprobs, top_ids, top_logprobs) if top else (ids, logprobs)
