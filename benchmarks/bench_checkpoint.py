"""A checkpoint of 98 GB from nothing to its first token, each time by a fresh process.

    python benchmarks/bench_checkpoint.py --device cuda              # 98 GB in --folder
    python benchmarks/bench_checkpoint.py --device cuda --checkpoint DIR  # one that is there
    python benchmarks/bench_checkpoint.py --shape small --no-write   # seconds, anywhere

Random weights in Hugging Face layout are written to memory-backed storage; then a new process
imports the package, loads them and generates one token, once for each storage of the weights,
the 8-bit one within the memory of an 80 GB card. Seconds count from the start of the process.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import random_checkpoint
from common import Results, arguments

CARD = 80 * 10**9  # bytes of the card that 8 bits are for
CACHE = 4 * 10**9
CHILD = """
import json, sys, time
imported = time.time()
import kimi_linear as kl
imported = time.time() - imported
path, options = sys.argv[1], json.loads(sys.argv[2])
start = time.time()
model = kl.load(path, progress=False, **options)
loaded = time.time()
model.generate([1, 2, 3, 4], max_new_tokens=1, ignore_eos=True, progress=False)
print(json.dumps(dict(import_s=imported, load_s=loaded - start, first_token=time.time(),
                      plan_bytes=model.plan.total, max_context=model.plan.max_context)))
"""


def load_in_a_process(path: Path, options: dict) -> dict:
    start = time.time()
    command = [sys.executable, "-c", CHILD, str(path), json.dumps(options)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode != 0:
        sys.exit(f"loading with {options} failed")
    found = json.loads(run.stdout)
    found["first_token_s"] = found.pop("first_token") - start
    return found


def measure(results: Results, options: argparse.Namespace, path: Path) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    nbytes = index["metadata"]["total_size"]
    for dtype in options.dtypes.split(","):
        how = {"device": options.device, "dtype": dtype, "max_batch": 4}
        if options.shape == "48b":
            how["cache_bytes"] = CACHE
        for turn in range(options.repeat):
            found = load_in_a_process(path, how)
            if dtype in ("int8", "fp8") and not found["plan_bytes"] < CARD:
                sys.exit(f"{dtype}: {found['plan_bytes']} bytes do not fit an 80 GB card")
            case = {"model": options.shape, "dtype": dtype, "bytes": nbytes, "turn": turn,
                    "storage": options.storage}  # fmt: skip
            results.add("load", case, seconds=found.pop("load_s"),
                        gb_s=nbytes / found["first_token_s"] / 1e9, **found)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="48b", choices=random_checkpoint.SHAPES)
    parser.add_argument("--dtypes", default="bf16,int8", help="storages, with commas")
    parser.add_argument("--repeat", type=int, default=1, help="loads of each")
    parser.add_argument("--folder", default="/dev/shm", help="where the checkpoint goes")
    parser.add_argument("--storage", default="memory", help="what the folder is on")
    parser.add_argument("--checkpoint", type=Path, help="one that random_checkpoint.py wrote")
    options = parser.parse_args()
    results = Results(options, options.device)
    if options.checkpoint:
        measure(results, options, options.checkpoint)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        start = time.perf_counter()
        nbytes = random_checkpoint.write(folder, random_checkpoint.shape(options.shape))
        seconds = time.perf_counter() - start
        print(f"# {nbytes / 1e9:.2f} GB written in {seconds:.1f} s", file=sys.stderr, flush=True)
        measure(results, options, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
