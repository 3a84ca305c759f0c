"""From the body of a request to prompts and arguments of the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._files import quote
from .._prompts import prompt_rows
from ..chat import END
from . import fields
from .errors import naming, refused
from .fields import Field

if TYPE_CHECKING:
    import numpy as np

    from ..model import Model
    from ..tokenizer import Tokenizer
    from .settings import Settings

COMPLETION_TOKENS = 16  # OpenAI's default, for completions alone


@dataclass(frozen=True)
class Job:
    """What both endpoints come down to: n answers to each of the prompts.

    max_tokens: of each prompt's answers. sampling: the other arguments of `Model.generate`, but
    for the seed. logprobs: how many alternatives to report, or None. echo: the prompt comes
    before its answer. has_tools: calls are looked for.
    """

    rows: "list[np.ndarray]"
    n: int
    max_tokens: list[int]
    seed: int | None
    sampling: dict[str, Any]
    logprobs: int | None
    stream: bool
    include_usage: bool
    is_chat: bool
    echo: bool = False
    has_tools: bool = False

    def options(self, row: int, choice: int) -> dict[str, Any]:
        """Arguments of the engine. Answer i of a prompt is drawn with seed + i, so that it does
        not depend on how many others were asked for."""
        seed = None if self.seed is None else (self.seed + choice) % (1 << 64)
        options = self.sampling | {"max_new_tokens": self.max_tokens[row], "seed": seed}
        return options | {"logprobs": self.logprobs}


# ---- the two endpoints -------------------------------------------------------------------


def completion_job(model: "Model", settings: "Settings", body: Any) -> Job:
    """Of a body of /v1/completions; raises ApiError."""
    found = fields.read(body, fields.completion_fields(model.config.vocab_size))
    rows = _prompts(model, found["prompt"])
    asked, echo = found["max_tokens"], found["echo"]
    if asked == 0 and not echo:
        raise refused("max_tokens", "max_tokens: must be at least 1, or 0 with echo, got 0")
    room = _Room(model, settings, COMPLETION_TOKENS, asked, "max_tokens")
    return Job(
        rows=rows,
        max_tokens=[room.of(len(ids)) for ids in rows],
        logprobs=found["logprobs"],
        is_chat=False,
        echo=echo,
        **_shared(found),
    )


def chat_job(model: "Model", settings: "Settings", body: Any) -> Job:
    """Of a body of /v1/chat/completions; raises ApiError."""
    found = fields.read(body, fields.chat_fields(model.config.vocab_size))
    if found["tool_choice"] == "none":
        found["tools"] = None
    ids = chat_ids(model.tokenizer, found)
    top = found["top_logprobs"]
    if top is not None and not found["logprobs"]:
        raise refused("top_logprobs", "top_logprobs: needs logprobs to be true")
    asked, param = _chat_max_tokens(found)
    room = _Room(model, settings, settings.default_max_tokens, asked, param)
    return Job(
        rows=[ids],
        max_tokens=[room.of(len(ids))],
        logprobs=(top or 0) if found["logprobs"] else None,
        is_chat=True,
        has_tools=bool(found["tools"]),
        **_shared(found),
    )


def _shared(found: dict[str, Any]) -> dict[str, Any]:
    options = found["stream_options"]
    if options is not None and not found["stream"]:
        raise refused("stream_options", "stream_options: needs stream to be true")
    return {
        "n": found["n"],
        "seed": found["seed"],
        "sampling": {name: found[name] for name in fields.SAMPLING},
        "stream": found["stream"],
        "include_usage": bool(options and options["include_usage"]),
    }


def _chat_max_tokens(found: dict[str, Any]) -> tuple[int | None, str]:
    """The number asked for by either of its names, and the name."""
    old, new = found["max_tokens"], found["max_completion_tokens"]
    param = "max_tokens" if new is None else "max_completion_tokens"
    if old is not None and new is not None and old != new:
        raise refused(
            param, f"{param}: must be max_tokens ({old}) where both are given, got {new}"
        )
    asked = old if new is None else new
    if asked == 0:
        raise refused(param, f"{param}: must be at least 1, got 0")
    return asked, param


@dataclass(frozen=True)
class _Room:
    """How many new tokens an answer gets."""

    model: "Model"
    settings: "Settings"
    default: int
    asked: int | None
    param: str

    def of(self, n_prompt: int) -> int:
        context = self.model.plan.max_context
        limit = self.settings.max_tokens or context
        new = self.asked
        if new is not None and new > limit:
            message = f"{self.param}: must be at most {limit} on this server, got {new}"
            raise refused(self.param, message)
        room = context - n_prompt
        if room < (1 if new is None else new):
            wanted = "a new one needs room" if new is None else f"{new} new ones are asked for"
            raise refused(
                self.param,
                f"{self.param}: the model's maximum context length is {context} tokens, "
                f"the prompt has {n_prompt} and {wanted}",
                "context_length_exceeded",
            )
        return min(self.default, limit, room) if new is None else new


# ---- prompts -----------------------------------------------------------------------------


def _prompts(model: "Model", prompt: Any) -> "list[np.ndarray]":
    if prompt is None:
        raise refused("prompt", "prompt: is required", "missing_required_parameter")
    rows = prompt if isinstance(prompt, list) else [prompt]
    for row in rows:
        inner = row[0] if isinstance(row, list) and row else row
        if isinstance(inner, Mapping):
            message = "prompt: messages go to /v1/chat/completions, got an object"
            raise refused("prompt", message)
    with naming("prompt", "text"):
        return prompt_rows(prompt, lambda: model.tokenizer, model.config.vocab_size)[0]


def chat_ids(tokenizer: "Tokenizer", found: dict[str, Any]) -> "np.ndarray":
    """The prompt of a conversation: int32 [T]. found: messages, tools, and how it goes on."""
    import numpy as np

    messages, tools = _messages(found["messages"]), _tools(found["tools"])
    resumes = found["continue_final_message"]
    opens = found["add_generation_prompt"]
    if resumes and opens:
        raise refused(
            "add_generation_prompt",
            "add_generation_prompt: must not be true with continue_final_message",
        )
    if resumes and messages[-1]["role"] != "assistant":
        raise refused(
            "continue_final_message",
            "continue_final_message: the last message must be the assistant's, "
            f"it is the {messages[-1]['role']}'s",
        )
    with naming("messages", "text"):
        ids = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=not resumes and opens is not False
        )
    if resumes:
        assert ids[-1] == tokenizer.control_tokens[END]
        ids = ids[:-1]
    return np.asarray(ids, np.int32)


_MESSAGE = {
    "role": Field(fields.text),
    "content": Field(fields.anything),
    "name": Field(fields.text),
    "tool_calls": Field(fields.anything),
    "tool_call_id": Field(fields.text),
    # What an answer of this or another server holds, and a client sends back.
    "refusal": Field(fields.only("")),
    "annotations": Field(fields.only([])),
    "audio": Field(fields.only()),
    "function_call": Field(fields.only()),
}
_PART = {"type": Field(fields.only("text")), "text": Field(fields.text)}
_TOOL = {"type": Field(fields.only("function")), "function": Field(fields.anything)}
_FUNCTION = {
    "name": Field(fields.text),
    "description": Field(fields.text),
    "parameters": Field(fields.anything),
    "strict": Field(fields.boolean),  # shown to the model, which nothing forces to obey
}


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as the template takes them; it checks what is not checked here."""
    if messages is None:
        raise refused("messages", "messages: is required", "missing_required_parameter")
    if not isinstance(messages, list) or not messages:
        message = f"messages: must be a list of at least one object, got {quote(messages)}"
        raise refused("messages", message)
    checked = []
    for i, message in enumerate(messages):
        label = f"messages[{i}]"
        found = fields.read(message, _MESSAGE, f"{label}.")
        if isinstance(found["content"], list):
            for j, part in enumerate(found["content"]):
                fields.read(part, _PART, f"{label}.content[{j}].")
        if found["role"] == "developer":  # OpenAI's newer word
            found["role"] = "system"
        checked.append({k: v for k, v in found.items() if v is not None})
    return checked


def _tools(tools: Any) -> Sequence[Mapping[str, Any]] | None:
    """Tools as they came: the model reads them as JSON."""
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise refused("tools", f"tools: must be a list, got {quote(tools)}")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]."
        function = fields.read(tool, _TOOL, where)["function"]
        name = fields.read(function, _FUNCTION, f"{where}function.")["name"]
        if not name:
            param = f"{where}function.name"
            raise refused(param, f"{param}: is required", "missing_required_parameter")
    return tools or None
