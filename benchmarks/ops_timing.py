"""Seconds of calls on a GPU (and, to see that a benchmark works, on a CPU), for bench_ops.py and
kda_cuda.py."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_step import traced

L2_BYTES = 50 << 20
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Calls = list[Callable[[], Any]]


def run_all(calls: Calls) -> None:
    for call in calls:
        call()


def host_seconds(calls: Calls) -> float:
    start = time.perf_counter()
    run_all(calls)
    return (time.perf_counter() - start) / len(calls)


def device_seconds(run: Callable[[], Any], repeat: int) -> float:
    """Median, from one event on the device to another."""
    times = []
    for _ in range(repeat + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def seconds_of(calls: Calls, repeat: int) -> float:
    """Median seconds of one of these calls, run one after the other, out of a graph of all."""
    run_all(calls)
    if DEVICE == "cpu":
        return host_seconds(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # ids and targets must be there
    with torch.cuda.stream(side):
        run_all(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all(calls)
    return device_seconds(graph.replay, repeat) / len(calls)


def eager_seconds(calls: Calls, repeat: int) -> float:
    """The same of calls that cannot be captured, the time of the host with it."""
    if DEVICE == "cpu":
        run_all(calls)
        return host_seconds(calls)
    return device_seconds(lambda: run_all(calls), repeat) / len(calls)


def kernel_seconds(calls: Calls) -> float:
    """Seconds that the kernels of one of these calls run, by PyTorch's profiler."""
    trace = traced(lambda: (run_all(calls), torch.cuda.synchronize()))
    found = [e["dur"] for e in trace if e.get("cat") == "kernel"]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return sum(found) / 1e6 / len(calls)
