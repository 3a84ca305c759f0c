"""The tables of the READMEs say what benchmarks/results says."""

import importlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "tables.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")


def test_tables_are_current():
    run = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """tables.py without results; written() adds some."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("tables")
    monkeypatch.setattr(tables, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    return tables


def write(tables, bench, *lines):
    text = "".join(json.dumps({"device": "NVIDIA H200", "commit": "1"} | line) + "\n" for line in lines)
    (tables.HERE / "results" / f"{bench}.jsonl").write_text(text)


def decoded(ms, context, batch=1, dtype="bf16", **case):
    case |= {"model": "48b", "dtype": dtype, "context": context, "batch": batch}
    return {"case": case | {"router": "balanced"}, "ms_per_token": ms, "share": 0.5}


def test_each_way_to_decode_has_a_row(tables):
    write(
        tables, "decode",
        decoded(2.25, 131072),
        decoded(2.15, 131072, kv_cache_dtype="fp8"),
        decoded(3.15, 1024000, kv_cache_dtype="fp8", made_context=True),
        decoded(1.88, 1024, dtype="int8", batch_invariant=True),
        decoded(21.5, 8192, 64, made_context=True),
        *(decoded(b / 10, 1024, b, dtype="int8") for b in (8, 32, 64, 256)),
    )  # fmt: skip
    assert tables.decode().splitlines()[2:] == [
        "| H200, bf16 |  |  |  | 2.25 ms (50 %) |  |",
        "| H200, bf16, 8-bit latents |  |  |  | 2.15 ms (50 %) | 3.15 ms (50 %) |",
        "| H200, int8, batch-invariant |  | 1.88 ms (50 %) |  |  |  |",
    ]
    assert tables.batches().splitlines()[2:] == [
        "| H200, bf16 |  |  |  |  |  |  | 21.5 ms (50 %) |  |",
        "| H200, int8 | 0.8 ms (50 %) | 3.2 ms (50 %) | 6.4 ms (50 %) | 25.6 ms (50 %) |  |  |  |  |",
    ]


def test_operations(tables):
    """Latents of 8 bits have rows of their own; KDA prefill is in its own table only."""
    what = {"us": 100.0, "gb_s": 1.0, "tflop_s": 2.0, "share": 0.25, "ratio": {"copy": 0.5}}
    case = {"N": 1, "context": 1024, "dtype": "bf16"}
    write(tables, "mla_decode", what | {"case": case}, what | {"case": case | {"latents": "fp8"}})
    write(tables, "kda_prefill", what | {"case": {"T": 8192, "fused": True}})
    assert tables.ops().splitlines()[2:] == [
        "| mla_decode, H200 | N 1, context 1024 | 100 | 1 | 2 | 25 % | 0.5 copy |",
        "| mla_decode, H200 | N 1, context 1024, latents fp8 | 100 | 1 | 2 | 25 % | 0.5 copy |",
    ]


def test_rivals_of_a_commit_stand_in_one_row(tables):
    """Each run meets some of them; what an older commit met is not said of a newer one."""
    case = {"T": 8192, "N": 1, "H": 32, "profile": "init", "g": "float32"}
    what = {"case": case, "share": 0.25, "error": {"o": 0.0034, "state": 0.0024}}
    old = what | {"commit": "0", "us": 300.0, "ratio": {"older": 2.0}}
    write(
        tables, "kda_prefill", old,
        what | {"us": 200.0, "ratio": {"fla": 4.0}}, what | {"us": 201.0, "ratio": {"cudnn": 6.5}},
    )  # fmt: skip
    assert tables.kda().splitlines()[2:] == [
        "| H200 | 8192 x 32 | init, float32 | 201 | 25 % | 4 fla, 6.5 cudnn | 0.34 %, 0.24 % |",
    ]
