"""Logits of the same tokens by steps of one, by one call and by several: the case "steps" of
bench_model.py. A step has kernels of its own, and so has a prompt."""

from typing import TYPE_CHECKING

import numpy as np
from kimi_linear._held import HeldSequence
from kimi_linear.reference import log_softmax

import kimi_linear as kl

if TYPE_CHECKING:
    from kimi_linear._core import Engine


def at_once(engine: "Engine", ids: list[int], seq: int = 0) -> np.ndarray:
    """Logits [token, vocab] of one call, which goes on from a sequence or starts with none."""
    return np.asarray(engine.logits(seq, ids, False, None))


def in_pieces(engine: "Engine", seq: int, ids: list[int], n: int) -> np.ndarray:
    """The same of a fork of a sequence that reads n tokens a call."""
    with HeldSequence(engine, engine.seq_fork, (seq,)) as fork:
        pieces = [ids[at : at + n] for at in range(0, len(ids), n)]
        return np.concatenate([at_once(engine, piece, fork.seq) for piece in pieces])


def in_steps(engine: "Engine", seq: int, rows: list[list[int]]) -> np.ndarray:
    """Logits [row, token, vocab] of forks of a sequence that read a token each in a step."""
    forks = [HeldSequence(engine, engine.seq_fork, (seq,)) for _ in rows]
    found = [np.array(engine.step([(f.seq, [i]) for f, i in zip(forks, ids, strict=True)]))
             for ids in zip(*rows, strict=True)]  # fmt: skip
    for fork in forks:
        fork.release()
    return np.stack(found, axis=1)


def distance(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Relative RMS of all logits and by tokens, and the share of tokens after which the same one
    is the most likely."""
    pairs = zip(*(z.reshape(-1, z.shape[-1]) for z in (got, want)), strict=True)
    squares = np.array([[np.sum(np.square(x, dtype=np.float64)) for x in (g - w, w)]
                        for g, w in pairs])  # fmt: skip
    far, size = squares.sum(axis=0)
    each = np.sqrt(squares[:, 0] / squares[:, 1])
    return {
        "rms": float(np.sqrt(far / size)),
        "median": float(np.median(each)),
        "worst": float(each.max()),
        "same_greedy": float(np.mean(got.argmax(-1) == want.argmax(-1))),
    }


def of_recorded(logits: np.ndarray, drawn: kl.Completion) -> float:
    """How far the log-probabilities of drawn tokens are from those in logits; infinite where one
    is not the most likely there."""
    if logits.argmax(axis=1).tolist() != drawn.token_ids:
        return float("inf")
    said = np.array([t.logprob for t in drawn.logprobs or ()])
    return float(np.abs(said - log_softmax(logits.astype(np.float64)).max(axis=1)).max())
