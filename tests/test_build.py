"""What setup.py decides, without compiling: whether CUDA is built, what is stale, what ships."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("setuptools")
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="needs the source tree"
)


def run_setup(show, **environment):
    """Run setup.py as far as its names go, in an environment where no toolkit is found unless
    one is named; print an expression over its globals."""
    hidden = {"CUDA_HOME", "CUDA_PATH", "NVCC", "KIMI_LINEAR_CUDA"}
    clean = {k: v for k, v in os.environ.items() if k not in hidden}
    clean["PATH"] = os.pathsep.join(
        p for p in clean["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()
    )
    code = (
        "import runpy, sys; sys.argv = ['setup.py', '--quiet', '--name'];"
        f"names = runpy.run_path({str(ROOT / 'setup.py')!r}); print('shown:', eval({show!r}, names))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def shown(run):
    assert run.returncode == 0, run.stderr
    return run.stdout.split("shown: ")[1].strip()


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like a CUDA toolkit with cuBLAS headers."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    (tmp_path / "include" / "cublasLt.h").touch()
    return tmp_path


def test_zero_skips_cuda(toolkit):
    run = run_setup("NVCC, NO_CUDA", CUDA_HOME=str(toolkit), KIMI_LINEAR_CUDA="0")
    assert shown(run) == "(None, 'KIMI_LINEAR_CUDA=0 at build time')"


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_a_named_toolkit_is_used(toolkit, variable):
    run = run_setup("NVCC, NO_CUDA", KIMI_LINEAR_CUDA="1", **{variable: str(toolkit)})
    assert shown(run) == str(([str(toolkit / "bin" / "nvcc")], ""))


def test_nvcc_may_be_two_words(toolkit):
    run = run_setup("NVCC", CUDA_HOME=str(toolkit), NVCC="ccache nvcc")
    assert shown(run) == "['ccache', 'nvcc']"


def test_one_without_headers_is_an_error(toolkit):
    (toolkit / "include" / "cublasLt.h").unlink()
    run = run_setup("NVCC", CUDA_HOME=str(toolkit), KIMI_LINEAR_CUDA="1")
    if run.returncode == 0:
        pytest.skip("cuBLAS headers are installed elsewhere on this machine")
    assert "KIMI_LINEAR_CUDA=1, but not found at build time: the cuBLAS headers" in run.stderr


def test_auto_without_headers_is_a_cpu_build_that_says_why(toolkit):
    (toolkit / "include" / "cublasLt.h").unlink()
    run = run_setup("NVCC, NO_CUDA", CUDA_HOME=str(toolkit))
    if "cuBLAS" not in shown(run):
        pytest.skip("cuBLAS headers are installed elsewhere on this machine")
    assert shown(run).startswith('(None, "not found at build time: the cuBLAS headers')


def test_other_values_are_refused():
    run = run_setup("NVCC", KIMI_LINEAR_CUDA="yes")
    assert run.returncode != 0
    assert "KIMI_LINEAR_CUDA must be 0, 1 or auto, got 'yes'" in run.stderr


def test_objects_are_rebuilt_when_they_must(tmp_path):
    header, source = tmp_path / "a.h", tmp_path / "a.c"
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "a.h"\nint value = VALUE;\n')
    os.utime(header, (1000, 1000))
    os.utime(source, (1000, 1000))
    show = f"compile_object(['cc', '-DX={{}}'], {str(source)!r}, {str(tmp_path / 'o')!r})"
    (tmp_path / "o").mkdir()

    def compiles(define):
        run = run_setup(show.format(define))
        assert run.returncode == 0, run.stderr
        return "cc -DX" in run.stdout

    assert compiles(1)
    assert not compiles(1)
    assert compiles(2)  # another command
    (obj,) = (tmp_path / "o").glob("*.o")
    os.utime(obj, (2000, 2000))
    assert not compiles(2)
    os.utime(header, (3000, 3000))
    assert compiles(2)  # a newer header
    assert not compiles(2)
    header.unlink()
    source.write_text("int value;\n")
    os.utime(source, (1000, 1000))
    assert compiles(2)  # a dependency that is gone


def test_a_source_distribution_carries_every_file_of_the_build():
    run = run_setup("sorted([*core_sources(), *OTHER_FILES])")
    carried = set(eval(shown(run)))
    needed = {
        p.relative_to(ROOT).as_posix()
        for folder in ("csrc", "cuda", "tests")
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and p.suffix in (".c", ".h", ".cu", ".cuh", ".py", ".md", ".mk")
    }
    assert needed - carried == set()
    assert {"csrc/Makefile", "csrc/flags.mk"} <= carried
