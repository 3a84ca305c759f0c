"""`kl.Engine` as its callers use it: each request is what `Model.generate` gives, whatever
runs beside it, and every way to wait, to stop and to end means what it says."""

import asyncio
import gc
import os
import signal
import threading

import numpy as np
import pytest
from clocks import now, within
from engine_objects import (  # noqa: F401
    ENDLESS,
    LONG,
    SEQUENCES,
    SHORT,
    Gate,
    answer_of,
    engine,
    gate,
    model,
    roomy,
    same,
    wait_until,
)

import kimi_linear as kl


# ---- answers -----------------------------------------------------------------------------

REQUESTS = [
    ("hello", {}),
    ("hello", dict(temperature=0.9, seed=1)),
    ("hello", dict(temperature=0.9, seed=2, top_p=0.8, logprobs=3)),
    ([7] * 130, dict(repetition_penalty=1.4, max_new_tokens=9)),
    ([{"role": "user", "content": "hi"}], dict(logprobs=0)),
    (np.arange(64), dict(max_new_tokens=0)),
    ("a b c", dict(stop=["e", "t"], ignore_eos=True)),
    ([5], dict(stop_token_ids=[9], ignore_eos=True)),
    ("x", dict(logits_processor=lambda ids, z: z * (np.arange(len(z)) % 7 != len(ids) % 7))),
    ([3] * 500, dict(ignore_eos=True)),  # up to max_context
]


def test_every_request_is_what_generate_gives(model, engine):
    wants = [model.generate(prompt, **{"max_new_tokens": 40} | o) for prompt, o in REQUESTS]
    for turn in range(3):
        requests = [engine.submit(p, **{"max_new_tokens": 40} | o) for p, o in REQUESTS]
        order = requests if turn else reversed(requests)
        for request in order:
            same(request.result(20), wants[requests.index(request)])
            assert request.done() and request.exception() is None


def test_five_hundred_mixed_requests(model, engine):
    """benchmarks/bench_engine.py asks the same of long ones."""
    random = np.random.default_rng(5)
    asked = []
    for i in range(500):
        options = dict(max_new_tokens=int(random.integers(1, 9)), ignore_eos=True)
        options |= dict(temperature=1.0, seed=i) if i % 2 else {}
        asked.append((random.integers(0, 320, int(random.integers(1, 160))), options))
    requests = [engine.submit(prompt, **options) for prompt, options in asked]
    answers = [request.result(120) for request in requests]
    for (prompt, options), answer in zip(asked, answers, strict=True):
        assert answer.token_ids == model.generate(prompt, **options).token_ids
        assert answer.prompt_token_ids == prompt.tolist()


def test_lists_are_those_of_generate(model, engine):
    prompts = ["hello", [1, 2], [{"role": "user", "content": "x"}], [9] * 200, "a"]
    how = dict(temperature=1.0, seed=5, max_new_tokens=12, ignore_eos=True)
    for got, want in zip(
        engine.generate(prompts, **how), model.generate(prompts, **how), strict=True
    ):
        same(got, want)
    same(engine.generate("hello", **how), model.generate("hello", **how))


def test_chunks_are_those_of_stream(model, engine):
    how = dict(max_new_tokens=15, temperature=1.0, seed=4, logprobs=2, ignore_eos=True)
    want = [
        (c.text, c.token_id, c.logprob, c.finish_reason, c.top)
        for c in model.stream("hi", **how)
    ]
    request = engine.submit("hi", **how)

    def chunks():
        return [(c.text, c.token_id, c.logprob, c.finish_reason, c.top) for c in request]

    assert chunks() == want and chunks() == want  # every loop from the beginning
    assert "".join(c[0] for c in want) == request.result().text
    assert [c.stats.new_tokens for c in request] == list(range(1, 16))


def test_seeds_are_fresh_without_one(engine):
    rows = [
        engine.submit([1], temperature=1.0, **SHORT | dict(max_new_tokens=12)) for _ in range(4)
    ]
    assert len({tuple(r.result().token_ids) for r in rows}) == 4


# ---- arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        ("x", dict(temperature=-1), ValueError, "temperature: must be a number in"),
        ("x", dict(max_new_token=3), TypeError, "^max_new_token: must be one of max_new_tokens, "),
        ("x", dict(progress=False), TypeError, "^progress: must be one of"),
        ("x", dict(stop=[""]), ValueError, "stop: strings must have"),
        ("", {}, ValueError, "prompt: must hold at least one token"),
        (["a", "b"], {}, ValueError, "submit takes one prompt, got a list"),
        ([[1]], {}, ValueError, "submit takes one prompt"),
        ([1, 320], {}, ValueError, r"token ids must be in 0\.\.319, got 320"),
        ([1] * 512, {}, ValueError, r"must leave room for a token in max_context \(512\)"),
        (3.5, {}, TypeError, "prompt: must be str"),
    ],
)
def test_wrong_arguments_are_raised_at_submit(engine, prompt, options, error, words):
    with pytest.raises(error, match=words):
        engine.submit(prompt, **options)
    assert engine.stats().done == engine.stats().waiting == 0


def test_its_model_is_checked():
    with pytest.raises(TypeError, match="^model: must be a kimi_linear.Model, got 'path'"):
        kl.Engine("path")


@pytest.mark.parametrize("bad", [-1, 1.5, True, "3"])
def test_max_waiting_is_checked(model, bad):
    with pytest.raises(ValueError, match="max_waiting: must be None or >= 0"):
        kl.Engine(model, max_waiting=bad)


def test_an_engine_can_be_full(model):
    with kl.Engine(model, max_waiting=2) as engine:
        for turn in range(2):
            gate = Gate()
            how = dict(logits_processor=gate, **LONG)
            requests = [engine.submit([1], **how) for _ in range(SEQUENCES + 2)]
            with pytest.raises(kl.EngineFull, match=r"2 requests wait already \(max_waiting\)"):
                engine.submit([1], **LONG)
            gate.open(300)  # nobody's text ends
            wait_until(lambda: engine.stats().running == SEQUENCES)
            assert engine.stats().waiting == 2
            with pytest.raises(kl.EngineFull):
                engine.submit([1], **LONG)
            if turn:  # a list waits for places in place of raising
                answers = []
                batch = threading.Thread(
                    target=lambda: answers.extend(engine.generate([[2]] * 9, **SHORT))
                )
                batch.start()
            requests[-1].cancel()
            for r in requests[:-1]:
                r.cancel()
            gate.open()
            assert [r.result(20).finish_reason for r in requests] == ["cancelled"] * 5
        batch.join(20)
        assert len(answers) == 9 and len({tuple(a.token_ids) for a in answers}) == 1
    with kl.Engine(model, max_waiting=0) as engine:
        running = [engine.submit([1], **LONG) for _ in range(SEQUENCES)]
        with pytest.raises(kl.EngineFull):
            engine.submit([1])
        assert len(engine.generate([[1]] * 4, **SHORT)) == 4  # as the others end
        assert [r.result().finish_reason for r in running] == ["length"] * SEQUENCES


# ---- what befalls one request ------------------------------------------------------------


def test_failures_are_alone(model, engine):
    """A processor that raises, one that exits, logits that are not finite, beside others."""
    want = model.generate("hello", max_new_tokens=60, ignore_eos=True)

    def after(n, what):
        def process(ids, logits):
            if len(ids) > n:
                if isinstance(what, BaseException):
                    raise what
                logits[3] = what

        return process

    fates = [LookupError("mine"), SystemExit(3), np.nan, np.inf]
    beside = [engine.submit("hello", max_new_tokens=60, ignore_eos=True) for _ in range(2)]
    failing = [engine.submit([1, 2], logits_processor=after(6, f), **LONG) for f in fates]
    short = engine.submit([1], logits_processor=lambda ids, z: z[:3])
    assert [len(list(r._chunks)) for r in failing if r.exception(20)] == [5] * 4
    for request, error in zip(
        failing, (LookupError, SystemExit, kl.NumericalError, kl.NumericalError), strict=True
    ):
        with pytest.raises(error):
            request.result()
        with pytest.raises(error):
            list(request)
        with pytest.raises(error):
            asyncio.run(answer_of(request))
    with pytest.raises(ValueError, match="must return logits of shape"):
        short.result()
    for request in beside:
        same(request.result(20), want)
    with pytest.raises(LookupError, match="mine"):
        engine.generate(["hello", [1, 2]], logits_processor=after(6, fates[0]), **LONG)


def test_a_run_that_breaks_is_replaced(model, engine, gate, monkeypatch):
    """Memory may run out up here, too: those under way fail, and say by what."""
    requests = [engine.submit([1], logits_processor=gate, **LONG) for _ in range(5)]
    gate.open(300)
    next(iter(requests[0]))

    def broken(*_):
        raise MemoryError("up here")

    monkeypatch.setattr(engine._worker._run, "step", broken)
    gate.open()
    for request in requests:
        assert isinstance(request.exception(20), MemoryError)
    want = model.generate([1], **SHORT)
    same(engine.generate([1], **SHORT), want)
    assert (engine.stats().done, engine.stats().running) == (6, 0)
    assert engine.stats().new_tokens >= len(requests[0]._chunks) + 4


def test_sequences_of_others_are_not_waited_for(model):
    states = [model.state().feed([1, 2, 3]) for _ in range(SEQUENCES)]
    with kl.Engine(model) as engine:
        with pytest.raises(
            kl.OutOfMemory, match="needs a sequence and 1 pages, but other sequences leave 0"
        ):
            engine.submit([1], **SHORT).result(20)
        states.pop().release()
        rows = [engine.submit([1], **SHORT) for _ in range(3)]  # one after the other
        assert {r.result(20).finish_reason for r in rows} == {"length"}
    for state in states:
        state.release()


# ---- stopping ----------------------------------------------------------------------------


def test_cancel(model, engine, gate):
    gate.open(20)
    running = [engine.submit([1], logits_processor=gate, **LONG) for _ in range(SEQUENCES)]
    waiting = engine.submit([2], **LONG)
    for _ in zip(range(5), running[0], strict=False):
        pass
    assert waiting.cancel() and running[0].cancel()
    gate.open()
    answer, early = running[0].result(20), waiting.result(20)
    assert (early.finish_reason, early.token_ids, early.text) == ("cancelled", [], "")
    assert answer.finish_reason == "cancelled" and 5 <= len(answer.token_ids) < 400
    whole = running[1].result(20)
    assert whole.finish_reason == "length"
    assert whole.token_ids[: len(answer.token_ids)] == answer.token_ids
    assert [c.token_id for c in running[0]] == answer.token_ids  # a loop just ends
    assert not any(r.cancel() for r in running[:2])


def test_a_wait_can_end_early(engine, gate):
    request = engine.submit([1], logits_processor=gate, **SHORT)
    with pytest.raises(TimeoutError):
        request.result(timeout=0.001)
    with pytest.raises(TimeoutError):
        request.exception(timeout=0.001)
    assert not request.done() and "so far" in repr(request)
    gate.open()
    assert request.result(20).finish_reason == "length"


def test_close_cancels_or_waits(roomy):
    for cancel, reason, how in ((True, "cancelled", ENDLESS), (False, "length", LONG)):
        engine = kl.Engine(roomy)
        requests = [engine.submit([1], **how) for _ in range(5)]
        next(iter(requests[0]))
        engine.close(cancel=cancel)
        assert [r.result(0).finish_reason for r in requests] == [reason] * 5
        engine.close()
        for call in (lambda e=engine: e.submit([1]), lambda e=engine: e.generate([[1]])):
            with pytest.raises(ValueError, match="engine: is closed"):
                call()
        assert "closed" in repr(engine) and engine.stats().running == 0
    with pytest.raises(LookupError), kl.Engine(roomy) as engine:
        request = engine.submit([1], **ENDLESS)
        raise LookupError
    assert request.result(0).finish_reason == "cancelled"


def test_many_that_wait_end_with_the_engine(model):
    with kl.Engine(model) as engine:
        requests = [engine.submit([1], **LONG) for _ in range(2000)]
        next(iter(requests[0]))
    assert {r.result(0).finish_reason for r in requests[1000:]} == {"cancelled"}
    assert all(r.done() for r in requests)


def test_ctrl_c_ends_a_list(engine, monkeypatch):
    monkeypatch.setattr(gc, "callbacks", [])  # what raises in one is swallowed
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = now()
    with pytest.raises(KeyboardInterrupt):
        while True:
            engine.generate([[1]] * 40, **LONG)
    assert within(2, start)
    timer.join()
    assert len(engine.generate([1], **SHORT).token_ids) == 4


def test_done_callbacks(engine):
    seen = []
    request = engine.submit([1], **LONG)

    def callback(r):
        """What a callback may do: look, submit, cancel; and what it may not."""
        seen.append((r is request, r.done(), threading.current_thread().name))
        another = engine.submit([1], **SHORT)
        for wait in (another.result, lambda: engine.generate([1]), lambda: list(another)):
            with pytest.raises(RuntimeError, match="cannot wait for a request"):
                wait()
        seen.append(another)
        raise LookupError("logged, and harms nobody")

    request.add_done_callback(callback)
    request.cancel()
    wait_until(lambda: len(seen) == 2)
    assert seen[0] == (True, True, "kimi_linear.Engine")
    assert len(seen[1].result(20).token_ids) == 4
    request.add_done_callback(lambda r: seen.append(threading.current_thread()))
    assert seen[2] is threading.current_thread()

    ended = threading.Event()
    last = engine.submit([1], **SHORT)
    last.add_done_callback(lambda r: (engine.close(), ended.set()))  # from its own thread
    assert ended.wait(20)


def test_a_callback_of_the_model_cannot_wait(model, engine):
    """The thread waits for the call that calls back; its close() does not."""
    other = kl.Engine(model)
    long, called = other.submit([1], **LONG), []

    async def chunks_of(request):
        return [chunk async for chunk in request]

    def process(ids, logits):
        request = engine.submit([1], **SHORT)
        for wait in (
            lambda: request.result(5),
            lambda: request.exception(5),
            lambda: list(request),
            lambda: asyncio.run(answer_of(request)),
            lambda: asyncio.run(chunks_of(request)),
            lambda: engine.generate([1], **SHORT),
        ):
            with pytest.raises(RuntimeError, match="cannot wait for a request"):
                wait()
        other.close()
        called.append(request)

    model.generate([1], max_new_tokens=1, logits_processor=process)
    assert called[0].result(20).finish_reason == "length"
    assert long.result(20).finish_reason in ("cancelled", "length")
    other.close()
