"""NumPy arrays and the buffer protocol, in and out."""

import array
import ctypes
import gc

import numpy as np
import pytest
from capsules import Producer

from kimi_linear import _core, ops

rng = np.random.default_rng(11)
W = rng.standard_normal((5, 6), dtype=np.float32)


def draw(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


def check(x, values):
    y = ops.linear(x, W)
    assert type(y) is np.ndarray and y.dtype == np.float32 and y.flags.c_contiguous
    want = np.asarray(values, np.float64) @ W.T.astype(np.float64)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


# ---- NumPy in --------------------------------------------------------------------------------

VIEWS = {
    "dense": lambda a: a,
    "rows": lambda a: a[::2],
    "rows backwards": lambda a: a[::-1],
    "columns backwards": lambda a: a[:, ::-1],
    "every third column": lambda a: np.repeat(a, 3, axis=1)[:, ::3],
    "Fortran order": np.asfortranarray,
    "broadcast rows": lambda a: np.broadcast_to(a[:1], a.shape),
    "broadcast scalar": lambda a: np.broadcast_to(np.float32(3), a.shape),
    "read-only": lambda a: (a.setflags(write=False), a)[1],
    "one row": lambda a: a[:1],
    "one axis": lambda a: a[2],
    "three axes": lambda a: a.reshape(2, 4, 6),
    "three axes, transposed": lambda a: a.reshape(2, 4, 6).transpose(1, 0, 2),
    "five axes": lambda a: a.reshape(2, 1, 2, 2, 6)[:, :, ::-1],
    "subclass": lambda a: a.view(type("Sub", (np.ndarray,), {})),
    "a field of records": lambda a: field_of_records(a),
}


def field_of_records(a):
    records = np.zeros(a.shape, [("a", np.float32), ("b", np.int64, 2)])
    records["a"] = a
    return records["a"]  # strides of 20 bytes


@pytest.mark.parametrize("view", VIEWS)
def test_numpy_views(view):
    x = VIEWS[view](draw(8, 6))
    check(x, x)


def test_views_give_the_bits_of_copies():
    x = np.repeat(draw(8, 6), 2, axis=1)[::-2, ::2]
    assert (ops.linear(x, W) == ops.linear(x.copy(), W)).all()


REFUSED = {
    "float64": (np.zeros((4, 6)), TypeError, "float64"),
    "float16": (np.zeros((4, 6), np.float16), TypeError, "float16"),
    "int32": (np.zeros((4, 6), np.int32), TypeError, "int32"),
    "bool": (np.zeros((4, 6), bool), TypeError, "bool"),
    "complex64": (np.zeros((4, 6), np.complex64), TypeError, "complex64"),
    "long double": (np.zeros((4, 6), np.longdouble), TypeError, "float128"),
    "other byte order": (np.zeros((4, 6), ">f4"), TypeError, "dtype"),
    "objects": (np.zeros((4, 6), object), TypeError, "dtype"),
    "text": (np.zeros((4, 6), "U3"), TypeError, "dtype"),
    "records": (np.zeros((4, 6), "f4,f4"), TypeError, "dtype"),
    "dates": (np.zeros((4, 6), "M8[s]"), TypeError, "dtype"),
    "no axes": (np.float32(1), (TypeError, ValueError), "linear: x"),
    "0-d": (np.zeros((), np.float32), ValueError, "axes"),
    "six axes": (np.zeros((1,) * 5 + (6,), np.float32), ValueError, "1 to 5 axes"),
    "nine axes": (np.zeros((1,) * 8 + (6,), np.float32), BufferError, "8 axes"),
    "misaligned": (
        np.frombuffer(bytes(97), np.uint8)[1:].view(np.float32).reshape(4, 6),
        BufferError,
        "aligned",
    ),
    "list": ([[1.0] * 6], TypeError, "array"),
    "None": (None, TypeError, "array"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_numpy_refused(case):
    x, error, message = REFUSED[case]
    if case == "misaligned" and x.flags.aligned:
        x = np.frombuffer(bytearray(100), np.uint8)[3:99].view(np.float32).reshape(4, 6)
    with pytest.raises(error, match=message):
        ops.linear(x, W)


ABOUT_AXES = ("no axes", "0-d", "six axes", "nine axes")


@pytest.mark.parametrize("case", [c for c in REFUSED if c not in ABOUT_AXES])
def test_refusals_name_the_argument(case):
    w, error, _ = REFUSED[case]
    with pytest.raises(error, match="linear: w"):
        ops.linear(draw(4, 6), w)


def test_numpy_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bf16 = np.dtype(ml_dtypes.bfloat16)
    x, w = draw(9, 6).astype(bf16), W.astype(bf16)
    y = ops.linear(x[::2], w)
    assert y.dtype == bf16
    want = x[::2].astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=2**-8, atol=1e-6)
    out = np.full((9, 5), np.nan, np.float32)
    assert ops.linear(x, w, out=out) is out  # a linear output may be wider
    np.testing.assert_allclose(out, x.astype(float) @ w.astype(float).T, rtol=1e-5, atol=1e-5)
    for other in ["float8_e4m3fn", "int4"]:
        with pytest.raises(TypeError, match="linear: x"):
            ops.linear(np.zeros((4, 6), getattr(ml_dtypes, other)), W)


def test_empty_arrays():
    with pytest.raises(ValueError, match="linear"):
        ops.linear(np.zeros((4, 0), np.float32), np.zeros((5, 0), np.float32))
    y, state = ops.short_conv(draw(0, 3), draw(3, 4), cu_seqlens=np.zeros(1, np.int32))
    assert y.shape == (0, 3) and state.shape == (0, 3, 3)


# ---- NumPy out -------------------------------------------------------------------------------


def test_given_output_is_the_one_returned():
    x, out = draw(4, 6), np.full((4, 5), np.nan, np.float32)
    assert ops.linear(x, W, out=out) is out
    np.testing.assert_allclose(out, x @ W.T, rtol=1e-5, atol=1e-5)


def sealed(a):
    a.setflags(write=False)
    return a


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.zeros((4, 6), np.float32), ValueError, "shape \\(4, 5\\), got \\(4, 6\\)"),
        (np.zeros((4, 5)), TypeError, "float64"),
        (np.zeros(20, np.float32), ValueError, "must have 2 axes"),
        (np.zeros((4, 10), np.float32)[:, ::2], BufferError, "dense"),
        (np.zeros((5, 4), np.float32).T, BufferError, "dense"),
        (np.broadcast_to(np.float32(0), (4, 5)), BufferError, "out"),
        (sealed(np.zeros((4, 5), np.float32)), BufferError, "read-only"),
        (bytes(80), (TypeError, BufferError), "out"),
        ([0.0] * 20, TypeError, "array"),
    ],
)
def test_output_refused(out, error, message):
    with pytest.raises(error, match=f"linear: out.*{message}" if message != "out" else message):
        ops.linear(draw(4, 6), W, out=out)


def test_output_may_not_share_memory_with_inputs():
    block = np.zeros(200, np.float32)
    x = block[:24].reshape(4, 6)
    for start in (0, 23, 10):
        with pytest.raises(ValueError, match="linear: out must not share memory with x"):
            ops.linear(x, W, out=block[start : start + 20].reshape(4, 5))
    ops.linear(x, W, out=block[24:44].reshape(4, 5))
    w = block[50:80].reshape(5, 6)
    with pytest.raises(ValueError, match="linear: out must not share memory with w"):
        ops.linear(x, w, out=block[60:80].reshape(4, 5))


def test_norms_may_write_over_their_input():
    x, z, weight = draw(4, 6), draw(4, 6), draw(6)
    for op, args in [(ops.rms_norm, (weight,)), (ops.gated_rms_norm, (z, weight))]:
        want, x2 = op(x, *args, eps=1e-5), x.copy()
        assert op(x2, *args, eps=1e-5, out=x2) is x2
        assert (x2 == want).all()
    block = np.zeros(40, np.float32)
    with pytest.raises(ValueError, match="out must not share memory with x"):
        ops.rms_norm(
            block[:24].reshape(4, 6), weight, eps=1e-5, out=block[6:30].reshape(4, 6)
        )  # fmt: skip
    with pytest.raises(ValueError, match="out must not share memory with z"):
        ops.gated_rms_norm(x, z, weight, out=z)


# ---- buffers in ------------------------------------------------------------------------------


def test_plain_buffers():
    x = draw(4, 6)
    check(memoryview(x), x)
    check(memoryview(x)[::-2], x[::-2])
    check(memoryview(bytearray(x)).cast("f", (4, 6)), x)
    check(memoryview(bytes(x)).cast("f", (4, 6)), x)
    check(array.array("f", x[0]), x[0])
    check((ctypes.c_float * 6)(*x[1]), x[1])


def test_buffer_as_output():
    x = draw(4, 6)
    out = memoryview(bytearray(80)).cast("f", (4, 5))
    assert ops.linear(x, W, out=out) is out
    np.testing.assert_allclose(np.asarray(out), x @ W.T, rtol=1e-5, atol=1e-5)
    with pytest.raises(BufferError, match="linear: out must be writable"):
        ops.linear(x, W, out=memoryview(bytes(80)).cast("f", (4, 5)))


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (array.array("d", [1.0] * 6), "float64"),
        (array.array("i", [1] * 6), "int32"),
        (array.array("q", [1] * 6), "int64"),
        (array.array("H", [1] * 6), "uint16"),
        (array.array("B", [1] * 6), "uint8"),
        (b"123456", "uint8"),
        (memoryview(bytes(6)).cast("?"), "bool"),
        (memoryview(bytes(6)).cast("c"), "opaque8"),
    ],
)
def test_buffer_of_another_dtype(buffer, message):
    with pytest.raises(TypeError, match=f"x must be float32 or bfloat16, got {message}"):
        ops.linear(buffer, W)


def test_a_buffer_in_use_is_released_afterwards():
    x = bytearray(draw(4, 6))
    view = memoryview(x).cast("f", (4, 6))
    ops.linear(view, W)
    with pytest.raises((TypeError, ValueError)):
        ops.linear(view, W[:, :3])
    view.release()
    x.append(0)  # BufferError if anything still held it


# ---- ids -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("form", [lambda a: a, lambda a: np.repeat(a, 2)[::2], memoryview])
def test_id_arrays(dtype, form):
    x, weight = draw(10, 3), draw(3, 4)
    cu = form(np.array([0, 3, 3, 10], dtype))
    y, state = ops.short_conv(x, weight, cu_seqlens=cu)
    parts = [ops.short_conv(x[a:b], weight) for a, b in [(0, 3), (3, 10)]]
    assert (y == np.concatenate([p[0] for p in parts])).all()
    assert (state[[0, 2]] == np.concatenate([p[1] for p in parts])).all()
    assert (state[1] == 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int16, np.float32, bool])
def test_ids_of_another_dtype(dtype):
    with pytest.raises(TypeError, match="short_conv: cu_seqlens must be int32 or int64, got"):
        ops.short_conv(draw(1, 3), draw(3, 4), cu_seqlens=np.array([0, 1], dtype))


# ---- our own arrays as buffers ---------------------------------------------------------------


def own_array(dtype=np.float32):
    x = draw(4, 6)
    return ops.linear(Producer(x), W), x @ W.T


def test_array_as_a_buffer():
    y, want = own_array()
    view = memoryview(y)
    assert (view.format, view.itemsize, view.shape, view.strides) == ("f", 4, (4, 5), (20, 4))
    assert not view.readonly and view.c_contiguous and view.nbytes == 80
    view[1, 2] = 7.0
    assert np.from_dlpack(y)[1, 2] == 7
    flat = bytes(y)
    assert len(flat) == 80
    del y
    gc.collect()
    np.testing.assert_allclose(np.asarray(view)[2:], want[2:], rtol=1e-5, atol=1e-5)


def test_array_as_an_output():
    y, _ = own_array()
    x = draw(4, 6)
    assert ops.linear(x, W, out=y) is y
    np.testing.assert_allclose(np.asarray(memoryview(y)), x @ W.T, rtol=1e-5, atol=1e-5)


def test_array_of_ids_and_bools():
    h, head = Producer(draw(4, 6)), draw(9, 6)
    lp, greedy, ids, top = ops.token_logprobs(h, head, np.array([1, 2, 3, -1]), top=2)
    assert [type(a) for a in (lp, greedy, ids, top)] == [_core.Array] * 4
    assert [a.dtype for a in (lp, greedy, ids, top)] == ["float32", "bool", "int32", "float32"]
    assert [memoryview(a).format for a in (lp, greedy, ids, top)] == ["f", "?", "i", "f"]
    assert np.from_dlpack(greedy).dtype == bool and np.from_dlpack(ids).shape == (4, 2)
