"""Names and shapes of a checkpoint's tensors, as the published files store them.

One table serves the writer of test checkpoints, the parameter count and the documentation; the
runner binds the same names in csrc/model. Source: the published checkpoint's index.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import KimiLinearConfig

Shape = tuple[int, ...]
EXPERT = "{expert}"  # stands for the number of a routed expert in a name
FLOAT32 = ("A_log", "dt_bias")  # the last part of the names that stay float32 in a bf16 file


def tensor_shapes(config: "KimiLinearConfig") -> dict[str, Shape]:
    """Name -> shape of every tensor: 20,493 of them for the published model."""
    shapes = dict(_outer(config))
    for n, (mixer, ffn) in enumerate(zip(config.layer_types, config.ffn_types, strict=True)):
        for name, shape in _layer(config, mixer, ffn):
            copies = config.num_experts if EXPERT in name else 1
            for e in range(copies):
                shapes[f"model.layers.{n}.{name.replace(EXPERT, str(e))}"] = shape
    return shapes


def parameter_count(config: "KimiLinearConfig") -> int:
    """Elements of all tensors, without listing them."""
    total = sum(math.prod(shape) for _, shape in _outer(config))
    layers = Counter(zip(config.layer_types, config.ffn_types, strict=True))
    for (mixer, ffn), count in layers.items():
        for name, shape in _layer(config, mixer, ffn):
            copies = config.num_experts if EXPERT in name else 1
            total += count * copies * math.prod(shape)
    return total


def _outer(c: "KimiLinearConfig") -> Iterator[tuple[str, Shape]]:
    yield "model.embed_tokens.weight", (c.vocab_size, c.hidden_size)
    yield "model.norm.weight", (c.hidden_size,)
    if not c.tie_word_embeddings:
        yield "lm_head.weight", (c.vocab_size, c.hidden_size)


def _layer(c: "KimiLinearConfig", mixer: str, ffn: str) -> Iterator[tuple[str, Shape]]:
    yield "input_layernorm.weight", (c.hidden_size,)
    yield from _kda(c) if mixer == "linear_attention" else _mla(c)
    yield "post_attention_layernorm.weight", (c.hidden_size,)
    if ffn == "dense":
        yield from _swiglu("mlp", c.hidden_size, c.intermediate_size)
    else:
        yield from _moe(c)


def _kda(c: "KimiLinearConfig") -> Iterator[tuple[str, Shape]]:
    linear, d = c.linear_attn_config, c.hidden_size
    heads, rank = linear.num_heads, linear.head_dim
    channels = heads * linear.head_dim
    for x in "qkv":
        yield f"self_attn.{x}_proj.weight", (channels, d)
        yield f"self_attn.{x}_conv1d.weight", (channels, 1, linear.short_conv_kernel_size)
    yield "self_attn.A_log", (1, 1, heads, 1)
    yield "self_attn.dt_bias", (channels,)
    for gate in "fg":
        yield f"self_attn.{gate}_a_proj.weight", (rank, d)
        yield f"self_attn.{gate}_b_proj.weight", (channels, rank)
    yield "self_attn.b_proj.weight", (heads, d)
    yield "self_attn.o_norm.weight", (linear.head_dim,)
    yield "self_attn.o_proj.weight", (d, channels)


def _mla(c: "KimiLinearConfig") -> Iterator[tuple[str, Shape]]:
    d, heads, rank = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    queries = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    if c.q_lora_rank is None:
        yield "self_attn.q_proj.weight", (queries, d)
    else:
        yield "self_attn.q_a_proj.weight", (c.q_lora_rank, d)
        yield "self_attn.q_a_layernorm.weight", (c.q_lora_rank,)
        yield "self_attn.q_b_proj.weight", (queries, c.q_lora_rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", (rank + c.qk_rope_head_dim, d)
    yield "self_attn.kv_a_layernorm.weight", (rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (c.qk_nope_head_dim + c.v_head_dim), rank)
    yield "self_attn.o_proj.weight", (d, heads * c.v_head_dim)


def _moe(c: "KimiLinearConfig") -> Iterator[tuple[str, Shape]]:
    d, inner = c.hidden_size, c.moe_intermediate_size
    yield "block_sparse_moe.gate.weight", (c.num_experts, d)
    yield "block_sparse_moe.gate.e_score_correction_bias", (c.num_experts,)
    for w, shape in (("w1", (inner, d)), ("w3", (inner, d)), ("w2", (d, inner))):
        yield f"block_sparse_moe.experts.{EXPERT}.{w}.weight", shape
    if c.num_shared_experts:
        shared = inner * c.num_shared_experts
        yield from _swiglu("block_sparse_moe.shared_experts", d, shared)


def _swiglu(prefix: str, d: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (inner, d)
    yield f"{prefix}.up_proj.weight", (inner, d)
    yield f"{prefix}.down_proj.weight", (d, inner)
