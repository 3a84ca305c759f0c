"""What the tests of MLA share: calls whose unused memory is NaN.

Everything a call must not read is NaN: rows of pages past a sequence's length, pages nobody
owns; table entries past it are absurd.
"""

import ml_dtypes
import numpy as np
from variants import ops

PAGE = 64
BF16 = ml_dtypes.bfloat16
# H, nope, rope, rank, V: none equal, none a multiple of a vector; and a plain one.
ODD = (3, 17, 5, 33, 21)
NO_ROPE = (2, 16, 0, 48, 7)
MANY_HEADS = (37, 5, 3, 11, 4)
SCALE = 0.23
LENGTHS = (1, 63, 64, 65, 127, 128, 129)


def make_case(spans, dims, *, seed=0, dtype=np.float32, w_dtype=np.float32):
    """Arguments of mla_prefill for sequences of (past, new) tokens."""
    H, nope, rope, rank, V = dims
    r = np.random.default_rng(seed)
    cu = np.cumsum([0] + [new for _, new in spans]).astype(np.int32)
    return {
        "q": r.standard_normal((cu[-1], H, nope + rope)).astype(dtype),
        "latent": r.standard_normal((cu[-1], rank + rope)).astype(dtype),
        "w_kv_b": (r.standard_normal((H, nope + V, rank)) / rank**0.5).astype(w_dtype),
        "cu_seqlens": cu,
        "past": [r.standard_normal((past, rank + rope)).astype(dtype) for past, _ in spans],
    }


def prefill(case, **changes):
    case = {**case, **changes}
    H, V = case["q"].shape[1], value_width(case)
    out = np.full((len(case["q"]), H, V), np.nan, case["q"].dtype)
    got = ops.mla_prefill(**case, scale=SCALE, out=out)
    assert got is out
    return out


def value_width(case):
    rank = case["w_kv_b"].shape[2]
    nope = case["q"].shape[2] - (case["latent"].shape[1] - rank)
    return case["w_kv_b"].shape[1] - nope


def to_pages(latents, seed=0):
    """Rows of each sequence -> (pages, block_table, lengths), poisoned where nobody reads."""
    r = np.random.default_rng(seed)
    counts = [-(-len(rows) // PAGE) for rows in latents]
    order = r.permutation(sum(counts) + 3)
    pages = np.full((len(order), PAGE, latents[0].shape[1]), np.nan, latents[0].dtype)
    table = np.full((len(latents), max(counts) + 2), 2**30, np.int32)
    used = 0
    for n, rows in enumerate(latents):
        for b in range(counts[n]):
            table[n, b] = order[used]
            part = rows[b * PAGE : (b + 1) * PAGE]
            pages[order[used], : len(part)] = part
            used += 1
    return pages, table, np.array([len(rows) for rows in latents], np.int32)


def decode(case, latents, **changes):
    """The last token of each sequence; case["q"] has one row for each."""
    pages, table, lengths = to_pages(latents)
    case = {**case, **changes}
    q, w = case["q"], case["w_kv_b"]
    out = np.full((len(q), q.shape[1], value_width(case)), np.nan, q.dtype)
    ops.mla_decode(q, pages, table, lengths, w, scale=SCALE, out=out)
    return out


def whole_latents(case):
    new = np.split(case["latent"], case["cu_seqlens"][1:-1])
    return [np.concatenate(rows) for rows in zip(case["past"], new, strict=True)]


def rel(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def tolerance(dtype):
    return 1e-6 if dtype == np.float32 else 4e-3  # one rounding to bfloat16 is 2^-9
