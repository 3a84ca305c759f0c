"""mrcr-synth: conversations like MRCR's, from a grammar or the passages of a book."""

import string
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache, partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

from . import _grammar
from ._fit import largest
from ._sources import Haystack
from .suite import Document, Example, Prompting, check_count, check_lengths

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
PASSAGE = (400, 1200)  # characters of a passage from a book
NEAR_MISS = 0.3  # of the other requests: those that share form or topic with the one asked for
Key = tuple[str, str]  # form, topic


class Synth:
    """A conversation of requests and answers, then: give back the i-th answer to one request.

    needles: how many times the request occurs, each a task. lengths: tokens of prompt and
    answer, never exceeded. samples: conversations of each number of needles at each length.
    questions: for different i, of the same conversation. texts: a book whose passages are the
    answers, else ones of n_sentences after an opening, from a grammar.
    """

    def __init__(
        self,
        *,
        needles: Sequence[int] = (2, 4, 8),
        lengths: Sequence[int] = (4096,),
        samples: int = 50,
        questions: int = 1,
        seed: int = 42,
        texts: str | Path | None = None,
        n_sentences: int = 8,
    ) -> None:
        self.needles = tuple(sorted(set(needles)))
        if not self.needles or not 1 <= self.needles[0] <= self.needles[-1] <= len(ORDINALS):
            raise ValueError(f"needles: must be of 1..{len(ORDINALS)}, got {needles!r:.60}")
        self.lengths = check_lengths(lengths)
        self.samples = check_count(samples, "samples")
        self.questions = check_count(questions, "questions")
        if questions > self.needles[0]:
            raise ValueError(f"questions: must be at most {self.needles[0]}, got {questions}")
        self.seed = seed
        self._bank = _Bank(texts, check_count(n_sentences, "n_sentences"))
        self.max_context = self.lengths[-1]

    def settings(self) -> dict[str, Any]:
        """All that defines the examples beside the tokenizer."""
        return {
            "suite": "mrcr-synth",
            "needles": list(self.needles),
            "lengths": list(self.lengths),
            "samples": self.samples,
            "questions": self.questions,
            "seed": self.seed,
            "texts": self._bank.name,
            "prefix": "none",
            "grader": "OpenAI's",
        }

    def documents(self, tokenizer: "Tokenizer") -> list[Document]:
        """A conversation each: by length, then number of needles, then index."""
        prompting = Prompting(tokenizer, "none")
        longest = cache(lambda: max(len(tokenizer.encode(t)) for t in self._bank.all()))
        return [
            Document(
                tuple(f"{n} needles/{length}/{i}/{q}" for q in range(self.questions)),
                length,
                partial(self._examples, prompting, n, length, i, longest),
            )
            for length in self.lengths
            for n in self.needles
            for i in range(self.samples)
        ]

    def _examples(
        self, prompting: Prompting, n: int, length: int, index: int, longest: Any
    ) -> list[Example]:
        n_new = longest() + 32  # the code of ten characters, and the end
        seed = f"{self.seed}/{n}/{length}/{index}"

        def conversation(units: int) -> _Conversation:
            return _Conversation(Random(seed), self._bank, n, units, self.questions)

        def cost(units: int) -> int:
            made = conversation(units)
            return max(prompting.count(made.messages(q)) for q in range(self.questions))

        try:
            made = conversation(largest(cost, length - n_new, 0))
        except ValueError as e:
            raise ValueError(f"{n} needles at {length} tokens: {e}") from None
        return [
            Example(
                f"{n} needles/{length}/{index}/{q}",
                f"{n} needles",
                length,
                prompting.ids(made.messages(q)),
                n_new,
                [made.codes[q] + made.texts[i]],
                {"position": i + 1, "depth": round(made.depths[i], 4), "floor": made.floor(i)},
            )
            for q, i in enumerate(made.asked)
        ]

    def grade(self, example: Example, answer: str) -> dict[str, Any]:
        """By OpenAI's grader."""
        from .mrcr import grade_openai

        (reference,) = example.references
        return {"score": grade_openai(answer, reference, reference[:10])}


class _Bank:
    """At least eight different texts for every key, always the same ones."""

    def __init__(self, path: str | Path | None, n_sentences: int) -> None:
        book = None if path is None else Haystack(path)
        self._passages = [] if book is None else book.paragraphs(*PASSAGE)
        if book is not None and len(self._passages) < len(ORDINALS):
            raise ValueError(f"texts: must hold eight passages or more, {path} does not")
        Random("texts").shuffle(self._passages)
        self._n_sentences = n_sentences
        self.name = f"grammar, {n_sentences} sentences" if book is None else book.name
        self.keys = [(form, topic) for form in _grammar.FORMS for topic in _grammar.TOPICS]
        self.texts = cache(self._texts)

    def _texts(self, key: Key) -> list[str]:
        if self._passages:
            start = len(ORDINALS) * self.keys.index(key)
            return [
                self._passages[(start + i) % len(self._passages)] for i in range(len(ORDINALS))
            ]
        r = Random("/".join(key))
        found: dict[str, None] = {}
        while len(found) < len(ORDINALS):
            found[_grammar.piece(r, *key, self._n_sentences)] = None
        return list(found)

    def all(self) -> list[str]:
        """Every text of every key."""
        return [text for key in self.keys for text in self.texts(key)]


class _Conversation:
    """Requests and answers in turn.

    texts: answers to the request asked for, in their order. asked: which of them, from 0;
    codes: what to put before each. depths: where they stand, 0 .. 1.
    """

    def __init__(self, r: Random, bank: _Bank, n: int, units: int, questions: int) -> None:
        self._key = r.choice(bank.keys)
        self.texts = r.sample(bank.texts(self._key), n)
        self.asked = r.sample(range(n), questions)
        self.codes = [_code(r) for _ in range(questions)]
        turns = [_other(r, bank, self._key) for _ in range(units)]
        places = sorted(r.randint(0, units) for _ in range(n))
        for after, (place, text) in enumerate(zip(places, self.texts, strict=True)):
            turns.insert(place + after, (self._key, text))
        self._turns = turns
        self.depths = [(place + i) / (units + n) for i, place in enumerate(places)]

    def messages(self, question: int) -> list[dict[str, str]]:
        """The conversation with one of the questions."""
        form, topic = self._key
        out = []
        for key, text in self._turns:
            out.append({"role": "user", "content": _request(*key)})
            out.append({"role": "assistant", "content": text})
        ask = (
            f"Prepend {self.codes[question]} to the {ORDINALS[self.asked[question]]} {form} "
            f"about the {topic}. Do not include any other text in your response."
        )
        return [*out, {"role": "user", "content": ask}]

    def floor(self, i: int) -> float:
        """What an answer taken at random among the texts of the same request would score."""
        ratios = [SequenceMatcher(None, text, self.texts[i]).ratio() for text in self.texts]
        return round(fmean(ratios), 4)


def _other(r: Random, bank: _Bank, key: Key) -> tuple[Key, str]:
    """Another request and its answer."""
    while True:
        form, topic = r.choice(bank.keys)
        if r.random() < NEAR_MISS:
            form, topic = r.choice([(key[0], topic), (form, key[1])])
        if (form, topic) != key:
            return (form, topic), r.choice(bank.texts((form, topic)))


def _request(form: str, topic: str) -> str:
    return f"Write {'an' if form[0] in 'aeiou' else 'a'} {form} about the {topic}."


def _code(r: Random) -> str:
    return "".join(r.choices(string.ascii_letters + string.digits, k=10))
