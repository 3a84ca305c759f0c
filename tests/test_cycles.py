"""Loading, using and closing a model leaves nothing behind; benchmarks/cycles.py tells it of 1,000."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "cycles.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")
def test_cycles_leave_nothing_behind(device):
    options = ["--device", device, "--cycles", "30", "--dirty", "--no-write"]
    beside = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}  # the script's modules
    run = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, env=beside
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr.count("rss") == 10
