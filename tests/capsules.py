"""DLPack producers made by hand with ctypes, so that tests can get every field wrong.

The struct layouts are written down here a second time on purpose: a mistake in
csrc/python/dlpack.h would not be found by tests that used it.
"""

import ctypes
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64, c_void_p, cast, py_object, pythonapi

import numpy as np

from kimi_linear import ops

CPU, CUDA, CUDA_HOST = (1, 0), (2, 0), (3, 0)
FLOAT32, FLOAT64, BFLOAT16, INT32 = (2, 32), (2, 64), (4, 16), (0, 32)
READ_ONLY, IS_COPIED = 1, 2


class Tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


DELETER = CFUNCTYPE(None, c_void_p)


class Legacy(Structure):
    _fields_ = [("tensor", Tensor), ("ctx", c_void_p), ("deleter", DELETER)]


class Versioned(Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("ctx", c_void_p),
        ("deleter", DELETER),
        ("flags", c_uint64),
        ("tensor", Tensor),
    ]


NAMES = {Legacy: b"dltensor", Versioned: b"dltensor_versioned"}
USED = {b"dltensor": b"used_dltensor", b"dltensor_versioned": b"used_dltensor_versioned"}

DESTRUCTOR = ctypes.PYFUNCTYPE(None, c_void_p)  # called with the capsule, with the GIL
new_capsule = pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = py_object, [c_void_p, c_char_p, DESTRUCTOR]
get_name = pythonapi.PyCapsule_GetName
get_name.restype, get_name.argtypes = c_char_p, [c_void_p]
get_pointer = pythonapi.PyCapsule_GetPointer
get_pointer.restype, get_pointer.argtypes = c_void_p, [c_void_p, c_char_p]


def name_of(capsule):
    return get_name(id(capsule))


def pointer_of(capsule):
    return get_pointer(id(capsule), get_name(id(capsule)))


@DESTRUCTOR
def destroy(address):
    """Call the deleter of a tensor that nobody consumed, as the standard asks."""
    for kind, name in NAMES.items():
        if get_name(address) == name:
            tensor = cast(get_pointer(address, name), POINTER(kind)).contents
            if tensor.deleter:
                tensor.deleter(ctypes.addressof(tensor))


class Producer:
    """A DLPack producer over the memory of a NumPy array. `deleted` counts deleter calls.

    Any field can be overridden: shape, strides (None: NULL), data, byte_offset, dtype, lanes,
    ndim, device, major, flags; deleter=False leaves it NULL.
    """

    def __init__(self, array, *, kind=Versioned, major=1, flags=0, deleter=True, **fields):
        self.array, self.kind, self.deleted, self.requests = array, kind, 0, []
        ndim = fields.get("ndim", array.ndim)
        shape = fields.get("shape", array.shape)
        self.shape = (c_int64 * 16)(*(shape or ()))
        item = array.itemsize
        strides = fields.get("strides", [s // item for s in array.strides])
        self.strides = None if strides is None else (c_int64 * 16)(*strides)
        self.device = fields.get("device", CPU)
        code, bits = fields.get("dtype", FLOAT32)
        self.deleter = DELETER(self._delete) if deleter else DELETER()
        self.managed = kind()
        self.managed.deleter = self.deleter
        if kind is Versioned:
            self.managed.major, self.managed.flags = major, flags
        self.managed.tensor = Tensor(
            fields.get("data", array.ctypes.data), *self.device, ndim, code, bits,
            fields.get("lanes", 1),
            None if shape is None else cast(self.shape, POINTER(c_int64)),
            None if strides is None else cast(self.strides, POINTER(c_int64)),
            fields.get("byte_offset", 0),
        )  # fmt: skip

    def _delete(self, _address):
        self.deleted += 1

    def capsule(self):
        return new_capsule(ctypes.addressof(self.managed), NAMES[self.kind], destroy)

    def __dlpack__(self, **options):
        self.requests.append(options)
        self.last = self.capsule()
        return self.last

    def __dlpack_device__(self):
        return self.device


# ---- the exchange API ------------------------------------------------------------------------

SET_ERROR = CFUNCTYPE(None, c_void_p, c_char_p, c_char_p)
ALLOCATE = ctypes.PYFUNCTYPE(c_int, POINTER(Tensor), POINTER(c_void_p), c_void_p, SET_ERROR)
FROM_OBJECT = ctypes.PYFUNCTYPE(c_int, c_void_p, POINTER(c_void_p))
TO_OBJECT = ctypes.PYFUNCTYPE(c_int, c_void_p, POINTER(c_void_p))
VIEW = ctypes.PYFUNCTYPE(c_int, c_void_p, POINTER(Tensor))
STREAM = ctypes.PYFUNCTYPE(c_int, c_int32, c_int32, POINTER(c_void_p))


class Exchange(Structure):
    _fields_ = [
        ("major", c_uint32),
        ("minor", c_uint32),
        ("prev_api", c_void_p),
        ("allocate", ALLOCATE),
        ("from_object", FROM_OBJECT),
        ("to_object", TO_OBJECT),
        ("view", VIEW),
        ("stream", STREAM),
    ]


def exchange_of(cls):
    """The table that a type publishes."""
    capsule = cls.__dlpack_c_exchange_api__
    assert name_of(capsule) == b"dlpack_exchange_api"
    return cast(pointer_of(capsule), POINTER(Exchange)).contents


def lend(table, array):
    """A managed tensor of `array` through an exchange table; the caller calls its deleter."""
    out = c_void_p()
    assert table.from_object(id(array), byref(out)) == 0
    return cast(out, POINTER(Versioned)).contents


# ---- a call -----------------------------------------------------------------------------------

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
