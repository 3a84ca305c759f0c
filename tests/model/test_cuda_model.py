"""The package's model on a GPU: near the CPU's, in company of others, and gone after close()."""

import json
import subprocess
import threading
from pathlib import Path

import kimi_linear as kl
import numpy as np
import pytest
from engines import AUTO, open_backend, open_engine, run
from kimi_linear import _core
from kimi_linear.checkpoint import Checkpoint
from kimi_linear.model import SMALL_MODEL
from on_cuda import has_cuda, torch

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device and torch")

GOLDEN = json.loads((Path(__file__).parent / "small_model_golden.json").read_text())
TEXT = "One day, a small turtle found a shiny stone near the river. " * 12
PROMPTS = ["Once upon a time", "Tell me about the sea.", TEXT, "a"]
MIB = 1 << 20


def load(device="cuda", **options):
    return kl.load(device=device, **{"max_context": 4096} | options)


def tokens(model, prompts=PROMPTS, n=40):
    return [c.token_ids for c in model.generate(prompts, max_new_tokens=n, ignore_eos=True)]


@pytest.fixture(scope="module")
def model():
    with load() as m:
        yield m


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.fixture(scope="module")
def rounding():
    """The CPU's log-probabilities by format, and how far (RMS) rounding and the format take them
    from those in f32. Another order of sums is about as far off."""
    ids = [i for g in GOLDEN for i in g["ids"]][:2000]
    with load("cpu", dtype="f32") as m:
        exact = m.logprobs(ids).logprobs
    found = {}
    for dtype in ("bf16", "int8", "int4"):
        with load("cpu", dtype=dtype) as m:
            found[dtype] = m.logprobs(ids).logprobs, rms(m.logprobs(ids).logprobs - exact)
    return ids, exact, found


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp8", "int4"])
def test_logprobs_are_as_near_as_the_cpus(rounding, dtype):
    ids, exact, cpu = rounding
    with load(dtype=dtype) as m:
        got = m.logprobs(ids).logprobs
    error = rms(got - exact)
    print(f"{dtype}: {error:.2e} from f32; the CPU", {d: f"{e:.2e}" for d, (_, e) in cpu.items()})
    if dtype == "fp8":  # three bits of mantissa; the CPU has no such format
        assert cpu["bf16"][1] < error < cpu["int4"][1]
    else:  # instruction sets of a CPU are within 15 % of each other
        assert error < 1.3 * cpu[dtype][1]
    if dtype == "int4":  # so large an error is the format's, the same on both
        assert rms(got - cpu[dtype][0]) < 0.5 * error


@pytest.fixture(scope="module")
def exact_engine():
    e = open_engine(SMALL_MODEL, device="cuda", format="f32", max_context=2048)
    yield e
    e.close()


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{len(g['ids'])} tokens")
def test_transformers_says_the_same(exact_engine, golden):
    """In f32, which the package offers on a CPU only: the bounds of test_small_model.py."""
    ids = golden["ids"]
    found = run(exact_engine.generate([dict(ids=ids, max_new_tokens=32)]))
    assert found[0] == golden["continuation"]
    differences = np.abs(
        np.array(exact_engine.logprobs(0, ids[:-1], ids[1:], 0, None)[0]) - golden["logprobs"]
    )
    differences[golden["ties"]] = 0
    assert differences.max() < 1e-3


def test_greedy_tokens_are_the_cpus(model):
    """In bf16 some of 50 answers meet tokens that are as likely as each other: the instruction
    sets of a CPU agree among themselves on 41 to 46."""
    prompts = [g["ids"] for g in GOLDEN]
    with load("cpu", dtype="bf16") as m:
        want = [tokens(m, [p], 32)[0] for p in prompts]
    got = [tokens(model, [p], 32)[0] for p in prompts]
    same = [g == w for g, w in zip(got, want, strict=True)]
    print(f"{sum(same)} of {len(same)}; not", [i for i, s in enumerate(same) if not s])
    assert sum(same) >= 36


def test_alone_and_in_a_batch(model):
    """Near, by default; the same bits where that was asked for."""
    with load(batch_invariant=True) as exact:
        together = tokens(exact)
        assert [tokens(exact, [p])[0] for p in PROMPTS] == together
        assert tokens(exact) == together
    assert tokens(model) == tokens(model)


@pytest.mark.skipif(not has_cuda() or torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_on_a_second_device(dtype):
    """The first one's tokens and log-probabilities, in memory of its own. What is current stays."""
    with load("cuda:0", dtype=dtype) as first:
        want = tokens(first), first.logprobs(TEXT).logprobs
        before = [torch.cuda.mem_get_info(i)[0] for i in (0, 1)]
        with load("cuda:1", dtype=dtype) as second:
            assert (first.device, second.device) == ("cuda:0", "cuda:1")
            got = tokens(second), second.logprobs(TEXT).logprobs
            taken = [b - torch.cuda.mem_get_info(i)[0] for i, b in enumerate(before)]
            assert taken[1] > 0.98 * second.plan.total and taken[0] < 16 * MIB
            assert tokens(first) == want[0]
    assert torch.cuda.current_device() == 0
    assert got[0] == want[0] and np.array_equal(got[1], want[1])


def free():
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def shown():
    """Bytes in use, as nvidia-smi shows them; None where it does not."""
    device = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", device, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.check_output(command, text=True, timeout=60)) * MIB
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_close_gives_everything_back(dtype):
    def once():
        with load(dtype=dtype, cache_bytes=1 << 30, max_context=65536) as m:
            tokens(m)
            m.logprobs(TEXT, top=3)
            m.hidden("a few words")
            return m.plan.total, free(), shown()

    once()  # what the driver keeps of a first use: code, its own pools
    before, used = free(), shown()
    for _ in range(3):
        planned, during, used_during = once()
        assert planned * 0.98 < before - during < planned * 1.02 + 128 * MIB
        assert abs(free() - before) < 16 * MIB
    if used is not None:
        assert planned * 0.98 < used_during - used < planned * 1.02 + 128 * MIB
        assert abs(shown() - used) < 16 * MIB


def test_a_model_that_is_only_dropped_is_gone():
    load(cache_bytes=1 << 30, max_context=65536)
    before = free()
    m = load(cache_bytes=1 << 30, max_context=65536)
    tokens(m)
    assert before - free() > m.plan.mla_pages
    del m
    assert abs(free() - before) < 16 * MIB


def test_two_models_at_once(model):
    with load(dtype="int8") as other:
        alone = tokens(model), tokens(other)
        streams = [m.stream(TEXT, max_new_tokens=40, ignore_eos=True) for m in (model, other)]
        pairs = list(zip(*streams, strict=True))
        for i in range(2):
            assert [p[i].token_id for p in pairs] == tokens((model, other)[i], [TEXT])[0]
    assert tokens(model) == alone[0]


def test_torch_works_on_other_streams(model):
    """Its own work, on its own streams, before, between and after the model's steps."""
    want = tokens(model, [TEXT])[0]
    x = torch.randn(2048, 2048, device="cuda")
    product = x @ x
    side = torch.cuda.Stream()
    results, got = [], []
    for chunk in model.stream(TEXT, max_new_tokens=40, ignore_eos=True):
        with torch.cuda.stream(side):
            results.append(x @ x)
        results.append(x @ x)
        got.append(chunk.token_id)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()
    assert got == want
    assert all(torch.equal(r, product) for r in results)


def test_threads_with_a_model_each_and_one_for_all(model):
    want = tokens(model)
    found = {}

    def work(name, m):
        found[name] = [tokens(m) for _ in range(3)]

    with load() as second, load() as third:
        models = {"own": second, "own too": third, "shared": model, "shared too": model}
        threads = [threading.Thread(target=work, args=item) for item in models.items()]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert found == dict.fromkeys(models, [want] * 3)


def test_without_memory_nothing_is_taken(model):
    """A plan for more than there is, and then an allocation that the driver refuses."""
    want, before = tokens(model), free()
    with Checkpoint(SMALL_MODEL) as files:
        config = files.config.to_core()
    options = AUTO | dict(format="bf16", max_context=1 << 20, max_batch=1024)
    for budget, message in ((1 << 20, "MiB are to be had"), (1 << 50, "bytes of memory to be had")):
        with pytest.raises(kl.OutOfMemory, match=message):
            _core.Engine(open_backend("cuda"), config, options | dict(budget_bytes=budget))
    assert abs(free() - before) < 16 * MIB
    assert tokens(model) == want


def test_the_plan_of_a_model_too_large_is_told():
    config = kl.KimiLinearConfig.kimi_linear_48b()
    plan = kl.plan(config, device="cuda", dtype="bf16", max_context=1 << 20, max_batch=32)
    assert plan.mla_pages >= (1 << 20) * plan.mla_page_per_token
    assert plan.fits == (plan.total <= plan.free - (1 << 30))
    assert plan.workspace < 1.1 * (1 << 30)  # of steps of 8,192 tokens
