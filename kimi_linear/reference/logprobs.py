"""Log-probabilities of given tokens."""

from typing import Any

import numpy as np

from .linear import dense


def log_softmax(z: np.ndarray) -> np.ndarray:
    """z - log(sum(exp(z))) over the last axis."""
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def token_logprobs(hidden: Any, lm_head: Any, targets: Any, *,
                   top: int = 0) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Log-probabilities of the tokens that follow, one position at a time.

        z = hidden lm_head^T;   logprobs[t] = z[targets[t]] - logsumexp(z)

    hidden [T, D]; lm_head [rows, D]; targets [T] ids, or -1 for a position that asks for none
    (NaN, not greedy). Returns logprobs [T] and greedy [T] bool, whether the target is the
    argmax (lowest id on a tie); with top > 0 also ids int32 and logprobs [T, top] of the best
    tokens, best first, lower id on a tie.
    """
    hidden, lm_head = np.asarray(hidden, np.float64), dense(lm_head)
    targets = np.asarray(targets)
    T = len(targets)
    logprobs, greedy = np.full(T, np.nan), np.zeros(T, bool)
    top_ids, top_logprobs = np.zeros((T, top), np.int32), np.zeros((T, top))
    for t, target in enumerate(targets.tolist()):
        lp = log_softmax(lm_head @ hidden[t])
        if target >= 0:
            logprobs[t], greedy[t] = lp[target], np.argmax(lp) == target
        top_ids[t] = np.argsort(-lp, kind="stable")[:top]
        top_logprobs[t] = lp[top_ids[t]]
    return (logprobs, greedy, top_ids, top_logprobs) if top else (logprobs, greedy)
