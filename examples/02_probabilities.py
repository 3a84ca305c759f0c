"""Look at probabilities: perplexity of a text, choices of an exam, tokens of an answer.

python examples/02_probabilities.py [DIR]
"""

import sys

import kimi_linear as kl
import numpy as np

model = kl.load(*sys.argv[1:2])  # without a path: the small model inside the package

with model:
    text = "Linear attention keeps a state of fixed size, whatever the length of the text."
    found = model.logprobs(text, top=3)
    print(f"perplexity {np.exp(-found.logprobs.mean()):.1f} over {len(found.logprobs)} tokens")
    print(f"the likeliest token came {found.greedy.mean():.0%} of the time")

    print("\nthe five most surprising tokens, and what was expected")
    for t in np.argsort(found.logprobs)[:5]:
        token = model.tokenizer.decode([found.token_ids[t + 1]])
        expected = [model.tokenizer.decode([i]) for i in found.top[0][t]]
        print(f"  {token!r:12} {found.logprobs[t]:7.2f}  {expected}")

    print("\nwhich continuation is likelier")
    for choice in (" Paris", " London", " 42"):
        loglikelihood, is_greedy = model.score("The capital of France is", choice)
        print(f"  {choice:8} {loglikelihood:8.2f} {'greedy' if is_greedy else ''}")

    print("\na logits processor: only digits, please")
    digits = [i for i in range(256) if model.tokenizer.token_bytes(i).isdigit()]

    def only_digits(ids, logits):
        allowed = np.full_like(logits, -np.inf)
        allowed[digits] = logits[digits]
        return allowed

    answer = model.generate("1 + 1 =", max_new_tokens=8, logits_processor=only_digits)
    print(" ", answer.text)
