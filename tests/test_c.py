"""The C core without Python: every program of tests/c, plain and under the sanitizers."""

import os
import re
import subprocess

import pytest
from conftest import ROOT, has_sanitizer, needs_compiler
from kimi_linear._backends import CUDA_LIBRARY

CSRC = ROOT / "csrc"
PROGRAMS = sorted(p.stem for p in (ROOT / "tests" / "c").glob("test_*.c"))

pytestmark = needs_compiler


@pytest.mark.parametrize("mode", ["test", "asan", "tsan"])
def test_c_programs(mode, c_build):
    sanitizer = {"asan": "address", "tsan": "thread"}.get(mode)
    if sanitizer and not has_sanitizer(sanitizer, c_build):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    run = subprocess.run(
        # Unoptimised: these programs are short, and compiling is what takes the time.
        ["make", jobs, mode, f"OUT={c_build}", "OPT=-O0", f"CUDA_LIBRARY={CUDA_LIBRARY}"],
        cwd=CSRC,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    # A program that lists no test would pass as well.
    ran = re.findall(rf"^== {mode} (\w+)\n(?=ok )", run.stdout, re.M)
    assert sorted(ran) == (["test_read_ahead", "test_threads"] if mode == "tsan" else PROGRAMS)
