"""Models for tests, benchmarks and examples: small or random, with every part of a real one."""

import base64
import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._backends import backend as backend
from ._tensors import FLOAT32
from .config import KimiLinearConfig, LinearAttnConfig
from .tokenizer import STANDARD_CONTROLS, Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from .model import Model

TEXT_CONTROLS = 20  # control tokens of a small vocabulary: the standard names fit
MAX_TRAINED = 4096  # tokens that random_model() trains a vocabulary of


def tiny_config(**overrides: Any) -> KimiLinearConfig:
    """A model of about 320,000 parameters with KDA, MLA, dense and expert layers.

    overrides: fields of KimiLinearConfig; linear_attn_config may be a dict of some of its
    fields. Layer lists, when not given, follow num_hidden_layers: MLA is every fourth and the
    last; control token ids follow vocab_size. Raises ConfigError like the constructor.
    """
    n = overrides.get("num_hidden_layers", 4)
    full = {i for i in range(1, n + 1) if i % 4 == 0 or i == n}
    linear: dict[str, Any] = {
        "head_dim": 32,
        "num_heads": 2,
        "short_conv_kernel_size": 4,
        "kda_layers": tuple(i for i in range(1, n + 1) if i not in full),
        "full_attn_layers": tuple(sorted(full)),
    }
    given = overrides.pop("linear_attn_config", {})
    if isinstance(given, LinearAttnConfig):
        given = dataclasses.asdict(given)
    vocab_size = overrides.get("vocab_size", 320)
    first = max(vocab_size - n_controls(vocab_size), 0)
    values: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": 64, "num_hidden_layers": n,
        "intermediate_size": 96, "model_max_length": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "linear_attn_config": LinearAttnConfig(**linear | given),
        "num_attention_heads": 3, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 24, "num_experts": 8, "num_experts_per_token": 2,
        "num_shared_experts": 1, "moe_intermediate_size": 32,
        "moe_router_activation_func": "sigmoid", "moe_renormalize": True,
        "routed_scaling_factor": 2.446, "first_k_dense_replace": 1,
        "bos_token_id": min(first, vocab_size - 1),
        "eos_token_id": min(first + 2, vocab_size - 1), "pad_token_id": vocab_size - 1,
    }  # fmt: skip
    return KimiLinearConfig(**values | overrides)


def n_controls(vocab_size: int) -> int:
    """Control tokens of a synthetic vocabulary: the published 256, fewer where it is small."""
    return STANDARD_CONTROLS if vocab_size >= 1024 else TEXT_CONTROLS


# ---- a checkpoint ------------------------------------------------------------------------


def write_checkpoint(
    path: str | Path,
    config: KimiLinearConfig | None = None,
    *,
    seed: int = 0,
    dtype: str = "bf16",
    style: str = "original",
    n_files: int = 1,
    tokenizer: bool = True,
) -> Path:
    """Write a random model in the layout of the published checkpoints; returns the directory.

    dtype: "bf16" or "f32"; A_log and dt_bias are float32 in both. style: of config.json,
    "original" or "native" (transformers'). n_files: more than one makes shards and an index.
    tokenizer: write a ``tiktoken.model`` too, where the vocabulary can hold one.
    """
    if dtype not in ("bf16", "f32"):
        raise ValueError(f"dtype: must be 'bf16' or 'f32', got {dtype!r}")
    config = config or tiny_config()
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    shapes = list(config.tensor_shapes().items())
    per_file = math.ceil(len(shapes) / n_files)
    weight_map: dict[str, str] = {}
    for i, begin in enumerate(range(0, len(shapes), per_file)):
        name = "model.safetensors"
        if n_files > 1:
            name = f"model-{i + 1:05d}-of-{math.ceil(len(shapes) / per_file):05d}.safetensors"
        part = shapes[begin : begin + per_file]
        write_safetensors(path / name, _random_tensors(part, seed, dtype))
        weight_map |= {tensor: name for tensor, _ in part}
    if n_files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config_json(config, style), indent=1))
    if tokenizer and config.vocab_size >= 256 + n_controls(config.vocab_size):
        write_ranks(path, config.vocab_size - n_controls(config.vocab_size))
    return path


def config_json(config: KimiLinearConfig, style: str) -> dict[str, Any]:
    """The object of config.json in the style "original" or "native"."""
    data = config.to_dict()
    if style == "original":
        return data
    if style != "native":
        raise ValueError(f"style: must be 'original' or 'native', got {style!r}")
    linear = data.pop("linear_attn_config")
    for name in ("first_k_dense_replace", "moe_layer_freq", "use_grouped_topk", "mla_use_nope"):
        del data[name]
    return data | {
        "layer_types": list(config.layer_types),
        "mlp_layer_types": list(config.ffn_types),
        "linear_head_dim": linear["head_dim"],
        "linear_num_heads": linear["num_heads"],
        "linear_conv_kernel_dim": linear["short_conv_kernel_size"],
    }


def random_tensor(
    name: str, shape: tuple[int, ...], rng: "np.random.Generator"
) -> "np.ndarray":
    """A plausible float32 tensor for a name of the published checkpoint: matrices keep the
    scale of their input, norms lie near 1, decays reach from long memory to almost none."""
    import numpy as np

    def normal(std: float) -> "np.ndarray":
        return rng.standard_normal(shape, np.float32) * np.float32(std)

    def uniform(low: float, high: float) -> "np.ndarray":
        return (low + (high - low) * rng.random(shape)).astype(np.float32)

    if name.endswith("A_log"):
        return uniform(0.0, math.log(16))
    if name.endswith("dt_bias"):
        return uniform(-7.0, 0.0)
    if name.endswith("e_score_correction_bias"):
        return normal(0.1)
    if name.endswith("norm.weight"):
        return uniform(0.5, 1.5)
    if "conv1d" in name:
        return normal(0.5)
    if "embed_tokens" in name:
        return normal(1.0)
    return normal(1.5 * shape[-1] ** -0.5)


def _random_tensors(
    shapes: Iterable[tuple[str, tuple[int, ...]]], seed: int, dtype: str
) -> Iterator[tuple[str, "np.ndarray"]]:
    import numpy as np

    for name, shape in shapes:
        rng = np.random.default_rng([seed, *name.encode()])  # the same in any number of files
        tensor = random_tensor(name, shape, rng)
        keep = dtype == "f32" or name.endswith(FLOAT32)
        yield name, tensor if keep else to_bf16(tensor)


def to_bf16(x: "np.ndarray") -> "np.ndarray":
    """float32 -> the bits of bfloat16 as uint16, rounded to nearest, ties to even."""
    import numpy as np

    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(file: Path, tensors: Iterable[tuple[str, "np.ndarray"]]) -> None:
    """Write float32 arrays, and uint16 ones as BF16. The file appears whole or not at all."""
    arrays = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, x in arrays:
        dtype = {"float32": "F32", "uint16": "BF16"}[x.dtype.name]
        entry = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        header[name] = entry
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, x in arrays:
                out.write(x.data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


# ---- a vocabulary ------------------------------------------------------------------------


def train_ranks(n: int, text: str | None = None) -> dict[bytes, int]:
    """n byte-pair tokens: the 256 bytes, then merges of what is frequent in `text` (by default
    the documentation of this package), then, once that is used up, pairs of bytes."""
    if n < 256:
        raise ValueError(f"n: must be at least 256, got {n}")
    tokens = [bytes([b]) for b in range(256)]
    words = Counter(re.findall(r" ?\w+|[^\w\s]+", text or _documentation()))
    split = {word: [bytes([b]) for b in word.encode()] for word in words}
    while len(tokens) < n:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, parts in split.items():
            for pair in zip(parts, parts[1:], strict=False):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        for word, parts in split.items():
            split[word] = _merge(parts, best)
    known = set(tokens)
    spare = (bytes([a, b]) for a in range(256) for b in range(256))
    while len(tokens) < n:
        token = next(spare)
        if token not in known:
            tokens.append(token)
    return {token: rank for rank, token in enumerate(tokens)}


def _merge(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    i = 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(parts[i])
            i += 1
    return out


def _documentation() -> str:
    from . import chat, checkpoint, config, tokenizer

    modules = (chat, checkpoint, config, tokenizer)
    return "\n".join([__doc__ or "", *(m.__doc__ or "" for m in modules)])


def write_ranks(path: Path, n: int) -> None:
    """Write a ``tiktoken.model`` of n tokens into a directory."""
    lines = (
        base64.b64encode(token) + b" %d\n" % rank for token, rank in train_ranks(n).items()
    )
    (path / "tiktoken.model").write_bytes(b"".join(lines))


def tiny_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """The tokenizer that `write_checkpoint` writes, without a file."""
    from .tokenizer import standard_controls

    ranks = train_ranks(vocab_size - n_controls(vocab_size))
    return Tokenizer(ranks, standard_controls(len(ranks), vocab_size))


# ---- a model -----------------------------------------------------------------------------


def random_model(
    config: KimiLinearConfig | None = None,
    device: str = "auto",
    dtype: str = "bf16",
    seed: int = 0,
    router_skew: float = 1,
    **options: Any,
) -> "Model":
    """A model whose random weights are made on the device, without a file.

    router_skew: a factor of the routers' biases: with 1 tokens choose their experts themselves,
    with some hundreds all of them get the same ones. options: those of
    `kimi_linear.load`. Vocabularies up to a few thousand come with a tokenizer; larger ones work
    with token ids.
    """
    from .model import random

    config = config or tiny_config()
    n = config.vocab_size
    small = 256 + n_controls(n) <= n <= MAX_TRAINED
    tokenizer = tiny_tokenizer(n) if small else None
    options |= dict(device=device, dtype=dtype, seed=seed, router_skew=router_skew)
    return random(config, tokenizer, **options)
