"""What an engine holds: weights from sources that are checked, and the memory of its KDA layers,
which can be read and written."""

import numpy as np
import pytest
from checkpoints import core_config, hf_config, hf_model, save
from engines import AUTO, open_engine
from kimi_linear import _core

CASE = "query-rank"
IDS = np.random.default_rng(2).integers(3, 199, 150).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(hf_model(CASE, seed=1, gain=0.3), tmp_path_factory.mktemp("engine"))


# ---- weights ----------------------------------------------------------------------------------


def test_nothing_runs_without_weights():
    backend = _core.Backend("cpu", 0, 1, None, "")
    engine = _core.Engine(backend, core_config(hf_config(CASE)), AUTO | dict(format="f32"))
    for call in (
        lambda: engine.logits(0, IDS, True, None),
        lambda: engine.generate([dict(ids=IDS, max_new_tokens=1)]),
        lambda: engine.step([(engine.seq_new(), IDS)]),
    ):
        with pytest.raises(ValueError, match="weights must be loaded first"):
            call()


@pytest.mark.parametrize(
    ("fds", "sources", "error", "message"),
    [
        ([], [], _core.WeightsError, "tensors are missing: model.embed_tokens.weight"),
        ([], [("a", 0, 0, 4, "F32", (1,))], ValueError, r"file of a must be in \[0, 0\)"),
        ([0], [("a", 0, 0, 4, "F16", (1,))], ValueError, "dtype of a must be F32 or BF16"),
        ([0], [("a", 0, 0, 4, "F32", (-1,))], ValueError, "shape must lie in"),
        ([0], [("a", 0, 0, 4, "F32", (1,) * 9)], ValueError, "at most 5 axes, got 9"),
        ([0], [("a", 0, 0, 4)], TypeError, "6 arguments"),
        ([0], [7], TypeError, "a source must be a tuple"),
        (["x"], [], TypeError, "fds must be an int"),
        ([0], [("a", 0, 0, 4, "F32", (1,))] * 2, _core.WeightsError, "tensor a is there twice"),
    ],
)
def test_bad_sources_are_named(fds, sources, error, message):
    backend = _core.Backend("cpu", 0, 1, None, "")
    engine = _core.Engine(backend, core_config(hf_config(CASE)), AUTO | dict(format="f32"))
    with pytest.raises(error, match=message):
        engine.load(fds, sources, None)


# ---- the memory of a KDA layer ----------------------------------------------------------------


@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_kda_memory_moves_between_sequences(path, format, device):
    """A sequence without MLA layers' pages cannot be moved whole, so the whole one is forked and
    its KDA memory damaged, then put back: the same bits as without."""
    e = open_engine(path, device=device, threads=1, format=format)
    seq = e.seq_new()
    e.feed(seq, IDS[:100], None)
    copy = e.seq_fork(seq)
    kept = {}
    for layer in (i for i, mixer in enumerate(e_config()["mixer"]) if mixer == "kda"):
        kept[layer] = state, window = e.seq_read_kda(copy, layer)
        assert np.abs(state).max() > 0 and np.abs(window).max() > 0
        e.seq_write_kda(copy, layer, np.full_like(state, 7), np.full_like(window, 7))
        assert (e.seq_read_kda(copy, layer)[0] == 7).all()
        assert (e.seq_read_kda(copy, layer)[1] == 7).all()
    for layer, memory in kept.items():
        e.seq_write_kda(copy, layer, *memory)
    one, other = (np.array(e.logits(s, IDS[100:], False, None)) for s in (seq, copy))
    assert one.tobytes() == other.tobytes()


def test_kda_memory_is_checked(path, device):
    engine = open_engine(path, device=device, threads=1)
    seq = engine.seq_new()
    mixers = e_config()["mixer"]
    kda, mla = mixers.index("kda"), mixers.index("mla")
    state, window = engine.seq_read_kda(seq, kda)
    for layer in (mla, len(mixers)):
        with pytest.raises(ValueError, match="layer must be one with KDA"):
            engine.seq_read_kda(seq, layer)
    with pytest.raises(ValueError, match="state must be a dense float32"):
        engine.seq_write_kda(seq, kda, state[1:], window)
    with pytest.raises(ValueError, match="window must be a dense float32"):
        engine.seq_write_kda(seq, kda, state, window.astype(np.float64))
    with pytest.raises(ValueError, match="state must be a dense float32"):
        engine.seq_write_kda(seq, kda, state.transpose(0, 2, 1), window)
    engine.seq_release(seq)
    with pytest.raises(ValueError, match="sequence"):
        engine.seq_read_kda(seq, kda)


def e_config():
    return core_config(hf_config(CASE))
