"""What was built, and what this machine has."""

import platform
from typing import Any

from . import __version__, _core
from ._backends import shared
from .errors import DeviceError
from .memory import Report, gib


def describe() -> Report:
    """Version, compiler, backends built in, CPU features, and CUDA or why there is none."""
    rows = [
        ("kimi_linear", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        *((str(key), _text(value)) for key, value in _core.build_info().items() if value != ""),
    ]
    for device in ("cpu", "cuda"):
        try:
            info = dict(shared(device).info())
        except DeviceError as e:
            rows.append((device, f"not available: {e}"))
            continue
        free, total = info.pop("free_bytes", 0), info.pop("total_bytes", 0)
        info["memory"] = f"{gib(free)} free of {gib(total)}"
        rows.append((device, _text(info)))
    return Report(rows)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)


def show_config() -> None:
    """Print what `python -m kimi_linear info` prints, for a bug report."""
    print(describe())
