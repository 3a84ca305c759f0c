"""Read a document once, ask many questions: states that fork, score, and are kept in a file.

python examples/07_states.py [DIR]
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import kimi_linear as kl

r = random.Random(4)
keys = ["wet-drum", "calm-nest", "neat-carpet", "bold-river", "shy-fox", "old-lamp"]
secrets = {key: r.randint(10**6, 10**7 - 1) for key in keys}
noise = "The grass is green. The sky is blue. The sun is yellow. Here we go.\n"
facts = [f"One of the special magic numbers for {k} is: {v}.\n" for k, v in secrets.items()]
document = "".join(noise * r.randint(5, 15) + fact for fact in facts)


def question(key):
    return f"What is the special magic number for {key} mentioned in the provided text?"


intro = "A special magic number is hidden within the following text. Make sure to memorize it. " \
        "I will quiz you about the number afterwards."  # fmt: skip
answer = "The special magic number for old-lamp mentioned in the provided text is "
conversation = [
    {"role": "user", "content": f"{intro}\n{document}{question('old-lamp')}"},
    {"role": "assistant", "content": f"{answer}{secrets['old-lamp']}."},
]
asked = [[{"role": "user", "content": question(key)}] for key in keys]

with kl.load(*sys.argv[1:2], max_context=4096, max_batch=16) as model, model.state() as doc:
    start = time.perf_counter()
    doc.feed(conversation)
    seconds = time.perf_counter() - start
    print(f"read {doc.position} tokens in {seconds:.2f} s, {doc.nbytes / 2**20:.2f} MiB")

    start = time.perf_counter()
    answers = doc.generate(asked, max_new_tokens=40)  # one batch, each from a fork of doc
    print(f"{len(asked)} answers in {time.perf_counter() - start:.2f} s:")
    for key, found in zip(keys, answers, strict=True):
        print(f"  {'right' if str(secrets[key]) in found.text else 'wrong'}: {found.text}")

    with doc.fork() as talk:  # keeps what is asked and said; doc stays as it is
        print(f"a fork has {(talk.nbytes - talk.shared_nbytes) / 2**20:.2f} MiB of its own")
        talk.generate(asked[0], max_new_tokens=40)
        print(f"then {talk.position} tokens, doc has {doc.position}")

    with tempfile.TemporaryDirectory() as folder:
        doc.save(file := Path(folder) / "document.klstate")
        with kl.State.load(file, model) as again:
            print(f"from the file the same bits: {(again.logits() == doc.logits()).all()}")
