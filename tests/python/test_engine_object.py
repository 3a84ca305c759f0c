"""`kl.Engine` as its callers use it: each request is what `Model.generate` gives, whatever
runs beside it, and every way to wait, to stop and to end means what it says."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref

import engine_hammer
import numpy as np
import pytest
from variants import DEVICES

import kimi_linear as kl
from kimi_linear.testing import random_model, tiny_config

SEQUENCES = 3  # max_batch
LONG = dict(max_new_tokens=400, ignore_eos=True)
LONGER = dict(max_new_tokens=4000, ignore_eos=True)  # some 0.3 s
SHORT = dict(max_new_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module", params=DEVICES)
def model(request):
    how = dict(device=request.param, dtype="bf16", batch_invariant=True)
    with random_model(tiny_config(), seed=3, max_batch=SEQUENCES, max_context=512, **how) as m:
        yield m


@pytest.fixture
def roomy(model):
    """A model with room for LONGER."""
    how = dict(device=model.device, dtype="bf16", batch_invariant=True, max_context=4096)
    with random_model(tiny_config(), seed=3, max_batch=SEQUENCES, **how) as m:
        yield m


@pytest.fixture
def engine(model):
    with kl.Engine(model) as e:
        yield e
    assert model._engine.usage() == (0, 0), "sequences or pages are still held"


def same(got, want):
    """All of a completion but its times."""
    for name in ("text", "token_ids", "prompt_token_ids", "finish_reason", "logprobs"):
        assert getattr(got, name) == getattr(want, name), name
    for name in ("prompt_tokens", "new_tokens", "cached_tokens", "peak_bytes"):
        assert getattr(got.stats, name) == getattr(want.stats, name), name


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


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


@pytest.mark.parametrize("bad", [-1, 1.5, True, "3"])
def test_max_waiting_is_checked(model, bad):
    with pytest.raises(ValueError, match="max_waiting: must be None or >= 0"):
        kl.Engine(model, max_waiting=bad)


def test_an_engine_can_be_full(model):
    with kl.Engine(model, max_waiting=2) as engine:
        for turn in range(2):
            requests = [engine.submit([1], **LONG) for _ in range(SEQUENCES + 2)]
            with pytest.raises(kl.EngineFull, match=r"2 requests wait already \(max_waiting\)"):
                engine.submit([1], **LONG)
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


def test_a_run_that_breaks_is_replaced(model, engine, monkeypatch):
    """Memory may run out up here, too: those under way fail, and say by what."""
    requests = [engine.submit([1], **LONG) for _ in range(5)]
    next(iter(requests[0]))

    def broken(*_):
        raise MemoryError("up here")

    monkeypatch.setattr(engine._worker._run, "step", broken)
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


def test_cancel(model, engine):
    running = [engine.submit([1], **LONG) for _ in range(SEQUENCES)]
    waiting = engine.submit([2], **LONG)
    for _ in zip(range(5), running[0], strict=False):
        pass
    assert waiting.cancel() and running[0].cancel()
    answer, early = running[0].result(20), waiting.result(20)
    assert (early.finish_reason, early.token_ids, early.text) == ("cancelled", [], "")
    assert answer.finish_reason == "cancelled" and 5 <= len(answer.token_ids) < 400
    whole = running[1].result(20)
    assert whole.finish_reason == "length"
    assert whole.token_ids[: len(answer.token_ids)] == answer.token_ids
    assert [c.token_id for c in running[0]] == answer.token_ids  # a loop just ends
    assert not any(r.cancel() for r in running[:2])


def test_a_wait_can_end_early(engine):
    request = engine.submit([1], **LONG)
    with pytest.raises(TimeoutError):
        request.result(timeout=0.001)
    with pytest.raises(TimeoutError):
        request.exception(timeout=0.001)
    assert not request.done() and "so far" in repr(request)
    request.cancel()


def test_close_cancels_or_waits(model):
    for cancel, reason in ((True, "cancelled"), (False, "length")):
        engine = kl.Engine(model)
        requests = [engine.submit([1], **LONG) for _ in range(5)]
        next(iter(requests[0]))
        engine.close(cancel=cancel)
        assert [r.result(0).finish_reason for r in requests] == [reason] * 5
        engine.close()
        for call in (lambda e=engine: e.submit([1]), lambda e=engine: e.generate([[1]])):
            with pytest.raises(ValueError, match="engine: is closed"):
                call()
        assert "closed" in repr(engine) and engine.stats().running == 0
    with pytest.raises(LookupError), kl.Engine(model) as engine:
        request = engine.submit([1], **LONG)
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
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        while True:
            engine.generate([[1]] * 40, **LONG)
    assert time.perf_counter() - start < 2
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


# ---- event loops -------------------------------------------------------------------------


async def answer_of(request):
    return await request


def test_async(model, engine):
    want = model.generate([1], **LONG)

    async def main():
        requests = [engine.submit([1], **LONG) for _ in range(6)]

        async def one(request):
            return [chunk.token_id async for chunk in request]

        found = await asyncio.gather(*map(one, requests), *map(one, requests))
        assert found == [want.token_ids] * 12
        same((await asyncio.gather(*requests))[3], want)
        return requests

    same(asyncio.run(answer_of(asyncio.run(main())[0])), want)  # in another loop, long after


def test_a_cancelled_task_cancels_its_request(roomy):
    async def main():
        awaited, shielded, looped = (engine.submit([1], **LONGER) for _ in range(3))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(awaited, 0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(shielded), 0.01)

        async def loop():
            async for _ in looped:
                pass

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop(), 0.01)
        return [(await r).finish_reason for r in (awaited, shielded, looped)]

    with kl.Engine(roomy) as engine:
        assert asyncio.run(main()) == ["cancelled", "length", "length"]


def test_a_loop_may_be_gone(engine):
    async def main():
        request = engine.submit([1], **LONG)
        chunks = aiter(request)
        await anext(chunks)
        waiting = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0)
        waiting.cancel()
        return request

    request = asyncio.run(main())
    assert request.result(20).finish_reason == "length"


# ---- beside other calls ------------------------------------------------------------------


@pytest.fixture
def quick_switches():
    """Python hands its lock on after 5 ms, in which this model takes 80 steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def test_other_calls_take_turns(roomy, quick_switches):
    """None waits for long, though the engine's thread wants the lock again at once."""
    want = roomy.logprobs([4, 5, 6]).logprobs.tolist(), roomy.generate([8], **SHORT).token_ids
    with kl.Engine(roomy) as engine:
        request = engine.submit([1], **LONGER)
        next(iter(request))
        gaps = []
        with roomy.state() as state:
            for _ in range(16):
                before = len(request._chunks)
                assert roomy.logprobs([4, 5, 6]).logprobs.tolist() == want[0]
                state.feed([1, 2])
                gaps.append(len(request._chunks) - before)
            assert roomy.generate([8], **SHORT).token_ids == want[1]
            assert state.token_ids == [1, 2] * 16
        assert not request.done() and sorted(gaps)[8] < 20, gaps
        assert request.result(20).token_ids == roomy.generate([1], **LONGER).token_ids


def test_two_engines_on_a_model(model, engine):
    want = model.generate([[1]] * 3, **SHORT)[0].token_ids
    with kl.Engine(model) as other:
        rows = [e.submit([1], **SHORT) for _ in range(20) for e in (engine, other)]
        ends = [r.exception(20) for r in rows]  # each may find all sequences taken
        assert all(e is None or isinstance(e, kl.OutOfMemory) for e in ends)
        assert all(
            r.result().token_ids == want for r, e in zip(rows, ends, strict=True) if not e
        )


def test_closing_the_model_ends_the_engine(model):
    m = random_model(tiny_config(), device=model.device, max_batch=2, max_context=512)
    engine = kl.Engine(m)
    requests = [engine.submit([1], **LONG) for _ in range(3)]
    next(iter(requests[0]))
    m.close()
    for request in requests:
        with pytest.raises(ValueError, match="closed"):
            request.result(20)
    with pytest.raises(ValueError, match="closed"):
        engine.submit([1])
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        kl.Engine(m)


def test_stats(engine):
    assert engine.stats().tokens_per_s == 0
    engine.generate([[1] * 100, [2]], **SHORT)
    stats = engine.stats()
    assert (stats.done, stats.prompt_tokens, stats.new_tokens) == (2, 101, 8)
    assert (stats.running, stats.waiting, stats.sequences, stats.pages_used) == (0, 0, 0, 0)
    assert stats.tokens_per_s > 0 and stats.pages == SEQUENCES * 8
    requests = [engine.submit([1] * 70, **LONG) for _ in range(5)]
    next(iter(requests[0]))
    stats = engine.stats()
    assert stats.running == stats.sequences == SEQUENCES and stats.waiting == 2
    assert stats.pages_used >= 2
    for r in requests:
        r.cancel()


# ---- life --------------------------------------------------------------------------------


def test_nobody_refers_to_it(model):
    engine = kl.Engine(model)
    thread = engine._worker._thread
    request = engine.submit([1], **LONG)
    del engine
    gc.collect()
    assert len(request.result(20).token_ids) == 400  # a request keeps its engine
    gone = weakref.ref(request._engine)
    del request
    gc.collect()
    thread.join(20)
    assert not thread.is_alive() and gone() is None


def test_memory_does_not_grow(model):
    if model.device != "cpu":
        pytest.skip("a driver's own memory moves")

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with kl.Engine(model) as engine:
        for turn in range(4):
            for _ in range(6):
                engine.generate([[1] * 120] * 40, max_new_tokens=2)
            if turn == 0:
                before = resident()
        assert engine._worker._run._rows == {} and engine._worker._requests == {}
    assert resident() - before < 2e6  # 720 requests: what one keeps would be 2.8 KB


def run_python(code, device="cpu"):
    head = f"""
        import os, sys, threading, time
        import kimi_linear as kl
        from kimi_linear.testing import random_model, tiny_config
        how = dict(device="{device}", dtype="bf16", max_batch=2, max_context=4096)
        model = random_model(tiny_config(), **how)
        engine = kl.Engine(model)
        endless = dict(max_new_tokens=4000, ignore_eos=True)
    """
    code = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "how", ["", "sys.exit(3)", "raise LookupError", "del engine, model, r"]
)
def test_the_interpreter_exits_with_a_live_engine(model, how):
    """Running, waiting, streamed in another thread, an idle engine: none keeps the process."""
    start = time.monotonic()
    done = run_python(f"""
        r = [engine.submit([1], **endless) for _ in range(4)]
        idle = kl.Engine(model)
        for _ in zip(range(3), r[0]): pass
        threading.Thread(target=lambda r=r: list(r[1]), daemon=True).start()
        print("last words", flush=True)
        {how}
    """, model.device)  # fmt: skip
    assert done.stdout == "last words\n"
    assert done.returncode == {"sys.exit(3)": 3, "raise LookupError": 1}.get(how, 0), (
        done.stderr
    )
    assert ("LookupError" in done.stderr) == (how == "raise LookupError")
    assert "Fatal" not in done.stderr and time.monotonic() - start < 15


def test_a_fork_says_so():
    done = run_python("""
        r = engine.submit([1], **endless)
        next(iter(r))
        if os.fork() == 0:
            assert "parent" in repr(engine)
            calls = lambda: engine.submit([1]), lambda: next(iter(r)), r.result, r.cancel, engine.stats
            for call in calls:
                try:
                    call()
                except RuntimeError as e:
                    assert "did not survive os.fork" in str(e)
                else:
                    os._exit(5)
            engine.close()
            sys.exit(7)
        status = os.waitstatus_to_exitcode(os.wait()[1])
        print(status, len(r.result().token_ids))
    """)
    assert done.stdout == "7 4000\n", done.stderr


def test_threads_and_loops_at_one_engine(model):
    hammer = engine_hammer.Hammer(model, seconds=1, seed=1)
    hammer.run()
    assert sum(hammer.done.values()) > 20
