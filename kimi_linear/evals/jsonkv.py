"""JSON key-value: a value looked up in an object of random uuids (Liu et al. 2023)."""

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from ._fit import largest
from ._ruler_lists import distinct
from ._ruler_niah import uuid4
from .suite import (
    Document,
    Example,
    Prompting,
    check_count,
    check_lengths,
    check_prefix,
)

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

__all__ = ["Suite"]

TEMPLATE = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    'JSON data:\n{{{pairs}}}\n\nKey: "{key}"'
)
OPENING = "\nCorresponding value:"


class Suite:
    """Objects of as many pairs as fit, and questions about keys of each.

    lengths: tokens of prompt and answer, never exceeded. samples: objects of each length.
    questions: keys asked for, of the same object. prefix: "raw", "prefill" or "none" (see
    Prompting).
    """

    def __init__(
        self,
        *,
        lengths: Sequence[int] = (4096,),
        samples: int = 50,
        questions: int = 1,
        seed: int = 42,
        prefix: str = "prefill",
        max_new_tokens: int = 64,
    ) -> None:
        self.lengths = check_lengths(lengths)
        self.samples = check_count(samples, "samples")
        self.questions = check_count(questions, "questions")
        self.seed, self.prefix = seed, check_prefix(prefix)
        self.max_new_tokens = check_count(max_new_tokens, "max_new_tokens")
        self.max_context = self.lengths[-1]

    def settings(self) -> dict[str, Any]:
        """All that defines the examples beside the tokenizer."""
        return {
            "suite": "jsonkv",
            "lengths": list(self.lengths),
            "samples": self.samples,
            "questions": self.questions,
            "seed": self.seed,
            "prefix": self.prefix,
            "max_new_tokens": self.max_new_tokens,
        }

    def documents(self, tokenizer: "Tokenizer") -> list[Document]:
        """An object each, by length."""
        prompting = Prompting(tokenizer, self.prefix)
        return [
            Document(
                tuple(f"jsonkv/{length}/{i}/{q}" for q in range(self.questions)),
                length,
                partial(self._examples, prompting, length, i),
            )
            for length in self.lengths
            for i in range(self.samples)
        ]

    def _examples(self, prompting: Prompting, length: int, index: int) -> list[Example]:
        def questions(n: int) -> list[tuple[str, str, int]]:
            return self._questions(Random(f"{self.seed}/{length}/{index}"), n)

        def cost(n: int) -> int:
            return max(prompting.count(text, OPENING) for text, _, _ in questions(n))

        n = largest(cost, length - self.max_new_tokens, self.questions)
        return [
            Example(
                f"jsonkv/{length}/{index}/{q}",
                "jsonkv",
                length,
                prompting.ids(text, OPENING),
                self.max_new_tokens,
                [value],
                {"depth": round(place / n, 4), "units": n},
            )
            for q, (text, value, place) in enumerate(questions(n))
        ]

    def _questions(self, r: Random, n: int) -> list[tuple[str, str, int]]:
        """(prompt, value, place of the pair) of each question about an object of n pairs."""
        asked = Random(r.random())
        keys = distinct(partial(uuid4, r), n)
        values = [uuid4(r) for _ in keys]
        pairs = ",\n ".join(f'"{k}": "{v}"' for k, v in zip(keys, values, strict=True))
        places = asked.sample(range(n), self.questions)
        return [(TEMPLATE.format(pairs=pairs, key=keys[i]), values[i], i) for i in places]

    def grade(self, example: Example, answer: str) -> dict[str, Any]:
        """1.0 where the value stands in the answer."""
        return {"score": float(example.references[0] in answer.lower())}
