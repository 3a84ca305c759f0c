"""What must hold whatever the weights: the runner's promises, most of them to the bit.

On CUDA those to the bit hold for a backend opened as batch-invariant; one that is not picks its
products by the shapes of a call, and keeps them within the rounding of its activations.
"""

import os
import signal
import time

import kimi_linear as kl
import numpy as np
import pytest
import torch
from checkpoints import core_config, hf_logits, hf_model, relative_rms, save, tensors
from engines import cut, in_pieces, next_tokens, open_engine, whole
from kimi_linear import _core
from kimi_linear.reference import Model, quantize
from transformers import KimiLinearForCausalLM

T = 200
NAN_TOKEN = 3  # of the poisoned checkpoint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Weights under which any difference grows fiftyfold on its way to the logits."""
    return save(hf_model("published-pattern", seed=3), tmp_path_factory.mktemp("properties"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """(transformers' model, path): weights that do not amplify, to compare to a tolerance."""
    judge = hf_model("published-pattern", seed=3, gain=0.3)
    return judge, save(judge, tmp_path_factory.mktemp("calm"))


@pytest.fixture(scope="module")
def poisoned_path(tmp_path_factory):
    """The same weights, but one token embeds to NaN: whatever it touches becomes NaN too."""
    model = hf_model("published-pattern", seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight[NAN_TOKEN] = torch.nan
    return save(model, tmp_path_factory.mktemp("poisoned"))


@pytest.fixture(params=["f32", "bf16"])
def engine(path, request, device):
    e = open_engine(path, device=device, format=request.param, invariant=True)
    yield e
    e.close()


@pytest.fixture(params=["f32", "bf16"])
def default_engine(calm, request, device):
    """As people open it, with the rounding that another order of sums may show."""
    e = open_engine(calm[1], device=device, format=request.param)
    yield e, {"f32": 1e-5, "bf16": calm_rounding(calm)}[request.param]
    e.close()


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(5).integers(4, 199, T).tolist()


def others(n, seed):
    return np.random.default_rng(seed).integers(4, 199, n).tolist()


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def calm_rounding(calm):
    """What bfloat16 activations cost: twice the error of transformers' own bfloat16."""
    judge, path = calm
    ids = others(T, 5)
    theirs = KimiLinearForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    allowed = 2 * relative_rms(hf_logits(theirs, ids), hf_logits(judge, ids))
    assert 1e-3 < allowed < 0.03
    return allowed


def test_same_call_twice(engine, ids):
    first = whole(engine, ids)
    assert np.isfinite(first).all()
    assert same(whole(engine, ids), first)


def test_same_call_twice_by_default(default_engine, ids):
    engine, _ = default_engine
    assert same(whole(engine, ids), whole(engine, ids))
    rows = [ids[:9], ids[:70], ids[:1]]
    assert same(turns_of(engine, rows), turns_of(engine, rows))


@pytest.mark.parametrize("lengths", [[64, 136], [128, 72], [64, 64, 64, 8], [192, 8]])
def test_cut_at_chunks_is_the_whole_to_the_bit(engine, ids, lengths):
    assert same(in_pieces(engine, ids, lengths), whole(engine, ids))


@pytest.mark.parametrize(
    "lengths", [cut(T, 1), cut(T, 7), cut(T, 64), cut(T, 65), [63, 1, 1, 135], [199, 1]]
)
def test_cut_anywhere_is_the_whole(default_engine, ids, lengths):
    engine, rounding = default_engine
    assert relative_rms(in_pieces(engine, ids, lengths), whole(engine, ids)) < rounding


@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_a_small_step_does_not_show(path, ids, device, format):
    """A prompt is cut into steps of the planner's size inside one call."""
    small, large = (open_engine(path, device=device, format=format, invariant=True,
                                step_tokens=n) for n in (64, 256))  # fmt: skip
    assert small.plan()["step_tokens"] < large.plan()["step_tokens"]
    assert same(whole(small, ids), whole(large, ids))


@pytest.mark.parametrize("seed", range(4))
def test_a_row_in_a_batch_is_the_row_alone(engine, seed):
    """Ragged steps over sequences with other pasts, some rows of a single token."""
    r = np.random.default_rng(seed)
    lengths = r.choice([1, 1, 2, 17, 64, 65], (4, 5))
    rows = [[others(n, 100 * seed + i) for n in row] for i, row in enumerate(lengths)]
    together = [engine.seq_new() for _ in rows]
    batched = [np.array(engine.step(list(zip(together, turn, strict=True))))
               for turn in zip(*rows, strict=True)]  # fmt: skip
    for seq in together:
        engine.seq_release(seq)
    for i, row in enumerate(rows):
        seq = engine.seq_new()
        for turn, feed in enumerate(row):
            assert same(engine.step([(seq, feed)])[0], batched[turn][i]), (i, turn)
        engine.seq_release(seq)


def turns_of(engine, rows):
    """Logits of the last tokens after reading the rows in one step, then a token each."""
    seqs = [engine.seq_new() for _ in rows]
    turns = [np.array(engine.step(list(zip(seqs, feeds, strict=True))))
             for feeds in (rows, [row[:1] for row in rows])]  # fmt: skip
    for seq in seqs:
        engine.seq_release(seq)
    return np.concatenate(turns, axis=-1)


def test_a_row_in_a_batch_is_near_the_row_alone(default_engine):
    engine, rounding = default_engine
    rows = [others(n, n) for n in (1, 64, 100, 9)]
    together = turns_of(engine, rows)
    alone = np.concatenate([turns_of(engine, [row]) for row in rows])
    assert relative_rms(together, alone) < rounding


@pytest.mark.parametrize("threads", [1, 7])
@pytest.mark.parametrize("format", ["f32", "bf16", "int8", "int4"])
def test_threads_do_not_change_bits(path, ids, format, threads):
    two, other = (open_engine(path, format=format, threads=n) for n in (2, threads))
    assert same(whole(other, ids), whole(two, ids))
    seqs = [(e, e.seq_new()) for e in (two, other)]
    decoded = [next_tokens(e, seq, e.step([(seq, ids[:70])])[0], 8) for e, seq in seqs]
    assert decoded[0] == decoded[1]
    for e in (two, other):
        e.close()


def test_fork_is_recomputing(engine, ids):
    """Forked within a page, both go on by turns; what one writes the other never reads."""
    seq = engine.seq_new()
    engine.feed(seq, ids[:70], None)
    both = [seq, engine.seq_fork(seq)]
    turns = [[others(n, 10 * i + n) for n in (30, 75, 1, 5)] for i in range(2)]
    got = [[], []]
    for turn in range(4):
        for i in (1, 0):
            got[i].append(np.array(engine.step([(both[i], turns[i][turn])])))
    for i in range(2):
        again = engine.seq_new()
        engine.feed(again, ids[:70], None)
        for feed, logits in zip(turns[i], got[i], strict=True):
            assert same(engine.step([(again, feed)]), logits)
        engine.seq_release(again)


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
