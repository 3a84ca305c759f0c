"""Progress bars, where somebody looks: a callable, tqdm, or nothing."""

import sys
from collections.abc import Callable
from typing import Any

Callback = Callable[[int, int], Any]


class Progress:
    """Turns `progress=` of the public calls into the core's callback(done, total).

    progress: None (a bar on a terminal or in a notebook, if tqdm is installed), True (a bar
    anyway; needs tqdm), False, or a callable. Use as a context manager: a bar is closed.
    """

    def __init__(self, progress: bool | Callback | None, label: str, unit: str) -> None:
        self._bar: Any = None
        self._label, self._unit = label, unit
        self.callback: Callback | None = None
        self.shows = False  # a bar of ours, on somebody's screen
        if callable(progress):
            self.callback = progress
        elif progress is True or (progress is None and is_watched() and _tqdm() is not None):
            if _tqdm() is None:
                raise ModuleNotFoundError("progress=True: needs tqdm (pip install tqdm)")
            self.callback = self._update
            self.shows = True
        elif progress not in (None, False):
            raise TypeError(
                f"progress: must be None, True, False or a callable, got {progress!r:.60}"
            )

    def _update(self, done: int, total: int) -> None:
        if self._bar is None:
            scaled = self._unit == "B"
            self._bar = _tqdm()(
                desc=self._label, total=total, unit=self._unit, unit_scale=scaled, leave=False
            )
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> Callback | None:
        return self.callback

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


def is_watched() -> bool:
    """Whether stderr is a terminal or this is a notebook."""
    return "ipykernel" in sys.modules or bool(sys.stderr and sys.stderr.isatty())


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm
