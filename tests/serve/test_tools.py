"""Text and tool calls told apart in pieces, as they are in the whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear.chat import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    parse_tool_calls,
)
from kimi_linear.serve.tools import ToolSplitter


def call(i):
    return f"{CALL_BEGIN}functions.f:{i}{CALL_ARGUMENTS}{{{i}}}{CALL_END}"


def fed(pieces):
    """Content and calls of an answer that comes in these pieces."""
    splitter, content, calls = ToolSplitter(True), "", []
    for i, piece in enumerate(pieces):
        more, new = splitter.feed(piece, last=i == len(pieces) - 1)
        content += more
        calls += new
    assert splitter.n_calls == len(calls)
    return content, calls


ONE, TWO = parse_tool_calls(CALLS_BEGIN + call(0) + call(1))


@pytest.mark.parametrize("text, content, calls", [
    ("", "", []),
    ("hello <|tool", "hello <|tool", []),
    (f"a{CALLS_BEGIN}{call(0)}{call(1)}{CALLS_END}", "a", [ONE, TWO]),
    (f"a{CALLS_BEGIN}{call(0)}{CALLS_END}b", "ab", [ONE]),
    (f"a{CALLS_BEGIN}{call(0)}{CALL_BEGIN}functions.g", "a", [ONE]),  # cut off: finish "length"
    (f"a{CALLS_BEGIN}{CALLS_END}b", f"a{CALLS_BEGIN}{CALLS_END}b", []),
    (f"a{CALLS_BEGIN}{CALL_BEGIN}functions.g", f"a{CALLS_BEGIN}{CALL_BEGIN}functions.g", []),
    (f"{CALLS_BEGIN}{call(0)}{CALLS_END}a{CALLS_BEGIN}", f"a{CALLS_BEGIN}", [ONE]),
    (f"{call(0)}{CALLS_END}", f"{call(0)}{CALLS_END}", []),
])  # fmt: skip
def test_content_and_calls(text, content, calls):
    assert fed([text]) == (content, calls)
    assert fed([*text, ""]) == (content, calls)


PIECES = st.sampled_from([CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_ARGUMENTS, CALL_END, call(0),
                          call(1), "x", "<|", "functions.f:1", "{}"])  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join), st.data())
def test_pieces_change_nothing(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls = fed([text])
    assert fed(pieces) == (content, calls)
    assert calls == parse_tool_calls(text)
    assert calls or content == text  # nothing vanishes


def test_content_comes_as_soon_as_it_is_certain():
    splitter = ToolSplitter(True)
    assert splitter.feed("a < b <") == ("a < b ", [])
    assert splitter.feed("|tool_calls_") == ("", [])
    assert splitter.feed("x") == ("<|tool_calls_x", [])
    assert splitter.feed(CALLS_BEGIN + call(0)) == ("", [ONE])  # before the section ends
    plain = ToolSplitter(False)
    assert plain.feed(CALLS_BEGIN) == (CALLS_BEGIN, [])
