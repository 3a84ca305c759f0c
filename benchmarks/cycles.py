"""Load, use, close, many times in a process: what is left behind.

    python benchmarks/cycles.py --cycles 1000                  # about three minutes on two cores
    python benchmarks/cycles.py --device cuda --cycles 50

A cycle loads the small model and lets it generate a batch, leave a stream, score, keep a state in
a file, reuse a prefix and serve an engine; every other one is only dropped, not closed. Then the
process's memory, its threads and descriptors, and the device's free memory are looked at. What
they grow by after the first tenth of the cycles must be nothing: heaps are handed back to the
system before each look, and of the rest 1 MiB is allowed (16 MiB beside a GPU's driver, 8 MiB of
the GPU). Prints a line a tenth, appends to results/cycles.jsonl, exits with 1 where it grew.
"""

import ctypes
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

from common import Results, arguments

import kimi_linear as kl
from kimi_linear import _backends

MIB = 1 << 20
ALLOWED = {"cpu": {"rss": MIB, "device": 0}, "cuda": {"rss": 16 * MIB, "device": 8 * MIB}}
PROMPTS = ["Once upon a time", "The sea is", "A small turtle"]


def use(model: kl.Model, folder: Path) -> None:
    """A little of everything that takes memory."""
    model.generate(PROMPTS, max_new_tokens=4, temperature=0.9, logprobs=2)
    next(model.stream(PROMPTS[0], max_new_tokens=4))
    model.score(PROMPTS[0], [" there", " was a cat"])
    model.hidden(PROMPTS[1])
    with model.state().feed(PROMPTS[0]) as state:
        state.save(folder / "s.klstate")
        kl.State.load(folder / "s.klstate", model).generate(max_new_tokens=2)
    model.prefix_cache = True
    for _ in range(2):
        model.generate(PROMPTS[0] * 40, max_new_tokens=1)
    with kl.Engine(model) as engine:
        for request in [engine.submit(p, max_new_tokens=2) for p in PROMPTS]:
            request.result()


def cycle(device: str, folder: Path, *, close: bool) -> None:
    model = kl.load(device=device, max_context=1024, max_batch=4, progress=False)
    use(model, folder)
    if close:
        model.close()


def look(device: str) -> dict[str, int]:
    """What the process holds now; of a GPU the memory that is not free, as a growing number."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    free = 0 if device == "cpu" else _backends.shared(device).info()["free_bytes"]
    return {
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "device": -free,
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
    }


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--cycles", type=int, default=1000)
    options = parser.parse_args()
    results = Results(options, options.device)
    tenth, looks, start = max(options.cycles // 10, 1), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(1, options.cycles + 1):
            cycle(options.device, Path(folder), close=i % 2 == 0)
            if i % tenth == 0:
                looks.append(look(options.device))
                print(f"# {i:5d}  {looks[-1]}", file=sys.stderr, flush=True)
    grown = {name: looks[-1][name] - looks[0][name] for name in looks[0]}
    seconds = time.perf_counter() - start
    results.add("cycles", {"cycles": options.cycles, "device": options.device},
                grown=grown, first=looks[0], seconds=seconds)  # fmt: skip
    allowed = ALLOWED[options.device] | {"threads": 0, "files": 0}
    sys.exit(any(grown[name] > allowed[name] for name in allowed))


if __name__ == "__main__":
    main()
