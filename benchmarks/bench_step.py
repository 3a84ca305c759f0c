"""Where the time of a token step goes: its kernels, one by one, on a GPU.

    python benchmarks/bench_step.py --dtype bf16 --context 1024

Kernels overlap where one starts before the other has ended, so a kernel's share is the time from
the end of what ran before it to its own end: shares add up to the step. `gap` is the part of it in
which nothing ran, `alone` the kernel's own duration. Times are those of PyTorch's profiler, which
slows a step down a little: the step itself is bench_model.py's.
"""

import collections
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import model_floor
import numpy as np
from common import Results, arguments
from kimi_linear.testing import random_model
from random_checkpoint import SHAPES, shape

STEPS = 40  # tokens that are profiled; the first and the last are left out


class Kernel(NamedTuple):
    name: str
    start: float  # us
    end: float


def short(name: str) -> str:
    """A kernel's own name and numbers of its template."""
    name = re.sub(r"\(anonymous namespace\)::|\(kl_weight_format\)|^void ", "", name)
    return re.sub(r"\(.*$", "", name)


def steps_of(trace: list[dict]) -> list[list[Kernel]]:
    """The kernels of each step: a copy of its results to the host ends one."""
    gpu = [e for e in trace if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    steps: list[list[Kernel]] = [[]]
    for e in sorted(gpu, key=lambda e: e["ts"]):
        if e["cat"] == "kernel":
            steps[-1].append(Kernel(short(e["name"]), e["ts"], e["ts"] + e["dur"]))
        elif "DtoH" in e["name"] and steps[-1]:
            steps.append([])
    steps = steps[1:-1] if steps[-1] else steps[1:-2]
    usual = statistics.mode(map(len, steps))
    return [s for s in steps if len(s) == usual]


def shares(step: list[Kernel]) -> dict[str, np.ndarray]:
    """launches, share, gap and own time of each kernel of a step, in us."""
    rows: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(4))
    before = step[0].start
    for k in step:
        share = max(0.0, k.end - before)
        rows[k.name] += [1, share, max(0.0, k.start - before), k.end - k.start]
        before = max(before, k.end)
    return rows


def table(steps: list[list[Kernel]]) -> list[dict]:
    """A row for each kernel, medians over the steps, the largest share first."""
    found = [shares(s) for s in steps]
    rows = []
    for name in found[0]:
        n, share, gap, alone = np.median([f[name] for f in found], axis=0)
        rows.append({"kernel": name, "launches": int(n), "us": share, "gap_us": gap,
                     "us_each": share / n, "alone_us_each": alone / n})  # fmt: skip
    return sorted(rows, key=lambda r: -r["us"])


def profile(model, ids: np.ndarray) -> list[dict]:  # noqa: ANN001
    import torch

    torch.cuda.init()
    how = dict(max_new_tokens=STEPS, ignore_eos=True, progress=False)
    with model.state() as state:
        state.feed(ids)
        state.generate(**how)  # so that the step is recorded
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            state.generate(**how)
    with tempfile.TemporaryDirectory() as folder:
        p.export_chrome_trace(str(Path(folder) / "trace.json"))
        return json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", default="48b", choices=SHAPES)
    parser.add_argument("--dtype", default="bf16", choices=list(model_floor.BITS))
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    results = Results(options, "cuda")
    config = shape(options.shape)
    sizes = dict(max_context=options.context + 4 * STEPS, max_batch=2)
    with random_model(config, device="cuda", dtype=options.dtype, **sizes) as model:
        ids = np.random.default_rng(0).integers(3, config.vocab_size - 300, options.context)
        steps = steps_of(profile(model, ids.astype(np.int32)))
    if not steps:
        sys.exit("the profiler saw no steps")
    rows = table(steps)
    for r in rows:
        print(f"{r['us']:8.1f} us {r['launches']:4d} x {r['us_each']:7.2f} (alone "
              f"{r['alone_us_each']:7.2f}), gaps {r['gap_us']:6.1f}  {r['kernel']}", file=sys.stderr)
    results.add(
        "step", {"model": options.shape, "dtype": options.dtype, "context": options.context},
        us=sum(r["us"] for r in rows), launches=sum(r["launches"] for r in rows),
        gaps_us=sum(r["gap_us"] for r in rows), kernels=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
