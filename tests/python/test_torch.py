"""kimi_linear.torch: the operators give what kl.ops gives, and torch's own checks pass."""

import inspect
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import kimi_linear.torch as klt  # noqa: E402
from kimi_linear import ops  # noqa: E402
from torch_cases import (  # noqa: E402
    CASES, CU, LATENT, MLA_Q, RANK, ROPE, W_KV_B, D, T, X, case_on, cloned, moved, rand,
)  # fmt: skip

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
)


@pytest.fixture(params=["cpu", CUDA])
def place(request):
    return request.param


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_same_as_ops(case, place):
    name, args, options = case_on(case, place)
    want_args, got_args = cloned(args), cloned(args)
    want = getattr(ops, name)(*want_args, **options)
    got = getattr(klt, name)(*got_args, **options)
    assert_same(got, want)
    assert_same(got_args, want_args)  # state, too


@pytest.mark.parametrize("case", CASES)
def test_compiles_whole(case, place):
    name, args, options = case_on(case, place)
    torch._dynamo.reset()
    compiled = torch.compile(getattr(klt, name), fullgraph=True, backend="aot_eager")
    want_args, got_args = cloned(args), cloned(args)
    want = getattr(ops, name)(*want_args, **options)
    got = compiled(*got_args, **options)
    assert_same(got, want)
    assert_same(got_args, want_args)


OPCHECKS = ["kda_prefill ragged", "kda_decode slots", "short_conv ragged", "gated_rms_norm",
            "rms_norm", "mla_decode", "moe_route", "moe_experts shared", "linear",
            "token_logprobs top"]  # fmt: skip


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case, place):
    name, args, options = case_on(case, place)
    if name == "token_logprobs":  # opcheck does not hold NaN equal
        args = (*args[:2], args[2].clamp(min=0))
    torch.library.opcheck(getattr(torch.ops.kimi_linear, name), args, options)


def test_opcheck_of_what_the_functions_rearrange(place):
    op = torch.ops.kimi_linear
    args = moved((X, rand(D), rand(T, D)), place)
    torch.library.opcheck(op.add_rms_norm, args, dict(eps=1e-5))
    past = [rand(70, RANK + ROPE), rand(0, RANK + ROPE), rand(3, RANK + ROPE)]
    options = moved(dict(cu_seqlens=CU, past=past), place)
    torch.library.opcheck(op.mla_prefill, moved((MLA_Q, LATENT, W_KV_B), place), options)


def test_a_model_of_several_operations_compiles(place):
    weight, w, conv, x = moved((rand(D), rand(D, D), rand(D, 4), X), place)

    def block(x):
        for _ in range(2):
            x, _ = klt.short_conv(klt.rms_norm(x, weight, eps=1e-5), conv)
            x = torch.tanh(klt.linear(x, w))
        return x

    compiled = torch.compile(block, fullgraph=True, backend="eager")
    assert_same(compiled(x), block(x))


@pytest.mark.parametrize("name", [n for n in klt.__all__])
def test_arguments_and_defaults_are_those_of_ops(name):
    """torch leaves out of a call what equals the schema's default: the two must not differ."""
    ours = inspect.signature(getattr(ops, name)).parameters
    schema = getattr(torch.ops.kimi_linear, name).default._schema
    without = {"out", "final_state", "checkpoint_every", "checkpoints", "stream", "residual"}
    assert [a.name for a in schema.arguments] == [p for p in ours if p not in without]
    for a in schema.arguments:
        if a.has_default_value():
            assert a.default_value == ours[a.name].default
        else:
            assert ours[a.name].default is inspect.Parameter.empty


def test_gradients_are_refused_aloud():
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        klt.linear(x, rand(7, D))
    with torch.no_grad():
        assert not klt.linear(x, rand(7, D)).requires_grad
    with torch.inference_mode():
        klt.linear(x, rand(7, D))


def test_errors_pass_through():
    with pytest.raises(TypeError, match="linear: x must be float32 or bfloat16, got float64"):
        klt.linear(X.double(), rand(7, D))
    with pytest.raises(ValueError, match="linear"):
        klt.linear(X, rand(7, D + 1))


def test_importing_twice_registers_once():
    code = (
        "import importlib, kimi_linear.torch as a; b = importlib.reload(a); import torch; "
        "x = torch.ones(2, 3); print(float(b.linear(x, x).sum()))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "12.0"
