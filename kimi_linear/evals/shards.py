"""Files of a run: one line of JSON an example, one file a process, merged into one table.

The first line of each file is the run's header, all that defines it; a file of another run in
the same folder is refused. A line is written by one call and only whole lines count, so a
process killed at any moment loses the examples in flight and nothing else.
"""

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._files import quote
from .results import Results

Header = dict[str, Any]
Record = dict[str, Any]
MERGED, RESULTS = "merged.jsonl", "results.json"
VARIABLES = (  # of torchrun, Slurm and Open MPI: (this process, how many)
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)

LOCAL = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")  # among a machine's


def shard_of(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, world) of this process, from the variables of its launcher; (0, 1) without one."""
    for rank_name, world_name in VARIABLES:
        if rank_name in environment and world_name in environment:
            texts = environment[rank_name], environment[world_name]
            if not all(t.isascii() and t.isdigit() for t in texts):
                raise ValueError(
                    f"{rank_name}, {world_name}: must be numbers, "
                    f"got {quote(' of '.join(texts))}"
                )
            return check_shard(int(texts[0]), int(texts[1]))
    return 0, 1


def local_device(environment: Mapping[str, str] = os.environ) -> str:
    """The device of this process: "cuda:N" for the N-th that its launcher started on a machine.

    "auto" without a launcher, without CUDA, and where the launcher shows each process one GPU.
    Raises DeviceError where there are fewer GPUs than processes: two models would share one.
    """
    from .._backends import shared
    from ..errors import DeviceError

    local = next((environment[name] for name in LOCAL if name in environment), "")
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not local.isdecimal() or (visible and "," not in visible):
        return "auto"
    try:
        shared("cuda", int(local))
    except DeviceError:
        if int(local) == 0 or not _has_cuda():
            return "auto"
        raise
    return f"cuda:{int(local)}"


def _has_cuda() -> bool:
    from .._backends import shared
    from ..errors import DeviceError

    try:
        shared("cuda")
    except DeviceError:
        return False
    return True


def check_shard(rank: int, world: int) -> tuple[int, int]:
    if not 0 <= rank < world:
        raise ValueError(f"shard: must be 0 <= rank < world, got rank {rank} of {world}")
    return rank, world


class Shard:
    """The file that one process appends to; a context manager.

    done: ids of examples that any file of the folder has.
    """

    def __init__(self, folder: str | Path, rank: int, world: int, header: Header) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"shard-{rank:05}-of-{world:05}.jsonl"
        self._fd = os.open(
            self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
        )
        try:
            self._lock()
            self._cut_torn_line()
            if os.fstat(self._fd).st_size == 0:
                self._write([header])
            wanted = json.loads(json.dumps(header))
            self.done = {
                record["id"] for path in _files(folder) for record in _read(path, wanted)[1]
            }
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, records: Iterable[Record]) -> None:
        """Write records so that they outlive the process and the machine."""
        self._write(records)

    def _write(self, values: Iterable[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values)
        data = memoryview(lines.encode("utf-8", errors="replace"))
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is writing it") from None
        except OSError:  # a file system without locks
            pass

    def _cut_torn_line(self) -> None:
        """A process that was killed while writing left the beginning of a line; one that failed
        before its first answer a header alone, which binds nobody."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1 if data.count(b"\n") > 1 else 0
        os.ftruncate(self._fd, whole)

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


def merge(folder: str | Path, *, partial: bool = False) -> Results:
    """Join the files of a run: writes merged.jsonl and results.json, returns the results.

    The merged file is the same whatever the number of processes and interruptions. partial:
    allow examples to be missing; then nothing is written. Raises ValueError where files are of
    different runs, contradict each other, or examples are missing.
    """
    folder = Path(folder)
    files = _files(folder) or list(folder.glob(MERGED))  # of a run that was put away
    header = _read(files[0])[0] if files else None
    if header is None:
        raise FileNotFoundError(f"{folder}: has no file of a run (shard-*.jsonl, {MERGED})")
    records = _join(files, header)
    missing = header["examples"] - len(records)
    results = Results(header, records)
    if partial:
        return results
    if missing:
        raise ValueError(f"{folder}: {missing} of {header['examples']} examples are missing")
    lines = [json.dumps(value, ensure_ascii=False) for value in (header, *records)]
    _replace(folder / MERGED, "\n".join(lines) + "\n")
    _replace(
        folder / RESULTS, json.dumps(results.to_dict(), indent=1, ensure_ascii=False) + "\n"
    )
    return results


def _join(files: list[Path], header: Header) -> list[Record]:
    """All records, each once, in the order of the suite."""
    found: dict[str, Record] = {}
    for path in files:
        for record in _read(path, header)[1]:
            if found.setdefault(record["id"], record) != record:
                raise ValueError(f"{path}: answers {record['id']} otherwise than another file")
    return sorted(found.values(), key=lambda record: record["index"])


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*-of-*.jsonl"))


def _read(path: Path, wanted: Header | None = None) -> tuple[Header | None, list[Record]]:
    """The header and records of a file; what another process is writing just now is left out.

    wanted: the header that the file must have, if it has come to have one.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    values = []
    for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
        try:
            values.append(json.loads(line))
        except ValueError as e:
            raise ValueError(f"{path}: line {number}: must be JSON: {e}") from None
    if not values:
        return None, []
    if wanted is not None and values[0] != wanted:
        raise ValueError(f"{path}: is of another run: {_difference(values[0], wanted)}")
    return values[0], values[1:]


def _difference(there: Any, here: Any, name: str = "header") -> str:
    """The first setting in which two headers differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), key)
    return f"{name} was {quote(there)}, now {quote(here)}"


def _replace(path: Path, text: str) -> None:
    """Write a file at once: who reads it sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # machines may share it
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
