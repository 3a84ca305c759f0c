"""RULER's variable tracking, common words and frequent words.

Prompts and parameters are those of NVIDIA/RULER (Apache-2.0), scripts/data/synthetic.
"""

import json
import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

from ._fit import largest
from ._ruler_niah import NOISE
from ._ruler_task import Sample, Setting
from ._sources import words

VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
VT_OPENING = (
    " Answer: According to the chain(s) of variable assignment in the text above, {n} "
    "variables are assigned the value {value}, they are: "
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
CWE_OPENING = " Answer: The top 10 words that appear most often in the list are:"
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\nQuestion: Do not provide any "
    "explanation. Please ignore the dots '....'. What are the three most frequently appeared "
    "words in the above coded text?"
)
FWE_OPENING = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
VT_EXAMPLE_TOKENS = 500


def distinct(make: Callable[[], str], n: int) -> list[str]:
    """n different results of make, in the order they came."""
    found: dict[str, None] = {}
    while len(found) < n:
        found[make()] = None
    return list(found)


def letters(r: Random, alphabet: str, n: int) -> str:
    return "".join(r.choices(alphabet, k=n))


# ---- variable tracking -------------------------------------------------------------------


@dataclass(frozen=True)
class VariableTracking:
    """Chains of assignments in noise; name all variables that hold the first chain's value.

    chains: how many; hops: assignments of one after its first. A solved example precedes.
    """

    name: str = "vt"
    chains: int = 1
    hops: int = 4
    max_new_tokens: int = 30
    match: str = "all"

    def maker(self, setting: Setting) -> "_VariableMaker":
        return _VariableMaker(self, setting)


class _VariableMaker:
    def __init__(self, task: VariableTracking, setting: Setting) -> None:
        self._task, self._seed = task, setting.seed
        self.least = task.hops + 1
        self.step = 5 if setting.length < 4096 else 10

        def cost(units: int) -> int:
            example = self._chains_in_noise(Random(0), Random(0), units, 3)
            return setting.count(example.input, example.opening)

        self._example_units = largest(cost, VT_EXAMPLE_TOKENS, self.least)

    def make(self, r: Random, units: int, index: int) -> Sample:
        # The example's lines stay where they are; only its names and value change.
        example = self._chains_in_noise(r, Random(self._seed), self._example_units, 3)
        asked = self._chains_in_noise(r, r, units, 5)
        solved = f"{example.input}{example.opening} {' '.join(example.answers)}\n\n"
        return Sample(solved + asked.input, asked.opening, asked.answers)

    def _chains_in_noise(self, r: Random, places: Random, units: int, width: int) -> Sample:
        """Names of `width` letters from r, positions from `places`."""
        task, n = self._task, self._task.hops + 1
        names = distinct(lambda: letters(r, string.ascii_uppercase, width), n * task.chains)
        values = distinct(lambda: str(r.randrange(10_000, 99_999)), task.chains)
        lines = [NOISE] * units
        for i, value in enumerate(values):
            chain = names[i * n : (i + 1) * n]
            code = [f"VAR {chain[0]} = {value}"]
            code += [f"VAR {b} = VAR {a} " for a, b in pairwise(chain)]
            for after, place in enumerate(sorted(places.sample(range(len(lines)), n))):
                lines.insert(place + after, code[after])
        fields = {"value": values[0], "n": n}
        text = VT.format(context="\n".join(lines).replace(". \n", ".\n"), **fields)
        return Sample(text, VT_OPENING.format(**fields), names[:n])


# ---- common words ------------------------------------------------------------------------


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words appear often and the others seldom.

    common, uncommon: how often, from 4,096 tokens on. A solved example precedes.
    """

    name: str = "cwe"
    common: int = 30
    uncommon: int = 3
    max_new_tokens: int = 120
    match: str = "all"

    def maker(self, setting: Setting) -> "_CommonMaker":
        return _CommonMaker(self, setting)


class _CommonMaker:
    least = 10  # words, all of them common
    step = 10

    def __init__(self, task: CommonWords, setting: Setting) -> None:
        self._seed, self._file = setting.seed, setting.words
        short = setting.length < 4096
        self._times = (6, 1) if short else (task.common, task.uncommon)
        self._example = (20, 3, 1) if short else (40, 10, 3)
        self._words = words().all.copy()
        Random(setting.seed).shuffle(self._words)

    def make(self, r: Random, units: int, index: int) -> Sample:
        context, common = self._list(r, *self._example)
        solved = f"{CWE.format(context=context)}{CWE_OPENING} {_numbered(common)}\n"
        context, common = self._list(r, units, *self._times)
        return Sample(solved + CWE.format(context=context), CWE_OPENING, common)

    def _list(self, r: Random, n: int, often: int, seldom: int) -> tuple[str, list[str]]:
        chosen = self._draw(r, n)
        listed = chosen[:10] * often + chosen[10:] * seldom
        Random(self._seed).shuffle(listed)  # upstream has one order for all samples
        return _numbered(listed), chosen[:10]

    def _draw(self, r: Random, n: int) -> list[str]:
        """n different words; past wonderwords' 8,166 of the user's list, else pairs too."""
        if n <= len(self._words):
            return r.sample(self._words, n)
        if self._file is not None:
            return r.sample(_word_file(self._file), n)
        pairs = distinct(lambda: words().pair(r), n - len(self._words))
        chosen = self._words + pairs
        r.shuffle(chosen)
        return chosen


@cache
def _word_file(path: str) -> list[str]:
    """One word a line, or RULER's english_words.json."""
    text = Path(path).read_text(encoding="utf-8")
    listed = json.loads(text).values() if path.endswith(".json") else text.split()
    return list(dict.fromkeys(listed))


def _numbered(listed: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


# ---- frequent words ----------------------------------------------------------------------


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose counts follow a zeta law; name the three most frequent after the dots.

    alpha: the law's exponent, above 1; width: letters of a word.
    """

    name: str = "fwe"
    alpha: float = 2.0
    width: int = 6
    max_new_tokens: int = 50
    match: str = "all"

    def maker(self, setting: Setting) -> "_FrequentMaker":
        return _FrequentMaker(self, setting)


class _FrequentMaker:
    step = 1

    def __init__(self, task: FrequentWords, setting: Setting) -> None:
        self._task, self._seed = task, setting.seed
        room = setting.length - task.max_new_tokens
        self._n_kinds = max(4, room // 50)
        # Upstream tries room // width words, and room // 32 more or fewer as often as needed.
        self._first, self._more = room // task.width, max(1, room // 32)
        self.least = 1 - self._first // self._more
        self._zeta = zeta(task.alpha)

    def make(self, r: Random, units: int, index: int) -> Sample:
        task = self._task
        kinds = distinct(lambda: letters(r, string.ascii_lowercase, task.width), self._n_kinds)
        kinds.sort()
        Random(self._seed).shuffle(kinds)
        kinds[0] = "..."
        n = self._first + units * self._more
        text = [
            word
            for rank, word in enumerate(kinds, 1)
            for _ in range(int(n * rank**-task.alpha / self._zeta))
        ]
        Random(self._seed).shuffle(text)
        return Sample(FWE.format(context=" ".join(text)), FWE_OPENING, kinds[1:4])


def zeta(s: float) -> float:
    """Riemann's zeta of s > 1: 512 terms and Euler and Maclaurin's formula for the rest."""
    n = 512
    head = math.fsum(k**-s for k in range(1, n))
    tail = n ** (1 - s) / (s - 1) + n**-s / 2 + s * n ** (-s - 1) / 12
    return head + float(tail - s * (s + 1) * (s + 2) * n ** (-s - 3) / 720)
