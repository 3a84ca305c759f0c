"""Write trained weights as a checkpoint directory: model.safetensors in bfloat16 and the configs.

    python export.py --weights DIR [DIR ...] --out ../../kimi_linear/small_model

Each DIR holds weights_*.npz of train.py, and of several the mean is written: a run that started
from another's weights gains some skills and loses a little of others, and half way keeps both.
tiktoken.model of bpe.py goes to the same place by itself.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from kimi_linear import KimiLinearConfig
from kimi_linear.testing import config_json, tiny_config, to_bf16, write_safetensors
from kimi_linear.tokenizer import standard_controls
from train import CONFIG as C


def config():
    """The training shape in the names of config.json."""
    layers = range(1, C["n_layers"] + 1)
    return tiny_config(
        vocab_size=C["vocab_size"], hidden_size=C["hidden_size"],
        num_hidden_layers=C["n_layers"], intermediate_size=C["dense_inner"],
        model_max_length=1 << 20, num_attention_heads=C["mla_heads"],
        kv_lora_rank=C["kv_rank"], qk_nope_head_dim=C["nope_dim"],
        qk_rope_head_dim=C["rope_dim"], v_head_dim=C["v_dim"], num_experts=C["n_experts"],
        num_experts_per_token=C["top_k"], num_shared_experts=C["n_shared"],
        moe_intermediate_size=C["moe_inner"], routed_scaling_factor=C["routed_scaling"],
        linear_attn_config=dict(
            head_dim=C["kda_head_dim"], num_heads=C["kda_heads"],
            kda_layers=tuple(i for i in layers if C["mixer"][i - 1] == "kda"),
            full_attn_layers=tuple(i for i in layers if C["mixer"][i - 1] == "mla"),
        ),
        bos_token_id=4000, eos_token_id=4002, pad_token_id=C["vocab_size"] - 1,
    )  # fmt: skip


CHAT = (  # kimi_linear/chat.py's format, without tools
    "{%for m in messages%}<|im_{{m.role}}|>{{m.role}}<|im_middle|>{{m.content}}<|im_end|>{%endfor%}"
    "{%if add_generation_prompt%}<|im_assistant|>assistant<|im_middle|>{%endif%}"
)


def tokenizer_config(config):
    """What transformers' AutoTokenizer cannot read from tiktoken.model."""
    names = standard_controls(config.bos_token_id, config.vocab_size)
    return {
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "chat_template": CHAT,
        "added_tokens_decoder": {
            i: {"content": n} for n, i in names.items() if not n.startswith("<|reserved_")
        },
    }


def mean_of(runs):
    """name -> tensor: the mean over the folders of the runs."""
    loaded = [
        {n: x for f in sorted(run.glob("*.npz")) for n, x in np.load(f).items()} for run in runs
    ]
    if any(set(x) != set(loaded[0]) for x in loaded):
        raise SystemExit("--weights: every folder must hold the same tensors")
    return {n: np.mean([x[n] for x in loaded], axis=0) for n in loaded[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    tensors = mean_of(a.weights)
    shapes = config().tensor_shapes()
    wrong = {n for n, s in shapes.items() if n not in tensors or tensors[n].size != np.prod(s)}
    if wrong or set(tensors) - set(shapes):
        raise SystemExit(f"tensors that do not fit: {sorted(wrong | set(tensors) - set(shapes))[:5]}")
    a.out.mkdir(parents=True, exist_ok=True)
    keep = ("A_log", "dt_bias")  # float32 in the published files too
    write_safetensors(
        a.out / "model.safetensors",
        ((n, tensors[n].reshape(s) if n.endswith(keep) else to_bf16(tensors[n].reshape(s)))
         for n, s in shapes.items()),
    )  # fmt: skip
    (a.out / "config.json").write_text(json.dumps(config_json(config(), "original"), indent=1) + "\n")
    compact = json.dumps(tokenizer_config(config()), separators=(",", ":"))
    (a.out / "tokenizer_config.json").write_text(compact + "\n")
    KimiLinearConfig.from_dir(a.out)


if __name__ == "__main__":
    main()
