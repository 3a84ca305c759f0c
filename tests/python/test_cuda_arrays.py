"""kl.ops on CuPy's and JAX's own arrays on a GPU: their memory, their order of work."""

import os

import numpy as np
import pytest

from kimi_linear import ops, reference
from on_cuda import has_cuda

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")

EPS = 1e-5


def rows(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, want, bound=1e-6):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - want) < bound * np.linalg.norm(want)


# ---- CuPy ------------------------------------------------------------------------------------


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


def test_cupy_in_cupy_out(cupy):
    x, w = rows((5, 40)), rows((7, 40), 1)
    y = ops.linear(cupy.asarray(x), cupy.asarray(w))
    assert isinstance(y, cupy.ndarray) and y.device.id == 0
    assert close(y.get(), reference.linear(x, w))


def test_cupy_memory_is_used_as_it_is(cupy):
    x, weight, out = cupy.asarray(rows((5, 40))), cupy.ones(40, "f4"), cupy.empty((5, 40), "f4")
    before = out.data.ptr
    assert ops.rms_norm(x, weight, eps=EPS, out=out) is out and out.data.ptr == before
    assert close(out.get(), reference.rms_norm(x.get(), weight.get(), eps=EPS))
    own = x.copy()
    assert ops.rms_norm(own, weight, eps=EPS, out=own) is own
    assert (own == out).all()


def test_cupy_slices(cupy):
    """Rows of a wider array go as they are; what is not dense within a row is refused."""
    wide = cupy.full((5, 50), cupy.nan, "f4")
    wide[:, 3:43] = cupy.asarray(rows((5, 40)))
    weight = cupy.ones(40, "f4")
    y = ops.rms_norm(wide[:, 3:43], weight, eps=EPS)
    assert close(y.get(), reference.rms_norm(rows((5, 40)), weight.get(), eps=EPS))
    with pytest.raises(BufferError, match="dense"):
        ops.rms_norm(wide[:, :40].T, cupy.ones(5, "f4"), eps=EPS)


@pytest.mark.parametrize("named", [False, True])
def test_cupy_streams(cupy, named):
    """What a stream of CuPy's has still to write is waited for."""
    real, weight = cupy.asarray(rows((300, 400))), cupy.ones(400, "f4")
    big = cupy.ones((6000, 6000), "f4")
    x = cupy.full_like(real, cupy.nan)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for _ in range(3):
            big = big @ big  # some milliseconds
        x[:] = real
        y = ops.rms_norm(x, weight, eps=EPS, stream=stream.ptr if named else None)
        got = y.copy()
    stream.synchronize()
    assert close(got.get(), reference.rms_norm(real.get(), weight.get(), eps=EPS))


def test_cupy_state_is_updated(cupy):
    q, k, g = (rows((2, 3, 16), i) for i in range(3))
    v, beta, state = rows((2, 3, 8), 3), rows((2, 3), 4), rows((2, 3, 8, 16), 5)
    there = cupy.asarray(state)
    o = ops.kda_decode(*map(cupy.asarray, (q, k, v, -abs(g), beta)), there)
    want_state = state.astype(np.float64)
    want = reference.kda_decode(q, k, v, -abs(g), beta, want_state)
    assert close(o.get(), want) and close(there.get(), want_state)


# ---- JAX -------------------------------------------------------------------------------------


@pytest.fixture
def jax():
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    module = pytest.importorskip("jax")
    if module.default_backend() != "gpu":
        pytest.skip("JAX has no GPU")
    return module


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_jax_in_jax_out(jax, dtype, bound):
    x = jax.numpy.asarray(rows((5, 40))).astype(dtype)
    w = jax.numpy.asarray(rows((7, 40), 1)).astype(dtype)
    y = ops.linear(x, w)
    assert isinstance(y, jax.Array) and y.dtype == x.dtype
    assert y.devices() == x.devices()
    exact = (np.asarray(a, np.float64) for a in (x, w))
    assert close(y, reference.linear(*exact), bound)


def test_jax_computations_are_waited_for(jax):
    jnp = jax.numpy
    big = jnp.ones((6000, 6000))
    weight = jnp.ones(400)
    for _ in range(3):
        big = big @ big / 6000
    x = jnp.asarray(rows((300, 400))) + big[:300, :400]
    y = ops.rms_norm(x, weight, eps=EPS)
    want = reference.rms_norm(rows((300, 400)) + 1.0, np.ones(400), eps=EPS)
    assert close(y, want, 1e-5)


def test_jax_arrays_are_not_written_to(jax):
    x = jax.numpy.asarray(rows((5, 40)))
    with pytest.raises(BufferError, match="writable"):
        ops.rms_norm(x, jax.numpy.ones(40), eps=EPS, out=x)
