"""A model directory: its config.json and its safetensors files, opened once and checked whole.

Reads headers only; csrc/model reads the tensors themselves from the descriptors given here
(`Checkpoint.read` is for looking at one).
The format is https://github.com/huggingface/safetensors: 8 bytes N (little-endian), N bytes of
JSON, then the tensors' bytes without holes. Every rule of its reference reader is applied, and
two of its prose: duplicate keys are refused, and nothing follows the last tensor.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._files import open_regular, quote, read_small, strict_json
from .config import KimiLinearConfig
from .errors import WeightsError

if TYPE_CHECKING:
    import numpy as np

MAX_HEADER = 100_000_000  # the reference reader's limit
MAX_INDEX = 100_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FINGERPRINT_BYTES = 512  # of a tensor
MAX_NDIM = 5  # csrc/base/tensor.h

# Bits of an element.
_DTYPES = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_LOADABLE = ("F32", "BF16")

# transformers writes the FFN of a dense layer under the experts' prefix.
_DENSE_ALIAS = re.compile(
    r"(model\.layers\.\d+)\.block_sparse_moe\.((?:gate|up|down)_proj\.weight)"
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a file: bytes [offset, offset + nbytes) counted from the file's start."""

    name: str
    file: int  # index into Checkpoint.files
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """An open model directory.

    Raises ConfigError or WeightsError naming file, tensor and rule; OSError where a file cannot
    be opened. Close it, or use it as a context manager.
    """

    path: Path
    config: KimiLinearConfig
    files: list[Path]
    fds: list[int]
    tensors: dict[str, TensorEntry]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files, self.fds, self.tensors = [], [], {}
        self._stats: list[os.stat_result] = []
        self.config = KimiLinearConfig.from_dir(self.path)
        try:
            weight_map = _weight_map(self.path)
            for name in weight_map if isinstance(weight_map, list) else _shards(weight_map):
                self._add_file(name)
            if isinstance(weight_map, dict):
                self._check_index(weight_map)
            self.config = _as_stored(self.config, self.tensors)
        except BaseException:
            self.close()
            raise

    def _add_file(self, name: str) -> None:
        file = self.path / name
        try:
            fd, info = open_regular(file, WeightsError)
        except FileNotFoundError:
            raise WeightsError(f"{file}: {INDEX} names this file, it is missing") from None
        self.files.append(file)
        self.fds.append(fd)
        self._stats.append(info)
        for entry in read_header(fd, info.st_size, str(file), len(self.files) - 1):
            if entry.name in self.tensors:
                other = self.files[self.tensors[entry.name].file]
                raise WeightsError(
                    f"{file}: tensor {quote(entry.name)} must be in one file, is in {other} too"
                )
            self.tensors[entry.name] = entry

    def _check_index(self, weight_map: dict[str, str]) -> None:
        index = self.path / INDEX
        for name, file in weight_map.items():
            entry = self.tensors.get(name)
            if entry is None or self.files[entry.file].name != file:
                raise WeightsError(
                    f"{index}: tensor {quote(name)} must be in {quote(file)}, it is not"
                )
        for name, entry in self.tensors.items():
            if name not in weight_map:
                where = self.files[entry.file]
                raise WeightsError(
                    f"{where}: tensor {quote(name)} must be named by {index.name}"
                )

    def fingerprint(self) -> str:
        """A digest that tells these weights from others, whichever files they are in: of every
        tensor but the routed experts', its name, dtype, size and some bytes of its middle."""
        digest = hashlib.sha256()
        for name, file, offset, n, dtype, _ in sorted(self.sources()):
            if ".experts." in name:
                continue
            digest.update(f"{name} {dtype} {n} ".encode())
            part = min(n, FINGERPRINT_BYTES)
            digest.update(
                _pread(self.fds[file], part, offset + (n - part) // 2, str(self.files[file]))
            )
        return digest.hexdigest()

    @property
    def dtype(self) -> str:
        """How the big matrices are stored, by the embedding's example: "f32" or "bf16"."""
        entry = self.tensors.get("model.embed_tokens.weight")
        return "f32" if entry is not None and entry.dtype == "F32" else "bf16"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def sources(self) -> list[tuple[str, int, int, int, str, tuple[int, ...]]]:
        """The tensors as the core takes them: (name, file, offset, nbytes, dtype, shape).

        Names are the published checkpoint's; raises WeightsError for a tensor of another dtype
        than F32 and BF16, or of too many dimensions.
        """
        dense = {n for n, kind in enumerate(self.config.ffn_types) if kind == "dense"}
        found: dict[str, tuple[str, int, int, int, str, tuple[int, ...]]] = {}
        for entry in self.tensors.values():
            name = _published_name(entry.name, dense)
            where = f"{self.files[entry.file]}: tensor {quote(entry.name)}"
            if entry.dtype not in _LOADABLE:
                raise WeightsError(
                    f"{where}: dtype must be {' or '.join(_LOADABLE)}, found {entry.dtype}; "
                    f"convert the checkpoint to BF16"
                )
            if len(entry.shape) > MAX_NDIM:
                raise WeightsError(f"{where}: must have at most {MAX_NDIM} dimensions, "
                                   f"found shape {list(entry.shape)}")  # fmt: skip
            if name in found:
                raise WeightsError(f"{where}: must be given once, {quote(name)} is there too")
            found[name] = (
                name,
                entry.file,
                entry.offset,
                entry.nbytes,
                entry.dtype,
                entry.shape,
            )
        return list(found.values())

    def read(self, name: str) -> "np.ndarray":
        """A tensor by its name in the file, as float32: a copy, for looking at weights.

        Raises WeightsError for a name that is not there or a dtype other than F32 and BF16,
        ValueError after close().
        """
        import numpy as np

        if not self.fds:
            raise ValueError("checkpoint: is closed")
        entry = self.tensors.get(name)
        if entry is None:
            raise WeightsError(f"{self.path}: has no tensor {quote(name)}")
        where = f"{self.files[entry.file]}: tensor {quote(name)}"
        if entry.dtype not in _LOADABLE:
            raise WeightsError(f"{where}: dtype must be {' or '.join(_LOADABLE)}, "
                               f"found {entry.dtype}")  # fmt: skip
        raw = _pread(self.fds[entry.file], entry.nbytes, entry.offset, where)
        if entry.dtype == "F32":
            return np.frombuffer(raw, "<f4").astype(np.float32).reshape(entry.shape)
        upper = np.frombuffer(raw, "<u2").astype(np.uint32) << 16
        return upper.view(np.float32).reshape(entry.shape)

    def check_unchanged(self) -> None:
        """Raise WeightsError if a file was edited or replaced since it was opened."""
        for file, fd, before in zip(self.files, self.fds, self._stats, strict=True):
            try:
                at_path = os.stat(file)
            except OSError as e:
                raise WeightsError(f"{file}: must stay while loading: {e.strerror}") from None
            for now in (os.fstat(fd), at_path):
                if _identity(now) != _identity(before):
                    raise WeightsError(f"{file}: must not change while loading, it did")

    def close(self) -> None:
        """Close the files; further calls do nothing."""
        while self.fds:
            os.close(self.fds.pop())

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _as_stored(config: KimiLinearConfig, names: Container[str]) -> KimiLinearConfig:
    """transformers never ties the head, whatever the key says: one that is stored is used."""
    if not (config.tie_word_embeddings and "lm_head.weight" in names):
        return config
    note = "tie_word_embeddings: is true, but lm_head.weight is there and is used"
    return dataclasses.replace(config, tie_word_embeddings=False, notes=(*config.notes, note))


def _identity(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _published_name(name: str, dense: set[int]) -> str:
    match = _DENSE_ALIAS.fullmatch(name)
    if match and int(match[1].rsplit(".", 1)[1]) in dense:
        return f"{match[1]}.mlp.{match[2]}"
    return name


# ---- which files -------------------------------------------------------------------------


def _weight_map(path: Path) -> dict[str, str] | list[str]:
    """The index's tensor -> file, or the one file where there is no index."""
    names = sorted(os.listdir(path))
    files = [n for n in names if n.endswith(".safetensors")]
    if INDEX in names:
        weight_map = _read_index(path / INDEX)
        if SINGLE in files and SINGLE not in weight_map.values():
            raise WeightsError(
                f"{path}: must have {SINGLE} or {INDEX}, found both, and they disagree"
            )
        return weight_map
    if SINGLE in files:
        return [SINGLE]
    if len(files) == 1:
        return files
    if files:
        raise WeightsError(f"{path}: several .safetensors files need {INDEX}, it is missing")
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        raise WeightsError(
            f"{path}: {quote(pickled[0])} is a pickle, which can run code and is never read; "
            f"save the model again as safetensors (save_pretrained does by default)"
        )
    raise WeightsError(f"{path}: must hold {SINGLE} or {INDEX}, found neither")


def _read_index(file: Path) -> dict[str, str]:
    data = strict_json(read_small(file, MAX_INDEX, WeightsError), str(file), WeightsError)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{file}: must hold an object weight_map that names tensors")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise WeightsError(
                f"{file}: tensor {quote(tensor)}: must be in a .safetensors file of this "
                f"directory, named without a path, found {quote(shard)}"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    if not name.endswith(".safetensors") or name.startswith("."):
        return False
    return name.isprintable() and not set(name) & set("/\\:")


def _shards(weight_map: dict[str, str]) -> list[str]:
    return sorted(set(weight_map.values()))


# ---- one file's header -------------------------------------------------------------------


def read_header(fd: int, size: int, where: str, file: int = 0) -> list[TensorEntry]:
    """The tensors of an open safetensors file of `size` bytes, in the order of their bytes.

    Raises WeightsError starting with `where`.
    """
    if size < 8:
        raise WeightsError(f"{where}: must have at least 8 bytes, found {size}")
    n = int.from_bytes(_pread(fd, 8, 0, where), "little")
    if n > MAX_HEADER:
        raise WeightsError(
            f"{where}: header must have at most {MAX_HEADER:,} bytes, claims {n:,}"
        )
    if 8 + n > size:
        raise WeightsError(f"{where}: header of {n:,} bytes must fit the file's {size:,}")
    raw = _pread(fd, n, 8, where)
    if not raw.lstrip(b" \t\r\n").startswith(b"{"):
        raise WeightsError(f"{where}: header must be a JSON object")
    header = strict_json(raw, f"{where}: header", WeightsError)
    _check_metadata(header.pop("__metadata__", None), where)
    entries = sorted(_entries(header, 8 + n, where, file), key=lambda e: (e.offset, e.nbytes))
    _check_contiguous(entries, 8 + n, size, where)
    return entries


def _pread(fd: int, n: int, offset: int, where: str) -> bytes:
    """Exactly n bytes; n was checked against the file's size."""
    parts = []
    while n:
        part = os.pread(fd, n, offset)
        if not part:
            raise WeightsError(f"{where}: must not shrink while being read, it did")
        parts.append(part)
        n, offset = n - len(part), offset + len(part)
    return b"".join(parts)


def _check_metadata(metadata: Any, where: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{where}: __metadata__ must map strings to strings")


def _entries(
    header: dict[str, Any], start: int, where: str, file: int
) -> Iterator[TensorEntry]:
    for name, value in header.items():
        label = f"{where}: tensor {quote(name)}"
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise WeightsError(f"{label}: must have exactly dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise WeightsError(
                f"{label}: dtype must be one of safetensors', found {quote(dtype)}"
            )
        _check_unsigned(shape, f"{label}: shape")
        _check_unsigned(offsets, f"{label}: data_offsets")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            raise WeightsError(f"{label}: data_offsets must be [begin, end], found {offsets}")
        nbytes = _nbytes(shape, dtype, label)
        begin, end = offsets
        if end - begin != nbytes:
            raise WeightsError(
                f"{label}: data_offsets must span {nbytes} bytes ({dtype} {shape}), "
                f"found {end - begin}"
            )
        yield TensorEntry(name, file, start + begin, nbytes, dtype, tuple(shape))


def _check_unsigned(values: Any, label: str) -> None:
    ok = isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 64 for v in values
    )
    if not ok:
        raise WeightsError(
            f"{label}: must be a list of unsigned integers, found {quote(values)}"
        )


def _nbytes(shape: list[int], dtype: str, label: str) -> int:
    """Bytes of the tensor; every partial product must fit 64 bits, as the format demands."""
    total = 1
    for extent in (*shape, _DTYPES[dtype]):
        total *= extent
        if total >= 1 << 64:
            raise WeightsError(
                f"{label}: size must fit 64 bits, {dtype} {quote(shape)} does not"
            )
    if total % 8:
        raise WeightsError(f"{label}: must fill whole bytes, {dtype} {quote(shape)} does not")
    return total // 8


def _check_contiguous(entries: list[TensorEntry], start: int, size: int, where: str) -> None:
    """No hole, no overlap, nothing before the first tensor or after the last."""
    at = start
    for entry in entries:
        if entry.offset != at:
            raise WeightsError(
                f"{where}: tensor {quote(entry.name)}: must begin where the one before ends, "
                f"at {at - start}, begins at {entry.offset - start}"
            )
        at += entry.nbytes
    if at != size:
        raise WeightsError(
            f"{where}: must end with its last tensor at byte {at:,}, has {size:,} bytes"
        )
