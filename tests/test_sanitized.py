"""The Python module under AddressSanitizer and UBSan, with each allocation failing, and with
threads at one engine under ThreadSanitizer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, has_sanitizer, needs_compiler

pytestmark = needs_compiler

# What parses the bytes of others, and every operation, each allocation of it failing once.
SUITES = [
    "tests/python/test_checkpoint.py", "tests/python/test_hostile.py", "tests/python/test_buffers.py",
    "tests/python/test_dlpack.py", "tests/python/test_dlpack_out.py", "tests/python/test_ops_api.py",
    "tests/python/test_ops_refusals.py", "tests/python/test_state.py", "tests/python/test_state_file.py",
]  # fmt: skip
NOT_HERE = "test_unused_capsules_do_not_leak"  # measures the process, whose freed memory ASan keeps


@pytest.fixture(scope="module")
def sanitized(c_build):
    """The environment of a Python that imports the sanitized package."""
    if not has_sanitizer("address", c_build):
        pytest.skip("this compiler has no address sanitizer")
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    make = ["make", jobs, "core-asan", f"OUT={c_build}", f"PYTHON={sys.executable}"]
    run = subprocess.run(make, cwd=ROOT / "csrc", capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    libraries = [
        subprocess.check_output(["cc", f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": f"{c_build}{os.pathsep}{ROOT / 'tests'}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "KIMI_LINEAR_THREADS": "2",
    }


def python(env, *args):
    """-P: the checkout, which is the working directory, must not come before PYTHONPATH."""
    command = [sys.executable, "-P", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_sanitized_module_is_the_one_imported(sanitized, c_build):
    run = python(sanitized, "-c", "from kimi_linear import _core; print(_core.__file__)")
    assert Path(run.stdout.strip()) == c_build / "kimi_linear" / "_core.abi3.so", run.stderr[-2000:]


def test_suites_under_sanitizers(sanitized):
    run = python(sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"not {NOT_HERE}", *SUITES)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100


def test_every_allocation_may_fail(sanitized, tmp_path):
    """The interpreter itself leaks at exit; only leaks with a frame of ours count."""
    env = sanitized | {
        "ASAN_OPTIONS": "detect_leaks=1:exitcode=0:allocator_may_return_null=1",
        "LSAN_OPTIONS": "exitcode=0:max_leaks=0",
    }
    run = python(env, "tests/fault_loop.py", tmp_path)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    counts = dict(re.findall(r"^(\w+): (\d+) failures", run.stdout, re.M))
    assert set(counts) == {"load", "operations", "generate", "prefixes", "states", "engine"}, run.stdout
    assert all(int(n) > 5 for n in counts.values()), run.stdout
    ours = [leak for leak in run.stderr.split("\n\n") if re.search(r"in kl_\w*alloc", leak)]
    assert not ours, ours[0]


def test_threads_at_one_engine(c_build):
    """The interpreter is not instrumented, but its locks are known; what it reports is of ours."""
    if not has_sanitizer("thread", c_build):
        pytest.skip("this compiler has no thread sanitizer")
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    make = ["make", jobs, "core-tsan", f"OUT={c_build}", f"PYTHON={sys.executable}", "OPT=-O0"]
    run = subprocess.run(make, cwd=ROOT / "csrc", capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    library = subprocess.check_output(["cc", "-print-file-name=libtsan.so"], text=True).strip()
    env = os.environ | {
        "LD_PRELOAD": library,
        "PYTHONPATH": f"{c_build / 'tsan-python'}{os.pathsep}{ROOT / 'tests'}",
        "TSAN_OPTIONS": "exitcode=66:allocator_may_return_null=1",
        "KIMI_LINEAR_THREADS": "2",
    }
    run = python(env, "tests/engine_hammer.py", 2, 1)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert "ThreadSanitizer" not in run.stderr and "'result'" in run.stdout
