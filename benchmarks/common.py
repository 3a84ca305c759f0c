"""What every benchmark shares: timing, the machine's limits, and the form of a result.

A result is one JSON object a line in results/<bench>.jsonl, appended here and never edited by
hand. It names the device, the commit, the command and the date, so that a figure can be made
again, and after how many seconds of its program it was there (`after_s`, imports apart).
"""

import argparse
import ctypes
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from kimi_linear import _backends

HERE = Path(__file__).resolve().parent
BEGAN = time.perf_counter()
RESULTS = HERE / "results"


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dirty", action="store_true", help="measure uncommitted code")
    parser.add_argument("--no-write", action="store_true", help="print results, keep none")
    return parser


def git(*args: str) -> str:
    return subprocess.run(
        ["git", "-C", HERE, *args], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(dirty_allowed: bool) -> str:
    """The commit that is measured. Exits if files other than results differ from it. Away from
    the repository, on a machine that a built tree was copied to, the file COMMIT names it."""
    if (copied := HERE.parent / "COMMIT").exists():
        return copied.read_text().strip()
    changes = git("status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")
    if changes and not dirty_allowed:
        sys.exit(f"the tree must be clean (or pass --dirty), found\n{changes}")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changes else "")


def cpu_name() -> str:
    """What the processor calls itself, and how many of its threads this process may use."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else 'unknown CPU'}, {len(os.sched_getaffinity(0))} threads"


def device_name(device: str) -> str:
    """What the driver calls a GPU, and the processor for "cpu"."""
    return cpu_name() if device == "cpu" else _backends.shared(device).info()["name"]


# Bytes and bf16 flops a second that were measured on a device: what floors are computed from.
RATES = {"H100": (3.0e12, 798e12), "H200": (4.3e12, 790e12)}


def rates(device: str) -> tuple[float, float] | None:
    """By the name of a device, or None where nobody has measured it."""
    return next((found for part, found in RATES.items() if part in device), None)


class Results:
    """Writes the lines of one run on a device, "cpu" or "cuda"."""

    def __init__(self, options: argparse.Namespace, device: str = "cpu") -> None:
        self.commit = commit(options.dirty)
        self.device = device_name(device)
        self.write_files = not options.no_write

    def add(self, bench: str, case: dict[str, Any], **values: Any) -> None:
        """Append a line to results/<bench>.jsonl and print it, floats to four digits."""
        program = Path(sys.argv[0]).name
        line = {
            "bench": bench,
            "device": self.device,
            "commit": self.commit,
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", f"benchmarks/{program}", *sys.argv[1:]]),
            "case": case,
        } | rounded(values | {"after_s": time.perf_counter() - BEGAN})
        text = json.dumps(line)
        print(text, flush=True)
        if self.write_files:
            RESULTS.mkdir(exist_ok=True)
            with open(RESULTS / f"{bench}.jsonl", "a") as file:
                file.write(text + "\n")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def median_seconds(fn: Callable[[], Any], *, repeat: int = 5, warmup: int = 1) -> float:
    """Median wall time of a call, after calls that are not counted."""
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compile_c(name: str) -> ctypes.CDLL:
    """A C file of this folder, compiled for the machine it runs on."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{name}.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", library, HERE / f"{name}.c"], check=True)
        return ctypes.CDLL(str(library))


class PlainRead:
    """Reading `nbytes` bytes of memory once, with `threads` threads: the floor of anything that
    must read its weights. A call returns bytes a second."""

    def __init__(self, nbytes: int, threads: int) -> None:
        self.block = np.ones(nbytes // 8, np.uint64)
        self.parts = np.array_split(self.block, threads)
        self.pool = ThreadPoolExecutor(threads)
        self.read = compile_c("plain_read").plain_read
        self.read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def __call__(self) -> float:
        start = time.perf_counter()
        list(self.pool.map(lambda p: self.read(p.ctypes.data, p.size), self.parts))
        return self.block.nbytes / (time.perf_counter() - start)
