"""The model in plain NumPy float64: the executable specification. Not imported by default.

The names and the order of arguments are those of `kimi_linear.ops`, without what only concerns
where results go (`out`, `final_state`, `stream`). Slow on purpose: every function is its
formula. Start with `kda`, then `model`.
"""

from .kda import kda_chunked, kda_decode, kda_prefill, log_decay
from .linear import QuantizedWeight, linear, quantize, round_bf16
from .logprobs import log_softmax, token_logprobs
from .mla import (
    attend_absorbed,
    attend_plain,
    mla_decode,
    mla_prefill,
    pack_latents,
    unpack_latents,
)
from .model import Model, State
from .moe import mlp, moe_experts, moe_route
from .norm import gated_rms_norm, rms_norm
from .sample import Sampling, philox, sample, uniform
from .short_conv import short_conv, silu

__all__ = [
    "Model",
    "QuantizedWeight",
    "Sampling",
    "State",
    "attend_absorbed",
    "attend_plain",
    "gated_rms_norm",
    "kda_chunked",
    "kda_decode",
    "kda_prefill",
    "linear",
    "log_decay",
    "log_softmax",
    "mla_decode",
    "mla_prefill",
    "mlp",
    "moe_experts",
    "moe_route",
    "pack_latents",
    "philox",
    "quantize",
    "rms_norm",
    "round_bf16",
    "sample",
    "short_conv",
    "silu",
    "token_logprobs",
    "uniform",
    "unpack_latents",
]
