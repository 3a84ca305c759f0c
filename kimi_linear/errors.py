"""The exceptions of the package, defined by the core and named here.

``KimiLinearError`` is the root. ``ConfigError``, ``WeightsError`` and ``TokenizerError`` are
also ``ValueError``; ``DeviceError`` is also ``RuntimeError``; ``OutOfMemory`` is also
``MemoryError``; ``NumericalError`` is also ``ArithmeticError``; ``StateError``, for the file of
a state, is also ``ValueError``; ``EngineFull`` is also ``RuntimeError``. A wrong argument raises
``ValueError`` or ``TypeError``, a file that cannot be opened ``OSError``, as Python would.
"""

from ._core import (
    ConfigError,
    DeviceError,
    KimiLinearError,
    NumericalError,
    OutOfMemory,
    TokenizerError,
    WeightsError,
)


class StateError(KimiLinearError, ValueError):
    """A file is no state, not whole, or another model's."""


class EngineFull(KimiLinearError, RuntimeError):
    """As many requests wait as an engine lets; try again later."""


__all__ = [
    "ConfigError",
    "DeviceError",
    "EngineFull",
    "KimiLinearError",
    "NumericalError",
    "OutOfMemory",
    "StateError",
    "TokenizerError",
    "WeightsError",
]
