"""A KDA layer from its convolution to its gated norm, on a GPU: kda_cuda.py's case "fused".

The operation is the model's own, so a model runs it: one KDA layer of 32 heads of 128 channels, on
prompts of T tokens. PyTorch's profiler tells when the convolution began and when the last kernel
before the output projection ended. Beside it, each in a graph of its own: the recurrence alone, with
norms and gate, on float32 gates as the model has them, and the two other operations.
"""

import json
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Results, rates
from kda_truth import BF16, K, V
from kimi_linear import ops
from kimi_linear.testing import random_model, tiny_config
from ops_timing import DEVICE, seconds_of

H, PROMPTS = 32, 6
OWN = re.compile("short_conv|kda_|gated_kernel")
# Convolution, recurrence with float32 gates, gates of the norm: bytes a token and head.
TOKEN_BYTES = 4 * (2 * K + V) + (2 * (3 * K + V) + 4 * K + 2) + 2 * V


def trace_of(model: Any, T: int) -> list[dict]:
    """Of PROMPTS prompts, after one."""
    r = np.random.default_rng(0)

    def prompt() -> None:
        with model.state() as state:
            state.feed(r.integers(3, 250, T).astype(np.int32))

    prompt()
    torch.cuda.init()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(PROMPTS):
            prompt()
    with tempfile.TemporaryDirectory() as folder:
        p.export_chrome_trace(str(Path(folder) / "trace.json"))
        return json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]


def spans_of(trace: list[dict]) -> Iterator[tuple[float, dict[str, float]]]:
    """Microseconds of each run of the layer's kernels, and of each of them."""
    kernels = sorted((e for e in trace if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    start, end, parts = 0.0, 0.0, {}
    for e in [*kernels, {"name": "", "ts": 0, "dur": 0}]:
        found = OWN.search(e["name"])
        if parts and not found:
            yield end - start, parts
            parts = {}
        if not found:
            continue
        if not parts:
            start = e["ts"]
        end = e["ts"] + e["dur"]
        name = re.sub(r"\(anonymous namespace\)::|^void |[<(].*$", "", e["name"])
        parts[name] = parts.get(name, 0.0) + e["dur"]


def alone(recurrence: Callable[[], Any], T: int, repeat: int) -> dict[str, float]:
    """Microseconds of the three operations, one by one."""
    x = torch.randn(T, H * (2 * K + V), device=DEVICE).to(BF16)
    taps = torch.randn(x.shape[1], 4, device=DEVICE)
    window = torch.zeros(1, x.shape[1], 3, device=DEVICE, dtype=BF16)
    y, o, z = torch.empty_like(x), *(torch.randn(T, H, V, device=DEVICE).to(BF16) for _ in "oz")
    weight, out = torch.ones(V, device=DEVICE), torch.empty_like(o)
    calls = {
        "kda_prefill": recurrence,
        "short_conv": lambda: ops.short_conv(x, taps, state=window, out=y),
        "gated_rms_norm": lambda: ops.gated_rms_norm(o, z, weight, out=out),
    }
    return {name: 1e6 * seconds_of([call] * 10, repeat) for name, call in calls.items()}


def fused(T: int, recurrence: Callable[[], Any], results: Results, repeat: int) -> None:
    config = tiny_config(
        num_hidden_layers=2, model_max_length=2 * T,
        linear_attn_config={"num_heads": H, "head_dim": K},
    )  # fmt: skip
    with random_model(config, device="cuda", dtype="bf16", max_context=T + 64) as model:
        spans = list(spans_of(trace_of(model, T)))
    steps = len(spans) // PROMPTS  # of a prompt
    taken = statistics.median(us for us, _ in spans) * steps
    parts = {n: statistics.median(p.get(n, 0.0) for _, p in spans) * steps for n in spans[-1][1]}
    bare, peak = alone(recurrence, T, repeat), rates(results.device)
    more = {}
    if peak:
        floor = 1e6 * T * H * TOKEN_BYTES / peak[0]
        more = {"floor_us": floor, "share": floor / taken}
    results.add(
        "kda_fused", {"T": T, "N": 1, "H": H, "K": K, "V": V, "gate": "softplus", "dtype": "bf16"},
        us=taken, steps=steps, kernels=parts, alone=bare, ratio=taken / bare["kda_prefill"], **more,
    )  # fmt: skip
