"""Reading files that a stranger may have written: bounded, regular, strict.

A model directory is data from the network. Nothing here follows a claim of the file (a length,
a depth, a number) before the claim is checked against what the file system says.
"""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any


def open_regular(path: Path, error: type[Exception]) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; returns its descriptor and its ``fstat``.

    A symbolic link to a regular file is followed (the Hub's cache is made of them). A FIFO is
    refused: ``O_NONBLOCK`` keeps it from blocking the open before the check.
    Raises `error` where the path is something else, OSError where it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise error(f"{path}: must be a regular file, found {_kind(info.st_mode)}")
    except BaseException:
        os.close(fd)
        raise
    return fd, info


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return name
    return f"mode {mode:o}"


def read_small(path: Path, limit: int, error: type[Exception]) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; raises `error` past that."""
    fd, info = open_regular(path, error)
    with os.fdopen(fd, "rb") as file:
        if info.st_size > limit:
            raise error(f"{path}: must have at most {limit:,} bytes, found {info.st_size:,}")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path}: must have at most {limit:,} bytes, it grew while being read")
    return data


def strict_json(data: bytes, where: str, error: type[Exception]) -> Any:
    """Parse JSON as RFC 8259 has it, which Python's parser is laxer than.

    Refused, as `error` starting with `where`: bytes that are not UTF-8, a byte-order mark,
    duplicate keys, NaN and Infinity, numbers that overflow a double, integers of thousands of
    digits, nesting deeper than the parser's stack.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise error(f"{where}: key {quote(twice)} must appear once, found twice")
        return found

    def finite(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise error(f"{where}: numbers must be finite, found {quote(text)}")
        return value

    def no_constant(text: str) -> None:
        raise error(f"{where}: numbers must be finite, found {text}")

    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{where}: must not start with a byte-order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{where}: must be UTF-8, byte {e.start} is not ({e.reason})") from None
    try:
        return json.loads(
            text,
            object_pairs_hook=no_duplicates,
            parse_float=finite,
            parse_constant=no_constant,
        )
    except error:  # our own, which may be a ValueError too
        raise
    except RecursionError:
        raise error(f"{where}: nested too deeply") from None
    except ValueError as e:
        raise error(f"{where}: must be valid JSON: {e}") from None


def quote(value: Any, limit: int = 80) -> str:
    """`repr`, cut to a length that an error message can carry."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def check_text(text: Any, label: str) -> None:
    """Raise TypeError or ValueError where this is no text that UTF-8 can hold."""
    if not isinstance(text, str):
        raise TypeError(f"{label}: must be str, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{label}: must be Unicode, character {e.start} is the lone surrogate "
            f"{text[e.start]!a}"
        ) from None


def as_path(path: Any) -> Path:
    """Raise TypeError or ValueError where this is no path of a file."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: must be str or a path, got {quote(path)}")
    found = Path(path)
    if not found.name:
        raise ValueError(f"path: must name a file, got {quote(str(path))}")
    return found
