"""What every test shares."""

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def use_the_installed_package() -> None:
    """`python -m pytest` puts the checkout first on the path, where the package may not have
    been built; then the one to test is the installed one."""
    others = [p for p in sys.path if Path(p).resolve() != ROOT]
    built_here = any((ROOT / "kimi_linear").glob("_core*.so"))
    if not built_here and any((Path(p) / "kimi_linear").is_dir() for p in others):
        sys.path[:] = others


def show_children_the_same() -> None:
    """Interpreters that tests start import this package too, not what their folder holds."""
    found = importlib.util.find_spec("kimi_linear")
    paths = [str(Path(found.origin).parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["PYTHONSAFEPATH"] = "1"


def hear_ctrl_c() -> None:
    """A shell's background jobs begin with SIGINT ignored; tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


use_the_installed_package()
show_children_the_same()
hear_ctrl_c()

import variants  # noqa: E402  the package's first import, from where the lines above say


def pytest_addoption(parser):
    parser.addoption(
        "--sequences",
        type=int,
        default=200,
        help="sequences of operations on states to try (tests/model/test_states.py)",
    )
    parser.addoption(
        "--upstream",
        metavar="DIR",
        help="clones of RULER and HELMET, to run their scripts (tests/evals)",
    )


needs_compiler = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir() or shutil.which("make") is None or shutil.which("cc") is None,
    reason="needs the source tree, make and a C compiler",
)


@pytest.fixture(params=variants.VARIANTS)
def variant(request):
    """The name of where the test's `variants.ops` runs: an instruction set or "cuda"."""
    with variants.on(request.param):
        yield request.param


@pytest.fixture(params=variants.DEVICES)
def device(request):
    """The same: "cpu" or "cuda"."""
    with variants.on(request.param):
        yield request.param


@pytest.fixture
def no_gc_callbacks():
    """Python code that runs inside the collector (hypothesis leaves some there) swallows the
    KeyboardInterrupt of a signal that arrives in it."""
    saved = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = saved


def pytest_collection_modifyitems(config, items):
    """fp8 is a weight format of CUDA only."""

    def exists(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        format = params.get("format", params.get("shared_format"))
        return format != "fp8" or params.get("variant", params.get("device")) in (None, "cuda")

    config.hook.pytest_deselected(items=[i for i in items if not exists(i)])
    items[:] = filter(exists, items)


@pytest.fixture(scope="session")
def c_build(tmp_path_factory):
    """One folder for all: objects are shared by the builds of a mode."""
    return tmp_path_factory.mktemp("c")


def has_sanitizer(flag, folder):
    source = folder / "probe.c"
    source.write_text("int main(void) { return 0; }\n")
    command = ["cc", f"-fsanitize={flag}", str(source), "-o", str(folder / "probe")]
    return (
        subprocess.run(command, capture_output=True).returncode == 0
        and subprocess.run([str(folder / "probe")], capture_output=True).returncode == 0
    )
