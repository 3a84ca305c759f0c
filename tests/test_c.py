"""The C core without Python: every program of tests/c, plain and under the sanitizers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PROGRAMS = sorted(p.stem for p in (ROOT / "tests" / "c").glob("test_*.c"))

pytestmark = pytest.mark.skipif(
    not CSRC.is_dir() or shutil.which("make") is None or shutil.which("cc") is None,
    reason="needs the source tree, make and a C compiler",
)


@pytest.fixture(scope="session")
def c_build(tmp_path_factory):
    """One folder for all: objects are shared by the programs of a mode."""
    return tmp_path_factory.mktemp("c")


def has_sanitizer(flag, folder):
    source = folder / "probe.c"
    source.write_text("int main(void) { return 0; }\n")
    command = ["cc", f"-fsanitize={flag}", str(source), "-o", str(folder / "probe")]
    return (
        subprocess.run(command, capture_output=True).returncode == 0
        and subprocess.run([str(folder / "probe")], capture_output=True).returncode == 0
    )


@pytest.mark.parametrize("mode", ["test", "asan", "tsan"])
def test_c_programs(mode, c_build):
    sanitizer = {"asan": "address", "tsan": "thread"}.get(mode)
    if sanitizer and not has_sanitizer(sanitizer, c_build):
        pytest.skip(f"this compiler has no {sanitizer} sanitizer")
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    run = subprocess.run(
        # Unoptimised: these programs are short, and compiling is what takes the time.
        ["make", jobs, mode, f"OUT={c_build}", "OPT=-O0"],
        cwd=CSRC,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    # A program that lists no test would pass as well.
    ran = re.findall(rf"^== {mode} (\w+)\n(?=ok )", run.stdout, re.M)
    assert sorted(ran) == (["test_threads"] if mode == "tsan" else PROGRAMS)
