"""States as users hold them: what each call means, what it refuses, and their files. Whether
their numbers are right is told in tests/model/test_states.py."""

import gc
import hashlib
import json
import os
import threading
import time

import numpy as np
import pytest

import kimi_linear as kl
from kimi_linear import _state_file
from kimi_linear.testing import random_model, tiny_config, write_checkpoint

CONFIG = tiny_config()
LONG = tiny_config(model_max_length=1 << 17)
IDS = list(range(3, 103))
MESSAGES = [{"role": "system", "content": "a document"}]
QUESTION = [{"role": "user", "content": "what is it?"}]


def make(config=CONFIG, **options):
    options = dict(device="cpu", dtype="bf16", seed=1, max_context=512, max_batch=4) | options
    return random_model(config, **options)


@pytest.fixture(scope="module")
def model():
    with make() as m:
        yield m


@pytest.fixture(autouse=True)
def nothing_is_left_behind(model):
    yield
    if model._engine.usage() != (0, 0):
        gc.collect()  # of an exception that a test has caught
    assert model._engine.usage() == (0, 0), "sequences or pages are still held"


@pytest.fixture
def state(model):
    with model.state() as s:
        yield s.feed(IDS)


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


def test_a_callback_cannot_use_its_engine(state):
    with pytest.raises(RuntimeError, match="callback cannot call the engine"):
        state.generate([1], logits_processor=lambda ids, logits: state.nbytes)
    assert state.token_ids == IDS


def test_a_state_that_dies_in_a_callback_is_released(model, state):
    doomed = [model.state().feed([1])]

    def process(ids, logits):
        doomed.clear()

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


# ---- files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(path, bytes) of a state of odd length whose payload has several pieces."""
    path = tmp_path_factory.mktemp("saved") / "doc.klstate"
    with make() as m, m.state() as s:
        s.feed(IDS).save(path)
    return path, path.read_bytes()


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    """So that a small state has several."""
    before, _state_file.PIECE = _state_file.PIECE, 10_007
    yield
    _state_file.PIECE = before


def test_a_file_is_what_its_description_says(saved, model):
    path, data = saved
    assert data[:12] == b"KLSTATE\0\1\0\0\0"
    n = int.from_bytes(data[12:16], "little")
    header = json.loads(data[16 : 16 + n])
    digest = hashlib.sha256(data[: 16 + n]).digest()
    assert data[16 + n : 48 + n] == digest
    assert header["length"] == 100 and header["dtype"] == "bf16"
    assert header["config"] == json.loads(json.dumps(CONFIG.to_core()))
    payload, at, n_pieces = b"", 48 + n, 0
    total = 400 + 4 * 320 + model._engine.image_bytes(100)
    while len(payload) < total:
        piece = data[at : at + min(10_007, total - len(payload))]
        at += len(piece) + 32
        digest = hashlib.sha256(digest + piece).digest()
        assert data[at - 32 : at] == digest
        payload, n_pieces = payload + piece, n_pieces + 1
    assert at == len(data) and n_pieces > 3
    assert np.frombuffer(payload[:400], "<i4").tolist() == IDS
    with kl.State.load(path, model) as s:
        assert payload[400:1680] == s.logits().tobytes()
        state, _ = model._engine.seq_read_kda(s._held.sequence.seq, 0)
        assert payload[1680 : 1680 + state.nbytes] == state.tobytes()


def refuse(model, path, data, message):
    path.write_bytes(data)
    before = model._engine.usage()
    with pytest.raises(kl.StateError, match=message) as caught:
        kl.State.load(path, model)
    assert str(path) in str(caught.value)
    assert model._engine.usage() == before


def test_every_region_is_covered(saved, model, tmp_path):
    """A bit flipped anywhere in the head, and at 200 places of the rest."""
    _, data = saved
    n = int.from_bytes(data[12:16], "little")
    places = [*range(64), *range(64, 60 + n, 7), *range(16 + n, 48 + n)]
    places += np.random.default_rng(0).integers(48 + n, len(data), 200).tolist()
    places += [48 + n, len(data) - 1, len(data) - 33]
    path = tmp_path / "altered"
    for at in places:
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        message = "altered|truncated|version|not a state file|header must have at most"
        refuse(model, path, changed, message)


def test_truncated_and_prolonged(saved, model, tmp_path):
    _, data = saved
    path = tmp_path / "cut"
    n = int.from_bytes(data[12:16], "little")
    for at in (0, 1, 7, 8, 15, 16, 17, 15 + n, 16 + n, 47 + n, 48 + n, 10_000 + n, len(data) - 1):
        refuse(model, path, data[:at], "is truncated")
    refuse(model, path, data + b"\0", "must end after")
    refuse(model, path, data + data, "must end after")


def test_pieces_that_changed_places(saved, model, tmp_path):
    """Each is whole in itself."""
    _, data = saved
    begin = 48 + int.from_bytes(data[12:16], "little")
    size = 10_007 + 32
    first, second = data[begin : begin + size], data[begin + size : begin + 2 * size]
    swapped = data[:begin] + second + first + data[begin + 2 * size :]
    refuse(model, tmp_path / "swapped", swapped, "was altered at or before bytes 0 to")
    with make() as m, m.state() as s:
        s.feed(IDS[::-1]).save(tmp_path / "other")
    other = (tmp_path / "other").read_bytes()
    assert other[:begin] == data[:begin]
    for at in (begin + size, begin + 2 * size):
        refuse(model, tmp_path / "mixed", other[:at] + data[at:], "was altered at or before")


def rewritten(data, change):
    """The file with another header, its own digests right."""
    n = int.from_bytes(data[12:16], "little")
    header = json.loads(data[16 : 16 + n])
    change(header)
    text = json.dumps(header).encode()
    head = data[:12] + len(text).to_bytes(4, "little") + text
    digest = hashlib.sha256(head).digest()
    out, at = head + digest, 48 + n
    while at < len(data):
        piece = data[at : min(at + 10_007, len(data) - 32)]
        digest = hashlib.sha256(digest + piece).digest()
        out += piece + digest
        at += len(piece) + 32
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["config"].update(hidden_size=7), "hidden_size 7, this one has"),
        (lambda h: h.update(config=None), "None, this one has"),
        (lambda h: h.pop("config"), "None, this one has"),
        (lambda h: h.update(dtype="int8"), "dtype 'int8', this one has 'bf16'"),
        (lambda h: h.update(weights="x"), "weights 'x', this one has 'random, seed 1'"),
        (lambda h: h.update(length=99), "must end after"),
        (lambda h: h.update(length=101), "truncated"),
        (lambda h: h.update(length=10**9), "truncated"),
        (lambda h: h.update(length=0), "must end after"),
        (lambda h: h.update(length=-1), "header must have length"),
        (lambda h: h.update(length=True), "header must have length"),
        (lambda h: h.update(length=1 << 62), "header must have length"),
        (lambda h: h.update(length=100.0), "header must have length"),
        (lambda h: h.update(awaits_answer=1), "header must have length"),
        (lambda h: h.pop("awaits_answer"), "header must have length"),
    ],
)
def test_claims_of_the_header(saved, model, tmp_path, change, message):
    same = rewritten(saved[1], lambda h: None)
    (tmp_path / "same").write_bytes(same)
    kl.State.load(tmp_path / "same", model).release()
    refuse(model, tmp_path / "claims", rewritten(saved[1], change), message)


def test_another_version(saved, model, tmp_path):
    data = bytearray(saved[1])
    data[8] = 2
    refuse(model, tmp_path / "new", data, "has format version 2, this package reads version 1")


@pytest.mark.parametrize("data", [b"", b"{}", b"KLSTATE\0", b"PK\3\4" * 40, bytes(1000)])
def test_other_files(model, tmp_path, data):
    refuse(model, tmp_path / "other", data, "not a state file|truncated")


def test_no_regular_file(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        kl.State.load(tmp_path / "missing", model)
    with pytest.raises(kl.StateError, match="must be a regular file"):
        kl.State.load(tmp_path, model)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(kl.StateError, match="must be a regular file, found a FIFO"):
        kl.State.load(tmp_path / "fifo", model)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(seed=2), "weights 'random, seed 1', this one has 'random, seed 2'"),
        (dict(dtype="f32"), "dtype 'bf16', this one has 'f32'"),
        (dict(dtype="int8"), "dtype 'bf16', this one has 'int8'"),
        (dict(config=tiny_config(hidden_size=96)), "hidden_size .*, this one has 96"),
        (dict(config=tiny_config(num_experts_per_token=1)), "top_k .*, this one has 1"),
    ],
)
def test_another_model(saved, other, message):
    with make(**other) as m:
        with pytest.raises(kl.StateError, match=message):
            kl.State.load(saved[0], m)
        assert m._engine.usage() == (0, 0)


def test_another_checkpoint_of_the_same_shape(tmp_path):
    paths = [write_checkpoint(tmp_path / str(i), CONFIG, seed=i, dtype="bf16") for i in (1, 2)]
    again = write_checkpoint(tmp_path / "again", CONFIG, seed=1, dtype="bf16", n_files=3)
    with kl.load(paths[0], device="cpu") as m, m.state() as s:
        s.feed(IDS).save(tmp_path / "s")
        want = s.logits()
    with kl.load(again, device="cpu") as m, kl.State.load(tmp_path / "s", m) as s:
        assert np.array_equal(s.logits(), want)
    with kl.load(paths[1], device="cpu") as m, pytest.raises(kl.StateError, match="weights"):
        kl.State.load(tmp_path / "s", m)


def test_a_model_with_less_room(saved):
    with make(max_context=64) as m, pytest.raises(
        kl.OutOfMemory, match=r"has 100 tokens, the model has room for 64 \(max_context\)"
    ):
        kl.State.load(saved[0], m)
    with make(max_batch=1) as m, m.state(), pytest.raises(kl.OutOfMemory, match="max_batch"):
        kl.State.load(saved[0], m)
    with make(max_context=128, max_batch=2) as m:
        cache = 2 * m.plan.kda_state_per_sequence + m.plan.of_pages(2) + (1 << 13)
    with make(max_context=128, max_batch=2, cache_bytes=cache) as m:
        with kl.State.load(saved[0], m):
            with pytest.raises(
                kl.OutOfMemory, match=r"its 100 tokens need 2 pages of 64, \d of \d are available"
            ):
                [kl.State.load(saved[0], m) for _ in range(2)]
        gc.collect()
        assert m._engine.usage() == (0, 0)


def test_loading_takes_pages_for_the_length_only(saved, model):
    with kl.State.load(saved[0], model):
        assert model._engine.usage() == (1, 2)


def test_a_save_is_whole_or_not_there(state, tmp_path, monkeypatch):
    path = tmp_path / "doc.klstate"
    state.save(path)
    old = path.read_bytes()
    state.feed([1])
    with pytest.raises(KeyError):
        state.save(path, progress=fail)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["doc.klstate"]
    monkeypatch.setattr(_state_file.os, "fsync", lambda fd: fail())
    with pytest.raises(KeyError):
        state.save(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["doc.klstate"]
    with pytest.raises(FileNotFoundError):
        state.save(tmp_path / "no" / "folder")


def test_progress_and_memory_of_files(tmp_path):
    """A long state in pieces: no more than one of them is held."""
    import tracemalloc

    with make(LONG, max_context=1 << 16) as m, m.state() as s:
        s.feed([5, 6, 7] * 10000)
        for call in (
            lambda p: s.save(tmp_path / "s", progress=p),
            lambda p: kl.State.load(tmp_path / "s", m, progress=p).release(),
        ):
            seen = []
            tracemalloc.start()
            call(lambda done, total: seen.append((done, total)))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            size = os.path.getsize(tmp_path / "s")
            assert seen[-1][0] == seen[-1][1] and len(seen) == -(-seen[-1][1] // 10_007)
            assert [d for d, _ in seen] == sorted(d for d, _ in seen)
            assert peak < 4 * s.position + 200_000 < size / 4


def test_waiting_for_an_answer_is_kept(model, tmp_path):
    with model.state() as s:
        s.feed(QUESTION).save(tmp_path / "s")
        with kl.State.load(tmp_path / "s", model) as t, t.fork() as u:
            assert u.generate(max_new_tokens=0).prompt_token_ids
