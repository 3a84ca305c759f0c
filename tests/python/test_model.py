"""The model as users drive it. Whether its numbers are right is told in tests/model; here: that
every call means what it says, that batches and streams change nothing."""

import os
import shutil

import numpy as np
import pytest
from small_models import CONFIG, CPU, PROMPTS, model, nothing_is_left_behind, path  # noqa: F401

import kimi_linear as kl
from kimi_linear._sampling import row_seed
from kimi_linear.checkpoint import Checkpoint


def ids_of(model, prompt):
    return model.generate(prompt, max_new_tokens=0).prompt_token_ids


# ---- generation --------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "letter", "ids", "chat"])
def test_greedy_takes_the_most_likely_token(model, prompt):
    ids = ids_of(model, prompt)
    answer = model.generate(prompt, max_new_tokens=6, ignore_eos=True)
    for token in answer.token_ids:
        assert token == int(np.argmax(model.logits(ids)))
        ids = [*ids, token]
    assert answer.finish_reason == "length"
    assert answer.text == model.tokenizer.decode(answer.token_ids)


def test_a_row_in_a_batch_is_the_row_alone(model):
    batch = model.generate(PROMPTS, max_new_tokens=12, ignore_eos=True, logprobs=3)
    for prompt, row in zip(PROMPTS, batch, strict=True):
        alone = model.generate(prompt, max_new_tokens=12, ignore_eos=True, logprobs=3)
        assert (row.token_ids, row.text, row.logprobs) == (
            alone.token_ids, alone.text, alone.logprobs)  # fmt: skip
        assert row.prompt_token_ids == alone.prompt_token_ids
    assert model.generate([PROMPTS[0]], max_new_tokens=1)[0].prompt_token_ids == ids_of(
        model, PROMPTS[0]
    )


def test_every_form_of_ids(model):
    want = model.generate([1, 2, 3], max_new_tokens=5).token_ids
    for form in ((1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint8),
                 [np.int64(1), np.int32(2), 3]):  # fmt: skip
        assert model.generate(form, max_new_tokens=5).token_ids == want
    batch = model.generate(np.array([[1, 2, 3], [1, 2, 3]]), max_new_tokens=5)
    assert [c.token_ids for c in batch] == [want, want]


def test_filters_that_leave_one_token_are_greedy(model):
    want = model.generate("hello", max_new_tokens=10, ignore_eos=True).token_ids
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-5}):
        options = {"temperature": 1.0, "seed": 3} | options
        got = model.generate("hello", max_new_tokens=10, ignore_eos=True, **options)
        assert got.token_ids == want, options


def test_seeds(model):
    def draw(prompts, seed):
        found = model.generate(
            prompts, max_new_tokens=12, temperature=1.5, seed=seed, ignore_eos=True
        )
        return [c.token_ids for c in found]

    three = draw(["hello"] * 3, 7)
    assert three == draw(["hello"] * 3, 7)
    assert draw(["hello"], 7) == three[:1]  # row 0 does not know of the others
    assert len({tuple(t) for t in three}) == 3
    assert draw(["hello"], 8) != three[:1]
    assert draw(["hello"], None) != draw(["hello"], None)
    assert draw(["hello"], (1 << 64) - 1)


def test_row_seeds_are_splitmix64():
    """First outputs of SplitMix64 started at 1234567, as published with the generator."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [row_seed(1234567, i) for i in range(3)] == [x >> 1 for x in published]


def test_samples_follow_the_distribution(model):
    logits = model.logits("hello").astype(np.float64) / 0.7
    p = np.exp(logits - logits.max())
    p /= p.sum()
    n = 3000
    rows = model.generate(["hello"] * n, max_new_tokens=1, temperature=0.7, seed=0)
    counts = np.bincount([c.token_ids[0] for c in rows], minlength=len(p))
    big = p > 20 / n
    assert big.sum() > 5
    z = (counts[big] - n * p[big]) / np.sqrt(n * p[big] * (1 - p[big]))
    assert np.abs(z).max() < 5


def test_a_strong_penalty_leaves_no_repetition(model):
    ids = model.generate(
        [9], max_new_tokens=60, repetition_penalty=1e6, ignore_eos=True
    ).token_ids
    logits_can_be_negative = len(set(ids)) > 50
    assert logits_can_be_negative
    plain = model.generate([9], max_new_tokens=60, ignore_eos=True).token_ids
    assert len(set(ids)) >= len(set(plain))


def test_max_new_tokens(model):
    empty = model.generate("hello", max_new_tokens=0)
    assert (empty.stats.prefill_rate, empty.stats.decode_rate) == (0.0, 0.0)
    assert (empty.text, empty.token_ids, empty.finish_reason) == ("", [], "length")
    mixed = model.generate(["hello", "x"], max_new_tokens=1)
    assert [len(c.token_ids) for c in mixed] == [1, 1]


def test_log_probabilities_of_new_tokens(model):
    answer = model.generate("hello", max_new_tokens=8, ignore_eos=True, logprobs=5)
    whole = model.logprobs(answer.prompt_token_ids + answer.token_ids, top=5)
    tail = len(answer.prompt_token_ids) - 1
    for i, token in enumerate(answer.logprobs):
        assert token.token_id == answer.token_ids[i] == token.top[0][0]
        assert token.logprob == pytest.approx(whole.logprobs[tail + i], abs=1e-4)
        assert [t for t, _ in token.top] == whole.top[0][tail + i].tolist()
        assert [p for _, p in token.top] == pytest.approx(whole.top[1][tail + i], abs=1e-4)
    assert model.generate("hello", max_new_tokens=2).logprobs is None
    only = model.generate("hello", max_new_tokens=2, logprobs=0).logprobs
    assert [t.top for t in only] == [(), ()]


# ---- streams -----------------------------------------------------------------------------


def test_a_stream_says_what_generate_says(model):
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        whole = model.generate("hello", max_new_tokens=25, ignore_eos=True, **options)
        chunks = list(model.stream("hello", max_new_tokens=25, ignore_eos=True, **options))
        assert "".join(c.text for c in chunks) == whole.text
        assert [c.token_id for c in chunks] == whole.token_ids
        assert [c.stats.new_tokens for c in chunks] == list(range(1, 26))
        assert chunks[-1].finish_reason == whole.finish_reason == "length"
        assert all(c.finish_reason is None and c.logprob <= 0 for c in chunks[:-1])


def test_a_stream_gives_the_alternatives_that_generate_gives(model):
    whole = model.generate("hello", max_new_tokens=5, ignore_eos=True, logprobs=3)
    chunks = list(model.stream("hello", max_new_tokens=5, ignore_eos=True, logprobs=3))
    assert [c.top for c in chunks] == [t.top for t in whole.logprobs]
    assert all(len(c.top) == 3 for c in chunks)
    assert next(model.stream("hello", max_new_tokens=1)).top == ()


def test_leaving_a_stream_early_frees_its_sequence(model):
    stream = model.stream("hello", max_new_tokens=100, ignore_eos=True)
    next(stream)
    assert model._engine.usage()[0] == 1
    stream.close()
    assert model._engine.usage() == (0, 0)
    for _ in model.stream("hello", max_new_tokens=100, ignore_eos=True):
        break
    stream = None
    unused = model.stream("hello")  # never begun
    del unused


def test_a_stream_checks_its_arguments_at_the_call(model):
    with pytest.raises(ValueError, match="temperature"):
        model.stream("hello", temperature=-1)
    with pytest.raises(ValueError, match="one prompt"):
        model.stream(["hello", "x"])
    with pytest.raises(TypeError, match="temprature"):
        model.stream("hello", temprature=1)


def test_calls_inside_a_stream(model):
    want = model.generate("hello", max_new_tokens=5, ignore_eos=True).token_ids
    got = []
    for chunk in model.stream("hello", max_new_tokens=5, ignore_eos=True):
        got.append(chunk.token_id)
        model.logits("x")
        model.generate("y", max_new_tokens=2)
    assert got == want


# ---- looking inside ----------------------------------------------------------------------


def log_softmax(z):
    z = z.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_logprobs_are_the_softmax_of_the_logits(model):
    ids = list(range(40, 140))
    want = log_softmax(model.logits(ids, last=False))[:-1]
    found = model.logprobs(ids, top=4)
    assert found.token_ids == ids
    assert found.logprobs.dtype == np.float32 and found.greedy.dtype == bool
    assert np.abs(found.logprobs - want[np.arange(99), ids[1:]]).max() < 1e-4
    assert np.array_equal(found.greedy, want.argmax(-1) == ids[1:])
    order = np.argsort(-want, axis=-1, kind="stable")[:, :4]
    assert np.array_equal(found.top[0], order)
    assert np.abs(found.top[1] - np.take_along_axis(want, order, -1)).max() < 1e-4
    assert model.logprobs(ids).top is None


def test_a_single_token_has_no_logprob(model):
    found = model.logprobs([5], top=3)
    assert found.logprobs.shape == found.greedy.shape == (0,)
    assert found.top[0].shape == found.top[1].shape == (0, 3)


def test_score_is_the_sum_over_the_continuation(model):
    context, rest = [4, 5, 6], [7, 8]
    whole = model.logprobs(context + rest)
    ll, greedy = model.score(context, rest)
    assert ll == pytest.approx(float(whole.logprobs[2:].sum(dtype=np.float64)), abs=1e-6)
    assert isinstance(ll, float) and greedy is bool(whole.greedy[2:].all())
    best = model.generate(context, max_new_tokens=4, ignore_eos=True).token_ids
    assert model.score(context, best)[1] is True
    assert model.score("the ", "file") == model.score(
        model.tokenizer.encode("the "), model.tokenizer.encode("file")
    )


def test_hidden_gives_the_logits_through_norm_and_head(model, path):
    with Checkpoint(path) as checkpoint:

        def weight(name):
            entry = checkpoint.tensors[name]
            raw = os.pread(checkpoint.fds[entry.file], entry.nbytes, entry.offset)
            return np.frombuffer(raw, np.float32).reshape(entry.shape).astype(np.float64)

        norm, head = weight("model.norm.weight"), weight("lm_head.weight")
        embedding = weight("model.embed_tokens.weight")
    ids = list(range(30))
    hidden = model.hidden(ids)
    assert list(hidden) == [0, 2, 3]
    x = hidden[3].astype(np.float64)
    assert x.shape == (30, 64) and hidden[3].dtype == np.float32
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * norm
    want = model.logits(ids, last=False)
    assert np.abs(x @ head.T - want).max() < 1e-4 * np.abs(want).max()
    assert not np.allclose(hidden[0], embedding[ids])
    assert list(model.hidden(ids, layers=[1])) == [1]
    for layers in ([4], [-1], [True], ["x"]):
        with pytest.raises((ValueError, TypeError), match="layers"):
            model.hidden(ids, layers=layers)


def test_a_prompt_longer_than_a_step(model):
    ids = np.random.default_rng(0).integers(0, 300, 1300).tolist()
    assert model.plan.step_tokens < 1300
    whole = model.logits(ids, last=False)
    assert np.array_equal(model.logits(ids), whole[-1])
    want = log_softmax(whole)[np.arange(1299), ids[1:]]
    assert np.abs(model.logprobs(ids).logprobs - want).max() < 1e-3


# ---- a checkpoint without a tokenizer ----------------------------------------------------


def test_ids_work_and_text_says_why_not(path, model, tmp_path):
    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "tiktoken.model").unlink()
    with kl.load(copy, **CPU) as m:
        answer = m.generate([1, 2, 3], max_new_tokens=4)
        want = model.generate([1, 2, 3], max_new_tokens=4)
        assert (answer.token_ids, answer.text) == (want.token_ids, "")
        assert [c.text for c in m.stream([1], max_new_tokens=2)] == ["", ""]
        assert m.logits([1]).shape == (320,)
        for call in (
            lambda: m.generate("hello"),
            lambda: m.chat([{"role": "user", "content": "x"}]),
            lambda: m.generate([1], stop="x"),
            lambda: m.logprobs("hello"),
            lambda: m.tokenizer,
        ):
            with pytest.raises(kl.TokenizerError, match="has no tiktoken.model"):
                call()
