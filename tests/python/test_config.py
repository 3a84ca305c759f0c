"""config.json: both styles, every rule, and what a hostile file gets."""

import dataclasses
import json
import os
import sys

import pytest

import kimi_linear as kl
from kimi_linear.testing import config_json, tiny_config


def original(**changes):
    """The tiny model's config.json as a dict; a value of ... removes the key."""
    data = config_json(tiny_config(), "original") | changes
    return {k: v for k, v in data.items() if v is not ...}


def native(**changes):
    data = config_json(tiny_config(), "native") | changes
    return {k: v for k, v in data.items() if v is not ...}


def linear(**changes):
    nested = dict(original()["linear_attn_config"]) | changes
    return {"linear_attn_config": {k: v for k, v in nested.items() if v is not ...}}


def read(data):
    return kl.KimiLinearConfig.from_dict(data)


def test_the_published_model_has_the_published_size():
    config = kl.KimiLinearConfig.kimi_linear_48b()
    assert config.parameter_count() == 49_122_681_728
    assert len(config.tensor_shapes()) == 20_493
    mla = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert mla == [3, 7, 11, 15, 19, 23, 26]
    assert config.ffn_types == ("dense",) + ("sparse",) * 26


def test_parameter_count_is_the_sum_of_the_tensors():
    for config in (tiny_config(), tiny_config(q_lora_rank=24, tie_word_embeddings=True)):
        sizes = [_product(shape) for shape in config.tensor_shapes().values()]
        assert config.parameter_count() == sum(sizes)


def _product(shape):
    total = 1
    for extent in shape:
        total *= extent
    return total


def test_both_styles_say_the_same():
    assert read(original()) == read(native()) == tiny_config()
    config = tiny_config(num_hidden_layers=7, first_k_dense_replace=2)
    assert read(config_json(config, "native")) == config


def test_layer_types_may_follow_no_rule():
    kinds = ["sparse", "dense", "dense", "sparse"]
    config = read(native(mlp_layer_types=kinds))
    assert config.ffn_types == tuple(kinds)
    assert read(config.to_dict()) == config
    assert config.to_core()["ffn"] == ["moe", "dense", "dense", "moe"]


def test_layer_frequency_of_the_original_style():
    config = read(original(moe_layer_freq=2, first_k_dense_replace=1))
    assert config.ffn_types == ("dense", "dense", "sparse", "dense")


def test_written_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.KimiLinearConfig(num_hidden_layers=6, q_lora_rank=32)
    theirs.save_pretrained(tmp_path)
    ours = kl.KimiLinearConfig.from_dir(tmp_path)
    assert ours.layer_types == tuple(theirs.layer_types)
    assert ours.ffn_types == tuple(theirs.mlp_layer_types)
    assert (ours.q_lora_rank, ours.num_experts, ours.num_experts_per_token) == (32, 256, 8)
    assert ours.model_max_length == theirs.max_position_embeddings
    assert ours.notes == ()


def test_core_config_names_every_field_of_the_struct():
    core = tiny_config(gate_lower_bound=-5.0).to_core()
    assert core["mixer"] == ["kda", "kda", "kda", "mla"]
    assert (core["gate"], core["gate_lower_bound"]) == ("bounded", -5.0)
    assert tiny_config().to_core()["gate"] == "softplus"
    assert core["q_rank"] == 0 and core["kv_norm_eps"] == 1e-6


def test_frozen_hashable_and_validated_when_built_directly():
    config = tiny_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 1
    assert hash(config) == hash(tiny_config())
    with pytest.raises(kl.ConfigError, match=r"hidden_size: .* in 1..65536, got 0"):
        tiny_config(hidden_size=0)


REQUIRED = [
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "model_max_length",
    "rms_norm_eps", "tie_word_embeddings", "num_attention_heads", "kv_lora_rank", "hidden_act",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_experts",
    "num_experts_per_token",
    "num_shared_experts", "moe_intermediate_size", "moe_router_activation_func",
    "moe_renormalize", "routed_scaling_factor", "first_k_dense_replace", "mla_use_nope",
]  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_key_is_named(name):
    with pytest.raises(kl.ConfigError, match=f"{name}: must be given"):
        read(original(**{name: ...}))


@pytest.mark.parametrize("name", ["head_dim", "num_heads", "short_conv_kernel_size"])
def test_a_missing_key_of_the_kda_layer_is_named(name):
    with pytest.raises(kl.ConfigError, match=f"linear_attn_config.{name}: must be given"):
        read(original(**linear(**{name: ...})))


def test_missing_layer_lists_are_named():
    with pytest.raises(kl.ConfigError, match="kda_layers or layer_types: must be given"):
        read(original(**linear(kda_layers=...)))
    with pytest.raises(kl.ConfigError, match="layer_types: must be given"):
        read(native(layer_types=...))


BAD_VALUES = [
    ("vocab_size", True), ("vocab_size", 0), ("vocab_size", -5), ("vocab_size", 320.0),
    ("vocab_size", "320"), ("vocab_size", None), ("vocab_size", 1 << 40),
    ("hidden_size", 1 << 63),
    ("hidden_size", 10**400), ("num_hidden_layers", 513), ("num_hidden_layers", [4]),
    ("model_max_length", 1 << 31), ("num_experts_per_token", 0), ("num_shared_experts", -1),
    ("rms_norm_eps", 0), ("rms_norm_eps", "1e-5"), ("rms_norm_eps", True),
    ("rms_norm_eps", 1e400),
    ("rms_norm_eps", float("nan")), ("routed_scaling_factor", -1.0),
    ("routed_scaling_factor", float("inf")), ("routed_scaling_factor", 10**400),
    ("gate_lower_bound", 0.0), ("gate_lower_bound", 5), ("gate_lower_bound", float("nan")),
    ("tie_word_embeddings", 0), ("tie_word_embeddings", "false"), ("moe_renormalize", None),
    ("moe_router_activation_func", "relu"), ("q_lora_rank", 0), ("q_lora_rank", True),
    ("bos_token_id", 320), ("eos_token_id", -1), ("eos_token_id", [302, 320]),
    ("eos_token_id", "x"), ("pad_token_id", 1.5), ("num_key_value_heads", 1),
    ("linear_attn_config", None), ("linear_attn_config", []), ("model_type", "llama"),
    ("mlp_layer_types", ["dense"]), ("mlp_layer_types", ["dense", "moe", "moe", "moe"]),
]  # fmt: skip


@pytest.mark.parametrize("name,value", BAD_VALUES)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(kl.ConfigError, match=name):
        read(original(**{name: value}))


@pytest.mark.parametrize(
    "changes,message",
    [
        (linear(kda_layers=[0, 1, 2], full_attn_layers=[3]), "counted from 1"),
        (linear(kda_layers=[1, 2, 3], full_attn_layers=[3, 4]), r"must not overlap.*\[3\]"),
        (linear(kda_layers=[1, 2], full_attn_layers=[4]), r"missing \[3\]"),
        (linear(kda_layers=[1, 2, 3], full_attn_layers=[5]), r"beyond \[5\]"),
        (linear(kda_layers=[1, 1, 2, 3]), "once"),
        (linear(kda_layers=[1, 2, True]), "integer"),
        (linear(kda_layers="123"), "list"),
        (linear(kda_layers=list(range(1, 10**5))), "512"),
        (linear(head_dim=True), "linear_attn_config.head_dim"),
        (linear(num_heads=0), "linear_attn_config.num_heads"),
        (linear(num_v_heads=4), "linear_attn_config.num_v_heads"),
        (linear(use_full_rank_gate=True), "use_full_rank_gate"),
        ({"num_experts": 2, "num_experts_per_token": 3}, "num_experts_per_token"),
        ({"num_expert_group": 3}, "multiple of num_expert_group"),
        ({"topk_group": 2}, "topk_group"),
        ({"num_expert_group": 4, "topk_group": 1, "num_experts_per_token": 3}, "the 2 experts"),
        ({"num_experts": 8, "num_local_experts": 16}, "num_local_experts: must equal"),
        ({"hidden_size": 1 << 16, "vocab_size": 1 << 24, "num_experts": 1 << 14,
          "moe_intermediate_size": 1 << 18}, "2.42 parameters"),
    ],
)  # fmt: skip
def test_fields_must_agree(changes, message):
    with pytest.raises(kl.ConfigError, match=message):
        read(original(**changes))


@pytest.mark.parametrize(
    "name,value",
    [
        ("use_full_rank_gate", True), ("attn_res_block_size", 12),
        ("mla_use_output_gate", True),
        ("routed_expert_hidden_size", 3584), ("quantization_config", {"quant_method": "awq"}),
        ("rope_scaling", {"type": "yarn"}), ("mla_use_nope", False), ("attention_bias", True),
        ("hidden_act", "gelu"), ("sliding_window", 4096), ("allow_neg_eigval", True),
        ("mla_use_nope", 1),
    ],
)  # fmt: skip
def test_what_would_change_the_results_is_refused(name, value):
    with pytest.raises(kl.ConfigError, match=f"{name}: must be .*nothing else is implemented"):
        read(original(**{name: value}))


def test_what_changes_nothing_is_ignored_with_a_note():
    config = read(original(head_dim=72, colour="blue", num_nextn_predict_layers=1))
    assert config == tiny_config()
    assert len(config.notes) == 2
    assert "num_nextn_predict_layers" in config.notes[0] and "colour" in config.notes[1]
    assert read(original(head_dim=72, num_nextn_predict_layers=0)).notes == ()


def test_grouping_that_is_switched_off():
    config = read(original(num_expert_group=4, topk_group=2, use_grouped_topk=False))
    assert (config.num_expert_group, config.topk_group) == (1, 1)


def test_auto_map_is_never_imported(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    data = original(auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil--x.Model"})
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert kl.KimiLinearConfig.from_dir(tmp_path) == tiny_config()
    assert "evil" not in sys.modules


GOOD = json.dumps(original())


@pytest.mark.parametrize(
    "raw,message",
    [
        (b"", "valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"3", "must be a JSON object"),
        (b"\xef\xbb\xbf" + GOOD.encode(), "byte-order mark"),
        (GOOD.encode("utf-16"), "UTF-8"),
        (GOOD.encode()[:-1], "valid JSON"),
        (GOOD.encode() + b"x", "valid JSON"),
        (GOOD.replace("1e-05", "NaN").encode(), "finite, found NaN"),
        (GOOD.replace("1e-05", "-Infinity").encode(), "finite, found -Infinity"),
        (GOOD.replace("1e-05", "1e400").encode(), "finite"),
        (GOOD.replace("1e-05", "1" * 5000).encode(), "valid JSON"),
        (GOOD.replace("{", '{"vocab_size": 320,', 1).encode(), "'vocab_size' must appear once"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (GOOD.encode() + b" " * (1 << 20), "at most 1,048,576 bytes"),
    ],
)
def test_a_hostile_file(tmp_path, raw, message):
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(kl.ConfigError, match=message) as info:
        kl.KimiLinearConfig.from_dir(tmp_path)
    assert "config.json" in str(info.value)
    assert len(str(info.value)) < 500 + len(str(tmp_path))


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        kl.KimiLinearConfig.from_dir(tmp_path)
    os.mkfifo(tmp_path / "config.json")  # must not wait for a writer
    with pytest.raises(kl.ConfigError, match="regular file, found a FIFO"):
        kl.KimiLinearConfig.from_dir(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(kl.ConfigError, match="regular file, found a directory"):
        kl.KimiLinearConfig.from_dir(tmp_path)


def test_any_json_gives_a_config_or_a_config_error():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
        ),
        max_leaves=5,
    )
    top = st.sampled_from(sorted(set(original()) | set(native())))
    nested = st.sampled_from(sorted(original()["linear_attn_config"]))

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(top, nested, junk, junk, st.booleans())
    def check(name, inner, value, inner_value, is_native):
        data = (native if is_native else original)(**{name: value})
        if not is_native and isinstance(data.get("linear_attn_config"), dict):
            data["linear_attn_config"] = data["linear_attn_config"] | {inner: inner_value}
        try:
            assert isinstance(read(data), kl.KimiLinearConfig)
        except kl.ConfigError:
            pass

    check()
