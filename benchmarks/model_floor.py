"""What a model must move and compute at the least: the floors of bench_model.py."""

import math
from typing import NamedTuple

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


def read_share(config: KimiLinearConfig, name: str, tokens: int) -> float:
    """Of a tensor, what a step of so many tokens reads."""
    if "embed_tokens" in name and not config.tie_word_embeddings:
        return min(1.0, tokens / config.vocab_size)
    return used_experts(config, tokens) if ".experts." in name else 1.0


def weight_bytes(config: KimiLinearConfig, dtype: str, tokens: int | None = None) -> float:
    """All weights, or those that a step of so many tokens reads: of the embedding its rows, of
    the experts the chosen ones."""
    return sum(
        stored_bytes(name, shape, dtype)
        * (1.0 if tokens is None else read_share(config, name, tokens))
        for name, shape in config.tensor_shapes().items()
    )


def layers(config: KimiLinearConfig) -> tuple[int, int]:
    """How many with KDA, how many with MLA."""
    n_kda = config.layer_types.count("linear_attention")
    return n_kda, config.num_hidden_layers - n_kda


def latent_row_bytes(config: KimiLinearConfig, dtype: str, kv_cache_dtype: str) -> int:
    """Of a token in an MLA layer. In 8 bits (csrc/base/latents.h) the channels that are normalised
    have a byte each, 128 of them a float32 scale, the others two; each part has whole 16 bytes."""
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    if kv_cache_dtype == "fp8":
        return sum(-(-n // 16) * 16 for n in (rank, 2 * rope, 4 * -(-rank // 128)))
    return (4 if dtype == "f32" else 2) * (rank + rope)


class Step(NamedTuple):
    """One token of each of `batch` sequences."""

    config: KimiLinearConfig
    dtype: str
    batch: int
    context: int
    skewed: bool = False  # the router's: all tokens have the same experts
    kv_cache_dtype: str = "auto"

    def tensor_bytes(self, name: str, shape: tuple[int, ...]) -> float:
        """Of a weight, those that are read: of the experts the chosen ones."""
        tokens = 1 if self.skewed and ".experts." in name else self.batch
        return read_share(self.config, name, tokens) * stored_bytes(name, shape, self.dtype)

    def state_bytes(self) -> float:
        """KDA states in and out."""
        linear = self.config.linear_attn_config
        return 2 * 4 * self.batch * layers(self.config)[0] * linear.num_heads * linear.head_dim**2

    def latent_bytes(self) -> float:
        rows = self.batch * layers(self.config)[1] * self.context
        return rows * latent_row_bytes(self.config, self.dtype, self.kv_cache_dtype)

    def bytes(self) -> float:
        weights = sum(self.tensor_bytes(*t) for t in self.config.tensor_shapes().items())
        return weights + self.state_bytes() + self.latent_bytes()


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


def prefill_floor(rates, config, dtype, tokens) -> float:  # noqa: ANN001
    """Seconds of a prompt: its flops, or reading the weights once."""
    flops = prefill_flops(config, tokens) / rates[1]
    return max(flops, weight_bytes(config, dtype, tokens) / rates[0])
