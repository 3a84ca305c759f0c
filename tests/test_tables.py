"""The tables of the READMEs say what benchmarks/results says."""

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "tables.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree")
def test_tables_are_current():
    run = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
