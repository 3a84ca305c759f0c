"""What a model gives back: plain values that outlive it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from .memory import gib

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Stats:
    """Counts and times of a call; a batch shares its times."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, not computed: the prefix cache had them; 0 for states
    new_tokens: int
    prefill_s: float  # seconds in steps that fed prompts
    decode_s: float  # seconds in steps that only continued
    peak_bytes: int  # weights, workspace and the sequences of the call; never above the plan
    drafted: int = 0  # tokens that were guessed (speculate) and verified
    accepted: int = 0  # those of them that were right

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second; 0 where none was read."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_s)

    @property
    def decode_rate(self) -> float:
        """New tokens a second; the first one belongs to the prompt's step. 0 where all came
        beside prompts."""
        return _rate(max(self.new_tokens - 1, 0), self.decode_s)

    def __str__(self) -> str:
        cached = f", {self.cached_tokens} of them cached," if self.cached_tokens else ""
        guessed = f", {self.accepted} of {self.drafted} guesses right" if self.drafted else ""
        return (
            f"prompt {self.prompt_tokens} tokens{cached} in {self.prefill_s:.2f} s "
            f"({self.prefill_rate:.0f}/s), new {self.new_tokens} in {self.decode_s:.2f} s "
            f"({self.decode_rate:.1f}/s){guessed}, peak {gib(self.peak_bytes)}"
        )


def _rate(n: int, seconds: float) -> float:
    return n / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """A new token's log-probability under the model, before temperature and penalties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), best first


@dataclass(frozen=True)
class Completion:
    """An answer.

    text: without the stop token or stop string that ended it. token_ids: with the stop token.
    finish_reason: "stop", "length" or "cancelled". logprobs: one for each of token_ids, if they
    were asked for. tool_calls: the calls in the text, as chat messages take them.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int] = field(repr=False)
    finish_reason: str
    logprobs: list[TokenLogprob] | None = field(repr=False)
    stats: Stats = field(repr=False)
    tool_calls: tuple[dict[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return (
            f"<div style='white-space:pre-wrap'>{escape(self.text)}</div>"
            f"<small>{escape(self.finish_reason)} &middot; {escape(str(self.stats))}</small>"
        )


@dataclass(frozen=True)
class Chunk:
    """One new token of a stream.

    text: what became certain with it, maybe nothing yet. top: the best alternatives, if
    `logprobs` asked for some, as (id, logprob), best first.
    """

    text: str
    token_id: int
    logprob: float
    finish_reason: str | None
    stats: Stats = field(repr=False)
    top: tuple[tuple[int, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Logprobs:
    """log p(token t+1 | tokens <= t) of a text.

    token_ids: [T]. logprobs: float32 [T-1]. greedy: bool [T-1], whether the token was the most
    likely one. top: (ids int32 [T-1, n], logprobs float32 [T-1, n]), best first, or None.
    """

    token_ids: list[int] = field(repr=False)
    logprobs: "np.ndarray"
    greedy: "np.ndarray"
    top: "tuple[np.ndarray, np.ndarray] | None" = None

    @property
    def total(self) -> float:
        """Their sum in float64, the log-likelihood."""
        return float(self.logprobs.sum(dtype="float64"))

    @classmethod
    def joined(cls, token_ids: list[int], parts: "Sequence[Sequence[Any]]") -> "Logprobs":
        """From parts (logprobs, greedy[, top_ids, top_logprobs]) of the core, in their order."""
        import numpy as np

        columns = [np.concatenate(arrays) for arrays in zip(*parts, strict=False)]
        top = None
        if len(columns) == 4 and columns[2].shape[1]:
            top = columns[2].astype(np.int32), columns[3].astype(np.float32)
        return cls(token_ids, columns[0].astype(np.float32), columns[1].astype(bool), top)
