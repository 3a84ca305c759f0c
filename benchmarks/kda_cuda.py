"""KDA prefill on a GPU: bench_kda.py --device cuda.

A case is a list of lengths, a number of heads and a gate. "raw" is the call of the model: q, k and
v are slices of one matrix, and norms, gate and sigmoid belong to the call; the others give the
log-decay, by a profile. Every case is first compared with the float64 truth, at heads and
sequences at both ends. Calls are captured in a graph of ten or more on inputs that do not fit the
L2 together, states in place; the figure is the median of its replays.

floor_us: 1,282 bytes a token and head (q, k, v, gate, output in bf16, beta) at the bandwidth that
was measured on this device. bytes_us: everything that this call must move, so float32 gates and
the states, too.
"""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Results, rates
from kda_fused import fused
from kda_truth import (
    BF16,
    Inputs,
    K,
    V,
    direct_inputs,
    published_inputs,
    raw_inputs,
    relative,
    truth,
    weak_inputs,
)
from kimi_linear import ops
from ops_timing import DEVICE, L2_BYTES, eager_seconds, seconds_of
from profiles import PUBLISHED, Published

TOKEN_BYTES = 5 * 2 * K + 2
CALLS = 10  # of a graph
BOUND = 6e-3  # of what is timed; no profile of flash-linear-attention is further off than 5e-3
PROFILES = ("init", "bounded", "mixed", "slow", "strong")
# flash-linear-attention 0.6.0, T = 1024, H = 8, an H100: relative RMS of output and final state.
PEERS = {"init": (4.2e-3, 3.6e-3), "bounded": (3.3e-3, 2.3e-3), "mixed": (4.5e-3, 3.7e-3),
         "slow": (5.0e-3, 4.3e-3), "strong": (2.9e-3, 1.6e-3)}  # fmt: skip
ALLOWED = 5e-3  # by its tests of the cases that it publishes
Rival = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class Case:
    """name is what --only and --fla choose by."""

    name: str
    lengths: list[int]
    H: int = 32
    profile: str = "raw"
    g_dtype: torch.dtype = BF16

    def make(self) -> Inputs:
        if self.profile == "raw":
            return raw_inputs(self.lengths, self.H, DEVICE, g_dtype=self.g_dtype)
        return direct_inputs(self.profile, self.lengths, self.H, DEVICE)

    def describe(self, x: Inputs) -> dict[str, Any]:
        return {
            "T": sum(self.lengths), "N": len(self.lengths), "H": self.H, "K": K, "V": V,
            "gate": x.options.get("gate", "direct"), "profile": self.profile,
            "fused": self.profile == "raw", "dtype": "bf16", "g": str(x.g.dtype)[6:],
        }  # fmt: skip

    @property
    def floor_bytes(self) -> int:
        return sum(self.lengths) * self.H * TOKEN_BYTES


def short_lengths(n: int) -> list[int]:
    """1 to 31 tokens, the same ones in every run."""
    return [1 + 7 * i % 31 for i in range(n)]


def cases(small: bool) -> list[Case]:
    if small:
        profiles = [Case(f"70-{p}", [70], 2, p) for p in PROFILES]
        return [Case("70", [70], 2), Case("2x35", [35] * 2, 2), *profiles]
    return [
        Case("8192", [8192]),
        Case("2048", [2048]),
        Case("8x1024", [1024] * 8),
        *(Case(f"8192-{p}", [8192], 32, p) for p in PROFILES),
        Case("32768", [32768]),
        Case("8192-h96", [8192], 96),
        Case("8192-h64", [8192], 64),
        Case("8192-f32", [8192], g_dtype=torch.float32),
        *(Case(f"32768-h{H}", [32768], H) for H in (4, 8, 16)),
        Case("4096-short", short_lengths(4096), 8),
    ]


def published_cases(small: bool) -> list[Published]:
    """With their own heads, and with the model's 128 channels where theirs have fewer."""
    every = [c._replace(K=width) for c in PUBLISHED for width in sorted({c.K, K})]
    return [c._replace(cu=tuple(at // 10 for at in c.cu)) for c in every] if small else every


QUICK = ("8192", "2048", "8x1024", *(f"8192-{p}" for p in PROFILES))


# ---- who computes it -------------------------------------------------------------------------


class Ours:
    """A call with its own output and its own states, which it updates in place."""

    def __init__(self, x: Inputs) -> None:
        self.x, (_, H, V), K = x, x.v.shape, x.k.shape[-1]
        self.out = torch.full_like(x.v, math.nan, memory_format=torch.contiguous_format)
        self.state = torch.zeros(len(x.cu) - 1, H, V, K, device=DEVICE)
        if x.state is not None:
            self.state.copy_(x.state)

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x
        return ops.kda_prefill(
            x.q, x.k, x.v, x.g, x.beta, cu_seqlens=x.cu, initial_state=self.state,
            final_state=self.state, out=self.out, **x.options,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        x = self.x
        return 2 * self.state.nbytes + sum(t.nbytes for t in (x.q, x.k, x.v, x.g, x.beta, x.v))


def fla(ragged: bool = False) -> Rival:
    """flash-linear-attention, sequences of one length as its batch, or ragged ones in a row.
    Raises ImportError."""
    from fla.ops.kda import chunk_kda

    def run(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        N, T = len(x.cu) - 1, len(x.v)
        batch = 1 if ragged else N
        raw = x.options.get("gate") == "softplus"
        more = {"cu_seqlens": x.cu.long()} if ragged else {}
        if x.state is not None:
            more["initial_state"] = x.state.mT.contiguous()
        if raw:
            bias = x.options["dt_bias"]
            more |= {"A_log": x.options["A_log"],
                     "dt_bias": None if bias is None else bias.flatten()}  # fmt: skip
        o, state = chunk_kda(
            *(t.view(batch, T // batch, *t.shape[1:]) for t in (x.q, x.k, x.v, x.g, x.beta)),
            scale=x.options.get("scale", K**-0.5), output_final_state=True,
            use_qk_l2norm_in_kernel=raw, use_gate_in_kernel=raw, use_beta_sigmoid_in_kernel=raw,
            **more,
        )  # fmt: skip
        return o.view(x.v.shape), state.mT

    return run


def cudnn(plan: str) -> Rival:
    """cuDNN-frontend, log-decays given. Its op cannot be captured. Raises ImportError."""
    from cudnn.linear_attention.ops import kimi_delta_attention

    def run(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        o, state = kimi_delta_attention(
            x.q, x.k, x.v, x.g, x.beta, x.cu, output_final_state=True, plan_name=plan
        )
        return o, state

    return run


@contextlib.contextmanager
def one_config() -> Iterator[None]:
    """Within the block Triton's kernels take the first of their configurations, without trying
    the others: for errors, which do not depend on it."""
    from triton.runtime.autotuner import Autotuner

    every = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, kwargs: every(self, kwargs)[:1]
    try:
        yield
    finally:
        Autotuner.prune_configs = every


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a block that takes longer, at the next line of Python."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def contiguous(x: Inputs) -> Inputs:
    """What peers would copy themselves in every call."""
    dense = {name: getattr(x, name).contiguous() for name in ("q", "k", "v")}
    return dataclasses.replace(x, **dense)


def rivals_of(case: Case, copies: list[Inputs], options: Namespace) -> dict[str, Any]:
    """Microseconds of each rival that this machine has, or why there are none."""
    found: dict[str, Any] = {}
    if case.name in options.fla.split(",") and len(set(case.lengths)) == 1:
        try:
            run, dense = fla(), [contiguous(x) for x in copies]
            with at_most(options.fla_seconds):  # it tries its kernels' configurations
                run(dense[0])
            found["fla"] = 1e6 * seconds_of([lambda x=x: run(x) for x in dense], options.repeat)
        except (ImportError, TimeoutError, RuntimeError) as e:
            print(f"# fla: {type(e).__name__}: {e}", file=sys.stderr)
    for plan in options.cudnn.split(",") if options.cudnn and case.profile != "raw" else ():
        try:
            run = cudnn(plan)
            run(copies[0])
            found[plan] = 1e6 * eager_seconds([lambda r=run: r(copies[0])], options.repeat)
        except Exception as e:
            print(f"# {plan}: {type(e).__name__}: {e}", file=sys.stderr)
    return found


# ---- what is measured ------------------------------------------------------------------------


def errors(x: Inputs, got: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """The worst relative RMS error of output and final state over heads and sequences at both
    ends. NaN where any element of the call is not finite."""
    o, state = got
    if not (o.isfinite().all() and state.isfinite().all()):
        return {"o": math.nan, "state": math.nan}
    N, H = len(x.cu) - 1, o.shape[1]
    heads, found = sorted({0, H - 1}), []
    for n in sorted({0, N - 1}):
        want, want_state = truth(x, n, heads)
        first, end = x.cu[n : n + 2].tolist()
        found.append(
            (relative(o[first:end, heads], want), relative(state[n, heads], want_state))
        )
    return {"o": max(f[0] for f in found), "state": max(f[1] for f in found)}


def time_case(case: Case, results: Results, options: Namespace) -> None:
    first = Ours(case.make())
    wrong = errors(first.x, first())
    if not max(wrong.values()) < BOUND:
        raise ArithmeticError(f"wrong by {wrong}")
    copies = 1 if options.small else max(1, 2 * L2_BYTES // first.nbytes)
    calls = [first, *(Ours(case.make()) for _ in range(copies))]
    taken = seconds_of(calls * -(-CALLS // len(calls)), options.repeat)
    rivals = rivals_of(case, [c.x for c in calls], options)
    T, peak = sum(case.lengths), rates(results.device)
    more = {}
    if peak:
        floor = case.floor_bytes / peak[0]
        more = {"floor_us": 1e6 * floor, "share": floor / taken,
                "bytes_us": 1e6 * first.nbytes / peak[0]}  # fmt: skip
    results.add(
        "kda_prefill", case.describe(first.x), us=1e6 * taken, **more,
        gb_s=first.nbytes / taken / 1e9, tflop_s=7 * K * V * case.H * T / taken / 1e12,
        error=wrong, rivals=rivals, ratio={n: us / (1e6 * taken) for n, us in rivals.items()},
    )  # fmt: skip


def accuracy(profile: str, results: Results, options: Namespace) -> None:
    """Errors of all heads in the setting of PEERS."""
    T, H = (70, 2) if options.small else (1024, 8)
    x = direct_inputs(profile, [T], H, DEVICE)
    want, want_state = truth(x, 0, list(range(H)))

    def off(got: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        return {"o": relative(got[0], want), "state": relative(got[1][0], want_state)}

    rivals = {}
    if options.fla_errors:
        with one_config():
            rivals["fla"] = off(fla()(x))
    ours, peer = off(Ours(x)()), dict(zip(("o", "state"), PEERS[profile], strict=True))
    results.add(
        "kda_error", {"T": T, "H": H, "profile": profile, "dtype": "bf16"}, **ours,
        published={"fla": peer}, rivals=rivals,
        within=all(ours[n] < peer[n] + 5e-5 for n in peer),  # two digits were published
    )  # fmt: skip


def published(case: Published, results: Results, options: Namespace) -> None:
    """A test case of flash-linear-attention: errors of all heads and sequences, each its worst, and
    with --fla-errors those of its kernels on the same inputs."""
    x = published_inputs(*case, DEVICE)
    want = [truth(x, n, list(range(case.H))) for n in range(len(case.cu) - 1)]

    def off(got: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
        o = relative(got[0], torch.cat([o for o, _ in want]))
        return {"o": o, "state": relative(got[1], torch.stack([state for _, state in want]))}

    ours, rivals, more, failed = off(Ours(x)()), {}, {}, ""
    if options.fla_errors:
        try:
            with one_config():
                rivals["fla"] = peer = off(fla(ragged=len(case.cu) > 2)(x))
            more = {"within": all(ours[n] <= peer[n] for n in peer)}
        except Exception as e:  # of its compiler, too; ours is worth having
            failed = f"fla: {type(e).__name__}: {e}"
    what = {"T": case.cu[-1], "N": len(case.cu) - 1, "H": case.H, "K": case.K, "V": case.K,
            "profile": "published", "scale": x.options["scale"], "divisor": case.divisor,
            "left_out": case.left_out, "dtype": "bf16"}  # fmt: skip
    results.add("kda_error", what, **ours, allowed=ALLOWED, rivals=rivals, **more)
    if not max(ours.values()) < ALLOWED:
        raise ArithmeticError(f"wrong by {ours}")
    if failed:
        raise RuntimeError(failed)


def long_run(name: str, x: Inputs, results: Results, options: Namespace) -> None:
    """What a million tokens of weak decay leave of the digits, and how long they take."""
    H = x.v.shape[1]
    call = Ours(x)
    wrong = errors(x, call())
    rivals = {}
    if options.fla_errors:
        with one_config():
            rivals["fla"] = errors(x, fla()(contiguous(x)))
    taken = seconds_of([call], 3)
    results.add(
        "kda_error", {"T": len(x.v), "H": H, "profile": name, "dtype": "bf16"}, **wrong,
        us=1e6 * taken, rivals=rivals,
    )  # fmt: skip


def recurrence(T: int) -> Ours:
    """As the fused operation has it."""
    return Ours(Case("", [T], g_dtype=torch.float32).make())


def jobs(options: Namespace, results: Results) -> Iterator[tuple[str, Callable[[], None]]]:
    """What there is to do, most important first."""
    everything = [c for c in cases(options.small) if not options.quick or c.name in QUICK]
    for case in everything[:1]:
        yield case.name, lambda c=case: time_case(c, results, options)
    if DEVICE == "cuda":
        T = 70 if options.small else 8192
        yield "fused", lambda: fused(T, recurrence(T), results, options.repeat)
    for profile in PROFILES:
        yield f"error-{profile}", lambda p=profile: accuracy(p, results, options)
    for case in everything[1:]:
        yield case.name, lambda c=case: time_case(c, results, options)
    if options.quick:
        return
    for i, case in enumerate(published_cases(options.small)):
        yield f"published-{i}", lambda c=case: published(c, results, options)
    T = 200 if options.small else 1 << 20
    for name, make in (("weak", lambda: weak_inputs(T, 2, DEVICE)),
                       ("slow", lambda: direct_inputs("slow", [T], 2, DEVICE))):  # fmt: skip
        yield f"long-{name}", lambda n=name, m=make: long_run(n, m(), results, options)


# ---- the command -----------------------------------------------------------------------------


def wanted(name: str, only: str) -> bool:
    return any(name == p[1:] if p.startswith("=") else p in name for p in only.split(","))


def main(options: Namespace) -> None:
    if DEVICE == "cpu" and not options.small:
        sys.exit("--device cuda needs a CUDA device; --small shows without one that it works")
    if options.fla is None:
        options.fla = "" if options.quick else "8192,8192-init"
    torch.manual_seed(0)
    results, start, failed = Results(options, DEVICE), time.perf_counter(), False
    for name, job in jobs(options, results):
        if not wanted(name, options.only):
            continue
        try:
            job()
        except (ArithmeticError, ImportError, RuntimeError, ValueError) as e:
            failed = True  # the others are worth having
            print(f"# {name}: {type(e).__name__}: {e}", file=sys.stderr)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        print(f"# {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    sys.exit(failed)
