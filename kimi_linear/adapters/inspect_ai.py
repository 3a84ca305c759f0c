"""inspect-ai: a provider of models of this package, found by its entry point.

    inspect eval task.py --model kimi_linear/DIR -M device=cuda -M dtype=int8

"kimi_linear/small" is the model inside the package. All samples that inspect runs at a time go
to one `kimi_linear.Engine`, whose steps they share; `--max-connections` says how many.
"""

import json
from typing import TYPE_CHECKING, Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StreamTextEvent,
    StreamToolCallEvent,
    TopLogprob,
    modelapi,
)
from inspect_ai.tool import ToolCall, ToolChoice, ToolFunction, ToolInfo

from .. import chat
from ..engine import Engine
from ..model import load

try:  # what inspect's own providers report through; a version that moved it gets whole answers
    from inspect_ai.model import _stream as stream
except ImportError:
    stream = None

if TYPE_CHECKING:
    from ..engine import Request
    from ..model import Model
    from ..results import Completion, TokenLogprob

NEW_TOKENS = 2048  # where neither the task nor the user says how many
SAMPLING = ("temperature", "top_p", "top_k")
REFUSED = (
    "frequency_penalty", "presence_penalty", "logit_bias", "best_of", "prompt_logprobs",
    "response_schema", "extra_body",
)  # fmt: skip


@modelapi(name="kimi_linear")
class KimiAPI(ModelAPI):
    """A model for inspect-ai; `model_args` are those of `kimi_linear.load`.

    loaded: a model at hand, which stays open. Greedy unless a temperature is given. A tool that
    must be called (tool_choice) is begun for the model. Options of sampling that this package
    cannot honour are refused; those of other providers are ignored, as inspect's own do it.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  its base class's default
        loaded: "Model | None" = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self._owned = None
        if loaded is None:
            path = None if model_name == "small" else model_name
            loaded = self._owned = load(path, **model_args)
        self.model, self.engine = loaded, Engine(loaded)

    def close(self) -> None:
        self.engine.close()
        if self._owned is not None:
            self._owned.close()

    def max_tokens(self) -> int:
        return NEW_TOKENS

    def max_connections(self) -> int:
        """Twice what runs together, so that a next one always waits."""
        return 2 * self.model.plan.max_batch

    def connection_key(self) -> str:
        return self.model_name

    async def tokenize(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text)

    async def count_text_tokens(self, text: str) -> int:
        return len(self.model.tokenizer.encode(text))

    # ---- answers -------------------------------------------------------------------------

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """One answer, or config.num_choices; a prompt that fills the context is told as
        stop_reason "model_length"."""
        sampling = self._sampling(config)
        ids, begun = self._prompt(input, tools, tool_choice)
        most = self.model.plan.max_context
        if len(ids) >= most:
            text = f"the prompt has {len(ids)} tokens, max_context is {most}"
            return ModelOutput.from_content(self.model_name, text, "model_length", text)
        requests: list[Request] = []
        try:
            for i in range(config.num_choices or 1):
                seed = None if config.seed is None else config.seed + i
                requests.append(self.engine.submit(ids, **sampling, seed=seed))
            if stream is not None and stream.model_stream_requested():
                await self._stream(requests[0], begun)
            completions = [await request for request in requests]
        finally:
            for request in requests:  # those that are done do not mind
                request.cancel()
        choices = [self._choice(c, begun, bool(tools), sampling) for c in completions]
        return ModelOutput(model=self.model_name, choices=choices, usage=_usage(completions))

    def _sampling(self, config: GenerateConfig) -> dict[str, Any]:
        """inspect's options as arguments of `Model.generate`."""
        if refused := [name for name in REFUSED if getattr(config, name)]:
            raise ValueError(f"config: {', '.join(refused)}: this package has no such option")
        return {
            **{name: v for name in SAMPLING if (v := getattr(config, name)) is not None},
            "max_new_tokens": NEW_TOKENS if config.max_tokens is None else config.max_tokens,
            "stop": config.stop_seqs or (),
            "logprobs": (config.top_logprobs or 0) if config.logprobs else None,
        }

    def _prompt(
        self, messages: list[ChatMessage], tools: list[ToolInfo], choice: ToolChoice
    ) -> tuple[list[int], str]:
        """Token ids, and the beginning of a call that the model must make."""
        offered = [] if choice == "none" else [_tool(tool) for tool in tools]
        plain = [_message(message) for message in messages]
        ids = self.model.tokenizer.apply_chat_template(plain, tools=offered)
        assert isinstance(ids, list)
        begun = ""
        if offered and choice != "auto":
            begun = f"{chat.CALLS_BEGIN}{chat.CALL_BEGIN}functions."
            if isinstance(choice, ToolFunction):
                number = sum(len(message.get("tool_calls", ())) for message in plain)
                begun += f"{choice.name}:{number}{chat.CALL_ARGUMENTS}"
        return ids + self.model.tokenizer.encode(begun, allow_control=True), begun

    async def _stream(self, request: "Request", begun: str) -> None:
        """Report the text as it comes, and the calls once they are whole."""
        stream.report_model_stream_start()
        section = self.model.tokenizer.control_tokens.get(chat.CALLS_BEGIN)
        is_text = not begun
        async for chunk in request:
            is_text = is_text and chunk.token_id != section
            if is_text and chunk.text:
                await stream.report_model_stream_delta(StreamTextEvent(text=chunk.text))
        for call in chat.parse_tool_calls(begun + (await request).text):
            function = call["function"]
            await stream.report_model_stream_delta(
                StreamToolCallEvent(
                    id=call["id"], function=function["name"], arguments=function["arguments"]
                )
            )

    def _choice(
        self, completion: "Completion", begun: str, has_tools: bool, sampling: dict[str, Any]
    ) -> ChatCompletionChoice:
        text = begun + completion.text
        calls = [_call(call) for call in chat.parse_tool_calls(text)] if has_tools else []
        reason: Any = "tool_calls" if calls else "stop"
        if completion.finish_reason == "length":
            full = len(completion.token_ids) == sampling["max_new_tokens"]
            reason = "max_tokens" if full else "model_length"
        return ChatCompletionChoice(
            message=ChatMessageAssistant(
                content=text.partition(chat.CALLS_BEGIN)[0] if calls else text,
                tool_calls=calls or None,
                model=self.model_name,
                source="generate",
            ),
            stop_reason=reason,
            logprobs=self._logprobs(completion),
        )

    def _logprobs(self, completion: "Completion") -> Logprobs | None:
        if completion.logprobs is None:
            return None
        return Logprobs(content=[self._logprob(token) for token in completion.logprobs])

    def _logprob(self, token: "TokenLogprob") -> Logprob:
        return Logprob(
            **self._token(token.token_id),
            logprob=token.logprob,
            top_logprobs=[
                TopLogprob(**self._token(token_id), logprob=logprob)
                for token_id, logprob in token.top
            ],
        )

    def _token(self, token_id: int) -> dict[str, Any]:
        found = self.model.tokenizer.token_bytes(token_id)
        return {"token": found.decode(errors="replace"), "bytes": list(found)}


# ---- inspect's messages and tools, and this package's ------------------------------------


def _message(message: ChatMessage) -> dict[str, Any]:
    """A message as Tokenizer.apply_chat_template takes it; reasoning is left out."""
    if isinstance(message.content, list):
        kinds = {part.type for part in message.content} - {"text", "reasoning"}
        if kinds:
            raise ValueError(f"messages: must be of text, got {', '.join(sorted(kinds))}")
    plain: dict[str, Any] = {"role": message.role, "content": message.text}
    if isinstance(message, ChatMessageTool):
        plain["tool_call_id"] = message.tool_call_id
        if message.function:
            plain["name"] = message.function
        if message.error is not None:
            plain["content"] = message.error.message
    elif isinstance(message, ChatMessageAssistant) and message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "function": {"name": call.function, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return plain


def _tool(tool: ToolInfo) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters.model_dump(exclude_none=True),
    }
    return {"type": "function", "function": function}


def _call(call: dict[str, Any]) -> ToolCall:
    """A call that a model wrote; arguments that are no JSON object are inspect's parse_error."""
    name, text = call["function"]["name"], call["function"]["arguments"]
    try:
        arguments = json.loads(text)
        if not isinstance(arguments, dict):
            raise ValueError("must be a JSON object")
    except (ValueError, RecursionError) as e:
        return ToolCall(call["id"], name, {}, parse_error=f"arguments of {name}: {e}: {text}")
    return ToolCall(call["id"], name, arguments)


def _usage(completions: "list[Completion]") -> ModelUsage:
    """The prompt is counted once, and what a cache had of it apart, as inspect wants it."""
    stats = completions[0].stats
    new = sum(len(completion.token_ids) for completion in completions)
    return ModelUsage(
        input_tokens=stats.prompt_tokens - stats.cached_tokens,
        input_tokens_cache_read=stats.cached_tokens,
        output_tokens=new,
        total_tokens=stats.prompt_tokens + new,
    )
