"""Answers in OpenAI's shapes, whole and in pieces.

An answer is made for one request and holds what its pieces need: both kinds have the same
methods, so that whoever runs a request need not know which it is.
"""

import time
import uuid
from typing import TYPE_CHECKING, Any

from .jobs import Job
from .logprobs import CompletionLogprobs, Scored, chat_logprobs, of_prompt, of_tokens
from .tools import ToolSplitter

if TYPE_CHECKING:
    from ..results import Chunk, Completion, Logprobs, Stats
    from ..tokenizer import Tokenizer


class Answer:
    """What both kinds share: the envelope and the counts."""

    prefix = ""  # of the id
    kind = kind_of_piece = ""

    def __init__(self, job: Job, tokenizer: "Tokenizer", model: str, fingerprint: str) -> None:
        self.job, self.tokenizer = job, tokenizer
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, completions: "list[Completion]") -> dict[str, Any]:
        """The body of an answer that comes in one piece."""
        choices = [self.choice(i, c) for i, c in enumerate(completions)]
        usage = self.usage([c.stats for c in completions])
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def piece(self, choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
        """An event of a stream."""
        event = {**self._head, "object": self.kind_of_piece, "choices": choices}
        return event | {"usage": usage} if self.job.include_usage else event

    def usage(self, stats: "list[Stats]") -> dict[str, Any]:
        """The counts; a prompt with several answers counts once, as its first one has it."""
        prompt = sum(map(len, self.job.rows))
        new = sum(s.new_tokens for s in stats)
        cached = sum(s.cached_tokens for s in stats[:: self.job.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def choice(self, index: int, completion: "Completion") -> dict[str, Any]:
        """One of the choices of a whole answer."""
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first token."""
        raise NotImplementedError

    def step(self, index: int, chunk: "Chunk") -> dict[str, Any] | None:
        """What a stream says of a choice's next token, None: nothing yet."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of /v1/completions. prompts: the log-probabilities of each prompt, where echoed."""

    prefix, kind, kind_of_piece = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, prompts: "list[Logprobs] | None" = None) -> None:
        super().__init__(*args)
        self._prompts = prompts
        n_choices = len(self.job.rows) * self.job.n
        self._logprobs = [CompletionLogprobs(self.tokenizer) for _ in range(n_choices)]

    def choice(self, index: int, completion: "Completion") -> dict[str, Any]:
        opening = self.opening(index)
        scored = of_tokens(completion.logprobs or ())
        rest = self._choice(index, completion.text, scored, completion.finish_reason)
        return joined(opening, rest) if opening else rest

    def opening(self, index: int) -> dict[str, Any] | None:
        if not self.job.echo:
            return None
        row = index // self.job.n
        text = self.tokenizer.decode(self.job.rows[row].tolist())
        scored = of_prompt(self._prompts[row]) if self._prompts else []
        choice = self._choice(index, text, scored, None)
        self._logprobs[index].end_prompt()
        return choice

    def step(self, index: int, chunk: "Chunk") -> dict[str, Any] | None:
        if not chunk.text and not chunk.finish_reason and self.job.logprobs is None:
            return None
        return self._choice(index, chunk.text, of_tokens([chunk]), chunk.finish_reason)

    def _choice(
        self, index: int, text: str, scored: list[Scored], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.job.logprobs is not None:
            logprobs = self._logprobs[index].take(scored)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def joined(first: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """A choice of /v1/completions from its two parts."""
    logprobs = None
    if first["logprobs"] is not None:
        logprobs = {k: column + rest["logprobs"][k] for k, column in first["logprobs"].items()}
    return rest | {"text": first["text"] + rest["text"], "logprobs": logprobs}


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    prefix, kind, kind_of_piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._splitters = [ToolSplitter(self.job.has_tools) for _ in range(self.job.n)]

    def choice(self, index: int, completion: "Completion") -> dict[str, Any]:
        content, calls = self._splitters[index].feed(completion.text, last=True)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if calls else ""),
        }
        if calls:
            message["tool_calls"] = calls
        scored = of_tokens(completion.logprobs or ())
        finish = self._finish(index, completion.finish_reason)
        return {"index": index, "message": message, **self._rest(scored, finish)}

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, **self._rest([], None)}

    def step(self, index: int, chunk: "Chunk") -> dict[str, Any] | None:
        splitter, delta = self._splitters[index], dict[str, Any]()
        n_before = splitter.n_calls
        content, calls = splitter.feed(chunk.text, last=chunk.finish_reason is not None)
        if content:
            delta["content"] = content
        if calls:
            delta["tool_calls"] = [{"index": i, **c} for i, c in enumerate(calls, n_before)]
        if not delta and not chunk.finish_reason and self.job.logprobs is None:
            return None
        finish = self._finish(index, chunk.finish_reason)
        return {"index": index, "delta": delta, **self._rest(of_tokens([chunk]), finish)}

    def _finish(self, index: int, reason: str | None) -> str | None:
        called = reason == "stop" and self._splitters[index].n_calls
        return "tool_calls" if called else reason

    def _rest(self, scored: list[Scored], finish: str | None) -> dict[str, Any]:
        logprobs = None
        if self.job.logprobs is not None and (scored or finish):
            logprobs = chat_logprobs(self.tokenizer, scored)
        return {"logprobs": logprobs, "finish_reason": finish}
