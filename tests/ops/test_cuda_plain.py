"""CUDA without the kernels that are for sm_90a alone: what a device above 9.0 runs.

The shapes are those that such kernels take elsewhere; one that was launched all the same would end
in a trap. KIMI_LINEAR_GPU=sm_90 has every other test of operations run like this.
"""

import numpy as np
import pytest
from kimi_linear import _backends, reference
from mla_cases import SCALE, decode, make_case, prefill, tolerance, whole_latents
from on_cuda import has_cuda, torch
from products import BF16, CUDA_FORMATS, relative, weight
from profiles import make_case as make_kda
from variants import on, ops, same_bits

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device and torch")

MODEL = (5, 128, 64, 512, 128)  # H, nope, rope, rank, V
BOUND = 4e-3  # two roundings to bf16


@pytest.fixture(params=["as it is", "batch-invariant"])
def strict(request, monkeypatch):
    """Whether a row has the bits that it has alone; `ops` runs without kernels of sm_90a."""
    is_strict = request.param == "batch-invariant"
    monkeypatch.setenv("KIMI_LINEAR_GPU", "sm_90")
    own = _backends.open_backend("cuda", batch_invariant=is_strict)
    assert own.info()["variant"] == "sm_90"
    monkeypatch.setitem(_backends._opened, ("cuda", 0), own)
    with on("cuda"):
        yield is_strict


def test_a_device_runs_sm_90a_where_it_can(monkeypatch):
    monkeypatch.delenv("KIMI_LINEAR_GPU", raising=False)
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert _backends.open_backend("cuda").info()["variant"] == ("sm_90a" if is_hopper else "sm_90")
    monkeypatch.setenv("KIMI_LINEAR_GPU", "sm_80")
    with pytest.raises(ValueError, match="variant must be 'sm_90a' or 'sm_90', got 'sm_80'"):
        _backends.open_backend("cuda")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(BF16)


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("T", [17, 70, 330])
def test_linear(strict, format, T):
    x = normal(T, 320)
    w, dense = weight(np.random.default_rng(1), 200, 320, format=format)
    got = ops.linear(x, w)
    assert relative(got, reference.linear(x, dense)) < BOUND
    alone = [ops.linear(x[t : t + 1], w)[0] for t in (0, 16, T - 1)]
    assert not strict or same_bits(np.stack(alone), got[[0, 16, T - 1]])


@pytest.mark.parametrize("format", CUDA_FORMATS)
@pytest.mark.parametrize("T", [9, 70, 330])
def test_moe_experts(strict, format, T):
    r = np.random.default_rng(0)
    shapes = ((4, 64, 192), (4, 64, 192), (4, 192, 64), (128, 192), (128, 192), (192, 128))
    given, dense = zip(*(weight(r, *shape, format=format) for shape in shapes), strict=True)
    x, ids = normal(T, 192), np.stack([r.permutation(4)[:2] for _ in range(T)]).astype(np.int32)
    factors = r.random((T, 2)).astype(np.float32)

    def run(rows):
        return ops.moe_experts(x[rows], ids[rows], factors[rows], *given[:3], shared=given[3:])

    got = run(slice(T))
    want = reference.moe_experts(x, ids, factors, *dense[:3], shared=dense[3:])
    assert relative(got, want) < BOUND
    assert not strict or same_bits(run(slice(T - 1, T)), got[T - 1 :])


def test_kda_prefill(strict):
    lengths = (1, 65, 0, 200)
    case = make_kda("init", sum(lengths), N=len(lengths), H=2, K=128, V=64)
    case |= {name: case[name].astype(BF16) for name in ("q", "k", "v", "beta")}
    case["cu_seqlens"] = np.cumsum([0, *lengths]).astype(np.int32)
    got, want = ops.kda_prefill(**case), reference.kda_prefill(**case)
    assert relative(got[0], want[0]) < BOUND and relative(got[1], want[1]) < 1e-5
    own = {name: case[name][1:66] for name in ("q", "k", "v", "g", "beta")}
    state = case["initial_state"][1:2]
    alone = ops.kda_prefill(**{**case, **own, "cu_seqlens": None, "initial_state": state})
    assert not strict or same_bits(alone[0], got[0][1:66])


def test_mla_decode(strict):
    spans = [(n - 1, 1) for n in (1, 64, 65, 1000, 1500)]
    case = make_case(spans, MODEL, dtype=BF16, w_dtype=BF16)
    latents = whole_latents(case)
    got = decode(case, latents)
    assert relative(got, reference.mla_prefill(**case, scale=SCALE)) < tolerance(BF16)
    alone = decode(case, latents[3:4], q=case["q"][3:4])
    assert not strict or same_bits(alone, got[3:4])


@pytest.mark.parametrize("stored", ["auto", "fp8"])
def test_mla_prefill(strict, stored):
    """Beside tiles of many tokens, few tokens, which are steps."""
    case = make_case([(0, 150), (70, 1), (64, 5), (300, 130)], MODEL, dtype=BF16, w_dtype=BF16)
    kept = dict(case)
    if stored == "fp8":
        kept["latent"], kept["past"] = of_8_bits(case["latent"]), list(map(of_8_bits, case["past"]))
    got = prefill(case, kv_cache_dtype=stored)
    assert relative(got, reference.mla_prefill(**kept, scale=SCALE)) < tolerance(BF16)


def of_8_bits(rows):
    rank, rope = MODEL[3], MODEL[2]
    return reference.unpack_latents(reference.pack_latents(rows, rank), rank, rope)
