"""Reading a checkpoint's tensors: however they lie in files and however many threads read them,
the same model; what goes wrong is named and leaves nothing behind."""

import json
import os
import signal
import threading
import time

import kimi_linear as kl
import numpy as np
import pytest
import variants
from engines import open_engine
from kimi_linear import _core, testing
from kimi_linear.checkpoint import Checkpoint
from on_cuda import has_cuda

# 40,000 x 64 bf16 values are 5 MB, so as f32 the embedding takes more than one piece of 8 MiB.
CONFIG = testing.tiny_config(vocab_size=40_000, num_hidden_layers=4, num_experts=8)
IDS = np.random.default_rng(0).integers(0, 40_000, 300).tolist()
SOME = dict(max_context=512, max_batch=1, progress=False)


@pytest.fixture(scope="module")
def tensors():
    """A few tensors are f32 in a bf16 checkpoint, as A_log and dt_bias are in the published."""
    found = {}
    for name, shape in CONFIG.tensor_shapes().items():
        x = testing.random_tensor(name, shape, np.random.default_rng([5, *name.encode()]))
        keep = name.endswith(("A_log", "dt_bias", "lm_head.weight"))
        found[name] = x if keep else testing.to_bf16(x)
    return found


def write(path, tensors, n_files, seed=None):
    """The tensors over n files; with a seed, in a random order within and across them."""
    names = list(tensors)
    if seed is not None:
        np.random.default_rng(seed).shuffle(names)
    path.mkdir(exist_ok=True)
    weight_map = {}
    for i in range(n_files):
        file = f"model-{i + 1:05d}-of-{n_files:05d}.safetensors"
        part = names[i::n_files]
        testing.write_safetensors(path / file, [(name, tensors[name]) for name in part])
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return path


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    return write(tmp_path_factory.mktemp("plain"), tensors, 3)


def logits_of(engine):
    out = np.array(engine.logits(0, IDS, False, None))
    engine.close()
    assert np.isfinite(out).all()
    return out


# ---- the same model ---------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
def test_threads_and_order_change_nothing(path, tensors, tmp_path, format):
    want = logits_of(open_engine(path, format=format, threads=1))
    assert np.array_equal(logits_of(open_engine(path, format=format, threads=8)), want)
    for n_files, seed in ((1, 1), (60, 2)):
        shuffled = write(tmp_path / f"{n_files}", tensors, n_files, seed)
        assert np.array_equal(logits_of(open_engine(shuffled, format=format, threads=5)), want)


@pytest.mark.parametrize("device", variants.DEVICES)
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "fp8"])
def test_files_in_any_order_are_one_model(path, tensors, tmp_path, device, dtype):
    if (device, dtype) == ("cpu", "fp8"):
        pytest.skip("fp8 is a format of CUDA")
    shuffled = write(tmp_path / "shuffled", tensors, 7, seed=3)
    found = []
    for directory in (path, shuffled, path):
        with kl.load(directory, device=device, dtype=dtype, **SOME) as m:
            found.append(np.asarray(m.logits(IDS)))
    assert np.isfinite(found[0]).all()
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device and torch")
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_cuda_stores_what_the_cpu_stores(path, dtype):
    with (
        kl.load(path, device="cuda", dtype=dtype, **SOME) as on_gpu,
        kl.load(path, device="cpu", dtype=dtype, **SOME) as on_cpu,
    ):
        got, want = (np.asarray(m.logits(IDS), np.float64) for m in (on_gpu, on_cpu))
    # Both compute in bf16; a matrix in the wrong place or unread is off by its own size.
    assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) < 0.05


@pytest.mark.parametrize("device", variants.DEVICES)
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_rows_past_the_first_piece_are_where_they_belong(path, tensors, tmp_path, device, dtype):
    """Tokens renamed, so that their rows lie in other pieces: the same logits, renamed."""
    shift = 12_345
    renamed = dict(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        renamed[name] = np.roll(tensors[name], shift, 0)
    other = write(tmp_path / "renamed", renamed, 2)
    with kl.load(path, device=device, dtype=dtype, **SOME) as m:
        want = np.asarray(m.logits(IDS))
    with kl.load(other, device=device, dtype=dtype, **SOME) as m:
        got = np.asarray(m.logits([(i + shift) % 40_000 for i in IDS]))
    assert np.array_equal(got, np.roll(want, shift, -1))


# ---- what goes wrong --------------------------------------------------------------------------


def tasks(wanted=None):
    """Threads of this process; a joined one may be listed for a moment yet."""
    deadline = time.monotonic() + 20
    while (n := len(os.listdir("/proc/self/task"))) != (wanted or n):
        if time.monotonic() > deadline:
            break
    return n


def unloadable(path, change, callback=None, threads=8, format="bf16"):
    """The exception of a load that `change`(descriptors) spoils; no thread outlives it, and the
    engine can be filled again."""
    backend = _core.Backend("cpu", 0, threads, None, "")
    options = dict(format=format, max_context=64, max_batch=1, step_tokens=0, cache_bytes=0,
                   budget_bytes=0)  # fmt: skip
    with Checkpoint(path) as files:
        engine = _core.Engine(backend, files.config.to_core(), options)
        engine.load(files.fds, files.sources(), None)  # its pool is started
        before = tasks()
        fds, size = list(files.fds), os.fstat(files.fds[0]).st_size
        change(fds)
        with pytest.raises(BaseException) as info:
            engine.load(fds, files.sources(), callback)
        assert tasks(before) == before
        if callback is None:  # a callback may be first heard at the end
            with pytest.raises(ValueError, match="weights must be loaded first"):
                engine.logits(0, [1, 2], True, None)
        os.truncate(files.files[0], size)
        engine.load(files.fds, files.sources(), None)
        engine.close()
    return info.value


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_a_file_that_ends_early_names_the_tensor(tensors, tmp_path, threads, format):
    path = write(tmp_path, tensors, 3, seed=4)
    with Checkpoint(path) as files:
        of_first = [e for e in files.tensors.values() if e.file == 0]
    of_first.sort(key=lambda e: e.offset)
    cut = next(e for e in of_first[len(of_first) // 2 :] if e.nbytes > 1)
    error = unloadable(
        path,
        lambda fds: os.truncate(path / "model-00001-of-00003.safetensors", cut.offset + 1),
        threads=threads,
        format=format,
    )
    assert isinstance(error, OSError)
    assert f"the file ends within {cut.name}, {cut.nbytes - 1} bytes are missing" in str(error)


def test_a_descriptor_that_cannot_be_read_names_the_tensor(path, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)

    def swap(fds):
        fds[2] = folder

    error = unloadable(path, swap)
    os.close(folder)
    assert isinstance(error, OSError) and "Is a directory" in str(error)
    with Checkpoint(path) as files:
        first = min((e for e in files.tensors.values() if e.file == 2), key=lambda e: e.offset)
    assert f"read: {first.name}: " in str(error)


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_a_callback_that_raises_ends_the_load(path, format):
    def fail(done, total):
        raise LookupError("mine")

    error = unloadable(path, lambda fds: None, fail, format=format)
    assert isinstance(error, LookupError)


def test_ctrl_c_ends_the_load(path):
    def interrupt(done, total):
        os.kill(os.getpid(), signal.SIGINT)

    assert isinstance(unloadable(path, lambda fds: None, interrupt), KeyboardInterrupt)


@pytest.mark.parametrize("device", variants.DEVICES)
def test_progress_grows_to_the_end_on_the_callers_thread(path, device):
    calls = []

    def progress(done, total):
        calls.append((done, total, threading.get_ident()))
        time.sleep(0.005)

    kl.load(path, device=device, dtype="int8", **SOME | dict(progress=progress)).close()
    with Checkpoint(path) as files:
        total = files.nbytes
    done = [d for d, _, _ in calls]
    assert done == sorted(set(done)) and done[-1] == total
    assert {(t, thread) for _, t, thread in calls} == {(total, threading.get_ident())}
