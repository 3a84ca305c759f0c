"""`_core.Engine` and `_core.Generation` by themselves: results, arguments, weights."""

import gc
import re

import numpy as np
import pytest
import torch
from checkpoints import core_config, hf_config, hf_logits, relative_rms
from core_engines import CASE, IDS, VOCAB, engine, judge, path, random_engine, request  # noqa: F401
from engines import AUTO, next_tokens, run, whole
from kimi_linear import _core


# ---- results ----------------------------------------------------------------------------------


def test_logits_against_transformers(engine, judge):
    want = hf_logits(judge, IDS)
    assert relative_rms(whole(engine, IDS), want) < 1e-5
    last = engine.logits(0, IDS, True, None)
    assert last.shape == (VOCAB,) and last.dtype == np.float32
    assert np.array_equal(last, whole(engine, IDS)[-1])


def test_hidden_against_transformers(engine, judge):
    """The residual stream after a layer, its feed-forward part included, before the last norm."""
    want = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: want.update({i: out}))
        for i, layer in enumerate(judge.model.layers)
    ]
    with torch.no_grad():
        judge(torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    got = engine.hidden(0, IDS, (3, 0, 2, 3), None)
    assert sorted(got) == [0, 2, 3]
    for layer, stream in got.items():
        assert relative_rms(stream, want[layer][0].numpy()) < 1e-5, layer


def test_logprobs_against_the_softmax(engine):
    targets = [*IDS[1:], -1]
    targets[10:20] = [-1] * 10
    z = whole(engine, IDS).astype(np.float64)
    want = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
    want -= z.max(-1, keepdims=True)
    for top in (0, 7):
        logprobs, greedy, *rest = engine.logprobs(0, IDS, targets, top, None)
        assert greedy.dtype == np.bool_ and len(rest) == (2 if top else 0)
        for t, target in enumerate(targets):
            if target < 0:
                assert np.isnan(logprobs[t]) and not greedy[t]
                continue
            assert abs(logprobs[t] - want[t, target]) < 1e-4
            assert greedy[t] == (z[t].argmax() == target)
        if top:
            ids, values = rest
            assert ids.shape == values.shape == (len(IDS), top)
            assert np.array_equal(ids, np.argsort(-z, -1, kind="stable")[:, :top])
            assert np.allclose(values, np.take_along_axis(want, ids.astype(int), -1), atol=1e-4)


# ---- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        tuple(IDS),
        np.array(IDS, np.int32),
        np.array(IDS, np.int64),
        np.repeat(np.array(IDS, np.int64), 2)[::2],
        torch.tensor(IDS),
        [np.int64(i) for i in IDS],
        memoryview(np.array(IDS, np.int32)),
    ],
    ids=["tuple", "int32", "int64", "strided", "torch", "numpy-ints", "buffer"],
)
def test_every_form_of_ids(engine, ids):
    assert np.array_equal(engine.logits(0, ids, True, None), engine.logits(0, IDS, True, None))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([5] * 5 + [300], ValueError, r"token id 300 at position 5 must be in \[0, 199\)"),
        ([5, -1], ValueError, r"token id -1 at position 1 must be in"),
        ([5, 2**40], ValueError, r"ids\[1\] must lie in"),
        (np.array([5, 2**40]), ValueError, "ids"),
        ([5, True], TypeError, r"ids\[1\] must be an int, got True"),
        ([5, 1.0], TypeError, r"ids\[1\] must be an int, got 1.0"),
        ([], ValueError, "must have a token or more"),
        ("text", TypeError, "ids must be a sequence"),
        (np.array([1.0, 2.0]), TypeError, "must be int32 or int64"),
        (np.array([[1, 2]]), ValueError, "axes"),
        (7, TypeError, "ids must be a sequence"),
        ([1] * 513, ValueError, r"513 tokens must be at most 512 \(max_context\)"),
    ],
)
def test_bad_ids_are_named(engine, ids, error, message):
    for call in (
        lambda: engine.logits(0, ids, True, None),
        lambda: engine.feed(0, ids, None),
        lambda: engine.hidden(0, ids, (0,), None),
    ):
        with pytest.raises(error, match=message):
            call()


def test_bad_layers_and_targets(engine):
    with pytest.raises(ValueError, match=r"layers must lie in \[0, 3\], got 4"):
        engine.hidden(0, IDS, (0, 4), None)
    with pytest.raises(TypeError):
        engine.hidden(0, IDS, 3, None)
    with pytest.raises(ValueError, match="targets must number 150 like ids, got 149"):
        engine.logprobs(0, IDS, IDS[1:], 0, None)
    with pytest.raises(ValueError, match=r"target 199 at position 3 must be in \[-1, 199\)"):
        engine.logprobs(0, IDS, [*IDS[:3], 199, *IDS[4:]], 0, None)
    with pytest.raises(ValueError, match=r"top must be in \[0, 199\], got 200"):
        engine.logprobs(0, IDS, IDS, 200, None)


def test_stale_handles(engine):
    seq = engine.seq_new()
    engine.feed(seq, IDS, None)
    assert engine.seq_length(seq) == len(IDS)
    assert engine.usage() == (1, 3)
    engine.seq_release(seq)
    for call in (engine.seq_release, engine.seq_length, engine.seq_fork):
        with pytest.raises(ValueError, match="must be one that is alive"):
            call(seq)
    again = engine.seq_new()
    assert again != seq  # the same slot, another generation
    with pytest.raises(ValueError, match="must be one that is alive"):
        engine.feed(seq, IDS, None)
    engine.seq_release(again)
    for handle in (True, 1.0, "a", None):
        with pytest.raises(TypeError):
            engine.seq_release(handle)
    for handle in (-1, 2**70, 0, 99):
        with pytest.raises(ValueError):
            engine.seq_release(handle)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(vocab_size=0), _core.ConfigError, "vocab_size must be in"),
        (dict(hidden_size=2**62), _core.ConfigError, "hidden_size must be in"),
        (dict(hidden_size=2**70), ValueError, "hidden_size must lie in"),
        (dict(hidden_size=64.0), TypeError, "hidden_size must be an int"),
        (dict(top_k=9), _core.ConfigError, "top_k"),
        (dict(rms_eps=float("nan")), ValueError, "rms_eps"),
        (dict(renormalize=1), TypeError, "renormalize"),
        (dict(gate="direct"), ValueError, "gate must be one of 'softplus', 'bounded'"),
        (dict(mixer=["kda"] * 3), ValueError, "mixer must have n_layers entries, got 3"),
        (dict(mixer=["kda", "mla", "rnn", "kda"]), ValueError, "mixer must be one of"),
        (dict(n_layers=None), ValueError, "n_layers is missing"),
    ],
)
def test_bad_configurations_are_named(change, error, message):
    backend = _core.Backend("cpu", 0, 1, None, "")
    config = core_config(hf_config(CASE)) | change
    for make in (_core.plan, _core.Engine):
        with pytest.raises(error, match=message):
            make(backend, config, AUTO | dict(format="f32"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(format="f16"), ValueError, "format must be one of"),
        (dict(max_batch=-1), ValueError, "max_batch"),
        (dict(max_batch=10**9), ValueError, r"max_batch must be in \[1, 4096\]"),
        (dict(max_context=5000), ValueError, r"max_context must be in \[1, 4096\], got 5000"),
        (dict(budget_bytes=1000), _core.OutOfMemory, "weights need"),
        (dict(cache_bytes=1 << 17), _core.OutOfMemory, "limits the cache to 0.1 MiB"),
    ],
)
def test_bad_options_are_named(change, error, message):
    backend = _core.Backend("cpu", 0, 1, None, "")
    config, options = core_config(hf_config(CASE)), AUTO | dict(format="f32") | change
    with pytest.raises(error, match=message):
        _core.Engine(backend, config, options)
    if error is _core.OutOfMemory:  # which a plan only reports
        assert re.search(message, _core.plan(backend, config, options)["problem"])
    else:
        with pytest.raises(error, match=message):
            _core.plan(backend, config, options)


def test_a_plan_is_what_an_engine_takes():
    backend = _core.Backend("cpu", 0, 1, None, "")
    config, options = core_config(hf_config(CASE)), AUTO | dict(format="bf16")
    planned = _core.plan(backend, config, options)
    taken = _core.Engine(backend, config, options).plan()
    del planned["free_bytes"], taken["free_bytes"]
    assert planned == taken
    assert planned["problem"] is None
    assert planned["max_context"] == 4096 and planned["max_batch"] == 8
    assert planned["step_tokens"] % 64 == 0
    assert planned["page_bytes"] >= planned["page_bytes_per_token"] * 4096
    assert planned["total_bytes"] == sum(
        planned[f"{part}_bytes"] for part in ("weight", "state", "snapshot", "page", "scratch")
    )


# ---- generation -------------------------------------------------------------------------------


def test_generation_is_steps_and_argmax(engine):
    seq = engine.seq_new()
    first = engine.step([(seq, IDS[:6])])[0]
    assert run(engine.generate([request()])) == {0: next_tokens(engine, seq, first, 12)}
    engine.seq_release(seq)


def test_many_requests_are_each_alone(engine):
    requests = [request(n, seed=n, temperature=0.7 * (n % 2), top_p=0.9) for n in range(1, 150, 11)]
    together = run(engine.generate(requests))
    for i, r in enumerate(requests):
        assert run(engine.generate([r]))[0] == together[i]


def test_events(engine):
    g = engine.generate([request(top=3), request(max_new_tokens=0), request(max_new_tokens=2)])
    events = []
    while not g.done():
        events += g.run(1, None, None)
    assert [e for e in events if e[0] == 1] == [(1, -1, 0.0, "length", (), 0, 0, 0)]
    assert [e[3] for e in events if e[0] == 0] == [None] * 11 + ["length"]
    assert [e[3] for e in events if e[0] == 2] == [None, "length"]
    for request_index, token, logprob, _, top, cached, *_ in events:
        assert cached == 0
        assert len(top) == (3 if request_index == 0 else 0)
        if top:
            assert top[0] == (token, logprob)
            assert top[0][1] >= top[1][1] >= top[2][1]
    stats = g.stats()
    assert stats["prompt_tokens"] == 18 and stats["new_tokens"] == 14
    assert stats["prompt_done"] == 12  # nothing was computed for the request of no tokens
    assert g.run(1, None, None) == []


def test_finish_and_drop(engine):
    g = engine.generate([request(100), request(100, max_new_tokens=400)])
    g.run(3, None, None)
    assert engine.usage()[0] == 2
    g.finish(1)
    assert engine.usage()[0] == 1
    assert 1 not in run(g)
    with pytest.raises(ValueError, match=r"request must be in \[0, 2\), got 2"):
        g.finish(2)
    g = engine.generate([request(), request()])
    g.run(1, None, None)
    assert engine.usage()[0] == 2
    del g
    gc.collect()
    assert engine.usage() == (0, 0)


def test_requests_are_checked(engine):
    for bad, error, message in [
        (dict(ids=[]), ValueError, "request 1: the prompt must have a token or more"),
        (dict(ids=[1, 500]), ValueError, "request 1: prompt: token id 500 at position 1"),
        (dict(max_new_tokens=600), ValueError, r"must be at most 512 together \(max_context\)"),
        (dict(max_new_tokens=-1), ValueError, "max_new_tokens"),
        (dict(temperature=-0.1), ValueError, r"temperature must be in \[0, 1e6\]"),
        (dict(temperature=float("nan")), ValueError, "temperature"),
        (dict(top_p=0.0), ValueError, r"top_p must be in \(0, 1\]"),
        (dict(min_p=1.5), ValueError, "min_p"),
        (dict(repetition_penalty=0.0), ValueError, "repetition_penalty"),
        (dict(top_k=-3), ValueError, "top_k"),
        (dict(top=200), ValueError, r"top must be in \[0, 199\]"),
        (dict(seed="a"), TypeError, "seed"),
    ]:
        with pytest.raises(error, match=message):
            engine.generate([request(), request(**bad)])
    with pytest.raises(TypeError):
        engine.generate([request(), 5])
    with pytest.raises(TypeError):
        _core.Generation()


def test_process_changes_logits(engine):
    """A processor that forbids what it has seen: in place, or by returning an array."""

    def in_place(_request, ids, logits):
        assert ids.dtype == np.int32 and logits.dtype == np.float32
        logits[np.unique(ids)] = -np.inf

    def returned(_request, ids, logits):
        return torch.from_numpy(logits).index_fill(0, torch.tensor(ids).long(), -torch.inf)

    plain = run(engine.generate([request(), request(40)]))
    assert run(engine.generate([request(), request(40)]), process=lambda *_: None) == plain
    changed = run(engine.generate([request(), request(40)]), process=in_place)
    assert changed == run(engine.generate([request(), request(40)]), process=returned) != plain
    for i, n in enumerate((6, 40)):
        seen = IDS[:n] + changed[i]
        assert len(set(changed[i])) == 12 and len(set(seen)) == len(set(IDS[:n])) + 12


@pytest.mark.parametrize("wrong", ["logits", np.zeros(5, np.float32), np.zeros(VOCAB), 3])
def test_process_must_return_logits(engine, wrong):
    with pytest.raises((TypeError, ValueError, BufferError)):
        run(engine.generate([request()]), process=lambda *_: wrong)
    assert len(run(engine.generate([request()]))[0]) == 12


# ---- weights ----------------------------------------------------------------------------------


def test_random_weights_repeat(device):
    first, second, third = (random_engine(seed=s, device=device) for s in (9, 9, 10))
    a, b, c = (e.logits(0, IDS, True, None) for e in (first, second, third))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.isfinite(a).all() and 0.3 < a.std() < 3.0
