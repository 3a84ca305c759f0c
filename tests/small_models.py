"""What the tests of `Model` share: a small checkpoint, and the model in it, which must end without
sequences."""

import pytest

import kimi_linear as kl
from kimi_linear.testing import tiny_config, write_checkpoint

CONFIG = tiny_config()
CPU = {"device": "cpu"}
PROMPTS = ["The tokens of a file", "a", [5, 6, 7] * 40, [{"role": "user", "content": "hello"}]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIG, dtype="f32", seed=1)


@pytest.fixture(scope="module")
def model(path):
    with kl.load(path, **CPU) as m:
        yield m


@pytest.fixture(autouse=True)
def nothing_is_left_behind(model):
    yield
    if model._engine is not None:
        assert model._engine.usage() == (0, 0), "sequences or pages are still held"
