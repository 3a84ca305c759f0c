"""What tests of the runner's properties share: two random checkpoints and a text of tokens."""

import numpy as np
import pytest
import torch
from checkpoints import hf_logits, hf_model, relative_rms, save
from transformers import KimiLinearForCausalLM

T = 200  # tokens of `ids`
NAN_TOKEN = 3  # of the poisoned checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Weights under which any difference grows fiftyfold on its way to the logits."""
    return save(hf_model("published-pattern", seed=3), tmp_path_factory.mktemp("properties"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """(transformers' model, path): weights that do not amplify, to compare to a tolerance."""
    judge = hf_model("published-pattern", seed=3, gain=0.3)
    return judge, save(judge, tmp_path_factory.mktemp("calm"))


@pytest.fixture(scope="module")
def poisoned_path(tmp_path_factory):
    """The same weights, but one token embeds to NaN: whatever it touches becomes NaN too."""
    model = hf_model("published-pattern", seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_TOKEN] = torch.nan
    return save(model, tmp_path_factory.mktemp("poisoned"))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(5).integers(4, 199, T).tolist()


def others(n, seed):
    return np.random.default_rng(seed).integers(4, 199, n).tolist()


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def calm_rounding(calm):
    """What bfloat16 activations cost: twice the error of transformers' own bfloat16."""
    judge, path = calm
    ids = others(T, 5)
    theirs = KimiLinearForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    allowed = 2 * relative_rms(hf_logits(theirs, ids), hf_logits(judge, ids))
    assert 1e-3 < allowed < 0.03
    return allowed
