"""What the tests of `kl.Engine` share: a small model, an engine on it that must end without
sequences, and answers to compare."""

import math
import threading
import time

import pytest
from variants import DEVICES

import kimi_linear as kl
from kimi_linear.testing import random_model, tiny_config

SEQUENCES = 3  # max_batch
LONG = dict(max_new_tokens=400, ignore_eos=True)
ENDLESS = dict(max_new_tokens=60_000, ignore_eos=True)  # some 5 s: a test stops it
SHORT = dict(max_new_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module", params=DEVICES)
def model(request):
    how = dict(device=request.param, dtype="bf16", batch_invariant=True)
    with random_model(tiny_config(), seed=3, max_batch=SEQUENCES, max_context=512, **how) as m:
        yield m


@pytest.fixture
def roomy(model):
    """A model with room for ENDLESS."""
    how = dict(device=model.device, dtype="bf16", batch_invariant=True, max_context=65_536)
    config = tiny_config(model_max_length=65_536)
    with random_model(config, seed=3, max_batch=SEQUENCES, **how) as m:
        yield m


@pytest.fixture
def engine(model):
    with kl.Engine(model) as e:
        yield e
    assert model._engine.usage() == (0, 0), "sequences or pages are still held"


class Gate:
    """A logits_processor that changes nothing, but keeps its engine waiting before a text's first
    token, and, once it is open, before token `until` of prompt and text: what a test does meanwhile
    has no race to win."""

    def __init__(self):
        self._until = 0
        self._moved = threading.Condition()

    def __call__(self, ids, logits):
        with self._moved:
            assert self._moved.wait_for(lambda: len(ids) < self._until, 60), "nobody opens the gate"

    def open(self, until=math.inf):
        with self._moved:
            self._until = until
            self._moved.notify_all()


@pytest.fixture
def gate(engine):
    """It is open when the engine is closed."""
    g = Gate()
    yield g
    g.open()


def same(got, want):
    """All of a completion but its times."""
    for name in ("text", "token_ids", "prompt_token_ids", "finish_reason", "logprobs"):
        assert getattr(got, name) == getattr(want, name), name
    for name in ("prompt_tokens", "new_tokens", "cached_tokens", "peak_bytes"):
        assert getattr(got.stats, name) == getattr(want.stats, name), name


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


async def answer_of(request):
    return await request
