"""The runner against the specification, for shapes that transformers' class does not run."""

import kimi_linear as kl
import numpy as np
import pytest
from checkpoints import relative_rms, tensors
from engines import cut, in_pieces, open_engine, whole
from kimi_linear.config import KimiLinearConfig
from kimi_linear.reference import Model
from kimi_linear.testing import tiny_config, write_checkpoint


def layers(pattern):
    """The layer lists of linear_attn_config for a pattern of K (KDA) and M (MLA)."""
    return {
        "kda_layers": tuple(i + 1 for i, p in enumerate(pattern) if p == "K"),
        "full_attn_layers": tuple(i + 1 for i, p in enumerate(pattern) if p == "M"),
    }


SHAPES = {
    "bounded-gate": dict(gate_lower_bound=-5.0),
    "kda-only": dict(num_hidden_layers=3, linear_attn_config=layers("KKK")),
    "mla-only": dict(num_hidden_layers=2, linear_attn_config=layers("MM")),
    "softmax-router": dict(moe_router_activation_func="softmax"),
    "no-shared-expert": dict(num_shared_experts=0),
    "tied-embeddings": dict(tie_word_embeddings=True),
    "every-other-layer-experts": dict(num_hidden_layers=5, moe_layer_freq=2),
    "no-shared-key-channels": dict(qk_rope_head_dim=0),
    "odd-sizes": dict(
        hidden_size=37, vocab_size=293, intermediate_size=51, moe_intermediate_size=13,
        kv_lora_rank=19, qk_nope_head_dim=7, qk_rope_head_dim=3, v_head_dim=11,
        linear_attn_config=dict(head_dim=9, num_heads=3, short_conv_kernel_size=3),
    ),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def checkpoint(request, tmp_path):
    path = write_checkpoint(tmp_path / "model", tiny_config(**SHAPES[request.param]), seed=4,
                            dtype="f32", n_files=2)  # fmt: skip
    config = KimiLinearConfig.from_dir(path)
    ids = np.random.default_rng(6).integers(0, config.vocab_size, 150).tolist()
    return path, ids, Model(config, tensors(path)).forward(ids)


def test_logits(checkpoint, device):
    path, ids, want = checkpoint
    engine = open_engine(path, device=device)
    assert relative_rms(whole(engine, ids), want) < 1e-5
    for piece in (1, 17, 65):
        assert relative_rms(in_pieces(engine, ids, cut(len(ids), piece)), want) < 1e-5
    engine.close()


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "fp8"])
def test_formats_stay_near(checkpoint, device, format):
    """No shape breaks a format: an error of rounding, not of layout."""
    path, ids, want = checkpoint
    engine = open_engine(path, device=device, format=format)
    got = whole(engine, ids)
    engine.close()
    correlation = np.corrcoef(got.ravel(), want.ravel())[0, 1]
    assert correlation > {"bf16": 0.95, "int8": 0.95, "fp8": 0.7, "int4": 0.5}[format]


def test_public_face(checkpoint):
    path, ids, want = checkpoint
    with kl.load(path, device="cpu", dtype="f32", progress=False) as m:
        assert relative_rms(m.logits(ids), want[-1]) < 1e-5
