"""Text of tokens that come one by one, ended by stop strings."""

from collections.abc import Sequence

from .tokenizer import Tokenizer


class TextBuilder:
    """Decodes new tokens, and cuts the text before the first stop string.

    Text that may be the beginning of a stop string is held back until the next token tells.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.stream_decoder() if tokenizer else None
        self._stop = stop
        self._held = ""
        self._parts: list[str] = []
        self.stopped = False  # a stop string was completed

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._parts)

    def feed(self, token_id: int) -> str:
        """Text that became certain with this token."""
        return self._take(self._decoder.feed(token_id)) if self._decoder else ""

    def finish(self) -> str:
        """The rest, at the end of the tokens."""
        if self._decoder is None or self.stopped:
            return ""
        text = self._take(self._decoder.finish())
        return text + self._give("" if self.stopped else self._held)

    def _take(self, piece: str) -> str:
        if not self._stop:
            return self._give(piece)
        self._held += piece
        ends = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            return self._give(self._held[: min(ends)])
        keep = max((overlap(self._held, s) for s in self._stop), default=0)
        sure = self._held[: len(self._held) - keep]
        self._held = self._held[len(sure) :]
        return self._give(sure)

    def _give(self, text: str) -> str:
        self._parts.append(text)
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins stop."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
