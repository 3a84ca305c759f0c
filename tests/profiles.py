"""Gate profiles: the kinds of memory that KDA is trained to have, and the ones that break kernels.

Each is a function (r, T, H, K) -> (raw g [T, H, K], the gate's other arguments); `make_case`
adds directions, values and a state to start from.
"""

from typing import NamedTuple

import numpy as np


def init(r, T, H, K):
    """The softplus gate as training starts: from long memory to little in one head."""
    dt = np.exp(r.uniform(np.log(1e-3), np.log(0.1), (H, K)))
    return r.standard_normal((T, H, K)), {
        "gate": "softplus",
        "A_log": np.log(r.uniform(1, 16, H)),
        "dt_bias": dt + np.log(-np.expm1(-dt)),
    }


def bounded(r, T, H, K):
    """The bounded gate around its middle: about 2.5 nat a token."""
    return r.standard_normal((T, H, K)), {"gate": "bounded", "lower_bound": -5.0}


def mixed(r, T, H, K):
    """One channel in eight remembers thousands of tokens, the others forget at once."""
    g = -5 - 20 * r.random((T, H, K))
    g[..., ::8] = -1e-4 * r.uniform(0.5, 1.5, g[..., ::8].shape)
    return g, {}


def slow(r, T, H, K):
    """Every channel remembers thousands of tokens."""
    return -2e-4 * r.random((T, H, K)), {}


def constant(r, T, H, K):
    """The same small decay at each token: a rounding of it would add up, always the same way."""
    return np.full((T, H, K), -1e-5), {}


def strong(r, T, H, K):
    """Over 88 nat in eight tokens: e^-88 is where float32 ends."""
    return -12 - r.random((T, H, K)), {}


def none(r, T, H, K):
    """No decay at all."""
    return np.zeros((T, H, K)), {}


GATES = {f.__name__: f for f in (init, bounded, mixed, slow, constant, strong, none)}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def repeat_keys(r, k, beta):
    """One key again and again, written almost in full: what is read is what was just written."""
    k[:] = k[0]
    beta[:] = 1 - 1e-3 * r.random(beta.shape)


def near_keys(r, k, beta):
    """Keys within a few degrees of one."""
    k[:] = unit(k[0] + 0.01 * r.standard_normal(k.shape))
    beta[:] = 1 - 1e-3 * r.random(beta.shape)


def reflect(r, k, beta):
    """beta up to 2: a write may turn what is held into its negative."""
    beta[:] = 2 * r.random(beta.shape)


def leave(r, k, beta):
    """Nothing is written: what is left of the state is decay alone."""
    beta[:] = 0


PROFILES = {name: (gate, None) for name, gate in GATES.items()} | {
    "repeated keys": (none, repeat_keys),
    "near keys": (none, near_keys),
    "beta to 2": (slow, reflect),
    "beta to 2, no decay": (none, reflect),
    "decay alone": (constant, leave),
}


class Published(NamedTuple):
    """A case that flash-linear-attention tests its kernels with; it allows 5e-3. Borders of the
    sequences, heads, channels of a head, scale (None: K^-1/2), what the log-decay is divided by,
    and the share of it that is left out."""

    cu: tuple[int, ...]
    H: int
    K: int
    scale: float | None
    divisor: float
    left_out: float


PUBLISHED = (
    Published((0, 1024), 4, 128, 0.1, 1, 0),
    Published((0, 1500), 4, 128, 0.1, 10, 0),
    Published((0, 1000), 3, 64, 0.1, 1, 0.5),
    Published((0, 1024), 4, 100, 1, 0.1, 0),
    Published((0, 256, 500, 1000), 4, 128, None, 1, 0.5),
    Published((0, 15, 100, 300, 1200, 2000), 4, 100, None, 1, 0),
)


def make_case(profile, T, *, H=2, Hk=None, K=48, V=40, N=1, seed=0):
    """Arguments of kda_prefill by name, float32, with N states to start from. q and k are unit
    vectors."""
    r = np.random.default_rng(seed)
    gate, keys = PROFILES[profile]
    q, k = (unit(r.standard_normal((T, Hk or H, K))) for _ in range(2))
    v, beta = r.standard_normal((T, H, V)), r.random((T, H))
    g, options = gate(r, T, H, K)
    if keys is not None:
        keys(r, k, beta)
    arrays = {"q": q, "k": k, "v": v, "g": g, "beta": beta, **options,
              "initial_state": r.standard_normal((N, H, V, K))}  # fmt: skip
    return {
        name: np.ascontiguousarray(x, np.float32) if isinstance(x, np.ndarray) else x
        for name, x in arrays.items()
    }


def checkpoints(cu, every):
    """(sequence n, its first token, where it is cut, the row of that state in `checkpoints`)."""
    for n, (start, stop) in enumerate(zip(cu, cu[1:], strict=False)):
        for c in range((stop - start) // every):
            yield n, start, start + (c + 1) * every, start // every + c
