"""Every operation's small cases on a GPU under compute-sanitizer: bounds, races in shared memory,
reads of what nobody wrote, barriers that not all threads reach."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from on_cuda import has_cuda

TOOL = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

pytestmark = pytest.mark.skipif(
    not has_cuda() or not Path(TOOL).exists(), reason="needs a CUDA device and compute-sanitizer"
)

# Memory from torch's cache is old memory, which initcheck takes for written.
WITHOUT_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
CASES = ["tests/ops/test_cuda_streams.py", "-k", "twice_the_same_bits"]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_clean_under(tool):
    command = [TOOL, "--tool", tool, "--error-exitcode", "9", "--print-limit", "10"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CASES]
    env = os.environ | (WITHOUT_CACHE if tool in ("memcheck", "initcheck") else {})
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    shown = [line for line in run.stdout.splitlines() if "Host Frame" not in line]
    assert run.returncode == 0, "\n".join(shown[:100])
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 20
