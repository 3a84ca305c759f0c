"""Filling a prompt up to a number of tokens."""

from collections.abc import Callable

GROWTH = 64  # of a size from one probe to the next, while nothing bounds it


def largest(cost: Callable[[int], int], budget: int, least: int) -> int:
    """An n >= least with cost(n) <= budget and cost(n + 1) > budget.

    cost: grows with n, about linearly, so that a few probes find n: counting a million tokens
    takes seconds. Raises ValueError where even `least` costs more than the budget.
    """
    low, cost_low = least, cost(least)
    if cost_low > budget:
        raise ValueError(
            f"the smallest prompt has {cost_low} tokens, beside the answer there is room for "
            f"{budget}"
        )
    high: int | None = None
    probe, rate, slow = least + max(8, least // 4), 0.0, 0
    while high is None or high - low > 1:
        width = None if high is None else high - low
        found = cost(probe)
        rate = max(found - cost_low, 0) / (probe - low) or rate
        if found <= budget:
            low, cost_low = probe, found
        else:
            high = probe
        halved = width is None or (high or 0) - low <= width // 2
        slow = 0 if halved else slow + 1
        ahead = (budget - cost_low) / rate if rate else GROWTH * low
        probe = _next(low, high, int(ahead), bisect=slow > 1)
    return low


def _next(low: int, high: int | None, ahead: int, *, bisect: bool) -> int:
    """The size to try next. ahead: how much more than low should fit."""
    if high is None:
        return low + max(1, min(ahead, GROWTH * low))
    if bisect:
        return (low + high) // 2
    return max(low + 1, min(high - 1, low + ahead))
