"""A sequence whose numbers are no longer finite: its own call says so, and nobody else notices, not
even who gets its memory. Whether NaN leaks within a step is told in test_properties.py."""

import contextlib
import gc

import kimi_linear as kl
import numpy as np
import pytest
from random_weights import NAN_TOKEN, others, path, poisoned_path  # noqa: F401  fixtures

GOOD = others(150, 1)
BAD = [*others(80, 2), NAN_TOKEN, *others(20, 3)]
ROOM = 3  # sequences
FINITE = "must be finite"


def options(device):
    return dict(device=device, dtype="bf16", max_context=512, max_batch=ROOM, progress=False,
                batch_invariant=device == "cuda")  # fmt: skip


@pytest.fixture
def model(poisoned_path, path, device):
    """After the test: full of sequences again, each says what it says in a model without NaN."""
    with kl.load(poisoned_path, **options(device)) as m:
        yield m
        assert m._engine.usage() == (0, 0)
        states = [m.state().feed(GOOD) for _ in range(ROOM)]
        got = [s.logits() for s in states]
    with kl.load(path, **options(device)) as clean, clean.state().feed(GOOD) as s:
        assert all(np.array_equal(x, s.logits()) for x in got)


READING = {
    "generate": lambda m: m.generate(BAD, max_new_tokens=3),
    "stream": lambda m: list(m.stream(BAD, max_new_tokens=3)),
    "logprobs": lambda m: m.logprobs(BAD),
    "score": lambda m: m.score(BAD, [5]),
    "score_pairs": lambda m: m.score_pairs([(GOOD, [5]), (GOOD, [6, 7]), (BAD, [5])]),
    "rolling": lambda m: m.rolling_logprobs(BAD, prefix=5),
    "feed": lambda m: m.state().feed(BAD),
}


@pytest.mark.parametrize("name", READING)
def test_a_text_that_poisons(model, name):
    want = model.logits(GOOD)
    with pytest.raises(kl.NumericalError, match=FINITE):
        READING[name](model)
    assert np.array_equal(model.logits(GOOD), want)
    assert np.isnan(model.logits(BAD)).all()  # who looks at the numbers themselves sees them


def test_messages_name_the_place(model):
    with pytest.raises(kl.NumericalError, match="log-probability after token 80 must be finite"):
        model.logprobs(BAD)
    with pytest.raises(kl.NumericalError, match="of token 0 of continuation 2 must be finite"):
        model.score_pairs([(GOOD, [5]), (GOOD, [6, 7]), (BAD, [5])])
    with pytest.raises(kl.NumericalError, match="logits after 101 tokens must be finite"):
        model.state().feed(BAD)


def test_in_a_batch(model):
    """More rows than sequences, before and after the bad one, which may leave its memory to them."""
    rows = [others(n, n) for n in (70, 5, 130, 64)]
    with pytest.raises(kl.NumericalError, match=FINITE):
        model.generate([*rows[:2], BAD, *rows[2:]], max_new_tokens=4, ignore_eos=True)
    assert model._engine.usage() == (0, 0)
    with model.state().feed(GOOD) as s:
        before = s.logits()
        with pytest.raises(kl.NumericalError, match=FINITE):
            s.generate([*rows[:2], BAD, *rows[2:]], max_new_tokens=4, ignore_eos=True)
        assert np.array_equal(s.logits(), before) and s.token_ids == GOOD
        with pytest.raises(kl.NumericalError, match=FINITE):
            s.score([*rows, BAD])
        assert s.score(rows) == [s.score(row) for row in rows]


def force(token):
    """A processor that chooses this token as the third one."""

    def process(ids, logits):
        if len(ids) == len(GOOD) + 2:
            logits[:] = -1
            logits[token] = 1

    return process


def test_a_token_that_poisons(model):
    """In the middle of an answer: what came before it has been given out."""
    how = dict(max_new_tokens=9, ignore_eos=True, logits_processor=force(NAN_TOKEN))
    with pytest.raises(kl.NumericalError, match=f"logits after {len(GOOD) + 3} tokens"):
        model.generate(GOOD, **how)
    told = []
    with pytest.raises(kl.NumericalError, match=FINITE):
        told.extend(c.token_id for c in model.stream(GOOD, **how))
    stream = model.stream(GOOD, **how)
    told = [next(stream).token_id for _ in range(3)]
    assert told[2] == NAN_TOKEN
    with pytest.raises(kl.NumericalError, match=FINITE):
        next(stream)
    with model.state().feed(GOOD) as s:
        before = s.logits()
        with pytest.raises(kl.NumericalError, match=FINITE):
            s.generate(**how)
        assert s.position == len(GOOD) and np.array_equal(s.logits(), before)
        fine = s.generate(max_new_tokens=4, ignore_eos=True)
        assert fine.token_ids == model.generate(GOOD, max_new_tokens=4, ignore_eos=True).token_ids


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_processor_that_poisons(model, value):
    def process(ids, logits):
        logits[7] = value
        if np.isneginf(value):
            logits[:] = value  # one alone only forbids a token

    with pytest.raises(kl.NumericalError, match=FINITE):
        model.generate([GOOD, GOOD[:9]], max_new_tokens=3, logits_processor=process)


def test_a_state_that_is_poisoned(model):
    """From outside, as by a kernel that went wrong. It stays so; forks of it are, others not."""
    with model.state().feed(GOOD) as good, model.state().feed(GOOD) as bad:
        engine, seq = model._engine, bad._held.sequence.seq
        memory, window = engine.seq_read_kda(seq, 0)
        engine.seq_write_kda(seq, 0, np.full_like(memory, np.nan), window)
        for call in (
            lambda: bad.feed([5]),
            lambda: bad.generate([5], max_new_tokens=2),
            lambda: bad.fork().generate([5], max_new_tokens=2),
            lambda: bad.logprobs([5, 6]),
            lambda: bad.score([[5, 6], [7]]),
        ):
            with pytest.raises(kl.NumericalError, match=FINITE):
                call()
        with model.state().feed(GOOD) as same:
            assert np.array_equal(good.feed([5]).logits(), same.feed([5]).logits())


def test_a_state_without_a_spare_sequence_is_lost_rather_than_poisoned(model):
    states = [model.state().feed(GOOD) for _ in range(ROOM)]
    with pytest.raises(kl.NumericalError, match=FINITE):
        states[1].feed(BAD)
    with pytest.raises(ValueError, match="state: was lost"):
        states[1].logits()
    again = model.state().feed(GOOD)  # in its place
    assert np.array_equal(again.logits(), states[0].logits())


def test_an_error_keeps_no_memory(model):
    """Of a state that nobody refers to any more, whether the collector runs or not."""
    gc.collect()
    gc.disable()
    try:
        for text in (BAD, [*GOOD, NAN_TOKEN]):
            state = model.state().feed(GOOD)
            with contextlib.suppress(kl.NumericalError):
                state.generate(text, max_new_tokens=2)
            del state
            assert model._engine.usage() == (0, 0)
    finally:
        gc.enable()
