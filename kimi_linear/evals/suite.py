"""What a suite is made of: examples, the documents that share them, and their prompts."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .._files import quote

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
PREFIXES = ("raw", "prefill", "none")


@dataclass(frozen=True)
class Example:
    """One question.

    id: unique in its suite, the same in every run. task, length: the cell of the table that it
    counts in. references: the right answers. details: what the record keeps beside the score.
    """

    id: str
    task: str
    length: int
    prompt_ids: list[int] = field(repr=False)
    max_new_tokens: int
    references: list[str]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """Examples that share a text, made when their turn comes.

    ids: of the examples, in order. length: tokens of one of them, about.
    """

    ids: tuple[str, ...]
    length: int
    make: Callable[[], list[Example]] = field(repr=False)


class Suite(Protocol):
    """What `run` needs of a suite.

    max_context: tokens that its longest example takes, answer included.
    """

    max_context: int

    def settings(self) -> dict[str, Any]:
        """All that defines the examples beside the tokenizer, as JSON; "suite" is its name."""

    def documents(self, tokenizer: "Tokenizer") -> list[Document]:
        """The documents, in the order of the tables; cheap, since each is made later."""

    def grade(self, example: Example, answer: str) -> dict[str, Any]:
        """{"score": 0.0 .. 1.0, ...}: what the record says of an answer."""


class Repeated:
    """A suite in which each question is drawn several times: its score is then avg@times.

    Errors stay those of documents: draws of one question are no independent samples.
    """

    def __init__(self, suite: Suite, times: int) -> None:
        self._suite, self._times = suite, times
        self.max_context = suite.max_context

    def settings(self) -> dict[str, Any]:
        """The suite's, and how many draws."""
        return {**self._suite.settings(), "repeats": self._times}

    def documents(self, tokenizer: "Tokenizer") -> list[Document]:
        """The suite's; the draws of a question stand side by side."""
        return [
            Document(
                tuple(f"{i}~{k}" for i in document.ids for k in range(self._times)),
                document.length,
                partial(self._examples, document),
            )
            for document in self._suite.documents(tokenizer)
        ]

    def _examples(self, document: Document) -> list[Example]:
        return [
            replace(example, id=f"{example.id}~{k}")
            for example in document.make()
            for k in range(self._times)
        ]

    def grade(self, example: Example, answer: str) -> dict[str, Any]:
        """As the suite grades the question."""
        question = replace(example, id=example.id.rpartition("~")[0])
        return self._suite.grade(question, answer)


class Prompting:
    """How a question becomes token ids, and what the answer begins with.

    prefix: "raw" continues the question and the beginning of its answer as plain text;
    "prefill" asks in the chat format and opens the assistant's turn with the beginning; "none"
    asks in the chat format and leaves the answer to the model.
    """

    def __init__(self, tokenizer: "Tokenizer", prefix: str) -> None:
        self.prefix = check_prefix(prefix)
        self.tokenizer = tokenizer

    def ids(self, prompt: str | Messages, opening: str = "") -> list[int]:
        """Token ids of a question; opening: the beginning of its answer."""
        if self.prefix == "raw":
            if not isinstance(prompt, str):
                raise ValueError("prefix: must be prefill or none for chat messages, got 'raw'")
            return self.tokenizer.encode(prompt + opening)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        ids = self.tokenizer.apply_chat_template(messages)
        assert isinstance(ids, list)
        if self.prefix == "prefill":
            ids += self.tokenizer.encode(opening.lstrip())
        return ids

    def count(self, prompt: str | Messages, opening: str = "") -> int:
        """Tokens of a question."""
        return len(self.ids(prompt, opening))


def check_prefix(prefix: str) -> str:
    if prefix not in PREFIXES:
        raise ValueError(f"prefix: must be one of {', '.join(PREFIXES)}, got {quote(prefix)}")
    return prefix


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Lengths in tokens, ascending, each once."""
    if not isinstance(lengths, Iterable):
        raise TypeError(f"lengths: must be a list of integers, got {quote(lengths)}")
    found = tuple(sorted({check_count(n, "lengths") for n in lengths}))
    if not found:
        raise ValueError("lengths: must have at least one, got none")
    return found


def check_count(value: int, name: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: must be an integer of at least {least}, got {quote(value)}")
    return value


@cache
def file_name(path: str | Path) -> str:
    """A file as results name it: its name, and which bytes it had."""
    with Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{Path(path).name} sha256:{digest[:12]}"


def tokenizer_name(tokenizer: "Tokenizer") -> str:
    """A tokenizer as results name it: its size, and which tokens it has."""
    digest = hashlib.sha256()
    n_ranks = tokenizer.vocab_size - len(tokenizer.control_tokens)
    for token_id in range(n_ranks):
        token = tokenizer.token_bytes(token_id)
        digest.update(len(token).to_bytes(4, "little") + token)
    return f"tiktoken of {tokenizer.vocab_size} ids sha256:{digest.hexdigest()[:12]}"
