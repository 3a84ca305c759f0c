"""The synthetic tasks of the Kimi Linear report (section 5.1): palindromes, MQAR, stacks.

Arrays to train and to judge models of a few layers with: `inputs` int64 [n, length] and
`labels` of the same shape, the token to predict at each position or IGNORE. What the report
leaves open (vocabulary, numbers of pairs, share of pops) is an argument here with a default of
ours.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..model import Model

__all__ = ["IGNORE", "accuracy", "mqar", "palindrome", "stack"]

IGNORE = -100
PAD, SEPARATOR, PUSH, POP = 0, 1, 2, 3
N_SPECIAL = 4
Arrays = tuple[np.ndarray, np.ndarray]


def palindrome(n: int, length: int, *, vocab: int = 128, seed: int = 0) -> Arrays:
    """x1 .. xk <sep> xk .. x1, where each token of the second half but the last predicts the
    next one; k = (length - 1) // 2, and an even length ends in a pad."""
    k = (length - 1) // 2
    _check(length, vocab, k >= 2, "length: must be at least 5")
    r = np.random.default_rng(seed)
    x = r.integers(N_SPECIAL, vocab, (n, k))
    inputs = np.full((n, length), PAD, np.int64)
    inputs[:, :k], inputs[:, k], inputs[:, k + 1 : 2 * k + 1] = x, SEPARATOR, x[:, ::-1]
    labels = np.full_like(inputs, IGNORE)
    labels[:, k + 1 : 2 * k] = inputs[:, k + 2 : 2 * k + 1]
    return inputs, labels


def mqar(
    n: int,
    length: int,
    *,
    pairs: int | None = None,
    queries: int | None = None,
    vocab: int = 8192,
    seed: int = 0,
) -> Arrays:
    """k1 v1 k2 v2 .. <sep> q1 q2 .., where each query predicts its key's value, which is not
    in the input. Keys are of the lower half of the vocabulary, each once; values of the upper.

    pairs: length // 4 by default; queries: what is left, at most pairs, all different.
    """
    pairs = length // 4 if pairs is None else pairs
    room = length - 2 * pairs - 1
    queries = min(pairs, room) if queries is None else queries
    half = (N_SPECIAL + vocab) // 2
    fits = 1 <= queries <= pairs and queries <= room and pairs <= half - N_SPECIAL
    _check(length, vocab, fits, f"pairs, queries: {pairs} and {queries} must fit")
    r = np.random.default_rng(seed)
    keys = r.permuted(np.tile(np.arange(N_SPECIAL, half), (n, 1)), axis=1)[:, :pairs]
    values = r.integers(half, vocab, (n, pairs))
    asked = r.permuted(np.tile(np.arange(pairs), (n, 1)), axis=1)[:, :queries]
    inputs = np.full((n, length), PAD, np.int64)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    inputs[:, 2 * pairs] = SEPARATOR
    place = slice(2 * pairs + 1, 2 * pairs + 1 + queries)
    labels = np.full_like(inputs, IGNORE)
    inputs[:, place] = np.take_along_axis(keys, asked, axis=1)
    labels[:, place] = np.take_along_axis(values, asked, axis=1)
    return inputs, labels


def stack(
    n: int,
    length: int,
    *,
    stacks: int = 64,
    vocab: int = 128,
    p_push: float = 0.5,
    seed: int = 0,
) -> Arrays:
    """<push> id element and <pop> id element in turn, where the id of a pop predicts the
    element last pushed on that stack and still there; an empty stack is never popped."""
    first = N_SPECIAL + stacks  # of the elements
    _check(length, vocab, length >= 6 and first < vocab, f"vocab: must be above {first}")
    r = np.random.default_rng(seed)
    inputs = np.full((n, length), PAD, np.int64)
    labels = np.full_like(inputs, IGNORE)
    for row, target in zip(inputs, labels, strict=True):
        held: list[list[int]] = [[] for _ in range(stacks)]
        for at in range(0, length - 2, 3):
            which = int(r.integers(stacks))
            if not held[which] or r.random() < p_push:
                held[which].append(int(r.integers(first, vocab)))
                row[at : at + 3] = PUSH, N_SPECIAL + which, held[which][-1]
            else:
                row[at : at + 3] = POP, N_SPECIAL + which, held[which].pop()
                target[at + 1] = row[at + 2]
    return inputs, labels


def _check(length: int, vocab: int, fits: bool, message: str) -> None:
    if vocab <= N_SPECIAL + 1:
        raise ValueError(f"vocab: must be above {N_SPECIAL + 1}, got {vocab}")
    if not fits:
        raise ValueError(f"{message}, got length {length} and vocab {vocab}")


def accuracy(model: "Model", inputs: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(share of the labels that are the model's likeliest token, share of the rows in which all
    are). Memory for the logits of one row."""
    right, rows = [], []
    for ids, target in zip(inputs, labels, strict=True):
        asked = target != IGNORE
        if asked.any():
            found = model.logits(ids, last=False).argmax(axis=1)[asked] == target[asked]
            right.append(found)
            rows.append(found.all())
    if not rows:
        raise ValueError("labels: must hold a label, all are IGNORE")
    return float(np.concatenate(right).mean()), float(np.mean(rows))
