"""Loading weights of the 48B model's widths, by their storage, beside the speed of what they cross.

    python benchmarks/bench_load.py                                   # this CPU, 2 GB
    python benchmarks/bench_load.py --device cuda --layers 2 --experts 256

Random weights are written to memory-backed storage and loaded, time and again, in one process.
The floor is the slower of two ways that the bytes must go, in the same run: as many threads as the
loader has reading the files into memory that is used again and again, and on a GPU copies from
pinned memory. bench_checkpoint.py has the whole model in fresh processes.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kimi_linear as kl
import numpy as np
import random_checkpoint
from common import Results, arguments
from kimi_linear.config import KimiLinearConfig

BLOCK = 8 << 20  # bytes of a read, as in csrc/model/loader.c
READERS = min(8, len(os.sched_getaffinity(0)))
IDS = np.random.default_rng(1).integers(0, 100_000, 64).tolist()


def shape(layers: int, experts: int) -> KimiLinearConfig:
    """The published shape cut short; its last layer is MLA, as there."""
    data = KimiLinearConfig.kimi_linear_48b().to_dict()
    full = {i for i in data["linear_attn_config"]["full_attn_layers"] if i <= layers} | {layers}
    kda = tuple(i for i in range(1, layers + 1) if i not in full)
    data |= {"num_hidden_layers": layers, "num_experts": experts}
    data["linear_attn_config"] |= dict(kda_layers=kda, full_attn_layers=tuple(sorted(full)))
    return KimiLinearConfig.from_dict(data)


def plain_read(folder: Path) -> float:
    """Bytes a second of READERS threads that read the files into a buffer each."""
    fds = [os.open(f, os.O_RDONLY) for f in sorted(folder.glob("*.safetensors"))]
    blocks = [(fd, at) for fd in fds for at in range(0, os.fstat(fd).st_size, BLOCK)]
    buffers = [bytearray(BLOCK) for _ in range(READERS)]

    def read(thread: int) -> int:
        return sum(os.preadv(fd, [buffers[thread]], at) for fd, at in blocks[thread::READERS])

    with ThreadPoolExecutor(READERS) as threads:
        start = time.perf_counter()
        nbytes = sum(threads.map(read, range(READERS)))
        seconds = time.perf_counter() - start
    for fd in fds:
        os.close(fd)
    return nbytes / seconds


def pinned_copy() -> float:
    """Bytes a second of copies from pinned memory to the GPU."""
    import torch

    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    device.copy_(host)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(16):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 16 * host.nbytes / (time.perf_counter() - start)


def seconds_of_a_load(folder: Path, dtype: str, options: argparse.Namespace) -> list[float]:
    """The first load also takes the memory for the first time. Every load must give the logits
    of the one before."""
    found, seconds = [], []
    for _ in range(1 + options.repeat):
        start = time.perf_counter()
        with kl.load(folder, device=options.device, dtype=dtype, max_context=4096, max_batch=1,
                     progress=False) as model:  # fmt: skip
            seconds.append(time.perf_counter() - start)
            found.append(np.asarray(model.logits(IDS)))
    if not np.isfinite(found[0]).all() or not all(np.array_equal(f, found[0]) for f in found):
        sys.exit(f"{dtype}: two loads of the same files differ")
    return seconds


def bench(results: Results, folder: Path, options: argparse.Namespace) -> None:
    start = time.perf_counter()
    nbytes = random_checkpoint.write(folder, shape(options.layers, options.experts))
    print(f"# {nbytes / 1e9:.2f} GB written in {time.perf_counter() - start:.1f} s",
          file=sys.stderr, flush=True)  # fmt: skip
    floors = {"plain_read_gb_s": max(plain_read(folder) for _ in range(3)) / 1e9}
    if options.device == "cuda":
        floors["pinned_copy_gb_s"] = pinned_copy() / 1e9
    for dtype in options.dtypes.split(","):
        case = {"model": "48b widths", "layers": options.layers, "experts": options.experts,
                "dtype": dtype, "weights": "random", "threads": READERS, "bytes": nbytes,
                "storage": options.storage}  # fmt: skip
        first, *others = seconds_of_a_load(folder, dtype, options)
        gb_s = nbytes / statistics.median(others) / 1e9
        results.add("load", case, seconds=statistics.median(others), first_s=first, gb_s=gb_s,
                    share=gb_s / min(floors.values()), **floors)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, default=2, help="of 27")
    parser.add_argument("--experts", type=int, default=16, help="of 256 in a layer")
    parser.add_argument("--dtypes", help="storages, with commas; all of the device's")
    parser.add_argument("--repeat", type=int, default=3, help="loads of each after the first")
    parser.add_argument("--folder", default="/dev/shm", help="where the checkpoint goes")
    parser.add_argument("--storage", default="memory", help="what the folder is on")
    options = parser.parse_args()
    all_of_them = "bf16,fp8,int8,int4" if options.device == "cuda" else "bf16,int8,int4"
    options.dtypes = options.dtypes or all_of_them
    results = Results(options, options.device)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        bench(results, folder, options)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
