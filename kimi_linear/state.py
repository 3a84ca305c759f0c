"""Sequences as values: read once, forked, continued, scored, kept in files."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from . import _state_file
from ._core import HeldSequence
from ._files import as_path, quote
from ._generation import Past
from ._held import Held, catch_up, engine_of, fork_of, is_untouched, logits_after
from ._progress import Callback, Progress
from ._prompts import answer_header, awaits_answer, prompt_rows, row_ids
from ._sampling import Sampling, SamplingOptions, check_top
from ._scoring import continued, first_logprob
from ._state_file import check_header, parts_of
from .errors import StateError
from .inspection import streams
from .results import Chunk, Completion, Logprobs

if TYPE_CHECKING:
    import numpy as np

    from .model import Model


class State:
    """What a model remembers of the tokens it has read; `Model.state` makes an empty one.

    A fork costs the KDA states (one of `max_batch` sequences): the latents of all full pages of
    64 tokens are shared as long as two of them live. Calls on one state from several threads are
    served one after the other. Where a sequence is free (`max_batch`), `feed` and `generate` work
    on a copy: interrupted or failed, they leave the state as it was. Else an interruption within
    them loses the state, and later calls say so.

    After `release` every call raises ValueError, and so it does after `Model.close`. A state
    that is not released lives as long as its object; a `with` block releases it, too.
    """

    def __init__(self, model: "Model", held: Held) -> None:
        self._model = model
        self._held: Held | None = held
        self._lock = threading.RLock()
        self._why_gone = "is released"

    @classmethod
    def _empty(cls, model: "Model") -> "State":
        import numpy as np

        engine = model._open_engine()
        sequence = HeldSequence(engine, engine.seq_new, ())
        return cls(model, Held(sequence, np.empty(0, np.int32), None, False))

    def _get(self) -> Held:
        held = self._held
        if held is None:
            raise ValueError(f"state: {self._why_gone}")
        self._model._open_engine()
        return held

    # ---- growing -------------------------------------------------------------------------

    def feed(self, prompt: Any, progress: bool | Callback | None = None) -> "State":
        """Append a prompt; returns the state itself.

        prompt: str (control tokens in it stay text), token ids, or chat messages: these are
        appended as they are, and a following `generate` opens the assistant's turn. progress:
        callable(done, total) over tokens, True, False or None, as in `Model.generate`.

        Fed in parts, a text has the bits of the whole if all parts but the last have a multiple
        of 64 tokens. Raises ValueError or TypeError for a bad prompt or past max_context,
        OutOfMemory where the pages do not suffice, KeyboardInterrupt.
        """
        with self._lock:
            held = self._get()
            ids = row_ids(
                prompt,
                self._model._get_tokenizer,
                self._model.config.vocab_size,
                "prompt",
                answer=False,
            )
            self._check_room(held, len(ids), 0)
            with (
                self._model._turn(progress, [ids]) as callback,
                self._draft(held, len(ids)) as draft,
            ):
                logits = logits_after(draft, ids, callback)
            self._set(draft, held, ids, logits, awaits_answer(prompt))
        return self

    def generate(
        self,
        prompt: Any = None,
        *,
        progress: bool | Callback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]:
        """Continue the state, after a prompt if one is given; arguments of `Model.generate`.

        The state keeps the prompt and all new tokens, a stop token included. A list of prompts
        is answered from forks, all in one batch, each admitted as sequences and pages are free:
        then the state stays as it is.

        The completion's prompt_token_ids and Stats.prompt_tokens are the prompt of this call;
        penalties and logits processors see the tokens of the state before it.
        """
        with self._lock:
            held = self._get()
            checked = self._model._check_sampling(**sampling)
            if prompt is None:
                return self._continue(held, self._no_prompt(held), checked, progress)
            rows, is_batch = prompt_rows(
                prompt, self._model._get_tokenizer, self._model.config.vocab_size
            )
            if not is_batch:
                return self._continue(held, rows[0], checked, progress)
            past = Past(held.sequence.seq, held.ids)
            return self._model._complete(rows, checked, progress, past)

    def _no_prompt(self, held: Held) -> "np.ndarray":
        import numpy as np

        if held.awaits_answer:
            return np.asarray(answer_header(self._model.tokenizer), np.int32)
        if not len(held.ids):
            raise ValueError("prompt: must hold at least one token, the state is empty")
        return np.empty(0, np.int32)

    def _continue(
        self,
        held: Held,
        ids: "np.ndarray",
        checked: Sampling,
        progress: bool | Callback | None,
    ) -> Completion:
        import numpy as np

        self._check_room(held, len(ids), 1 if checked.max_new_tokens else 0)
        room = self._model.plan.max_context - len(held.ids) - len(ids)
        most = len(ids) + min(checked.max_new_tokens, room)
        with self._model._calls, self._draft(held, most) as draft:
            past = Past(draft.seq, held.ids, in_place=True, logits=held.logits)
            (completion,) = self._model._complete([ids], checked, progress, past)
            new = np.concatenate([ids, np.asarray(completion.token_ids, np.int32)])
            logits = catch_up(draft, held, new)
        self._set(draft, held, new, logits, False)
        return completion

    def stream(
        self,
        prompt: Any = None,
        *,
        progress: bool | Callback | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Chunk]:
        """Continue the state token by token; arguments of `generate`, for one prompt.

        The state changes after the last token; leaving the loop before leaves it as it was.
        Works on a fork: raises OutOfMemory when no sequence is free. Raises ValueError at the
        end if the state has changed meanwhile.
        """
        with self._lock:
            held = self._get()
            checked = self._model._check_sampling(**sampling)
            ids = self._no_prompt(held) if prompt is None else self._one_prompt(prompt)
            self._check_room(held, len(ids), 1 if checked.max_new_tokens else 0)
            reporter = self._model._prompt_progress(progress, [ids])
            with self._model._calls:
                draft = fork_of(held)
            try:
                past = Past(draft.seq, held.ids, in_place=True, logits=held.logits)
                run = self._model._run(self._model._rows([ids], checked, past))
            except BaseException:
                draft.release()
                raise
        return self._stream(held, draft, ids, self._model._stream(run, reporter))

    def _one_prompt(self, prompt: Any) -> "np.ndarray":
        rows, is_batch = prompt_rows(
            prompt, self._model._get_tokenizer, self._model.config.vocab_size
        )
        if is_batch:
            raise ValueError("prompt: stream takes one prompt, got a list; use generate")
        return rows[0]

    def _stream(
        self, held: Held, draft: HeldSequence, ids: "np.ndarray", chunks: Iterator[Chunk]
    ) -> Iterator[Chunk]:
        import numpy as np

        made = []
        try:
            for chunk in chunks:
                made += [chunk.token_id] if chunk.token_id >= 0 else []
                yield chunk
            new = np.concatenate([ids, np.asarray(made, np.int32)])
            with self._lock:
                if self._held is not held:
                    raise ValueError("state: was changed while it was streamed")
                self._set(draft, held, new, catch_up(draft, held, new), False)
        except BaseException:
            if self._held is None or self._held.sequence is not draft:
                draft.release()
            raise

    def _check_room(self, held: Held, n: int, more: int) -> None:
        most = self._model.plan.max_context
        if len(held.ids) + n + more > most:
            raise ValueError(
                f"state: its {len(held.ids)} tokens and {n + more} more must be at most {most} "
                f"(max_context)"
            )

    @contextmanager
    def _draft(self, held: Held, n_tokens: int) -> Iterator[HeldSequence]:
        """The sequence to work on: a copy, or the state's own where nothing is free."""
        engine, seq = held.sequence.engine, held.sequence.seq
        draft = HeldSequence(engine, engine.seq_draft, (seq, n_tokens))
        sequence = draft if draft.seq else held.sequence
        try:
            yield sequence
        except BaseException:
            if sequence is held.sequence and not is_untouched(held):
                self._held = None
                self._why_gone = (
                    "was lost when a call on it did not end, and no other sequence was free "
                    "(max_batch) to keep it"
                )
            if self._held is not held or sequence is not held.sequence:
                sequence.release()
            raise

    def _set(
        self,
        draft: HeldSequence,
        held: Held,
        new: "np.ndarray",
        logits: "np.ndarray | None",
        awaits: bool,
    ) -> None:
        import numpy as np

        if self._held is not held:  # a callback of the call has released the state
            draft.release()
            raise ValueError(f"state: {self._why_gone}")
        self._held = Held(draft, np.concatenate([held.ids, new]), logits, awaits)
        if draft is not held.sequence:
            held.sequence.release()

    def fork(self) -> "State":
        """An independent copy, copy.copy too: KDA states are copied, full pages of latents shared.

        Raises OutOfMemory when max_batch sequences are alive.
        """
        with self._lock, self._model._calls:
            held = self._get()
            copy = fork_of(held)
            return State(self._model, Held(copy, held.ids, held.logits, held.awaits_answer))

    __copy__ = fork  # two objects of one sequence would break each other

    def __deepcopy__(self, memo: Any) -> "State":
        return self.fork()

    def __reduce__(self) -> Any:
        raise TypeError("state: cannot be pickled; save() writes it to a file")

    # ---- looking -------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens read so far, `len(state)`."""
        return len(self._get().ids)

    def __len__(self) -> int:
        return self.position

    @property
    def token_ids(self) -> list[int]:
        """The tokens read so far."""
        return self._get().ids.tolist()

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the state refers to: KDA states and whole pages, shared
        ones included; see `shared_nbytes`."""
        return self._bytes()[0]

    @property
    def shared_nbytes(self) -> int:
        """Those of `nbytes` in pages that other sequences hold too: a release keeps them."""
        return self._bytes()[1]

    def _bytes(self) -> tuple[int, int]:
        with self._lock:
            sequence, plan = self._get().sequence, self._model.plan
            pages, shared = sequence.engine.seq_pages(sequence.seq)
            return plan.kda_state_per_sequence + plan.of_pages(pages), plan.of_pages(shared)

    def logits(self) -> "np.ndarray":
        """float32 [vocab] after the last token; raises ValueError for an empty state."""
        logits = self._get().logits
        if logits is None:
            raise ValueError("state: is empty; feed it a token first")
        return logits.copy()

    def logprobs(
        self, prompt: Any, *, top: int = 0, progress: bool | Callback | None = None
    ) -> Logprobs:
        """log p of each token of a continuation; the state stays as it is.

        prompt: str or token ids [T]. The result has T log-probabilities, the first one from
        `logits`; after an empty state it is that of `Model.logprobs`, with T - 1. top, progress:
        as there. Works on a fork where T > 1: raises OutOfMemory when no sequence is free.
        """
        with self._lock:
            held = self._get()
            if held.logits is None:
                return self._model.logprobs(prompt, top=top, progress=progress)
            ids = self._model._one_row(prompt, "prompt")
            top = check_top(top, self._model.config.vocab_size)
            self._check_room(held, len(ids) - 1, 0)
            parts = [first_logprob(held.logits, int(ids[0]), top)]
            if len(ids) > 1:
                with self._reading(held, ids, progress) as (fork, callback):
                    more = fork.engine.logprobs(fork.seq, ids[:-1], ids[1:], top, callback)
                    parts.append(more)
            return Logprobs.joined(ids.tolist(), parts)

    def score(
        self, continuation: Any, *, progress: bool | Callback | None = None
    ) -> tuple[float, bool] | list[tuple[float, bool]]:
        """log p(continuation | state) as a float64 sum, and whether it is the greedy one.

        continuation: str or token ids; or a list of such, which are read in batches, and gives
        a list. The state stays as it is; raises ValueError if it is empty, OutOfMemory when no
        sequence is free.
        """
        model = self._model
        with self._lock:
            held = self._get()
            if held.logits is None:
                raise ValueError("state: is empty; feed it a token first")
            rows, is_batch = prompt_rows(
                continuation, model._get_tokenizer, model.config.vocab_size, "continuation"
            )
            self._check_room(held, max(map(len, rows)) - 1, 0)
            with model._turn(progress, rows) as callback:
                sequence, room = held.sequence, model.plan.max_context
                found = continued(
                    sequence.engine, sequence.seq, held.logits, rows, room, callback
                )
        return found if is_batch else found[0]

    def hidden(
        self,
        prompt: Any,
        *,
        layers: Sequence[int] | None = None,
        progress: bool | Callback | None = None,
    ) -> "dict[int, np.ndarray]":
        """The residual streams of a continuation's tokens, as of `Model.hidden`.

        The state stays as it is. Works on a fork: raises OutOfMemory when no sequence is free.
        """
        with self._lock:
            held = self._get()
            wanted = self._model._layers(layers)
            ids = self._model._one_row(prompt, "prompt")
            self._check_room(held, len(ids), 0)
            with self._reading(held, ids, progress) as (fork, callback):
                return streams(fork.engine, fork.seq, ids, wanted, callback)

    @contextmanager
    def _reading(
        self, held: Held, ids: "np.ndarray", progress: bool | Callback | None
    ) -> "Iterator[tuple[HeldSequence, Callback | None]]":
        """A fork that reads and is forgotten."""
        with self._model._turn(progress, [ids]) as callback, fork_of(held) as fork:
            yield fork, callback

    # ---- files ---------------------------------------------------------------------------

    def save(self, path: str | Path, *, progress: bool | Callback | None = None) -> None:
        """Write the state to a file, which replaces another one only once it is whole.

        The format is that of kimi_linear/_state_file.py: every byte is covered by a checksum.
        progress: callable(done_bytes, total_bytes), True, False or None. Raises OSError.
        """
        path = as_path(path)
        with self._lock:
            held = self._get()
            model, engine = self._model, held.sequence.engine
            header = {
                "config": model.config.to_core(),
                "dtype": model.dtype,
                "kv_cache_dtype": model.kv_cache_dtype,
                "weights": model.fingerprint,
                "length": len(held.ids),
                "awaits_answer": held.awaits_answer,
                "writer": f"kimi_linear {_version()}",
            }
            parts = parts_of(held.ids, held.logits, engine, held.sequence.seq)
            with Progress(progress, "state", "B") as callback:
                _state_file.write(path, header, parts, callback)

    @classmethod
    def load(
        cls, path: str | Path, model: "Model", *, progress: bool | Callback | None = None
    ) -> "State":
        """The state that a file holds, to the bit.

        model: one of the config, weights, dtype and kv_cache_dtype of the one that saved it, on
            any device.
        progress: callable(done_bytes, total_bytes), True, False or None.

        Raises StateError for a file that is none, is truncated or altered, has another version,
        or was saved by another model; OutOfMemory with the figures where the model has no
        sequence, pages or context for it; OSError.
        """
        import numpy as np

        path = as_path(path)
        engine = engine_of(model)
        with _state_file.Reader(path) as reader:
            length, awaits = check_header(reader, model)
            vocab = model.config.vocab_size
            payload = 4 * length + (4 * vocab if length else 0) + engine.image_bytes(length)
            reader.check_size(payload)
            ids = np.empty(length, np.int32)
            logits = np.empty(vocab, np.float32) if length else None
            with model._calls:
                sequence = HeldSequence(engine, engine.seq_restore, (length,))
            try:
                parts = parts_of(ids, logits, engine, sequence.seq)
                with Progress(progress, "state", "B") as callback:
                    reader.read(parts, callback)
                if length and not 0 <= ids.min() <= ids.max() < vocab:
                    raise StateError(f"{path}: token ids must be in 0..{vocab - 1}")
            except BaseException:
                sequence.release()
                raise
        return cls(model, Held(sequence, ids, logits, awaits))

    # ---- life ----------------------------------------------------------------------------

    def release(self) -> None:
        """Give the memory back; further calls do nothing."""
        with self._lock:
            held, self._held = self._held, None
            if held is not None:
                held.sequence.release()

    def __enter__(self) -> "State":
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __repr__(self) -> str:
        held = self._held
        if held is None:
            return f"<kimi_linear.State {self._why_gone.partition(' when')[0]}>"
        return f"<kimi_linear.State {len(held.ids)} tokens of {self._model!r}>"


def _version() -> str:
    from . import __version__

    return __version__
