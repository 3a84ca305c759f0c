"""Benchmarks begin, measure and end, on small shapes and a CPU: what only they call may change."""

import importlib
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT
from kimi_linear import reference
from kimi_linear.config import KimiLinearConfig
from kimi_linear.results import Completion, TokenLogprob

COMMANDS = (
    "bench_model.py --shape small --only decode0,decode8k-b8,decode1m,prefill1k,memory,steps,"
    "steps-b8 --blocks 1 --router-skew 500",
    "bench_model.py --shape small --only decode128k,decode8k-b64,decode1m --blocks 1 "
    "--kv-cache-dtype fp8",
    "bench_step.py --help",
    "bench_kda.py --small",
    "bench_kda.py --device cuda --small --only 70,published",
    "bench_prefix.py --document 512 --questions 8 --plain 1 --only batch",
)


def environment():
    """That of programs which import the modules beside them."""
    found = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return found | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_runs(command):
    program, *options = command.split()
    command = [sys.executable, str(ROOT / "benchmarks" / program), *options]
    if "--help" not in command:
        command += ["--no-write", "--dirty"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert run.returncode == 0, run.stderr
    if "--help" in command:
        return
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert lines and all(line["bench"] and line["after_s"] > 0 for line in lines)
    latents = {line["case"].get("kv_cache_dtype") for line in lines}
    assert latents == {"fp8" if "--kv-cache-dtype" in command else None}


def test_latents_of_a_decoded_token(monkeypatch):
    """bench_ops.py's pages, its truth and the bytes of its floor, in both storages."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    ops, floor = (importlib.import_module(n) for n in ("bench_ops", "model_floor"))
    config = KimiLinearConfig.kimi_linear_48b()
    for latents, others in (("bf16", {}), ("fp8", {"latents": "fp8"})):
        (bench,) = ops.mla_decode(2, 70, latents)
        assert bench.case == {"N": 2, "context": 70, "H": 32, "dtype": "bf16"} | others
        q, pages, w = bench.make()
        assert bench.check(q, pages, w) < bench.bound
        assert bench.check(q, pages.roll(1, 0), w) > bench.bound
        row = floor.latent_row_bytes(config, "bf16", latents)
        assert bench.bytes == 2 * 70 * row + w.nbytes + q.nbytes * (1 + 128 / 192)


def test_every_operation_has_a_row(monkeypatch):
    """In bench_ops.py and the table of its results; kda_prefill has a benchmark and a table."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench, tables = (importlib.import_module(n) for n in ("bench_ops", "tables"))
    public = set(bench.ops.__all__) - {"PackedWeight", "kda_prefill"}
    made = {name for name, _ in bench.benches(small=True)}
    assert set(tables.OPS) == public
    assert made == public - {"rms_norm", "gated_rms_norm"} | {"norm"}


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_quantised_matrices(format, monkeypatch):
    """bench_ops.py's bytes and its rival, which must round as the operation does."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench_ops = importlib.import_module("bench_ops")
    (bench,) = bench_ops.quantize("one", (2, 300, 192), (format,))
    (w,) = bench.make()
    w[1, 7, 64:128] = 0
    assert bench.check(w) < bench.bound
    want = reference.quantize(w.float().numpy(), format)
    q, scales = bench_ops.torch_quantize(w, format)
    assert np.array_equal(q.flatten(-2).numpy(), want.data)
    assert np.array_equal(scales[..., 0].float().numpy(), want.scales)
    assert bench.bytes == w.nbytes + q.nbytes + scales.nbytes
    wrong = reference.quantize(1.01 * w.float().flatten(0, 1)[-400:].numpy(), format)
    monkeypatch.setattr(bench_ops.ops, "quantize", lambda *_: wrong)
    assert bench.check(w) > bench.bound


def test_bytes_of_latents(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    floor = importlib.import_module("model_floor")
    config = KimiLinearConfig.kimi_linear_48b()
    packed = reference.pack_latents(np.zeros(576), 512)
    assert floor.latent_row_bytes(config, "int8", "fp8") == packed.nbytes
    plain, kept = (floor.Step(config, "bf16", 4, 1000, kv_cache_dtype=x) for x in ("auto", "fp8"))
    assert plain.latent_bytes() == 4 * 1000 * 7 * 2 * 576
    assert plain.bytes() - kept.bytes() == 4 * 1000 * 7 * (2 * 576 - packed.nbytes)


def test_logits_of_steps(monkeypatch):
    """What the case "steps" says of logits that are known."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    step_logits = importlib.import_module("step_logits")
    want = np.eye(4, dtype=np.float32)[None]  # a row of four tokens, each likely after itself
    got = want + 0.1 * np.eye(4, dtype=np.float32)[::-1]
    got[0, 3] = [2, 0, 0, 1]
    found = step_logits.distance(got, want)
    assert found == pytest.approx(
        {"rms": (4.03 / 4) ** 0.5, "median": 0.1, "worst": 2.0, "same_greedy": 0.75}
    )
    logprob = -np.log(1 + 3 / np.e)
    said = [TokenLogprob(i, logprob + 0.01 * (i == 2)) for i in range(4)]
    drawn = Completion("", [0, 1, 2, 3], [], "length", said, None)
    assert step_logits.of_recorded(want[0], drawn) == pytest.approx(0.01)
    assert step_logits.of_recorded(got[0], drawn) == np.inf


@pytest.mark.parametrize("ragged", [False, True])
def test_how_flash_linear_attention_is_called(ragged, monkeypatch):
    """By a chunk_kda with its layouts: a batch of [B, T, H, ...], states [N, H, K, V]."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    kda_cuda, kda_truth = (importlib.import_module(n) for n in ("kda_cuda", "kda_truth"))

    def chunk_kda(q, k, v, g, beta, scale, initial_state, cu_seqlens=None, **rest):
        assert not any(on for name, on in rest.items() if name.endswith("in_kernel"))
        B, T = q.shape[:2]
        assert B == (1 if ragged else 2) and (cu_seqlens is not None) == ragged
        cu = cu_seqlens if ragged else torch.arange(B + 1) * T
        o, state = reference.kda_prefill(
            *(x.flatten(0, 1).float().numpy() for x in (q, k, v, g, beta)), scale=scale,
            cu_seqlens=cu.numpy(), initial_state=initial_state.mT.numpy(),
        )  # fmt: skip
        return torch.tensor(o).view(v.shape), torch.tensor(state).mT

    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.kda", types.SimpleNamespace(chunk_kda=chunk_kda))
    cu = (0, 20, 50) if ragged else (0, 20, 40)
    x = kda_truth.published_inputs(cu, 2, 24, 0.1, 1, 0.5, "cpu")
    o, states = kda_cuda.fla(ragged)(x)
    for n in range(2):
        want, want_state = kda_truth.truth(x, n, [0, 1])
        assert kda_truth.relative(o[cu[n] : cu[n + 1]], want) < 1e-13
        assert kda_truth.relative(states[n], want_state) < 1e-13


# ---- the commands behind the tables ----------------------------------------------------------


def line(ms, command, date, device="NVIDIA H200", commit="1a2b3c4", **case):
    case = {"model": "48b", "dtype": "bf16", "context": 0, "batch": 1, "router": "balanced"} | case
    return {"bench": "decode", "device": device, "commit": commit, "date": date,
            "command": f"python benchmarks/{command}", "case": case, "ms_per_token": ms}  # fmt: skip


def test_commands_behind_the_tables(monkeypatch, tmp_path):
    """The last line of a case counts, of those that a table shows on this device."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rerun = importlib.import_module("rerun")
    lines = [
        line(2.2, "a.py", "2026-11-03"),
        line(2.1, "b.py", "2026-11-01", context=8192),
        line(2.0, "c.py", "2026-11-02"),  # in the place of the first
        line(2.5, "b.py", "2026-11-04", context=777),  # in no table
        line(3.0, "d.py", "2026-11-02", device="NVIDIA H100 80GB HBM3"),
        line(9.0, "e.py", "2026-11-02", model="wide5"),
    ]
    (tmp_path / "results").mkdir()
    text = "".join(json.dumps(x) + "\n" for x in lines)
    (tmp_path / "results" / "decode.jsonl").write_text(text)
    monkeypatch.setattr(rerun.tables, "HERE", tmp_path)
    found = rerun.commands("H200")
    assert list(found) == ["python benchmarks/b.py", "python benchmarks/c.py"]
    assert [x["case"]["context"] for x in found["python benchmarks/b.py"]] == [8192]
    assert list(rerun.commands("H100")) == ["python benchmarks/d.py"]


def test_commands_of_older_code(monkeypatch, tmp_path):
    """Those with a line whose commit lacks the one that is named."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rerun = importlib.import_module("rerun")
    monkeypatch.setattr(rerun.tables, "HERE", tmp_path)

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        command = ["git", "-C", tmp_path, *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    ids = []
    for message in ("first", "second", "third"):
        git("commit", "--allow-empty", "-m", message)
        ids.append(git("rev-parse", "--short", "HEAD"))
    commits = {"old": ids[:1], "at": ids[1:2], "later": ids[2:], "both": ids[1::-1],
               "unknown": ["0123456"], "dirty": [ids[2] + "-dirty"]}  # fmt: skip
    chosen = {c: [line(1.0, c, "", commit=x) for x in named] for c, named in commits.items()}
    assert list(rerun.before(chosen, ids[1])) == ["old", "both", "unknown", "dirty"]
    with pytest.raises(SystemExit, match="no commit"):
        rerun.before(chosen, "0123456")
    known = [line(1.0, "", "") | {"after_s": s} for s in (3.0, 7.0)]
    assert (rerun.seconds(known), rerun.seconds([line(1.0, "", "")])) == (7.0, np.inf)


def test_commands_that_fail_are_told_and_others_run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rerun = importlib.import_module("rerun")
    monkeypatch.setattr(rerun.tables, "HERE", tmp_path / "benchmarks")
    commands = ["python -c 'raise SystemExit(3)'", "python -c 'open(\"ran\", \"w\")'",
                "python -c 'import time; time.sleep(60)'", "python -c pass"]  # fmt: skip
    assert rerun.run(commands, 6 / 60) == [
        f"exit status 3: {commands[0]}", f"stopped: {commands[2]}", f"no time left: {commands[3]}"
    ]  # fmt: skip
    assert (tmp_path / "ran").exists()


def test_commands_behind_the_recorded_figures():
    command = [sys.executable, ROOT / "benchmarks" / "rerun.py", "--device-name", "H200"]
    run = subprocess.run(
        [*command, "--only", "bench_step,ops"], capture_output=True, text=True, env=environment()
    )
    listed = run.stdout.splitlines()
    assert run.returncode == 0 and len(listed) > 4, run.stderr
    assert all("bench_step.py" in x or "bench_ops.py" in x for x in listed)
    assert len({x[x.index("python ") :] for x in listed}) == len(listed)


# ---- the kernels of a step -------------------------------------------------------------------

FEW = {  # kernels of a step of one sequence: a layer's two mixers and two feed-forward parts
    "linear_attention": ["product_step_kernel<1>"] * 3 + ["kda_mixer_kernel", "product_step_kernel<1>"],
    "full_attention": ["product_step_kernel<1>", "mla_absorb_tensor", "mla_attend_tensor",
                       "mla_finish_tensor<1>", "product_step_kernel<1>"],
    "dense": ["product_step_kernel<1, true>", "product_step_kernel<1>"],
    "sparse": ["product_single_kernel", "moe_step_inner_kernel<1>", "moe_step_out_kernel<1>"],
    "end": ["product_step_kernel<1>", "sample_kernel"],
}  # fmt: skip
MANY = {  # and of many: products of cuBLAS in parts, experts by tiles
    "linear_attention": ["rms_norm_kernel", *["nvjet_sm90"] * 4, "kda_mixer_kernel",
                         "nvjet_sm90_splitK", "splitKreduce_kernel"],
    "full_attention": ["rms_norm_kernel", *["nvjet_sm90"] * 2, *FEW["full_attention"][1:4],
                       "nvjet_sm90"],
    "dense": ["rms_norm_kernel", "tiles_kernel<1, true>", "nvjet_sm90"],
    "sparse": ["rms_norm_kernel", "product_few_kernel<0>", "moe_route_few_kernel", "moe_plan_kernel",
               "tiles_kernel<1, true>", "tiles_kernel<1, false>", "moe_combine_kernel"],
    "end": ["rms_norm_kernel", "nvjet_sm90", "sample_kernel"],
}  # fmt: skip


INVARIANT = FEW | {  # whose experts' second product waits for nobody
    "sparse": ["product_single_kernel", "moe_step_inner_kernel<1>", "moe_step_apart_kernel<1>"]
}


def traced(config, kernels, steps=4):
    """Events of a profiler: every kernel takes 9 us, and 1 us lies before it."""
    names = ["pick_kernel"]
    for layer, kind in enumerate(config.layer_types):
        names += kernels[kind] + kernels["dense" if layer == 0 else "sparse"]
    events, now = [], 0.0
    for _ in range(steps):
        for name in ["store_small", *names, *kernels["end"]]:
            events.append({"cat": "kernel", "name": f"void {name}(x)", "ts": now, "dur": 9.0})
            now += 10
        events.append({"cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": now, "dur": 1.0})
        now += 100
    return events


@pytest.mark.parametrize(
    "kernels, batch, products", [(FEW, 1, 3), (INVARIANT, 1, 3), (MANY, 64, 4)]
)
def test_kernels_of_a_step_have_their_places(kernels, batch, products, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench, floor = (pytest.importorskip(n) for n in ("bench_step", "model_floor"))
    config = KimiLinearConfig.kimi_linear_48b()
    steps = bench.steps_of(traced(config, kernels))
    what = floor.Step(config, "bf16", batch, 1024)
    rows = {r["place"]: r for r in bench.table(steps, what, 4.3e12)}
    launches = {p: rows[p]["launches"] for p in ("kda in", "kda f_b", "mla in", "dense", "router")}
    assert launches == {"kda in": 20, "kda f_b": 20, "mla in": 7, "dense": 2, "router": 26}
    assert rows["kda o"]["launches"] == 20 * (2 if batch > 1 else 1)
    assert ("kda low" in rows) == ("mla kv_a" in rows) == (products == 4)
    assert rows["experts up"]["bytes"] == pytest.approx(2 * rows["experts down"]["bytes"])
    assert sum(r["bytes"] for r in rows.values()) == pytest.approx(what.bytes(), rel=1e-3)
    bench.check_bytes(list(rows.values()), what)
    with pytest.raises(ValueError, match="no kernel.*experts down"):
        bench.check_bytes([r for p, r in rows.items() if p != "experts down"], what)
    found = bench.summary(steps, list(rows.values()))
    n = found["launches"]
    assert (found["us"], found["gap_us"]) == (10 * n - 1, n - 1) and found["steps"] == 2
