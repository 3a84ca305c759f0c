"""MRCR: give back the i-th of several like answers of a long conversation.

`Suite` asks the questions of OpenAI's files (parquet or jsonl) or of Google's second version
(CSV); `Synth` makes conversations of the same shape, named mrcr-synth, since its texts come
from a grammar or a user's book and not from a language model: its scores compare with
themselves only. Both graders are the publishers', on CPython's difflib.
"""

import ast
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import quote
from ._mrcr_synth import Synth
from .suite import (
    Document,
    Example,
    Messages,
    Prompting,
    check_count,
    check_lengths,
    file_name,
)

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

__all__ = ["Row", "Suite", "Synth", "grade_google", "grade_openai", "load"]

BINS = tuple(2**k for k in range(13, 21))  # upper ends, tokens of prompt and answer
GOOGLE_HASH = 12


@dataclass(frozen=True)
class Row:
    """A question of a file. prompt: chat messages (OpenAI) or text (Google)."""

    number: int
    kind: str  # "openai" or "google"
    prompt: Messages | str = field(repr=False)
    answer: str = field(repr=False)
    prepend: str
    n_needles: int


def grade_openai(response: str, answer: str, random_string_to_prepend: str) -> float:
    """The ratio of difflib after the random string, which the response must begin with.

    The arguments of SequenceMatcher keep their order and its autojunk stays on: both change
    the number.
    """
    if not response.startswith(random_string_to_prepend):
        return 0.0
    response = response.removeprefix(random_string_to_prepend)
    answer = answer.removeprefix(random_string_to_prepend)
    return float(SequenceMatcher(None, response, answer).ratio())


def grade_google(prediction: str, target: str) -> float:
    """The ratio of difflib after the last occurrence of the target's first 12 characters."""
    prediction, target = prediction.strip(), target.strip()
    code = target[:GOOGLE_HASH]
    at = prediction.rfind(code)
    if len(code) < GOOGLE_HASH or at < 0:
        return 0.0
    text = prediction[at + GOOGLE_HASH :].strip()
    return float(SequenceMatcher(None, target[GOOGLE_HASH:].strip(), text).ratio())


# ---- files -------------------------------------------------------------------------------


def load(path: str | Path) -> Iterator[Row]:
    """The questions of a file: OpenAI's .parquet or .jsonl, Google's .csv.

    Raises ValueError naming the row and what it lacks; ModuleNotFoundError for parquet where
    pyarrow is not installed.
    """
    path = Path(path)
    readers = {".parquet": _parquet, ".jsonl": _jsonl, ".csv": _csv}
    if path.suffix not in readers:
        raise ValueError(
            f"data: must be a .parquet, .jsonl or .csv file, got {quote(str(path))}"
        )
    convert = _google if path.suffix == ".csv" else _openai
    for number, fields in enumerate(readers[path.suffix](path)):
        try:
            yield convert(number, fields)
        except (KeyError, TypeError, ValueError, SyntaxError) as e:
            raise ValueError(
                f"{path}: row {number}: must be a question of MRCR: {e!r}"
            ) from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ModuleNotFoundError(
            f"{path}: reading parquet needs pyarrow (pip install 'kimi_linear[evals]'), "
            f"or convert it to jsonl"
        ) from None
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=16):
            yield from batch.to_pylist()


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    before = csv.field_size_limit(sys.maxsize)  # a conversation is one field
    try:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file)
    finally:
        csv.field_size_limit(before)


def _openai(number: int, fields: dict[str, Any]) -> Row:
    prompt, answer = fields["prompt"], fields["answer"]
    messages = json.loads(prompt) if isinstance(prompt, str) else prompt
    prepend = fields["random_string_to_prepend"]
    if not answer.startswith(prepend):
        raise ValueError("answer does not begin with random_string_to_prepend")
    return Row(number, "openai", messages, answer, prepend, int(fields["n_needles"]))


def _google(number: int, fields: dict[str, Any]) -> Row:
    answer = fields["answer"].strip()
    n_needles = len(ast.literal_eval(fields["relevant_context_positions"]))
    return Row(number, "google", fields["queries"], answer, answer[:GOOGLE_HASH], n_needles)


# ---- suite -------------------------------------------------------------------------------


class Suite:
    """MRCR from files that the user has.

    data: files of OpenAI's or of Google's, not both. lengths: upper ends of bins, each reaching
    from half of it; a question counts in the bin of its tokens, prompt and answer. The
    publishers count with other tokenizers, so bins may differ from theirs at the borders;
    count: a function text -> tokens to bin with instead, named by count_name. samples: at most
    so many of each number of needles in a bin, the first of the files. prefix: "none" asks in
    the chat format, "raw" continues Google's text as it is. limit: tokens of the longest
    context; questions that do not fit are left out and counted ("too_long" in the settings).
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        *,
        lengths: Sequence[int] = BINS[:5],
        samples: int = 100,
        prefix: str = "none",
        max_new_tokens: int = 2048,
        count: Callable[[str], int] | None = None,
        count_name: str = "the model's tokenizer",
        limit: int = 1 << 20,
    ) -> None:
        self.paths = [data] if isinstance(data, str | Path) else list(data)
        if not self.paths:
            raise ValueError("data: must be at least one file, got none")
        for path in self.paths:
            if not Path(path).is_file():
                raise FileNotFoundError(f"data: must be files, {path} is none")
        if prefix not in ("none", "raw"):
            raise ValueError(f"prefix: must be none or raw for mrcr, got {quote(prefix)}")
        self.prefix = prefix
        self.lengths = check_lengths(lengths)
        self.samples = check_count(samples, "samples")
        self.max_new_tokens = check_count(max_new_tokens, "max_new_tokens")
        self._count, self._count_name = count, count_name
        self._rows: dict[str, Row] = {}
        # Bins count texts alone; the roles of a thousand turns take their own tokens.
        wanted = self.lengths[-1] + self.lengths[-1] // 8 + self.max_new_tokens
        self.max_context = min(wanted, check_count(limit, "limit"))
        self._too_long = 0

    def settings(self) -> dict[str, Any]:
        """All that defines the examples beside the tokenizer."""
        return {
            "suite": "mrcr",
            "data": [file_name(p) for p in self.paths],
            "lengths": list(self.lengths),
            "bins_by": self._count_name,
            "samples": self.samples,
            "prefix": self.prefix,
            "max_new_tokens": self.max_new_tokens,
            "tools": "none",
            "too_long": self._too_long,
        }

    def documents(self, tokenizer: "Tokenizer") -> list[Document]:
        """One document a question, by bin, then number of needles, then place in the files.

        Reads the files, and tokenises each text as far as the longest bin reaches.
        """
        count = self._count or (lambda text: len(tokenizer.encode(text)))
        turn = len(tokenizer.apply_chat_template([{"role": "assistant", "content": ""}]))
        self._too_long = 0
        chosen: list[tuple[int, int, str, Row]] = []
        taken: Counter[tuple[int, int]] = Counter()
        for place, path in enumerate(self.paths):
            for row in load(path):
                n = _tokens(row, count, self.lengths[-1])
                length = _bin(n, self.lengths)
                if length is None or taken[length, row.n_needles] == self.samples:
                    continue
                n_turns = 1 if isinstance(row.prompt, str) else len(row.prompt)
                if n + turn * (n_turns + 1) > self.max_context:
                    self._too_long += 1
                    continue
                taken[length, row.n_needles] += 1
                chosen.append((length, row.n_needles, f"{place}/{row.number}", row))
        chosen.sort(key=lambda c: c[:2])
        prompting = Prompting(tokenizer, self.prefix)
        return [self._document(*c, prompting) for c in chosen]

    def _document(
        self, length: int, n_needles: int, name: str, row: Row, prompting: Prompting
    ) -> Document:
        name = f"{n_needles} needles/{name}"
        self._rows[name] = row

        def make() -> list[Example]:
            ids = prompting.ids(row.prompt)
            task = f"{n_needles} needles"
            return [Example(name, task, length, ids, self.max_new_tokens, [row.answer])]

        return Document((name,), length, make)

    def grade(self, example: Example, answer: str) -> dict[str, Any]:
        """By the grader of the file's publisher."""
        row = self._rows[example.id]
        if row.kind == "google":
            return {"score": grade_google(answer, row.answer)}
        return {"score": grade_openai(answer, row.answer, row.prepend)}


def _tokens(row: Row, count: Callable[[str], int], most: int) -> int:
    """Tokens of prompt and answer; counts no further than past `most`."""
    texts = [row.prompt] if isinstance(row.prompt, str) else [m["content"] for m in row.prompt]
    n = 0
    for text in (*_pieces(texts), row.answer):
        n += count(text)
        if n > most:
            break
    return n


def _bin(n: int, lengths: Sequence[int]) -> int | None:
    """The bin of n tokens, None where there is none."""
    n += n == BINS[0] // 2  # the publisher's first bin has both its ends
    return next((length for length in lengths if length // 2 < n <= length), None)


def _pieces(texts: Sequence[str], width: int = 1 << 20) -> Iterator[str]:
    """Texts, the long ones cut: of a text of megabytes the first part often decides."""
    for text in texts:
        yield from (text[at : at + width] for at in range(0, len(text), width))
