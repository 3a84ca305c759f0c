"""What transformers' own class says of the small model in float32, for the tests to compare with.

    python golden.py MODEL_DIR OUT.json

Of 50 prompts: greedy continuations of 32 tokens, the log-probabilities of the prompt's own, and
where these hang on a choice of experts that is a tie.
"""

import argparse
import itertools
import json
import random

import torch
from transformers import KimiLinearForCausalLM

from kimi_linear import Tokenizer
from tasks import HELD_OUT_SEED, TASKS

TEXTS = [
    "Once upon a time, there was a", "It is a truth", "The cat sat on", "In the morning", "She was not",
    "And God said", "a small round", "He looked at her and",
]
CHATS = [
    "single", "multikey", "multivalue", "multiquery", "nth_value", "mrcr", "mqar", "copy", "reverse",
    "stack", "variables", "common_words", "tell", "manners",
]  # fmt: skip


def prompts(tokenizer):
    for text in TEXTS:
        yield tokenizer.encode(text)
    for name, seed in itertools.product(CHATS, range(3)):
        turns = TASKS[name](random.Random(HELD_OUT_SEED + seed), 700)
        asked = turns[: next(i for i, (role, _) in enumerate(turns) if role == "assistant")]
        yield tokenizer.apply_chat_template([
            {"role": "user" if role == "user" else "assistant", "content": text} for role, text in asked
        ])


TIE = 2e-6  # a choice of experts so close may fall either way in float32


def watch_ties(model):
    """A list that each router adds to: [T], the margin between the experts chosen and the rest."""
    margins = []

    def note(gate, inputs, _):
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        scores = (x @ gate.weight.double().T).sigmoid() + gate.e_score_correction_bias.double()
        best = scores.topk(model.config.num_experts_per_tok + 1).values
        margins.append(best[:, -2] - best[:, -1])

    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(note)
    return margins


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    a = parser.parse_args()
    model = KimiLinearForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_dir(a.model, vocab_size=model.config.vocab_size)
    margins = watch_ties(model)
    out = []
    for ids in prompts(tokenizer):
        x = torch.tensor([ids])
        made = model.generate(x, max_new_tokens=32, do_sample=False, eos_token_id=-1)
        margins.clear()
        logprobs = model(x).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(-1, x[0, 1:, None])[:, 0]
        out.append({
            "ids": ids,
            "continuation": made[0, len(ids) :].tolist(),
            "logprobs": [round(v, 5) for v in picked.tolist()],
            "ties": torch.nonzero(torch.stack(margins).amin(0)[:-1] < TIE)[:, 0].tolist(),
        })  # fmt: skip
    with open(a.out, "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(x) for x in out) + "\n]\n")


if __name__ == "__main__":
    main()
