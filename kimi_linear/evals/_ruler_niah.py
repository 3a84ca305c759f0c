"""RULER's needles in a haystack.

Prompts and parameters are those of NVIDIA/RULER (Apache-2.0), scripts/data/synthetic/niah.py.
"""

import uuid
from dataclasses import dataclass
from random import Random

from ._ruler_task import Sample, Setting
from ._sources import sentences, words

TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
OPENING = " The special magic {kind} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
DEPTHS = [round(100 * i / 39) for i in range(40)]  # percent, evenly from 0 to 100


def number(r: Random) -> str:
    return str(r.randint(10**6, 10**7 - 1))


def uuid4(r: Random) -> str:
    return str(uuid.UUID(int=r.getrandbits(128), version=4))


def word(r: Random) -> str:
    return words().pair(r)


KINDS = {"numbers": number, "words": word, "uuids": uuid4}


@dataclass(frozen=True)
class Niah:
    """Values hidden under keys in a haystack, and a question for some of the keys.

    haystack: "noise" (one paragraph again and again), "needle" (lines like the hidden one) or
    "essay" (prose). keys, values: kinds of both, "words", "numbers" or "uuids".
    n_keys, n_values, n_queries: keys hidden, values of each, keys asked for.
    """

    name: str
    haystack: str
    keys: str = "words"
    values: str = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1
    max_new_tokens: int = 128
    match: str = "all"

    def maker(self, setting: Setting) -> "_Maker":
        return _Maker(self, setting)


class _Maker:
    def __init__(self, task: Niah, setting: Setting) -> None:
        self._task, self._setting = task, setting
        self._n_keys = max(task.n_keys, task.n_queries)
        self._n_needles = self._n_keys * task.n_values
        self.least = self._n_needles
        # Upstream keeps 500 words below 4,096 tokens too, which leaves some samples empty.
        essay, short = task.haystack == "essay", setting.length < 4096
        self.step = (50 if short else 500) if essay else (5 if short else 25)
        self._template, self._opening, self._kind = TEMPLATE, OPENING, task.values
        if task.n_queries * task.n_values == 1:
            self._template, self._opening = _singular(TEMPLATE), _singular(OPENING)
            self._kind = task.values[:-1]

    def make(self, r: Random, units: int, index: int) -> Sample:
        task, (key, value) = self._task, (KINDS[self._task.keys], KINDS[self._task.values])
        hidden: dict[str, list[str]] = {}
        while len(hidden) < self._n_keys:
            hidden.setdefault(key(r), [value(r) for _ in range(task.n_values)])
        needles = [self._needle(k, v) for k, values in hidden.items() for v in values]
        Random(self._setting.seed).shuffle(needles)  # upstream has one order for all samples
        context = self._context(r, units, needles, hidden)
        asked = r.sample(list(hidden), task.n_queries)
        answers = [v for k in asked for v in hidden[k]]
        fields = {"kind": self._kind, "query": _listed(asked)}
        text = self._template.format(context=context, **fields)
        depth = round(text.index(answers[0]) / len(text), 4)
        return Sample(text, self._opening.format(**fields), answers, {"depth": depth})

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self._task.values, key=key, value=value)

    def _context(
        self, r: Random, units: int, needles: list[str], hidden: dict[str, list[str]]
    ) -> str:
        if self._task.haystack == "essay":
            return _in_prose(r, self._setting.haystack.words(units), needles)
        if self._task.haystack == "noise":
            lines = [NOISE] * units
        else:
            lines = [self._distractor(r, hidden) for _ in range(units)]
        places = sorted(r.sample(range(units), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _distractor(self, r: Random, hidden: dict[str, list[str]]) -> str:
        """A needle of another key: a second value for a hidden key would make the question
        ambiguous, which happens upstream, though rarely."""
        key = KINDS[self._task.keys](r)
        while key in hidden:
            key = KINDS[self._task.keys](r)
        return self._needle(key, KINDS[self._task.values](r))


def _in_prose(r: Random, prose: list[str], needles: list[str]) -> str:
    """Needles between sentences, at depths drawn from DEPTHS."""
    found = sentences(" ".join(prose))
    depths = r.sample(DEPTHS, len(needles))
    places = sorted(int(len(found) * (depth / 100)) for depth in depths)
    parts: list[str] = []
    at = 0
    for place, needle in zip(places, needles, strict=True):
        parts += [" ".join(found[at:place]), needle]
        at = place
    return " ".join([*parts, " ".join(found[at:])])


def _singular(text: str) -> str:
    """Upstream's replacements where one value is asked for, in its order."""
    for plural, one in (("Some", "A"), ("are all", "is"), ("are", "is")):
        text = text.replace(plural, one)
    return text


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
