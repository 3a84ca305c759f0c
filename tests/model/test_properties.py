"""What must hold whatever the weights: nothing that was there before shows, formats compute with what
they store, devices and instruction sets agree. Which bits are promised is told in test_promises.py."""

import os
import signal
import time

import kimi_linear as kl
import numpy as np
import pytest
from checkpoints import core_config, hf_model, relative_rms, save, tensors
from engines import cut, in_pieces, open_engine, whole
from kimi_linear import _core
from kimi_linear.reference import Model, quantize
from random_weights import (  # noqa: F401  fixtures
    NAN_TOKEN,
    T,
    calm,
    calm_rounding,
    ids,
    path,
    poisoned_path,
    same,
)


@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_released_memory_does_not_leak(poisoned_path, path, ids, device, format):
    """Every slot and page is filled with NaN, given back, and used again."""
    options = dict(device=device, format=format, invariant=True, max_batch=2, max_context=256)
    engine, clean = (open_engine(p, **options) for p in (poisoned_path, path))
    want = whole(clean, ids)
    bad = [engine.seq_new(), engine.seq_new()]
    for seq in bad:
        engine.feed(seq, [NAN_TOKEN] * 250, None)
    with pytest.raises((MemoryError, ValueError)):
        engine.seq_new()
    for seq in bad:
        engine.seq_release(seq)
    assert engine.usage() == (0, 0)
    assert same(whole(engine, ids), want)
    assert same(in_pieces(engine, ids, cut(T, 64)), want)


@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_a_neighbour_of_nan_does_not_leak(poisoned_path, path, ids, device, format):
    options = dict(device=device, format=format, invariant=True)
    engine, clean = (open_engine(p, **options) for p in (poisoned_path, path))
    bad, good, alone = engine.seq_new(), engine.seq_new(), clean.seq_new()
    for n in (1, 70, 1, 30):
        feed = ids[:n]
        got = np.array(engine.step([(bad, [NAN_TOKEN] * n), (good, feed)]))
        assert np.isnan(got[0]).all()
        assert same(got[1], clean.step([(alone, feed)])[0])


@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_the_rest_of_a_shared_page_does_not_leak(poisoned_path, path, ids, device, format):
    """A fork writes NaN behind the common tokens of a page; the other must not read it."""
    options = dict(device=device, format=format, invariant=True)
    engine, clean = (open_engine(p, **options) for p in (poisoned_path, path))
    seq, alone = engine.seq_new(), clean.seq_new()
    engine.feed(seq, ids[:90], None)
    clean.feed(alone, ids[:90], None)
    bad = engine.seq_fork(seq)
    engine.feed(bad, [NAN_TOKEN] * 20, None)
    assert same(engine.step([(seq, ids[90:95])]), clean.step([(alone, ids[90:95])]))


KEPT_F32 = ("norm", "A_log", "dt_bias", "conv1d", ".gate.weight", "e_score_correction_bias")
KEPT_BF16 = (".b_proj.", ".f_a_proj.", ".g_a_proj.", ".kv_b_proj.", "embed_tokens.")


def stored(name, w, format):
    """A tensor as the runner holds it: the big matrices in `format`, the others wider."""
    if any(part in name for part in KEPT_F32):
        return w
    wide = any(part in name for part in KEPT_BF16)
    return quantize(w, "bf16" if wide else format).dequantize()


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "fp8"])
def test_formats_compute_with_the_weights_they_store(calm, ids, device, format):
    """What a format may add to its own rounding of the weights is that of bfloat16 activations,
    of which transformers in bfloat16 is the yardstick."""
    judge, path = calm
    exact = Model(core_config(judge.config), tensors(path)).forward(ids)
    allowed = calm_rounding(calm)
    engine = open_engine(path, device=device, format=format)
    got = whole(engine, ids)
    engine.close()
    weights = {name: stored(name, w, format) for name, w in tensors(path).items()}
    want = Model(core_config(judge.config), weights).forward(ids)
    assert relative_rms(got, want) < allowed
    assert relative_rms(got, exact) < {"bf16": 1, "int8": 2, "fp8": 4, "int4": 15}[format] * allowed


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
def test_a_gpu_agrees_with_the_cpu(calm, ids, device, format):
    """On the CPU: with itself. The weights are packed on either device, to the same numbers."""
    engines = [open_engine(calm[1], device=d, format=format) for d in ("cpu", device)]
    allowed = 1e-5 if format == "f32" else calm_rounding(calm)
    here, there = (whole(e, ids) for e in engines)
    assert relative_rms(there, here) < allowed


@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "fp8"])
def test_generation_follows_the_logits(calm, ids, device, format):
    """Tokens of recorded single steps are those that one prefill of them all would choose."""
    with kl.load(calm[1], device=device, dtype=format, max_context=T, progress=False) as m:
        c = m.generate(ids[:100], max_new_tokens=40, ignore_eos=True, progress=False)
        logits = m.logits(ids[:100] + c.token_ids, last=False)[99:-1]
    chosen = np.take_along_axis(logits, np.array(c.token_ids)[:, None], -1)[:, 0]
    assert len(set(c.token_ids)) > 1
    assert (logits.max(-1) - chosen < 6 * calm_rounding(calm) * logits.std()).all()


def variants():
    found = []
    for name in ("scalar", "avx2", "avx512", "avx512bf16"):
        try:
            found.append(_core.Backend("cpu", 0, 1, name, "").info()["variant"])
        except (ValueError, RuntimeError):
            continue
    return found


@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
def test_instruction_sets_agree(calm, ids, format):
    path = calm[1]
    found = variants()
    assert found[0] == "scalar" and len(set(found)) == len(found)
    engines = [open_engine(path, format=format, variant=name) for name in found]
    want = whole(engines[0], ids)
    for name, engine in zip(found, engines, strict=True):
        # With bfloat16 activations another order of summation may flip a rounding.
        allowed = 1e-5 if format == "f32" else 0.02
        assert relative_rms(whole(engine, ids), want) < allowed, name
        engine.close()


def ended(child, seconds):
    """Whether a child process ends by itself and well; one that does not is killed."""
    for _ in range(10 * seconds):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def test_a_child_of_fork_computes_the_same(path, ids, tmp_path):
    """The pool's threads do not exist in a child; it must notice and start its own."""
    e = open_engine(path, threads=3)
    want = np.asarray(whole(e, ids))
    child = os.fork()
    if child == 0:  # leave by _exit alone, whatever happens: the child shares pytest's files
        try:
            np.save(tmp_path / "child.npy", whole(e, ids))
        finally:
            os._exit(0)
    assert ended(child, 60), "the child waits for threads it does not have"
    assert same(np.load(tmp_path / "child.npy"), want)
    assert same(whole(e, ids), want), "the parent's pool did not survive"
    e.close()
