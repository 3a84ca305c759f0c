"""What RULER's generators share: a sample, where it comes from, how it is filled."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from ._fit import largest
from ._sources import Haystack

Count = Callable[[str, str], int]  # (input, opening) -> tokens of the prompt


@dataclass(frozen=True)
class Sample:
    """A question: its text, how the answer begins, the right answers, and what to record."""

    input: str
    opening: str
    answers: list[str]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where samples come from. length: tokens with the answer; the rest are texts' files."""

    length: int
    count: Count
    seed: int
    haystack: Haystack
    squad: str | None = None
    hotpot: str | None = None
    words: str | None = None


class Maker(Protocol):
    """Makes samples of a size. least: the smallest; step: what an overflow takes away."""

    @property
    def least(self) -> int: ...
    @property
    def step(self) -> int: ...
    def make(self, r: Random, units: int, index: int) -> Sample: ...


class Task(Protocol):
    """One of RULER's tasks with its parameters.

    match: "all" scores the share of the answers found, "part" whether any is.
    """

    @property
    def name(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def match(self) -> str: ...
    def __hash__(self) -> int: ...
    def maker(self, setting: Setting) -> Maker: ...


class Filler:
    """Samples of one task at one length, each as long as it can be and never longer.

    As upstream, one size is found for all samples, and a sample that comes out longer than
    the budget is made again a step smaller; sample i depends on the seed and i alone.
    """

    def __init__(self, task: Task, setting: Setting) -> None:
        self._task, self._setting = task, setting
        self._maker = task.maker(setting)
        self._budget = setting.length - task.max_new_tokens
        r = self._random("size")
        state = r.getstate()

        def cost(units: int) -> int:
            r.setstate(state)
            return self._tokens(self._maker.make(r, units, 0))

        try:
            self.units = largest(cost, self._budget, self._maker.least)
        except ValueError as e:
            raise ValueError(f"{task.name} at {setting.length} tokens: {e}") from None

    def sample(self, index: int) -> Sample:
        """Sample `index`; its details hold its size."""
        r, units, maker = self._random(index), self.units, self._maker
        sample = maker.make(r, units, index)
        while self._tokens(sample) > self._budget:
            if units <= maker.least:
                raise ValueError(
                    f"{self._task.name}: sample {index} does not fit "
                    f"{self._setting.length} tokens"
                )
            units -= maker.step if units - maker.step >= maker.least else 1
            sample = maker.make(r, units, index)
        sample.details["units"] = units
        return sample

    def _tokens(self, sample: Sample) -> int:
        return self._setting.count(sample.input, sample.opening)

    def _random(self, what: object) -> Random:
        return Random(f"{self._setting.seed}/{self._task.name}/{self._setting.length}/{what}")
