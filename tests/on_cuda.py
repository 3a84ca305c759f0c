"""kl.ops on a CUDA device for tests that hold NumPy arrays.

A call's arrays become views of device copies of the memory they are views of: strides, padding,
alignment and who shares memory with whom are those of the caller. After the call all of that
memory comes back, so that a write where none belongs shows.
"""

import ctypes

import kimi_linear as kl
import numpy as np
import pytest
from kimi_linear import _backends, _core

try:
    import torch
except ImportError:
    torch = None

DEVICE = "cuda"
ALIGNMENT = 16  # bytes; no dtype is larger


def has_cuda():
    return torch is not None and torch.cuda.is_available()


def owner(x):
    """The array whose memory x is a view of."""
    found = x
    while (x := getattr(x, "base", None)) is not None:
        if isinstance(x, np.ndarray):
            found = x
    return found


def memory(x):
    """The bytes of an array that owns them, as an array."""
    if x.nbytes == 0:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * x.nbytes).from_address(x.ctypes.data))


class Call:
    """What one call has moved to the device."""

    def __init__(self):
        self.owners = {}  # id of an owner -> (owner, its bytes on the device)
        self.given = {}  # id of a tensor -> (tensor, the caller's array)

    def send(self, value):
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(self.send(v) for v in value)
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype == np.int64:  # integers are int32 on a GPU
            return torch.from_numpy(value.astype(np.int32)).to(DEVICE)
        for tensor, array in self.given.values():
            if array is value:
                return tensor
        tensor = self.view(value)
        self.given[id(tensor)] = tensor, value
        return tensor

    def view(self, array):
        own, item = owner(array), array.itemsize
        if id(own) not in self.owners:
            padded = -(-own.nbytes // ALIGNMENT) * ALIGNMENT
            copy = torch.zeros(padded, dtype=torch.uint8, device=DEVICE)
            copy[: own.nbytes] = torch.from_numpy(memory(own).copy()).to(DEVICE)
            self.owners[id(own)] = own, copy
        flat = self.owners[id(own)][1].view(getattr(torch, array.dtype.name))
        offset = (array.ctypes.data - own.ctypes.data) // item if array.size else 0
        return flat.as_strided(array.shape, [s // item for s in array.strides], offset)

    def bring_back(self):
        for own, copy in self.owners.values():
            if own.flags.writeable:
                memory(own)[:] = copy[: own.nbytes].cpu().numpy()

    def receive(self, value):
        if isinstance(value, tuple):
            return tuple(self.receive(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in self.given:
            return self.given[id(value)][1]
        return to_numpy(value)


def to_numpy(tensor):
    tensor = tensor.cpu()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def sample(logits, params, seen=None, top=0):
    return _core.sample(_backends.of(logits), logits, params, seen, top)


def on_device(function):
    """`function` of kl.ops, as one of NumPy arrays that runs on the device. An operation that
    the device lacks skips the test; tests/ops/test_cuda_streams.py, which calls each, fails."""

    def call(*args, **options):
        moved = Call()
        args = moved.send(args)
        options = {name: moved.send(value) for name, value in options.items()}
        try:
            result = function(*args, **options)
            torch.cuda.synchronize()  # an error of the kernel belongs to this call
        except kl.DeviceError as e:
            if "backend does not have it" in str(e):
                pytest.skip(str(e))
            raise
        moved.bring_back()
        return moved.receive(result)

    return call
