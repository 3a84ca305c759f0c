"""What the tests of states share: a small random model, which must end without sequences, and a
state of it."""

import gc

import pytest

from kimi_linear.testing import random_model, tiny_config

CONFIG = tiny_config()
LONG = tiny_config(model_max_length=1 << 17)
IDS = list(range(3, 103))
QUESTION = [{"role": "user", "content": "what is it?"}]


def make(config=CONFIG, **options):
    options = dict(device="cpu", dtype="bf16", seed=1, max_context=512, max_batch=4) | options
    return random_model(config, **options)


def first_bound(model, logits):
    """How far the first log-probability after a state, the softmax of logits that it keeps, may be
    from that of a pass over the whole text: another order of sums. On a GPU a few rows are also
    multiplied with the 8 or 4 bits themselves and many with their rounding to bf16, 2^-8 of each
    weight at most: 1.7e-3 of the logits' spread in the mean square."""
    if model.device == "cpu" or model.dtype == "bf16":
        return 1e-5
    return 6 * 1.7e-3 * float(logits.std())


@pytest.fixture(scope="module")
def model():
    with make() as m:
        yield m


@pytest.fixture(autouse=True)
def nothing_is_left_behind(model):
    yield
    if model._engine.usage() != (0, 0):
        gc.collect()  # of an exception that a test has caught
    assert model._engine.usage() == (0, 0), "sequences or pages are still held"


@pytest.fixture
def state(model):
    with model.state() as s:
        yield s.feed(IDS)
