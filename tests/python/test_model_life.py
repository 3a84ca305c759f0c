"""A model's life: interruptions, threads, its end, and the memory that it gives back."""

import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from clocks import now, within
from small_models import CONFIG, CPU, model, nothing_is_left_behind, path  # noqa: F401

import kimi_linear as kl
from kimi_linear.testing import random_model, tiny_config


# ---- interruptions, threads, life --------------------------------------------------------


def interrupt_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_leaves_the_model_usable(model, no_gc_callbacks):
    want = model.generate("hello", max_new_tokens=3).token_ids
    rows = [[i] * 500 for i in range(100)]
    long = {"max_new_tokens": 3000, "ignore_eos": True}
    for call in (
        lambda: model.generate(rows, **long),
        lambda: list(model.stream([1], temperature=1.0, **long)),
        lambda: [model.logits(list(range(300)) * 13) for _ in range(100)],
    ):
        timer = interrupt_after(0.3)
        start = now()
        with pytest.raises(KeyboardInterrupt):
            call()
            time.sleep(5)  # the call was faster than the signal
        assert within(3, start)
        timer.join()
        assert model._engine.usage() == (0, 0)
        assert model.generate("hello", max_new_tokens=3).token_ids == want


def test_ctrl_c_ends_a_wait_for_the_model(model, no_gc_callbacks):
    want = model.logprobs([1, 2, 3]).logprobs.tolist()
    held, go_on, got = threading.Event(), threading.Event(), []

    def hold(done, total):
        held.set()
        assert go_on.wait(20)

    def call(progress=False):
        got.append(model.logprobs([1, 2, 3], progress=progress).logprobs.tolist())

    threads = [threading.Thread(target=call, args=[hold])]
    threads[0].start()
    assert held.wait(20)
    threads += [threading.Thread(target=call) for _ in range(2)]  # they wait too
    threads[1].start()
    timer = interrupt_after(0.2)
    with pytest.raises(KeyboardInterrupt):
        call()
    timer.join()
    threads[2].start()
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert got == [want] * 3


def test_threads_share_a_model(model):
    want = [model.generate([i], max_new_tokens=20, ignore_eos=True).token_ids for i in range(6)]
    got, errors = {}, []

    def work(i):
        try:
            for _ in range(3):
                got[i] = model.generate([i], max_new_tokens=20, ignore_eos=True).token_ids
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert [got[i] for i in range(6)] == want


def test_threads_wait_for_the_sequences_of_another_call(path, tmp_path):
    """One call takes all that there are, others in the midst of it take their turn."""
    def held(state, use):
        with state:
            return use(state)

    with kl.load(path, **CPU, max_batch=3, max_context=256) as m:  # two states, one call
        with m.state() as state:
            state.feed([1, 2, 3]).save(tmp_path / "state")
        work = [
            lambda: [c.token_ids for c in m.generate([[1], [2], [3]], max_new_tokens=40)],
            lambda: m.generate([4], max_new_tokens=40, stop="no such text").token_ids,
            lambda: m.score([1, 2], [[3], [4, 5]]),
            lambda: m.logprobs([1, 2, 3]).total,
            lambda: m.logits([1, 2, 3]).tolist(),
            lambda: m.hidden([1, 2], layers=[0])[0].tolist(),
            lambda: held(m.state(), lambda s: s.feed([5]).generate(max_new_tokens=9).token_ids),
            lambda: held(kl.State.load(tmp_path / "state", m), lambda s: s.score([[4, 5], [6]])),
        ]  # fmt: skip
        want = [call() for call in work]
        busy, got, errors = threading.Event(), [None] * len(work), []

        def run(i):
            try:
                assert busy.wait(20)
                got[i] = work[i]()
            except Exception as e:
                errors.append(e)

        def stay(ids, logits):
            busy.set()
            time.sleep(0.002)

        threads = [threading.Thread(target=run, args=[i]) for i in range(len(work))]
        for thread in threads:
            thread.start()
        rows = [[1], [2], [3]]
        m.generate(rows, max_new_tokens=60, ignore_eos=True, logits_processor=stay)
        for thread in threads:
            thread.join(60)
        assert errors == [] and got == want


def test_close(path):
    with kl.load(path, **CPU) as m:
        stream = m.stream("hello", ignore_eos=True)
        next(stream)
    m.close()
    m.close()
    assert "closed" in repr(m)
    for call in (
        lambda: m.generate("x"), lambda: m.stream("x"), lambda: m.logits("x"),
        lambda: m.logprobs("x y"), lambda: m.hidden("x"), lambda: m.score("x", "y"),
        lambda: next(stream),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="closed"):
            call()
    assert m.config == CONFIG and m.tokenizer.vocab_size == 320


def test_closing_while_another_thread_generates(path):
    m = kl.load(path, **CPU)
    outcome = []

    def work():
        try:
            while True:
                m.generate([1], max_new_tokens=50, ignore_eos=True)
        except Exception as e:
            outcome.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    m.close()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(outcome[0], ValueError) and "closed" in str(outcome[0])


def test_closing_from_several_threads(path):
    """Each waits for the call under way, and finds the model closed by the first."""
    m = kl.load(path, **CPU)
    inside, go, errors = threading.Event(), threading.Event(), []

    def hold(ids, logits):
        inside.set()
        assert go.wait(20)

    def close():
        try:
            m.close()
        except Exception as e:
            errors.append(e)

    def work():
        with pytest.raises(ValueError, match="closed"):
            m.generate([1], ignore_eos=True, logits_processor=hold)

    threads = [threading.Thread(target=f) for f in (work, close, close, close)]
    threads[0].start()
    assert inside.wait(20)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.1)
    go.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert errors == [] and "closed" in repr(m)


def test_info_is_text_and_escaped_html(path, tmp_path):
    odd = shutil.copytree(path, tmp_path / "<b>&")
    with kl.load(odd, **CPU) as m:
        info = m.info()
        assert repr(info) == str(info)
        for word in ("3 KDA (softplus gate), 1 MLA", "f32 weights", "MLA pages", "319,774"):
            assert word in info
        for html in (info._repr_html_(), m._repr_html_()):
            assert "<b>" not in html and "&lt;b&gt;&amp;" in html
        assert "cpu f32" in repr(m)
    said = kl.Completion("<b>", [], [], "stop", None, kl.Stats(1, 0, 1, 0.1, 0.1, 1))
    assert "<b>" not in said._repr_html_() and str(said) == "<b>"


def test_random_models_repeat():
    with random_model(device="cpu", dtype="f32", seed=5) as a, \
         random_model(device="cpu", dtype="f32", seed=5) as b, \
         random_model(device="cpu", dtype="f32", seed=6) as c:  # fmt: skip
        x, y, z = (m.logits("hello") for m in (a, b, c))
    assert np.array_equal(x, y) and not np.array_equal(x, z)
    with random_model(device="cpu", dtype="f32", seed=5, router_skew=500) as skewed:
        assert not np.array_equal(x, skewed.logits("hello"))
    with pytest.raises(TypeError, match="no_such"):
        random_model(no_such=1)
    for skew in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"skew must be finite and >= 0, got {skew}"):
            random_model(device="cpu", dtype="f32", router_skew=skew)


def test_stats(model):
    answer = model.generate("hello", max_new_tokens=5, ignore_eos=True)
    stats = answer.stats
    assert (stats.prompt_tokens, stats.new_tokens) == (len(answer.prompt_token_ids), 5)
    assert stats.cached_tokens == 0 and stats.prefill_s > 0 and stats.decode_s > 0
    plan = model.plan
    latents = 64 * plan.mla_page_per_token  # a page of 64 tokens holds them all
    assert stats.peak_bytes == plan.weights + plan.workspace + plan.kda_state_per_sequence + latents
    assert stats.peak_bytes < plan.total
    longer = model.generate([5] * 62, max_new_tokens=5, ignore_eos=True).stats
    assert longer.peak_bytes == stats.peak_bytes + latents
    assert "new 5" in str(stats)


# ---- memory ------------------------------------------------------------------------------


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
def test_memory_is_really_given_back(close):
    config = tiny_config(vocab_size=20_000, hidden_size=512)
    for _ in range(2):  # after the first, what a process keeps is there
        before = resident_bytes()
        m = random_model(config, device="cpu", dtype="f32", max_context=256, max_batch=1)
        assert m.plan.weights > 80e6
        m.logits([1, 2, 3])
        held = resident_bytes() - before
        assert 0.9 * m.plan.weights < held < 1.3 * m.plan.total
        if close:
            m.close()
        else:
            del m
    assert resident_bytes() - before < 0.1 * held
