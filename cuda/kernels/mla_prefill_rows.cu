/*
 * mla_prefill_rows.cu -- mla_prefill for any dimensions and dtypes, row by row.
 *
 * Computes     q' = scale [W_UK^T q_nope | q_pe];  x = softmax(q' [c | k_pe]^T) c;  o = W_UV x
 * Shapes       q [T, H, nope+rope], pages [P, 64, rank+rope], w_kv_b [H, nope+V, rank],
 *              out [T, H, V]
 * Layout       rows of q may be strided, everything else dense
 * Precision    f32, bf16 or 8 bits in (the weights' dtype apart), f32 arithmetic, rounded once
 * Grid         a block for each row and head. Its warps take groups of KEYS positions in turn,
 *              each with a running maximum, sum and x of its own in shared memory; the four are
 *              merged in order. So a row's bits follow from its position alone
 * Roofline     2 (2 rank + rope) flops a row, head and position, for latents that all heads of
 *              a row read through the L2: not for speed. Absorbed, for that is less to keep
 * Measured     not timed yet; right on an H100 (2026-11-22)
 */
#include "../device/latents.cuh"
#include "../device/launch.cuh"
#include "../device/warp.cuh"
#include "mla_prefill.cuh"

#include <math.h>

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int KEYS = 4; /* positions of a warp at a time: independent sums hide the latency */
constexpr long long MAX_SHARED = 227 * 1024;

/* A block's shared memory. x has a row of `rank` for each warp; query is [rank+rope]. */
struct scratch {
    float *query, *x, *q;
    float *max, *sum; /* [WARPS] */
};

__host__ __device__ long long scratch_floats(const mla_call &a)
{
    const long long width = a.rank + a.rope;
    /* Each part a multiple of 4, for the vectors. */
    return (width + 3) / 4 * 4 + (a.rank + 3LL) / 4 * 4 * WARPS + a.nope + 2 * WARPS;
}

__device__ scratch take_scratch(const mla_call &a, float *shared)
{
    scratch s;
    s.query = shared;
    s.x = s.query + (a.rank + a.rope + 3) / 4 * 4;
    s.max = s.x + (a.rank + 3) / 4 * 4 * WARPS;
    s.sum = s.max + WARPS;
    s.q = s.sum + WARPS;
    return s;
}

/* query <- q', by the whole block. */
template <class T, class W>
__device__ void absorb(const mla_call &a, const T *q, const W *w_uk, const scratch &s)
{
    for (int i = threadIdx.x; i < a.nope; i += THREADS) s.q[i] = a.scale * to_float(q[i]);
    __syncthreads();
    for (int r = threadIdx.x; r < a.rank; r += THREADS) {
        float sum = 0;
        for (int i = 0; i < a.nope; i++)
            sum = fmaf(s.q[i], to_float(w_uk[static_cast<long long>(i) * a.rank + r]), sum);
        s.query[r] = sum;
    }
    for (int i = threadIdx.x; i < a.rope; i += THREADS)
        s.query[a.rank + i] = a.scale * to_float(q[a.nope + i]);
    __syncthreads();
}

/* Scores of up to KEYS neighbours of one page, -infinity past `count`. */
template <int VEC, class Rows>
__device__ void score(const mla_call &a, const Rows &latents, int count, const float *query,
                      float (&scores)[KEYS])
{
    const int width = a.rank + a.rope;
#pragma unroll
    for (int k = 0; k < KEYS; k++) scores[k] = 0;
    for (int i = lane_id() * VEC; i < width; i += WARP * VEC) {
        float q[VEC], c[VEC];
        load_floats(query + i, q);
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            if (k >= count) break; /* rows past a length may hold anything */
            latents.load(k, i, c);
#pragma unroll
            for (int j = 0; j < VEC; j++) scores[k] = fmaf(q[j], c[j], scores[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < KEYS; k++) scores[k] = k < count ? warp_sum(scores[k]) : -INFINITY;
}

/* x <- keep x + sum_k p[k] c_k, a lane its own channels. */
template <int VEC, class Rows>
__device__ void gather(const mla_call &a, const Rows &latents, int count, float keep,
                       const float (&p)[KEYS], float *x)
{
    for (int i = lane_id() * VEC; i < a.rank; i += WARP * VEC) {
        float sum[VEC], c[VEC];
        load_floats(x + i, sum);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum[j] *= keep;
#pragma unroll
        for (int k = 0; k < KEYS; k++) {
            if (k >= count) break;
            latents.load(k, i, c);
#pragma unroll
            for (int j = 0; j < VEC; j++) sum[j] = fmaf(p[k], c[j], sum[j]);
        }
        store_floats(x + i, sum);
    }
}

/* A warp's share of the positions 0 .. length - 1. */
template <class Rows, int VEC>
__device__ void attend(const mla_call &a, const int *table, int length, const scratch &s)
{
    const int warp = warp_id();
    float *x = s.x + warp * ((a.rank + 3) / 4 * 4);
    float max = -INFINITY, sum = 0;
    for (int i = lane_id(); i < a.rank; i += WARP) x[i] = 0;
    __syncwarp();
    for (long long at = warp * KEYS; at < length; at += WARPS * KEYS) {
        const int count = static_cast<int>(min(length - at, static_cast<long long>(KEYS)));
        const long long row =
            static_cast<long long>(table[at / KL_PAGE_TOKENS]) * KL_PAGE_TOKENS +
            at % KL_PAGE_TOKENS;
        const Rows latents(a.pages, a.row, row);
        float p[KEYS], best = max;
        score<VEC>(a, latents, count, s.query, p);
#pragma unroll
        for (int k = 0; k < KEYS; k++) best = fmaxf(best, p[k]);
        const float keep = expf(max - best); /* 0 at first: -infinity less a number */
        sum *= keep;
#pragma unroll
        for (int k = 0; k < KEYS; k++) p[k] = expf(p[k] - best), sum += p[k];
        gather<VEC>(a, latents, count, keep, p, x);
        max = best;
    }
    if (lane_id() == 0) s.max[warp] = max, s.sum[warp] = sum;
    __syncthreads();
}

/* The warps' results, in order, become row 0 of x. */
__device__ void merge(const mla_call &a, const scratch &s)
{
    const int stride = (a.rank + 3) / 4 * 4;
    float best = s.max[0], total = 0, share[WARPS]; /* warp 0 has position 0 */
#pragma unroll
    for (int w = 1; w < WARPS; w++) best = fmaxf(best, s.max[w]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        share[w] = expf(s.max[w] - best);
        total = fmaf(share[w], s.sum[w], total);
    }
    for (int i = threadIdx.x; i < a.rank; i += THREADS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum = fmaf(share[w], s.x[w * stride + i], sum);
        s.x[i] = sum / total;
    }
    __syncthreads();
}

template <class T, class W>
__device__ void finish(const mla_call &a, const float *x, const W *w_uv, T *out)
{
    for (int v = warp_id(); v < a.V; v += WARPS) {
        const W *row = w_uv + static_cast<long long>(v) * a.rank;
        float sum = 0;
        for (int i = lane_id(); i < a.rank; i += WARP) sum = fmaf(to_float(row[i]), x[i], sum);
        sum = warp_sum(sum);
        if (lane_id() == 0) out[v] = from_float<T>(sum);
    }
}

template <class T, class W, class Rows, int VEC>
__global__ __launch_bounds__(THREADS) void rows_kernel(__grid_constant__ const mla_call a)
{
    extern __shared__ __align__(16) float shared[];
    const int token = blockIdx.x / a.H, h = blockIdx.x % a.H;
    const int n = mla_find_sequence(a.cu_seqlens, static_cast<int>(a.N), token);
    const mla_sequence sequence = mla_cut_sequence(a, n);
    const int position = token - sequence.token_shift;
    if (position < sequence.begin || position >= sequence.end) return; /* mla_decode's */
    const scratch s = take_scratch(a, shared);
    const T *q = static_cast<const T *>(a.q) + token * a.q_stride +
                 static_cast<long long>(h) * (a.nope + a.rope);
    const W *w =
        static_cast<const W *>(a.w_kv_b) + static_cast<long long>(h) * (a.nope + a.V) * a.rank;
    T *out = static_cast<T *>(a.out) + (static_cast<long long>(token) * a.H + h) * a.V;

    absorb(a, q, w, s);
    attend<Rows, VEC>(a, a.block_table + n * a.B, position + 1, s);
    merge(a, s);
    finish(a, s.x, w + static_cast<long long>(a.nope) * a.rank, out);
}

template <class T, class W, class Rows, int VEC>
kl_status launch(const mla_call &a, cudaStream_t stream, kl_error *err)
{
    const long long bytes = scratch_floats(a) * 4;
    const auto kernel = rows_kernel<T, W, Rows, VEC>;
    KL_TRY(kl_cuda_allow_shared(kernel, MAX_SHARED, err));
    const unsigned blocks = static_cast<unsigned>(a.T * a.H);
    kernel<<<blocks, THREADS, static_cast<size_t>(bytes), stream>>>(a);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

template <class T, class W>
kl_status launch_vector(const mla_call &a, cudaStream_t stream, kl_error *err)
{
    const bool vector = a.rank % 4 == 0 && a.rope % 4 == 0 &&
                        reinterpret_cast<uintptr_t>(a.pages) % (4 * sizeof(T)) == 0;
    if (a.packed) return launch<T, W, packed_rows, 1>(a, stream, err);
    if (vector) return launch<T, W, act_rows<T>, 4>(a, stream, err);
    return launch<T, W, act_rows<T>, 1>(a, stream, err);
}

} // namespace

kl_status mla_prefill_rows(const kl_mla_prefill *a, const mla_call &call, cudaStream_t stream,
                           kl_error *err)
{
    if (call.T > MAX_BLOCKS / call.H)
        return kl_fail(err, KL_ERR_VALUE, "mla_prefill: T * H must be <= %lld, got T %lld",
                       MAX_BLOCKS, call.T);
    if (scratch_floats(call) * 4 > MAX_SHARED)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_prefill: 5 rank + rope + nope must be about <= %lld, got rank %d",
                       MAX_SHARED / 4, call.rank);
    return with_float_type(a->q.dtype, [&](auto t) {
        return with_float_type(a->w_kv_b.dtype, [&](auto w) {
            return launch_vector<decltype(t), decltype(w)>(call, stream, err);
        });
    });
}
