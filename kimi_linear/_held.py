"""What a state holds: a sequence of an engine, and what was read into it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._core import HeldSequence
from ._files import quote
from ._progress import Callback
from .errors import NumericalError

if TYPE_CHECKING:
    import numpy as np

    from . import _core


@dataclass(frozen=True)
class Held:
    """What a state is at one moment; replaced as a whole, so that nothing is ever half done."""

    sequence: HeldSequence
    ids: "np.ndarray"  # int32 [position]
    logits: "np.ndarray | None"  # float32 [vocab] after the last token
    awaits_answer: bool  # messages were fed last


def engine_of(model: Any) -> "_core.Engine":
    """Raise TypeError where this is no Model, ValueError where it is closed."""
    if not hasattr(model, "_open_engine"):
        raise TypeError(f"model: must be a kimi_linear.Model, got {quote(model)}")
    return model._open_engine()


def fork_of(held: Held) -> HeldSequence:
    """A copy of its sequence."""
    engine = held.sequence.engine
    return HeldSequence(engine, engine.seq_fork, (held.sequence.seq,))


def is_untouched(held: Held) -> bool:
    """Whether a call that failed did so before it changed the sequence."""
    try:
        return held.sequence.engine.seq_length(held.sequence.seq) == len(held.ids)
    except ValueError:  # a step was interrupted, or the model closed
        return False


def catch_up(draft: HeldSequence, held: Held, new: "np.ndarray") -> "np.ndarray | None":
    """Read what of the new tokens a generation has not: the last one drawn, or a prompt that no
    token followed. The logits after it."""
    rest = new[draft.engine.seq_length(draft.seq) - len(held.ids) :]
    return logits_after(draft, rest, None) if len(rest) else held.logits


def logits_after(
    sequence: HeldSequence, ids: "np.ndarray", callback: Callback | None
) -> "np.ndarray":
    """Feed a sequence; float32 [vocab] after the last token. Raises NumericalError where they are
    not finite."""
    import numpy as np

    logits = np.asarray(sequence.engine.logits(sequence.seq, ids, True, callback)).reshape(-1)
    if not np.isfinite(logits).all():
        n = sequence.engine.seq_length(sequence.seq)
        raise NumericalError(f"state: logits after {n} tokens must be finite")
    return logits
