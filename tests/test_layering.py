"""The dependency rule of csrc/README.md, enforced: a layer includes only what lies below it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC, CUDA = ROOT / "csrc", ROOT / "cuda"

pytestmark = pytest.mark.skipif(not CSRC.is_dir(), reason="needs the source tree")

MAY_INCLUDE = {  # folder -> folders whose headers it may include
    "base": {"base"},
    "backend": {"base", "backend"},
    "cpu": {"base", "backend", "cpu"},
    "model": {"base", "backend", "model"},
    "python": {"base", "backend", "model", "python"},
    "cuda": {"base", "backend", "cuda"},
}
EXCEPTIONS = {  # file -> the one header it may include beside those
    "csrc/backend/backend.c": "cpu/cpu_backend.h",  # the registry names the built-in table
    "csrc/python/module.c": "cpu/kernels.h",  # build_info() names the variants
}
TOP_LEVEL = {
    "setup.py", "pyproject.toml", "csrc", "cuda", "kimi_linear", "tests", "benchmarks", "examples",
    "README.md", "LICENSE",
}  # fmt: skip


def sources(folder, *suffixes):
    return [p for p in sorted(folder.rglob("*")) if p.suffix in suffixes]


def includes(path):
    return re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', path.read_text(), re.M)


def name(path):
    return path.relative_to(ROOT).as_posix()


def layer_of(path):
    return "cuda" if path.is_relative_to(CUDA) else path.relative_to(CSRC).parts[0]


def target_layer(path, header):
    """The folder a quoted header lies in. cuda/ names its own by relative paths."""
    if path.is_relative_to(CUDA) and (path.parent / header).exists():
        return layer_of((path.parent / header).resolve())
    return header.split("/")[0]


def misplaced_includes():
    for path in [*sources(CSRC, ".c", ".h"), *sources(CUDA, ".cu", ".cuh", ".h")]:
        for bracket, header in includes(path):
            if bracket == "<" or EXCEPTIONS.get(name(path)) == header:
                continue
            if target_layer(path, header) not in MAY_INCLUDE[layer_of(path)]:
                yield f'{name(path)}: "{header}"'


def test_each_layer_includes_only_lower_layers():
    assert len(sources(CSRC, ".c", ".h")) > 30
    assert not list(misplaced_includes())


def test_exceptions_are_used():
    for path, header in EXCEPTIONS.items():
        assert header in [h for _, h in includes(ROOT / path)], path


def test_python_and_cuda_stay_in_their_folders():
    bad = []
    for path in [*sources(CSRC, ".c", ".h"), *sources(CUDA, ".cu", ".cuh", ".h")]:
        for _, header in includes(path):
            if header in ("Python.h", "structmember.h") or header.startswith("numpy/"):
                if layer_of(path) != "python":
                    bad.append(f"{name(path)}: {header}")
            if re.match(r"(cuda|cublas|nccl|cute|cutlass)", header) and layer_of(path) != "cuda":
                bad.append(f"{name(path)}: {header}")
    assert not bad


def test_simd_headers_are_included_by_variants_only():
    bad = [
        f"{name(path)}: {header}"
        for path in sources(CSRC, ".c", ".h")
        for _, header in includes(path)
        if header.startswith("cpu/simd/") and path.parent.name != "simd"
    ]
    assert not bad


def test_a_kernel_file_says_what_it_computes():
    words = ("Computes", "Shapes", "Layout", "Precision", "Roofline", "Measured")
    bad = [
        f"{name(path)} lacks {word}"
        for path in sources(CUDA / "kernels", ".cu")
        for word in words
        if not re.search(rf"^ \* {word}\b", path.read_text(), re.M)
    ]
    assert sources(CUDA / "kernels", ".cu") and not bad


@pytest.mark.parametrize("folder", [CSRC, CUDA, ROOT / "kimi_linear"], ids=lambda p: p.name)
def test_no_file_is_long(folder):
    lengths = {
        name(p): len(p.read_text().splitlines())
        for p in sources(folder, ".c", ".h", ".cu", ".cuh", ".py")
    }
    assert {n: length for n, length in lengths.items() if length >= 600} == {}


def test_headers_have_guards():
    bad = [
        name(p) for p in sources(CSRC, ".h") if not re.search(r"#ifndef (KL_\w+_H)\n#define \1\n", p.read_text())
    ]  # fmt: skip
    assert not bad


def test_the_core_reads_no_environment_and_never_ends_the_program():
    forbidden = re.compile(r"\b(getenv|setenv|abort|exit|_exit|printf|puts|assert)\s*\(")
    bad = []
    for path in [*sources(CSRC, ".c", ".h"), *sources(CUDA, ".cu", ".cuh", ".h")]:
        code = re.sub(r'/\*.*?\*/|"(?:\\.|[^"\\])*"', "", path.read_text(), flags=re.S)
        bad += [f"{name(path)}: {m}" for m in forbidden.findall(code)]
    assert not bad


def test_the_core_allocates_in_one_place():
    """Else the allocation-failure tests would not reach it. CUDA's host side is not one of
    theirs, and Python's allocator is Python's."""
    allocates = re.compile(r"(?<!kl_)\b(malloc|calloc|realloc|aligned_alloc|posix_memalign)\s*\(")
    bad = []
    for path in sources(CSRC, ".c", ".h"):
        code = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        if name(path) != "csrc/base/memory.c":
            bad += [f"{name(path)}: {m}" for m in allocates.findall(code)]
    assert not bad


def test_top_level_is_as_agreed():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: only tracked files count")
    command = ["git", "-C", str(ROOT), "ls-files"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {line.split("/")[0] for line in tracked if line}
    assert {entry for entry in top if not entry.startswith(".")} <= TOP_LEVEL
