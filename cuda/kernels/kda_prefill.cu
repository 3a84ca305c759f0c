/*
 * kda_prefill.cu -- Kimi Delta Attention over ragged sequences: token after token, for every
 * shape and type, and the choice of the chunked kernel (kda_prefill_chunked.cu), for bf16 with
 * K = 128, with or without the convolution in it.
 *
 * Computes     for each token: S <- S diag(a);  u = b (v - S k);  S <- S + u k^T;
 *              o = scale S q, with a, b and the normalised q, k of backend/ops.h
 * Shapes       q, k [T, Hk, K]; v, out [T, H, V]; g [T, H, K]; beta [T, H]; state [S, H, V, K]
 * Layout       the state dense with K contiguous; of the others the first axis may be strided
 * Precision    f32 or bf16 in, f32 arithmetic and state, out as q. Within 64 tokens the state
 *              keeps what f32 rounds away of a decay: a small one rounds the same way each time
 * Grid         one block for each sequence, head and tile of state rows. The rows stay in
 *              registers, a warp ROWS of them, from the first token to the last; the block
 *              prepares each token once, in shared memory.
 * Order        kda_decode's for the first of each 64 tokens, so for a single one
 * Roofline     1,282 B a token and head in bf16; bound instead by the chain of T tokens
 * Measured     not timed yet; right on an H100 (2026-11-22)
 */
#include "kda_prefill.cuh"

namespace {

/* A warp's rows of the state, and what their f32 has rounded away since the chunk began. A state
 * that hardly decays loses nearly the same number of ulps at every token, so the same fraction of
 * one is rounded, with the same sign, thousands of times. */
template <int VEC, int CHUNKS, int ROWS> struct carried_rows : kda_rows<VEC, CHUNKS, ROWS> {
    using lane_share = kda_share<VEC, CHUNKS>;
    lane_share lost[ROWS];

    /* -0 is what adds nothing, not even to the sign of a zero. */
    __device__ void forget()
    {
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < CHUNKS; c++)
                for (int j = 0; j < VEC; j++) lost[r].x[c][j] = -0.0f;
    }

    /* kda_share::multiply() of x + lost, whose product is x * decay + rest exactly enough. */
    __device__ static void multiply(float &x, float &lost, float decay, float low)
    {
        const float rest = fmaf(lost, decay, x * low);
        const float product = x * decay, sum = fmaf(x, decay, rest);
        lost = (product - sum) + (fmaf(x, decay, -product) + rest);
        x = sum;
    }

    __device__ void decay(const kda_arguments &a, const kda_head &s)
    {
        lane_share decay, low;
        decay.read(s.decay, a.K), low.read(s.decay_low, a.K);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < CHUNKS; c++)
                for (int j = 0; j < VEC; j++)
                    multiply(this->rows[r].x[c][j], lost[r].x[c][j], decay.x[c][j],
                             low.x[c][j]);
    }
};

template <int VEC, int CHUNKS, int ROWS>
__global__
__launch_bounds__(KDA_THREADS) void kda_prefill_kernel(__grid_constant__ const kda_arguments a,
                                                       bool last_only)
{
    using warp_rows = carried_rows<VEC, CHUNKS, ROWS>;
    __shared__ __align__(16) kda_head s;
    const auto [n, h, first, state] = kda_place_of<ROWS, KDA_WARPS>(a);
    const int end = a.cu[n + 1], begin = last_only ? end - 1 : a.cu[n];
    if (begin >= end || (last_only && (end - a.cu[n]) % KDA_GRID != 1)) return;

    warp_rows rows;
    rows.read(a, state, first);
    for (long long t = begin; t < end; t++) {
        float v[ROWS];
        warp_rows::read_v(a, t, h, first, v);
        kda_prepare(a, t, h, s);
        if ((t - begin) % KDA_GRID == 0) rows.forget();
        rows.decay(a, s);
        rows.write_and_answer(a, t, h, first, s, v);
        float *kept = kda_checkpoint(a, n, h, static_cast<int>(t + 1 - a.cu[n]));
        if (kept != nullptr) rows.write(a, kept, first);
        __syncthreads(); /* the next token overwrites s */
    }
    rows.write(a, state, first);
}

} // namespace

/* ---- the choice -------------------------------------------------------------------------- */

/* A property of types and widths, which a plan knows before there are tensors. */
static bool shapes_fit(const kl_kda *a)
{
    const int64_t V = a->state.shape[2];
    return a->q.dtype == KL_BF16 && a->state.shape[3] == KDA_K && V % 32 == 0 && V > 0 &&
           V <= KDA_MAX_V;
}

static bool chunked_applies(const kl_kda *a)
{
    const auto pieces = [](const kl_tensor &t, size_t element) {
        return is_aligned(t.data, t.stride[0], element, 16);
    };
    return shapes_fit(a) && pieces(a->q, 2) && pieces(a->k, 2) && pieces(a->v, 2) &&
           pieces(a->g, a->g.dtype == KL_BF16 ? 2 : 4) &&
           is_aligned(a->out.data, 0, sizeof(bf16), 16) &&
           is_aligned(a->state.data, 0, sizeof(float), 16) &&
           is_aligned(a->checkpoints.data, 0, sizeof(float), 16) &&
           is_aligned(a->ws.data, 0, 1, 16);
}

/* Token after token: all of a sequence, or the one that kda_chunked() leaves. */
static kl_status run_tokens(kda_arguments args, const kl_kda *a, bool last_only,
                            cudaStream_t stream, kl_error *err)
{
    return kda_with_lanes(args, [&](auto lanes) {
        using L = decltype(lanes);
        unsigned blocks;
        KL_TRY(kda_grid("kda_prefill", args, a->cu_seqlens.shape[0] - 1, KDA_WARPS * L::ROWS,
                        &blocks, err));
        kda_prefill_kernel<L::VEC, L::CHUNKS, L::ROWS>
            <<<blocks, KDA_THREADS, 0, stream>>>(args, last_only);
        KL_CUDA_TRY(cudaGetLastError(), err);
        return KL_OK;
    });
}

/* ---- the operation ----------------------------------------------------------------------- */

static bool is_invariant(kl_backend *be)
{
    return reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
}

size_t kl_cuda_kda_prefill_workspace(kl_backend *be, const kl_kda_prefill *a)
{
    return shapes_fit(a) ? kda_chunked_workspace(a, is_invariant(be)) : 0;
}

kl_status kl_cuda_kda_prefill(kl_backend *be, const kl_kda_prefill *a, kl_error *err)
{
    const kda_arguments args = kda_arguments_of(a);
    const long long N = a->cu_seqlens.shape[0] - 1, T = a->q.shape[0];
    if (N == 0 || T == 0) return KL_OK;
    const cudaStream_t stream = kl_cuda_stream(be);
    if (!chunked_applies(a)) return run_tokens(args, a, false, stream, err);
    if (T > 1) KL_TRY(kda_chunked(args, a, nullptr, is_invariant(be), stream, err));
    if (N == 1 && T % KDA_GRID != 1) return KL_OK;
    return run_tokens(args, a, true, stream, err);
}

/* ---- with the convolution before --------------------------------------------------------- */

/* Where there are segments, chunks would be convolved twice. */
bool kl_cuda_kda_convolves(kl_backend *be, const kl_short_conv *conv, const kl_kda *a)
{
    const int64_t H = a->state.shape[1];
    return chunked_applies(a) && a->q.shape[1] == H && a->state.shape[2] == KDA_K &&
           conv->silu && conv->weight.shape[1] == KDA_TAPS &&
           is_aligned(conv->x.data, conv->x.stride[0], sizeof(bf16), 8) &&
           is_aligned(conv->weight.data, 0, sizeof(float), 16) &&
           is_aligned(conv->state.data, 0, sizeof(bf16), 8) &&
           conv->x.stride[0] <= KDA_MOST_STRIDE && !kda_has_segments(a, is_invariant(be));
}

kl_status kl_cuda_kda_prefill_convolved(kl_backend *be, const kl_short_conv *conv,
                                        const kl_kda *a, kl_error *err)
{
    const kda_arguments args = kda_arguments_of(a);
    const long long N = a->cu_seqlens.shape[0] - 1, T = a->q.shape[0];
    const kda_convolution rows = {.x = kda_operand_of(conv->x),
                                  .taps = static_cast<const float *>(conv->weight.data),
                                  .windows = static_cast<const bf16 *>(conv->state.data)};
    const cudaStream_t stream = kl_cuda_stream(be);
    if (N == 0 || T == 0) return KL_OK;
    if (T > 1) KL_TRY(kda_chunked(args, a, &rows, is_invariant(be), stream, err));
    KL_TRY(kl_cuda_short_conv_ends(be, conv, err));
    if (N == 1 && T % KDA_GRID != 1) return KL_OK;
    return run_tokens(args, a, true, stream, err);
}
