"""`_core.Engine` and `_core.Generation` by themselves: callbacks, signals, lifetimes."""

import gc
import os
import signal
import threading
import time

import numpy as np
import pytest
from clocks import now, within
from core_engines import IDS, LONG, engine, judge, path, random_engine, request  # noqa: F401
from engines import open_engine, run


# ---- callbacks --------------------------------------------------------------------------------


def test_an_exception_in_a_callback_comes_out(engine):
    def fail(*_):
        raise LookupError("from the callback")

    for call in (
        lambda: run(engine.generate([request(), request(70)]), process=fail),
        lambda: run(engine.generate([request(150)]), progress=fail),
        lambda: engine.logits(0, IDS, True, fail),
    ):
        with pytest.raises(LookupError, match="from the callback"):
            call()
    assert len(run(engine.generate([request()]))[0]) == 12


def test_a_callback_cannot_call_its_engine(engine):
    for call in (lambda: engine.logits(0, IDS, True, None), engine.usage, engine.close):
        with pytest.raises(RuntimeError, match="a callback cannot call the engine"):
            run(engine.generate([request()]), process=lambda *_, call=call: call())


def test_progress_reaches_the_end(engine):
    told = []
    engine.feed(0, IDS, lambda *p: told.append(p))
    assert told[-1] == (150, 150)
    assert told == sorted(set(told))
    told.clear()
    run(engine.generate([request(100), request(20)]), progress=lambda *p: told.append(p))
    assert told[-1] == (120, 120)
    for bad in (3, "text"):
        with pytest.raises(TypeError, match="progress must be callable, None or False"):
            engine.feed(0, IDS, bad)


def test_a_signal_ends_a_prompt(device):
    """Ctrl-C in a long prefill: within half a second, and the engine goes on."""
    engine = random_engine(device=device)
    ids = np.arange(LONG[device], dtype=np.int32) % 4000
    before = engine.logits(0, ids[:300], True, None)
    seq = engine.seq_new()
    sent = []

    def interrupt():
        time.sleep(0.3)
        sent.append(now())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        engine.feed(seq, ids, None)
    assert within(0.5, sent[0])  # measured: 0.02
    thread.join()
    with pytest.raises(ValueError, match="it can only be released"):
        engine.feed(seq, ids[:3], None)
    engine.seq_release(seq)
    assert engine.usage() == (0, 0)
    assert np.array_equal(engine.logits(0, ids[:300], True, None), before)


# ---- lifetimes --------------------------------------------------------------------------------


def test_close(path, device):
    engine = open_engine(path, device=device, threads=1)
    g = engine.generate([request()])
    g.run(1, None, None)
    engine.close()
    engine.close()
    for call in (
        engine.usage,
        engine.seq_new,
        engine.plan,
        g.stats,
        lambda: g.run(1, None, None),
        lambda: engine.logits(0, IDS, True, None),
        lambda: engine.step([]),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()
    g.close()
    g.close()
    del g, engine
    gc.collect()


def test_a_generation_keeps_its_engine(path, device):
    engine = open_engine(path, device=device, threads=1)
    want = run(engine.generate([request()]))
    g = engine.generate([request()])
    del engine
    gc.collect()
    assert run(g) == want
    g.close()
    with pytest.raises(ValueError, match="closed"):
        g.run(1, None, None)


def test_threads_take_turns(engine):
    """Several threads on one engine: each gets what it would have got alone."""
    requests = [request(n, temperature=0.9, seed=n) for n in (3, 40, 70, 100)]
    alone = [run(engine.generate([r]))[0] for r in requests]
    found: list = [None] * 4

    def work(i):
        found[i] = [run(engine.generate([requests[i]]), max_steps=1)[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [[tokens] * 5 for tokens in alone]


def test_closing_waits_for_a_call(device):
    engine = random_engine(seed=4, device=device)
    ids = list(range(4000))
    found, begun = [], threading.Event()

    def tell(done, total):
        begun.set()

    thread = threading.Thread(target=lambda: found.append(engine.logits(0, ids, True, tell)))
    thread.start()
    assert begun.wait(20)
    engine.close()
    thread.join()
    assert len(found) == 1 and np.isfinite(found[0]).all()


def test_closing_a_generation_waits_for_its_run(device):
    engine = random_engine(seed=5, device=device)
    ids = list(range(4000))
    want = run(engine.generate([dict(ids=ids, max_new_tokens=1)]))
    g = engine.generate([dict(ids=ids, max_new_tokens=1)])
    found, begun = [], threading.Event()

    def tell(done, total):
        begun.set()

    thread = threading.Thread(target=lambda: found.append(g.run(9, None, tell)))
    thread.start()
    assert begun.wait(20)
    g.close()
    thread.join()
    assert [(request, [token]) for request, token, *_ in found[0]] == list(want.items())
    assert engine.usage() == (0, 0)
    with pytest.raises(ValueError, match="closed"):
        g.stats()
