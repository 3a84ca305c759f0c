"""The fields of a request: which there are and what they may be.

A field that is not in a table is refused, and so is a value that this server would have to
ignore although it changes the answer. null is the same as leaving a field out.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._files import quote
from .._sampling import check_sampling
from .errors import naming, refused

MAX_CHOICES = 128
MAX_STOPS = 64  # each is searched for after each token

Check = Callable[[str, Any], Any]


class Field(NamedTuple):
    """check: returns the value to use, or raises ApiError. default: where there is none."""

    check: Check
    default: Any = None


def read(body: Any, fields: Mapping[str, Field], where: str = "") -> dict[str, Any]:
    """Every field of the table by name, checked. where: what holds them, "stream_options."."""
    if not isinstance(body, dict):
        label = where.removesuffix(".") or None
        raise refused(label, f"{label or 'body'}: must be a JSON object, got {quote(body)}")
    for name in body:
        if name not in fields:
            message = f"{where}{quote(name)[1:-1]}: is unknown or not supported here"
            raise refused(where + name, message, "unknown_parameter")
    return {
        name: field.default if (value := body.get(name)) is None
        else field.check(where + name, value)
        for name, field in fields.items()
    }  # fmt: skip


# ---- kinds of values ---------------------------------------------------------------------


def boolean(name: str, value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise refused(name, f"{name}: must be true or false, got {quote(value)}")
    return value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise refused(name, f"{name}: must be a string, got {quote(value)}")
    return value


def integer(low: int, high: int) -> Check:
    """A whole number in low..high."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            message = f"{name}: must be an integer in {low}..{high}, got {quote(value)}"
            raise refused(name, message)
        return value

    return check


def only(*values: Any) -> Check:
    """What other servers have and this one has not: the values that ask for nothing."""

    def check(name: str, value: Any) -> Any:
        if value not in values:
            allowed = " or ".join(map(json.dumps, values)) or "null"
            raise refused(name, f"{name}: only {allowed} is supported, got {quote(value)}")
        return value

    return check


def unused(_name: str, value: Any) -> Any:
    """What does not change the answer."""
    return value


def anything(_name: str, value: Any) -> Any:
    """What is checked where it is used."""
    return value


# ---- tables ------------------------------------------------------------------------------


def _sampled(vocab_size: int, argument: str | None = None) -> Check:
    """An argument of `Model.generate`, which knows its range."""

    def check(name: str, value: Any) -> Any:
        with naming(name, argument or name):
            check_sampling(vocab_size, (), **{argument or name: value})
        return value

    return check


def _common(vocab_size: int) -> dict[str, Field]:
    sampled = _sampled(vocab_size)
    return {
        "model": Field(text),
        "max_tokens": Field(_sampled(vocab_size, "max_new_tokens")),
        "temperature": Field(sampled, 1.0),
        "top_p": Field(sampled, 1.0),
        "top_k": Field(lambda name, value: 0 if value == -1 else sampled(name, value), 0),
        "min_p": Field(sampled, 0.0),
        "repetition_penalty": Field(sampled, 1.0),
        "seed": Field(sampled),
        "stop": Field(_stops(sampled), ()),
        "stop_token_ids": Field(sampled),
        "ignore_eos": Field(boolean, False),
        "n": Field(integer(1, MAX_CHOICES), 1),
        "stream": Field(boolean, False),
        "stream_options": Field(_stream_options),
        "presence_penalty": Field(only(0)),
        "frequency_penalty": Field(only(0)),
        "logit_bias": Field(only({})),
        "user": Field(unused),
    }


SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop",
            "stop_token_ids", "ignore_eos")  # fmt: skip


def _stops(sampled: Check) -> Check:
    def check(name: str, value: Any) -> Any:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise refused(
                name, f"{name}: must be at most {MAX_STOPS} strings, got {len(value)}"
            )
        return sampled(name, value)

    return check


def _stream_options(name: str, value: Any) -> dict[str, Any]:
    return read(value, {"include_usage": Field(boolean, False)}, f"{name}.")


def completion_fields(vocab_size: int) -> dict[str, Field]:
    """Of /v1/completions."""
    return _common(vocab_size) | {
        "prompt": Field(anything),
        "echo": Field(boolean, False),
        "logprobs": Field(_sampled(vocab_size)),
        "best_of": Field(only(1)),
        "suffix": Field(only("")),
    }


def chat_fields(vocab_size: int) -> dict[str, Field]:
    """Of /v1/chat/completions."""
    return _common(vocab_size) | {
        "messages": Field(anything),
        "max_completion_tokens": Field(_sampled(vocab_size, "max_new_tokens")),
        "logprobs": Field(boolean, False),
        "top_logprobs": Field(_sampled(vocab_size, "logprobs")),
        "tools": Field(anything),
        "tool_choice": Field(only("auto", "none"), "auto"),
        "parallel_tool_calls": Field(only(True)),
        "response_format": Field(only({"type": "text"})),
        "add_generation_prompt": Field(boolean),
        "continue_final_message": Field(boolean, False),
        "modalities": Field(only(["text"])),
        "service_tier": Field(only("auto", "default")),
        "store": Field(only(False)),
        "metadata": Field(unused),
        "safety_identifier": Field(unused),
        "prompt_cache_key": Field(unused),
    }


TOKENIZE = {
    "model": Field(text),
    "prompt": Field(text),
    "messages": Field(anything),
    "tools": Field(anything),
    "add_generation_prompt": Field(boolean),
    "continue_final_message": Field(boolean, False),
}
DETOKENIZE = {"model": Field(text), "tokens": Field(anything)}
