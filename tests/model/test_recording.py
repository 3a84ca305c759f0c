"""Token steps that the GPU replays from a recording have the bits of enqueued ones.

A logits processor, even one that changes nothing, makes the runner enqueue its steps: their logits
cross the host. What the recording does by itself is told on a CPU, in tests/c/test_recording.c.
"""

import numpy as np
import pytest
from checkpoints import hf_model, save
from engines import open_engine
from on_cuda import has_cuda

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device and torch")

PROMPTS = [1, 60, 130, 7, 250]  # tokens; a page has 64, and tables double after 1, 2 and 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(hf_model("published-pattern"), tmp_path_factory.mktemp("recording"), bf16=True)


@pytest.fixture(params=["f32", "bf16", "int8", "fp8", "int4"])
def engine(path, request):
    e = open_engine(path, device="cuda", format=request.param, max_batch=5, max_context=1024)
    yield e
    assert e.usage() == (0, 0)
    e.close()


def requests(n, new_tokens=80):
    """Requests that end one after the other; some with alternatives, penalties, draws."""
    rng = np.random.default_rng(n)
    return [
        dict(
            ids=rng.integers(3, 199, PROMPTS[i]).tolist(),
            max_new_tokens=new_tokens + 5 * i,
            temperature=0.8 * (i % 2),
            seed=i,
            repetition_penalty=1.3 if i == 2 else 1.0,
            top=3 * (i == 1),
        )
        for i in range(n)
    ]


def unchanged(request, ids, logits):
    return None


def finish(generation, process):
    events = []
    while not generation.done():
        events += generation.run(16, process, None)
    return events


def take_turns(engine, process):
    """Two generations on one engine: two, then three, then all sequences at each step."""
    first, second = engine.generate(requests(2)), engine.generate(requests(3))
    events = [], []
    while not (first.done() and second.done()):
        for kept, generation in zip(events, (first, second), strict=True):
            kept += generation.run(1, process, None)
    return events


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_bits_of_enqueued_steps(engine, n):
    want = finish(engine.generate(requests(n)), unchanged)
    assert len(want) == sum(r["max_new_tokens"] for r in requests(n))
    for turn in range(2):  # the second finds all of its shapes recorded
        assert finish(engine.generate(requests(n)), None) == want, turn


def test_generations_take_turns(engine):
    want = take_turns(engine, unchanged)
    assert take_turns(engine, None) == want
    assert take_turns(engine, None) == want


def test_stop_tokens(engine):
    """A step is under way when a stop token comes: it does nothing to the next request."""
    whole = finish(engine.generate(requests(1)), None)
    tokens = [e[1] for e in whole]
    for token in dict.fromkeys(tokens[:24]):
        end = tokens.index(token)
        events = finish(engine.generate([requests(1)[0] | dict(stop_ids=[token])]), None)
        assert [e[1:3] for e in events] == [e[1:3] for e in whole[: end + 1]]
        assert events[-1][3] == "stop" and engine.usage() == (0, 0)


def test_a_stop_beside_others(path):
    """Those beside it go on; a step counts it once more, so this takes rows that stand alone."""
    e = open_engine(
        path, device="cuda", format="bf16", max_batch=3, max_context=512, invariant=True
    )
    alone = [finish(e.generate([r]), unchanged) for r in requests(2)]
    for end in (3, 4, 17, 64):
        stop = dict(stop_ids=[alone[0][end][1]])
        first = [x[1] for x in alone[0]].index(alone[0][end][1])
        both = finish(e.generate([requests(2)[0] | stop, requests(2)[1]]), None)
        assert [x[1:3] for x in both if x[0] == 0] == [x[1:3] for x in alone[0][: first + 1]]
        assert [x[1:3] for x in both if x[0] == 1] == [x[1:3] for x in alone[1]]
    e.close()


def test_leaving_early(engine):
    """A generation that is left, or closed, with a step under way."""
    want = finish(engine.generate(requests(2)), None)
    for steps in range(1, 12):
        generation = engine.generate(requests(2))
        events = generation.run(steps, None, None)
        assert events == want[: len(events)]
        generation.close()
        assert engine.usage() == (0, 0)
    assert finish(engine.generate(requests(2)), None) == want


def test_nothing_else_is_touched(engine):
    """Sequences at rest, forks and prompts between replayed steps are what they are without."""
    ids = np.random.default_rng(9).integers(3, 199, 100).tolist()
    found = []
    for busy in (False, True):
        seq = engine.seq_new()
        other = engine.generate(requests(2)) if busy else None
        found.append([])
        for at in range(0, 100, 10):
            if busy:
                other.run(5, None, None)
            fork = engine.seq_fork(seq) if at else engine.seq_new()
            found[-1].append(np.array(engine.logits(fork, ids[at : at + 10], True, None)))
            engine.seq_release(seq)
            seq = fork
        engine.seq_release(seq)
        if busy:
            finish(other, None)
    assert np.array_equal(*found)


def test_more_shapes_than_are_kept(engine):
    """Alternatives are part of a shape: 75 of them, in an order that the oldest must leave."""
    ids = list(range(5, 25))
    for turn in range(2):
        for top in range(75):
            g = engine.generate([dict(ids=ids, max_new_tokens=4, top=top)])
            events = finish(g, None)
            if turn == top == 0:
                want = [e[1:3] for e in events]
            assert [e[1:3] for e in events] == want, (turn, top)
            assert all(len(e[4]) == top for e in events)
