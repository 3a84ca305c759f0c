"""A running generation: the core's tokens turned into text, row by row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import chat
from ._sampling import LogitsProcessor, Sampling
from ._text import TextBuilder
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

        past = {"seq": self.seq, "in_place": int(self.in_place)}
        if not len(request["ids"]):
            past["logits"] = self.logits
        if sampling.looks_back:
            past["n_history"] = len(self.ids)
            past["ids"] = np.concatenate([self.ids, request["ids"]])
        return request | past


class Run:
    """Rows of prompts being continued by an engine. Close it: that frees their sequences."""

    def __init__(
        self,
        engine: "Engine",
        rows: "Sequence[np.ndarray]",
        sampling: Sampling,
        tokenizer: Tokenizer | None,
        *,
        plan: MemoryPlan,
        past: Past | None = None,
    ) -> None:
        room = plan.max_context - (len(past.ids) if past else 0)
        requests = [sampling.request(ids, i, room) for i, ids in enumerate(rows)]
        if past:
            requests = [past.extend(request, sampling) for request in requests]
        self._sampling = sampling
        self._plan = plan
        self._n_before = len(past.ids) if past else 0
        self._n_shared = 0 if past is None or past.in_place else self._n_before
        self._bytes = plan.weights + plan.workspace + sum(self._bytes_of(len(r)) for r in rows)
        if self._n_shared:
            self._bytes += plan.of_sequence(self._n_shared)
        self._process = _processor(sampling.processors)
        self._rows = [_Row(ids, TextBuilder(tokenizer, sampling.stop)) for ids in rows]
        self._n_running = len(rows)
        self._generation = engine.generate(requests)

    @property
    def done(self) -> bool:
        """Whether every row has its finish_reason."""
        return self._n_running == 0

    def step(
        self, max_steps: int, progress: Callable[[int, int], Any] | None
    ) -> list[tuple[int, Chunk]]:
        """Run up to max_steps steps; the new tokens as (row, Chunk), in the order they came."""
        chunks = []
        for i, token_id, logprob, finish, top in self._generation.run(
            max_steps, self._process, progress
        ):
            row = self._rows[i]
            if row.finish_reason:  # tokens of the same call, past a stop string
                continue
            before = self._bytes_of(row.n_tokens)
            text = row.take(token_id, logprob, finish, top)
            self._bytes += self._bytes_of(row.n_tokens) - before
            if row.finish_reason:
                self._n_running -= 1
                if not finish:
                    self._generation.finish(i)
            stats = self._stats(row)
            chunk = Chunk(text, token_id, logprob, row.finish_reason, stats, tuple(top))
            chunks.append((i, chunk))
        return chunks

    def _bytes_of(self, n_tokens: int) -> int:
        """What a row of so many tokens, prompt and new ones, takes."""
        return self._plan.of_fork(self._n_shared, self._n_before + n_tokens)

    def _stats(self, row: "_Row") -> Stats:
        core = self._generation.stats()
        return Stats(
            prompt_tokens=len(row.prompt_ids),
            cached_tokens=0,
            new_tokens=len(row.token_ids),
            prefill_s=core["prefill_s"],
            decode_s=core["decode_s"],
            peak_bytes=min(self._bytes, self._plan.total),
        )

    def completions(self) -> list[Completion]:
        """The answers, in the order of the prompts."""
        return [
            Completion(
                text=row.builder.text,
                token_ids=row.token_ids,
                prompt_token_ids=row.prompt_ids.tolist(),
                finish_reason=row.finish_reason or "cancelled",
                logprobs=None if self._sampling.logprobs is None else row.logprobs,
                stats=self._stats(row),
                tool_calls=tuple(chat.parse_tool_calls(row.builder.text)),
            )
            for row in self._rows
        ]

    def close(self) -> None:
        """Free the sequences; further calls do nothing."""
        self._generation.close()


class _Row:
    """One prompt and what came of it."""

    def __init__(self, prompt_ids: "np.ndarray", builder: TextBuilder) -> None:
        self.prompt_ids = prompt_ids
        self.builder = builder
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)

    def take(self, token_id: int, logprob: float, finish: str | None, top: Any) -> str:
        """Add a token; returns the text that became certain."""
        self.finish_reason = finish
        if token_id < 0:  # a request of no tokens
            return ""
        self.token_ids.append(token_id)
        self.logprobs.append(TokenLogprob(token_id, logprob, tuple(top)))
        if finish == "stop":
            return self.builder.finish()  # a stop token has no text
        text = self.builder.feed(token_id)
        if self.builder.stopped:
            self.finish_reason = "stop"
        elif finish:
            text += self.builder.finish()
            if self.builder.stopped:
                self.finish_reason = "stop"
        return text


def _processor(
    processors: Sequence[LogitsProcessor],
) -> Callable[[int, Any, Any], None] | None:
    """One callback for the core from the user's: each gets what the one before left."""
    if not processors:
        return None

    def process(_row: int, ids: Any, logits: Any) -> None:
        import numpy as np

        ids, logits = np.asarray(ids), np.asarray(logits)
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

    return process
