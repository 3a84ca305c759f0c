"""Batches of training rows: conversations and plain English as token ids with loss weights."""

import multiprocessing
import random

import numpy as np

from tasks import HELD_OUT_SEED, TASKS
from words import sentence, story

# How often each kind of row is drawn.
MIX = {
    "english": 0.10, "stories": 0.04, "tell": 0.04, "manners": 0.01,
    "single": 0.10, "multikey": 0.09, "multivalue": 0.11, "multiquery": 0.09, "nth_value": 0.06,
    "mrcr": 0.06, "mrcr_many": 0.14, "which": 0.05,
    "mqar": 0.04, "copy": 0.02, "reverse": 0.03, "stack": 0.05, "variables": 0.04,
    "common_words": 0.03,
}  # fmt: skip
NEEDLES = ("single", "multikey", "multivalue", "multiquery", "nth_value")
CONTEXT_WEIGHT = 0.02  # loss of a user's tokens, next to 1 for an answer's
PROSE_WEIGHT = 0.2  # of plain English and stories, of which a row is full
CHARS_PER_TOKEN = 3.4
VOCAB_SIZE = 4096


class Encoder:
    """Turns conversations into ids and weights, in the chat format of the checkpoint."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.control = tokenizer.control_tokens

    def conversation(self, turns, learned_weight=1.0):
        ids, weights = [], []

        def put(new, weight):
            ids.extend(new)
            weights.extend([weight] * len(new))

        for role, text in turns:
            who = "user" if role == "user" else "assistant"
            learned = learned_weight if role == "assistant" else CONTEXT_WEIGHT
            put([self.control[f"<|im_{who}|>"]], 0.0)
            put(self.tokenizer.encode(who), 0.0)
            put([self.control["<|im_middle|>"]], 0.0)
            put(self.tokenizer.encode(text), learned)
            put([self.control["<|im_end|>"]], 1.0 if who == "assistant" else 0.0)
        return ids, weights

    def plain(self, text):
        ids = self.tokenizer.encode(text)
        return ids + [self.control["[EOS]"]], [PROSE_WEIGHT] * (len(ids) + 1)


def row(encoder, corpus, r, length):
    """One row of at most length + 1 tokens."""
    kind = r.choices(list(MIX), MIX.values())[0]
    size = int(length * CHARS_PER_TOKEN)
    if kind == "english":
        at = r.randrange(len(corpus))
        text = []
        while sum(map(len, text)) < size * 1.3:
            text.append(corpus[at % len(corpus)])
            at += 1
        ids, weights = encoder.plain("\n".join(text))
        return ids[: length + 1], weights[: length + 1]
    if kind == "stories":
        ids, weights = [], []
        while len(ids) <= length:
            more = encoder.plain(story(r) if r.random() < 0.8 else sentence(r))
            ids, weights = ids + more[0], weights + more[1]
        return ids[: length + 1], weights[: length + 1]
    budget = size * r.uniform(0.75, 1.1)
    learned = PROSE_WEIGHT if kind == "tell" else 1.0
    while True:
        ids, weights = encoder.conversation(TASKS[kind](r, int(budget)), learned)
        while len(ids) < length // 2 and kind not in NEEDLES:
            more = encoder.conversation(TASKS[kind](r, int(budget)), learned)
            if len(ids) + len(more[0]) > length:
                break
            ids, weights = ids + more[0], weights + more[1]
        if len(ids) <= length + 1:
            return ids, weights
        if budget < 50:  # does not fit at this length: another kind
            return row(encoder, corpus, r, length)
        budget *= 0.93


def batch(encoder, corpus, r, rows, length):
    """ids [rows, length + 1] uint16, padded with 0; weights [rows, length + 1] float16."""
    ids = np.zeros((rows, length + 1), np.uint16)
    weights = np.zeros((rows, length + 1), np.float16)
    for i in range(rows):
        a, w = row(encoder, corpus, r, length)
        ids[i, : len(a)], weights[i, : len(a)] = a, w
    return ids, weights


def _work(tokenizer_dir, corpus_file, seed, worker, tokens, lengths, queue):
    from kimi_linear.tokenizer import Tokenizer

    encoder = Encoder(Tokenizer.from_dir(tokenizer_dir, vocab_size=VOCAB_SIZE))
    corpus = open(corpus_file, encoding="utf-8").read().splitlines()
    step = 0
    while True:
        r = random.Random((seed * 1_000_003 + worker) * 1_000_003 + step)
        length = r.choices([n for n, _ in lengths.value_list()], [p for _, p in lengths.value_list()])[0]
        queue.put(batch(encoder, corpus, r, max(1, tokens // length), length))
        step += 1


class Lengths:
    """The row lengths being drawn, changed by the trainer while workers run."""

    def __init__(self, choices):
        self.choices = choices
        self.shares = multiprocessing.Array("d", [1.0] * len(choices))

    def set(self, shares):
        self.shares[:] = shares

    def value_list(self):
        return list(zip(self.choices, self.shares, strict=True))


def start(tokenizer_dir, corpus_file, seed, tokens, lengths, workers, mix):
    """A queue of batches of about `tokens` tokens, filled by `workers` processes; mix changes MIX."""
    assert seed < HELD_OUT_SEED
    MIX.update(mix)  # the workers are forked from here
    queue = multiprocessing.Queue(maxsize=3 * workers)
    for w in range(workers):
        args = (tokenizer_dir, corpus_file, seed, w, tokens, lengths, queue)
        multiprocessing.Process(target=_work, args=args, daemon=True).start()
    return queue
