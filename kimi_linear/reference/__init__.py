"""The model in plain NumPy float64: the executable specification. Not imported by default.

The names and the order of arguments are those of `kimi_linear.ops`, without what only concerns
where results go (`out`, `final_state`, `stream`). Slow on purpose: every function is its
formula. Start with `kda`, then `model`.
"""

from .kda import kda_chunked, kda_decode, kda_prefill, log_decay
from .linear import QuantizedWeight, linear, quantize, round_bf16
from .mla import attend_absorbed, attend_plain, mla_decode, mla_prefill
from .moe import mlp, moe_experts, moe_route
from .norm import gated_rms_norm, rms_norm
from .short_conv import short_conv, silu

__all__ = [
    "QuantizedWeight",
    "attend_absorbed",
    "attend_plain",
    "gated_rms_norm",
    "kda_chunked",
    "kda_decode",
    "kda_prefill",
    "linear",
    "log_decay",
    "mla_decode",
    "mla_prefill",
    "mlp",
    "moe_experts",
    "moe_route",
    "quantize",
    "rms_norm",
    "round_bf16",
    "short_conv",
    "silu",
]
