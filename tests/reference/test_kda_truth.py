"""The float64 truth that benchmarks/bench_kda.py judges by is the recurrence."""

import pytest
from conftest import ROOT
from kimi_linear import reference

torch = pytest.importorskip("torch")
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs the source tree")


@pytest.mark.parametrize("kind", ["raw", "weak", "mixed", "slow", "strong", "published"])
def test_truth_is_the_recurrence(kind, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import kda_truth

    monkeypatch.setattr(kda_truth, "CHUNKS_AT_ONCE", 4)  # several groups of chunks
    lengths, heads = [135, 33], [0, 2]
    if kind == "raw":
        x = kda_truth.raw_inputs(lengths, 3, "cpu")
    elif kind == "weak":
        x = kda_truth.weak_inputs(sum(lengths), 3, "cpu")
    elif kind == "published":
        x = kda_truth.published_inputs((0, 135, 168), 3, 100, 0.1, 10, 0.5, "cpu")
    else:
        x = kda_truth.direct_inputs(kind, lengths, 3, "cpu")
    arrays = [t.float().numpy() for t in (x.q, x.k, x.v, x.g, x.beta)]
    options = {n: t.numpy() if torch.is_tensor(t) else t for n, t in x.options.items()}
    if x.state is not None:
        options["initial_state"] = x.state.numpy()
    o, states = reference.kda_prefill(*arrays, cu_seqlens=x.cu.numpy(), **options)
    for n in range(len(x.lengths)):
        first, end = x.cu[n : n + 2].tolist()
        got, state = kda_truth.truth(x, n, heads)
        assert kda_truth.relative(got, torch.tensor(o[first:end][:, heads])) < 1e-13
        assert kda_truth.relative(state, torch.tensor(states[n][heads])) < 1e-13
