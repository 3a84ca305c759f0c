"""mla_prefill with the model's dimensions in bfloat16, which CUDA has kernels of its own for.

Against the absorbed form in float32, for a context of several windows is too much for the float64
specification.
"""

import numpy as np
import pytest
from test_mla import BF16, PAGE, SCALE, make_case, prefill, rel
from variants import every_device

MODEL = (2, 128, 64, 512, 128)
# Keys, values and weights of the softmax are rounded to bfloat16 before they are summed.
ROUNDED = 5e-3


def expected(case, n, rows):
    """Rows (of a sequence's new tokens) of sequence n."""
    begin, end = case["cu_seqlens"][n : n + 2]
    past = case["past"][n]
    latents = np.concatenate([past, case["latent"][begin:end]]).astype(np.float32)
    w = case["w_kv_b"].astype(np.float32)
    c, k_pe = latents[:, :512], latents[:, 512:]
    want = []
    for i in rows:
        q = case["q"][begin + i].astype(np.float32)
        seen = len(past) + i + 1
        absorbed = np.einsum("hn,hnr->hr", q[:, :128], w[:, :128])
        scores = SCALE * (absorbed @ c[:seen].T + q[:, 128:] @ k_pe[:seen].T)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        want.append(np.einsum("hr,hvr->hv", p @ c[:seen] / p.sum(axis=1)[:, None], w[:, 128:]))
    return np.array(want)


def check(case):
    got = prefill(case)
    assert np.isfinite(got.astype(np.float32)).all()
    for n, (begin, end) in enumerate(zip(case["cu_seqlens"], case["cu_seqlens"][1:], strict=False)):
        if begin == end:
            continue
        rows = np.unique(np.linspace(0, end - begin - 1, 24).astype(int))
        assert rel(got[begin:end][rows], expected(case, n, rows)) < ROUNDED
    return got


@every_device
def test_ragged_tiles():
    spans = [(0, n) for n in (1, 16, 17, 63, 64, 65, 128, 129)]
    spans += [(0, 0), (7, 0), (63, 2), (50, 17), (50, 16), (100, 30), (300, 200)]
    check(make_case(spans, MODEL, dtype=BF16, w_dtype=BF16))


@every_device
@pytest.mark.parametrize("past", [0, 50, 64])
def test_tiles_of_a_batch_are_the_tiles_alone(past):
    """Also where a chunk ends at a page: there nothing differs but the batch."""
    spans = [(past, 150), (10, 70), (200, PAGE)]
    case = make_case(spans, MODEL, dtype=BF16, w_dtype=BF16)
    together = prefill(case)
    for n, (a, b) in enumerate(zip(case["cu_seqlens"], case["cu_seqlens"][1:], strict=False)):
        alone = prefill(case, q=case["q"][a:b], latent=case["latent"][a:b],
                        past=case["past"][n], cu_seqlens=None)  # fmt: skip
        assert (together[a:b] == alone).all()


@every_device
def test_contexts_longer_than_a_window():
    """CUDA makes the keys and values of 8,192 tokens at a time, of one sequence or several."""
    spans = [(9000, 100), (20, 90), (0, 0), (16400, 30), (8192, 64), (300, 1)]
    dims = (1, 128, 64, 512, 128)
    check(make_case(spans, dims, dtype=BF16, w_dtype=BF16))
