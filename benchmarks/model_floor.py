"""What a model must move and compute at the least: the floors of bench_model.py."""

import math

from kimi_linear.config import KimiLinearConfig

F32 = ("norm.weight", "A_log", "dt_bias", "conv1d.weight", ".gate.weight", "correction_bias")
PLAIN = (".b_proj.", ".f_a_proj.", ".g_a_proj.", ".kv_b_proj.", "embed_tokens.")  # in bf16
BITS = {"f32": (32, 0), "bf16": (16, 0), "int8": (8, 64), "fp8": (8, 64), "int4": (4, 32)}


def stored_bytes(name: str, shape: tuple[int, ...], dtype: str) -> int:
    """Of a tensor as a model holds it (csrc/base/weight.h): groups of columns share a scale."""
    if name.endswith(F32):
        return 4 * math.prod(shape)
    if any(part in name for part in PLAIN):
        dtype = "f32" if dtype == "f32" else "bf16"
    bits, group = BITS[dtype]
    rows, cols = math.prod(shape[:-1]), shape[-1]
    if group == 0:
        return rows * cols * bits // 8
    groups = -(-cols // group)
    return rows * groups * (group * bits // 8 + 2)


def used_experts(config: KimiLinearConfig, tokens: int) -> float:
    """The share of a layer's experts that so many tokens use, each choosing evenly."""
    return 1 - (1 - config.num_experts_per_token / config.num_experts) ** tokens


def weight_bytes(config: KimiLinearConfig, dtype: str, tokens: int | None = None) -> float:
    """All weights, or those that a step of so many tokens reads: of the embedding its rows, of
    the experts the chosen ones."""
    total = 0.0
    for name, shape in config.tensor_shapes().items():
        share = 1.0
        if tokens is not None and "embed_tokens" in name and not config.tie_word_embeddings:
            share = min(1.0, tokens / config.vocab_size)
        elif tokens is not None and ".experts." in name:
            share = used_experts(config, tokens)
        total += share * stored_bytes(name, shape, dtype)
    return total


def layers(config: KimiLinearConfig) -> tuple[int, int]:
    """How many with KDA, how many with MLA."""
    n_kda = config.layer_types.count("linear_attention")
    return n_kda, config.num_hidden_layers - n_kda


def decode_bytes(config: KimiLinearConfig, dtype: str, batch: int, context: int) -> float:
    """One token of each sequence: weights, KDA states in and out, the latents of its context."""
    n_kda, n_mla = layers(config)
    linear, act = config.linear_attn_config, 4 if dtype == "f32" else 2
    states = 2 * 4 * linear.num_heads * linear.head_dim**2
    latents = act * (config.kv_lora_rank + config.qk_rope_head_dim) * context
    return weight_bytes(config, dtype, batch) + batch * (n_kda * states + n_mla * latents)


def active_parameters(config: KimiLinearConfig) -> float:
    """Multiplied with every token of a prompt: without embedding and lm_head, of the experts
    the chosen ones."""
    share = config.num_experts_per_token / config.num_experts
    return sum(
        math.prod(shape) * (share if ".experts." in name else 1)
        for name, shape in config.tensor_shapes().items()
        if "embed_tokens" not in name and "lm_head" not in name
    )


def prefill_flops(config: KimiLinearConfig, tokens: int) -> float:
    """Products with weights, causal attention on expanded keys and values, and of KDA what any
    chunk size needs."""
    n_kda, n_mla = layers(config)
    linear = config.linear_attn_config
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = config.num_attention_heads * widths * tokens * (tokens + 1)
    kda = 6 * linear.num_heads * linear.head_dim**2 * tokens
    return 2 * active_parameters(config) * tokens + n_mla * attention + n_kda * kda


def decode_floor(rates, config, dtype, batch, context) -> float:  # noqa: ANN001
    """Seconds of a step."""
    return decode_bytes(config, dtype, batch, context) / rates[0]


def prefill_floor(rates, config, dtype, tokens) -> float:  # noqa: ANN001
    """Seconds of a prompt: its flops, or reading the weights once."""
    flops = prefill_flops(config, tokens) / rates[1]
    return max(flops, weight_bytes(config, dtype, tokens) / rates[0])
