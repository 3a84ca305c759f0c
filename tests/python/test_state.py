"""States as users hold them: what each call means and what it refuses. Whether their numbers are
right is told in tests/model/test_states.py, what their files are in test_state_file.py."""

import contextlib
import copy
import gc
import itertools
import pickle
import sys
import threading
import time

import numpy as np
import pytest
from states import IDS, LONG, QUESTION, make, model, nothing_is_left_behind, state  # noqa: F401

import kimi_linear as kl

MESSAGES = [{"role": "system", "content": "a document"}]


# ---- what calls mean ---------------------------------------------------------------------


def test_every_form_of_a_prompt(model):
    text = "The tokens of a file"
    ids = model.tokenizer.encode(text)
    for prompt in (text, ids, np.array(ids), tuple(ids)):
        with model.state() as s:
            assert s.feed(prompt) is s
            assert s.token_ids == ids
            assert s.feed("more").token_ids == ids + model.tokenizer.encode("more")


def test_messages(model):
    """Fed as they are; a generation opens the assistant's turn once, as Model.generate does."""
    template = model.tokenizer.apply_chat_template
    with model.state() as s, model.state() as t:
        s.feed(MESSAGES)
        assert s.token_ids == template(MESSAGES, add_generation_prompt=False)
        a = s.fork().generate(QUESTION, max_new_tokens=3, ignore_eos=True)
        assert a.prompt_token_ids == template(QUESTION)
        s.feed(QUESTION)
        b = s.fork().generate(max_new_tokens=3, ignore_eos=True)
        assert b.prompt_token_ids == template(QUESTION)[len(template(QUESTION, add_generation_prompt=False)) :]
        assert a.token_ids == b.token_ids or a.text != ""
        t.feed([*MESSAGES, *QUESTION])
        c = t.fork().generate(max_new_tokens=3, ignore_eos=True)
        assert c.token_ids
        once = t.generate(max_new_tokens=0)
        assert t.token_ids == template([*MESSAGES, *QUESTION])
        assert t.generate(max_new_tokens=0).prompt_token_ids == [] and once.token_ids == []
        t.feed([{"role": "assistant", "content": "done"}])
        assert t.generate(max_new_tokens=0).prompt_token_ids == []  # nothing waits for an answer


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_is_a_fork(state, duplicate):
    want = state.fork().generate(max_new_tokens=3, ignore_eos=True).token_ids
    with duplicate(state) as other:
        assert other.generate([9], max_new_tokens=3, ignore_eos=True)
        assert state.token_ids == IDS
    assert state.generate(max_new_tokens=3, ignore_eos=True).token_ids == want


def test_a_state_is_not_pickled(state):
    with pytest.raises(TypeError, match=r"state: cannot be pickled; save\(\)"):
        pickle.dumps(state)


def test_a_generation_of_no_tokens_reads_the_prompt(state):
    done = state.generate([7, 8], max_new_tokens=0)
    assert done.token_ids == [] and done.finish_reason == "length"
    assert state.token_ids == [*IDS, 7, 8]


def test_stop_strings_and_tokens_stay_in_the_state(model, state):
    text = state.fork().generate(max_new_tokens=30, ignore_eos=True).text
    done = state.generate(max_new_tokens=30, ignore_eos=True, stop=text[5:7])
    assert done.finish_reason == "stop" and done.text == text[: text.index(text[5:7])]
    assert state.token_ids == IDS + done.token_ids
    with model.state() as s:
        s.feed(IDS)
        first = int(s.logits().argmax())
        done = s.generate(max_new_tokens=9, stop_token_ids=[first])
        assert done.token_ids == [first] and done.finish_reason == "stop"
        assert s.token_ids == [*IDS, first]


def test_processors_and_progress_see_the_whole(model, state):
    seen, calls = [], []
    with model.state() as long:
        long.feed(IDS, progress=lambda done, total: calls.append((done, total)))
    state.generate(
        [5],
        max_new_tokens=2,
        ignore_eos=True,
        logits_processor=lambda ids, logits: seen.append(list(ids)),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert seen[0] == [*IDS, 5] and len(seen[1]) == len(seen[0]) + 1
    assert calls == [(100, 100), (1, 1)]


@pytest.mark.parametrize("bad", [np.zeros(3, np.float32), np.zeros(256), np.zeros((1, 256))])
def test_logits_are_those_of_the_vocabulary(model, bad):
    rule = f"logits must be a float32 array of {model.config.vocab_size} on the cpu, got array"
    with pytest.raises(ValueError, match=f"generate: {rule}"):
        model._engine.generate([{"ids": [], "max_new_tokens": 1, "logits": bad}])
    g = model._engine.generate([{"ids": [1], "max_new_tokens": 1}])
    with pytest.raises(ValueError, match=f"process: {rule}"):
        g.run(1, lambda request, ids, logits: bad, None)
    g.close()


def test_logits_are_a_copy(state):
    state.logits()[:] = 0
    assert state.logits().std() > 0


def test_sampling_is_the_seeds(state):
    options = dict(max_new_tokens=8, temperature=1.5, ignore_eos=True)
    a, b = (state.fork().generate(seed=3, **options).token_ids for _ in "ab")
    assert a == b != state.fork().generate(seed=4, **options).token_ids
    rows = state.generate([[1], [1]], seed=3, **options)
    assert rows[0].token_ids != rows[1].token_ids


def test_info_counts_shared_pages_once(model, state):
    alone = model.plan.of_sequence(len(IDS))
    with state.fork():
        text = str(model.info())
        used = alone + model.plan.kda_state_per_sequence
        assert f"in use      {used / 2**20:.2f} MiB by 2 sequences" in text


def test_peak_counts_shared_pages_once(model, state):
    one = state.generate([[1]], max_new_tokens=1, ignore_eos=True)[0].stats.peak_bytes
    two = state.generate([[1], [2]], max_new_tokens=1, ignore_eos=True)[0].stats.peak_bytes
    assert two - one == model.plan.of_fork(len(IDS), len(IDS) + 2)


def test_a_stream_is_the_generation(model, state):
    options = dict(max_new_tokens=9, temperature=1.0, seed=2, ignore_eos=True)
    for prompt in ([1, 2], None):
        want = state.fork()
        done = want.generate(prompt, **options)
        chunks = list(state.stream(prompt, **options))
        assert [c.token_id for c in chunks] == done.token_ids
        assert "".join(c.text for c in chunks) == done.text
        assert state.token_ids == want.token_ids
        assert np.array_equal(state.logits(), want.logits())
    list(state.stream([7], max_new_tokens=0))
    assert state.token_ids == [*want.token_ids, 7]


def test_a_stream_that_is_left_changes_nothing(model, state):
    before = state.logits()
    for n in (0, 1, 3):
        stream = state.stream([1], max_new_tokens=9, ignore_eos=True)
        for _ in range(n):
            next(stream)
        assert model._engine.usage()[0] == 2
        stream.close()
        del stream
        assert model._engine.usage()[0] == 1
    assert state.token_ids == IDS and np.array_equal(state.logits(), before)
    stream = state.stream([1], max_new_tokens=2, ignore_eos=True)
    next(stream)
    state.feed([2])
    with pytest.raises(ValueError, match="was changed while it was streamed"):
        list(stream)
    assert state.token_ids == [*IDS, 2] and model._engine.usage()[0] == 1
    with pytest.raises(ValueError, match="stream takes one prompt"):
        state.stream([[1], [2]])
    with pytest.raises(ValueError, match="temperature"):
        state.stream(temperature=-1)
    assert model._engine.usage()[0] == 1


# ---- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.feed([]), ValueError, "prompt: must hold at least one token"),
        (lambda s: s.feed(""), ValueError, "prompt: must hold at least one token"),
        (lambda s: s.feed([320]), ValueError, r"token ids must be in 0\.\.319, got 320"),
        (lambda s: s.feed(["a", "b"]), TypeError, r"prompt\[0\]: token ids must be integers"),
        (lambda s: s.feed(7), TypeError, "prompt: must be str"),
        (lambda s: s.feed([1] * 413), ValueError, r"100 tokens and 413 more must be at most 512"),
        (lambda s: s.generate([1] * 412), ValueError, r"100 tokens and 413 more"),
        (lambda s: s.generate([]), ValueError, "prompt: must hold at least one token"),
        (lambda s: s.generate([[1] * 412]), ValueError, "has 512 tokens"),
        (lambda s: s.generate(temperature=-1), ValueError, "temperature"),
        (lambda s: s.generate(tempreature=1), TypeError, "tempreature"),
        (lambda s: s.logprobs([1], top=-1), ValueError, "top"),
        (lambda s: s.logprobs([1] * 414), ValueError, "at most 512"),
        (lambda s: s.score(""), ValueError, "at least one token"),
        (lambda s: s.feed([1], progress=3), TypeError, "progress"),
    ],
)
def test_a_refused_call_changes_nothing(state, call, error, message):
    before = state.logits()
    with pytest.raises(error, match=message):
        call(state)
    assert state.token_ids == IDS and np.array_equal(state.logits(), before)


def test_an_empty_state(model):
    with model.state() as s:
        assert (s.position, s.token_ids) == (0, []) and s.nbytes > 0
        for call in (s.logits, s.generate, lambda: s.score([1])):
            with pytest.raises(ValueError, match="empty"):
                call()


CALLS = {
    "feed": lambda s: s.feed([1]),
    "generate": lambda s: s.generate([1]),
    "stream": lambda s: s.stream([1]),
    "fork": lambda s: s.fork(),
    "logits": lambda s: s.logits(),
    "logprobs": lambda s: s.logprobs([1]),
    "score": lambda s: s.score([1]),
    "save": lambda s: s.save("nowhere/at/all"),
    "position": lambda s: s.position,
    "token_ids": lambda s: s.token_ids,
    "nbytes": lambda s: s.nbytes,
}


@pytest.mark.parametrize("name", CALLS)
def test_after_the_end(name):
    with make() as m:
        released, kept = (m.state().feed(IDS) for _ in range(2))
        with released:
            pass
        released.release()
        assert m._engine.usage()[0] == 1
        with pytest.raises(ValueError, match="state: is released"):
            CALLS[name](released)
    with pytest.raises(ValueError, match="model: is closed"):
        CALLS[name](kept)
    assert "released" in repr(released) and "100 tokens" in repr(kept)
    kept.release()
    with pytest.raises(ValueError, match="model: is closed"):
        m.state()


def test_too_many(model, state):
    forks = [state.fork() for _ in range(3)]
    for call in (state.fork, model.state, lambda: state.score([1, 2])):
        with pytest.raises(kl.OutOfMemory, match=r"all 4 are in use \(max_batch\)"):
            call()
    for s in (state, *forks):  # but each goes on, in place
        s.feed([1]).generate([2], max_new_tokens=2)
    with pytest.raises(kl.OutOfMemory, match="other sequences leave 0"):
        state.generate([[1]])
    del forks, s
    gc.collect()
    assert model._engine.usage()[0] == 1


def fail(*_):
    raise KeyError("mine")


def test_a_failure_leaves_the_state_or_says_that_it_is_lost(model, state):
    before = state.logits()
    for options in ({"prompt": [1, 2]}, {}):
        with pytest.raises(KeyError, match="mine") as caught:
            state.generate(**options, logits_processor=fail)
        assert state.token_ids == IDS and np.array_equal(state.logits(), before)
        assert model._engine.usage()[0] == 1  # though a traceback is held
    forks = [state.fork() for _ in range(3)]
    with pytest.raises(KeyError, match="mine"):
        state.generate(logits_processor=fail)  # nothing was read yet
    assert state.token_ids == IDS
    with pytest.raises(KeyError, match="mine") as caught:
        state.generate([1, 2], logits_processor=fail)
    with pytest.raises(ValueError, match=r"state: was lost .* no other sequence was free"):
        state.logits()
    assert model._engine.usage()[0] == 3
    del forks, caught


def test_an_interrupted_prompt(model):
    """From a progress callback, as from a signal: within steps."""
    with make(LONG, max_context=1 << 16) as m:
        s = m.state().feed(IDS)
        long = [5] * 60000
        with pytest.raises(KeyError):
            s.feed(long, progress=fail)
        assert s.position == 100 and m._engine.usage() == (1, 2)
        s.feed([1])


SHORT = dict(max_new_tokens=2, ignore_eos=True)
INTERRUPTED = {
    "state": lambda m, s, file: m.state().release(),
    "fork": lambda m, s, file: s.fork().release(),
    "feed": lambda m, s, file: s.feed([4, 5]),
    "generate": lambda m, s, file: s.generate([4, 5], **SHORT),
    "several": lambda m, s, file: s.generate([[4, 5], [6]], **SHORT),
    "stream": lambda m, s, file: list(s.stream([4, 5], **SHORT)),
    "score": lambda m, s, file: s.score([[4, 5], [6]]),
    "logprobs": lambda m, s, file: s.logprobs([4, 5]),
    "load": lambda m, s, file: kl.State.load(file, m).release(),
    "hidden": lambda m, s, file: list(m.iter_hidden([4, 5])),
}


def interrupt(call, n):
    """Call it, and raise KeyboardInterrupt at the n-th point where a signal may: a function of
    Python begins, or one of C has returned, whose result is lost then. False: it ended before."""
    points = itertools.count()

    def trace(frame, event, arg):
        if event in ("call", "c_return") and next(points) == n:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a generator
@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupt_at_any_point_leaves_nothing(model, state, name, tmp_path):
    state.save(tmp_path / "s")
    before, n, running = state.logits(), 0, True
    while running:
        with state.fork() as s:
            running = interrupt(lambda s=s: INTERRUPTED[name](model, s, tmp_path / "s"), n)
            assert s.token_ids[: len(IDS)] == IDS
            if len(s) == len(IDS):
                assert np.array_equal(s.logits(), before), n
            assert model._engine.usage()[0] == 2, n
        n += 1
    assert n > 5


def test_a_callback_cannot_use_its_engine(state):
    with pytest.raises(RuntimeError, match="callback cannot call the engine"):
        state.generate([1], logits_processor=lambda ids, logits: state.nbytes)
    assert state.token_ids == IDS


@pytest.mark.parametrize("n", [0, 1, 2, 20])
@pytest.mark.parametrize("others", [0, 3])  # 3: no sequence is free for a copy to work on
def test_a_state_that_its_own_callback_releases_is_gone(model, n, others):
    with contextlib.ExitStack() as stack:
        for _ in range(others):
            stack.enter_context(model.state())
        s = stack.enter_context(model.state()).feed(IDS)
        with pytest.raises(ValueError, match="is released|was lost|has changed|must be one"):
            if n == 0:
                s.feed([1], progress=lambda done, total: s.release())
            else:
                options = dict(max_new_tokens=n, ignore_eos=True)
                s.generate([1], logits_processor=lambda ids, logits: s.release(), **options)
        with pytest.raises(ValueError, match="state: (is released|was lost)"):
            s.logits()
        assert model._engine.usage()[0] == others


def test_a_state_that_dies_in_a_callback_is_released(model, state):
    doomed = [model.state().feed([1])]

    def process(ids, logits):
        doomed.clear()

    state.generate([1], max_new_tokens=2, logits_processor=process)
    assert model._engine.usage()[0] == 1


def test_states_that_are_released_in_a_callback_leave_room_for_others(model, state):
    """Each is given back twice: when it is released, and when its owner dies."""
    doomed = [model.state().feed([1]) for _ in range(3)]

    def process(ids, logits):
        for s in doomed:
            s.release()

    state.generate([1], max_new_tokens=2, logits_processor=process)
    assert model._engine.usage()[0] == 1


def test_threads_share_a_state(model, state):
    """Each call is whole; all are counted."""
    threads = [threading.Thread(target=state.feed, args=([i] * 3,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    rest = np.array(state.token_ids[100:]).reshape(8, 3)
    assert (rest == rest[:, :1]).all() and sorted(rest[:, 0]) == list(range(8))


def test_closing_the_model_under_a_running_call():
    m = make(LONG, max_context=1 << 16)
    s = m.state()
    caught = []

    def feed():
        try:
            s.feed([5] * 8000)
        except ValueError as e:
            caught.append(str(e))

    t = threading.Thread(target=feed)
    t.start()
    time.sleep(0.05)
    m.close()
    t.join()
    assert not caught or "closed" in caught[0]
    with pytest.raises(ValueError, match="closed"):
        s.feed([1])
    s.release()
