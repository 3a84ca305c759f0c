"""The file of a sequence's state: format, writing, reading.

Everything is little-endian. Offsets in bytes:

    0       8   b"KLSTATE\\0"
    8       4   version, u32: 2
    12      4   N, u32: length of the header
    16      N   header: a JSON object (below)
    16 + N  32  SHA-256 of all before it, the header's digest
    48 + N      the payload in pieces of 4 MiB (the last one is shorter), each followed by the
                SHA-256 of the digest before it (of the piece before, or the header's) and itself

    payload     token ids i32 [length]
                logits f32 [vocab] after the last token; none if length is 0
                of each KDA layer the state f32 [H, V, K] and the convolution window [3 H K, W-1]
                of each MLA layer the latents [length, rank + rope]

Windows are f32 for dtype "f32", else bf16, and so are latents; for kv_cache_dtype "fp8" these are
rows of bytes as csrc/base/latents.h has them. The header holds `config` (the numbers of the
model's shape), `dtype` (how its matrices are stored), `kv_cache_dtype` (how its latents are),
`weights` (Model.fingerprint), `length`, `awaits_answer` (messages were fed last) and `writer`. A
file is taken only by a model that agrees in the first four. The digests are a chain, so that any
change is found, also pieces that changed places or come from another file of the same header.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from ._files import open_regular, quote, strict_json
from .errors import StateError

if TYPE_CHECKING:
    import numpy as np

    from ._core import Engine
    from .model import Model

MAGIC = b"KLSTATE\0"
VERSION = 2
PIECE = 4 << 20  # bytes held in memory at a time
MAX_HEADER = 1 << 20
DIGEST = 32

Progress = Callable[[int, int], Any]


class Part(Protocol):
    """A run of bytes of the payload."""

    nbytes: int

    def read(self, offset: int, out: memoryview) -> None: ...
    def write(self, offset: int, data: memoryview) -> None: ...


class ArrayPart:
    """The bytes of a dense NumPy array."""

    def __init__(self, array: Any) -> None:
        self._bytes = memoryview(array).cast("B") if array.size else memoryview(b"")
        self.nbytes = self._bytes.nbytes

    def read(self, offset: int, out: memoryview) -> None:
        """Copy from the array."""
        out[:] = self._bytes[offset : offset + len(out)]

    def write(self, offset: int, data: memoryview) -> None:
        """Copy into the array."""
        self._bytes[offset : offset + len(data)] = data


# ---- writing -----------------------------------------------------------------------------


def write(
    path: Path, header: dict[str, Any], parts: Sequence[Part], progress: Progress | None
) -> None:
    """Write a file beside `path` and put it in its place once it is whole."""
    text = json.dumps(header, ensure_ascii=True, allow_nan=False).encode()
    head = MAGIC + VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    digest = hashlib.sha256(head).digest()
    total = sum(part.nbytes for part in parts)
    buffer = memoryview(bytearray(min(PIECE, total)))
    with _in_place_of(path) as file:
        file.write(head + digest)
        for begin in range(0, total, PIECE):
            piece = buffer[: min(PIECE, total - begin)]
            for part, offset, view in _spans(parts, begin, piece):
                part.read(offset, view)
            digest = _next_digest(digest, piece)
            file.write(piece)
            file.write(digest)
            if progress is not None:
                progress(begin + len(piece), total)


@contextmanager
def _in_place_of(path: Path) -> Iterator[IO[bytes]]:
    """A new file that replaces `path` when the block ends well, and vanishes else."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb", buffering=0) as raw:
            yield _Whole(raw)  # type: ignore[misc]
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _Whole:
    """A raw file whose writes are whole: the system may take less than it is given."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def write(self, data: Any) -> None:
        view = memoryview(data)
        while view:
            view = view[self._raw.write(view) :]


# ---- reading -----------------------------------------------------------------------------


class Reader:
    """An open file whose header was found whole. Raises StateError naming the file and why."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd, info = open_regular(path, StateError)
        self._file = os.fdopen(fd, "rb", buffering=0)
        self._size = info.st_size
        try:
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> dict[str, Any]:
        head = self._exactly(16, "its first 16 bytes")
        if head[:8] != MAGIC:
            raise StateError(
                f"{self.path}: is not a state file (it does not begin with KLSTATE)"
            )
        version = int.from_bytes(head[8:12], "little")
        if version != VERSION:
            raise StateError(
                f"{self.path}: has format version {version}, this package reads version "
                f"{VERSION}"
            )
        n = int.from_bytes(head[12:16], "little")
        if n > MAX_HEADER:
            raise StateError(
                f"{self.path}: header must have at most {MAX_HEADER} bytes, claims {n}"
            )
        text = self._exactly(n, "its header")
        self._digest = hashlib.sha256(head + text).digest()
        if self._exactly(DIGEST, "its header") != self._digest:
            raise StateError(f"{self.path}: its header was altered (SHA-256 differs)")
        self._start = 16 + n + DIGEST
        header = strict_json(text, f"{self.path}: header", StateError)
        if not isinstance(header, dict):
            raise StateError(f"{self.path}: header must be a JSON object, is {quote(header)}")
        return header

    def _exactly(self, n: int, what: str) -> bytes:
        data = bytearray(n)
        self._fill(memoryview(data), what)
        return bytes(data)

    def _fill(self, view: memoryview, what: str) -> None:
        while view:
            n = self._file.readinto(view)
            if not n:
                raise StateError(f"{self.path}: is truncated: it ends within {what}")
            view = view[n:]

    def check_size(self, total: int) -> None:
        """The file must have exactly the bytes of a payload of `total`."""
        expected = self._start + total + -(-total // PIECE) * DIGEST
        if self._size < expected:
            raise StateError(
                f"{self.path}: is truncated: has {self._size:,} of {expected:,} bytes"
            )
        if self._size > expected:
            raise StateError(
                f"{self.path}: must end after {expected:,} bytes, has {self._size:,}"
            )

    def read(self, parts: Sequence[Part], progress: Progress | None) -> None:
        """Fill the parts, each piece after its digest was found right."""
        total, digest = sum(part.nbytes for part in parts), self._digest
        buffer = memoryview(bytearray(min(PIECE, total)))
        for begin in range(0, total, PIECE):
            piece = buffer[: min(PIECE, total - begin)]
            self._fill(piece, "its payload")
            digest = _next_digest(digest, piece)
            if self._exactly(DIGEST, "its payload") != digest:
                raise StateError(
                    f"{self.path}: was altered at or before bytes {begin:,} to "
                    f"{begin + len(piece):,} of its payload (SHA-256 differs)"
                )
            for part, offset, view in _spans(parts, begin, piece):
                part.write(offset, view)
            if progress is not None:
                progress(begin + len(piece), total)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


# ---- pieces ------------------------------------------------------------------------------


def _next_digest(digest: bytes, piece: memoryview) -> bytes:
    found = hashlib.sha256(digest)
    found.update(piece)
    return found.digest()


def _spans(
    parts: Sequence[Part], begin: int, piece: memoryview
) -> Iterator[tuple[Part, int, memoryview]]:
    """What of each part lies in the piece of the payload at `begin`: (part, offset, view)."""
    at = 0  # of the part in the payload
    for part in parts:
        low, high = max(at, begin), min(at + part.nbytes, begin + len(piece))
        if low < high:
            yield part, low - at, piece[low - begin : high - begin]
        at += part.nbytes


# ---- what a state consists of ------------------------------------------------------------


class ImagePart:
    """The device's memory of a sequence."""

    def __init__(self, engine: "Engine", seq: int, length: int) -> None:
        self._engine, self._seq = engine, seq
        self.nbytes = engine.image_bytes(length)

    def read(self, offset: int, out: memoryview) -> None:
        """Copy from the device."""
        self._engine.seq_read_image(self._seq, offset, out)

    def write(self, offset: int, data: memoryview) -> None:
        """Copy to the device."""
        self._engine.seq_write_image(self._seq, offset, data)


def parts_of(
    ids: "np.ndarray", logits: "np.ndarray | None", engine: "Engine", seq: int
) -> Sequence[Part]:
    """The payload in its order."""
    arrays = [ids] if logits is None else [ids, logits]
    return [*map(ArrayPart, arrays), ImagePart(engine, seq, len(ids))]


def check_header(reader: Reader, model: "Model") -> tuple[int, bool]:
    """(length, awaits_answer) of a file that this model may take."""
    header, path = reader.header, reader.path
    config = header.get("config")
    for name, ours in model.config.to_core().items():
        theirs = config.get(name) if isinstance(config, dict) else None
        if theirs != ours:
            raise StateError(
                f"{path}: was saved by a model with {name} {quote(theirs)}, this one has "
                f"{quote(ours)}"
            )
    for name, ours in (
        ("dtype", model.dtype),
        ("kv_cache_dtype", model.kv_cache_dtype),
        ("weights", model.fingerprint),
    ):
        if header.get(name) != ours:
            raise StateError(
                f"{path}: was saved by a model with {name} {quote(header.get(name))}, this one "
                f"has {quote(ours)}"
            )
    length, awaits = header.get("length"), header.get("awaits_answer")
    if type(length) is not int or not 0 <= length < 1 << 40 or type(awaits) is not bool:
        raise StateError(f"{path}: header must have length and awaits_answer")
    return length, awaits
