"""A running generation: the core's tokens turned into text, row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import chat
from ._core import PAGE_TOKENS
from ._sampling import LogitsProcessor, Sampling
from ._text import TextBuilder
from .errors import KimiLinearError
from .memory import MemoryPlan
from .results import Chunk, Completion, Stats, TokenLogprob
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from ._core import Engine


@dataclass(frozen=True)
class Past:
    """A sequence that prompts continue: each on a fork of it, or a single one in place."""

    seq: int
    ids: "np.ndarray"  # int32, the tokens it holds
    in_place: bool = False
    logits: "np.ndarray | None" = None  # float32 [vocab] after them, for an empty prompt

    def extend(self, request: dict[str, Any], sampling: Sampling) -> dict[str, Any]:
        """A request that goes on from here; the tokens before it only where they matter."""
        import numpy as np

        if self.in_place and sampling.speculate and sampling.stop:
            raise ValueError(
                f"speculate: must be 0 where a state is continued until a stop string, which may "
                f"come before the last of several tokens, got {sampling.speculate}; stop_token_ids "
                f"are fine"
            )
        past = {"seq": self.seq, "in_place": int(self.in_place)}
        if not len(request["ids"]):
            past["logits"] = self.logits
        if sampling.looks_back:
            past["n_history"] = len(self.ids)
            past["ids"] = np.concatenate([self.ids, request["ids"]])
        return request | past


class Call:
    """What the rows of a call have in common: what they continue, the memory they take."""

    def __init__(
        self, plan: MemoryPlan, tokenizer: Tokenizer | None, past: Past | None = None
    ) -> None:
        self.plan, self.tokenizer, self.past = plan, tokenizer, past
        self.n_before = len(past.ids) if past else 0
        self._n_shared = 0 if past is None or past.in_place else self.n_before
        self._bytes = plan.weights + plan.workspace
        if self._n_shared:
            self._bytes += plan.of_sequence(self._n_shared)

    @property
    def peak_bytes(self) -> int:
        """Weights, workspace and sequences; never above the plan."""
        return min(self._bytes, self.plan.total)

    def join(self, n_tokens: int) -> None:
        """There is one more row, of so many tokens."""
        self._bytes += self._bytes_of(n_tokens)

    def grow(self, n_tokens: int) -> None:
        """A row that had so many tokens, prompt and new ones, has one more."""
        if (self.n_before + n_tokens) % PAGE_TOKENS == 0:
            self._bytes += self._bytes_of(n_tokens + 1) - self._bytes_of(n_tokens)

    def _bytes_of(self, n_tokens: int) -> int:
        return self.plan.of_fork(self._n_shared, self.n_before + n_tokens)

    def request(self, ids: "np.ndarray", sampling: Sampling, index: int) -> dict[str, Any]:
        """The core's request for row `index` of the call."""
        request = sampling.request(ids, index, self.plan.max_context - self.n_before)
        return self.past.extend(request, sampling) if self.past else request


class Row:
    """One prompt and what came of it.

    finish_reason: None while it runs. error: what ended it instead of a finish_reason.
    """

    def __init__(self, ids: "np.ndarray", sampling: Sampling, call: Call, index: int) -> None:
        self.prompt_ids, self.sampling, self.call = ids, sampling, call
        self.request = call.request(ids, sampling, index)
        self.builder = TextBuilder(call.tokenizer, sampling.stop)
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self._raised: BaseException | None = None  # by a processor; the core's event follows
        self.id = -1  # the core's, once it is submitted
        self.n_cached = 0  # tokens of the prompt that others had read
        self.n_drafted = self.n_accepted = 0  # guesses, and those that were right
        self._times = self._times_before = {"prefill_s": 0.0, "decode_s": 0.0}
        call.join(len(ids))

    @property
    def done(self) -> bool:
        """Whether nothing more will come of it."""
        return self.finish_reason is not None or self.error is not None

    def begin(self, request_id: int, times: dict[str, float]) -> None:
        """It is the core's now. times: of the generation so far, which are not its own."""
        self.id, self._times, self._times_before = request_id, times, times

    def take(
        self, token_id: int, logprob: float, finish: Any, top: Any, times: dict[str, float]
    ) -> Chunk | None:
        """Add an event of the core; None where it was no token but an error."""
        self._times = times
        if isinstance(finish, BaseException):
            self.error, self._raised = self._raised or as_exception(finish), None
            return None
        self.finish_reason = finish
        text = ""
        if token_id >= 0:  # else a request of no tokens
            self.call.grow(len(self.prompt_ids) + len(self.token_ids))
            self.token_ids.append(token_id)
            if self.sampling.logprobs is not None:
                self.logprobs.append(TokenLogprob(token_id, logprob, top))
            text = self._text_of(token_id)
        return Chunk(text, token_id, logprob, self.finish_reason, self.stats(), top)

    def _text_of(self, token_id: int) -> str:
        """The text that became certain with a token; a stop string may end the row."""
        if self.finish_reason == "stop":
            return self.builder.finish()  # a stop token has no text
        text = self.builder.feed(token_id)
        if self.finish_reason and not self.builder.stopped:
            text += self.builder.finish()
        if self.builder.stopped:
            self.finish_reason = "stop"
        return text

    def process(self, ids: Any, logits: Any) -> None:
        """Run the processors over logits [vocab]. What one raises ends this row alone, after the
        tokens that were drawn before: it is kept, and logits that are not finite tell the core."""
        try:
            _process(self.sampling.processors, ids, logits)
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            self._raised = e
            logits[...] = float("nan")

    def stats(self) -> Stats:
        """Counts and times so far."""
        return Stats(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.n_cached,
            new_tokens=len(self.token_ids),
            prefill_s=self._times["prefill_s"] - self._times_before["prefill_s"],
            decode_s=self._times["decode_s"] - self._times_before["decode_s"],
            peak_bytes=self.call.peak_bytes,
            drafted=self.n_drafted,
            accepted=self.n_accepted,
        )

    def completion(self) -> Completion:
        """The answer, as far as it came."""
        return Completion(
            text=self.builder.text,
            token_ids=self.token_ids,
            prompt_token_ids=self.prompt_ids.tolist(),
            finish_reason=self.finish_reason or "cancelled",
            logprobs=None if self.sampling.logprobs is None else self.logprobs,
            stats=self.stats(),
            tool_calls=tuple(chat.parse_tool_calls(self.builder.text)),
        )


class Run:
    """Rows being continued by an engine; they may join at any time. Close it: that frees their
    sequences. For one thread."""

    def __init__(self, engine: "Engine") -> None:
        self._generation = engine.generate([])
        self._rows: dict[int, Row] = {}  # those under way
        self._n_processed = 0
        self.stats: dict[str, float] = self._generation.stats()  # of the core, of the last step

    @property
    def done(self) -> bool:
        """Whether every row is done."""
        return not self._rows

    def submit(self, row: Row) -> None:
        """Raises what the core finds wrong with it."""
        row.begin(self._generation.submit(row.request), self.stats)
        self._rows[row.id] = row
        self._n_processed += bool(row.sampling.processors)

    def step(
        self, max_steps: int, progress: Callable[[int, int], Any] | bool | None
    ) -> list[tuple[Row, Chunk | None]]:
        """Run up to max_steps steps; the new tokens in the order they came, None for a row that
        failed. progress: False in a thread that gets no signals."""
        process = self._process if self._n_processed else None
        events = self._generation.run(max_steps, process, progress)
        self.stats = self._generation.stats()
        found = []
        for request_id, token_id, logprob, finish, top, n_cached, n_drafted, n_accepted in events:
            row = self._rows.get(request_id)
            if row is None:  # a token of the same call, past a stop string
                continue
            row.n_cached, row.n_drafted, row.n_accepted = n_cached, n_drafted, n_accepted
            found.append((row, row.take(token_id, logprob, finish, top, self.stats)))
            if row.done:
                self._forget(row, ended=finish is not None)
        return found

    def finish(self, row: Row) -> None:
        """End a row that nobody waits for any more; one that is done is fine."""
        if row.id in self._rows:
            self._forget(row, ended=False)

    def _forget(self, row: Row, *, ended: bool) -> None:
        del self._rows[row.id]
        self._n_processed -= bool(row.sampling.processors)
        if not ended:
            self._generation.finish(row.id)
            self.stats = self._generation.stats()

    def _process(self, request_id: int, ids: Any, logits: Any) -> None:
        import numpy as np

        self._rows[request_id].process(np.asarray(ids), np.asarray(logits))

    def close(self) -> None:
        """Free the sequences; further calls do nothing."""
        self._generation.close()
        self._rows = {}
        self.stats = self.stats | {"running": 0, "waiting": 0}


def as_exception(error: BaseException) -> Exception:
    """A step that was interrupted for another's sake ends its requests, not their callers."""
    return error if isinstance(error, Exception) else KimiLinearError(str(error))


def _process(processors: Sequence[LogitsProcessor], ids: Any, logits: Any) -> None:
    """Each gets what the one before left."""
    import numpy as np

    for processor in processors:
        result = processor(ids, logits)
        if result is None or result is logits:  # changed in place
            continue
        result = np.asarray(result)
        if result.shape != logits.shape:
            raise ValueError(
                f"logits_processor: must return logits of shape {logits.shape}, "
                f"got {result.shape}"
            )
        logits[...] = result
