/*
 * kda_prefill.cu -- Kimi Delta Attention over ragged sequences: token after token, for every
 * shape and type, and the choice of the chunked kernel (kda_prefill_chunked.cu), for bf16 with
 * K = 128, with the convolution before it and the gated norm behind it in it where they fit.
 *
 * Computes     for each token: S <- S diag(a);  u = b (v - S k);  S <- S + u k^T;
 *              o = scale S q, with a, b and the normalised q, k of backend/ops.h;
 *              for kda_mixer short_conv before and gated_rms_norm of o, too
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
#include "../device/gated_norm.cuh"
#include "../device/launch.cuh"
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

/* gated_rms_norm of those last tokens, in place and in its order. */
constexpr int NORM_THREADS = 256, NORM_VEC = 8, NORM_LANES = KDA_NORM_V / NORM_VEC;

struct last_arguments {
    bf16 *out;
    const bf16 *z;
    const float *weight;
    const int *cu;
    long long z_stride, N, H;
    float eps;
};

__global__ __launch_bounds__(NORM_THREADS) void kda_last_norm_kernel(
    __grid_constant__ const last_arguments a)
{
    const long long row = static_cast<long long>(blockIdx.x) * (NORM_THREADS / NORM_LANES) +
                          threadIdx.x / NORM_LANES;
    const long long n = row / a.H, h = row % a.H;
    let_next_start();
    wait_for_inputs();
    const bool inside = n < a.N && (a.cu[n + 1] - a.cu[n]) % KDA_GRID == 1;
    const long long t = inside ? a.cu[n + 1] - 1 : 0;
    bf16 *const out = a.out + (t * a.H + h) * KDA_NORM_V;
    gated_row<bf16, NORM_VEC, NORM_LANES, 1>(out, a.z + t * a.z_stride + h * KDA_NORM_V,
                                             a.weight, out, threadIdx.x % NORM_LANES, inside,
                                             KDA_NORM_V, a.eps);
}

} // namespace

/* ---- the choice -------------------------------------------------------------------------- */

static bool is_invariant(kl_backend *be)
{
    return reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
}

/* A property of the backend, of types and widths, which a plan knows before there are tensors. */
static bool shapes_fit(const kl_backend *be, const kl_kda *a)
{
    const int64_t V = a->state.shape[2];
    return kl_cuda_has_sm_90a(be) && a->q.dtype == KL_BF16 && a->state.shape[3] == KDA_K &&
           V % 32 == 0 && V > 0 && V <= KDA_MAX_V;
}

static bool chunked_applies(const kl_backend *be, const kl_kda *a)
{
    const auto pieces = [](const kl_tensor &t, size_t element) {
        return is_aligned(t.data, t.stride[0], element, 16);
    };
    return shapes_fit(be, a) && pieces(a->q, 2) && pieces(a->k, 2) && pieces(a->v, 2) &&
           pieces(a->g, a->g.dtype == KL_BF16 ? 2 : 4) &&
           is_aligned(a->out.data, 0, sizeof(bf16), 16) &&
           is_aligned(a->state.data, 0, sizeof(float), 16) &&
           is_aligned(a->checkpoints.data, 0, sizeof(float), 16) &&
           is_aligned(a->ws.data, 0, 1, 16);
}

/* Where the chunked kernel has the convolution in it: not where there are segments, of which chunks
 * would be convolved twice. */
static bool convolution_applies(kl_backend *be, const kl_short_conv *conv, const kl_kda *a)
{
    const int64_t H = a->state.shape[1];
    return a->q.shape[1] == H && a->state.shape[2] == KDA_K && conv->silu &&
           conv->weight.shape[1] == KDA_TAPS &&
           is_aligned(conv->x.data, conv->x.stride[0], sizeof(bf16), 8) &&
           is_aligned(conv->weight.data, 0, sizeof(float), 16) &&
           is_aligned(conv->state.data, 0, sizeof(bf16), 8) &&
           conv->x.stride[0] <= KDA_MOST_STRIDE && !kda_has_segments(a, is_invariant(be));
}

/* Where it has the norm in it: where gated_rms_norm has the same order. */
static bool norm_applies(const kl_gated_rms_norm *norm)
{
    return norm->x.shape[2] == KDA_NORM_V && is_wide(norm->z, KDA_NORM_V, NORM_VEC) &&
           is_wide(norm->weight, KDA_NORM_V, NORM_VEC);
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

size_t kl_cuda_kda_prefill_workspace(kl_backend *be, const kl_kda_prefill *a)
{
    return shapes_fit(be, a) ? kda_chunked_workspace(a, is_invariant(be)) : 0;
}

/* Whether sequences may have a last token that is left to kda_decode's arithmetic. */
static bool may_leave_tokens(const kl_kda *a)
{
    return a->cu_seqlens.shape[0] != 2 || a->q.shape[0] % KDA_GRID == 1;
}

static kl_status norm_last_tokens(kl_backend *be, const kl_kda *op,
                                  const kl_gated_rms_norm *norm, kl_error *err)
{
    const last_arguments a = {
        .out = static_cast<bf16 *>(op->out.data),
        .z = static_cast<const bf16 *>(norm->z.data),
        .weight = static_cast<const float *>(norm->weight.data),
        .cu = static_cast<const int *>(op->cu_seqlens.data),
        .z_stride = norm->z.stride[0],
        .N = op->cu_seqlens.shape[0] - 1,
        .H = op->state.shape[1],
        .eps = norm->eps,
    };
    const long long blocks = (a.N * a.H * NORM_LANES + NORM_THREADS - 1) / NORM_THREADS;
    return kl_cuda_launch(kda_last_norm_kernel, static_cast<unsigned>(blocks), NORM_THREADS, 0,
                          kl_cuda_stream(be), err, a);
}

/* By chunks, then the last tokens. Whoever prepares chunks reads windows: new ones come after. */
static kl_status run_chunks(kl_backend *be, const kl_short_conv *conv, const kl_kda *a,
                            const kl_gated_rms_norm *norm, kl_error *err)
{
    const kda_arguments args = kda_arguments_of(a);
    const cudaStream_t stream = kl_cuda_stream(be);
    if (a->q.shape[0] > 1)
        KL_TRY(kda_chunked(args, conv, a, norm, is_invariant(be), stream, err));
    if (conv != nullptr) KL_TRY(kl_cuda_short_conv_ends(be, conv, err));
    if (!may_leave_tokens(a)) return KL_OK;
    KL_TRY(run_tokens(args, a, true, stream, err));
    return norm == nullptr ? KL_OK : norm_last_tokens(be, a, norm, err);
}

kl_status kl_cuda_kda_prompt(kl_backend *be, const kl_short_conv *conv, const kl_kda *a,
                             const kl_gated_rms_norm *norm, kl_error *err)
{
    if (a->cu_seqlens.shape[0] == 1 || a->q.shape[0] == 0) return KL_OK;
    const bool chunks = chunked_applies(be, a);
    const bool convolves = chunks && conv != nullptr && convolution_applies(be, conv, a);
    const bool norms = chunks && norm != nullptr && norm_applies(norm);
    if (conv != nullptr && !convolves) KL_TRY(kl_cuda_short_conv(be, conv, err));
    if (chunks)
        KL_TRY(run_chunks(be, convolves ? conv : nullptr, a, norms ? norm : nullptr, err));
    else
        KL_TRY(run_tokens(kda_arguments_of(a), a, false, kl_cuda_stream(be), err));
    return norm == nullptr || norms ? KL_OK : kl_cuda_gated_rms_norm(be, norm, err);
}

kl_status kl_cuda_kda_prefill(kl_backend *be, const kl_kda_prefill *a, kl_error *err)
{
    return kl_cuda_kda_prompt(be, nullptr, a, nullptr, err);
}
