"""Suites on the small model inside the package: in Python, and by the command in two shares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kimi_linear as kl
from kimi_linear.evals import jsonkv, mrcr, ruler, run

ENV = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
    ENV.pop(name, None)


@pytest.fixture(scope="module")
def model():
    with kl.load(device="cpu", max_context=2048, max_batch=4) as m:
        yield m


def command(*args, env=ENV, cwd="/"):
    args = [sys.executable, "-m", "kimi_linear", "eval", *map(str, args)]
    return subprocess.run(args, capture_output=True, text=True, env=env, cwd=cwd, timeout=120)


@pytest.mark.parametrize("prefix", ["prefill", "none", "raw"])
def test_ruler(model, prefix):
    suite = ruler.Suite(
        tasks=["niah_single_1", "niah_multikey_1"], lengths=[768], samples=4, prefix=prefix
    )
    results = run(model, suite)
    assert all(r["prompt_tokens"] + 128 <= 768 for r in results.records)
    assert results.means()[768][0] >= 0.75, results  # 99 % and 100 % of 200 on its model card
    assert f"prefix {prefix}" in str(results) and "haystack grammar" in str(results)


def test_mrcr_synth(model):
    suite = mrcr.Synth(lengths=[768], samples=4, needles=[4], questions=2, n_sentences=1)
    results = run(model, suite)
    (row,) = results.rows
    assert row.score > row.floor and row.truncated == 0, results
    assert (
        sum(r["answer"] == r["references"][0] for r in results.records) >= 5
    )  # 90 % on its card
    assert "floor" in str(results)


def test_every_task_runs(model):
    """All that need no file, at a length that leaves some of them hardly any room."""
    results = run(model, ruler.Suite(lengths=[1024], samples=1))
    assert len(results.rows) == 11 and results.complete
    assert sum(r.truncated for r in results.rows) == 0
    assert run(model, jsonkv.Suite(lengths=[512], samples=1)).complete


def test_an_answer_does_not_depend_on_its_batch(model):
    suite = ruler.Suite(tasks=["niah_single_1", "vt"], lengths=[900], samples=3)
    assert run(model, suite, batch=1).records == run(model, suite, batch=4).records


def test_the_command_in_two_shares(model, tmp_path):
    options = ["--tasks", "niah_single_1", "--lengths", 512, "--samples", 3, "--seed", 7]
    suite = ruler.Suite(tasks=["niah_single_1"], lengths=[512], samples=3, seed=7)
    run(model, suite, tmp_path / "whole")
    first = command(
        "ruler", *options, "--out", tmp_path / "shares", "--shard", "1/2", "--device", "cpu",
        "--batch-invariant",
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert "process 1 of 2 is done; when all are: kimi-linear eval merge" in first.stderr
    assert "preliminary" in first.stdout
    env = ENV | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    second = command(
        "ruler", *options, "--out", tmp_path / "shares", "--device", "cpu", env=env
    )
    assert second.returncode == 0, second.stderr
    done = command("merge", tmp_path / "shares")
    assert done.returncode == 0 and done.stdout.startswith("ruler: 3 of 3 examples\n")
    whole, shares = (
        Path(tmp_path / d / "merged.jsonl").read_bytes() for d in ("whole", "shares")
    )
    assert whole == shares
    saved = json.loads((tmp_path / "shares" / "results.json").read_text())
    assert saved["rows"][0]["n"] == 3 and saved["settings"]["seed"] == 7


@pytest.mark.parametrize(
    "args,code,message",
    [
        (["ruler", "--tasks", "nonsense"], 2, "tasks: must be of niah_single_1"),
        (["ruler", "--shard", "2/2"], 2, "rank 2 of 2"),
        (["ruler", "--shard", "half"], 2, "--shard: must be RANK/WORLD"),
        (["ruler", "--prefix", "chat"], 2, "invalid choice"),
        (["mrcr", "/nowhere/2needle.jsonl"], 2, "/nowhere/2needle.jsonl"),
        (["merge", "/nowhere"], 2, "no file of a run"),
        (["nonsense"], 2, "invalid choice"),
    ],
)
def test_an_error_is_one_line_and_a_code(tmp_path, args, code, message):
    done = command(*args, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
