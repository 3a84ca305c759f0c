"""KDA: cost a token from 1K to 64K tokens, and how near it comes to the machine.

    python benchmarks/bench_kda.py                          # the CPU: about two minutes
    python benchmarks/bench_kda.py --device cuda            # a GPU: kda_cuda.py, a minute and FLA's
    python benchmarks/bench_kda.py --device cuda --quick    # its most important cases, < 25 s
    python benchmarks/bench_kda.py --small                  # seconds, to see that it works

On the CPU prefill is bound by the FMA units: its floor is 3 K V multiply-adds a token and head at the rate
of `fma_peak.c` on as many cores, timed beside it. Decode is bound by memory: its floor is the
states, read and written, at the rate of a plain read. The gate, the norms of q and k and the
sigmoid of beta are part of the call where `fused` is true. Results are checked against the
float64 recurrence before anything is timed.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kimi_linear as kl
import numpy as np
from common import HERE, PlainRead, Results, arguments
from kimi_linear import reference
from kimi_linear._backends import backend

sys.path.append(str(HERE.parent / "tests"))
from profiles import make_case  # the gate profiles that the tests check
from variants import error

K = V = 128
PROFILES = ("init", "bounded", "mixed", "slow", "strong")
BY_TOKEN = ("q", "k", "v", "g", "beta")
CHECKED_TOKENS = 300


class FmaPeak:
    """A call returns what `threads` cores do, in flops a second."""

    def __init__(self, threads: int) -> None:
        self.threads, self.pool = threads, ThreadPoolExecutor(threads)
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "fma_peak.so"
            flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
            subprocess.run(["cc", *flags, "-o", library, HERE / "fma_peak.c"], check=True)
            self.peak = ctypes.CDLL(str(library)).fma_peak
        self.peak.restype = ctypes.c_double
        self.peak.argtypes = [ctypes.c_int64, ctypes.c_void_p]

    def __call__(self) -> float:
        return sum(self.pool.map(self.core, range(self.threads)))

    def core(self, _: int) -> float:
        """The best of a few short runs: long ones would time what else the machine does."""
        sink, rates = ctypes.c_float(), []
        for _ in range(20):
            start = time.perf_counter()
            done = self.peak(20_000, ctypes.byref(sink))
            rates.append(done / (time.perf_counter() - start))
        return max(rates)


def options_of(case: dict) -> dict:
    """Fused where the profile's gate is: then q, k and beta are raw as well."""
    raw = case.get("gate", "direct") != "direct"
    return {"normalize": raw, "beta_logits": raw}


def check(profile: str, T: int, H: int) -> dict[str, float]:
    """Errors of a short call of the same kind."""
    case = make_case(profile, min(T, CHECKED_TOKENS), H=H, K=K, V=V)
    options = options_of(case)
    want, want_state = reference.kda_prefill(**case, **options)
    o, state = kl.ops.kda_prefill(**case, **options)
    errors = {"o": error(o, want), "state": error(state, want_state)}
    if not max(errors.values()) < 1e-5:
        sys.exit(f"{profile}, {T} tokens: wrong by {errors}")
    return errors


def measure(fn, limit, repeat: int) -> tuple[float, float]:
    """Median seconds of a call and the best of the machine's limit, taken in turns. The best, for
    a limit that another process disturbed would flatter us."""
    fn()
    times, limits = [], []
    for _ in range(repeat):
        limits.append(limit())
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return statistics.median(times), max(limits)


def prefill(results: Results, profile: str, T: int, H: int, threads: int, repeat: int) -> float:
    """Microseconds a token and head of one sequence."""
    case = make_case(profile, T, H=H, K=K, V=V)
    options = options_of(case)
    out, state = np.empty_like(case["v"]), np.empty_like(case["initial_state"])
    with backend(threads=threads) as be:
        errors = check(profile, T, H)
        seconds, peak = measure(
            lambda: kl.ops.kda_prefill(**case, **options, out=out, final_state=state),
            FmaPeak(threads),
            repeat,
        )
        variant = be.info()["variant"]
    flops = 6.0 * K * V * T * H
    results.add(
        "kda_prefill",
        {"T": T, "N": 1, "H": H, "K": K, "V": V, "gate": case.get("gate", "direct"),
         "profile": profile, "fused": options["normalize"], "dtype": "f32", "cpu": variant,
         "threads": threads},
        us=seconds * 1e6, floor_us=flops / peak * 1e6, share=flops / peak / seconds,
        us_per_token_head=seconds * 1e6 / T / H, gflops=flops / seconds / 1e9,
        peak_gflops=peak / 1e9, error=errors,
    )  # fmt: skip
    return seconds * 1e6 / T / H


def decode(results: Results, N: int, H: int, threads: int, repeat: int) -> None:
    case = make_case("init", N, H=H, K=K, V=V, N=N)
    options, state = options_of(case), case.pop("initial_state")
    before, out = state.astype(np.float64), np.empty_like(case["v"])
    want = reference.kda_decode(**case, **options, state=before)
    with backend(threads=threads) as be:
        o = kl.ops.kda_decode(**case, **options, state=state, out=out)
        errors = {"o": error(o, want), "state": error(state, before)}
        if not max(errors.values()) < 1e-5:
            sys.exit(f"decode of {N}: wrong by {errors}")
        seconds, rate = measure(
            lambda: kl.ops.kda_decode(**case, **options, state=state, out=out),
            PlainRead(1 << 28, threads),
            repeat,
        )
        variant = be.info()["variant"]
    nbytes = 2 * state.nbytes
    results.add(
        "kda_decode",
        {"N": N, "H": H, "K": K, "V": V, "gate": "softplus", "profile": "init", "fused": True,
         "dtype": "f32", "cpu": variant, "threads": threads},
        us=seconds * 1e6, floor_us=nbytes / rate * 1e6, share=nbytes / rate / seconds,
        gb_s=nbytes / seconds / 1e9, error=errors,
    )  # fmt: skip


def cuda_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("with --device cuda").add_argument
    add("--quick", action="store_true", help="the most important cases, < 25 s")
    add("--only", default="", help="cases by a part of their name, commas; =NAME for just that")
    add("--repeat", type=int, default=20, help="replays of a graph")
    add("--fla", help="cases to time flash-linear-attention on, where it is installed: its first "
        "call takes over a minute (default 8192,8192-init; none with --quick)")  # fmt: skip
    add("--fla-seconds", type=float, default=150, help="the longest that such a call may take")
    add("--fla-errors", action="store_true", help="its errors, too, on this device")
    add("--cudnn", default="", help="plans of cuDNN-frontend to time, commas: kda_hopper, "
        "kda_hopper_cuda")  # fmt: skip


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small sizes, few repetitions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    cuda_arguments(parser)
    options = parser.parse_args()
    if options.device == "cuda":
        import kda_cuda

        return kda_cuda.main(options)
    results = Results(options)
    lengths = [64, 256] if options.small else [2**i for i in range(10, 17)]
    repeat = 1 if options.small else 9
    costs = [prefill(results, "init", T, 2, 1, repeat) for T in lengths]
    for profile in PROFILES:
        prefill(results, profile, lengths[0] * 4, 4, 1, repeat)
    cores = len(os.sched_getaffinity(0))
    prefill(results, "init", lengths[0], 32, cores, repeat)
    decode(results, 2 if options.small else 32, 32, cores, repeat)
    print(f"us a token and head over {lengths} tokens: {', '.join(f'{c:.3f}' for c in costs)}")


if __name__ == "__main__":
    main()
