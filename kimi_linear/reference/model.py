"""The whole model, layer by layer, from the tensors of a checkpoint.

Kimi Linear technical report (arXiv 2510.26692), section 4: a residual stream that each layer
adds to twice, once through a token mixer (KDA or MLA) and once through a feed-forward network
(dense or a mixture of experts), each behind an RMS norm. Order comes from KDA and causality
alone: there are no positional encodings.
"""

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from .kda import kda_prefill
from .linear import dense, linear
from .mla import mla_prefill
from .moe import mlp, moe_experts, moe_route
from .norm import gated_rms_norm, rms_norm
from .short_conv import short_conv


class State:
    """What a sequence carries from token to token.

    windows: per KDA layer the last conv inputs of q, k, v, each [1, H * K, W-1]; memories: per
    KDA layer [1, H, V, K]; latents: per MLA layer [L, rank+rope], the only part that grows.
    """

    def __init__(self) -> None:
        self.length = 0
        self.windows: dict[int, dict[str, np.ndarray]] = {}
        self.memories: dict[int, np.ndarray] = {}
        self.latents: dict[int, np.ndarray] = {}

    def fork(self) -> "State":
        """An independent copy."""
        return copy.deepcopy(self)


class Model:
    """A Kimi Linear model in float64.

    config: a KimiLinearConfig, or the fields of csrc/model/config.h by name: mixer ("kda",
    "mla") and ffn ("dense", "moe") of each layer, kda_heads, kda_head_dim, gate,
    gate_lower_bound, mla_heads, nope_dim, rope_dim, q_norm_eps, kv_norm_eps, top_k, groups,
    top_groups, score, routed_scaling, renormalize, rms_eps, tied_embeddings. Other sizes come
    from the tensors.
    tensors: arrays by the published checkpoint's names. A dense layer's feed-forward may also
    lie under `block_sparse_moe`, where transformers writes it.
    """

    def __init__(self, config: Any, tensors: Mapping[str, Any]) -> None:
        config = config.to_core() if hasattr(config, "to_core") else config
        self.config = SimpleNamespace(**config) if isinstance(config, Mapping) else config
        self.tensors = tensors

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as float64. Raises KeyError with its name."""
        return dense(self.tensors[name])

    def kda_layer(self, i: int, x: np.ndarray, state: State) -> np.ndarray:
        """x [T, D] -> [T, D] through Kimi Delta Attention."""
        c, at = self.config, f"model.layers.{i}.self_attn."
        heads = (len(x), c.kda_heads, c.kda_head_dim)
        windows = state.windows.setdefault(i, {})
        mixed = []
        for name in "qkv":
            raw = linear(x, self.tensor(f"{at}{name}_proj.weight"))
            taps = self.tensor(f"{at}{name}_conv1d.weight").reshape(raw.shape[1], -1)
            y, windows[name] = short_conv(raw, taps, state=windows.get(name))
            mixed.append(y.reshape(heads))

        def low_rank(gate):  # two matrices with nothing in between
            inner = linear(x, self.tensor(f"{at}{gate}_a_proj.weight"))
            return linear(inner, self.tensor(f"{at}{gate}_b_proj.weight")).reshape(heads)

        o, state.memories[i] = kda_prefill(
            *mixed, low_rank("f"), linear(x, self.tensor(f"{at}b_proj.weight")),
            initial_state=state.memories.get(i), gate=c.gate, lower_bound=c.gate_lower_bound,
            A_log=self.tensor(f"{at}A_log").reshape(-1)[: c.kda_heads],
            dt_bias=self.tensor(f"{at}dt_bias"), normalize=True, beta_logits=True,
        )  # fmt: skip
        o = gated_rms_norm(o, low_rank("g"), self.tensor(f"{at}o_norm.weight"), eps=c.rms_eps)
        return linear(o.reshape(len(x), -1), self.tensor(f"{at}o_proj.weight"))

    def mla_query(self, at: str, x: np.ndarray) -> np.ndarray:
        """The queries, directly or through a normalised low-rank bottleneck."""
        if f"{at}q_proj.weight" in self.tensors:
            return linear(x, self.tensor(f"{at}q_proj.weight"))
        inner = linear(x, self.tensor(f"{at}q_a_proj.weight"))
        weight = self.tensor(f"{at}q_a_layernorm.weight")
        inner = rms_norm(inner, weight, eps=self.config.q_norm_eps)
        return linear(inner, self.tensor(f"{at}q_b_proj.weight"))

    def mla_layer(self, i: int, x: np.ndarray, state: State) -> np.ndarray:
        """x [T, D] -> [T, D] through multi-head latent attention."""
        c, at = self.config, f"model.layers.{i}.self_attn."
        q = self.mla_query(at, x).reshape(len(x), c.mla_heads, c.nope_dim + c.rope_dim)
        raw = linear(x, self.tensor(f"{at}kv_a_proj_with_mqa.weight"))
        weight = self.tensor(f"{at}kv_a_layernorm.weight")
        normed = rms_norm(raw[:, : len(weight)], weight, eps=c.kv_norm_eps)
        latent = np.concatenate([normed, raw[:, len(weight) :]], axis=1)  # k_pe stays raw
        past = state.latents.get(i, latent[:0])
        w_kv_b = self.tensor(f"{at}kv_b_proj.weight").reshape(c.mla_heads, -1, len(weight))
        o = mla_prefill(q, latent, w_kv_b, past=past)
        state.latents[i] = np.concatenate([past, latent])
        return linear(o.reshape(len(x), -1), self.tensor(f"{at}o_proj.weight"))

    def feed_forward(self, at: str) -> list[np.ndarray]:
        """w1 (gate), w3 (up), w2 (down) of a dense layer or a shared expert."""
        return [self.tensor(f"{at}{name}_proj.weight") for name in ("gate", "up", "down")]

    def dense_layer(self, i: int, x: np.ndarray) -> np.ndarray:
        """x [T, D] -> [T, D] through the dense feed-forward network."""
        at = f"model.layers.{i}.mlp."
        if f"{at}gate_proj.weight" not in self.tensors:
            at = f"model.layers.{i}.block_sparse_moe."
        return mlp(x, *self.feed_forward(at))

    def moe_layer(self, i: int, x: np.ndarray) -> np.ndarray:
        """x [T, D] -> [T, D] through the chosen experts and the shared one."""
        c, at = self.config, f"model.layers.{i}.block_sparse_moe."
        logits = linear(x, self.tensor(f"{at}gate.weight"))
        ids, weights = moe_route(
            logits, self.tensors.get(f"{at}gate.e_score_correction_bias"), top_k=c.top_k,
            scaling=c.routed_scaling, renormalize=c.renormalize, score=c.score,
            groups=c.groups, top_groups=c.top_groups,
        )  # fmt: skip
        E = logits.shape[1]
        w1, w3, w2 = (
            np.stack([self.tensor(f"{at}experts.{e}.{w}.weight") for e in range(E)])
            for w in ("w1", "w3", "w2")
        )
        has_shared = f"{at}shared_experts.gate_proj.weight" in self.tensors
        shared = self.feed_forward(f"{at}shared_experts.") if has_shared else None
        return moe_experts(x, ids, weights, w1, w3, w2, shared=shared)

    def residuals(self, ids: Any, state: State) -> list[np.ndarray]:
        """The residual stream [T, D] at the start and after each layer; `state` moves on."""
        c = self.config
        x = self.tensor("model.embed_tokens.weight")[np.asarray(ids)]
        streams = [x]
        for i, (mixer, ffn) in enumerate(zip(c.mixer, c.ffn, strict=True)):
            at = f"model.layers.{i}."
            h = rms_norm(x, self.tensor(f"{at}input_layernorm.weight"), eps=c.rms_eps)
            x = x + (self.kda_layer if mixer == "kda" else self.mla_layer)(i, h, state)
            h = rms_norm(x, self.tensor(f"{at}post_attention_layernorm.weight"), eps=c.rms_eps)
            x = x + (self.dense_layer if ffn == "dense" else self.moe_layer)(i, h)
            streams.append(x)
        state.length += len(x)
        return streams

    def forward(self, ids: Any, state: State | None = None) -> np.ndarray:
        """Logits [T, vocab] after each of T tokens; row t is the distribution of token t + 1.

        With a `state`, the tokens continue its sequence and it moves on: a prompt read whole,
        in pieces or token by token gives the same logits.
        """
        x = self.residuals(ids, State() if state is None else state)[-1]
        x = rms_norm(x, self.tensor("model.norm.weight"), eps=self.config.rms_eps)
        tied = self.config.tied_embeddings
        return linear(x, self.tensor("model.embed_tokens.weight" if tied else "lm_head.weight"))
