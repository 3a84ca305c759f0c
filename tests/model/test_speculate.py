"""Guesses of next tokens change how fast an answer comes, and nothing else."""

import contextlib

import kimi_linear as kl
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROUND = "12 34 56 78 90 " * 6
LIST = "one, two, three. one, two, three. one, two"
PLAIN = "Once upon a time there was a fisherman who lived by the sea"
TEXTS = (ROUND, LIST, PLAIN, "a")
ASK = dict(max_new_tokens=70, ignore_eos=True, logprobs=2, seed=5)
WAYS = {
    "greedy": {},
    "drawn": dict(temperature=0.7, top_p=0.9),
    "cool": dict(temperature=0.2, top_k=5),
    "penalty": dict(repetition_penalty=1.2),
    "both": dict(temperature=0.3, repetition_penalty=1.05, min_p=0.05),
}


@pytest.fixture(scope="module")
def models():
    """One for each device and dtype, opened when a test asks for it first."""
    with contextlib.ExitStack() as stack:
        opened = {}

        def get(device, dtype="bf16"):
            if (device, dtype) not in opened:
                invariant = device == "cuda"  # whose bits do not depend on how many are verified
                model = kl.load(
                    device=device, dtype=dtype, batch_invariant=invariant, max_context=1024,
                    max_batch=6,
                )  # fmt: skip
                opened[device, dtype] = stack.enter_context(model)
            return opened[device, dtype]

        yield get


@pytest.fixture
def model(device, models):
    yield models(device)
    assert models(device)._engine.usage() == (0, 0)


def outcome(c):
    return c.text, c.token_ids, c.logprobs, c.finish_reason


def both(generate, *args, guesses=8, **options):
    """The answers without and with guesses, found to be the same."""
    plain = generate(*args, **options)
    guessed = generate(*args, **options, speculate=guesses)
    rows = guessed if isinstance(guessed, list) else [guessed]
    for a, b in zip(plain if isinstance(plain, list) else [plain], rows, strict=True):
        assert outcome(a) == outcome(b)
        assert a.stats.drafted == a.stats.accepted == 0
        assert b.stats.drafted >= b.stats.accepted
        assert b.stats.new_tokens == len(b.token_ids)
    return guessed


# ---- the same answers -------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_one_at_a_time(model, way):
    accepted = 0
    for text, guesses in zip(TEXTS, (15, 8, 3, 1), strict=True):
        answer = both(model.generate, text, guesses=guesses, **ASK | WAYS[way])
        accepted += answer.stats.accepted
    assert accepted > 10


@pytest.mark.parametrize("dtype", ["f32", "int8", "int4", "fp8"])
def test_other_weights(models, device, dtype):
    if dtype == ("f32" if device == "cuda" else "fp8"):
        pytest.skip(f"no {dtype} weights")
    assert both(models(device, dtype).generate, ROUND, **ASK).stats.accepted > 10


def test_it_is_of_use(model):
    """Fewer steps than tokens: what the model repeats is not drawn one by one."""
    answer = both(model.generate, ROUND, guesses=15, **ASK)
    assert answer.stats.accepted > 50
    assert "guesses right" in str(answer.stats)


def test_batches(model):
    """More of them than run at once, some with guesses of their own."""
    answers = both(model.generate, list(TEXTS) * 2, **ASK | dict(temperature=0.2))
    assert sum(a.stats.accepted for a in answers) > 0


def test_stops(model):
    """A guess that is or goes past the end of an answer is never read."""
    text = both(model.generate, LIST, **ASK).text
    for stop in (text[9:12], text[30:37], "never"):
        answer = both(model.generate, LIST, **ASK, stop=[stop])
        assert answer.finish_reason == ("length" if stop == "never" else "stop")
    full = model.generate(LIST, **ASK).token_ids
    for token in {full[5], full[20], full[-1]}:
        answer = both(model.generate, LIST, **ASK, stop_token_ids=[token])
        assert answer.token_ids[-1] == token and answer.token_ids.count(token) == 1
    for n in range(8):
        both(model.generate, ROUND, **ASK | dict(max_new_tokens=n), guesses=15)


def test_a_context_that_is_full(model):
    ids = model.tokenizer.encode(ROUND)
    ids = (ids * 50)[: 1024 - 20]
    answer = both(model.generate, ids, guesses=15, **ASK)
    assert len(answer.token_ids) == 20 and answer.finish_reason == "length"


def test_streams(model):
    plain = list(model.stream(ROUND, **ASK))
    guessed = list(model.stream(ROUND, **ASK, speculate=9))
    assert [(c.text, c.token_id, c.logprob, c.top) for c in plain] == [
        (c.text, c.token_id, c.logprob, c.top) for c in guessed
    ]
    assert guessed[-1].stats.accepted > 0 and guessed[-1].finish_reason == "length"
    for n, chunk in enumerate(guessed, 1):  # whoever stops here has had no more
        assert chunk.stats.accepted <= n
    for chunk in model.stream(ROUND, **ASK, speculate=9):
        if chunk.stats.accepted:
            break  # in the middle of a step's tokens


def test_an_engine(model):
    """Prompts come while others guess; one is cancelled; each has its tokens."""
    asks = [ASK | way for way in WAYS.values()]
    want = [model.generate(t, **a) for a in asks for t in TEXTS]
    with kl.Engine(model) as engine:
        requests = [engine.submit(t, **a, speculate=i * 3) for i, a in enumerate(asks) for t in TEXTS]
        gone = engine.submit(ROUND, **ASK | dict(max_new_tokens=300), speculate=15)
        next(iter(gone))
        gone.cancel()
        got = [r.result() for r in requests]
    assert [outcome(c) for c in got] == [outcome(c) for c in want]
    assert sum(c.stats.drafted for c in got[len(TEXTS) :]) > 0 == got[0].stats.drafted


def test_the_prefix_cache(model):
    want = [model.generate(ROUND * 4 + t, **ASK) for t in TEXTS]
    model.prefix_cache = True
    got = model.generate([ROUND * 4 + t for t in TEXTS], **ASK, speculate=8)
    assert [outcome(c) for c in got] == [outcome(c) for c in want]
    assert any(c.stats.cached_tokens for c in got) and any(c.stats.accepted for c in got)
    model.prefix_cache = False


# ---- states -----------------------------------------------------------------------------------



@pytest.mark.parametrize("way", ["greedy", "both"])
def test_a_state_is_the_same_afterwards(model, way, tmp_path):
    """To the last byte of its file, wherever among guesses its answer ended."""
    with model.state().feed(ROUND) as start, contextlib.ExitStack() as stack:
        for n, guesses in ((1, 15), (13, 15), (24, 6), (70, 15)):
            options = ASK | WAYS[way] | dict(max_new_tokens=n)
            plain, guessed = (stack.enter_context(start.fork()) for _ in range(2))
            for turn in ("", " 90 12 34"):
                a = plain.generate(turn or None, **options)
                b = guessed.generate(turn or None, **options, speculate=guesses)
                assert outcome(a) == outcome(b)
                for name, s in (("a", plain), ("b", guessed)):
                    s.save(tmp_path / name)
                assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
                assert plain.nbytes == guessed.nbytes
            with kl.State.load(tmp_path / "b", model) as loaded, plain.fork() as fork:
                a, b = fork.generate(**options), loaded.generate(**options, speculate=guesses)
                assert outcome(a) == outcome(b)
            stack.pop_all().close()


def test_what_a_state_has_read_is_guessed_from(model):
    with model.state().feed(ROUND) as s:
        rows = s.generate(["12 34", "56 78"], **ASK, speculate=15)
        assert all(row.stats.drafted for row in rows)
        chunks = list(s.stream("12 34", **ASK, speculate=15))
        assert chunks[0].stats.drafted == 0 < chunks[-1].stats.drafted
        assert s.token_ids[-len(chunks) :] == [c.token_id for c in chunks]


# ---- properties -------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(10, 14), min_size=1, max_size=90)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompts=st.lists(TOKENS, min_size=1, max_size=5),
    guesses=st.integers(1, 15),
    n=st.integers(0, 60),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 1.3]),
)
def test_any_batch(models, prompts, guesses, n, temperature, penalty):
    both(
        models("cpu").generate, prompts, guesses=guesses, max_new_tokens=n, temperature=temperature,
        repetition_penalty=penalty, seed=1, logprobs=1,
    )  # fmt: skip


# ---- errors -----------------------------------------------------------------------------------


def test_wrong_arguments_are_named(model):
    for wrong in (-1, 16, 1 << 40):
        with pytest.raises(ValueError, match=r"speculate: must be an integer in 0..15, got"):
            model.generate("a", speculate=wrong)
    with pytest.raises(TypeError, match="speculate"):
        model.generate("a", speculate="many")
    with pytest.raises(ValueError, match="speculate: must be 0 with a logits_processor"):
        model.generate("a", speculate=2, logits_processor=lambda ids, logits: None)
    with model.state().feed("a") as s:
        with pytest.raises(ValueError, match="speculate: must be 0 where a state is continued"):
            s.generate("b", speculate=2, stop=["c"])
        s.generate(["b"], speculate=2, stop=["c"], max_new_tokens=3)  # on forks
        before = s.token_ids
        with pytest.raises(ValueError, match="speculate"):
            s.stream("b", speculate=2, stop=["c"])
        assert s.token_ids == before


def test_logits_that_are_not_finite(model):
    """One of two ends, the other has its tokens: as without guesses."""
    with kl.Engine(model) as engine:
        good = engine.submit(ROUND, **ASK, speculate=15)
        bad = engine.submit(ROUND, **ASK, logits_processor=spoil_after(120))
        assert good.result().token_ids == model.generate(ROUND, **ASK).token_ids
        with pytest.raises(kl.NumericalError, match="must be finite"):
            bad.result()


def spoil_after(n):
    def spoil(ids, logits):
        if len(ids) > n:
            logits[:] = np.nan

    return spoil
