"""Five layers at the 48B model's full width on a GPU, beside transformers with the same weights.

    python benchmarks/parity.py --device cuda      # 60 GB of GPU memory, 17 GB in --folder
    python benchmarks/parity.py --small            # a smoke run of seconds, on the CPU too

Four layers with KDA, one with MLA; one dense, four with experts. One random bfloat16
checkpoint; the logits of all tokens by transformers in float32, by
transformers in bfloat16 and by this package in each storage of the weights, as relative RMS
distances from the first. Fails where bfloat16 is further than 2e-2 from it, or further than
transformers' own bfloat16; and where a second call gives other bits.
"""

import argparse
import gc
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import random_checkpoint
import torch
import transformers
from common import Results, arguments
from transformers import KimiLinearForCausalLM

import kimi_linear as kl
from kimi_linear.config import KimiLinearConfig
from kimi_linear.testing import tiny_config

LAYERS = dict(kda_layers=(1, 2, 3, 5), full_attn_layers=(4,))
BOUND = 2e-2


def small() -> KimiLinearConfig:
    return tiny_config(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=5,
        linear_attn_config=dict(head_dim=32, num_heads=4, **LAYERS), num_attention_heads=4,
        num_experts=64, num_experts_per_token=8, kv_lora_rank=64,
    )  # fmt: skip


def theirs(path: Path, ids: list[int], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' logits [T, vocab] in float32 and in bfloat16."""
    how = {"device_map": "cuda"} if device == "cuda" else {}  # which needs accelerate
    model = KimiLinearForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager",
        **how,
    ).eval()  # fmt: skip

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids], device=device), use_cache=False).logits[0].float()

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    exact = logits()
    kept = {n: p for n, p in [*model.named_parameters(), *model.named_buffers()]
            if n.endswith(("A_log", "dt_bias", "e_score_correction_bias"))}  # fmt: skip
    kept = {n: p.detach().clone() for n, p in kept.items()}
    model.to(torch.bfloat16)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name in kept:  # what the published files hold in float32
            p.data = kept[name]
    return exact, logits()


def distance(got: Any, want: torch.Tensor) -> float:
    """Relative RMS, summed in float64 by blocks: the logits are gigabytes."""
    square = reference = 0.0
    for rows in range(0, len(want), 256):
        w = want[rows : rows + 256].double()
        g = torch.as_tensor(got[rows : rows + 256], device=w.device).double()
        square += float(((g - w) ** 2).sum())
        reference += float((w**2).sum())
    return (square / reference) ** 0.5


def ours(path: Path, ids: list[int], device: str, dtype: str, invariant: bool) -> np.ndarray:
    options = dict(device=device, dtype=dtype, batch_invariant=invariant, max_batch=1)
    with kl.load(path, max_context=len(ids), progress=False, **options) as m:
        logits = np.asarray(m.logits(ids, last=False))
        if not np.array_equal(logits, np.asarray(m.logits(ids, last=False))):
            sys.exit(f"{dtype}: the same call twice gives other bits")
    return logits


def told(what: str, start: float) -> None:
    print(f"# {time.perf_counter() - start:6.1f} s  {what}", file=sys.stderr, flush=True)


def compare(config: KimiLinearConfig, options: argparse.Namespace, folder: Path) -> None:
    start, device = time.perf_counter(), options.device
    results = Results(options, device)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, options.tokens).tolist()
    nbytes = random_checkpoint.write(folder, config)
    told(f"{nbytes / 1e9:.2f} GB written", start)
    exact, rival = theirs(folder, ids, device)
    rival = distance(rival, exact)
    told(f"transformers in bfloat16 is {rival:.3g} from itself in float32", start)
    if device == "cuda":
        exact = exact.cpu()  # this package's planner asks what is free
        gc.collect()
        torch.cuda.empty_cache()
    failed = []
    for dtype in options.dtypes.split(","):
        for invariant in (False, True) if dtype == "bf16" and device == "cuda" else (False,):
            found = distance(ours(folder, ids, device, dtype, invariant), exact)
            case = {"model": "small" if options.small else "48b, 5 layers", "dtype": dtype,
                    "tokens": len(ids), "batch_invariant": invariant}  # fmt: skip
            results.add("parity", case, error=found, rivals={"transformers bf16": rival},
                        bound=BOUND)  # fmt: skip
            told(f"{dtype} is {found:.3g} from it", start)
            if dtype == "bf16" and not found < min(BOUND, rival):
                failed.append(f"{case}: {found:.3g}")
    if failed and not options.small:
        sys.exit("\n".join(failed))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=None, help="(2048)")
    parser.add_argument("--dtypes", default="bf16", help="storages to compare, with commas")
    parser.add_argument("--folder", default="/dev/shm", help="where the checkpoint goes")
    options = parser.parse_args()
    options.tokens = options.tokens or (256 if options.small else 2048)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        compare(small() if options.small else random_checkpoint.shape("wide5"), options, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
