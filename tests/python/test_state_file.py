"""The files of states: the format as described, and every way in which a file may be wrong."""

import gc
import hashlib
import json
import os

import numpy as np
import pytest
from states import (  # noqa: F401
    CONFIG,
    IDS,
    LONG,
    QUESTION,
    make,
    model,
    nothing_is_left_behind,
    state,
)

import kimi_linear as kl
from kimi_linear import _state_file
from kimi_linear.testing import tiny_config, write_checkpoint


def fail(*_):
    raise KeyError("mine")


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
    assert data[:12] == b"KLSTATE\0\2\0\0\0"
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
        (lambda h: h.update(kv_cache_dtype="fp8"), "kv_cache_dtype 'fp8', this one has 'bf16'"),
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
    data[8] = 3
    refuse(model, tmp_path / "new", data, "has format version 3, this package reads version 2")


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


def test_bad_arguments_are_named(model, state):
    for bad, error in ((5, TypeError), (None, TypeError), ("", ValueError), ("/", ValueError)):
        with pytest.raises(error, match="^path: must "):
            state.save(bad)
        with pytest.raises(error, match="^path: must "):
            kl.State.load(bad, model)
    with pytest.raises(TypeError, match="^model: must be a kimi_linear.Model, got None"):
        kl.State.load("x", None)


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
        s.feed([5, 6, 7] * 4000)
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
            assert peak < 4 * s.position + 200_000 < size / 3


def test_waiting_for_an_answer_is_kept(model, tmp_path):
    with model.state() as s:
        s.feed(QUESTION).save(tmp_path / "s")
        with kl.State.load(tmp_path / "s", model) as t, t.fork() as u:
            assert u.generate(max_new_tokens=0).prompt_token_ids
