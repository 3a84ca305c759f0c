"""DLPack in both directions: what is right is taken without a copy, what is wrong is refused
with the argument's name, and nothing is freed twice, early or never."""

import ctypes
import gc
import sys
import threading
import time

import numpy as np
import pytest
from capsules import (
    BFLOAT16,
    CUDA,
    CUDA_HOST,
    DESTRUCTOR,
    FLOAT64,
    IS_COPIED,
    READ_ONLY,
    USED,
    Exchange,
    Legacy,
    Producer,
    Tensor,
    Versioned,
    exchange_of,
    lend,
    name_of,
    new_capsule,
    pointer_of,
)

from kimi_linear import DeviceError, _backends, _core, ops

rng = np.random.default_rng(7)
W = rng.standard_normal((5, 6), dtype=np.float32)


def draw(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


def product(x):
    """linear() on x with a fixed weight, as NumPy."""
    return np.from_dlpack(ops.linear(x, W))


def expected(x):
    return (x.astype(np.float64) @ W.T.astype(np.float64)).astype(np.float32)


def check(producer, x):
    np.testing.assert_allclose(product(producer), expected(x), rtol=1e-5, atol=1e-5)


# ---- in: what is right -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Legacy, Versioned])
def test_capsule_is_consumed_once_and_freed_once(kind):
    x = draw(4, 6)
    p = Producer(x, kind=kind)
    check(p, x)
    assert name_of(p.last) == USED[b"dltensor" if kind is Legacy else b"dltensor_versioned"]
    assert p.deleted == 1
    del p.last
    gc.collect()
    assert p.deleted == 1  # the capsule's destructor leaves a used one alone
    assert p.requests == [{"max_version": (1, 1)}]  # no stream on a CPU


@pytest.mark.parametrize("kind", [Legacy, Versioned])
def test_null_deleter(kind):
    x = draw(4, 6)
    check(Producer(x, kind=kind, deleter=False), x)


def test_null_strides_are_dense():
    x = draw(3, 4, 6)
    check(Producer(x, strides=None), x)


def test_byte_offset():
    x = draw(10, 6)
    check(Producer(x, shape=(8, 6), byte_offset=2 * 6 * 4), x[2:])


def test_negative_and_zero_strides():
    x = draw(4, 6)
    check(Producer(x, strides=(-6, 1), data=x[3:].ctypes.data), x[::-1])
    check(Producer(x, strides=(6, -1), data=x[0, 5:].ctypes.data), x[:, ::-1])
    check(Producer(x, strides=(0, 1)), np.broadcast_to(x[0], (4, 6)))


def test_rows_may_be_strided_without_a_copy():
    x = draw(8, 12)
    check(Producer(x, shape=(4, 6), strides=(24, 1)), x[::2, :6])


def test_axes_of_length_one_may_have_any_stride():
    x = draw(1, 6)
    check(Producer(x, strides=(2**61, 1)), x)


def test_pinned_host_memory_is_taken():
    x = draw(4, 6)
    check(Producer(x, device=CUDA_HOST), x)


def test_nothing_at_all_may_lie_at_null():
    out = ops.rms_norm(draw(2, 6), np.ones(6, np.float32), eps=1e-5)
    assert out.shape == (2, 6)
    with pytest.raises(ValueError, match="linear"):  # whatever is said, it is about the shape
        ops.linear(Producer(draw(0, 6), data=None), np.zeros((5, 7), np.float32))


def test_bfloat16_by_its_code():
    x = draw(4, 6)
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    w = (W.view(np.uint32) >> 16).astype(np.uint16)
    y = ops.linear(Producer(bits, dtype=BFLOAT16), Producer(w, dtype=BFLOAT16))
    assert y.dtype == "bfloat16" and y.shape == (4, 5)
    got = (np.asarray(memoryview(y)).astype(np.uint32) << 16).view(np.float32)
    low = (bits.astype(np.uint32) << 16).view(np.float32)
    want = low @ (w.astype(np.uint32) << 16).view(np.float32).T
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-6)


def test_producer_without_max_version():
    class Old(Producer):
        def __dlpack__(self, stream=None):
            return super().__dlpack__()

    x = draw(4, 6)
    p = Old(x, kind=Legacy)
    check(p, x)
    assert p.deleted == 1


# ---- in: what is wrong -----------------------------------------------------------------------

BAD_TENSORS = {
    "lanes": ({"lanes": 2}, BufferError, "lane"),
    "no lanes": ({"lanes": 0}, BufferError, "lane"),
    "ndim below 0": ({"ndim": -1}, BufferError, "ndim"),
    "ndim above 8": ({"ndim": 9, "shape": (1,) * 9, "strides": (1,) * 9}, BufferError, "ndim"),
    "shape NULL": ({"shape": None, "ndim": 2}, BufferError, "shape"),
    "negative shape": ({"shape": (-4, 6)}, BufferError, "negative"),
    "shape product": ({"shape": (2**40, 2**40)}, BufferError, "2\\^63"),
    "shape in bytes": ({"shape": (2**31, 2**31), "strides": (0, 0)}, BufferError, "2\\^63"),
    "stride extent": ({"strides": (2**61, 1)}, BufferError, "2\\^63"),
    "stride minimum": ({"strides": (-(2**63), 1)}, BufferError, "2\\^63"),
    "data NULL": ({"data": None}, BufferError, "NULL"),
    "misaligned": ({"byte_offset": 2}, BufferError, "aligned"),
    "offset wraps": ({"byte_offset": 2**64 - 4}, BufferError, "byte_offset"),
    "no bits": ({"dtype": (2, 0)}, BufferError, "bits"),
    "float64": ({"dtype": FLOAT64, "shape": (2, 6)}, TypeError, "float64"),
    "float16": ({"dtype": (2, 16)}, TypeError, "float16"),
    "float4": ({"dtype": (17, 4)}, TypeError, "must be float32 or bfloat16"),
    "bfloat of 32 bits": ({"dtype": (4, 32)}, TypeError, "bfloat32"),
    "int32": ({"dtype": (0, 32)}, TypeError, "int32"),
    "one axis short": ({"ndim": 0}, ValueError, "axes"),
}


@pytest.mark.parametrize("kind", [Legacy, Versioned])
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_wrong_tensor_is_refused_and_freed(case, kind):
    fields, error, message = BAD_TENSORS[case]
    p = Producer(draw(4, 6), kind=kind, **fields)
    with pytest.raises(error, match=f"linear: x.*{message}"):
        ops.linear(p, W)
    p.last = None
    gc.collect()
    assert p.deleted == 1


def test_other_major_version_is_freed_and_not_read():
    p = Producer(draw(4, 6), major=2, shape=(2**62, 2**62))
    with pytest.raises(BufferError, match="must be 1.x, got 2.0"):
        ops.linear(p, W)
    assert p.deleted == 1 and name_of(p.last) == b"used_dltensor_versioned"
    p.last = None
    gc.collect()
    assert p.deleted == 1


def test_same_capsule_twice():
    class Repeats(Producer):
        def __dlpack__(self, **options):
            if not hasattr(self, "last"):
                self.last = self.capsule()
            return self.last

    x = draw(4, 6)
    p = Repeats(x)
    check(p, x)
    with pytest.raises(BufferError, match="linear: x.*fresh DLPack capsule"):
        ops.linear(p, W)
    assert p.deleted == 1


@pytest.mark.parametrize("name", [b"used_dltensor", b"tensor", b"dltensor_versioned2"])
def test_capsule_of_another_name(name):
    class Renamed(Producer):
        def __dlpack__(self, **options):
            return new_capsule(ctypes.addressof(self.managed), name, DESTRUCTOR())

    with pytest.raises(BufferError, match="fresh DLPack capsule"):
        ops.linear(Renamed(draw(4, 6)), W)


@pytest.mark.parametrize("thing", [None, 17, b"dltensor"])
def test_not_a_capsule(thing):
    class Odd(Producer):
        def __dlpack__(self, **options):
            return thing

    with pytest.raises(BufferError, match="fresh DLPack capsule"):
        ops.linear(Odd(draw(4, 6)), W)


@pytest.mark.parametrize("error", [RuntimeError, BufferError, KeyboardInterrupt])
def test_exception_of_the_producer_passes(error):
    class Raises(Producer):
        def __dlpack__(self, **options):
            raise error("mine")

    with pytest.raises(error, match="mine"):
        ops.linear(Raises(draw(4, 6)), W)


def test_type_error_of_the_producer_is_tried_twice_then_passes():
    calls = []

    class Raises(Producer):
        def __dlpack__(self, **options):
            calls.append(options)
            raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        ops.linear(Raises(draw(4, 6)), W)
    assert calls == [{"max_version": (1, 1)}, {}]


@pytest.mark.parametrize("device", [17, (1,), ("cpu", 0), (1, 2, 3), None])
def test_wrong_device_tuple(device):
    p = Producer(draw(4, 6))
    p.device = device
    with pytest.raises((BufferError, TypeError)):
        ops.linear(p, W)
    assert p.deleted == 0  # never asked for data


def test_devices():
    x = draw(4, 6)
    assert _core.device_of(x) == _core.device_of(memoryview(x)) == ("cpu", 0)
    assert _core.device_of(Producer(x, device=CUDA_HOST)) == ("cpu", 0)
    assert _core.device_of(Producer(x, device=(2, 3))) == ("cuda", 3)
    with pytest.raises(DeviceError, match="DLPack device \\(10, 0\\)"):
        ops.linear(Producer(x, device=(10, 0)), W)
    with pytest.raises(ValueError, match="linear: w must be on the cpu, got cuda:0"):
        ops.linear(x, Producer(W, device=CUDA))
    with pytest.raises(TypeError, match="expected an array"):
        _core.device_of([1.0])


# ---- written to ------------------------------------------------------------------------------


def test_output_of_a_producer_is_filled_and_returned():
    x, y = draw(4, 6), np.full((4, 5), np.nan, np.float32)
    p = Producer(y)
    assert ops.linear(x, W, out=p) is p
    np.testing.assert_allclose(y, expected(x), rtol=1e-5, atol=1e-5)
    assert p.deleted == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flags": READ_ONLY}, "read-only"),
        ({"flags": IS_COPIED}, "copy"),
        ({"kind": Legacy}, "old kind"),
        ({"strides": (1, 4)}, "dense"),
        ({"strides": (0, 1)}, "dense"),
        ({"dtype": BFLOAT16}, "float32, got bfloat16"),
    ],
)
def test_output_that_cannot_be_written(options, message):
    y = np.full((4, 5), 3, np.float32)
    p = Producer(y, **options)
    with pytest.raises((BufferError, TypeError), match=f"linear: out .*{message}"):
        ops.linear(draw(4, 6), W, out=p)
    assert p.deleted == 1 and (y == 3).all()


def test_read_only_input_is_fine():
    x = draw(4, 6)
    check(Producer(x, flags=READ_ONLY), x)


# ---- no leaks --------------------------------------------------------------------------------


def test_references_are_stable():
    x, out, wrong = draw(4, 6), np.empty((4, 5), np.float32), draw(4, 7)
    p = Producer(x)

    def round_of_calls():
        ops.linear(x, W, out=out)
        ops.linear(x[::-1, ::-1], W)
        ops.linear(p, W)
        for args in [(x, wrong), (p, wrong), (x, W.astype(np.float64))]:
            with pytest.raises((ValueError, TypeError)):
                ops.linear(*args)
        p.last = None

    def counts():
        gc.collect()
        return [sys.getrefcount(o) for o in (x, W, out, wrong, p, x.dtype)]

    round_of_calls()
    before, deleted = counts(), p.deleted
    for _ in range(100):
        round_of_calls()
    assert counts() == before
    assert p.deleted == deleted + 200


def in_flight(x, w):
    """Start linear(x, w) in a thread and return once both have been borrowed: w is a Producer,
    and the last to be asked."""
    result = []
    worker = threading.Thread(target=lambda: result.append(ops.linear(x, w)))
    worker.start()
    while not w.requests:
        time.sleep(0)
    return worker, result


def test_nothing_is_given_back_while_in_use():
    w = Producer(draw(1024, 1024))
    worker, result = in_flight(draw(2048, 1024), w)
    early = w.deleted  # some 4 GFLOP are to be done yet
    worker.join()
    assert (early, w.deleted, len(result)) == (0, 1, 1)


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
    with pytest.raises(TypeError, match="expected an array"):
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
