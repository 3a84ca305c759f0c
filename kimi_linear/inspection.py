"""What a model says of a text that is given to it: log-probabilities, logits, residual streams."""

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._core import HeldSequence
from ._files import quote
from ._progress import Callback, Progress
from ._prompts import GetTokenizer, prompt_rows, row_ids
from ._sampling import check_top
from ._scoring import Scores, scored, windows
from .config import KimiLinearConfig
from .memory import MemoryPlan
from .results import Logprobs
from .tokenizer import check_id

if TYPE_CHECKING:
    import numpy as np

    from . import _core

SHOWN_PROMPT = 8192  # tokens from which a prompt's progress is shown unasked
STREAM_BLOCK = 4096  # tokens of a part of iter_hidden: 38 MB a layer of the 48B

_alive: "weakref.WeakSet[Inspection]" = weakref.WeakSet()


def _forget_other_threads() -> None:
    """After os.fork: none of them is there to end its call."""
    for model in _alive:
        model._calls = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


class Inspection:
    """The part of `Model` that reads and does not write.

    A text is read in steps of `plan.step_tokens`, and of each only what was asked for leaves the
    device: beyond the plan nothing is taken that grows with the text but its ids and the result.
    """

    config: KimiLinearConfig
    plan: MemoryPlan

    if TYPE_CHECKING:  # of Model

        def _open_engine(self) -> "_core.Engine": ...
        def _get_tokenizer(self) -> Any: ...

    def __init__(self) -> None:
        self._calls = threading.RLock()  # there are sequences for one of them at a time
        _alive.add(self)

    @contextmanager
    def _turn(
        self, progress: bool | Callback | None, rows: "Sequence[np.ndarray]"
    ) -> "Iterator[Callback | None]":
        """A call's turn among those of other threads, and what is told of its prompt."""
        with self._calls, self._prompt_progress(progress, rows) as callback:
            yield callback

    @staticmethod
    def _prompt_progress(
        progress: bool | Callback | None, rows: "Sequence[np.ndarray]"
    ) -> Progress:
        if progress is None and sum(map(len, rows)) < SHOWN_PROMPT:
            progress = False
        return Progress(progress, "prompt", "tok")

    # ---- log-probabilities ---------------------------------------------------------------

    def logprobs(
        self, prompt: Any, *, top: int = 0, progress: bool | Callback | None = None
    ) -> Logprobs:
        """log p(t+1 | <= t) of every token but the first.

        prompt: str or token ids. top: how many of the best alternatives to report, 0..256.
        progress: callable(done, total) over tokens, True, False or None, as in `generate`.

        Raises NumericalError where one is not finite, KeyboardInterrupt.
        """
        import numpy as np

        ids = self._one_row(prompt, "prompt")
        top = check_top(top, self.config.vocab_size)
        engine = self._open_engine()
        with self._turn(progress, [ids]) as callback:
            if len(ids) == 1:
                parts: tuple[Any, ...] = (np.empty(0), np.empty(0), *(np.empty((0, top)),) * 2)
            else:
                parts = engine.logprobs(0, ids[:-1], ids[1:], top, callback)
        return Logprobs.joined(ids.tolist(), [parts])

    def score(
        self, context: Any, continuation: Any, *, progress: bool | Callback | None = None
    ) -> tuple[float, bool] | list[tuple[float, bool]]:
        """log p(continuation | context) as a float64 sum, and whether it is the greedy one.

        context, continuation: str or token ids; each text is encoded by itself. A list of
        continuations gives a list of results: see `score_pairs`.
        """
        first = self._one_row(context, "context")
        rows, is_batch = prompt_rows(
            continuation, self._get_tokenizer, self.config.vocab_size, "continuation"
        )
        found = self._scores([(first, row) for row in rows], progress).sums()
        return found if is_batch else found[0]

    def score_pairs(
        self, pairs: Sequence[tuple[Any, Any]], *, progress: bool | Callback | None = None
    ) -> list[tuple[float, bool]]:
        """`score` of each (context, continuation), in their order, to the same bits on a CPU.

        What contexts have in common is read once, up to the last multiple of 64 tokens (one
        prompt of examples for many questions, one question for many answers), and so are
        continuations that differ in their last token alone. The rest is read in batches of as
        many as `max_batch` sequences and the pages allow.

        pairs: of str or token ids. A context that is the same object, or an equal str, is encoded
        and held once. progress: callable(done, total) over the tokens of all pairs.

        Raises ValueError or TypeError naming the pair, NumericalError naming it where a
        log-probability is not finite, OutOfMemory where other sequences leave no room.
        """
        if not isinstance(pairs, Iterable) or isinstance(pairs, str):
            raise TypeError(
                f"pairs: must be a list of (context, continuation), got {quote(pairs)}"
            )
        known: dict[Any, np.ndarray] = {}
        pairs, rows = list(pairs), []  # what contexts are told apart by must not die meanwhile
        for i, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(
                    f"pairs[{i}]: must be (context, continuation), got {type(pair).__name__}"
                )
            context, continuation = pair
            key = context if isinstance(context, str) else id(context)
            if key not in known:
                known[key] = self._one_row(context, f"pairs[{i}], context")
            rows.append((known[key], self._one_row(continuation, f"pairs[{i}], continuation")))
        return self._scores(rows, progress).sums() if rows else []

    def rolling_logprobs(
        self,
        prompt: Any,
        *,
        prefix: int | None = None,
        window: int | None = None,
        overlap: int = 0,
        progress: bool | Callback | None = None,
    ) -> Logprobs | list[Logprobs]:
        """log p of every token, the first one's after `prefix`; `.total` is their sum.

        prompt: str or token ids, or a list of such, which are read in batches. prefix=None: the
        tokenizer's first token of a text. window=None: each token is told by all before it.

        window: read as by a model that takes no more than so many tokens at once, each token told
        once, `overlap` tokens of the window before given again to each window but the first: the
        rolling log-likelihood of lm-evaluation-harness (get_rolling_token_windows) with
        max_seq_len=window, context_len=overlap + 1, to compare with figures of other models.
        """
        rows, is_batch = prompt_rows(prompt, self._get_tokenizer, self.config.vocab_size)
        if prefix is None:
            prefix = self._get_tokenizer().bos_id
        prefix = check_id(prefix, self.config.vocab_size, "prefix")
        pairs = [p for row in rows for p in windows(row, prefix, window, overlap)]
        most, longest = self.plan.max_context, max(map(len, rows))
        if window is None and longest > most:
            raise ValueError(
                f"prompt: must have at most {most} tokens (max_context), has {longest}; "
                f"a window reads longer ones"
            )
        if window is not None and min(window, longest) > most:
            raise ValueError(
                f"window: must be at most {most} (max_context) for {longest} tokens, got {window}"
            )
        found = self._scores(pairs, progress).texts(rows)
        return found if is_batch else found[0]

    def _scores(
        self,
        pairs: "Sequence[tuple[np.ndarray, np.ndarray]]",
        progress: bool | Callback | None,
    ) -> Scores:
        with self._turn(progress, [ids for pair in pairs for ids in pair]) as callback:
            return scored(self._open_engine(), 0, pairs, self.plan.max_context, callback)

    # ---- logits and streams --------------------------------------------------------------

    def logits(
        self, prompt: Any, *, last: bool = True, progress: bool | Callback | None = None
    ) -> "np.ndarray":
        """float32 [vocab] after the last token, or with last=False [T, vocab] after each."""
        import numpy as np

        ids = self._one_row(prompt, "prompt")
        with self._turn(progress, [ids]) as callback:
            logits = np.asarray(self._open_engine().logits(0, ids, bool(last), callback))
        return logits.reshape(-1) if last else logits

    def hidden(
        self,
        prompt: Any,
        *,
        layers: Sequence[int] | None = None,
        progress: bool | Callback | None = None,
    ) -> "dict[int, np.ndarray]":
        """The residual stream after layers: {layer: float32 [T, hidden]}.

        layers: counted from 0; by default the first, the middle and the last. Of a long text the
        result is large: `iter_hidden` gives it in parts.
        """
        wanted = self._layers(layers)
        ids = self._one_row(prompt, "prompt")
        with self._turn(progress, [ids]) as callback:
            return streams(self._open_engine(), 0, ids, wanted, callback)

    def iter_hidden(
        self, prompt: Any, *, layers: Sequence[int] | None = None
    ) -> "Iterator[tuple[int, dict[int, np.ndarray]]]":
        """The streams of `hidden` part by part: (first token, {layer: float32 [n, hidden]}).

        For texts whose streams no memory holds: a part has at most 4,096 tokens, and together
        they have the bits of the whole. Takes a sequence (`max_batch`) until the last part, or
        until the iterator is closed or forgotten.
        """
        wanted = self._layers(layers)
        return self._parts(self._one_row(prompt, "prompt"), wanted)

    def _parts(
        self, ids: "np.ndarray", layers: list[int]
    ) -> "Iterator[tuple[int, dict[int, np.ndarray]]]":
        engine = self._open_engine()
        with HeldSequence(engine, engine.seq_new, ()) as sequence:
            for first in range(0, len(ids), STREAM_BLOCK):
                part = ids[first : first + STREAM_BLOCK]
                yield first, streams(engine, sequence.seq, part, layers, None)

    def _layers(self, layers: Sequence[int] | None) -> list[int]:
        n = self.config.num_hidden_layers
        if layers is None:
            layers = sorted({0, n // 2, n - 1})
        if not isinstance(layers, Iterable):
            raise TypeError(f"layers: must be a list of integers, got {quote(layers)}")
        return list(dict.fromkeys(check_id(layer, n, "layers") for layer in layers))

    def _one_row(self, prompt: Any, label: str) -> "np.ndarray":
        get: GetTokenizer = self._get_tokenizer
        ids = row_ids(prompt, get, self.config.vocab_size, label)
        if len(ids) > self.plan.max_context:
            raise ValueError(
                f"{label}: must have at most {self.plan.max_context} tokens (max_context), "
                f"has {len(ids)}"
            )
        return ids


def streams(
    engine: "_core.Engine",
    seq: int,
    ids: "np.ndarray",
    layers: list[int],
    callback: Callback | None,
) -> "dict[int, np.ndarray]":
    """{layer: float32 [T, hidden]} of tokens that a sequence goes on with."""
    import numpy as np

    found = engine.hidden(seq, ids, layers, callback)
    return {layer: np.asarray(found[layer]) for layer in layers}
