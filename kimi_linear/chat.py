"""The chat format, as segments of control tokens and text, and the tool calls in an answer.

    <|im_system|>system<|im_middle|>TEXT<|im_end|><|im_user|>user<|im_middle|>TEXT<|im_end|>...

No newlines, no spaces, no [BOS], and no system prompt that nobody asked for. The word after the
role token is the message's name, else its role.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ._files import quote

Segment = tuple[bool, str]  # (is a control token, its name or plain text)

_ROLE_TOKENS = {
    "system": "<|im_system|>",
    "user": "<|im_user|>",
    "assistant": "<|im_assistant|>",
    "tool": "<|im_system|>",
}
MIDDLE = "<|im_middle|>"
END = "<|im_end|>"
CALLS_BEGIN = "<|tool_calls_section_begin|>"
CALLS_END = "<|tool_calls_section_end|>"
CALL_BEGIN = "<|tool_call_begin|>"
CALL_ARGUMENTS = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> list[Segment]:
    """The segments of a conversation; neighbouring texts are joined, since they are encoded as
    one. Raises TypeError or ValueError naming the message."""
    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: must be a list of dicts, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: must hold at least one message")
    segments: list[Segment] = []
    for segment in _segments(messages, tools, add_generation_prompt):
        if not segment[0] and segments and not segments[-1][0]:
            segments[-1] = (False, segments[-1][1] + segment[1])
        else:
            segments.append(segment)
    return [s for s in segments if s[1]]


def _segments(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
) -> Iterator[Segment]:
    if tools := _tools(tools):
        yield from _head("system", "tool_declare")
        yield False, _json(tools, "tools", separators=(",", ":"), sort_keys=True)
        yield True, END
    n_calls = 0
    for i, message in enumerate(messages):
        label = f"messages[{i}]"
        role = _role(message, label)
        yield from _head(role, _name(message, label) or role)
        if role == "tool":
            call_id = message.get("tool_call_id")
            if not isinstance(call_id, str):
                raise ValueError(
                    f"{label}: tool_call_id: must be a string, got {quote(call_id)}"
                )
            yield False, f"## Return of {call_id}\n"
        calls = message.get("tool_calls") or []
        yield False, _content(message, label, optional=bool(calls))
        if calls:
            yield from _tool_calls(calls, label, n_calls)
            n_calls += len(calls)
        yield True, END
    if add_generation_prompt:
        yield from _head("assistant", "assistant")


def _tools(tools: Any) -> list[Any]:
    """A dict of one tool would be a list of its keys, and a string one of its characters."""
    if tools is None:
        return []
    if isinstance(tools, Mapping | str | bytes) or not isinstance(tools, Sequence):
        raise TypeError(f"tools: must be a list of dicts, got {type(tools).__name__}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TypeError(f"tools[{i}]: must be a dict, got {type(tool).__name__}")
    return list(tools)


def _head(role: str, word: str) -> Iterator[Segment]:
    yield True, _ROLE_TOKENS[role]
    yield False, word
    yield True, MIDDLE


def _role(message: Any, label: str) -> str:
    if not isinstance(message, Mapping):
        raise TypeError(f"{label}: must be a dict, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLE_TOKENS:
        roles = ", ".join(map(repr, _ROLE_TOKENS))
        raise ValueError(f"{label}: role: must be one of {roles}, got {quote(role)}")
    if message.get("tool_calls") and role != "assistant":
        raise ValueError(f"{label}: tool_calls: only an assistant's message may have them")
    return role


def _name(message: Mapping[str, Any], label: str) -> str | None:
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{label}: name: must be str, got {type(name).__name__}")
    return name


def _content(message: Mapping[str, Any], label: str, *, optional: bool) -> str:
    """The text of a message: a string, or a list of parts of type "text"."""
    content = message.get("content")
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise TypeError(f"{label}: content: parts must have text, got {quote(part)}")
        return "".join(part["text"] for part in content)
    raise TypeError(f"{label}: content: must be str, got {type(content).__name__}")


def _tool_calls(calls: Any, label: str, n_before: int) -> Iterator[Segment]:
    if not isinstance(calls, list | tuple):
        raise TypeError(f"{label}: tool_calls: must be a list, got {type(calls).__name__}")
    yield True, CALLS_BEGIN
    for n, call in enumerate(calls, n_before):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise TypeError(f"{label}: tool_calls: must have function.name, got {quote(call)}")
        call_id = call.get("id") or f"functions.{function['name']}:{n}"
        arguments = function.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = _json(arguments, f"{label}: tool_calls: arguments")
        yield True, CALL_BEGIN
        yield False, str(call_id)
        yield True, CALL_ARGUMENTS
        yield False, arguments
        yield True, CALL_END
    yield True, CALLS_END


def _json(value: Any, label: str, **style: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **style)
    except (TypeError, ValueError, RecursionError) as e:
        raise type(e)(f"{label}: must be JSON: {e}") from None


def parse_tool_calls(text: str) -> list[dict[str, Any]]:
    """The complete calls of the first tool section of an answer, in order.

    Each is ``{"id", "type": "function", "function": {"name", "arguments"}}``, the form that a
    message takes back; arguments are the text the model wrote, which need not be valid JSON.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: must be str, got {type(text).__name__}")
    _, begin, section = text.partition(CALLS_BEGIN)
    calls: list[dict[str, Any]] = []
    section = section.partition(CALLS_END)[0]
    while begin:
        _, begin, section = section.partition(CALL_BEGIN)
        body, end, section = section.partition(CALL_END)
        call_id, middle, arguments = body.partition(CALL_ARGUMENTS)
        if not (begin and end and middle):  # cut off by max_new_tokens, or malformed
            break
        call_id = call_id.strip()
        name = call_id.removeprefix("functions.").rpartition(":")
        function = {"name": name[0] or name[2], "arguments": arguments.strip()}
        calls.append({"id": call_id, "type": "function", "function": function})
    return calls
