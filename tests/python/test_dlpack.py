"""DLPack tensors as arguments: what is right is taken without a copy, what is wrong is refused
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
    W,
    Legacy,
    Producer,
    Versioned,
    check,
    draw,
    expected,
    name_of,
    new_capsule,
)

from kimi_linear import DeviceError, _core, ops


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
    with pytest.raises(TypeError, match="the first argument must be an array"):
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
    x, weight = draw(2048, 1024), draw(1024, 1024)
    for _ in range(20):
        w = Producer(weight)
        worker, result = in_flight(x, w)
        early, ended = w.deleted, len(result)  # some 4 GFLOP are to be done yet
        worker.join()
        assert (w.deleted, len(result)) == (1, 1)
        if not ended:  # else this thread had to wait for a processor
            break
    assert (early, ended) == (0, 0)
