"""The exceptions of the package, defined by the core and named here.

``KimiLinearError`` is the root. ``ConfigError``, ``WeightsError`` and ``TokenizerError`` are
also ``ValueError``; ``DeviceError`` is also ``RuntimeError``; ``OutOfMemory`` is also
``MemoryError``; ``NumericalError`` is also ``ArithmeticError``. A wrong argument raises
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

__all__ = [
    "ConfigError",
    "DeviceError",
    "KimiLinearError",
    "NumericalError",
    "OutOfMemory",
    "TokenizerError",
    "WeightsError",
]
