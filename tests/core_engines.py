"""What the tests of `_core.Engine` share: a checkpoint that transformers wrote, and an engine on it
that must end without sequences."""


import numpy as np
import pytest
from checkpoints import core_config, hf_config, hf_model, save
from engines import AUTO, open_backend, open_engine
from kimi_linear import _core

CASE = "query-rank"
VOCAB = 199
IDS = np.random.default_rng(2).integers(3, VOCAB, 150).tolist()
LONG = {"cpu": 65536, "cuda": 1 << 19}  # tokens that keep a device busy for seconds


@pytest.fixture(scope="module")
def judge():
    return hf_model(CASE, seed=1, gain=0.3)


@pytest.fixture(scope="module")
def path(judge, tmp_path_factory):
    return save(judge, tmp_path_factory.mktemp("engine"))


@pytest.fixture
def engine(path, device):
    e = open_engine(path, device=device, threads=1, step_tokens=64, invariant=True)
    yield e
    assert e.usage() == (0, 0)  # every test gives back what it took
    e.close()


def random_engine(seed=3, device="cpu", **options):
    """A model whose prompts take a while: for interrupting them."""
    config = core_config(hf_config("published-pattern")) | dict(
        vocab_size=4096, hidden_size=256, dense_inner=1024, moe_inner=256, max_length=1 << 20
    )
    options = AUTO | dict(format="f32", max_context=LONG[device], max_batch=2) | options
    e = _core.Engine(open_backend(device), config, options)
    e.randomize(seed, 1)
    return e


def request(n=6, **other):
    return dict(ids=IDS[:n], max_new_tokens=12) | other
