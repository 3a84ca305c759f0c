"""Benchmarks begin, measure and end, on small shapes and a CPU: what only they call may change."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = {
    "bench_model.py": "--shape small --only decode0,decode8k-b8,prefill1k,memory --blocks 1",
    "bench_step.py": "--help",
    "bench_kda.py": "--small",
    "bench_prefix.py": "--document 512 --questions 8 --plain 1 --only batch",
}


@pytest.mark.parametrize("program", COMMANDS)
def test_it_runs(program):
    command = [sys.executable, str(ROOT / "benchmarks" / program), *COMMANDS[program].split()]
    if "--help" not in command:
        command += ["--no-write", "--dirty"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}  # their modules
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    if "--help" in command:
        return
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert lines and all(line["bench"] for line in lines)
