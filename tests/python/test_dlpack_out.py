"""Our own arrays as DLPack tensors, and the exchange tables of other libraries and ours."""

import ctypes
import gc
import threading

import numpy as np
import pytest
from capsules import (
    CUDA,
    DESTRUCTOR,
    IS_COPIED,
    USED,
    W,
    Exchange,
    Producer,
    Tensor,
    Versioned,
    check,
    draw,
    exchange_of,
    expected,
    lend,
    name_of,
    new_capsule,
    pointer_of,
)

from kimi_linear import DeviceError, _backends, _core, ops


# ---- out: our own arrays ---------------------------------------------------------------------


def own_array(shape=(4, 5)):
    """An _core.Array, as a producer of no known framework gets it."""
    x = draw(shape[0], 6)
    y = ops.linear(Producer(x), W)
    assert type(y) is _core.Array and y.shape == shape and y.dtype == "float32"
    return y, expected(x)


def test_array_is_read_by_numpy_and_torch_in_place():
    torch = pytest.importorskip("torch")
    y, want = own_array()
    a, t = np.from_dlpack(y), torch.from_dlpack(y)
    np.testing.assert_allclose(a, want, rtol=1e-5, atol=1e-5)
    t[0, 0] = 42
    assert a[0, 0] == 42 and np.asarray(memoryview(y))[0, 0] == 42
    del y
    gc.collect()
    assert a[0, 0] == 42


def test_kinds_of_capsules():
    y, _ = own_array()
    assert name_of(y.__dlpack__()) == b"dltensor"
    assert name_of(y.__dlpack__(max_version=(0, 8))) == b"dltensor"
    for version in [(1, 0), (1, 3), (2, 0)]:
        capsule = y.__dlpack__(max_version=version)
        assert name_of(capsule) == b"dltensor_versioned"
        managed = ctypes.cast(pointer_of(capsule), ctypes.POINTER(Versioned)).contents
        assert (managed.major, managed.flags) == (1, 0)
        tensor = managed.tensor
        assert list(tensor.shape[:2]) == [4, 5] and list(tensor.strides[:2]) == [5, 1]
        assert (tensor.code, tensor.bits, tensor.lanes, tensor.byte_offset) == (2, 32, 1, 0)
        assert tensor.data % 64 == 0
    assert y.__dlpack_device__() == (1, 0)


def test_capsule_keeps_the_memory_and_any_thread_may_free_it():
    y, want = own_array()
    capsule = y.__dlpack__(max_version=(1, 0))
    managed = ctypes.cast(pointer_of(capsule), ctypes.POINTER(Versioned)).contents
    ctypes.pythonapi.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
    ctypes.pythonapi.PyCapsule_SetName(capsule, USED[b"dltensor_versioned"])
    del y, capsule
    gc.collect()
    data = ctypes.cast(managed.tensor.data, ctypes.POINTER(ctypes.c_float))
    np.testing.assert_allclose(data[:20], want.ravel(), rtol=1e-5, atol=1e-5)
    address, deleter = ctypes.addressof(managed), managed.deleter
    thread = threading.Thread(target=deleter, args=(address,))  # runs without the GIL
    thread.start()
    thread.join()


def test_unused_capsules_do_not_leak():
    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096

    x = draw(4096, 6)
    w = draw(512, 6)  # 8 MiB a result
    before = resident()
    for i in range(40):
        y = ops.linear(Producer(x), w)
        y.__dlpack__(max_version=(1, 0) if i % 2 else None)
    del y
    gc.collect()
    assert resident() - before < 100 << 20  # 40 of them are 320 MiB


@pytest.mark.parametrize("stream", [0, 1, 2, -1, "x", 1.5])
def test_there_are_no_streams_on_a_cpu(stream):
    with pytest.raises((BufferError, TypeError)):
        own_array()[0].__dlpack__(stream=stream)


def test_copies():
    y, want = own_array()
    capsule = y.__dlpack__(copy=True, max_version=(1, 0))
    managed = ctypes.cast(pointer_of(capsule), ctypes.POINTER(Versioned)).contents
    assert managed.flags == IS_COPIED
    data = ctypes.cast(managed.tensor.data, ctypes.POINTER(ctypes.c_float))
    data[0] = 99
    np.testing.assert_allclose(np.from_dlpack(y), want, rtol=1e-5, atol=1e-5)
    assert name_of(y.__dlpack__(dl_device=(1, 0), copy=False)) == b"dltensor"
    for options in [{"dl_device": (2, 0)}, {"dl_device": (2, 0), "copy": True}]:
        with pytest.raises(BufferError, match="__dlpack__"):
            y.__dlpack__(**options)
    for options in [{"max_version": 1}, {"max_version": ("1", 0)}, {"dl_device": "cpu"}]:
        with pytest.raises(TypeError):
            y.__dlpack__(**options)


def test_array_as_an_argument_gives_arrays():
    y, want = own_array((6, 5))
    z = ops.linear(y, np.eye(5, dtype=np.float32))
    assert type(z) is _core.Array
    np.testing.assert_allclose(np.from_dlpack(z), want, rtol=1e-5, atol=1e-5)


def test_results_go_through_the_namespace_of_the_first_array():
    class Namespace:
        def from_dlpack(self, x):
            assert type(x) is _core.Array
            return "theirs", np.from_dlpack(x)

    class Standard(Producer):
        def __array_namespace__(self):
            return Namespace()

    x = draw(4, 6)
    name, y = ops.linear(Standard(x), W)
    assert name == "theirs"
    np.testing.assert_allclose(y, expected(x), rtol=1e-5, atol=1e-5)
    out = Producer(np.empty((4, 5), np.float32))
    assert ops.linear(Standard(x), W, out=out) is out  # a given array goes through nothing
    assert type(ops.linear(x, Standard(W))) is np.ndarray  # the first decides


def test_results_go_through_the_package_of_the_first_array():
    """As with a torch whose tensors have neither a namespace nor the exchange API."""
    torch = pytest.importorskip("torch")
    cls = type("Tensor", (Producer,), {"__module__": "torch.somewhere"})
    x = draw(4, 6)
    y = ops.linear(cls(x), W)
    assert type(y) is torch.Tensor
    np.testing.assert_allclose(y.numpy(), expected(x), rtol=1e-5, atol=1e-5)


def test_a_failing_importer_is_heard():
    class Namespace:
        def from_dlpack(self, x):
            raise RuntimeError("not today")

    cls = type("Standard", (Producer,), {"__array_namespace__": lambda self: Namespace()})
    with pytest.raises(RuntimeError, match="not today"):
        ops.linear(cls(draw(4, 6)), W)


def test_array_is_not_made_from_python():
    with pytest.raises(TypeError):
        _core.Array()


# ---- the exchange API ------------------------------------------------------------------------


def test_our_exchange_table_lends_and_adopts():
    table = exchange_of(_core.Array)
    assert (table.major, table.prev_api) == (1, None)
    y, want = own_array()
    view = Tensor()
    assert table.view(id(y), ctypes.byref(view)) == 0 and view.ndim == 2
    managed = lend(table, y)
    assert managed.tensor.data == view.data
    out = ctypes.c_void_p()
    assert table.to_object(ctypes.addressof(managed), ctypes.byref(out)) == 0
    again = ctypes.cast(out, ctypes.py_object).value
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(again))  # the reference that `out` held
    del y
    gc.collect()
    assert type(again) is _core.Array and again.shape == (4, 5)
    np.testing.assert_allclose(np.from_dlpack(again), want, rtol=1e-5, atol=1e-5)
    stream = ctypes.c_void_p(1)
    assert table.stream(1, 0, ctypes.byref(stream)) == 0 and stream.value is None
    with pytest.raises(TypeError, match="expected a kimi_linear Array"):
        table.from_object(id(W), ctypes.byref(out))


def test_our_exchange_table_allocates():
    table = exchange_of(_core.Array)
    p = Producer(draw(3, 4))
    errors, out = [], ctypes.c_void_p()
    report = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)(
        lambda ctx, kind, message: errors.append((kind, message))
    )
    assert table.allocate(ctypes.byref(p.managed.tensor), ctypes.byref(out), None, report) == 0
    made = ctypes.cast(out, ctypes.POINTER(Versioned)).contents
    assert list(made.tensor.shape[:2]) == [3, 4] and list(made.tensor.strides[:2]) == [4, 1]
    assert made.tensor.data != p.managed.tensor.data and not errors
    made.deleter(out.value)
    for fields in [{"device": CUDA}, {"ndim": -1}, {"shape": (2**62, 2**62)}]:
        bad = Producer(draw(3, 4), **fields).managed.tensor
        assert table.allocate(ctypes.byref(bad), ctypes.byref(out), None, report) == -1
        assert errors.pop()[0] == b"BufferError"


class Exchanged:
    """Lends its array through the exchange table that a subclass gets, and in no other way."""

    def __init__(self, array):
        self.producer = Producer(array)


def exchange_table(calls, major=1, prev=None):
    def from_object(address, out):
        calls.append("from_object")
        o = ctypes.cast(address, ctypes.py_object).value
        out[0] = ctypes.addressof(o.producer.managed)
        return 0

    table = Exchange(major=major, prev_api=prev)
    table.from_object = type(table.from_object)(from_object)
    return table


KEEP = []  # tables are static in life: the types refer to them by address


def capsule_of(table):
    KEEP.append(table)
    return new_capsule(ctypes.addressof(table), b"dlpack_exchange_api", DESTRUCTOR())


@pytest.mark.parametrize("form", ["capsule", "older int", "int of the new name", "newer major"])
def test_exchange_table_of_another_library(form):
    calls = []
    table = exchange_table(calls)
    older = form == "older int"
    attribute = "__c_dlpack_exchange_api__" if older else "__dlpack_c_exchange_api__"
    if form == "newer major":
        KEEP.append(table)
        table = exchange_table([], major=2, prev=ctypes.addressof(table))
    value = capsule_of(table) if "int" not in form else ctypes.addressof(table)
    x = draw(4, 6)
    o = type("Sub", (Exchanged,), {attribute: value})(x)
    with pytest.raises(TypeError, match="the first argument must be an array"):
        _core.device_of(o)  # such a type has no protocol but the table
    y = _core.linear(_backends.shared("cpu"), o, W, None, None)
    np.testing.assert_allclose(np.from_dlpack(y), expected(x), rtol=1e-5, atol=1e-5)
    assert calls == ["from_object"] and o.producer.deleted == 1


def test_exchange_table_that_fails():
    for result, error in [(-1, BufferError), (0, BufferError)]:
        table = exchange_table([])
        table.from_object = type(table.from_object)(lambda address, out, r=result: r)
        o = type("Fails", (Exchanged,), {"__dlpack_c_exchange_api__": capsule_of(table)})(W)
        with pytest.raises(error, match="linear: x: its exchange API gave no tensor"):
            _core.linear(_backends.shared("cpu"), o, W, None, None)


@pytest.mark.parametrize("value", [None, "text", 0])
def test_useless_exchange_attribute_falls_back(value):
    cls = type("Fallback", (Producer,), {"__dlpack_c_exchange_api__": value})
    x = draw(4, 6)
    check(cls(x), x)


def test_exchange_table_of_only_newer_majors_falls_back():
    cls = type("Newer", (Producer,), {})
    cls.__dlpack_c_exchange_api__ = capsule_of(exchange_table([], major=2))
    x = draw(4, 6)
    check(cls(x), x)


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(draw(4, 6))
    y = ops.linear(x, torch.from_numpy(W))
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, x @ torch.from_numpy(W).T)
    assert ops.linear(x.bfloat16(), W).dtype == torch.bfloat16
    frozen = torch.nn.Parameter(x, requires_grad=False)
    torch.testing.assert_close(ops.linear(frozen, W), y)
    for t in [x.clone().requires_grad_(), torch.nn.Parameter(x)]:
        with pytest.raises(BufferError, match="gradient"):
            ops.linear(t, W)
    with pytest.raises(TypeError, match="linear: x must be float32 or bfloat16, got float64"):
        ops.linear(x.double(), W)
    for bad in [x.to_sparse(), x.to("meta")]:
        with pytest.raises((BufferError, TypeError, ValueError, RuntimeError, DeviceError)):
            ops.linear(bad, W)
