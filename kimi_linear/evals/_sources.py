"""Texts and words that examples are made of: a user's file, a grammar, wonderwords."""

import json
import re
from functools import cache
from pathlib import Path
from random import Random

from . import _grammar
from .suite import file_name

_END = re.compile(r"[.!?][\"')\]]* (?=[\"'(A-Z0-9])")  # of a sentence that another follows
_TITLE = re.compile(r"\b(?:Mr|Mrs|Dr|St)\Z")  # which a full stop follows that ends nothing


class Haystack:
    """Prose to hide things in.

    path: a text file, or JSON with a "text" (RULER's PaulGrahamEssays.json); None makes English
    from a grammar. name: as results show it.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._grammar = Random("haystack") if path is None else None
        self._words: list[str] = []
        self.name = "grammar" if path is None else file_name(path)
        if path is not None:
            text = Path(path).read_text(encoding="utf-8")
            if Path(path).suffix == ".json":
                text = json.loads(text)["text"]
            self._words = text.split()
            if not self._words:
                raise ValueError(f"haystack: must hold words, {path} has none")

    def words(self, n: int) -> list[str]:
        """The first n words; a file that is too short is repeated."""
        while self._grammar is not None and len(self._words) < n:
            self._words += _grammar.sentence(self._grammar).split()
        repeats = -(-n // len(self._words)) if n else 0
        return (self._words * repeats)[:n] if repeats > 1 else self._words[:n]

    def paragraphs(self, least: int, most: int) -> list[str]:
        """Passages of whole sentences with least .. most characters, each text once."""
        found: dict[str, None] = {}
        current = ""
        for part in sentences(" ".join(self.words(max(len(self._words), 20_000)))):
            if current and len(current) + 1 + len(part) > most:
                if len(current) >= least:
                    found[current] = None
                current = ""
            current = f"{current} {part}".strip() if len(part) <= most else ""
        return list(found)


def sentences(text: str) -> list[str]:
    """Text cut after full stops, question and exclamation marks that a sentence follows."""
    found, begin = [], 0
    for end in _END.finditer(text):
        if not _TITLE.search(text, max(begin, end.start() - 4), end.start()):
            found.append(text[begin : end.end() - 1])
            begin = end.end()
    return [*found, text[begin:]]


class Words:
    """The word lists that RULER draws from, in the package wonderwords.

    nouns, adjectives: each word once, sorted. all: nouns, adjectives and verbs.
    """

    def __init__(self) -> None:
        try:
            import wonderwords
        except ImportError:
            raise ModuleNotFoundError(
                "RULER's words: need wonderwords (pip install 'kimi_linear[evals]')"
            ) from None
        folder = Path(wonderwords.__file__).parent / "assets"
        lists = {
            kind: [
                line.rstrip() for line in (folder / f"{kind}list.txt").read_text().splitlines()
            ]
            for kind in ("noun", "adjective", "verb")
        }
        self.nouns, self.adjectives = (sorted(set(lists[k])) for k in ("noun", "adjective"))
        self.all = sorted(set(lists["noun"] + lists["adjective"] + lists["verb"]))

    def pair(self, r: Random) -> str:
        """An "adjective-noun", each of the 6,171,620 equally likely: no two read alike."""
        return f"{r.choice(self.adjectives)}-{r.choice(self.nouns)}"


@cache
def words() -> Words:
    """The lists, read once."""
    return Words()
