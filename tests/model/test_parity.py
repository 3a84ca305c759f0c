"""The whole package against transformers' KimiLinearForCausalLM, which nobody here wrote.

Checkpoints are saved by transformers itself: other layer patterns, heads, ranks, experts; both
styles of config.json; one file and shards; float32 and bfloat16.
"""

import kimi_linear as kl
import numpy as np
import pytest
import torch
from checkpoints import (
    CASES,
    core_config,
    greedy,
    hf_config,
    hf_logits,
    hf_model,
    relative_rms,
    save,
    tensors,
)
from engines import cut, next_tokens, open_engine, run, whole
from kimi_linear.config import KimiLinearConfig
from kimi_linear.reference import Model, State, log_softmax

WRITTEN = {
    "published-pattern": dict(original=True, shards=True, bf16=True),
    "two-layers-one-head": dict(),
    "mla-first-no-moe": dict(original=True),
    "many-experts": dict(shards=True),
    "groups": dict(original=True, bf16=True),
    "query-rank": dict(original=True, shards=True),
    "wide-heads": dict(bf16=True),
    "short-taps": dict(bf16=True, shards=True),
}
T, PROMPT, NEW = 300, 130, 64


class Case:
    """A checkpoint and what transformers makes of it."""

    def __init__(self, name, folder):
        vocab = hf_config(name).vocab_size
        self.ids = np.random.default_rng(2).integers(0, vocab, T).tolist()
        # A seed with which no choice of an expert hangs on float32's last bits, and greedy text
        # does not end in a loop of a few tokens.
        for seed in range(1, 20):
            self.judge = hf_model(name, seed)
            self.path = save(self.judge, folder / str(seed), **WRITTEN[name])
            self.logits = hf_logits(self.judge, self.ids)
            specification = Model(core_config(self.judge.config), tensors(self.path))
            self.exact = specification.forward(self.ids)
            self.continuation = greedy(self.judge, self.ids[:PROMPT], NEW)
            settled = relative_rms(self.logits, self.exact) < 2e-5
            if settled and len(set(self.continuation)) > 10:
                break


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Case(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_config(cases, name):
    """Both styles of config.json mean what transformers' own config object says."""
    case = cases(name)
    ours = KimiLinearConfig.from_dir(case.path).to_core()
    want = core_config(case.judge.config)
    assert {key: ours[key] for key in want if "lower" not in key} == {
        key: value for key, value in want.items() if "lower" not in key
    }


@pytest.mark.parametrize("name", CASES)
def test_logits(cases, name):
    case = cases(name)
    assert len(set(case.logits.argmax(-1))) > 30  # logits vary
    with kl.load(case.path, device="cpu", dtype="f32", max_context=T, progress=False) as m:
        assert relative_rms(m.logits(case.ids, last=False), case.logits) < 1e-4
        assert relative_rms(m.logits(case.ids, last=False), case.exact) < 1e-5
        assert relative_rms(m.logits(case.ids), case.logits[-1]) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_greedy_continuation(cases, name):
    case = cases(name)
    assert len(set(case.continuation)) > 10
    with kl.load(case.path, device="cpu", dtype="f32", max_context=T, progress=False) as m:
        c = m.generate(case.ids[:PROMPT], max_new_tokens=NEW, ignore_eos=True, progress=False)
    assert c.token_ids == case.continuation


@pytest.mark.parametrize("piece", [1, 7, 64, 65])
@pytest.mark.parametrize("name", CASES)
def test_prefill_in_pieces(cases, name, piece, device):
    case = cases(name)
    engine = open_engine(case.path, device=device, max_context=T)
    try:
        seq, found = engine.seq_new(), []
        for n in cut(PROMPT, piece):
            at = len(found)
            found.extend(np.array(engine.logits(seq, case.ids[at : at + n], False, None)))
        assert relative_rms(found, case.logits[:PROMPT]) < 1e-4
        assert next_tokens(engine, seq, found[-1], NEW) == case.continuation
        seq, done = engine.seq_new(), 0
        for n in cut(T, piece):
            last = engine.step([(seq, case.ids[done : done + n])])
            done += n
        assert relative_rms(last[0], case.logits[-1]) < 1e-4
    finally:
        engine.close()


@pytest.mark.parametrize("name", CASES)
def test_generation(cases, name, device):
    """The steps of a generation, which a device may have recorded, against transformers'."""
    case = cases(name)
    engine = open_engine(case.path, device=device, max_context=T)
    assert relative_rms(whole(engine, case.ids), case.logits) < 1e-4
    requests = [dict(ids=case.ids[:PROMPT], max_new_tokens=NEW), dict(ids=[5], max_new_tokens=3)]
    assert run(engine.generate(requests))[0] == case.continuation
    engine.close()


def test_logprobs(cases):
    case = cases("published-pattern")
    want = torch.log_softmax(torch.tensor(case.logits).double(), -1).numpy()
    following = np.array(case.ids[1:])
    with kl.load(case.path, device="cpu", dtype="f32", max_context=T, progress=False) as m:
        found = m.logprobs(case.ids)
        total, is_greedy = m.score(case.ids[:PROMPT], case.continuation)
    expected = want[np.arange(T - 1), following]
    assert np.abs(np.asarray(found.logprobs) - expected).max() < 1e-3
    assert np.array_equal(np.asarray(found.greedy), want[:-1].argmax(-1) == following)
    assert is_greedy and -100 < total < 0


def test_residual_streams(cases):
    """`hidden` is the residual stream after a layer, as the specification has it."""
    case = cases("published-pattern")
    specification = Model(core_config(case.judge.config), tensors(case.path))
    want = specification.residuals(case.ids, State())
    with kl.load(case.path, device="cpu", dtype="f32", max_context=T, progress=False) as m:
        found = m.hidden(case.ids, layers=(0, 3, 6))
    assert sorted(found) == [0, 3, 6]
    for layer, stream in found.items():
        assert relative_rms(stream, want[layer + 1]) < 1e-5
    assert relative_rms(want[1], want[4]) > 0.1  # layers differ: a wrong one would show


def test_alternatives(cases):
    case = cases("many-experts")
    want = log_softmax(case.exact)
    order = np.argsort(-want, axis=-1)[:, :5]
    with kl.load(case.path, device="cpu", dtype="f32", max_context=T, progress=False) as m:
        ids, logprobs = m.logprobs(case.ids, top=5).top
    assert ids.shape == (T - 1, 5)
    assert np.abs(logprobs - np.take_along_axis(want[:-1], ids, -1)).max() < 1e-3
    assert (ids == order[:-1]).all(-1).sum() >= T - 3  # near ties may change places


@pytest.mark.parametrize("original", [False, True])
def test_a_head_that_only_the_config_ties(original, tmp_path):
    """transformers ties nothing where `tie_word_embeddings` is true, and saves both matrices."""
    judge = hf_model("two-layers-one-head")
    judge.config.tie_word_embeddings = True
    save(judge, tmp_path, original=original)
    ids = list(range(20))
    with kl.load(tmp_path, device="cpu", dtype="f32", max_context=64, progress=False) as m:
        assert relative_rms(m.logits(ids, last=False), hf_logits(judge, ids)) < 1e-5
        assert "lm_head.weight is there and is used" in m.info()
        assert not m.config.tie_word_embeddings
