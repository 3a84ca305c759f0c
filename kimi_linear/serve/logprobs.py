"""Log-probabilities in the two shapes that clients know."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..results import Chunk, Logprobs, TokenLogprob
    from ..tokenizer import Tokenizer


class Scored(NamedTuple):
    """A token, its log-probability (None: the first of a prompt), the best alternatives."""

    token_id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


def of_tokens(tokens: "Iterable[TokenLogprob | Chunk]") -> list[Scored]:
    """New tokens; a chunk of no token (id -1) is left out."""
    return [Scored(t.token_id, t.logprob, t.top) for t in tokens if t.token_id >= 0]


def of_prompt(found: "Logprobs") -> list[Scored]:
    """The tokens of a prompt."""
    scored = [Scored(found.token_ids[0], None)]
    tops: Iterable[Any] = [()] * len(found.logprobs)
    if found.top is not None:
        tops = map(zip, found.top[0].tolist(), found.top[1].tolist())
    for token_id, logprob, top in zip(
        found.token_ids[1:], found.logprobs.tolist(), tops, strict=True
    ):
        scored.append(Scored(token_id, logprob, tuple(top)))
    return scored


# ---- /v1/completions ---------------------------------------------------------------------


class CompletionLogprobs:
    """Four lists side by side: tokens, token_logprobs, top_logprobs, text_offset.

    An offset counts the characters that are certain before a token: where tokens share a
    character, theirs is the same; tokens of a stop string lie past the end of the text.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.stream_decoder()
        self._offset = 0

    def take(self, tokens: Sequence[Scored]) -> dict[str, list[Any]]:
        """The lists of the tokens that come next."""
        return {
            "tokens": [self._name(t.token_id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [self._alternatives(t) for t in tokens],
            "text_offset": [self._advance(t.token_id) for t in tokens],
        }

    def end_prompt(self) -> None:
        """The prompt ends here; half a character at its end is a character."""
        self._offset += len(self._decoder.finish())

    def _advance(self, token_id: int) -> int:
        before = self._offset
        self._offset += len(self._decoder.feed(token_id))
        return before

    def _alternatives(self, token: Scored) -> dict[str, float] | None:
        """By name, best first, and the token itself; None for the first of a prompt."""
        if token.logprob is None:
            return None
        found = {self._name(token_id): logprob for token_id, logprob in token.top}
        return found | {self._name(token.token_id): token.logprob}

    def _name(self, token_id: int) -> str:
        """The text; bytes that are none are spelled out, for names must differ."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


# ---- /v1/chat/completions ----------------------------------------------------------------


def chat_logprobs(tokenizer: "Tokenizer", tokens: Sequence[Scored]) -> dict[str, Any]:
    """An object a token, with its alternatives inside."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        name = raw.decode(errors="replace")
        return {"token": name, "logprob": logprob, "bytes": list(raw)}

    content = [
        entry(t.token_id, t.logprob) | {"top_logprobs": [entry(*other) for other in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}
