"""config.json of a Kimi Linear model: read strictly, checked whole, never executed.

Two styles exist and both are read. The published checkpoints nest the KDA layer in
``linear_attn_config`` and count layers from 1; transformers' native class writes
``layer_types``, ``mlp_layer_types`` and ``linear_*``. Field names here are those of the
published style.

Missing keys are errors: the reference code's defaults describe another model. A key that would
change the results and that the runner does not implement is refused by name; what is known to
change nothing is ignored, and any other key is ignored with a note.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _tensors
from ._files import quote, read_small, strict_json
from .errors import ConfigError

MAX_BYTES = 1 << 20  # the published file has 4 KB
MAX_PARAMETERS = 1 << 42
LATENT_NORM_EPS = 1e-6  # kv_a_layernorm, q_a_layernorm: the reference code gives them no eps

# name: lowest and highest value. The upper ends only keep products of them far from 2^63.
_INTEGERS = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 16),
    "num_hidden_layers": (1, 512),
    "intermediate_size": (1, 1 << 20),
    "model_max_length": (1, (1 << 31) - 1),
    "num_attention_heads": (1, 1 << 12),
    "kv_lora_rank": (1, 1 << 14),
    "qk_nope_head_dim": (1, 1 << 10),
    "qk_rope_head_dim": (0, 1 << 10),
    "v_head_dim": (1, 1 << 10),
    "num_experts": (1, 1 << 14),
    "num_experts_per_token": (1, 256),
    "num_shared_experts": (0, 64),
    "moe_intermediate_size": (1, 1 << 18),
    "num_expert_group": (1, 1 << 14),
    "topk_group": (1, 1 << 14),
    "first_k_dense_replace": (0, 512),
    "moe_layer_freq": (1, 512),
}
_LINEAR_INTEGERS = {
    "head_dim": (1, 256),
    "num_heads": (1, 1 << 12),
    "short_conv_kernel_size": (1, 8),
}

FFN_KINDS = {"dense": "dense", "sparse": "moe"}
MIXER_KINDS = {"linear_attention": "kda", "full_attention": "mla"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttnConfig:
    """The KDA layers: K = V = `head_dim`; layer numbers count from 1."""

    head_dim: int
    num_heads: int
    short_conv_kernel_size: int
    kda_layers: tuple[int, ...]
    full_attn_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, (low, high) in _LINEAR_INTEGERS.items():
            check_integer(f"linear_attn_config.{name}", getattr(self, name), low, high)
        for name in ("kda_layers", "full_attn_layers"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple):
                raise wrong(f"linear_attn_config.{name}", "must be a list of integers", value)
            for layer in value:
                label = f"linear_attn_config.{name}: a layer (counted from 1)"
                check_integer(label, layer, 1, 512)
            if len(set(value)) != len(value):
                raise wrong(f"linear_attn_config.{name}", "must name a layer once", value)
            object.__setattr__(self, name, tuple(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiLinearConfig:
    """The shape of a Kimi Linear model. Every field is checked, alone and against the others.

    Raises ConfigError naming the key, the rule and the value. Source: spec of the published
    ``moonshotai/Kimi-Linear-48B-A3B-Instruct`` config.json.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    model_max_length: int
    rms_norm_eps: float
    tie_word_embeddings: bool

    linear_attn_config: LinearAttnConfig
    gate_lower_bound: float | None = None  # None: -exp(A_log) softplus(.), the 48B's gate

    num_attention_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int  # shared by the heads and, in spite of the name, never rotated
    v_head_dim: int

    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    moe_intermediate_size: int
    moe_router_activation_func: str
    moe_renormalize: bool
    routed_scaling_factor: float
    num_expert_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int
    moe_layer_freq: int = 1
    mlp_layer_types: tuple[str, ...] | None = None  # where the two above cannot say it

    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            check_integer(name, getattr(self, name), low, high)
        if self.q_lora_rank is not None:
            check_integer("q_lora_rank", self.q_lora_rank, 1, 1 << 14)
        for name in ("tie_word_embeddings", "moe_renormalize"):
            if not isinstance(getattr(self, name), bool):
                raise wrong(name, "must be true or false", getattr(self, name))
        self._set("rms_norm_eps", check_number("rms_norm_eps", self.rms_norm_eps, 1e-12, 0.1))
        scaling = check_number("routed_scaling_factor", self.routed_scaling_factor, 1e-6, 1e6)
        self._set("routed_scaling_factor", scaling)
        if self.gate_lower_bound is not None:
            bound = check_number("gate_lower_bound", self.gate_lower_bound, -1e4, -1e-4)
            self._set("gate_lower_bound", bound)
        if self.moe_router_activation_func not in ("sigmoid", "softmax"):
            rule = "must be 'sigmoid' or 'softmax'"
            raise wrong("moe_router_activation_func", rule, self.moe_router_activation_func)
        self._check_layers()
        self._check_experts()
        self._check_tokens()
        if self.parameter_count() > MAX_PARAMETERS:
            raise ConfigError(
                f"the dimensions together: must give at most 2^42 parameters, "
                f"got {self.parameter_count():,}"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_layers(self) -> None:
        linear, n = self.linear_attn_config, self.num_hidden_layers
        if not isinstance(linear, LinearAttnConfig):
            raise wrong("linear_attn_config", "must be an object", linear)
        kda, full = set(linear.kda_layers), set(linear.full_attn_layers)
        if both := sorted(kda & full):
            raise ConfigError(
                f"linear_attn_config: kda_layers and full_attn_layers must not overlap, "
                f"both name {quote(both)}"
            )
        if kda | full != set(range(1, n + 1)):
            missing = sorted(set(range(1, n + 1)) - kda - full)
            beyond = sorted((kda | full) - set(range(1, n + 1)))
            raise ConfigError(
                f"linear_attn_config: kda_layers and full_attn_layers must together name "
                f"layers 1..{n} (counted from 1); missing {quote(missing)}, "
                f"beyond {quote(beyond)}"
            )
        if self.mlp_layer_types is not None:
            kinds = check_kinds("mlp_layer_types", self.mlp_layer_types, FFN_KINDS, n)
            self._set("mlp_layer_types", kinds)

    def _check_experts(self) -> None:
        groups, experts = self.num_expert_group, self.num_experts
        if experts % groups:
            rule = f"must be a multiple of num_expert_group ({groups})"
            raise wrong("num_experts", rule, experts)
        if self.topk_group > groups:
            rule = f"must be at most num_expert_group ({groups})"
            raise wrong("topk_group", rule, self.topk_group)
        limit = experts // groups * self.topk_group
        if self.num_experts_per_token > limit:
            rule = f"must be at most the {limit} experts that it can choose from"
            raise wrong("num_experts_per_token", rule, self.num_experts_per_token)

    def _check_tokens(self) -> None:
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0, self.vocab_size - 1)
        eos = self.eos_token_id
        if isinstance(eos, list | tuple):
            self._set("eos_token_id", tuple(eos))
        for token in self.eos_token_ids:
            check_integer("eos_token_id", token, 0, self.vocab_size - 1)

    # ---- what the fields say -------------------------------------------------------------

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Of each layer: "linear_attention" (KDA) or "full_attention" (MLA)."""
        kda = set(self.linear_attn_config.kda_layers)
        return tuple(
            "linear_attention" if layer in kda else "full_attention"
            for layer in range(1, self.num_hidden_layers + 1)
        )

    @property
    def ffn_types(self) -> tuple[str, ...]:
        """Of each layer: "dense" or "sparse" (mixture of experts)."""
        if self.mlp_layer_types is not None:
            return self.mlp_layer_types
        first, every = self.first_k_dense_replace, self.moe_layer_freq
        return tuple(
            "sparse" if layer >= first and layer % every == 0 else "dense"
            for layer in range(self.num_hidden_layers)
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple, whatever its form."""
        eos = self.eos_token_id
        return eos if isinstance(eos, tuple) else () if eos is None else (eos,)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint, as the published one stores them."""
        return _tensors.tensor_shapes(self)

    def parameter_count(self) -> int:
        """Parameters in all: 49,122,681,728 for the published model."""
        return _tensors.parameter_count(self)

    # ---- forms ---------------------------------------------------------------------------

    @classmethod
    def from_dir(cls, path: str | Path) -> "KimiLinearConfig":
        """Read ``config.json`` of a model directory.

        Raises ConfigError starting with the file's name; OSError where it cannot be opened.
        """
        file = Path(path) / "config.json"
        data = strict_json(read_small(file, MAX_BYTES, ConfigError), str(file), ConfigError)
        try:
            return cls.from_dict(data)
        except ConfigError as e:
            raise ConfigError(f"{file}: {e}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "KimiLinearConfig":
        """From a parsed config.json of either style."""
        from ._config_read import arguments

        return cls(**arguments(data))

    @classmethod
    def kimi_linear_48b(cls) -> "KimiLinearConfig":
        """Kimi-Linear-48B-A3B, Base and Instruct."""
        full = (4, 8, 12, 16, 20, 24, 27)
        return cls(
            vocab_size=163840, hidden_size=2304, num_hidden_layers=27, intermediate_size=9216,
            model_max_length=1 << 20, rms_norm_eps=1e-5, tie_word_embeddings=False,
            linear_attn_config=LinearAttnConfig(
                head_dim=128, num_heads=32, short_conv_kernel_size=4,
                kda_layers=tuple(i for i in range(1, 28) if i not in full),
                full_attn_layers=full,
            ),
            num_attention_heads=32, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
            v_head_dim=128, num_experts=256, num_experts_per_token=8, num_shared_experts=1,
            moe_intermediate_size=1024, moe_router_activation_func="sigmoid",
            moe_renormalize=True, routed_scaling_factor=2.446, first_k_dense_replace=1,
            bos_token_id=163584, eos_token_id=163586, pad_token_id=163839,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The object of a config.json in the published style; `from_dict` reads it back."""
        data = dataclasses.asdict(self)
        del data["notes"]
        for name in ("gate_lower_bound", "mlp_layer_types"):
            if data[name] is None:
                del data[name]
        fixed = {
            "architectures": ["KimiLinearForCausalLM"],
            "model_type": "kimi_linear",
            "hidden_act": "silu",
            "mla_use_nope": True,
            "num_key_value_heads": self.num_attention_heads,
            "use_grouped_topk": True,
        }
        return fixed | data

    def to_core(self) -> dict[str, Any]:
        """The fields of the core's ``kl_config`` (csrc/model/config.h) by name."""
        linear = self.linear_attn_config
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "n_layers": self.num_hidden_layers,
            "max_length": self.model_max_length,
            "mixer": [MIXER_KINDS[kind] for kind in self.layer_types],
            "ffn": [FFN_KINDS[kind] for kind in self.ffn_types],
            "kda_heads": linear.num_heads,
            "kda_head_dim": linear.head_dim,
            "conv_width": linear.short_conv_kernel_size,
            "gate": "softplus" if self.gate_lower_bound is None else "bounded",
            "gate_lower_bound": self.gate_lower_bound or 0.0,
            "mla_heads": self.num_attention_heads,
            "q_rank": self.q_lora_rank or 0,
            "kv_rank": self.kv_lora_rank,
            "nope_dim": self.qk_nope_head_dim,
            "rope_dim": self.qk_rope_head_dim,
            "v_dim": self.v_head_dim,
            "q_norm_eps": LATENT_NORM_EPS,
            "kv_norm_eps": LATENT_NORM_EPS,
            "dense_inner": self.intermediate_size,
            "n_experts": self.num_experts,
            "top_k": self.num_experts_per_token,
            "moe_inner": self.moe_intermediate_size,
            "n_shared": self.num_shared_experts,
            "groups": self.num_expert_group,
            "top_groups": self.topk_group,
            "score": self.moe_router_activation_func,
            "routed_scaling": self.routed_scaling_factor,
            "renormalize": self.moe_renormalize,
            "rms_eps": self.rms_norm_eps,
            "tied_embeddings": self.tie_word_embeddings,
        }


# ---- checks, shared with the reader -------------------------------------------------------


def check_kinds(name: str, value: Any, allowed: dict[str, str], n: int) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or len(value) != n:
        raise wrong(name, f"must be a list with one entry for each of {n} layers", value)
    for kind in value:
        if not isinstance(kind, str) or kind not in allowed:
            raise wrong(name, f"entries must be {' or '.join(map(repr, allowed))}", kind)
    return tuple(value)


def check_integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(name, f"must be an integer in {low}..{high}", value)
    return value


def check_number(name: str, value: Any, low: float, high: float) -> float:
    bad = isinstance(value, bool) or not isinstance(value, int | float)
    if bad or not low <= value <= high:  # NaN fails too
        raise wrong(name, f"must be a number in [{low:g}, {high:g}]", value)
    return float(value)


def wrong(name: str, rule: str, value: Any) -> ConfigError:
    return ConfigError(f"{name}: {rule}, got {quote(value)}")
