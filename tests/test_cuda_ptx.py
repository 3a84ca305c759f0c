"""The library's PTX, which devices above 9.0 run: it needs no instruction of sm_90a."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kimi_linear._backends import CUDA_LIBRARY

pytestmark = pytest.mark.skipif(
    not Path(CUDA_LIBRARY).exists() or not shutil.which("cuobjdump"),
    reason="needs a library with CUDA and cuobjdump",
)
# Those that begin with `if constexpr (!SM_90A)`.
SM_90A_ALONE = re.compile(
    "tiles_kernel|ordered_kernel|kda_chunked_kernel|mla_attend_(tensor|fp8|page)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of PTX for each source."""
    folder = tmp_path_factory.mktemp("ptx")
    command = ["cuobjdump", "-xptx", "all", CUDA_LIBRARY]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return folder


def bodies(folder):
    """{kernel: its text}."""
    found = {}
    for file in folder.glob("*.ptx"):
        for name, text in re.findall(r"\.entry (\w+)\((.*?)\n}", file.read_text(), re.DOTALL):
            found[name] = text
    return found


def test_every_kernel_is_there_twice(folder):
    listing = subprocess.run(
        ["cuobjdump", "-arch", "sm_90a", "-elf", CUDA_LIBRARY], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    in_sass = set(re.findall(r"\.nv\.info\.(\w+)", listing))
    assert len(in_sass) > 300 and set(bodies(folder)) == in_sass


def test_only_those_for_sm_90a_are_a_trap(folder):
    """Others may have one somewhere, but they read their parameters."""
    found = bodies(folder)
    traps = {name for name, text in found.items() if "trap;" in text and "ld.param" not in text}
    assert traps and traps == {name for name in found if SM_90A_ALONE.search(name)}


@pytest.mark.skipif(not shutil.which("ptxas"), reason="needs ptxas")
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_it_is_assembled(folder, target):
    def assemble(file):
        command = ["ptxas", "-O0", f"-arch={target}", str(file), "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True).stderr

    with ThreadPoolExecutor() as pool:
        errors = list(pool.map(assemble, sorted(folder.glob("*.ptx"))))
    assert errors and not any(errors), "".join(errors)[:2000]
