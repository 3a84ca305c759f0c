"""kda_decode on a CUDA device, through torch tensors; skipped where there is none."""

import numpy as np
import pytest
import torch

import kimi_linear as kl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [  # N, Hk, H, K, V
    (1, 32, 32, 128, 128),
    (5, 4, 4, 128, 64),
    (3, 2, 6, 60, 33),
    (2, 1, 1, 256, 7),
    (33, 3, 3, 17, 128),
]


def case(shape, seed=0):
    N, Hk, H, K, V = shape
    r = np.random.default_rng(seed)
    return {
        "q": r.standard_normal((N, Hk, K)),
        "k": r.standard_normal((N, Hk, K)),
        "v": r.standard_normal((N, H, V)),
        "g": r.standard_normal((N, H, K)),
        "beta": r.standard_normal((N, H)),
        "A_log": np.log(r.uniform(1, 16, H)),
        "dt_bias": r.uniform(-6, -2, (H, K)),
    }


def on_device(arrays, dtype):
    act = {"q", "k", "v"}
    return {
        n: torch.tensor(x, dtype=dtype if n in act else torch.float32, device="cuda")
        for n, x in arrays.items()
    }


def relative(got, want):
    return np.linalg.norm(got.double().cpu().numpy() - want) / np.linalg.norm(want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["direct", "softplus", "bounded"])
def test_against_the_reference(shape, dtype, gate):
    N, _, H, K, V = shape
    arrays = case(shape)
    if gate == "direct":
        arrays["g"] = -np.abs(arrays["g"])
        del arrays["A_log"], arrays["dt_bias"]
    device = on_device(arrays, dtype)
    exact = {n: t.double().cpu().numpy() for n, t in device.items()}
    slots = np.random.default_rng(1).permutation(N + 2)[:N].astype(np.int32)
    start = np.random.default_rng(2).standard_normal((N + 2, H, V, K)).astype(np.float32)
    options = dict(gate=gate, normalize=True, beta_logits=True)

    state = torch.tensor(start, device="cuda")
    unused = sorted(set(range(N + 2)) - set(slots.tolist()))
    state[unused] = torch.nan
    out = torch.full((N, H, V), torch.nan, dtype=dtype, device="cuda")
    got = kl.ops.kda_decode(
        **device, state=state, slots=torch.tensor(slots, device="cuda"), out=out, **options
    )
    want_state = start.astype(np.float64)
    want = kl.reference.kda_decode(**exact, state=want_state, slots=slots, **options)

    assert got is out
    bound = 1e-6 if dtype == torch.float32 else 4e-3  # float32 arithmetic; one rounding to bf16
    assert relative(got, want) < bound
    used = slots.tolist()
    assert relative(state[used], want_state[used]) < 1e-6
    assert torch.isnan(state[unused]).all()


def test_runs_on_the_current_stream_and_in_a_graph():
    device = on_device(case(SHAPES[0]), torch.float32)
    state = torch.zeros(1, 32, 128, 128, device="cuda")
    out = torch.empty(1, 32, 128, device="cuda")

    def step():
        kl.ops.kda_decode(**device, state=state, out=out, gate="softplus", normalize=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    once = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    state.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, once)


def test_operations_that_cuda_lacks_say_so():
    x = torch.ones(2, 8, device="cuda")
    with pytest.raises(kl.DeviceError, match="cuda backend does not have it"):
        kl.ops.linear(x, torch.ones(4, 8, device="cuda"))
