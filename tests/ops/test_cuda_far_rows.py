"""Rows past 2^31 elements of their tensor, of views whose strides lead there and of dense arrays:
an offset kept in 32 bits wraps there.

An embedding is not among them: no operation of kl.ops looks one up.
"""

import pytest

torch = pytest.importorskip("torch")

from kimi_linear import ops  # noqa: E402

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 10 << 30,
    reason="needs a CUDA device with 10 GiB free",
)

SIZE = (1 << 31) // 3 * 4  # elements: the last quarter of any view's rows starts past 2^31


@pytest.fixture(scope="module")
def block():
    """Rows in bf16 memory of more than 2^31 elements: rows -> (dense, far apart)."""
    memory = torch.empty(SIZE, dtype=torch.bfloat16, device="cuda")

    def spread(x):
        x = x.bfloat16()
        dense = torch.empty_like(x).stride()[1:]
        view = memory.as_strided(x.shape, (SIZE // len(x) // 64 * 64, *dense))
        view.copy_(x)
        return x, view

    yield spread
    del memory
    torch.cuda.empty_cache()


def randn(*shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda")


def same(got, want):
    for g, w in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
        torch.testing.assert_close(g, w, rtol=0, atol=0)


@pytest.mark.parametrize("format", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [4, 100])
def test_linear(block, format, rows):
    near, far = block(randn(rows, 256))
    w = ops.quantize(randn(320, 256, seed=1).bfloat16(), format)
    same(ops.linear(far, w), ops.linear(near, w))


def test_norms(block):
    near, far = block(randn(4, 1024))
    weight = randn(1024, seed=1)
    same(ops.rms_norm(far, weight, eps=1e-5), ops.rms_norm(near, weight, eps=1e-5))
    same(
        ops.gated_rms_norm(far.unflatten(1, (8, 128)), near.unflatten(1, (8, 128)), weight[:128]),
        ops.gated_rms_norm(near.unflatten(1, (8, 128)), near.unflatten(1, (8, 128)), weight[:128]),
    )


def test_short_conv(block):
    near, far = block(randn(4, 512))
    weight = randn(512, 4, seed=1)
    same(ops.short_conv(far, weight), ops.short_conv(near, weight))


@pytest.mark.parametrize("K", [128, 48])
@pytest.mark.parametrize("which", ["q", "k", "v", "g", "beta"])
def test_kda(block, which, K):
    N = 100
    args = {name: randn(N, 2, K, seed=i).bfloat16() for i, name in enumerate("qkvg")}
    args = {**args, "g": -args["g"].abs(), "beta": randn(N, 2, seed=5).bfloat16()}
    options = {"normalize": True, "beta_logits": True}
    near, far = block(args[which])
    same(ops.kda_prefill(**args | {which: far}, **options),
         ops.kda_prefill(**args | {which: near}, **options))  # fmt: skip
    states = randn(N, 2, K, K, seed=6)
    same(ops.kda_decode(**args | {which: far}, state=states.clone(), **options),
         ops.kda_decode(**args | {which: near}, state=states.clone(), **options))  # fmt: skip


@pytest.mark.parametrize("rank, nope, rope, V", [(512, 128, 64, 128), (40, 24, 8, 20)])
def test_mla(block, rank, nope, rope, V):
    near, far = block(randn(100, 2, nope + rope))
    latent = randn(100, rank + rope, seed=1).bfloat16()
    w = (randn(2, nope + V, rank, seed=2) / rank**0.5).bfloat16()
    same(ops.mla_prefill(far, latent, w), ops.mla_prefill(near, latent, w))
    near_latent, far_latent = block(latent)
    same(ops.mla_prefill(near, far_latent, w), ops.mla_prefill(near, near_latent, w))
    pages = randn(8, 64, rank + rope, seed=3).bfloat16()
    table = torch.arange(8, dtype=torch.int32, device="cuda").view(4, 2)
    lengths = torch.tensor([1, 70, 128, 64], dtype=torch.int32, device="cuda")
    near, far = block(randn(4, 2, nope + rope))
    same(ops.mla_decode(far, pages, table, lengths, w),
         ops.mla_decode(near, pages, table, lengths, w))  # fmt: skip


def test_pages_past_two_to_the_31(block):
    """The page table leads there instead of a stride."""
    width, pages = 576, SIZE // (64 * 576)
    latents = randn(2, 64, width).bfloat16()
    _, rows = block(randn(1, 1))
    memory = rows.as_strided((pages, 64, width), (64 * width, width, 1), 0)
    far = [pages - 1, pages - 3]
    for page, latent in zip(far, latents, strict=True):
        memory[page] = latent
    q, w = randn(1, 2, 192).bfloat16(), (randn(2, 256, 512, seed=1) / 23).bfloat16()
    length = torch.tensor([100], dtype=torch.int32, device="cuda")
    table = torch.tensor([far], dtype=torch.int32, device="cuda")
    near = torch.arange(2, dtype=torch.int32, device="cuda").view(1, 2)
    same(ops.mla_decode(q, memory, table, length, w), ops.mla_decode(q, latents, near, length, w))


# ---- what must be dense: so many rows ---------------------------------------------------------


def needs(gib):
    if torch.cuda.mem_get_info()[0] < gib << 30:
        pytest.skip(f"needs {gib} GiB free")


def all_rows(block, width):
    """The fixture's memory as rows, the number of them a multiple of 4096."""
    rows = SIZE // width // 4096 * 4096
    assert (rows - 4096) * width > 1 << 31
    return block(randn(1, 1))[1].as_strided((rows, width), (width, 1), 0)


def close(got, want):
    """To rounding: other kernels may take so many rows."""
    assert (got.double() - want.double()).norm() < 1e-2 * want.double().norm()


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_experts_of_so_many_tokens(block, format):
    needs(8)
    x = all_rows(block, 16384)
    last = x[-100:].copy_(randn(100, 16384))
    ids = torch.zeros(len(x), 1, dtype=torch.int32, device="cuda")
    ids[1::2] = 1
    weights = torch.rand(len(x), 1, device="cuda")
    w1, w3 = (ops.quantize(randn(2, 64, 16384, seed=i).bfloat16() / 128, format) for i in (1, 2))
    w2 = ops.quantize(randn(2, 16384, 64, seed=3).bfloat16() / 8, format)
    got = ops.moe_experts(x, ids, weights, w1, w3, w2)
    close(got[-100:], ops.moe_experts(last, ids[-100:], weights[-100:], w1, w3, w2))


@pytest.mark.parametrize("groups", [1, 8])
def test_routes_of_so_many_tokens(groups):
    needs(10)
    logits = torch.empty((1 << 23) + 100, 256, device="cuda")
    last = logits[-100:].copy_(randn(100, 256))
    options = dict(top_k=1, scaling=1.0, groups=groups)
    got = ops.moe_route(logits, None, **options)
    same(tuple(x[-100:] for x in got), ops.moe_route(last, None, **options))


@pytest.mark.parametrize("top", [0, 2])
def test_logprobs_of_so_many_tokens(block, top):
    hidden = all_rows(block, 16384)
    last = hidden[-100:].copy_(randn(100, 16384))
    head = randn(200, 16384, seed=1).bfloat16() / 128
    targets = torch.arange(len(hidden), dtype=torch.int32, device="cuda") % 200
    got = ops.token_logprobs(hidden, head, targets, top=top)
    want = ops.token_logprobs(last, head, targets[-100:], top=top)
    close(got[0][-100:], want[0])
    if top:
        same(got[2][-100:], want[2])


def test_experts_past_two_to_the_31():
    """1,400 experts of 1024 x 1536: the last begin past 2^31 values of a stack."""
    E, D, inner = 1400, 1024, 1536
    w = torch.zeros(E, inner, D, dtype=torch.bfloat16, device="cuda")
    w[-1] = randn(inner, D).bfloat16() / 32
    down = w.view(E, D, inner)
    x = randn(4, D, seed=1).bfloat16()
    last = torch.full((4, 1), E - 1, dtype=torch.int32, device="cuda")
    one = torch.ones(4, 1, device="cuda")
    near = torch.full((4, 1), 3, dtype=torch.int32, device="cuda")
    got = ops.moe_experts(x, last, one, w, w, down)
    # Of four experts, not of one: so few pairs an expert take the same kernels in both calls.
    same(got, ops.moe_experts(x, near, one, w[-4:], w[-4:], down[-4:]))
    assert got.abs().max() > 0
