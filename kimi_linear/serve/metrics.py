"""Counts of a server, as Prometheus reads them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any


class Metrics:
    """What a server has done since it began. The event loop's thread alone changes it."""

    def __init__(self) -> None:
        self.responses: Counter[int] = Counter()  # by status
        self.running = 0  # HTTP requests
        self._tokens: Counter[str] = Counter()

    def count(self, usage: Mapping[str, Any]) -> None:
        """Add the tokens of an answer."""
        self._tokens["prompt"] += usage["prompt_tokens"]
        self._tokens["cached_prompt"] += usage["prompt_tokens_details"]["cached_tokens"]
        self._tokens["generated"] += usage["completion_tokens"]

    def text(self, engine: Any) -> str:
        """The page of /metrics. engine: what `Engine.stats` gave."""
        lines = ["# TYPE kimi_linear_responses_total counter"]
        for status, n in sorted(self.responses.items()):
            lines.append(f'kimi_linear_responses_total{{status="{status}"}} {n}')
        for name in ("prompt", "cached_prompt", "generated"):
            lines += _metric(f"{name}_tokens_total", "counter", self._tokens[name])
        lines += _metric("requests", "gauge", self.running)
        lines += _metric("sequences_running", "gauge", engine.running)
        lines += _metric("sequences_waiting", "gauge", engine.waiting)
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, value: int) -> list[str]:
    return [f"# TYPE kimi_linear_{name} {kind}", f"kimi_linear_{name} {value}"]
