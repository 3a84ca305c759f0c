"""The whole specification against transformers, and its three ways of reading a prompt."""

import numpy as np
import pytest
from checkpoints import CASES, core_config, hf_logits, hf_model, relative_rms, save, tensors
from kimi_linear.reference import Model, State


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(case):
        if case not in made:
            judge = hf_model(case)
            files = tensors(save(judge, tmp_path_factory.mktemp(case)))
            made[case] = judge, Model(core_config(judge.config), files)
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_transformers(models, case):
    judge, model = models(case)
    ids = np.random.default_rng(7).integers(0, judge.config.vocab_size, 200)
    logits = model.forward(ids)
    assert logits.std() > 1 and len(set(logits.argmax(-1))) > 20  # a test that could fail
    assert relative_rms(hf_logits(judge, ids), logits) < 2e-5


@pytest.mark.parametrize("pieces", [[1] * 40, [17, 1, 22], [39, 1]])
def test_pieces_are_the_whole(models, pieces):
    _, model = models("published-pattern")
    ids = np.random.default_rng(8).integers(0, 199, 40)
    whole = model.forward(ids)
    state, done = State(), 0
    for n in pieces:
        got = model.forward(ids[done : done + n], state)
        assert relative_rms(got, whole[done : done + n]) < 1e-10
        done += n
    assert state.length == 40


def test_forks_are_independent(models):
    _, model = models("published-pattern")
    ids = np.random.default_rng(9).integers(0, 199, 20)
    state = State()
    model.forward(ids, state)
    other = state.fork()
    model.forward([5, 6], other)
    again = model.forward([7], state)
    assert relative_rms(again, model.forward([*ids, 7])[-1:]) < 1e-10
    assert (state.length, other.length) == (21, 22)
