"""kimi_linear.torch: the operators give what kl.ops gives, and torch's own checks pass."""

import inspect
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import kimi_linear.torch as klt  # noqa: E402
from kimi_linear import ops  # noqa: E402

T, H, K, V, RANK, ROPE, NOPE, E, D, I = 21, 2, 8, 12, 16, 4, 8, 5, 10, 6


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype)


generator = torch.Generator().manual_seed(3)
CU = torch.tensor([0, 5, 5, T])
KDA = dict(
    q=rand(T, H, K), k=torch.nn.functional.normalize(rand(T, H, K), dim=-1), v=rand(T, H, V),
    g=-rand(T, H, K).abs(), beta=rand(T, H).sigmoid(),
)  # fmt: skip
STATE = rand(4, H, V, K)
LATENT, W_KV_B = rand(T, RANK + ROPE), rand(H, NOPE + V, RANK)
MLA_Q = rand(T, H, NOPE + ROPE)
W1, W3, W2 = rand(E, I, D), rand(E, I, D), rand(E, D, I)
IDS = torch.randint(0, E, (T, 3), generator=generator, dtype=torch.int32)
X = rand(T, D)

CASES = {
    "kda_prefill": ((*KDA.values(),), {}),
    "kda_prefill ragged": (
        (*KDA.values(),),
        dict(cu_seqlens=CU, initial_state=STATE[:3], gate="softplus", A_log=rand(H),
             dt_bias=rand(H, K), normalize=True, beta_logits=True, scale=0.5),
    ),
    "kda_decode": ((*(t[:4] for t in KDA.values()), STATE.clone()), {}),
    "kda_decode slots": (
        (*(t[:2] for t in KDA.values()), STATE.clone()),
        dict(slots=torch.tensor([3, 0])),
    ),
    "short_conv": ((X, rand(D, 4)), {}),
    "short_conv ragged": ((X, rand(D, 4)), dict(cu_seqlens=CU, activation=None)),
    "gated_rms_norm": ((rand(T, H, V), rand(T, H, V), rand(V)), dict(eps=1e-6)),
    "rms_norm": ((X, rand(D)), dict(eps=1e-5)),
    "rms_norm residual": ((X, rand(D)), dict(eps=1e-5, residual=rand(T, D))),
    "mla_prefill": ((MLA_Q, LATENT, W_KV_B), {}),
    "mla_prefill past": (
        (MLA_Q, LATENT, W_KV_B),
        dict(cu_seqlens=CU, past=[rand(70, RANK + ROPE), None, rand(3, RANK + ROPE)]),
    ),
    "mla_prefill one past": ((MLA_Q, LATENT, W_KV_B), dict(past=rand(3, RANK + ROPE))),
    "mla_decode": (
        (MLA_Q[:2], rand(3, 64, RANK + ROPE), torch.tensor([[0, 2], [1, -1]]),
         torch.tensor([65, 3], dtype=torch.int32), W_KV_B), {},
    ),
    "moe_route": ((rand(T, E), rand(E)), dict(top_k=2, scaling=2.5)),
    "moe_route no bias": ((rand(T, E), None), dict(top_k=1, scaling=1.0, score="softmax")),
    "moe_experts": ((X, IDS, rand(T, 3), W1, W3, W2), {}),
    "moe_experts shared": (
        (X, IDS, rand(T, 3), W1, W3, W2), dict(shared=(W1[0], W3[0], W2[0])),
    ),
    "linear": ((X, rand(7, D)), {}),
    "linear of three axes": ((X.view(3, 7, D), rand(7, D)), {}),
    "linear bfloat16": ((X.bfloat16(), rand(7, D)), {}),
    "token_logprobs": ((X, rand(9, D), torch.arange(T) % 10 - 1), {}),
    "token_logprobs top": ((X, rand(9, D), torch.arange(T) % 10 - 1), dict(top=3)),
}  # fmt: skip


def cloned(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(cloned, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("case", CASES)
def test_same_as_ops(case):
    name, (args, options) = case.split()[0], CASES[case]
    want_args, got_args = cloned(args), cloned(args)
    want = getattr(ops, name)(*want_args, **options)
    got = getattr(klt, name)(*got_args, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got_args, want_args, rtol=0, atol=0)  # state, too


@pytest.mark.parametrize("case", CASES)
def test_compiles_whole(case):
    name, (args, options) = case.split()[0], CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(getattr(klt, name), fullgraph=True, backend="aot_eager")
    want_args, got_args = cloned(args), cloned(args)
    want = getattr(ops, name)(*want_args, **options)
    got = compiled(*got_args, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got_args, want_args, rtol=0, atol=0)


OPCHECKS = ["kda_prefill ragged", "kda_decode slots", "short_conv ragged", "gated_rms_norm",
            "rms_norm", "mla_decode", "moe_route", "moe_experts shared", "linear",
            "token_logprobs top"]  # fmt: skip


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case):
    name, (args, options) = case.split()[0], CASES[case]
    if name == "token_logprobs":  # opcheck does not hold NaN equal
        args = (*args[:2], args[2].clamp(min=0))
    torch.library.opcheck(getattr(torch.ops.kimi_linear, name), cloned(args), options)


def test_opcheck_of_what_the_functions_rearrange():
    op = torch.ops.kimi_linear
    torch.library.opcheck(op.add_rms_norm, (X, rand(D), rand(T, D)), dict(eps=1e-5))
    past = [rand(70, RANK + ROPE), rand(0, RANK + ROPE), rand(3, RANK + ROPE)]
    torch.library.opcheck(
        op.mla_prefill, (MLA_Q, LATENT, W_KV_B), dict(cu_seqlens=CU, past=past)
    )


def test_a_model_of_several_operations_compiles():
    weight, w = rand(D), rand(D, D)

    def block(x):
        for _ in range(2):
            x, _ = klt.short_conv(klt.rms_norm(x, weight, eps=1e-5), conv)
            x = torch.tanh(klt.linear(x, w))
        return x

    conv = rand(D, 4)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), block(X), rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n in klt.__all__])
def test_arguments_and_defaults_are_those_of_ops(name):
    """torch leaves out of a call what equals the schema's default: the two must not differ."""
    ours = inspect.signature(getattr(ops, name)).parameters
    schema = getattr(torch.ops.kimi_linear, name).default._schema
    assert [a.name for a in schema.arguments] == [
        p for p in ours if p not in ("out", "final_state", "stream", "residual")
    ]
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
