"""Every operation on a GPU runs in the order of the caller's current stream, can be captured in
the caller's CUDA graph, and leaves the current device as it was. No operation may be lacking.
"""

import functools

import pytest

torch = pytest.importorskip("torch")

from kimi_linear import _backends, ops  # noqa: E402
from torch_cases import GPU_CASES, case_on, cloned, mapped  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CYCLES = 20_000_000  # about 10 ms, in which whoever does not wait has read too early


@functools.cache
def invariant():
    return _backends.open_backend("cuda", batch_invariant=True)


def results(case):
    """What a call gives and what it leaves in its arguments, as a flat list."""
    name, args, options = case
    got = getattr(ops, name)(*args, **options)
    flat = []
    mapped([got, args, options], lambda t: flat.append(t) or t)
    return flat


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def poison(case):
    mapped(list(case[1:]), lambda t: t.fill_(torch.nan) if t.is_floating_point() else t)


def refill(case, source):
    pairs = []
    mapped(list(case[1:]), lambda t: pairs.append([t]) or t)
    places = iter(pairs)
    mapped(list(source[1:]), lambda t: next(places).append(t) or t)
    for to, of in pairs:
        to.copy_(of)


@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("mode", ["default", "invariant"])
def test_twice_the_same_bits(name, mode, monkeypatch):
    if mode == "invariant":
        monkeypatch.setitem(_backends._opened, ("cuda", 0), invariant())
    assert_same(results(case_on(name, "cuda")), results(case_on(name, "cuda")))


@pytest.mark.parametrize("name", GPU_CASES)
def test_in_the_order_of_the_current_stream(name):
    """The arguments are NaN until a stream that is held up fills them in."""
    want = results(case_on(name, "cuda"))
    case, source = case_on(name, "cuda"), case_on(name, "cuda")
    poison(case)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        refill(case, source)
        got = [t.clone() for t in results(case)]
        poison(case)
    side.synchronize()
    assert_same(got, want)


@pytest.mark.parametrize("name", GPU_CASES)
def test_in_a_graph(name):
    want = results(case_on(name, "cuda"))
    case, source = case_on(name, "cuda"), case_on(name, "cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        results(cloned(list(case)))  # what is opened at the first call is not captured
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = results(case)
    for _ in range(2):
        poison(case)
        for t in got:
            t.fill_(torch.nan) if t.is_floating_point() else t
        refill(case, source)
        graph.replay()
        assert_same([t.clone() for t in got], want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", GPU_CASES)
def test_on_a_device_that_is_not_current(name):
    want = results(case_on(name, "cuda:0"))
    got = results(case_on(name, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(t.device.index == 1 for t in got)
    assert_same([t.cpu() for t in got], [t.cpu() for t in want])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_an_operation_has_just_made(dtype):
    """Kernels read weights ahead of their turn, but not an array that the one before writes."""
    r = torch.Generator(device="cuda").manual_seed(3)
    raw = torch.randn(2048, 2048, device="cuda", generator=r).to(dtype)
    x = torch.randn(1, 2048, device="cuda", generator=r).bfloat16()
    ones = torch.ones(2048, device="cuda")
    made = ops.rms_norm(raw, ones, eps=1e-5)
    torch.cuda.synchronize()
    want = ops.linear(x, made)
    for scale in (2.0, 0.5) * 10:
        weight = torch.full_like(ones, scale)
        ops.rms_norm(raw, weight, eps=1e-5, out=made)
        assert_same(ops.linear(x, made), want * scale)


def test_the_stream_can_be_named():
    """An integer stream counts, whatever the current one is."""
    source = torch.randn(64, 64, device="cuda")
    x, w = torch.full_like(source, torch.nan), torch.eye(64, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        x.copy_(source)
    y = ops.linear(x, w, stream=side.cuda_stream)
    side.synchronize()
    assert_same(y, source)
