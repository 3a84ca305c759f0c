"""What importing the package does, and what it does not, in a fresh interpreter."""

import subprocess
import sys

import pytest
from conftest import ROOT

FRESH = [sys.executable, "-c"]


def run(code, **options):
    return subprocess.run(
        [*FRESH, code], capture_output=True, text=True, check=True, timeout=60, **options
    ).stdout.strip()


def test_import_takes_less_than_a_tenth_of_a_second():
    code = """
import sys
sys.path.append("{tests}")
from clocks import now, within
start = now()
import kimi_linear
print(within(0.1, start), now()[0] - start[0])
"""
    found = [run(code.format(tests=ROOT / "tests")).split() for _ in range(5)]
    assert sum(fast == "True" for fast, _ in found) > 2, found


@pytest.mark.parametrize("module", ["kimi_linear", "kimi_linear._core", "kimi_linear.ops"])
def test_import_touches_nothing(module):
    """No NumPy, no torch, no thread, no device, no file left open."""
    code = f"""
import os, sys
def count(): return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
def opened(event, args):
    if event == "open": names.append(str(args[0]))
names = []
before = count()
sys.addaudithook(opened)
import {module}
assert count() == before, (before, count())
heavy = {{"numpy", "torch", "jax", "cupy", "ml_dtypes", "tqdm", "tiktoken"}} & set(sys.modules)
assert not heavy, heavy
devices = [n for n in names if "nvidia" in n or n.startswith("/dev/")]
assert not devices, devices
maps = open("/proc/self/maps").read()
assert "libcuda" not in maps and "_cuda.so" not in maps and "libcublas" not in maps
print("ok")
"""
    assert run(code) == "ok"


def test_numpy_comes_with_the_first_array():
    code = """
import sys
from kimi_linear import ops
x = memoryview(bytearray(24)).cast("f", (2, 3))
out = memoryview(bytearray(16)).cast("f", (2, 2))
assert ops.linear(x, memoryview(bytearray(24)).cast("f", (2, 3)), out=out) is out
assert "numpy" not in sys.modules
y = ops.linear(x, x)
assert "numpy" in sys.modules and type(y).__module__ == "numpy" and y.shape == (2, 2)
print("ok")
"""
    assert run(code) == "ok"


def test_a_second_interpreter_is_refused():
    interpreters = pytest.importorskip("_xxsubinterpreters")
    code = f"""
import sys
sys.path[:] = {sys.path!r}
try:
    import kimi_linear._core
except ImportError as error:
    assert "main interpreter" in str(error), error
else:
    raise AssertionError("imported")
"""
    other = interpreters.create()
    try:
        interpreters.run_string(other, code)
    finally:
        interpreters.destroy(other)


def test_errors_are_the_builtins_too():
    from kimi_linear import errors

    both = {
        "ConfigError": ValueError,
        "WeightsError": ValueError,
        "TokenizerError": ValueError,
        "DeviceError": RuntimeError,
        "OutOfMemory": MemoryError,
        "NumericalError": ArithmeticError,
    }
    for name, builtin in both.items():
        cls = getattr(errors, name)
        assert issubclass(cls, errors.KimiLinearError) and issubclass(cls, builtin)
        assert (cls.__module__, cls.__doc__ is None) == ("kimi_linear.errors", False)


def test_errors_can_be_pickled():
    import pickle

    from kimi_linear import DeviceError

    again = pickle.loads(pickle.dumps(DeviceError("gone")))
    assert type(again) is DeviceError and again.args == ("gone",)
