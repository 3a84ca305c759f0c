"""A row's result and the rows that share its call, on a GPU.

On a backend opened with batch_invariant=True a row has the same bits alone, among others, and
wherever it stands among them. On any other it has them to what rounding can explain. (The CPU
promises the bits always: the other files of this folder test that.)
"""

import pytest

torch = pytest.importorskip("torch")

from kimi_linear import _backends, ops, reference  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FORMATS = ("bf16", "int8", "int4", "fp8", "f32")
# Tiles of many rows have up to 96 or 160 of them, their products 32, 64, 96, 128 or 160.
COUNTS = (1, 2, 7, 8, 9, 16, 17, 32, 33, 64, 65, 96, 97, 129, 160, 161, 300)
ROWS = 330
# Of two results that are each within spec/kernels.md of the truth.
BOUND = {torch.bfloat16: 2 * 4e-3, torch.float32: 2 * 1e-6}


@pytest.fixture(params=["batch-invariant", "as it is"])
def same(request, monkeypatch):
    """Compares what must be equal in this mode; kl.ops runs in it."""
    strict = request.param == "batch-invariant"
    own = _backends.open_backend("cuda", batch_invariant=strict)
    monkeypatch.setitem(_backends._opened, ("cuda", 0), own)

    def compare(got, want, bound=None):
        if strict or not got.is_floating_point():
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            return
        off = (got.double() - want.double()).norm() / want.double().norm()
        assert off < (bound or BOUND[got.dtype]), float(off)

    yield compare
    torch.cuda.synchronize()


def randn(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def parts(rows=ROWS):
    """Rows of a call by themselves: the first few, one in the middle, a run up to the end."""
    yield from ((0, n) for n in COUNTS)
    yield rows // 2, rows // 2 + 1
    yield rows - 31, rows


@pytest.mark.parametrize("act", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out, width", [(320, 256), (7, 130), (136, 136), (72, 2312), (200, 4104)])
def test_linear(same, format, act, out, width):
    x = randn(ROWS, width, dtype=act)
    w = ops.quantize(randn(out, width, seed=1) / width**0.5, format)
    whole = ops.linear(x, w)
    for first, end in parts():
        same(ops.linear(x[first:end], w), whole[first:end])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [8, 24, 72, 264, 520, 1160])
def test_linear_to_float32(same, format, width):
    """Sums as they are: rounding to bf16 would hide most differences. Rows of x are strided, and
    what lies between them is not a number."""
    wide = torch.full((ROWS, width + 8), float("nan"), dtype=torch.bfloat16, device="cuda")
    wide[:, :width] = randn(ROWS, width)
    x, w = wide[:, :width], ops.quantize(randn(130, width, seed=1) / width**0.5, format)

    def linear(rows):
        out = torch.empty(len(rows), 130, dtype=torch.float32, device="cuda")
        return ops.linear(rows, w, out=out)

    whole = linear(x)
    for first, end in parts():
        same(linear(x[first:end]), whole[first:end], BOUND[torch.bfloat16])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("E, D, inner, top_k", [(16, 256, 128, 4), (5, 64, 1088, 3), (2, 192, 192, 2)])
def test_moe_experts(same, format, shared, E, D, inner, top_k):
    w = [
        ops.quantize(randn(E, *shape, seed=i) / 16, format)
        for i, shape in enumerate([(inner, D), (inner, D), (D, inner)])
    ]
    one = [
        ops.quantize(randn(*shape, seed=i + 5) / 16, format)
        for i, shape in enumerate([(inner, D), (inner, D), (D, inner)])
    ]
    x, logits = randn(ROWS, D), randn(ROWS, E, dtype=torch.float32)
    options = {"shared": tuple(one)} if shared else {}
    ids, weights = ops.moe_route(logits, None, top_k=top_k, scaling=2.5)
    whole = ops.moe_experts(x, ids, weights, *w, **options)
    for first, end in parts():
        chosen = ops.moe_route(logits[first:end], None, top_k=top_k, scaling=2.5)
        same(chosen[0], ids[first:end])
        same(chosen[1], weights[first:end])
        same(ops.moe_experts(x[first:end], *chosen, *w, **options), whole[first:end])


@pytest.mark.parametrize("format", FORMATS)
def test_token_logprobs(same, format):
    hidden = randn(ROWS, 256)
    head = ops.quantize(randn(3000, 256, seed=1) / 16, format)
    targets = torch.arange(ROWS, dtype=torch.int32, device="cuda") * 7
    logprobs, greedy, _, top = ops.token_logprobs(hidden, head, targets, top=3)
    for first, end in parts():
        got = ops.token_logprobs(hidden[first:end], head, targets[first:end], top=3)
        # A log-probability is a difference of logits: its error is theirs, of about one.
        same(got[0], logprobs[first:end], 4e-3)
        same(got[3], top[first:end], 4e-3)


def test_norms(same):
    x, z, weight = randn(ROWS, 8, 128), randn(ROWS, 8, 128, seed=1), randn(128).float()
    gated = ops.gated_rms_norm(x, z, weight)
    wide, scale = x.reshape(ROWS, -1), randn(1024).float()
    normed, summed = ops.rms_norm(wide, scale, eps=1e-5, residual=wide.float())
    for first, end in parts():
        same(ops.gated_rms_norm(x[first:end], z[first:end], weight), gated[first:end])
        got = ops.rms_norm(wide[first:end], scale, eps=1e-5, residual=wide[first:end].float())
        same(got[0], normed[first:end])
        same(got[1], summed[first:end])


# ---- sequences -------------------------------------------------------------------------------

LONG = (4161, 0, 67, 9000)  # three or four segments of a long one, by what is beside it


def test_kda_of_few_heads(same):
    """Segments and their states: alone, among others, up to each checkpoint."""
    H, every = 2, 192
    borders = [sum(LONG[:n]) for n in range(len(LONG) + 1)]
    q, k, v = (randn(borders[-1], H, 128, seed=i) for i in range(3))
    g = -1e-2 * randn(borders[-1], H, 128, dtype=torch.float32, seed=3).abs()
    beta = randn(borders[-1], H, seed=4)
    options = {"normalize": True, "beta_logits": True}
    cu = torch.tensor(borders, dtype=torch.int32, device="cuda")
    o, final, kept = ops.kda_prefill(
        q, k, v, g, beta, cu_seqlens=cu, checkpoint_every=every, **options
    )
    for n, (first, end) in enumerate(zip(borders, borders[1:], strict=False)):
        if first == end:
            continue
        own = [x[first:end] for x in (q, k, v, g, beta)]
        got = ops.kda_prefill(*own, **options)
        same(got[0], o[first:end])
        same(got[1][0], final[n], 4e-3)
        for c in range(3, (end - first) // every, 13):
            cut = ops.kda_prefill(*(x[: (c + 1) * every] for x in own), **options)[1]
            same(cut[0], kept[first // every + c], 4e-3)


LENGTHS = (1, 200, 64, 17, 130, 65, 2, 333)
BORDERS = [sum(LENGTHS[:n]) for n in range(len(LENGTHS) + 1)]
T = BORDERS[-1]


def ragged():
    return torch.tensor(BORDERS, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("act, K, V", [
    (torch.bfloat16, 128, 128), (torch.bfloat16, 128, 32), (torch.float32, 48, 40),
])  # fmt: skip
def test_kda(same, act, K, V):
    H = 4
    q, k, v = (randn(T, H, n, dtype=act, seed=i) for i, n in enumerate((K, K, V)))
    g, beta = -randn(T, H, K, dtype=torch.float32).abs(), randn(T, H, dtype=act)
    state = randn(len(LENGTHS), H, V, K, dtype=torch.float32)
    options = {"normalize": True, "beta_logits": True}
    o, final = ops.kda_prefill(
        q, k, v, g, beta, cu_seqlens=ragged(), initial_state=state, **options
    )
    for n, (first, end) in enumerate(zip(BORDERS, BORDERS[1:], strict=False)):
        own = [x[first:end] for x in (q, k, v, g, beta)]
        got = ops.kda_prefill(*own, initial_state=state[n : n + 1], **options)
        same(got[0], o[first:end])
        same(got[1][0], final[n])
        held = state[n : n + 1].clone()
        pieces = []
        for cut in range(0, end - first, 128):  # chunked: at multiples of 64
            part = [x[cut : cut + 128] for x in own]
            y, held = ops.kda_prefill(*part, initial_state=held, **options)
            pieces.append(y)
        same(torch.cat(pieces), o[first:end])
        same(held[0], final[n])
    states = state.clone()
    steps = ops.kda_decode(*(x[:8] for x in (q, k, v, g, beta)), states, **options)
    for n in range(8):
        held = state[n : n + 1].clone()
        one = ops.kda_decode(*(x[n : n + 1] for x in (q, k, v, g, beta)), held, **options)
        same(one[0], steps[n])
        same(held[0], states[n])


@pytest.mark.parametrize("act, rank, nope, rope, V", [
    (torch.bfloat16, 512, 128, 64, 128), (torch.float32, 40, 24, 8, 20),
])  # fmt: skip
def test_mla_prefill(same, act, rank, nope, rope, V):
    H = 4
    q, latent = randn(T, H, nope + rope, dtype=act), randn(T, rank + rope, dtype=act, seed=1)
    w = randn(H, nope + V, rank, dtype=act, seed=2) / rank**0.5
    past = [randn(p, rank + rope, dtype=act, seed=p) for p in (70, 0, 5, 64, 0, 129, 1, 10)]
    whole = ops.mla_prefill(q, latent, w, cu_seqlens=ragged(), past=past)
    for n, (first, end) in enumerate(zip(BORDERS, BORDERS[1:], strict=False)):
        seen, pieces, cut = past[n], [], first
        while cut < end:  # at absolute positions that are multiples of 128
            stop = min(end, cut + 128 - len(seen) % 128)
            pieces.append(ops.mla_prefill(q[cut:stop], latent[cut:stop], w, past=seen))
            seen, cut = torch.cat([seen, latent[cut:stop]]), stop
        same(ops.mla_prefill(q[first:end], latent[first:end], w, past=past[n]), whole[first:end])
        same(torch.cat(pieces), whole[first:end])


@pytest.mark.parametrize("act, rank, nope, rope, V", [
    (torch.bfloat16, 512, 128, 64, 128), (torch.float32, 40, 24, 8, 20),
])  # fmt: skip
@pytest.mark.parametrize("longest", [1500, 9000])
def test_mla_decode(same, act, rank, nope, rope, V, longest):
    N, H = 32, 4
    lengths = torch.linspace(1, longest, N).int().to("cuda")
    B = -(-longest // 64)
    pages = randn(N * B, 64, rank + rope, dtype=act)
    table = torch.randperm(N * B, generator=torch.Generator().manual_seed(1)).int()
    table = table.view(N, B).to("cuda")
    q, w = randn(N, H, nope + rope, dtype=act), randn(H, nope + V, rank, dtype=act) / rank**0.5
    whole = ops.mla_decode(q, pages, table, lengths, w)
    for n in range(N):
        own = slice(n, n + 1)
        same(ops.mla_decode(q[own], pages, table[own], lengths[own], w), whole[own])
    same(ops.mla_decode(q[3:20], pages, table[3:20], lengths[3:20], w), whole[3:20])


def test_mla_decode_of_8_bits(same):
    N, H, B, rank = 9, 4, 40, 512
    rows = randn(N * B, 64, rank + 64, dtype=torch.float32).cpu().numpy()
    pages = torch.from_numpy(reference.pack_latents(rows, rank)).to("cuda")
    table = torch.randperm(N * B, generator=torch.Generator().manual_seed(1)).int()
    table = table.view(N, B).to("cuda")
    lengths = torch.linspace(1, 64 * B, N).int().to("cuda")
    q = randn(N, H, 192, dtype=torch.bfloat16)
    w = randn(H, 256, rank, dtype=torch.bfloat16) / rank**0.5
    whole = ops.mla_decode(q, pages, table, lengths, w, rope=64)
    for n in range(N):
        own = slice(n, n + 1)
        got = ops.mla_decode(q[own], pages, table[own], lengths[own], w, rope=64)
        same(got, whole[own])
