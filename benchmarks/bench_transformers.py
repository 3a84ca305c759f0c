"""The whole model on this CPU, beside transformers with the same weights in the same run.

    python benchmarks/bench_transformers.py            about 300M parameters, under six minutes
    python benchmarks/bench_transformers.py --small    a smoke run of seconds
    python benchmarks/bench_transformers.py --device cuda    transformers alone, 48B, 110 GB

Measures prefill, batch-1 decode (also as a share of a plain read of the same bytes) and
loading, for float32 and bfloat16 weights, into results/{prefill,decode,load}.jsonl. Both sides
get every CPU thread of the process; transformers runs with sdpa attention, its cache and no
gradients.

A GPU holds one model of 98 GB, so there transformers runs alone, on random weights that are made on
the device; its lines stand in the tables beside bench_model.py's, and parity.py compares the
logits of five such layers. Kernels of other packages that it would use are not installed
on the machine that the figures come from: it says so, and takes its own code.
"""

import argparse
import copy
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import model_floor
import numpy as np
import random_checkpoint
import torch
import transformers
from common import PlainRead, Results, arguments, median_seconds, rates
from kimi_linear._tensors import FLOAT32
from kimi_linear.testing import config_json
from transformers import KimiLinearConfig, KimiLinearForCausalLM

import kimi_linear as kl

THREADS = len(os.sched_getaffinity(0))
TORCH_DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16}
ELEMENT = {"f32": 4, "bf16": 2}

# The published shape on a smaller scale: three KDA layers to one MLA and a shorter last group,
# a dense first layer, latents of rank 512, and experts so many and small that a token uses one
# in sixteen of them, as it does one sixteenth of the published model's parameters.
SHAPE = dict(
    vocab_size=16384, hidden_size=768, intermediate_size=3072, moe_intermediate_size=128,
    num_attention_heads=6, num_key_value_heads=6, num_experts=64, num_experts_per_token=4,
    num_shared_experts=1, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, linear_head_dim=128, linear_num_heads=6, num_expert_group=1, topk_group=1,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, model_max_length=65536,
    pattern="KKKMKKKMKKKMKM",
)  # fmt: skip
SMALL = SHAPE | dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=32,
    num_experts=8, kv_lora_rank=64, linear_num_heads=2, num_attention_heads=2,
    num_key_value_heads=2, pattern="KKKM",
)  # fmt: skip


def make_model(shape: dict[str, Any]) -> KimiLinearForCausalLM:
    """transformers' model with random weights; logits have a spread of a few units. Layers add
    a fraction of what they read, else rounding to bfloat16 would grow from layer to layer until
    no two implementations could be compared."""
    shape = dict(shape)
    pattern = shape.pop("pattern")
    kinds = ["linear_attention" if p == "K" else "full_attention" for p in pattern]
    config = KimiLinearConfig(num_hidden_layers=len(kinds), layer_types=kinds, **shape)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = KimiLinearForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed_tokens" in name:
                p.normal_()
            elif "norm" not in name and not name.endswith(("A_log", "dt_bias")):
                p.normal_(std=(3.0 if "lm_head" in name else 0.4) * p.shape[-1] ** -0.5)
    return model


def save(model: KimiLinearForCausalLM, dtype: str, folder: Path) -> Path:
    if dtype == "bf16":
        model = copy.deepcopy(model).to(torch.bfloat16)
    model.save_pretrained(folder / dtype, max_shard_size="200MB")
    return folder / dtype


def bytes_of_a_token(model: KimiLinearForCausalLM, dtype: str) -> int:
    """What one decode step must move: every weight once, of the experts only the chosen ones,
    and the KDA states in and out. Embedding rows, latents and conv windows are left out."""
    c, total = model.config, 0
    for name, p in model.named_parameters():
        if "embed_tokens" in name:
            continue
        active = c.num_experts_per_token / c.num_experts if ".experts." in name else 1
        total += int(p.numel() * active * ELEMENT[dtype])
    n_kda = c.layer_types.count("linear_attention")
    return total + n_kda * 2 * 4 * c.linear_num_heads * c.linear_head_dim**2


class Theirs:
    """transformers, its best settings on a CPU."""

    def __init__(self, path: Path, dtype: str) -> None:
        load = KimiLinearForCausalLM.from_pretrained
        self.model = load(path, dtype=TORCH_DTYPE[dtype], attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> Any:
        return self.model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.prefill(ids).logits[0, -1].float().numpy()

    @torch.inference_mode()
    def decode(self, ids: list[int], n: int) -> tuple[list[int], float]:
        """n greedy tokens after the first, and the seconds a token took."""
        out = self.prefill(ids)
        tokens = [int(out.logits[0, -1].argmax())]
        start = time.perf_counter()
        for _ in range(n):
            out = self.model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values)
            tokens.append(int(out.logits[0, -1].argmax()))
        return tokens, (time.perf_counter() - start) / n


class Ours:
    """kimi_linear."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.model = kl.load(path, device="cpu", dtype=dtype, max_batch=1, progress=False)

    def prefill(self, ids: list[int]) -> Any:
        return self.model.logits(ids)

    def logits(self, ids: list[int]) -> np.ndarray:
        return np.asarray(self.model.logits(ids))

    def decode(self, ids: list[int], n: int) -> tuple[list[int], float]:
        c = self.model.generate(ids, max_new_tokens=n + 1, ignore_eos=True, progress=False)
        return c.token_ids, c.stats.decode_s / n


def check(ours: Ours, theirs: Theirs, ids: list[int], dtype: str) -> float:
    """Relative RMS distance of the logits after `ids`. Exits where the two disagree: a wrong
    result has no speed."""
    want = theirs.logits(ids)
    error = float(np.linalg.norm(ours.logits(ids) - want) / np.linalg.norm(want))
    if not error < {"f32": 1e-3, "bf16": 0.1}[dtype]:
        raise SystemExit(f"{dtype}: logits differ by {error:.3g}")
    return error


def bench_prefill(results, case, ours, theirs, ids, error) -> None:
    mine = median_seconds(lambda: ours.prefill(ids), repeat=5)
    rival = median_seconds(lambda: theirs.prefill(ids), repeat=1, warmup=0)  # half a minute
    results.add(
        "prefill", case | {"tokens": len(ids)}, tok_s=len(ids) / mine, error=error,
        rivals={"transformers": len(ids) / rival}, ratio=rival / mine,
    )  # fmt: skip


def bench_decode(results, case, ours, theirs, ids, nbytes, n) -> None:
    """Decode and plain reads take turns, so that both see the same neighbours."""
    plain = PlainRead(nbytes, THREADS)
    plain()
    ours.decode(ids, 4)
    reads, seconds = [], []
    for _ in range(5):
        reads += [plain() for _ in range(4)]
        seconds.append(ours.decode(ids, n)[1])
    mine, bandwidth = statistics.median(seconds), statistics.median(reads)
    theirs.decode(ids, 2)
    rival = statistics.median(theirs.decode(ids, n // 4)[1] for _ in range(3))
    results.add(
        "decode", case | {"context": len(ids), "batch": 1}, ms_per_token=1e3 * mine,
        floor_ms=1e3 * nbytes / bandwidth, share=nbytes / mine / bandwidth,
        mbytes_per_token=nbytes / 1e6, plain_read_gb_s=bandwidth / 1e9,
        rivals={"transformers": 1e3 * rival}, ratio=rival / mine,
    )  # fmt: skip


def bench_load(results, case, path: Path, dtype: str) -> None:
    nbytes = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    mine = median_seconds(lambda: Ours(path, dtype).model.close(), repeat=3)
    rival = median_seconds(lambda: Theirs(path, dtype), repeat=2, warmup=0)
    results.add(
        "load", case | {"bytes": nbytes, "storage": "page cache"}, seconds=mine,
        rivals={"transformers": rival}, ratio=rival / mine,
    )  # fmt: skip


def bench(
    results: Results, model, dtype: str, folder: Path, options: argparse.Namespace
) -> None:
    path = save(model, dtype, folder)
    millions = sum(p.numel() for p in model.parameters()) // 10**6
    case = {"model": f"random-{millions}M", "dtype": dtype, "weights": "random",
            "threads": THREADS}  # fmt: skip
    bench_load(results, case, path, dtype)
    ours, theirs = Ours(path, dtype), Theirs(path, dtype)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, options.tokens).tolist()
    error = check(ours, theirs, ids[:200], dtype)
    bench_prefill(results, case, ours, theirs, ids, error)
    nbytes = bytes_of_a_token(model, dtype)
    bench_decode(results, case, ours, theirs, ids[:128], nbytes, 16 if options.small else 64)
    ours.model.close()


# ---- transformers alone ----------------------------------------------------------------------

PROMPTS, CONTEXTS, STEPS, WARMUP = (1024, 8192), (1024, 8192), 32, 4


def made_on(device: str, config: Any) -> KimiLinearForCausalLM:
    """The model with random weights; in float32 what the published files hold so."""
    native = KimiLinearConfig.from_dict(config_json(config, "native"))
    native._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = KimiLinearForCausalLM(native).eval()
    kept = [n for n, _ in tensors_of(model) if n.endswith(FLOAT32)]
    model.to(torch.bfloat16).to_empty(device=device)
    with torch.no_grad():
        for name, tensor in tensors_of(model):
            mean, std = random_checkpoint.moments(name, tuple(tensor.shape))
            if name in kept:
                tensor.data = tensor.data.float()
            tensor.normal_(mean, std)
    return model


def tensors_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


class Alone:
    """A model of transformers on a device, timed to the end of what it has enqueued."""

    def __init__(self, model: KimiLinearForCausalLM, device: str) -> None:
        self.model, self.device = model, device

    def ids(self, n: int) -> torch.Tensor:
        return torch.randint(3, self.model.config.vocab_size - 300, (1, n), device=self.device)

    def wait(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """Seconds to the first token."""
        start = self.wait()
        out = self.model(self.ids(tokens), use_cache=True, logits_to_keep=1)
        out.logits[0, -1].argmax()
        return self.wait() - start

    @torch.inference_mode()
    def decode(self, context: int) -> float:
        """Seconds a greedy token, none of which the host looks at."""
        out = self.model(self.ids(context), use_cache=True, logits_to_keep=1)
        out = self.steps(out, WARMUP)
        start = self.wait()
        self.steps(out, STEPS)
        return (self.wait() - start) / STEPS

    def steps(self, out: Any, n: int) -> Any:
        for _ in range(n):
            ids = out.logits[:, -1:].argmax(-1)
            out = self.model(ids, past_key_values=out.past_key_values, use_cache=True)
        return out


def bench_alone(results: Results, options: argparse.Namespace) -> None:
    config = random_checkpoint.shape(options.shape)
    rival = Alone(made_on(options.device, config), options.device)
    case = {"model": options.shape, "dtype": "bf16", "weights": "random",
            "engine": f"transformers {transformers.__version__}"}  # fmt: skip
    more = {"experts": getattr(rival.model.config, "_experts_implementation", None),
            "torch": torch.__version__}  # fmt: skip
    peak = rates(results.device)
    for tokens in PROMPTS:
        seconds = median_seconds(lambda n=tokens: rival.prefill(n), repeat=3)
        least = model_floor.prefill_floor(peak, config, "bf16", tokens) if peak else None
        results.add("prefill", case | {"tokens": tokens}, tok_s=tokens / seconds,
                    first_token_ms=1e3 * seconds, runs=3, **share(least, seconds), **more)  # fmt: skip
    for context in CONTEXTS:
        seconds = statistics.median(rival.decode(context) for _ in range(3))
        least = model_floor.Step(config, "bf16", 1, context).bytes() / peak[0] if peak else None
        results.add("decode", case | {"context": context, "batch": 1, "router": "balanced"},
                    ms_per_token=1e3 * seconds, tok_s=1 / seconds, **share(least, seconds), **more)  # fmt: skip


def share(least: float | None, seconds: float) -> dict[str, float]:
    return {} if least is None else {"share": least / seconds}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", choices=random_checkpoint.SHAPES, help="transformers alone, of")
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--tokens", type=int, default=None, help="prefill length (2048)")
    options = parser.parse_args()
    options.tokens = options.tokens or (256 if options.small else 2048)
    results = Results(options, options.device)
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    if options.device == "cuda" or options.shape:
        options.shape = options.shape or "48b"
        return bench_alone(results, options)
    model = make_model(SMALL if options.small else SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("f32", "bf16"):
            bench(results, model, dtype, Path(folder), options)


if __name__ == "__main__":
    main()
