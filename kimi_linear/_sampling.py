"""Arguments of generation, checked in one place.

Every error names the argument and its allowed range; nothing is clamped.
"""

import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ._core import MAX_GUESSES
from ._files import quote
from .tokenizer import check_id

MAX_TOP = 256  # alternatives reported with a token
_MASK = (1 << 64) - 1
_FLT_MIN = 2.0**-126  # the core takes float32, where less would become the 0 that is refused

LogitsProcessor = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Sampling:
    """How to continue; the fields of `Model.generate`, checked."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    logprobs: int | None
    processors: tuple[LogitsProcessor, ...]
    speculate: int = 0

    def request(self, ids: Any, row: int, room: int) -> dict[str, Any]:
        """A request of the core: row `row` of a batch, in a context with that much room."""
        return {
            "ids": ids,
            "max_new_tokens": min(self.max_new_tokens, room - len(ids)),
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": row_seed(self.seed, row),
            "stop_ids": list(self.stop_ids),
            "top": self.logprobs or 0,
            "process": int(bool(self.processors)),
            "guesses": self.speculate,
        }

    @property
    def looks_back(self) -> bool:
        """Whether the tokens before the prompt are of use beside the state."""
        return (
            self.repetition_penalty != 1.0 or bool(self.processors) or bool(self.speculate)
        )


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of `Model.generate` that say how to continue."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    logprobs: int | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    speculate: int


def check_sampling(
    vocab_size: int,
    default_stop_ids: Iterable[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = (),
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None,
    speculate: int = 0,
) -> Sampling:
    """Raises ValueError or TypeError naming the argument and its range."""
    if not isinstance(ignore_eos, bool):
        raise TypeError(f"ignore_eos: must be True or False, got {quote(ignore_eos)}")
    stop_ids = dict.fromkeys(() if ignore_eos else default_stop_ids)
    stop_ids |= dict.fromkeys(_stop_token_ids(stop_token_ids, vocab_size))
    if logprobs is not None:
        logprobs = check_top(logprobs, vocab_size, "logprobs")
    processors = _processors(logits_processor)
    speculate = _integer("speculate", speculate, 0, MAX_GUESSES)
    if speculate and processors:
        raise ValueError(
            f"speculate: must be 0 with a logits_processor, which is asked about one token "
            f"after the other, got {speculate}"
        )
    return Sampling(
        max_new_tokens=_integer("max_new_tokens", max_new_tokens, 0, (1 << 31) - 1),
        temperature=_number("temperature", temperature, 0.0, 1e6),
        top_k=_integer("top_k", top_k, 0, vocab_size),
        top_p=_number("top_p", top_p, 0.0, 1.0, open_low=True),
        min_p=_number("min_p", min_p, 0.0, 1.0),
        repetition_penalty=_number(
            "repetition_penalty", repetition_penalty, 0.0, 1e6, open_low=True
        ),
        seed=secrets.randbits(64) if seed is None else _integer("seed", seed, 0, _MASK),
        stop=_stop_strings(stop),
        stop_ids=tuple(stop_ids),
        logprobs=logprobs,
        processors=processors,
        speculate=speculate,
    )


def row_seed(seed: int, row: int) -> int:
    """The seed of row `row` of a batch, 63 bits: number `row` of a SplitMix64 generator started
    at `seed`, so that neighbouring seeds and rows share nothing (Steele, Lea, Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014)."""
    z = (seed + (row + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return (z ^ (z >> 31)) >> 1


def check_top(value: Any, vocab_size: int, name: str = "top") -> int:
    """How many alternatives to report; raises TypeError or ValueError naming the argument."""
    return _integer(name, value, 0, min(MAX_TOP, vocab_size))


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: must be an integer in {low}..{high}, got {quote(value)}")
    value = value.__index__()
    if not low <= value <= high:
        raise ValueError(f"{name}: must be an integer in {low}..{high}, got {quote(value)}")
    return value


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: must be a number in {interval}, got {quote(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (low < number if open_low else low <= number) or not number <= high:
        raise ValueError(f"{name}: must be a number in {interval}, got {quote(value)}")
    return max(number, _FLT_MIN) if open_low else number


def _stop_token_ids(value: Any, vocab_size: int) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, Iterable):
        raise TypeError(f"stop_token_ids: must be a list of token ids, got {quote(value)}")
    return [check_id(v, vocab_size, f"stop_token_ids[{i}]") for i, v in enumerate(value)]


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else stop
    if isinstance(stops, bytes) or not isinstance(stops, Iterable):
        raise TypeError(f"stop: must be a string or a list of strings, got {quote(stop)}")
    stops = tuple(stops)
    for text in stops:
        if not isinstance(text, str):
            raise TypeError(f"stop: must be a string or a list of strings, got {quote(text)}")
        if not text:
            raise ValueError("stop: strings must have at least one character, got ''")
    return stops


def _processors(value: Any) -> tuple[LogitsProcessor, ...]:
    if value is None:
        return ()
    processors = (value,) if callable(value) else value
    if not isinstance(processors, list | tuple) or not all(map(callable, processors)):
        raise TypeError(
            f"logits_processor: must be a callable(ids, logits) or a list of them, "
            f"got {quote(value)}"
        )
    return tuple(processors)
