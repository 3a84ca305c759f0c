"""An answer's text and its tool calls, told apart while it comes."""

from typing import Any

from .._text import overlap
from ..chat import CALLS_BEGIN, CALLS_END, parse_tool_calls


class ToolSplitter:
    """Takes the text of an answer in pieces; gives what is content, and calls that are whole.

    The first tool section is the calls', as in Tokenizer.parse_tool_calls; one without a whole
    call is shown as it stands, for nothing that a model wrote should vanish. Without tools all
    is content.
    """

    def __init__(self, has_tools: bool) -> None:
        self._is_over = not has_tools  # no section can begin any more
        self._held = ""  # may begin a section, or is one
        self.n_calls = 0

    def feed(self, text: str, *, last: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """Content and new calls after a piece of text. last: nothing follows it."""
        if self._is_over:
            return text, []
        self._held += text
        begin = self._held.find(CALLS_BEGIN)
        if begin < 0:
            keep = 0 if last else overlap(self._held, CALLS_BEGIN)
            return self._give(len(self._held) - keep), []
        content = self._give(begin)
        calls = parse_tool_calls(self._held)[self.n_calls :]
        self.n_calls += len(calls)
        end = self._held.find(CALLS_END)
        self._is_over = last or end >= 0
        if self._is_over:
            hidden = (
                0 if not self.n_calls else len(self._held) if end < 0 else end + len(CALLS_END)
            )
            content += self._held[hidden:]
            self._held = ""
        return content, calls

    def _give(self, n: int) -> str:
        """The first n characters of what was held back."""
        text, self._held = self._held[:n], self._held[n:]
        return text
