"""Kimi Delta Attention on its own: prefill, decode, a ragged batch, and the specification.

python examples/03_kda_by_hand.py
"""

import kimi_linear as kl
import numpy as np

T, H, K, V = 200, 2, 64, 32  # tokens, heads, key and value channels
rng = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


q, k = (unit(rng.standard_normal((T, H, K))).astype(np.float32) for _ in "qk")
v = rng.standard_normal((T, H, V)).astype(np.float32)
g = -rng.random((T, H, K)).astype(np.float32)  # log of each channel's decay
beta = rng.random((T, H)).astype(np.float32)  # how strongly a token is written

o, state = kl.ops.kda_prefill(q, k, v, g, beta)
print("output", o.shape, "state", state.shape, "- the same size after any number of tokens")

spec, spec_state = kl.reference.kda_prefill(q, k, v, g, beta)
print(f"against the float64 specification: {np.abs(o - spec).max():.1e}")

# The state after 150 tokens is all that the remaining 50 need to know of them.
_, middle = kl.ops.kda_prefill(q[:150], k[:150], v[:150], g[:150], beta[:150])
rest, _ = kl.ops.kda_prefill(
    q[150:], k[150:], v[150:], g[150:], beta[150:], initial_state=middle
)
print(f"in two parts: {np.abs(rest - o[150:]).max():.1e}")

# One token at a time, updating the state in place.
running = middle.copy()
steps = [
    kl.ops.kda_decode(*(x[t : t + 1] for x in (q, k, v, g, beta)), running)[0]
    for t in range(150, T)
]
print(f"token by token: {np.abs(np.stack(steps) - o[150:]).max():.1e}")

# Three sequences in one call, without padding.
starts = np.array([0, 5, 5, T], np.int32)  # the second is empty
_, states = kl.ops.kda_prefill(q, k, v, g, beta, cu_seqlens=starts)
print("ragged batch: states", states.shape, "- the empty one's is zero:", not states[1].any())
