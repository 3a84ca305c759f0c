"""The KDA specification against transformers, and its two forms against each other."""

import numpy as np
import pytest
import torch
from checkpoints import relative_rms
from kimi_linear.reference import kda_chunked, kda_decode, kda_prefill, log_decay
from transformers.models.kimi_linear import modeling_kimi_linear as hf


def make_case(T=70, H=3, K=8, V=5, Hk=None, seed=0):
    r = np.random.default_rng(seed)
    Hk = Hk or H
    return dict(
        q=r.standard_normal((T, Hk, K)),
        k=r.standard_normal((T, Hk, K)),
        v=r.standard_normal((T, H, V)),
        g=-3 * r.random((T, H, K)) ** 4,
        beta=r.random((T, H)),
    )


def rows(case, span):
    return {name: x[span] for name, x in case.items()}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("function", ["chunk", "recurrent"])
@pytest.mark.parametrize("T", [1, 63, 64, 130])
def test_agrees_with_transformers(function, T):
    case = make_case(T)
    state = np.random.default_rng(1).standard_normal((1, 3, 5, 8))
    theirs = getattr(hf, f"{function}_kimi_delta_attention")
    want, want_state = theirs(
        *[torch.tensor(x[None], dtype=torch.float32) for x in case.values()],
        initial_state=torch.tensor(state.swapaxes(2, 3), dtype=torch.float32),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    o, final = kda_prefill(**case, normalize=True, initial_state=state)
    assert relative_rms(want[0].numpy(), o) < 2e-6
    assert relative_rms(want_state.numpy().swapaxes(2, 3), final) < 2e-6


def test_softplus_gate_agrees_with_transformers():
    config = hf.KimiLinearConfig(hidden_size=24, linear_num_heads=3, linear_head_dim=8)
    gate = hf.KimiLinearForgetGate(config).eval()
    r = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in gate.parameters():
            p.copy_(torch.randn(p.shape, generator=r))
        x = 3 * torch.randn(1, 40, 24, generator=r)
        raw = gate.f_b_proj(gate.f_a_proj(x)).view(40, 3, 8)
        want = gate(x)[0]
    got = log_decay(raw.numpy(), "softplus", A_log=gate.A_log.detach().numpy(),
                    dt_bias=gate.dt_bias.detach().numpy())  # fmt: skip
    assert got.min() < -20  # far in the exponential's range
    assert relative_rms(want.numpy(), got) < 1e-6


def test_softplus_gate_keeps_small_decays():
    raw = np.full((1, 1, 2), -40.0)
    got = log_decay(raw, "softplus", A_log=[0.0], dt_bias=np.zeros((1, 2)))
    assert np.allclose(got, -np.exp(-40.0), rtol=1e-12, atol=0)  # log(1 + exp) would say 0


def test_bounded_gate():
    g = np.array([[[-700.0, 0.0, 700.0]]])
    got = log_decay(g, "bounded", lower_bound=-5.0)
    assert np.allclose(got, [[[0.0, -2.5, -5.0]]], atol=1e-300)
    assert np.array_equal(got, log_decay(g, "bounded", A_log=[0.0], dt_bias=np.zeros((1, 3))))
    slow = log_decay(g / 700, "bounded", A_log=[np.log(2.0)], dt_bias=[[0.0, 0.5, 0.0]])
    assert np.allclose(slow, -5 / (1 + np.exp([[[2.0, -1.0, -2.0]]])))


@pytest.mark.parametrize("chunk", [1, 2, 16, 64])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65])
def test_chunked_form_is_the_recurrence(T, chunk):
    case = make_case(T, H=4, Hk=2)
    state = np.random.default_rng(1).standard_normal((1, 4, 5, 8))
    keywords = dict(normalize=True, initial_state=state, scale=0.3)
    want, want_state = kda_prefill(**case, **keywords)
    o, final = kda_chunked(**case, **keywords, chunk=chunk)
    assert relative_rms(o, want) < 1e-12
    assert relative_rms(final, want_state) < 1e-12


@pytest.mark.parametrize("decay", [0.0, 1e-4, 5.5, 12.5, 800.0])
def test_chunked_form_on_any_decay(decay):
    case = make_case(96)
    case["g"] = -decay * (1 + 0.05 * np.random.default_rng(2).random(case["g"].shape))
    want, want_state = kda_prefill(**case, normalize=True)
    with np.errstate(over="raise", invalid="raise"):
        o, final = kda_chunked(**case, normalize=True, chunk=64)
    assert relative_rms(o, want) < 1e-11
    assert relative_rms(final, want_state) < 1e-11


def test_chunked_form_on_repeated_keys():
    """The triangular system at its worst: every key the same, beta near 1, no decay."""
    case = make_case(64)
    case["k"][:] = case["k"][0]
    case["g"][:] = 0
    case["beta"][:] = 0.999
    want, _ = kda_prefill(**case, normalize=True)
    o, _ = kda_chunked(**case, normalize=True, chunk=64)
    assert relative_rms(o, want) < 1e-11


def test_ragged_batch_is_its_sequences_alone():
    case = make_case(40)
    cu = [0, 0, 1, 18, 18, 40]
    states = np.random.default_rng(3).standard_normal((5, 3, 5, 8))
    for function in (kda_prefill, kda_chunked):
        kept = states.copy()
        o, final = function(**case, normalize=True, cu_seqlens=cu, initial_state=states)
        assert np.array_equal(states, kept)
        for n in range(5):
            part = rows(case, slice(cu[n], cu[n + 1]))
            want, want_state = function(**part, normalize=True, initial_state=states[n : n + 1])
            assert np.array_equal(o[cu[n] : cu[n + 1]], want)
            assert np.array_equal(final[n], want_state[0])


def test_decode_is_prefill_a_token_at_a_time():
    case = make_case(6, H=4, Hk=2)
    gate = dict(gate="softplus", A_log=np.arange(4) / 2, normalize=True, beta_logits=True,
                dt_bias=np.arange(32.0).reshape(4, 8) / 9)  # fmt: skip
    want, want_state = kda_prefill(**case, **gate)
    pool = np.full((3, 4, 5, 8), np.nan)
    pool[1] = 0
    for t in range(6):
        o = kda_decode(**rows(case, slice(t, t + 1)), state=pool, slots=[1], **gate)
        assert np.array_equal(o[0], want[t])
    assert np.array_equal(pool[1], want_state[0])
    assert np.isnan(pool[[0, 2]]).all()  # other slots are not touched


def test_state_answers_with_what_was_written():
    """One token into an empty memory, beta 1: its key then recalls its value exactly."""
    case = make_case(1, Hk=1, H=2)
    case["beta"][:] = 1
    case["k"] = unit(case["k"])
    case["q"] = case["k"]
    o, _ = kda_prefill(**case, scale=1.0)
    assert np.allclose(o, case["v"], rtol=1e-12)


def test_scalar_gate_is_the_gated_delta_rule():
    """g of one rate a head against the textbook S <- a S (1 - b k k^T) + b v k^T."""
    case = make_case(20)
    g = case.pop("g")[..., 0]
    q, k, v, beta = case["q"], unit(case["k"]), case["v"], case["beta"]
    S, want = np.zeros((3, 5, 8)), np.empty_like(v)
    for t in range(20):
        erase = np.eye(8) - beta[t, :, None, None] * k[t, :, :, None] * k[t, :, None]
        write = beta[t, :, None, None] * v[t, :, :, None] * k[t, :, None]
        S = np.exp(g[t])[:, None, None] * S @ erase + write
        want[t] = 8**-0.5 * np.einsum("hvk,hk->hv", S, q[t])
    for scalar in (g, g[..., None]):
        for function in (kda_prefill, kda_chunked):
            assert relative_rms(function(q, k, v, scalar, beta)[0], want) < 1e-12


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(gate="tanh"), "gate must be"),
        (dict(gate="softplus"), "A_log must be given"),
        (dict(cu_seqlens=[0, 3, 2, 70]), "cu_seqlens must rise"),
        (dict(cu_seqlens=[0, 69]), "cu_seqlens must rise from 0 to 70"),
        (dict(v=np.zeros((70, 4, 5))), r"v.shape\[1\] must be a multiple of 3"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        kda_prefill(**make_case() | change)
