"""Convolution, norms, attention, experts, formats and sampling of the specification."""

import numpy as np
import pytest
import torch
from checkpoints import hf_config, randomize, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from kimi_linear import reference as ref
from transformers.models.kimi_linear import modeling_kimi_linear as hf


def module(kind, case, *args):
    """A layer of transformers with random weights, and them by name."""
    layer = randomize(kind(hf_config(case), *args).eval(), 0)
    return layer, {name: p.detach().numpy() for name, p in layer.state_dict().items()}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("activation", ["silu", None])
def test_short_conv_agrees_with_transformers(W, activation):
    x, weight = normal(30, 6), normal(6, W, seed=1)
    want = hf.causal_conv1d_fn(torch.tensor(x.T[None]), torch.tensor(weight), None, activation)
    y, state = ref.short_conv(x, weight, activation=activation)
    assert np.allclose(y, want[0].numpy().T, atol=1e-12)
    assert np.array_equal(state[0], x[30 - (W - 1) :].T)


def test_short_conv_continues_from_its_state():
    x, weight = normal(20, 3), normal(3, 4, seed=1)
    whole, end = ref.short_conv(x, weight)
    for cut in (0, 1, 2, 3, 19, 20):
        first, state = ref.short_conv(x[:cut], weight)
        second, state = ref.short_conv(x[cut:], weight, state=state)
        assert np.array_equal(np.concatenate([first, second]), whole)
        assert np.array_equal(state, end)
    cu = [0, 2, 2, 20]
    y, states = ref.short_conv(x, weight, cu_seqlens=cu)
    for n in range(3):
        alone, state = ref.short_conv(x[cu[n] : cu[n + 1]], weight)
        assert np.array_equal(y[cu[n] : cu[n + 1]], alone)
        assert np.array_equal(states[n], state[0])


def test_norms_agree_with_transformers():
    x, z, weight = normal(7, 3, 16), 4 * normal(7, 3, 16, seed=1), normal(16, seed=2)
    plain, gated = hf.KimiLinearRMSNorm(16, eps=1e-3), hf.KimiLinearRMSNormGated(16, eps=1e-3)
    for norm in (plain, gated):
        norm.weight.data = torch.tensor(weight, dtype=torch.float32)
    with torch.no_grad():
        want = plain(torch.tensor(x, dtype=torch.float32)).numpy()
        want_gated = gated(torch.tensor(x, dtype=torch.float32), torch.tensor(z)).numpy()
    assert relative_rms(want, ref.rms_norm(x, weight, eps=1e-3)) < 1e-6
    assert relative_rms(want_gated, ref.gated_rms_norm(x, z, weight, eps=1e-3)) < 1e-6


def test_rms_norm_adds_its_residual():
    x, residual, weight = normal(5, 8), normal(5, 8, seed=1), normal(8, seed=2)
    y, total = ref.rms_norm(x, weight, eps=1e-5, residual=residual)
    assert np.array_equal(total, x + residual)
    assert np.array_equal(y, ref.rms_norm(x + residual, weight, eps=1e-5))


def test_mla_agrees_with_transformers():
    layer, w = module(hf.KimiLinearAttention, "published-pattern", 3)
    c = layer.config
    x = normal(50, c.hidden_size).astype(np.float32)
    mask = torch.full((50, 50), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        want = layer(torch.tensor(x)[None], mask)[0][0].numpy()
    q = ref.linear(x, w["q_proj.weight"]).reshape(50, c.num_attention_heads, -1)
    raw = ref.linear(x, w["kv_a_proj_with_mqa.weight"])
    rank = c.kv_lora_rank
    normed = ref.rms_norm(raw[:, :rank], w["kv_a_layernorm.weight"], eps=1e-6)
    latent = np.concatenate([normed, raw[:, rank:]], axis=1)
    w_kv_b = w["kv_b_proj.weight"].reshape(c.num_attention_heads, -1, rank)
    o = ref.mla_prefill(q, latent, w_kv_b)
    assert relative_rms(want, ref.linear(o.reshape(50, -1), w["o_proj.weight"])) < 2e-6


def mla_case(T, H=3, rank=10, nope=6, rope=4, V=5):
    q, latent = normal(T, H, nope + rope), normal(T, rank + rope, seed=1)
    return q, latent, normal(H, nope + V, rank, seed=2)


def test_absorbed_form_is_the_plain_form():
    q, latent, w = mla_case(40)
    for first in (0, 1, 25):
        args = (q[first:], latent, w, 0.4, first)
        assert np.allclose(ref.attend_absorbed(*args), ref.attend_plain(*args), atol=1e-12)


def test_mla_prefill_with_past_and_ragged_rows():
    q, latent, w = mla_case(40)
    whole = ref.mla_prefill(q, latent, w)
    for cut in (0, 1, 39):
        part = ref.mla_prefill(q[cut:], latent[cut:], w, past=latent[:cut])
        assert np.allclose(part, whole[cut:], atol=1e-13)
    past = [latent[:7], None, latent[:3]]
    got = ref.mla_prefill(q, latent, w, cu_seqlens=[0, 15, 15, 40], past=past)
    assert np.array_equal(got[:15], ref.mla_prefill(q[:15], latent[:15], w, past=past[0]))
    assert np.array_equal(got[15:], ref.mla_prefill(q[15:], latent[15:], w, past=past[2]))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_mla_decode_over_poisoned_pages(length):
    q, latent, w = mla_case(length)
    pages = np.full((5, 64, latent.shape[1]), np.nan)
    table = np.full((2, 4), 10**6)  # absurd where unused
    table[1, :3] = [4, 0, 2]
    for p in range(length):
        pages[table[1, p // 64], p % 64] = latent[p]
    table[0, 0], pages[1, 0] = 1, latent[0]
    out = ref.mla_decode(np.stack([q[0], q[-1]]), pages, table, [1, length], w)
    assert np.allclose(out[1], ref.mla_prefill(q, latent, w)[-1], atol=1e-12)
    assert np.allclose(out[0], ref.mla_prefill(q[:1], latent[:1], w)[0], atol=1e-12)


@pytest.mark.parametrize("case", ["many-experts", "groups"])
def test_experts_agree_with_transformers(case):
    layer, w = module(hf.KimiLinearMoE, case)
    c = layer.config
    x = normal(60, c.hidden_size).astype(np.float32)
    with torch.no_grad():
        want = layer(torch.tensor(x)[None])[0].numpy()
        logits, want_weights, want_ids = layer.gate(torch.tensor(x))
    bias = w["gate.e_score_correction_bias"]
    ids, weights = ref.moe_route(
        logits.numpy(), bias, top_k=c.num_experts_per_token, scaling=c.routed_scaling_factor,
        renormalize=c.moe_renormalize, groups=c.num_expert_group, top_groups=c.topk_group,
    )  # fmt: skip
    order, want_order = np.argsort(ids, axis=1), np.argsort(want_ids.numpy(), axis=1)
    assert np.array_equal(np.take_along_axis(ids, order, 1),
                          np.take_along_axis(want_ids.numpy(), want_order, 1))  # fmt: skip
    assert relative_rms(np.take_along_axis(want_weights.numpy(), want_order, 1),
                        np.take_along_axis(weights, order, 1)) < 1e-6  # fmt: skip
    assert len(np.unique(ids)) > c.num_experts_per_token
    w1, w3 = np.split(w["experts.gate_up_proj"], 2, axis=1)
    shared = [w[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")]
    y = ref.moe_experts(x, ids, weights, w1, w3, w["experts.down_proj"], shared=shared)
    assert relative_rms(want, y) < 2e-6


def test_route_order_and_ties():
    ids, weights = ref.moe_route([[0.0, 2.0, 0.0, 2.0, -1.0]], None, top_k=4, scaling=1.0,
                                 renormalize=False, score="softmax")  # fmt: skip
    assert ids.tolist() == [[1, 3, 0, 2]]
    assert np.allclose(weights[0, 0] / weights[0, 2], np.exp(2.0))
    ids, weights = ref.moe_route([[0.0, 2.0]], [1.0, 0.0], top_k=1, scaling=3.0,
                                 renormalize=False)  # fmt: skip
    assert ids.tolist() == [[0]] and weights[0, 0] == 1.5  # chosen by bias, weighted without


@given(cols=st.integers(1, 150), seed=st.integers(0, 99), exponent=st.integers(-30, 30))
@settings(max_examples=40, deadline=None)
def test_quantized_within_half_a_step(cols, seed, exponent):
    w = (normal(3, cols, seed=seed) * 2.0**exponent).astype(np.float32)
    w[1, : cols // 2] = 0
    for dtype, group, qmax in (("int8", 64, 127), ("int4", 32, 7)):
        packed = ref.quantize(w, dtype)
        assert packed.scales.shape == (3, -(-cols // group))
        assert np.array_equal(ref.round_bf16(packed.scales), packed.scales)
        scales = np.repeat(packed.scales, group, axis=1)[:, :cols]
        error = np.abs(packed.dequantize() - w)
        clamped = np.abs(w) > scales * qmax  # the scale itself was rounded down
        assert np.all(error[~clamped] <= scales[~clamped] * (0.5 + 1e-6))
        assert np.all(error[clamped] <= np.abs(w[clamped]) * 2.0**-8)
    assert np.all(np.abs(ref.round_bf16(w) - w) <= np.abs(w) * 2.0**-8)


def test_int4_layout():
    w = np.zeros((1, 40), np.float32)
    w[0, [0, 16, 33]] = [7, -3, 7]  # scale 1 in both groups
    packed = ref.quantize(w, "int4")
    assert packed.scales.tolist() == [[1.0, 1.0]]
    assert packed.data.shape == (1, 32)
    assert packed.data[0, 0] == (5 << 4 | 15) and packed.data[0, 17] == (8 << 4 | 15)
    assert np.array_equal(packed.dequantize(), w)


def test_token_logprobs():
    hidden, head = normal(6, 8), normal(11, 8, seed=1)
    head[7] = head[3]  # a tie in every row
    z = torch.tensor(hidden @ head.T)
    want = torch.log_softmax(z, -1).numpy()
    best = want.argmax(-1)
    targets = np.array([0, best[1], 7, -1, best[4], 10])
    logprobs, greedy, ids, top = ref.token_logprobs(hidden, head, targets, top=4)
    assert np.isnan(logprobs[3]) and not greedy[3]
    rest = [0, 1, 2, 4, 5]
    assert np.allclose(logprobs[rest], want[rest, targets[rest]], atol=1e-12)
    assert greedy.tolist() == [t == b for t, b in zip(targets, best, strict=True)]
    assert np.allclose(top, np.sort(want)[:, ::-1][:, :4], atol=1e-12)
    assert all(np.flatnonzero(r == 7) - 1 == np.flatnonzero(r == 3) for r in ids if 7 in r)


def test_philox_known_answers():
    """The published test vectors of Philox4x32-10 that fit a 64-bit counter and key."""
    assert philox_words(0, 0) == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
    assert 0 <= ref.uniform(0, 0) < 1
    assert ref.uniform(1, 2) != ref.uniform(2, 1)


def philox_words(seed, index):
    return " ".join(f"{w:08x}" for w in ref.philox(seed, index))


def test_sampler_keeps_what_it_should():
    z = np.log([[0.1, 0.4, 0.1, 0.3, 0.05, 0.05]])

    def drawn(**changes):
        rows = [ref.Sampling(1.0, seed=5, position=i, **changes) for i in range(400)]
        return set(ref.sample(np.repeat(z, 400, 0), rows)[0].tolist())

    assert drawn() == {0, 1, 2, 3, 4, 5}
    assert drawn(top_k=3) == {1, 3, 0}  # 0 and 2 tie: the lower id
    assert drawn(top_p=0.65) == {1, 3}
    assert drawn(top_p=0.75) == {1, 3, 0}
    assert drawn(min_p=0.2) == {1, 3, 0, 2}
    assert drawn(top_p=1e-9) == {1}


def test_sampler_frequencies():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    rows = [ref.Sampling(temperature=2.0, seed=9, position=i) for i in range(4000)]
    ids, logprobs = ref.sample(np.repeat(2 * np.log(p)[None], 4000, 0), rows)
    assert np.allclose(np.bincount(ids) / 4000, p, atol=0.025)
    assert np.allclose(logprobs, np.log(p**2 / (p**2).sum())[ids])


def test_sampler_penalty_argmax_and_bad_rows():
    bad = [[0.0, np.nan, 1.0], [-np.inf] * 3, [0.0, np.inf, 1.0]]
    z = np.array([[2.0, 1.9, -1.0], [-2.0, -2.1, -9.0], *bad])
    seen = np.array([[0b001], [0b001], [0], [0], [0]], np.int32)
    rows = [ref.Sampling(repetition_penalty=1.2)] * 5
    ids, logprobs, top_ids, _ = ref.sample(z, rows, seen=seen, top=2)
    assert ids.tolist() == [1, 1, -1, -1, -1]
    assert np.isnan(logprobs[2:]).all() and top_ids[0].tolist() == [0, 1]
    assert ref.sample(np.array([[3.0, 5.0, 5.0]]), [ref.Sampling()])[0].tolist() == [1]
