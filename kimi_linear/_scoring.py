"""Continuations to the core, and its log-probabilities back to their texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._progress import Callback
from .results import Logprobs

if TYPE_CHECKING:
    import numpy as np

    from ._core import Engine

    Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of continuations, one behind the other."""

    lengths: list[int]
    logprobs: "np.ndarray"  # float32 [sum of lengths]
    greedy: "np.ndarray"  # bool

    def sums(self) -> list[tuple[float, bool]]:
        """(float64 sum, greedy) of each continuation."""
        return [(float(p.sum(dtype="float64")), bool(ok.all())) for p, ok in self.parts()]

    def parts(self) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
        """(logprobs, greedy) of each continuation."""
        return self._cut(self.lengths)

    def texts(self, rows: "Sequence[np.ndarray]") -> list[Logprobs]:
        """Of texts that the continuations make up one after the other."""
        parts = self._cut([len(ids) for ids in rows])
        return [Logprobs(ids.tolist(), *part) for ids, part in zip(rows, parts, strict=True)]

    def _cut(self, lengths: list[int]) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
        at = 0
        for n in lengths:
            yield self.logprobs[at : at + n], self.greedy[at : at + n]
            at += n


def scored(
    engine: "Engine",
    seq: int,
    pairs: "Sequence[Pair]",
    room: int,
    callback: Callback | None,
) -> Scores:
    """Log-probabilities of the continuations of (context, continuation), all after a sequence
    that stays as it is, or from the beginning where seq is 0. room: tokens that may be fed."""
    import numpy as np

    for i, (context, ids) in enumerate(pairs):
        if len(context) + len(ids) - 1 > room:
            raise ValueError(
                f"context, continuation: must have at most {room + 1} tokens together "
                f"(max_context), pair {i} has {len(context)} and {len(ids)}"
            )
    contexts = list({id(context): context for context, _ in pairs}.values())
    places = {id(context): i for i, context in enumerate(contexts)}
    rows = [(places[id(context)], ids) for context, ids in pairs]
    logprobs, greedy = engine.score(seq, contexts, rows, callback)
    return Scores([len(ids) for _, ids in pairs], np.asarray(logprobs), np.asarray(greedy))


def continued(
    engine: "Engine",
    seq: int,
    logits: "np.ndarray",
    rows: "Sequence[np.ndarray]",
    room: int,
    callback: Callback | None,
) -> list[tuple[float, bool]]:
    """(float64 sum, greedy) of rows of ids after a sequence whose last logits are given."""
    import numpy as np

    after = log_softmax(logits)
    first = np.array([after[ids[0]] for ids in rows], np.float32)
    likeliest = int(logits.argmax())
    longer = [(ids[:1], ids[1:]) for ids in rows if len(ids) > 1]
    rest = iter(scored(engine, seq, longer, room, callback).parts() if longer else ())
    found = []
    for i, ids in enumerate(rows):
        logprobs, greedy = next(rest) if len(ids) > 1 else (first[:0], first[:0])
        total = np.concatenate([first[i : i + 1], logprobs]).sum(dtype=np.float64)
        found.append((float(total), bool(ids[0] == likeliest and greedy.all())))
    return found


def first_logprob(logits: "np.ndarray", target: int, top: int) -> "tuple[np.ndarray, ...]":
    """(logprobs [1], greedy [1], top_ids [1, top], top_logprobs [1, top]) by the definition."""
    import numpy as np

    z = log_softmax(logits)
    best = np.argsort(-logits, kind="stable")[:top][None]
    greedy = np.array([logits.argmax() == target])
    return z[target : target + 1], greedy, best, z[best]


def log_softmax(logits: "np.ndarray") -> "np.ndarray":
    """float64 [vocab]."""
    import numpy as np

    z = logits.astype(np.float64)
    z -= z.max()
    return z - np.log(np.exp(z).sum())


def windows(
    ids: "np.ndarray", prefix: int, window: int | None, overlap: int
) -> "list[Pair]":
    """(context, continuation) that tell each token of a text once; see
    Inspection.rolling_logprobs."""
    import numpy as np

    first = np.array([prefix], np.int32)
    if window is None:
        if overlap != 0:
            raise ValueError(f"overlap: needs a window, got {overlap!r}")
        return [(first, ids)]
    check_windows(window, overlap)
    found, done = [(first, ids[:window])], window
    while done < len(ids):
        end = min(done + window - overlap, len(ids))
        found.append((ids[end - window - 1 : done], ids[done:end]))
        done = end
    return found


def check_windows(window: Any, overlap: Any) -> None:
    """Raise ValueError or TypeError where they are none."""
    for name, value, low in (("window", window, 1), ("overlap", overlap, 0)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: must be an integer, got {value!r:.60}")
        if value < low:
            raise ValueError(f"{name}: must be at least {low}, got {value}")
    if overlap >= window:
        raise ValueError(f"overlap: must be less than the window ({window}), got {overlap}")
