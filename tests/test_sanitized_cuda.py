"""Every operation on a GPU under compute-sanitizer: accesses, races in shared memory, reads of
what nobody wrote, barriers that not all threads reach.

Five at a time (-n 5) suit one GPU, with nothing beside them: processes take turns there, and what
is slow anyway runs past its limit.

KL_RACECHECK_LIBRARY names the library as racecheck can follow all of it (cuda/README.md), which is
taken for racecheck then. Without it some kernels are left out there.

What the tools print is kept in the folder that KL_SANITIZER_OUTPUT names, a file for each case, also
of a run that is cut off.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, needs_compiler
from kimi_linear._backends import CUDA_LIBRARY
from on_cuda import has_cuda

TOOL = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

pytestmark = pytest.mark.skipif(
    not has_cuda() or not Path(TOOL).exists(), reason="needs a CUDA device and compute-sanitizer"
)

# Memory from torch's cache is old memory, which initcheck takes for written.
WITHOUT_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# racecheck takes an mbarrier's arrival for the accesses of the lane that arrives, not for those of
# the others, which __syncwarp() has put before it, and a bulk copy for one of the thread that asks
# for it. So it names the handovers between warps of these kernels, where one lane arrives for all.
# PTX orders them: bar.warp.sync between the lanes, and a release covers what was ordered before it.
# cuBLASLt's kernels stay in: without them the tool fails at the first ("failed to handle a hardware
# exception").
MISREAD = {"racecheck": ["kda_chunked_kernel", "mla_attend_tensor", "mla_attend_fp8"]}
FOLLOWED = os.environ.get("KL_RACECHECK_LIBRARY")
# What a batch-invariant backend does otherwise are products of many rows, a router's by several and
# a single token's experts: racecheck is slow, so of its cases these, in seven runs.
# cuBLASLt stores by bulk copies, which initcheck does not see: there our own kernels stand in, those
# of the batch-invariant calls, for token_logprobs those of a quantised head, too.
# Each with the least number of calls; those of racecheck not in a row, which one worker would run.
NAMED = "linear or moe_experts or token_logprobs or kda or mla"
CASES = {
    "racecheck-logprobs": ("default and token_logprobs", 6),
    "memcheck": ("default or invariant", 140),
    "racecheck-mla": ("default and mla", 9),
    "synccheck": ("default or invariant", 140),
    "racecheck-kda": ("default and kda", 7),
    "initcheck": ("not (default and wide and (many or logprobs))", 140),
    "racecheck-linear": ("default and linear", 20),
    "racecheck-experts": ("moe_experts and (default or many or step)", 20),
    "racecheck-others": (f"default and not ({NAMED})", 13),
    "racecheck-invariant": ("invariant and not moe_experts and (many or router or step)", 7),
}
# pytest with the operations of the library that is named first.
PYTEST = """
import sys
import kimi_linear._backends, pytest
kimi_linear._backends.CUDA_LIBRARY = sys.argv[1]
sys.exit(pytest.main(sys.argv[2:]))
"""
TOOLS = ["racecheck", "initcheck", "memcheck", "synccheck"]
PROGRAMS = ["test_cuda", "test_peaks", "test_ends", "test_fused", "test_mla_step", "test_moe",
            "test_arriving", "test_arriving_mla"]  # fmt: skip
# Of each, those that always run: racecheck of all in one process may take longer than there is.
TESTS = [
    (program, test)
    for program in PROGRAMS
    for test in re.findall(
        r"^    RUN\((\w+)\)", (ROOT / "tests" / "c" / f"{program}.c").read_text(), re.MULTILINE
    )
]


@pytest.fixture
def output(request, tmp_path):
    """The file for what the case's tool prints."""
    folder = Path(os.environ.get("KL_SANITIZER_OUTPUT", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{request.node.callspec.id}.txt"


def library_for(tool):
    return FOLLOWED if FOLLOWED and tool == "racecheck" else CUDA_LIBRARY


def check(tool, command, output, env):
    """What the command printed; fails with what the tool found."""
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "10"]
    for kernel in MISREAD.get(tool, []) if library_for(tool) == CUDA_LIBRARY else []:
        options += ["--kernel-name-exclude", f"kernel_substring={kernel}"]
    with output.open("w") as file:
        run = subprocess.run(
            [TOOL, *options, *command], cwd=ROOT, env=os.environ | env, stdout=file,
            stderr=subprocess.STDOUT, timeout=500,
        )  # fmt: skip
    printed = output.read_text(errors="replace")
    shown = [line for line in printed.splitlines() if "Host Frame" not in line]
    assert run.returncode == 0, "\n".join(shown[:100])
    return printed


@pytest.mark.parametrize("case", CASES)
def test_operations_of_python(case, output):
    tool, (calls, least) = case.split("-")[0], CASES[case]
    command = [sys.executable, "-c", PYTEST, library_for(tool), "-q", "-p", "no:cacheprovider"]
    command += ["tests/ops/test_cuda_streams.py", "-k", f"twice_the_same_bits and ({calls})"]
    env = WITHOUT_CACHE if tool in ("memcheck", "initcheck") else {}
    assert int(re.search(r"(\d+) passed", check(tool, command, output, env))[1]) >= least


@needs_compiler
@pytest.mark.parametrize("name, test", TESTS)
@pytest.mark.parametrize("tool", TOOLS)
def test_operations_of_the_runner(tool, name, test, output, c_build):
    program = c_build / "test" / "tests" / name
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    make = ["make", jobs, "MODE=test", f"TESTS={name}", f"OUT={c_build}", str(program)]
    subprocess.run(make, cwd=ROOT / "csrc", check=True, capture_output=True)
    env = {"KL_CUDA_LIBRARY": library_for(tool), "KL_BRIEF": "1", "KL_TEST": test}
    shown = check(tool, [str(program)], output, env)
    assert "skipped" not in shown and f"\nok   {test}\n" in shown
