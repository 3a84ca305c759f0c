"""The two styles of config.json, brought to the fields of KimiLinearConfig.

The published style nests the KDA layer in ``linear_attn_config``; transformers' native class
writes ``layer_types`` and ``linear_*`` and renames others. A file that says a thing twice must
agree with itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ._files import quote
from .config import (
    FFN_KINDS,
    MIXER_KINDS,
    KimiLinearConfig,
    LinearAttnConfig,
    check_integer,
    check_kinds,
    wrong,
)
from .errors import ConfigError

# What transformers' native class calls by other names.
_RENAMED = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
}
_LINEAR_RENAMED = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
# Keys that would change the results: the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mla_use_nope": (True,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "use_full_rank_gate": (None, False),
    "attn_res_block_size": (None, 0),
    "routed_expert_hidden_size": (None,),
    "mla_use_output_gate": (None, False),
    "allow_neg_eigval": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "swiglu_limit": (None,),
}
# head_dim is 72 in the published file and used by nothing. auto_map names code; never imported.
_INERT = {
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "dtype", "head_dim",
    "initializer_range", "model_type", "output_router_logits", "pretraining_tp", "qk_head_dim",
    "rope_theta", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """KimiLinearConfig's arguments from a parsed config.json; raises ConfigError."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"must be a JSON object, found {type(data).__name__}")
    if data.get("model_type") != "kimi_linear":
        raise wrong("model_type", "must be 'kimi_linear'", data.get("model_type"))
    rest = _renamed(data, _RENAMED, "")
    native = rest.get("linear_attn_config") is None
    _refuse_unsupported(rest, native)

    fields = {f.name: f for f in dataclasses.fields(KimiLinearConfig) if f.name != "notes"}
    found = {name: rest.pop(name) for name in fields if name in rest}
    found["linear_attn_config"] = _linear(found, rest)
    if native:
        found.setdefault("moe_router_activation_func", "sigmoid")  # the class has no other
    if rest.pop("use_grouped_topk", True) is False:
        found["num_expert_group"] = found["topk_group"] = 1
    _simplify_ffn_types(found)
    for name, spec in fields.items():
        if name not in found and spec.default is dataclasses.MISSING:
            raise ConfigError(f"{name}: must be given, it is missing")
    heads = rest.pop("num_key_value_heads", None)
    if heads not in (None, found["num_attention_heads"]):
        raise wrong("num_key_value_heads", "must equal num_attention_heads", heads)
    return found | {"notes": _notes(rest)}


def _notes(rest: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if rest.pop("num_nextn_predict_layers", 0):
        notes.append("num_nextn_predict_layers: the extra prediction layers are not run")
    unknown = sorted(k for k in rest if k not in _INERT)
    if unknown:
        notes.append(f"keys ignored: {', '.join(quote(k, 40) for k in unknown[:20])}")
    return tuple(notes)


def _renamed(data: Mapping[str, Any], names: dict[str, str], prefix: str) -> dict[str, Any]:
    """`data` under the published names; a key given under two names must agree."""
    rest = {k: v for k, v in data.items() if k not in names}
    for old, new in names.items():
        if old not in data:
            continue
        if new in rest and rest[new] != data[old]:
            raise wrong(f"{prefix}{old}", f"must equal {new} ({quote(rest[new])})", data[old])
        rest[new] = data[old]
    return rest


def _refuse_unsupported(rest: dict[str, Any], native: bool) -> None:
    """Take the keys of _NEUTRAL out of `rest`, refusing any that would change the results."""
    for name, allowed in _NEUTRAL.items():
        if name not in rest:
            if name == "hidden_act" or (name == "mla_use_nope" and not native):
                raise ConfigError(f"{name}: must be given, it is missing")
            continue
        value = rest.pop(name)
        if not any(value == a and type(value) is type(a) for a in allowed):
            values = " or ".join(_json_word(a) for a in allowed)
            raise wrong(name, f"must be {values}: nothing else is implemented", value)


def _json_word(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, repr(value))


def _linear(found: dict[str, Any], rest: dict[str, Any]) -> LinearAttnConfig:
    """The KDA layers from ``linear_attn_config``, or from ``linear_*`` and ``layer_types``."""
    flat = {k: rest.pop(k) for k in _LINEAR_RENAMED if k in rest}
    values = _renamed(flat, _LINEAR_RENAMED, "")
    prefix = ""
    nested = found.get("linear_attn_config")
    if nested is not None:
        if not isinstance(nested, Mapping):
            raise wrong("linear_attn_config", "must be an object", nested)
        prefix = "linear_attn_config."
        values = _renamed({**flat, **nested}, _LINEAR_RENAMED, "")
        if "gate_lower_bound" in values:
            bound = values.pop("gate_lower_bound")
            if found.setdefault("gate_lower_bound", bound) != bound:
                raise wrong(f"{prefix}gate_lower_bound", "must equal gate_lower_bound", bound)
        _refuse_unsupported_linear(values)
    kinds = rest.pop("layer_types", None)
    n = check_integer("num_hidden_layers", _need(found, "num_hidden_layers"), 1, 512)
    if kinds is not None:
        kinds = check_kinds("layer_types", kinds, MIXER_KINDS, n)
        kda = tuple(i + 1 for i, kind in enumerate(kinds) if kind == "linear_attention")
        if sorted(values.setdefault("kda_layers", kda)) != sorted(kda):
            raise wrong("layer_types", f"must agree with {prefix}kda_layers", kinds)
    layers = values.get("kda_layers")
    if layers is None:
        raise ConfigError(
            "linear_attn_config.kda_layers or layer_types: must be given, both are missing"
        )
    if "full_attn_layers" not in values and isinstance(layers, list | tuple):
        values["full_attn_layers"] = tuple(i for i in range(1, n + 1) if i not in layers)
    for old, name in _LINEAR_RENAMED.items():
        if name not in values:
            label = f"{prefix}{name}" if prefix else old
            raise ConfigError(f"{label}: must be given, it is missing")
    return LinearAttnConfig(**values)


def _refuse_unsupported_linear(values: dict[str, Any]) -> None:
    """Every key in there shapes the layer: what is not known cannot be run."""
    for name in ("use_full_rank_gate", "allow_neg_eigval"):
        if values.pop(name, None) not in (None, False):
            raise wrong(f"linear_attn_config.{name}", "must be false", True)
    known = {f.name for f in dataclasses.fields(LinearAttnConfig)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"linear_attn_config.{unknown[0]}: not implemented, must be absent")


def _simplify_ffn_types(found: dict[str, Any]) -> None:
    """Say `mlp_layer_types` as `first_k_dense_replace` where that is enough."""
    kinds = found.get("mlp_layer_types")
    if kinds is None:
        return
    kinds = check_kinds("mlp_layer_types", kinds, FFN_KINDS, found["num_hidden_layers"])
    first = next((i for i, kind in enumerate(kinds) if kind == "sparse"), len(kinds))
    found["first_k_dense_replace"], found["moe_layer_freq"] = first, 1
    found["mlp_layer_types"] = kinds if "dense" in kinds[first:] else None


def _need(found: dict[str, Any], name: str) -> Any:
    if name not in found:
        raise ConfigError(f"{name}: must be given, it is missing")
    return found[name]
