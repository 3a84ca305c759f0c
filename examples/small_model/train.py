"""Train the small model on one GPU, in runs that each end by the clock and can be resumed.

    python train.py --tokenizer DIR --corpus FILE --out DIR --minutes 9 [--resume FILE]
                    [--stage 0|1|2|3] [--init DIR]

Stage 0 learns on short rows, stage 1 mixes lengths up to 4,096, stages 2 and 3 each start again
from a high learning rate with more of the hard tasks, 3 with longer rows. Writes state.pt (to
resume), weights_*.npz (float32, to export) and log.jsonl.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from model import Model, MoE, fused_kernels

CONFIG = dict(
    vocab_size=data.VOCAB_SIZE, hidden_size=256, n_layers=8,
    mixer=["kda", "kda", "kda", "mla"] * 2, ffn=["dense"] + ["moe"] * 7,
    kda_heads=4, kda_head_dim=64, mla_heads=4, kv_rank=96, nope_dim=48, rope_dim=16, v_dim=64,
    dense_inner=384, n_experts=8, top_k=2, moe_inner=64, n_shared=1, routed_scaling=2.0,
)  # fmt: skip
LENGTHS = [256, 512, 1024, 2048, 4096]
HARD = {"single": 0.06, "multikey": 0.06, "multivalue": 0.16, "mrcr": 0.08, "mrcr_many": 0.18}
LONG = {"single": 0.08, "multikey": 0.05, "multivalue": 0.18, "multiquery": 0.1, "mrcr": 0.16,
        "mrcr_many": 0.16, "english": 0.08}  # fmt: skip
STAGES = [  # shares of row lengths; from, to of the learning rate; changes to data.MIX
    dict(shares=[0.5, 0.35, 0.15, 0.0, 0.0], lr=(1.0, 1.0), mix={}),
    dict(shares=[0.05, 0.1, 0.2, 0.3, 0.35], lr=(0.8, 0.02), mix={}),
    dict(shares=[0.08, 0.12, 0.2, 0.25, 0.35], lr=(0.9, 0.0), mix=HARD),
    dict(shares=[0.04, 0.08, 0.15, 0.28, 0.45], lr=(0.7, 0.0), mix=LONG),
]


def orthogonalize(g, steps=5):
    """Newton-Schulz iteration towards U V^T of g's singular value decomposition (Muon)."""
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; scaled to AdamW's usual update size (0.2 sqrt(max side))."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():  # one batched iteration for each shape
                bufs = [self.state[p].setdefault("m", torch.zeros_like(p)) for p in params]
                grads = [p.grad for p in params]
                torch._foreach_lerp_(bufs, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, bufs, group["momentum"])
                update = orthogonalize(torch.stack(ahead)) * (0.2 * max(shape) ** 0.5)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(update.unbind(0)), alpha=-group["lr"])


def optimizers(model, lr):
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and min(p.shape) > 8
              and "embed" not in n and "lm_head" not in n]  # fmt: skip
    taken = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return [Muon(hidden, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]


def loss_of(model, ids, weights, micro):
    """Weighted next-token loss of a batch, backward done in micro-batches; the mean loss."""
    total = weights[:, 1:].sum().clamp(min=1.0)
    loss = 0.0
    for i in range(0, len(ids), micro):
        x, w = ids[i : i + micro], weights[i : i + micro, 1:]
        with torch.autocast("cuda", torch.bfloat16):
            h = model(x[:, :-1])
            keep = w.reshape(-1) > 0
            z = model.lm_head(h.reshape(-1, h.shape[-1])[keep])
        each = F.cross_entropy(z.float(), x[:, 1:].reshape(-1)[keep], reduction="none")
        part = (each * w.reshape(-1)[keep]).sum() / total
        part.backward()
        loss += part.detach()
    return loss


@torch.no_grad()
def recall(model, encoder, name, length, samples=64, **kw):
    """Share of conversations whose last answer is the argmax at every token."""
    rows, spans = [], []
    r = random.Random(data.HELD_OUT_SEED + length)
    while len(rows) < samples:
        size = int(length * data.CHARS_PER_TOKEN * 0.8)
        turns = data.TASKS[name](r, size, turns=1, **kw) if name != "mqar" else data.TASKS[name](r, size, **kw)
        ids, weights = encoder.conversation(turns)
        if len(ids) > length + 1:
            continue
        answer = max(i for i, w in enumerate(weights) if w == 0.0) + 1
        rows.append(ids + [0] * (length + 1 - len(ids)))
        spans.append((answer, len(ids)))
    ids = torch.tensor(rows, device="cuda")
    right = 0
    for i in range(0, samples, 16):
        with torch.autocast("cuda", torch.bfloat16):
            h = model(ids[i : i + 16, :-1])
            for row, (a, b), hr in zip(ids[i : i + 16], spans[i : i + 16], h, strict=True):
                got = model.lm_head(hr[a - 1 : b - 1]).argmax(-1)
                right += bool((got == row[a:b]).all())
    return right / samples


def evaluate(model, encoder, lengths):
    model.eval()
    out = {}
    for n in lengths:
        out[f"single@{n}"] = recall(model, encoder, "single", n)
        out[f"multikey@{n}"] = recall(model, encoder, "multikey", n)
        out[f"multivalue@{n}"] = recall(model, encoder, "multivalue", n)
        out[f"multiquery@{n}"] = recall(model, encoder, "multiquery", n)
        out[f"mrcr4@{n}"] = recall(model, encoder, "mrcr", n, n=4)
    out["mqar16"] = recall(model, encoder, "mqar", 512, n=16, queries=4)
    model.train()
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--corpus", required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, required=True)
    p.add_argument("--resume", type=Path)
    p.add_argument("--init", type=Path, help="folder of weights_*.npz to start from")
    p.add_argument("--stage", type=int, default=0)
    p.add_argument("--tokens", type=int, default=65536)
    p.add_argument("--micro-tokens", type=int, default=65536)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--workers", type=int, default=14)
    p.add_argument("--fused", action="store_true", help="KDA by flash-linear-attention's kernels")
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    began = time.time()
    torch.manual_seed(a.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    a.out.mkdir(parents=True, exist_ok=True)

    stage = STAGES[a.stage]
    lengths = data.Lengths(LENGTHS)
    lengths.set(stage["shares"])
    seed = a.seed * 10 + a.stage
    queue = data.start(a.tokenizer, a.corpus, seed, a.tokens, lengths, a.workers, stage["mix"])
    from kimi_linear.tokenizer import Tokenizer

    encoder = data.Encoder(Tokenizer.from_dir(a.tokenizer, vocab_size=data.VOCAB_SIZE))
    if a.fused:
        fused_kernels()
    model = Model(CONFIG).cuda()
    if a.init:
        model.restore({n: x for f in sorted(a.init.glob("*.npz")) for n, x in np.load(f).items()})
    opts = optimizers(model, a.lr)
    done = 0
    if a.resume:
        state = torch.load(a.resume)
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["opts"], strict=True):
            o.load_state_dict(s)
        done = state["tokens"]
    print(f"{sum(q.numel() for q in model.parameters()):,} parameters, resumed at {done:,} tokens")

    log = open(a.out / "log.jsonl", "a")
    deadline, step, recent, seen = began + 60 * a.minutes - 40, 0, [], done
    waited, evaluated = 0.0, time.time()
    while time.time() < deadline:
        share = (time.time() - began) / (deadline - began)
        lo, hi = stage["lr"]
        warm = min(1.0, (step + 1) / 100)
        for o in opts:
            for group in o.param_groups:
                group["lr"] = a.lr * warm * (lo + (hi - lo) * share)
        t = time.time()
        ids, weights = queue.get()
        waited += time.time() - t
        ids = torch.from_numpy(ids.astype(np.int64)).cuda()
        weights = torch.from_numpy(weights.astype(np.float32)).cuda()
        loss = loss_of(model, ids, weights, max(1, a.micro_tokens // (ids.shape[1] - 1)))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        for m in model.modules():
            if isinstance(m, MoE):
                m.balance(1e-3)
        done += ids.shape[0] * (ids.shape[1] - 1)
        step += 1
        recent.append(loss)
        if step % 50 == 0:
            line = dict(step=step, tokens=done, stage=a.stage, loss=float(torch.stack(recent).mean()),
                        norm=float(norm), waited=round(waited, 1), seconds=round(time.time() - began, 1),
                        tok_s=int((done - seen) / (time.time() - began)))  # fmt: skip
            recent = []
            if time.time() - evaluated > 60:
                line |= evaluate(model, encoder, [512] if a.stage == 0 else [1024, 4096])
                evaluated = time.time()
            print(json.dumps(line), flush=True)
            print(json.dumps(line), file=log, flush=True)
    torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], tokens=done),
               a.out / "state.pt")  # fmt: skip
    final = evaluate(model, encoder, [1024, 4096])
    print(json.dumps(dict(tokens=done, **final)), flush=True)
    print(json.dumps(dict(tokens=done, **final)), file=log, flush=True)
    tensors = model.checkpoint()
    names = sorted(tensors)
    for i in range(3):
        np.savez(a.out / f"weights_{i}.npz", **{n: tensors[n].numpy() for n in names[i::3]})


if __name__ == "__main__":
    main()
