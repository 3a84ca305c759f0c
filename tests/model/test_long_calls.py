"""Every call that reads a text: it says how far it is, and Ctrl-C ends it in time and harms nothing."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from clocks import now, within
from kimi_linear.testing import random_model, tiny_config
from variants import DEVICES

LONG = {"cpu": 40_000, "cuda": 1 << 19}  # tokens that keep a device busy for seconds
WIDE = dict(vocab_size=4096, hidden_size=256, intermediate_size=1024, moe_intermediate_size=256,
            model_max_length=1 << 20)  # fmt: skip

CALLS = {
    "logprobs": lambda m, s, ids, p: m.logprobs(ids, progress=p),
    "score": lambda m, s, ids, p: m.score(ids, [1], progress=p),
    "score_pairs": lambda m, s, ids, p: m.score_pairs([(ids, [1]), (ids[:99], [2])], progress=p),
    "rolling": lambda m, s, ids, p: m.rolling_logprobs(ids, progress=p),
    "windows": lambda m, s, ids, p: m.rolling_logprobs(ids, window=600, progress=p),
    "logits": lambda m, s, ids, p: m.logits(ids, progress=p),
    "hidden": lambda m, s, ids, p: m.hidden(ids, layers=[0], progress=p),
    "generate": lambda m, s, ids, p: m.generate([ids, ids[:99]], max_new_tokens=1, progress=p),
    "stream": lambda m, s, ids, p: list(m.stream(ids, max_new_tokens=1, progress=p)),
    "state.feed": lambda m, s, ids, p: s.feed(ids, progress=p),
    "state.logprobs": lambda m, s, ids, p: s.logprobs(ids, progress=p),
    "state.score": lambda m, s, ids, p: s.score([ids, [1, 2]], progress=p),
    "state.hidden": lambda m, s, ids, p: s.hidden(ids, layers=[0], progress=p),
    "state.generate": lambda m, s, ids, p: s.generate(ids, max_new_tokens=1, progress=p),
    "state.stream": lambda m, s, ids, p: list(s.stream(ids, max_new_tokens=1, progress=p)),
}


def text(n):
    return np.random.default_rng(n).integers(0, 256, n).astype(np.int32)


@pytest.fixture(scope="module", params=DEVICES)
def model(request):
    device = request.param
    with random_model(tiny_config(**WIDE), device=device, dtype="bf16", seed=1, max_batch=4,
                      max_context=LONG[device] + 256, batch_invariant=True) as m:  # fmt: skip
        yield m


@pytest.fixture
def state(model):
    """Fed before the call; what it holds and the model says must be the same after it."""
    with model.state().feed(text(100)) as s:
        before = [s.logits(), model.logits(text(70)), s.logprobs(text(30)).logprobs]
        yield s
        assert s.position == 100 and model._engine.usage()[0] == 1
        after = [s.logits(), model.logits(text(70)), s.logprobs(text(30)).logprobs]
        assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_progress(model, name):
    """Tokens done so far, up to all of them."""
    told = []
    with model.state().feed(text(100)) as s:
        CALLS[name](model, s, text(1300), lambda *call: told.append(call))
    assert told == sorted(set(told)), told
    assert told[-1][0] == told[-1][1] >= 1299
    assert len({total for _, total in told}) == 1


@pytest.mark.parametrize("name", CALLS)
def test_an_exception_of_the_callback_comes_out(model, state, name):
    def stop(done, total):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        CALLS[name](model, state, text(1300), stop)


@pytest.mark.parametrize("name", CALLS)
def test_ctrl_c(model, state, name, no_gc_callbacks):
    """Within half a second; the state that the call was made on is as before."""
    sent = []

    def interrupt():
        time.sleep(0.05)
        sent.append(now())
        os.kill(os.getpid(), signal.SIGINT)

    threads = [threading.Thread(target=interrupt)]

    def progress(done, total):
        assert done < total, "the text is too short for this machine"
        if not threads[0].ident:  # now it is in the middle of it
            threads[0].start()

    with pytest.raises(KeyboardInterrupt):
        CALLS[name](model, state, text(LONG[model.device.partition(":")[0]]), progress)
        time.sleep(5)  # the call was faster than the signal
    assert within(0.5, sent[0])
    threads[0].join()


def held_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", ["logprobs", "windows"])
def test_memory_is_that_of_the_plan(model, name):
    """All logits of this text would be 164 MB; 16 allow for its ids, the results and the heap."""
    if model.device != "cpu":
        pytest.skip("a GPU's memory is looked at by benchmarks/bench_model.py --only logprobs128k")
    ids, most = text(10_000), []
    CALLS[name](model, None, ids[:1300], None)
    before = held_bytes()
    CALLS[name](model, None, ids, lambda *_: most.append(held_bytes()))
    assert len(most) > 5 and max(most) - before < 16 << 20
