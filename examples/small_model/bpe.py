"""Train the small model's byte-pair vocabulary and write it in tiktoken's format.

    python bpe.py CORPUS.txt OUT/tiktoken.model [--base 4000]

The text is half plain English, half samples of the tasks, so that their words get tokens too.
Numbers are left out of it: every number of two or three digits is a token, so that a long one
always splits in the same way. Needs the `tokenizers` package.
"""

import argparse
import base64
import random
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from kimi_linear.tokenizer import PATTERN
from tasks import TASKS
from words import story

NUMBERS = [f"{n:0{w}}".encode() for w in (2, 3) for n in range(10**w)]


def texts(corpus, seed):
    r = random.Random(seed)
    lines = corpus.read_text("utf-8").splitlines()
    yield from r.sample(lines, min(len(lines), 30_000))
    for _ in range(15_000):
        yield story(r)
    for name in TASKS:
        for _ in range(400):
            yield from (text for _, text in TASKS[name](r, 2000))


def byte_of_char():
    """The printable stand-ins of byte-level BPE, inverted."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in kept}
    rest = [b for b in range(256) if b not in kept]
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=int, default=4000)
    a = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=a.base - len(NUMBERS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    words = (re.sub(r"\d+", "", text) for text in texts(a.corpus, seed=1))
    tokenizer.train_from_iterator(words, trainer)

    table = byte_of_char()
    tokens = [bytes(table[c] for c in t) for t, _ in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1])]
    singles = [bytes([b]) for b in range(256)]
    merged = NUMBERS + [t for t in tokens if len(t) > 1]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(singles + merged)]
    a.out.write_text("".join(lines))
    print(f"{len(lines)} tokens; longest {max(merged, key=len)!r}")


if __name__ == "__main__":
    main()
