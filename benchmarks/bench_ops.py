"""Operations that Python can call, on a GPU, at the shapes of the 48B model.

    python benchmarks/bench_ops.py                    # about two minutes on an H100
    python benchmarks/bench_ops.py --only linear,kda  # operations whose name contains one of these
    python benchmarks/bench_ops.py --small --no-write # seconds and small shapes; without a GPU, too

All of them but kda_prefill, which bench_kda.py has. A call is captured in a CUDA graph once for
each of several copies of its arguments, so many that they do not fit the L2 together; the figure is
the median over replays, divided by the calls. quantize takes memory and waits, so it cannot be
captured: `us` is then the whole call, memory taken and given back, and `kernel_us` its kernels. The
floor is what the call must move or compute at the least, at the rates measured on this device; what
a token step fuses further (moe, kda_mixer, ends of linear) only the runner calls: bench_step.py;
the rival does the same work in the same run: cuBLAS (torch.matmul), SDPA on keys and values that
are expanded already, torch's own words for a rounding, and for what only moves memory a copy of as
many bytes. Everything is checked before it is timed.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import Results, arguments, rates
from kimi_linear import ops, reference
from ops_timing import DEVICE, L2_BYTES, eager_seconds, kernel_seconds, seconds_of

HIDDEN, HEADS, HEAD = 2304, 32, 128
NOPE, ROPE, RANK = 128, 64, 512
EXPERTS, TOP, INNER, VOCABULARY = 256, 8, 1024, 163_840
CHECKED_TOKENS, CHECKED_ROWS = 200, 4096
DECODED = ((1, 1024), (1, 8192), (1, 131_072), (1, 1 << 20), (8, 8192), (32, 8192), (64, 8192))
DECODED_8BIT = ((1, 1024), (1, 8192), (1, 131_072), (1, 1 << 20), (32, 8192))
LATENT_ROWS = 4096  # that pages are drawn from: a million would take longer to pack than all else
BF16 = torch.bfloat16


@dataclasses.dataclass
class Bench:
    """One call: run(*make()) is timed, beside rivals on the same arguments."""

    op: str
    case: dict[str, Any]
    make: Callable[[], tuple]
    run: Callable[..., Any]
    check: Callable[..., float]  # relative error of run(*make())
    bytes: float
    flops: float
    rivals: dict[str, Callable[..., Any]]
    bound: float = 4e-3
    captured: bool = True


def rand(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def error(got: Any, want: Any) -> float:
    want = torch.as_tensor(want).double()
    got = torch.as_tensor(got).to(want.device).double()
    return float((got - want).norm() / want.norm())


# ---- timing ----------------------------------------------------------------------------------


def copies_of(bench: Bench) -> list[tuple]:
    """Arguments of calls in a row, none of whose memory is still in the L2 when it is read."""
    return [bench.make() for _ in range(1 + min(64, int(2 * L2_BYTES // bench.bytes) + 1))]


def copy_of(nbytes: float) -> Callable[..., Any]:
    """A rival that reads half of the bytes and writes the other half."""
    n = max(1, int(nbytes // 2))
    pairs = [torch.empty(2, n, dtype=torch.uint8, device=DEVICE)
             for _ in range(1 + min(64, int(2 * L2_BYTES // nbytes) + 1))]  # fmt: skip
    turn = iter(range(1 << 60))

    def copy(*_: Any) -> None:
        pair = pairs[next(turn) % len(pairs)]
        pair[0].copy_(pair[1])

    return copy


def measure(bench: Bench, results: Results, repeat: int) -> None:
    wrong = bench.check(*bench.make())
    if not wrong < bench.bound:
        raise ArithmeticError(f"wrong by {wrong}")
    copies = copies_of(bench)
    calls = [lambda a=a: bench.run(*a) for a in copies]
    seconds = seconds_of if bench.captured else eager_seconds
    taken, more = seconds(calls, repeat), {}
    rivals = {
        name: 1e6 * seconds([lambda a=a, r=rival: r(*a) for a in copies], repeat)
        for name, rival in bench.rivals.items()
    }
    peak = rates(results.device)
    if peak:
        floor = max(bench.bytes / peak[0], bench.flops / peak[1])
        more = {"floor_us": 1e6 * floor, "share": floor / taken}
    if DEVICE == "cuda" and not bench.captured:
        alone = kernel_seconds(calls)
        more |= {"kernel_us": 1e6 * alone, "kernel_gb_s": bench.bytes / alone / 1e9}
        more |= {"kernel_share": floor / alone} if peak else {}
    results.add(
        bench.op, bench.case, us=1e6 * taken, gb_s=bench.bytes / taken / 1e9,
        tflop_s=bench.flops / taken / 1e12, error=wrong, rivals=rivals,
        ratio={name: us / (1e6 * taken) for name, us in rivals.items()}, **more,
    )  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------


def norms(T: int) -> Iterator[Bench]:
    weight = rand(HIDDEN, dtype=torch.float32)
    nbytes = T * HIDDEN * (2 + 2 + 4 + 4)

    def check(x, residual):
        y, r = ops.rms_norm(x, weight, eps=1e-5, residual=residual)
        total = residual.double() + x.double()
        return error(y, F.rms_norm(total, (HIDDEN,), weight.double(), 1e-5))

    yield Bench(
        "rms_norm", {"T": T, "D": HIDDEN, "residual": "f32", "dtype": "bf16"},
        lambda: (rand(T, HIDDEN), rand(T, HIDDEN, dtype=torch.float32)),
        lambda x, r: ops.rms_norm(x, weight, eps=1e-5, residual=r), check, nbytes, 5 * T * HIDDEN,
        {"copy": copy_of(nbytes)},
    )  # fmt: skip
    w = rand(HEAD, dtype=torch.float32)
    shape, n = (T, HEADS, HEAD), T * HEADS * HEAD

    def check_gated(x, z):
        want = F.rms_norm(x.double(), (HEAD,), w.double(), 1e-5) * z.double().sigmoid()
        return error(ops.gated_rms_norm(x, z, w), want)

    yield Bench(
        "gated_rms_norm", {"T": T, "H": HEADS, "D": HEAD, "dtype": "bf16"},
        lambda: (rand(*shape), rand(*shape)), lambda x, z: ops.gated_rms_norm(x, z, w),
        check_gated, 6 * n, 8 * n, {"copy": copy_of(6 * n)},
    )  # fmt: skip


def short_conv(T: int) -> Iterator[Bench]:
    C = 3 * HEADS * HEAD
    weight, n = rand(C, 4, dtype=torch.float32), T * C

    def check(x, cu):
        padded = F.pad(x.double().T, (3, 0))
        want = F.silu(F.conv1d(padded[None], weight.double()[:, None], groups=C))[0].T
        return error(ops.short_conv(x, weight, cu_seqlens=cu)[0], want)

    yield Bench(
        "short_conv", {"T": T, "N": 1, "C": C, "W": 4, "dtype": "bf16"},
        lambda: (rand(T, C), torch.tensor([0, T], dtype=torch.int32, device=DEVICE)),
        lambda x, cu: ops.short_conv(x, weight, cu_seqlens=cu), check, 4 * n, 12 * n,
        {"copy": copy_of(4 * n)},
    )  # fmt: skip


# ---- products --------------------------------------------------------------------------------

SHAPES = {"kda q, k, v": (3 * HEADS * HEAD, HIDDEN), "o": (HIDDEN, HEADS * HEAD)}
MAX_OUTPUT = 1 << 27  # values; a prompt's rows are never all multiplied with the lm_head
BYTES = {"bf16": 2, "int8": 1 + 2 / 64, "fp8": 1 + 2 / 64, "int4": 0.5 + 2 / 32}


def linear(T: int, formats: tuple[str, ...], vocabulary: int) -> Iterator[Bench]:
    for name, (O, K) in (SHAPES | {"lm_head": (vocabulary, HIDDEN)}).items():
        for format in formats if T * O < MAX_OUTPUT else ():
            nbytes = 2 * T * (K + O) + O * K * BYTES[format]

            def make(O=O, K=K, format=format):
                w = rand(O, K, scale=K**-0.5)
                packed = w if format == "bf16" else ops.quantize(w, format)
                return rand(T, K), packed, w

            def check(x, packed, w, format=format):
                w = w[:CHECKED_ROWS]  # a row's groups are its own
                if format != "bf16":
                    w = torch.as_tensor(ops.quantize(w, format).dequantize(), device=DEVICE)
                got = ops.linear(x, packed)[:, :CHECKED_ROWS]
                return error(got, x.double() @ w.double().T)

            yield Bench(
                "linear", {"T": T, "O": O, "K": K, "which": name, "format": format},
                make, lambda x, packed, w: ops.linear(x, packed), check, nbytes, 2 * T * O * K,
                {"cublas bf16": lambda x, packed, w: x @ w.T},
            )  # fmt: skip


QMAX = {"int8": 127, "fp8": 448, "int4": 7}  # in groups of 64 columns, int4 of 32


def torch_quantize(w: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rounding in torch's own words: the packed values and their scales."""
    size, qmax = 32 if format == "int4" else 64, QMAX[format]
    groups = w.float().unflatten(-1, (-1, size))
    scales = (groups.abs().amax(-1, keepdim=True) / qmax).to(BF16)
    ratio = torch.where(scales > 0, groups / scales.float(), 0.0).clamp_(-qmax, qmax)
    if format == "fp8":
        return ratio.to(torch.float8_e4m3fn), scales
    q = ratio.round_().to(torch.int8)
    if format == "int4":  # the first half of a group in low nibbles
        low, high = (q.view(torch.uint8) + 8).split(size // 2, dim=-1)
        q = low | high << 4
    return q, scales


def quantize(which: str, shape: tuple[int, ...], formats: tuple[str, ...]) -> Iterator[Bench]:
    n = math.prod(shape)
    for format in formats:

        def check(w, format=format):
            """At both ends: a row's groups are its own."""
            rows = w.flatten(0, -2)
            rows = torch.cat([rows[:CHECKED_TOKENS], rows[-CHECKED_TOKENS:]])
            want = reference.quantize(rows.float().cpu().numpy(), format).dequantize()
            return error(ops.quantize(rows, format).dequantize(), want)

        nbytes = (2 + BYTES[format]) * n
        yield Bench(
            "quantize", {"which": which, "shape": list(shape), "dtype": "bf16", "format": format},
            lambda: (rand(*shape, scale=shape[-1] ** -0.5),),
            lambda w, format=format: ops.quantize(w, format), check, nbytes, 4 * n,
            {"torch": lambda w, format=format: torch_quantize(w, format)}, 1e-6, captured=False,
        )  # fmt: skip


def token_logprobs(T: int, vocabulary: int) -> Iterator[Bench]:
    nbytes = 2 * (vocabulary + T) * HIDDEN + 9 * T

    def plain(hidden, head, targets):
        z = (hidden @ head.T).float()
        return z.gather(1, targets.long()[:, None])[:, 0] - z.logsumexp(1)

    def check(hidden, head, targets):
        z = hidden[:64].double() @ head.double().T
        want = z.gather(1, targets[:64].long()[:, None])[:, 0] - z.logsumexp(1)
        return error(ops.token_logprobs(hidden, head, targets)[0][:64], want)

    yield Bench(
        "token_logprobs", {"T": T, "D": HIDDEN, "rows": vocabulary, "format": "bf16"},
        lambda: (rand(T, HIDDEN), rand(vocabulary, HIDDEN, scale=HIDDEN**-0.5),
                 torch.randint(0, vocabulary, (T,), dtype=torch.int32, device=DEVICE)),
        ops.token_logprobs, check, nbytes, 2 * T * vocabulary * HIDDEN,
        {"cublas and logsumexp": plain},
    )  # fmt: skip


def moe_route(T: int, experts: int) -> Iterator[Bench]:
    nbytes = T * experts * 4 + T * TOP * 8
    bias = rand(experts, scale=0.1, dtype=torch.float32)

    def check(logits):
        ids, weights = ops.moe_route(logits, bias, top_k=TOP, scaling=2.446)
        s = logits.double().sigmoid()
        best = (s + bias.double()).topk(TOP).indices
        want = s.gather(1, best)
        want = 2.446 * want / want.sum(1, keepdim=True)
        return error(weights.sort(1).values, want.sort(1).values)

    yield Bench(
        "moe_route", {"T": T, "E": experts, "top_k": TOP},
        lambda: (rand(T, experts, dtype=torch.float32),),
        lambda z: ops.moe_route(z, bias, top_k=TOP, scaling=2.446), check, nbytes,
        10 * T * experts, {"copy": copy_of(nbytes)}, 1e-5,
    )  # fmt: skip


def moe_experts(T: int, experts: int, formats: tuple[str, ...]) -> Iterator[Bench]:
    shape = (experts, INNER, HIDDEN)
    w1, w3 = (rand(*shape, scale=HIDDEN**-0.5) for _ in range(2))
    w2 = rand(experts, HIDDEN, INNER, scale=INNER**-0.5)
    used = min(experts, T * TOP)
    rows = -(-T * TOP // used)
    balanced = used < experts or T * TOP % experts == 0

    def make():
        """As the floor has it: no expert is read in vain, and none by two calls in a row."""
        ids = torch.stack([torch.randperm(experts)[:TOP] for _ in range(1 if balanced else T)])
        if balanced:
            first = int(torch.randint(experts, ()))
            ids = ((torch.arange(T * TOP) * 5 + first) % experts).view(T, TOP)
        return rand(T, HIDDEN), ids.int().to(DEVICE), rand(T, TOP, dtype=torch.float32).abs()

    def bmm(x, ids, weights):
        """The routed products alone, every expert with as many rows."""
        part = x.repeat(-(-rows * used // T), 1)[: rows * used].view(used, rows, HIDDEN)
        a, b = (torch.bmm(part, w[:used].mT) for w in (w1, w3))
        return torch.bmm(F.silu(a) * b, w2[:used].mT)

    for format in formats:
        yield one_format_of_experts(T, (w1, w3, w2), format, make, {"bmm bf16, balanced": bmm})


def one_format_of_experts(T, stacks, format, make, rivals) -> Bench:
    experts = len(stacks[0])
    packed = [w if format == "bf16" else ops.quantize(w, format) for w in stacks]
    shared = [w[0].clone() if format == "bf16" else ops.quantize(w[0], format) for w in stacks]

    def seen(w):
        """A matrix as its format has it."""
        if format != "bf16":
            w = torch.as_tensor(ops.quantize(w, format).dequantize(), device=DEVICE)
        return w.double()

    def one(x, e):
        a, b, c = (seen(w[e]) for w in stacks)
        return F.silu(x @ a.T) * (x @ b.T) @ c.T

    def check(x, ids, weights):
        n = min(T, 4)
        got = ops.moe_experts(x, ids, weights, *packed, shared=tuple(shared))[:n]
        want = []
        for t in range(n):
            each = torch.stack([one(x[t].double(), e) for e in ids[t].tolist()])
            want.append((each * weights[t].double()[:, None]).sum(0) + one(x[t].double(), 0))
        return error(got, torch.stack(want))

    used = min(experts, T * TOP)
    nbytes = (used + 1) * 3 * INNER * HIDDEN * BYTES[format] + 4 * T * HIDDEN
    return Bench(
        "moe_experts", {"T": T, "E": experts, "top_k": TOP, "I": INNER, "format": format},
        make, lambda x, ids, w: ops.moe_experts(x, ids, w, *packed, shared=tuple(shared)), check,
        nbytes, 6 * T * (TOP + 1) * INNER * HIDDEN, rivals,
    )  # fmt: skip


# ---- mixers ----------------------------------------------------------------------------------


def kda_decode(N: int) -> Iterator[Bench]:
    gate = dict(gate="softplus", normalize=True, beta_logits=True,
                A_log=torch.rand(HEADS, device=DEVICE) * 2.7,
                dt_bias=-7 + 5 * torch.rand(HEADS, HEAD, device=DEVICE))  # fmt: skip
    exact = {n: x.double().cpu().numpy() if torch.is_tensor(x) else x for n, x in gate.items()}

    def make():
        q, k, v, g = (rand(N, HEADS, HEAD) for _ in range(4))
        return q, k, v, g, rand(N, HEADS), rand(N, HEADS, HEAD, HEAD, dtype=torch.float32)

    def check(*args):
        want = reference.kda_decode(*(t.double().cpu().numpy() for t in args), **exact)
        return error(ops.kda_decode(*args, **gate), want)

    nbytes = N * HEADS * (HEAD * (4 * 2 + 2) + 2 + 2 * 4 * HEAD * HEAD)
    yield Bench(
        "kda_decode", {"N": N, "H": HEADS, "K": HEAD, "V": HEAD, "gate": "softplus",
                       "fused": True, "dtype": "bf16"},
        make, lambda *a: ops.kda_decode(*a, **gate), check, nbytes, 7 * HEAD * HEAD * HEADS * N,
        {"copy": copy_of(nbytes)},
    )  # fmt: skip


def expanded(latent: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [H, T, nope+rope] and values [H, T, V] of latents."""
    kv = torch.einsum("tr,hcr->htc", latent[:, :RANK], w)
    rope = latent[None, :, RANK:].expand(HEADS, -1, -1)
    return torch.cat([kv[..., :NOPE], rope], -1), kv[..., NOPE:]


def mla_prefill(T: int) -> Iterator[Bench]:
    width = NOPE + ROPE
    w = rand(HEADS, NOPE + HEAD, RANK, scale=RANK**-0.5)

    def make():
        q, latent = rand(T, HEADS, width), rand(T, RANK + ROPE)
        k, v = expanded(latent, w)
        v = F.pad(v, (0, width - HEAD))  # flash attention wants one width
        return q, latent, q.transpose(0, 1)[None].contiguous(), k[None], v[None].contiguous()

    def check(q, latent, *_):
        n = min(T, CHECKED_TOKENS)
        k, v = expanded(latent[:n].double(), w.double())
        rows = q[:n].double().transpose(0, 1)
        want = F.scaled_dot_product_attention(rows, k, v, is_causal=True).transpose(0, 1)
        return error(ops.mla_prefill(q, latent, w)[:n], want)

    pairs = T * (T + 1) / 2
    flops = 2 * HEADS * (pairs * (width + HEAD) + T * RANK * (NOPE + HEAD))
    yield Bench(
        "mla_prefill", {"T": T, "past": 0, "H": HEADS, "dtype": "bf16"}, make,
        lambda q, latent, *_: ops.mla_prefill(q, latent, w), check,
        2 * T * (HEADS * (width + HEAD) + RANK + ROPE) + 2 * w.numel(), flops,
        {"sdpa": lambda q, c, *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)},
    )  # fmt: skip


def latent_rows(latents: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as pages have them, and what they hold, in float64."""
    rows = rand(LATENT_ROWS, RANK + ROPE)
    if latents == "bf16":
        return rows, rows.double()
    packed = reference.pack_latents(rows.float().cpu().numpy(), RANK)
    held = torch.as_tensor(reference.unpack_latents(packed, RANK, ROPE)).double()
    return torch.as_tensor(packed).to(DEVICE), held.to(DEVICE)


def mla_decode(N: int, context: int, latents: str) -> Iterator[Bench]:
    B, w_shape = -(-context // 64), (HEADS, NOPE + HEAD, RANK)
    rows, held = latent_rows(latents)
    drawn = torch.randint(0, len(rows), (N * B, 64), device=DEVICE)  # for every page
    table = torch.randperm(N * B, device=DEVICE).int().view(N, B)
    lengths = torch.full((N,), context, dtype=torch.int32, device=DEVICE)
    rope = None if latents == "bf16" else ROPE

    def check(q, pages, w):
        read = held[drawn[table[0].long()].flatten()[:context]]
        want = []
        for h in range(HEADS):  # keys of all heads of a million tokens would be 100 GB
            absorbed = q[0, h, :NOPE].double() @ w[h, :NOPE].double()
            scores = read @ torch.cat([absorbed, q[0, h, NOPE:].double()])
            shares = (scores / (NOPE + ROPE) ** 0.5).softmax(0)
            want.append(w[h, NOPE:].double() @ (shares @ read[:, :RANK]))
        got = ops.mla_decode(q, pages, table, lengths, w, rope=rope)
        return error(got[0], torch.stack(want))

    nbytes = N * context * rows[0].nbytes
    nbytes += 2 * (math.prod(w_shape) + N * HEADS * (NOPE + ROPE + HEAD))
    flops = 2 * N * HEADS * (context * (2 * RANK + ROPE) + RANK * (NOPE + HEAD))
    stored = {} if latents == "bf16" else {"latents": latents}
    yield Bench(
        "mla_decode", {"N": N, "context": context, "H": HEADS, "dtype": "bf16"} | stored,
        lambda: (rand(N, HEADS, NOPE + ROPE), rows[drawn], rand(*w_shape, scale=RANK**-0.5)),
        lambda q, pages, w: ops.mla_decode(q, pages, table, lengths, w, rope=rope), check,
        nbytes, flops, {"copy": copy_of(nbytes)},
    )  # fmt: skip


# ---- all -------------------------------------------------------------------------------------


def benches(small: bool) -> Iterator[tuple[str, Callable[[], Iterator[Bench]]]]:
    """(name, maker): made one after the other, so that memory holds one at a time."""
    formats = ("bf16", "int8", "int4", *(["fp8"] if DEVICE == "cuda" else []))
    few, many, rows = (2, 70, 500) if small else (1, 8192, VOCABULARY)
    for T in (few, many):
        yield "norm", lambda T=T: norms(T)
        yield "short_conv", lambda T=T: short_conv(T)
        yield "moe_route", lambda T=T: moe_route(T, 16 if small else EXPERTS)
    for T in (few, many) if small else (1, 8, 64, 256, 8192):
        yield "moe_experts", lambda T=T: moe_experts(T, 16 if small else EXPERTS, formats)
    for T in (few, many) if small else (1, 8, 64, 8192):
        yield "linear", lambda T=T: linear(T, formats, rows)
    stack = (2 if small else EXPERTS, INNER, HIDDEN)
    for which, shape in (SHAPES | {"lm_head": (rows, HIDDEN), "experts' w1": stack}).items():
        yield "quantize", lambda w=which, s=shape: quantize(w, s, formats[1:])
    yield "token_logprobs", lambda: token_logprobs(many // 4, rows)
    for N in (few,) if small else (1, 32):
        yield "kda_decode", lambda N=N: kda_decode(N)
    yield "mla_prefill", lambda: mla_prefill(many)
    for latents, cases in (("bf16", DECODED), ("fp8", DECODED_8BIT)):
        for N, context in ((few, many),) if small else cases:
            yield "mla_decode", lambda N=N, c=context, kept=latents: mla_decode(N, c, kept)


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small sizes, few repetitions")
    parser.add_argument("--only", default="", help="operations by a part of their name, commas")
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.small:
        sys.exit("bench_ops.py needs a CUDA device; --small shows without one that it works")
    results, start, failed = Results(options, DEVICE), time.perf_counter(), False
    for name, make in benches(options.small):
        if not any(part in name for part in options.only.split(",")):
            continue
        for bench in make():
            try:
                measure(bench, results, 3 if options.small else 20)
            except (ArithmeticError, RuntimeError, ValueError) as e:  # the others are worth having
                failed = True
                print(f"# {bench.op} {bench.case}: {type(e).__name__}: {e}", file=sys.stderr)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        print(f"# {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
