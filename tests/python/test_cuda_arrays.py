"""kl.ops on CuPy's and JAX's own arrays on a GPU: their memory, their order of work."""

import inspect
import os

import ml_dtypes
import numpy as np
import pytest

from kimi_linear import ops, reference
from on_cuda import has_cuda, to_numpy
from variants import same_bits

torch = pytest.importorskip("torch")

from torch_cases import GPU_CASES, case_on, mapped  # noqa: E402

pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs a CUDA device")

EPS = 1e-5
BF16 = ml_dtypes.bfloat16


def rows(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, want, bound=1e-6):
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - want) < bound * np.linalg.norm(want)


def results(case, make, to_host, **outputs):
    """What a call on arrays made of a case's tensors gives and leaves in its arguments."""
    op, args, options = case
    given = []
    args, options = mapped([args, options], lambda t: given.append(make(t)) or given[-1])
    got = getattr(ops, op)(*args, **options, **outputs)
    return [to_host(x) for x in (*(got if isinstance(got, tuple) else (got,)), *given)]


def same(got, want):
    return len(got) == len(want) and all(map(same_bits, got, want))


def as_torch(name):
    """The same of torch's tensors."""
    return results(case_on(name, "cuda"), lambda t: t, to_numpy)


def test_cases_have_every_operation():
    called = {name.split()[0] for name in GPU_CASES}  # quantize makes their weights
    assert called == {*ops.__all__} - {"PackedWeight", "quantize"}


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


@pytest.fixture
def bfloat16_of_cupy(cupy):
    """CuPy has bfloat16 from 14 on, and through DLPack from a version after that."""
    try:
        return cupy.from_dlpack(cupy.asarray(np.ones(1, BF16))).dtype == BF16
    except (BufferError, NotImplementedError, TypeError, ValueError):
        return False


@pytest.mark.parametrize("name", GPU_CASES)
def test_every_operation_on_cupy(cupy, bfloat16_of_cupy, name):
    """torch's bits; the second time in memory of the caller's where the operation takes any."""
    want = as_torch(name)
    if not bfloat16_of_cupy and any(x.dtype == BF16 for x in want):
        pytest.skip("this CuPy has no bfloat16")

    def call(**outputs):
        return results(
            case_on(name, "cuda"), lambda t: cupy.asarray(to_numpy(t)), cupy.asnumpy, **outputs
        )

    assert same(call(), want)
    if "out" not in inspect.signature(getattr(ops, name.split()[0])).parameters:
        return
    out = cupy.empty(want[0].shape, want[0].dtype)
    out.view("u1")[...] = 255  # NaN
    there = out.data.ptr
    assert same(call(out=out), want)
    assert out.data.ptr == there and same_bits(cupy.asnumpy(out), want[0])


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


@pytest.mark.parametrize("name", GPU_CASES)
def test_every_operation_on_jax(jax, name):
    """torch's bits. The state that kda_decode writes to is torch's: JAX's arrays never change."""
    op, args, _ = case = case_on(name, "cuda")
    state = args[5] if op == "kda_decode" else None

    def make(t):
        return t if t is state else jax.device_put(to_numpy(t))

    def to_host(x):
        if x is not state:
            return np.asarray(x)
        torch.cuda.synchronize()  # what torch does next knows nothing of JAX's stream
        return to_numpy(x)

    assert same(results(case, make, to_host), as_torch(name))
