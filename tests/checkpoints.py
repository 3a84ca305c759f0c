"""Small random checkpoints written by transformers, an implementation nobody here wrote."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import KimiLinearConfig, KimiLinearForCausalLM

torch.set_num_threads(1)  # layers this small only lose by sharing

BASE = dict(
    vocab_size=199, hidden_size=48, intermediate_size=80, moe_intermediate_size=24,
    num_attention_heads=3, num_key_value_heads=3, num_shared_experts=1, kv_lora_rank=20,
    q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=16,
    num_expert_group=1, topk_group=1, num_experts=8, num_experts_per_token=2,
    linear_head_dim=16, linear_num_heads=3, linear_conv_kernel_dim=4, rms_norm_eps=1e-5,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, model_max_length=4096,
    tie_word_embeddings=False,
)  # fmt: skip

# name: (layers, K for KDA and M for MLA; d for dense and e for experts; overrides)
CASES = {
    "published-pattern": ("KKKMKKM", "deeeeee", {}),
    "two-layers-one-head": ("KM", "dd", dict(linear_num_heads=1, linear_head_dim=32)),
    "mla-first-no-moe": (
        "MKM",
        "ddd",
        dict(qk_rope_head_dim=4, kv_lora_rank=32, v_head_dim=12),
    ),
    "many-experts": (
        "KKM",
        "eee",
        dict(num_experts=24, num_experts_per_token=6, moe_intermediate_size=8,
             num_shared_experts=2, routed_scaling_factor=1.5),
    ),
    "groups": (
        "KMKK",
        "deee",
        dict(num_experts=16, num_expert_group=4, topk_group=2, num_experts_per_token=4,
             moe_renormalize=False, hidden_size=40),
    ),
    "query-rank": (
        "KKMM",
        "ddee",
        dict(q_lora_rank=24, linear_num_heads=5, linear_head_dim=24, num_attention_heads=4,
             num_key_value_heads=4, qk_nope_head_dim=20),
    ),
    "wide-heads": (
        "KKM",
        "dee",
        dict(hidden_size=64, linear_head_dim=64, linear_num_heads=2, kv_lora_rank=64,
             num_attention_heads=2, num_key_value_heads=2, qk_nope_head_dim=64,
             qk_rope_head_dim=16, v_head_dim=64),
    ),
    "short-taps": (
        "MKKM",
        "edde",
        dict(linear_conv_kernel_dim=2, num_experts_per_token=1, vocab_size=130,
             rms_norm_eps=1e-6),
    ),
}  # fmt: skip


def hf_config(case: str) -> KimiLinearConfig:
    mixers, ffns, overrides = CASES[case]
    return KimiLinearConfig(
        **BASE | overrides,
        num_hidden_layers=len(mixers),
        layer_types=["linear_attention" if m == "K" else "full_attention" for m in mixers],
        mlp_layer_types=["dense" if f == "d" else "sparse" for f in ffns],
    )


def tensors_of(model) -> list:
    return [*model.named_parameters(), *model.named_buffers()]


def randomize(model: KimiLinearForCausalLM, seed: int, gain=1.5) -> KimiLinearForCausalLM:
    """Weights under which every part matters: matrices keep their input's scale, norms are away
    from 1, decays reach from long memory to none, the router's choices are spread and its
    bias changes them, logits are a few units apart."""
    r = torch.Generator().manual_seed(seed)
    uniform = lambda p, a, b: a + (b - a) * torch.rand(p.shape, generator=r)
    normal = lambda p, std: std * torch.randn(p.shape, generator=r)
    with torch.no_grad():
        for name, p in tensors_of(model):
            if name.endswith("A_log"):
                p.copy_(uniform(p, 0.0, math.log(16)))
            elif name.endswith("dt_bias"):
                p.copy_(uniform(p, -7.0, 1.0))
            elif "norm" in name:
                p.copy_(uniform(p, 0.5, 1.5))
            elif name.endswith("e_score_correction_bias"):
                p.copy_(normal(p, 0.2))
            elif "conv1d" in name:
                p.copy_(normal(p, 0.7))
            elif "embed_tokens" in name:
                p.copy_(normal(p, 1.0))
            else:
                size = 3.0 if "lm_head" in name else gain
                p.copy_(normal(p, size * p.shape[-1] ** -0.5))
    return model


def hf_model(case: str, seed: int = 0, gain=1.5) -> KimiLinearForCausalLM:
    return randomize(KimiLinearForCausalLM(hf_config(case)).eval(), seed, gain)


def to_original_style(config: dict) -> dict:
    """config.json as transformers writes it, in the style of the published checkpoint."""
    config = dict(config)
    layers, ffns = config.pop("layer_types"), config.pop("mlp_layer_types")
    config["linear_attn_config"] = {
        "head_dim": config.pop("linear_head_dim"),
        "num_heads": config.pop("linear_num_heads"),
        "short_conv_kernel_size": config.pop("linear_conv_kernel_dim"),
        "kda_layers": [i + 1 for i, t in enumerate(layers) if t == "linear_attention"],
        "full_attn_layers": [i + 1 for i, t in enumerate(layers) if t == "full_attention"],
    }
    config["first_k_dense_replace"] = ffns.index("sparse") if "sparse" in ffns else len(ffns)
    assert "dense" not in ffns[config["first_k_dense_replace"] :]
    return config | {
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
        "mla_use_nope": True,
        "use_grouped_topk": True,
    }


def save(model, path: Path, *, original=False, shards=False, bf16=False) -> Path:
    """Write a checkpoint the way transformers does; `original` then rewrites config.json.

    With bf16 the model itself is rounded too, so that it stays the judge, and as in the
    published files A_log and dt_bias remain float32.
    """
    saved = model
    if bf16:
        saved = copy.deepcopy(model)
        for ours, theirs in zip(tensors_of(model), tensors_of(saved), strict=True):
            (name, p), (_, q) = ours, theirs
            if not name.endswith(("A_log", "dt_bias")):
                q.data = p.data.to(torch.bfloat16)
                p.data = q.data.float()
    saved.save_pretrained(path, max_shard_size="100KB" if shards else "5GB")
    if original:
        file = Path(path) / "config.json"
        file.write_text(json.dumps(to_original_style(json.loads(file.read_text()))))
    return path


def core_config(c: KimiLinearConfig) -> dict:
    """The fields of csrc/model/config.h, read from transformers' config object."""
    return dict(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, n_layers=c.num_hidden_layers,
        max_length=c.model_max_length,
        mixer=["kda" if t == "linear_attention" else "mla" for t in c.layer_types],
        ffn=["dense" if t == "dense" else "moe" for t in c.mlp_layer_types],
        kda_heads=c.linear_num_heads, kda_head_dim=c.linear_head_dim,
        conv_width=c.linear_conv_kernel_dim, gate="softplus", gate_lower_bound=-5.0,
        mla_heads=c.num_attention_heads, q_rank=c.q_lora_rank or 0, kv_rank=c.kv_lora_rank,
        nope_dim=c.qk_nope_head_dim, rope_dim=c.qk_rope_head_dim, v_dim=c.v_head_dim,
        q_norm_eps=1e-6, kv_norm_eps=1e-6, dense_inner=c.intermediate_size,
        n_experts=c.num_experts, top_k=c.num_experts_per_token,
        moe_inner=c.moe_intermediate_size, n_shared=c.num_shared_experts,
        groups=c.num_expert_group, top_groups=c.topk_group,
        score="sigmoid", routed_scaling=c.routed_scaling_factor, renormalize=c.moe_renormalize,
        rms_eps=c.rms_norm_eps, tied_embeddings=c.tie_word_embeddings,
    )  # fmt: skip


def greedy(model, ids, n: int) -> list[int]:
    """n greedy tokens, one after the other, from transformers with its cache."""
    tokens, past, feed = [], None, list(ids)
    with torch.no_grad():
        for _ in range(n):
            out = model(torch.tensor([feed]), past_key_values=past, use_cache=True)
            past, feed = out.past_key_values, [int(out.logits[0, -1].argmax())]
            tokens += feed
    return tokens


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint as float32, by its name in the file."""
    found = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {name: f.get_tensor(name).float().numpy() for name in f.keys()}
    return found


def hf_logits(model, ids) -> np.ndarray:
    """float32 [T, vocab] for one sequence."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0].float().numpy()


def relative_rms(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
