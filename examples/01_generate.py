"""Generate text: whole, streamed, in a batch, and as a chat.

    python examples/01_generate.py [DIR]

DIR is a checkpoint directory; without it the small model inside the package answers.
"""

import sys

import kimi_linear as kl

model = kl.load(*sys.argv[1:2])  # without a path: the small model inside the package

with model:
    print(model.info())

    print("\n-- whole")
    answer = model.generate("Once upon a time", max_new_tokens=40)
    print(repr(answer.text), answer.finish_reason)
    print(answer.stats)

    print("\n-- streamed")
    for chunk in model.stream("The fox went to the", max_new_tokens=20, temperature=0.8, seed=1):
        print(chunk.text, end="", flush=True)
    print()

    print("\n-- a batch: rows keep their own lengths, results come in their order")
    for row in model.generate(["one", "two words", [1, 2, 3]], max_new_tokens=4):
        print(len(row.prompt_token_ids), "->", row.token_ids)

    print("\n-- chat")
    messages = [
        {"role": "user", "content": "Remember these pairs: fox 17, owl 230. What is the value of owl?"},
    ]
    print(model.tokenizer.apply_chat_template(messages, tokenize=False))
    print(repr(model.chat(messages, max_new_tokens=12).text))
