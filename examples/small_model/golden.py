"""What transformers' own class says of the small model in float32, for the tests to compare with.

    python golden.py MODEL_DIR OUT.json

Greedy continuations of 32 tokens and the log-probabilities of each prompt's tokens.
"""

import argparse
import json
import random

import torch
from transformers import KimiLinearForCausalLM

from kimi_linear import Tokenizer
from tasks import HELD_OUT_SEED, TASKS

TEXTS = ["Once upon a time, there was a", "It is a truth", "The cat sat on"]
CHATS = ["single", "multikey", "mqar", "copy", "reverse", "tell", "manners"]


def prompts(tokenizer):
    for text in TEXTS:
        yield tokenizer.encode(text)
    for name in CHATS:
        (_, asked), *_ = TASKS[name](random.Random(HELD_OUT_SEED), 900)
        yield tokenizer.apply_chat_template([{"role": "user", "content": asked}])


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    a = parser.parse_args()
    model = KimiLinearForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_dir(a.model, vocab_size=model.config.vocab_size)
    out = []
    for ids in prompts(tokenizer):
        x = torch.tensor([ids])
        made = model.generate(x, max_new_tokens=32, do_sample=False, eos_token_id=-1)
        logprobs = model(x).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(-1, x[0, 1:, None])[:, 0]
        out.append({
            "ids": ids,
            "continuation": made[0, len(ids) :].tolist(),
            "logprobs": [round(v, 6) for v in picked.tolist()],
        })  # fmt: skip
    with open(a.out, "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(x) for x in out) + "\n]\n")


if __name__ == "__main__":
    main()
