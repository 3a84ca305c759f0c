"""Where the time of token steps goes, kernel by kernel, on a GPU; and the steps themselves.

    python benchmarks/bench_step.py --dtype bf16 --context 1024
    python benchmarks/bench_step.py --context 1024 --batch 1,8,32,64,256
    python benchmarks/bench_step.py --context 1024 --batch 1,64 --router-skew 500
    python benchmarks/bench_step.py --context 1024 --batch 1,8,16 --batch-invariant --dtype int8

Each case is one of bench_model.py, whose line it writes, and then 200 tokens (32 of a batch) under
PyTorch's profiler, which slows a step down by some percent. Lines name the places of a step: what
its kernels are there for, and how many bytes those must read and write.

A kernel is on the device before the one it follows has ended, so its time, `us`, is that from the
end of what ran before it to its own end: times add up to the step. `alone` is how long it was there.
In `gap_us` before it nothing ran at all. That is next to nothing in a recorded step, and it is not
how long the memory had nothing to do: a kernel that is there early asks for its first weights and
then waits for its inputs. What a trace can say of that is `over_us`, the time beyond the one in
which the kernel's bytes come at the device's bandwidth. A boundary is in it, and all else that is
not reading.
"""

import collections
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from bench_model import BLOCK, Bench, Case, arguments, decode_case
from model_floor import Step

TRACED = 13 * BLOCK  # tokens of a single sequence under the profiler: 200 and a few
TRACED_OF_A_BATCH = 2 * BLOCK
LOST = 0.001  # of a step's bytes: those of norms have no place

# The kernels that tell the parts of a layer from each other; products lie between them.
CORES = {"kda": r"kda_|short_conv|gated", "mla": r"mla_", "ffn": r"moe_"}
REDUCE = "splitKreduce"  # adds the parts of a product of cuBLAS, whose name may have "splitK", too
# Products before a core, by how many there are; "in" is all that read the stream.
INPUTS = {
    "kda": {1: ("in",), 2: ("low", "in"), 3: ("in", "f_b", "g_b"), 4: ("low", "in", "f_b", "g_b")},
    "mla": {1: ("in",), 2: ("kv_a", "in")},
}


class Kernel(NamedTuple):
    name: str
    start: float  # us
    end: float


# ---- steps of a trace ------------------------------------------------------------------------


def traced(run: Callable[[], object]) -> list[dict]:
    """What the GPU does meanwhile, as events of PyTorch's profiler."""
    import torch

    torch.cuda.init()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        run()
    with tempfile.TemporaryDirectory() as folder:
        p.export_chrome_trace(str(Path(folder) / "trace.json"))
        return json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]


def short(name: str) -> str:
    """A kernel's own name and numbers of its template."""
    name = re.sub(r"\(anonymous namespace\)::|\(kl_weight_format\)|^void ", "", name)
    return re.sub(r"\(.*$", "", name)


def steps_of(trace: list[dict]) -> list[list[Kernel]]:
    """The kernels of each whole step, from the embedding's on: a copy of its results to the host
    ends one. Only steps of the commonest kernels count."""
    gpu = [e for e in trace if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    steps: list[list[Kernel]] = [[]]
    for e in sorted(gpu, key=lambda e: e["ts"]):
        if e["cat"] == "kernel":
            steps[-1].append(Kernel(short(e["name"]), e["ts"], e["ts"] + e["dur"]))
        elif "DtoH" in e["name"] and steps[-1]:
            steps.append([])
    steps = steps[1:-1] if steps[-1] else steps[1:-2]
    if not steps:
        return []
    usual = statistics.mode(tuple(k.name for k in s) for s in steps)
    return [from_embedding(s) for s in steps if tuple(k.name for k in s) == usual]


def from_embedding(step: list[Kernel]) -> list[Kernel]:
    """Without the copies of the step's inputs before it."""
    first = next((i for i, k in enumerate(step) if k.name.startswith("pick_kernel")), 0)
    return step[first:]


# ---- what a kernel is there for --------------------------------------------------------------


class Run(NamedTuple):
    """Neighbouring kernels of one core."""

    kind: str | None
    first: int
    end: int


def runs_of(names: list[str]) -> list[Run]:
    """The cores of a step in order. Experts' products have names that others have, too: theirs lie
    between two kernels of the core."""
    runs: list[Run] = []
    for i, name in enumerate(names):
        kind = next((k for k, words in CORES.items() if re.search(words, name)), None)
        if kind is None:
            continue
        same = bool(runs) and runs[-1].kind == kind
        if same and (kind == "ffn" or runs[-1].end == i):
            runs[-1] = runs[-1]._replace(end=i + 1)
        else:
            runs.append(Run(kind, i, i + 1))
    return runs


def places_of(names: list[str]) -> list[str]:
    """What each kernel of a step is there for, such as "kda o"."""
    runs = runs_of(names)
    places = ["other"] * len(names)
    usual = usual_inputs(names, runs)
    for run in runs:
        for i in range(run.first, run.end):
            places[i] = core_place(run.kind, names[i])
    ends = [Run(None, 0, 0), *runs, Run(None, len(names), len(names))]
    for before, after in zip(ends, ends[1:], strict=False):
        between = list(range(before.end, after.first))
        products = [i for i in between if is_product(names[i])]
        found = dict(zip(products, products_between(before, after, len(products), usual),
                         strict=True))  # fmt: skip
        for i in between:
            part = REDUCE in names[i] and i > 0
            places[i] = found.get(i, places[i - 1] if part else names[i].split("_kernel")[0])
    return places


def is_product(name: str) -> bool:
    """Of this package or of cuBLAS, where sums of parts belong to the product before them."""
    ours_or_theirs = r"^product_|^tiles_|^ordered_|nvjet|gemm|gemv|cutlass"
    return bool(re.search(ours_or_theirs, name)) and REDUCE not in name


def usual_inputs(names: list[str], runs: list[Run]) -> dict[str | None, int]:
    """How many products are before a core where experts, not products, come before those."""
    found: dict[str | None, int] = {}
    for before, after in zip(runs, runs[1:], strict=False):
        if before.kind == "ffn":
            found[after.kind] = sum(map(is_product, names[before.end : after.first]))
    return found


def products_between(before: Run, after: Run, n: int, usual: dict) -> list[str]:
    """The places of n products between two cores."""
    found: list[str] = []
    if before.kind in INPUTS and n > 0:
        found.append(f"{before.kind} o")
    if after.kind in INPUTS:
        last = min(usual.get(after.kind, n), n - len(found))
        found += ["dense"] * (n - len(found) - last)
        which = INPUTS[after.kind].get(last, ("in",) * last)
        return found + [f"{after.kind} {each}" for each in which]
    last = "router" if after.kind == "ffn" else "lm_head"
    return found + [last] * (n - len(found))


def core_place(kind: str, name: str) -> str:
    if kind == "kda":
        return "kda mixer"
    if kind == "mla":
        return "mla " + next((w for w in ("absorb", "attend", "finish") if w in name), "rest")
    if re.search(r"inner|true", name):
        return "experts up"
    if re.search(r"step_out|step_apart|false", name):
        return "experts down"
    return name.split("_kernel")[0].replace("_", " ")


# ---- bytes -----------------------------------------------------------------------------------

TENSORS = {  # of a layer with KDA or MLA, where the two have places of their own
    r"self_attn\.(b|f_a|g_a)_proj": "kda low",
    r"self_attn\.(f_b|g_b)_proj": r"kda \1",
    r"self_attn\.(.*conv1d|A_log|dt_bias|o_norm)": "kda mixer",
    r"self_attn\.kv_a_proj": "mla kv_a",
    r"self_attn\.kv_b_proj": "mla kv_b",
    r"self_attn\.o_proj": "{kind} o",
    r"self_attn\.[qkv]": "{kind} in",
    r"block_sparse_moe\.gate\.": "{kind} router",
    r"block_sparse_moe.*(\.w[13]|gate_proj|up_proj)\.": "experts up",
    r"block_sparse_moe.*(\.w2|down_proj)\.": "experts down",
    r"mlp\.": "dense",
    r"lm_head": "lm_head",
}


def place_of_tensor(name: str, kinds: list[str]) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    kind = kinds[int(layer[1])] if layer else ""
    for words, place in TENSORS.items():
        if found := re.search(words, name):
            return found.expand(place).format(kind=kind)
    return "other"


def place_bytes(step: Step, places: set[str]) -> dict[str, float]:
    """What the kernels at each place must read and write in a step: weights, states and latents,
    not what passes from one kernel to the next."""
    config = step.config
    kinds = ["kda" if k == "linear_attention" else "mla" for k in config.layer_types]
    found: dict[str, float] = collections.defaultdict(float)
    for name, shape in config.tensor_shapes().items():
        found[place_of_tensor(name, kinds)] += step.tensor_bytes(name, shape)
    found["kda mixer"] += step.state_bytes()
    found["mla attend"] = step.latent_bytes()
    nope, v = config.qk_nope_head_dim, config.v_head_dim
    found["mla absorb"] = found["mla kv_b"] * nope / (nope + v)
    found["mla finish"] = found["mla kv_b"] * v / (nope + v)
    for part, whole in (("kda low", "kda in"), ("mla kv_a", "mla in"), ("kda f_b", "kda mixer"),
                        ("kda g_b", "kda mixer")):  # fmt: skip
        if part not in places:  # it has no kernel of its own
            found[whole] += found.pop(part)
    for kind in ("kda", "mla"):  # the product before the experts may do the router's work
        found["router" if "router" in places else f"{kind} o"] += found.pop(f"{kind} router", 0)
    return found


# ---- the table -------------------------------------------------------------------------------


def times_of(step: list[Kernel]) -> np.ndarray:
    """us, idle and own time of each kernel of a step."""
    rows, before = np.zeros((len(step), 3)), step[0].start
    for i, k in enumerate(step):
        rows[i] = max(0.0, k.end - before), max(0.0, k.start - before), k.end - k.start
        before = max(before, k.end)
    return rows


def table(
    steps: list[list[Kernel]], what: Step | None = None, bandwidth: float | None = None
) -> list[dict]:
    """A row for each place, medians over the steps, the longest first."""
    names = [k.name for k in steps[0]]
    times = np.median([times_of(s) for s in steps], axis=0)
    at: dict[str, list[int]] = collections.defaultdict(list)
    for i, place in enumerate(places_of(names)):
        at[place].append(i)
    needed = {} if what is None else place_bytes(what, set(at))
    rows = []
    for place, which in at.items():
        us, idle, alone = times[which].sum(axis=0)
        kernels = dict.fromkeys(names[i] for i in which)
        row = {"place": place, "kernel": ", ".join(kernels),
               "launches": len(which), "us": us, "us_each": us / len(which),
               "alone_us_each": alone / len(which), "gap_us": idle,
               "bytes": needed.get(place, 0.0)}  # fmt: skip
        if bandwidth:
            least = 1e6 * row["bytes"] / bandwidth
            row |= {"share": least / us, "over_us": max(0.0, us - least)}
        rows.append(row)
    return sorted(rows, key=lambda r: -r["us"])


def check_bytes(rows: list[dict], what: Step) -> None:
    """Raises ValueError where a place that must read weights has no kernel: its bytes are lost."""
    lost = 1 - sum(r["bytes"] for r in rows) / what.bytes()
    if abs(lost) > LOST:
        missing = sorted(set(place_bytes(what, set())) - {r["place"] for r in rows})
        raise ValueError(f"{100 * lost:.2g} % of the bytes have no kernel; of {missing}")


def summary(steps: list[list[Kernel]], rows: list[dict]) -> dict:
    """Of a step: its time on the device, without what lies between steps, and its gaps."""
    us = statistics.median(max(k.end for k in s) - s[0].start for s in steps)
    starts = [s[0].start for s in steps]
    found = {"us": us, "us_to_the_next": statistics.median(np.diff(starts)) if len(starts) > 1 else us,
             "steps": len(steps), "launches": sum(r["launches"] for r in rows),
             "gap_us": sum(r["gap_us"] for r in rows)}  # fmt: skip
    found["gap_share"] = found["gap_us"] / us
    if all("over_us" in r for r in rows):
        found["over_us"] = sum(r["over_us"] for r in rows)
        found["over_share"] = found["over_us"] / us
    return found


def show(rows: list[dict]) -> str:
    return "".join(
        f"{r['us']:8.1f} us {r['launches']:4d} x {r['us_each']:7.2f} (alone "
        f"{r['alone_us_each']:7.2f}) {r['bytes'] / 1e6:9.1f} MB {100 * r.get('share', 0):4.0f} %, "
        f"gap {r['gap_us']:5.1f}, over {r.get('over_us', 0):6.1f}  {r['place']}: "
        f"{r['kernel'][:60]}\n"
        for r in rows
    )


# ---- the program -----------------------------------------------------------------------------


class StepBench(Bench):
    """Decode cases, each followed by a look at its kernels."""

    def new_tokens(self, case: Case) -> int:
        return super().new_tokens(case) + max(TRACED, TRACED_OF_A_BATCH) + BLOCK

    def look(self, run, case: Case) -> None:  # noqa: ANN001
        wanted = TRACED if case.batch == 1 else TRACED_OF_A_BATCH
        steps = steps_of(traced(lambda: self.tokens(run, case, wanted)))
        if not steps:
            raise ValueError("the profiler saw no whole step")
        what = self.step_of(case)
        rows = table(steps, what, self.rates and self.rates[0])
        print(show(rows), file=sys.stderr, flush=True)
        check_bytes(rows, what)
        self.results.add("step", self.decode_line(case), **summary(steps, rows), places=rows)


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--context", type=numbers, default=[1024], help="tokens, with commas")
    parser.add_argument("--batch", type=numbers, default=[1], help="sequences, with commas")
    options = parser.parse_args()
    options.device = "cuda"
    cases = [decode_case(f"{n} x {context}", context, n)
             for context in options.context for n in options.batch]  # fmt: skip
    bench = StepBench(options, cases)
    bench.run()
    sys.exit(bench.failed)


if __name__ == "__main__":
    main()
