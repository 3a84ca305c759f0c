"""Matrix products on this CPU, as a share of what the machine can do.

    python benchmarks/bench_cpu_linear.py            about two minutes
    python benchmarks/bench_cpu_linear.py --small    a smoke run of seconds
    python benchmarks/bench_cpu_linear.py --variant avx2

Prefill is held against multiply-adds on registers (fma_peak.c; pairs of bfloat16 where a CPU has
an instruction for them), decode against a plain read of the same bytes (plain_read.c), both with
as many threads. The two take turns and the fastest of each counts: other programs only ever make
a run slower. Writes results/linear.jsonl.
"""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
from common import PlainRead, Results, arguments, compile_c

import kimi_linear as kl
from kimi_linear._backends import backend

PREFILL = ((512, 1024, 2304), (512, 2304, 1024), (512, 2304, 4096))  # T, K, O
FORMATS = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "int8": ml_dtypes.bfloat16,
           "int4": ml_dtypes.bfloat16}  # fmt: skip  activations beside each weight format
BITS = {"f32": 32, "bf16": 16, "int8": 8 + 16 / 64, "int4": 4 + 16 / 32}  # with scales


class Peak:
    """Multiply-adds a second with operands in registers, all threads together."""

    def __init__(self, threads: int) -> None:
        library = compile_c("fma_peak")
        self.loops = {"f32": library.fma_peak, "bf16": library.bf16_peak}
        for loop in self.loops.values():
            loop.argtypes, loop.restype = [ctypes.c_int64, ctypes.c_void_p], ctypes.c_double
        self.threads, self.pool = threads, ThreadPoolExecutor(threads)

    def __call__(self, kind: str) -> float:
        def run(_: int) -> float:
            return self.loops[kind](400_000, ctypes.byref(ctypes.c_float()))

        start = time.perf_counter()
        flops = sum(self.pool.map(run, range(self.threads)))
        return flops / (time.perf_counter() - start)


def best(rounds: int, *measure: Callable[[], float]) -> list[float]:
    """The largest rate of each measurement; they take turns."""
    rates = [[m() for m in measure] for _ in range(rounds)]
    return [max(r[i] for r in rates) for i in range(len(measure))]


def make(T: int, K: int, O: int, format: str):
    """x, w and out; w repeats a block of random rows, which is quicker to make."""
    r = np.random.default_rng(0)
    rows = r.standard_normal((min(O, 1000), K), np.float32) / np.float32(K**0.5)
    w = kl.ops.quantize(np.resize(rows, (O, K)), format)
    x = r.standard_normal((T, K), np.float32).astype(FORMATS[format])
    return x, w, np.empty((T, O), x.dtype)


def check(x, w, out) -> None:
    """A wrong product has no speed."""
    kl.ops.linear(x, w, out=out)
    columns = slice(0, min(w.shape[0], 1000))
    rows = np.unique(np.linspace(0, len(x) - 1, 8).astype(int))
    dense = w.dequantize()[columns].astype(np.float64)
    want = x[rows].astype(np.float64) @ dense.T
    error = np.linalg.norm(out[rows][:, columns].astype(np.float64) - want)
    limit = 4e-3 if out.dtype != np.float32 else 1e-5
    assert error < limit * np.linalg.norm(want), f"linear is wrong by {error}"


def rate(amount: float, x, w, out) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        kl.ops.linear(x, w, out=out)
        return amount / (time.perf_counter() - start)

    return measure


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a smoke run")
    parser.add_argument("--variant", help="scalar, avx2, avx512 or avx512bf16; the widest")
    parser.add_argument("--threads", type=int, default=0, help="all")
    options = parser.parse_args()
    results = Results(options)
    rounds, megabytes = (3, 8) if options.small else (25, 96)
    with backend(threads=options.threads, cpu=options.variant) as be:
        info = be.info()
        threads, variant = info["threads"], info["variant"]
        peak, read = Peak(threads), PlainRead(megabytes << 20, threads)
        for T, K, O in [(64, 256, 512)] if options.small else PREFILL:
            for format in FORMATS:
                x, w, out = make(T, K, O, format)
                check(x, w, out)
                kind = "bf16" if (format, variant) == ("bf16", "avx512bf16") else "f32"
                flops = 2.0 * T * K * O
                ours, most = best(rounds, rate(flops, x, w, out), lambda k=kind: peak(k))
                case = {"T": T, "K": K, "O": O, "format": format, "variant": variant}
                results.add("linear", case | {"threads": threads}, us=1e6 * flops / ours,
                            gflops=ours / 1e9, peak_gflops=most / 1e9, share=ours / most)
        for format in FORMATS:
            K = 2304
            O = int(megabytes * 2**23 / BITS[format]) // K
            x, w, out = make(1, K, O, format)
            check(x, w, out)
            ours, most = best(rounds, rate(w.nbytes, x, w, out), read)
            case = {"T": 1, "K": K, "O": O, "format": format, "variant": variant}
            results.add("linear", case | {"threads": threads}, us=1e6 * w.nbytes / ours,
                        gbs=ours / 1e9, read_gbs=most / 1e9, share=ours / most)


if __name__ == "__main__":
    main()
