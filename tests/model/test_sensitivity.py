"""A damaged state shows as lost recall: faults put into a running sequence of the small model.

Each fault is one that an engine of this kind can have: a state transposed when it is handed from
one chunk to the next, a conv window lost at a chunk's border, one layer's state zero after a
restore. Every one must bring recall below half; moving the memory out and in loses nothing.
"""

import random

import kimi_linear as kl
import numpy as np
import pytest
from engines import cut, open_engine
from generators import data, tasks
from kimi_linear.model import SMALL_MODEL

SAMPLES, CHARACTERS, PIECE = 12, 1500, 16


@pytest.fixture(scope="module")
def engine():
    return open_engine(SMALL_MODEL, max_context=2048)


def conversations():
    """(ids of the prompt, ids of the answer): a uuid's uuid, seeds never trained on."""
    tokenizer = kl.Tokenizer.from_dir(SMALL_MODEL, vocab_size=4096)
    encoder = data.Encoder(tokenizer)
    for i in range(SAMPLES):
        r = random.Random(tasks.HELD_OUT_SEED + i)
        turns = tasks.TASKS["single"](r, CHARACTERS, turns=1, value="uuids", key="uuids")
        ids, weights = encoder.conversation(turns)
        start = max(j for j, w in enumerate(weights) if w == 0) + 1
        yield ids[:start], ids[start:]


CONVERSATIONS = list(conversations())
KDA = [0, 1, 2, 4, 5, 6]


def transposed(state, window):
    return np.ascontiguousarray(state.transpose(0, 2, 1)), window


def no_window(state, window):
    return state, np.zeros_like(window)


def no_state(state, window):
    return np.zeros_like(state), window


def whole(state, window):
    return state, window


def recall(engine, fault=whole, layers=KDA):
    """Share of answers that are the argmax at every token, the fault striking these layers
    wherever two pieces of the prompt meet."""
    right = 0
    for prompt, answer in CONVERSATIONS:
        seq, at = engine.seq_new(), 0
        for n in cut(len(prompt) - 1, PIECE):
            for layer in layers if at else ():
                engine.seq_write_kda(seq, layer, *fault(*engine.seq_read_kda(seq, layer)))
            engine.feed(seq, prompt[at : at + n], None)
            at += n
        logits = engine.logits(seq, prompt[-1:] + answer[:-1], False, None)
        right += bool((np.argmax(logits, -1) == answer).all())
        engine.seq_release(seq)
    return right / SAMPLES


def test_whole_state_recalls(engine):
    assert recall(engine) >= 0.9


@pytest.mark.parametrize("fault", [transposed, no_window], ids=lambda f: f.__name__)
def test_a_fault_between_chunks_shows(engine, fault):
    assert recall(engine, fault) < 0.5


def test_a_layer_lost_on_restore_shows(engine):
    """The conversation is put away and taken up again between pieces; one layer comes back empty."""
    assert recall(engine, no_state, layers=[2]) < 0.5
