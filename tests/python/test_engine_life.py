"""`kl.Engine` in event loops, beside other calls and engines, and at its end."""

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import weakref

import engine_hammer
import pytest
from engine_objects import (  # noqa: F401
    ENDLESS,
    LONG,
    SEQUENCES,
    SHORT,
    answer_of,
    engine,
    gate,
    model,
    roomy,
    same,
)

import kimi_linear as kl
from kimi_linear.testing import random_model, tiny_config


# ---- event loops -------------------------------------------------------------------------


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


def test_a_cancelled_task_cancels_its_request(engine, gate):
    async def main():
        awaited, shielded, looped = (
            engine.submit([1], logits_processor=gate, **SHORT) for _ in range(3)
        )
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(awaited, 0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(shielded), 0.01)

        async def loop():
            async for _ in looped:
                pass

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop(), 0.01)
        gate.open()
        return [(await r).finish_reason for r in (awaited, shielded, looped)]

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
        request = engine.submit([1], **ENDLESS)
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
        request.cancel()
        found = request.result(20).token_ids
        alone = roomy.generate([1], max_new_tokens=len(found), ignore_eos=True)
        assert found == alone.token_ids


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


def test_stats(engine, gate):
    assert engine.stats().tokens_per_s == 0
    engine.generate([[1] * 100, [2]], **SHORT)
    stats = engine.stats()
    assert (stats.done, stats.prompt_tokens, stats.new_tokens) == (2, 101, 8)
    assert (stats.running, stats.waiting, stats.sequences, stats.pages_used) == (0, 0, 0, 0)
    assert stats.tokens_per_s > 0 and stats.pages == SEQUENCES * 8
    requests = [engine.submit([1] * 70, logits_processor=gate, **LONG) for _ in range(5)]
    gate.open(300)  # all are there before the first token, nobody's text ends
    next(iter(requests[SEQUENCES - 1]))
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
    assert "Fatal" not in done.stderr


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


@pytest.mark.parametrize("within", [True, False], ids=["within a call", "between two"])
def test_a_fork_beside_a_call(within):
    """In the child no thread is left to end what the model is at; where it is at nothing, it works."""
    done = run_python(f"""
        begun, go = threading.Event(), threading.Event()
        def hold(ids, logits):
            begun.set()
            go.wait()
        call = lambda how={{}}: model.generate([1], max_new_tokens=2, ignore_eos=True, **how).token_ids
        def between():
            with model._calls:
                hold(None, None)
        within = lambda: call(dict(logits_processor=hold))
        threading.Thread(target=within if {within} else between).start()
        begun.wait()
        pid = os.fork()
        if pid == 0:
            if not {within}:
                os._exit(len(call()))
            try:
                call()
            except RuntimeError as e:
                os._exit(7 if "did not survive os.fork" in str(e) else 8)
            os._exit(5)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        go.set()
    """)
    assert done.stdout == f"{7 if within else 2}\n", done.stderr


def test_threads_and_loops_at_one_engine(model):
    hammer = engine_hammer.Hammer(model, seconds=1, seed=1)
    hammer.run()
    assert sum(hammer.done.values()) > 20
