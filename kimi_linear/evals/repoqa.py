"""RepoQA's needle functions: find the function that a description tells of in a repository.

Contexts, prompt and scoring are those of evalplus/repoqa (Apache-2.0), without its comment
cleaning. README.md tells of two differences: whose tokens count, and how a function is found
in an answer of another language than Python.
"""

import ast
import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._bleu import bleu
from .suite import (
    Document,
    Example,
    Prompting,
    check_count,
    check_lengths,
    check_prefix,
    file_name,
)

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer
    from .results import Results

__all__ = ["Suite", "code_context", "function_in", "load", "overall", "prompt", "similarity"]

INSTRUCTION = (
    "Based on the function description and code context, please retrieve and repeat the exact "
    "described function from the code context in a code block wrapped by ```:"
)
COMMENT = {"python": "#"}  # the other languages have //
THRESHOLD = 0.8
THRESHOLDS = tuple(i / 10 for i in range(11))
Count = Callable[[str], int]
Repository = dict[str, Any]


def load(path: str | Path) -> dict[str, list[Repository]]:
    """{language: repositories} of a file repoqa-*.json or .json.gz, those that have needles."""
    path = Path(path)
    raw = path.read_bytes()
    data = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    found = {}
    for language, repositories in data.items():
        found[language] = [r for r in repositories if "needles" in r]
        for r in found[language]:
            if missing := {"repo", "content", "dependency"} - set(r):
                raise ValueError(f"{path}: {language}: a repository lacks {min(missing)}")
    return found


# ---- prompt ------------------------------------------------------------------------------


def prompt(context: str, description: str) -> str:
    """The question: instruction, code, description, instruction."""
    return f"{INSTRUCTION}{context}\nFunction Description:{description}\n{INSTRUCTION}"


def code_context(
    language: str,
    repository: Repository,
    needle: dict[str, Any],
    size: int,
    ratio: float,
    count: Count,
) -> str:
    """Whole lines of a repository's files, in the order of their dependencies, around a needle.

    size: tokens, about; ratio: where the needle's middle stands in them, 0 .. 1.
    """
    mark = COMMENT.get(language, "//") + " Path: "
    files = [
        (mark + path, repository["content"][path]) for path in _order(repository["dependency"])
    ]
    at = next(i for i, (head, _) in enumerate(files) if head == mark + needle["path"])
    before, code, after = _cut(files[at][1], needle["start_byte"], needle["end_byte"])
    n_code = count(code)
    n_before = int(size * ratio - n_code / 2)
    n_after = size - n_code - n_before
    head, used, cut = _last_lines([files[at][0], *before.split("\n")], n_before, count)
    earlier = [] if cut else _beginnings(files[:at][::-1], n_before - used, count)
    tail, used, cut = _first_lines(after.split("\n"), n_after, count)
    later = [] if cut else _beginnings(files[at + 1 :], n_after - used, count)
    return "".join([*reversed(earlier), head, code, tail, *later])


def _cut(text: str, start: int, end: int) -> tuple[str, str, str]:
    """A text cut at two places, counted in bytes."""
    data = text.encode()
    parts = (data[:start], data[start:end], data[end:])
    before, middle, after = (part.decode(errors="replace") for part in parts)
    return before, middle, after


def _beginnings(files: Sequence[tuple[str, str]], room: int, count: Count) -> list[str]:
    """Files after each other, the last one cut where the room ends."""
    found = []
    for head, content in files:
        if room <= 0:
            break
        text, used, cut = _first_lines([head, *content.split("\n")], room, count)
        found.append(text)
        if cut:
            break
        room -= used
    return found


def _fitting(lines: Iterator[str], room: int, count: Count) -> tuple[list[str], int, bool]:
    """The first lines of at most `room` tokens, their tokens, and whether any is left."""
    found: list[str] = []
    used = 0
    for line in lines:
        n = count(line + "\n")
        if used + n > room:
            return found, used, True
        found.append(line + "\n")
        used += n
    return found, used, False


def _last_lines(lines: list[str], room: int, count: Count) -> tuple[str, int, bool]:
    found, used, cut = _fitting(iter(reversed(lines)), room, count)
    return "".join(reversed(found)), used, cut


def _first_lines(lines: list[str], room: int, count: Count) -> tuple[str, int, bool]:
    found, used, cut = _fitting(iter(lines), room, count)
    if cut:
        found.append("...\n")
        used += count("...\n")
    return "".join(found), used, cut


def _order(graph: dict[str, list[str]]) -> list[str]:
    """Every file after the files that it imports."""
    order: dict[str, None] = {}
    entered: set[str] = set()
    for root in graph:
        path = [] if root in entered else [(root, iter(graph[root]))]
        entered.add(root)
        while path:
            node, rest = path[-1]
            child = next((c for c in rest if c not in entered), None)
            if child is None:
                order[node] = None
                path.pop()
            else:
                entered.add(child)
                path.append((child, iter(graph.get(child, ()))))
    return list(order)


# ---- score -------------------------------------------------------------------------------


def function_in(answer: str, language: str) -> str:
    """The first function of the answer's fenced blocks, else the first block, else the answer.

    Functions are recognised in Python only; a block of another language counts whole.
    """
    answer = answer.strip()
    blocks: list[str] = re.findall(
        r"^```(?:\w+)?\s*\n(.*?)(?=^```)```", answer, re.DOTALL | re.M
    )
    if not blocks:
        return answer
    functions = (_first_function(b) for b in blocks if language == "python")
    return next((f for f in functions if f is not None), blocks[0])


def _first_function(block: str) -> str | None:
    try:
        tree = ast.parse(block)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    if not found:
        return None
    return ast.get_source_segment(block, min(found, key=lambda n: (n.lineno, n.col_offset)))


def similarity(candidate: str, reference: str) -> float:
    """BLEU of two functions, word by word between white space."""
    return bleu(*(re.split(r"\s+", text.strip()) for text in (reference, candidate)))


def _source(repository: Repository, needle: dict[str, Any]) -> str:
    lines = repository["content"][needle["path"]].split("\n")
    return "\n".join(lines[needle["start_line"] : needle["end_line"]])


def overall(results: "Results") -> dict[str, Any]:
    """{"thresholds": {length: {threshold: share of answers that are right by it}}}."""
    found: dict[str, dict[str, float]] = {}
    for length in results.means():
        records = [r for r in results.records if r["length"] == length]
        found[str(length)] = {
            str(t): sum(r["best"] == r["needle"] and r["bleu"] >= t for r in records)
            / len(records)
            for t in THRESHOLDS
        }
    return {"thresholds": found}


# ---- suite -------------------------------------------------------------------------------


class Suite:
    """RepoQA from a file that the user has; each language is a task.

    data: repoqa-2024-06-23.json or .json.gz. languages: some of the file's, by default all.
    lengths: tokens of code (upstream 16,384, counted by CodeLlama's tokenizer; here by the
    model's). samples: at most so many needles of a language, None for all.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        languages: Sequence[str] | None = None,
        lengths: Sequence[int] = (16384,),
        samples: int | None = None,
        prefix: str = "none",
        max_new_tokens: int = 1024,
    ) -> None:
        self.path = Path(data)
        self._data = load(self.path)
        self.languages = tuple(self._data if languages is None else languages)
        if unknown := set(self.languages) - set(self._data):
            raise ValueError(
                f"languages: must be of {', '.join(self._data)}, got {min(unknown)}"
            )
        self.lengths = check_lengths(lengths)
        self.samples = None if samples is None else check_count(samples, "samples")
        self.prefix = check_prefix(prefix)
        self.max_new_tokens = check_count(max_new_tokens, "max_new_tokens")
        self._asked: dict[str, tuple[str, Repository]] = {}
        self.max_context = self.lengths[-1] + self.lengths[-1] // 2 + self.max_new_tokens

    def settings(self) -> dict[str, Any]:
        """All that defines the examples beside the tokenizer."""
        return {
            "suite": "repoqa",
            "data": file_name(self.path),
            "languages": list(self.languages),
            "lengths": list(self.lengths),
            "samples": self.samples,
            "prefix": self.prefix,
            "max_new_tokens": self.max_new_tokens,
            "threshold": THRESHOLD,
            "functions": "found in Python, else the whole block",
        }

    def documents(self, tokenizer: "Tokenizer") -> list[Document]:
        """A document each needle, by length, then language, then repository."""
        prompting = Prompting(tokenizer, self.prefix)
        return [
            self._document(prompting, length, language, repository, i)
            for length in self.lengths
            for language in self.languages
            for repository, i in self._needles(language)
        ]

    def _needles(self, language: str) -> list[tuple[Repository, int]]:
        found = [(r, i) for r in self._data[language] for i in range(len(r["needles"]))]
        return found[: self.samples]

    def _document(
        self, prompting: Prompting, length: int, language: str, repository: Repository, i: int
    ) -> Document:
        name = f"{language}/{repository['repo']}/{repository['needles'][i]['name']}/{length}"
        self._asked[name] = language, repository
        return Document((name,), length, partial(self._examples, prompting, name, length, i))

    def _examples(self, prompting: Prompting, name: str, length: int, i: int) -> list[Example]:
        language, repository = self._asked[name]
        needles = repository["needles"]
        needle, ratio = needles[i], (i + 0.5) / len(needles)

        def count(text: str) -> int:
            return len(prompting.tokenizer.encode(text))

        context = code_context(language, repository, needle, length, ratio, count)
        ids = prompting.ids(prompt(context, needle["description"]))
        details = {"needle": needle["name"], "depth": ratio}
        return [
            Example(name, language, length, ids, self.max_new_tokens,
                    [_source(repository, needle)], details)
        ]  # fmt: skip

    def grade(self, example: Example, answer: str) -> dict[str, Any]:
        """1.0 where the needle is the most similar of the repository's and similar enough."""
        language, repository = self._asked[example.id]
        function = function_in(answer, language)
        best, best_bleu = None, 0.0
        for needle in repository["needles"]:
            found = similarity(function, _source(repository, needle))
            if found > best_bleu:
                best, best_bleu = needle["name"], found
        right = best == example.details["needle"] and best_bleu >= THRESHOLD
        return {"score": float(right), "bleu": best_bleu, "best": best}
