/*
 * mla_decode_any.cu -- mla_decode's attention of a split, for any shapes and both dtypes.
 *
 * Computes     max, sum and context of the scores of one head over one split's pages; see
 *              mla_arguments
 * Shapes       query [N, H, width]; pages [P, 64, width]; context [slots, H, rank]
 * Layout       dense
 * Precision    f32, bf16 or 8-bit latents, f32 arithmetic and results
 * Grid         a block for each row, head and split; the query and the context's sum are in
 *              shared memory. A page's 64 scores are made by eight warps, eight each, and its
 *              context by a thread a channel. Latents are read once a head, from the L2
 * Roofline     as mla_decode_tensor.cu; this path reads H times as much, and is for models that
 *              are not the published one
 * Measured     not timed yet; right on an H100 (2026-11-22)
 */
#include "../device/latents.cuh"
#include "../device/launch.cuh"
#include "../device/mla.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr long long MAX_SHARED = 200 * 1024; /* of a block; sm_90 has 227 KiB */

struct page_scores {
    float score[KL_PAGE_TOKENS], weight[KL_PAGE_TOKENS];
};

/* Scores of the page's first `count` tokens; the others' are not there. */
template <class Rows>
__device__ void score_page(const Rows &page, const float *query, long long width, int count,
                           page_scores &s)
{
    for (int j = warp_id(); j < count; j += WARPS) {
        float sum = 0;
        for (long long i = lane_id(); i < width; i += WARP)
            sum = fmaf(query[i], page.at(j, i), sum);
        sum = warp_sum(sum);
        if (lane_id() == 0) s.score[j] = sum;
    }
}

/* One page: every thread goes through the 64 scores itself, so that all know max and sum. */
template <class Rows>
__device__ void attend_page(const Rows &page, const float *query, long long width,
                            long long rank, int count, page_scores &s, float *context,
                            float &max, float &sum)
{
    score_page(page, query, width, count, s);
    __syncthreads();
    const float before = max;
    for (int j = 0; j < count; j++) max = fmaxf(max, s.score[j]);
    const float keep = exp2f(before - max);
    if (threadIdx.x < count) s.weight[threadIdx.x] = exp2f(s.score[threadIdx.x] - max);
    __syncthreads();
    sum *= keep;
    for (int j = 0; j < count; j++) sum += s.weight[j];
    for (long long c = threadIdx.x; c < rank; c += THREADS) {
        float acc = context[c] * keep;
        for (int j = 0; j < count; j++) acc = fmaf(s.weight[j], page.at(j, c), acc);
        context[c] = acc;
    }
}

template <class Rows>
__global__
__launch_bounds__(THREADS) void mla_attend_any(__grid_constant__ const mla_arguments a)
{
    extern __shared__ float memory[];
    __shared__ page_scores s;
    const long long split = blockIdx.x % a.splits, unit = blockIdx.x / a.splits;
    const long long h = unit % a.H, n = unit / a.H, width = a.width();
    let_next_start();
    wait_for_inputs();
    const mla_cut cut(a.lengths[n]);
    if (split >= cut.count) return;
    float *query = memory, *context = memory + width;
    for (long long i = threadIdx.x; i < width; i += THREADS)
        query[i] = a.query[(n * a.H + h) * width + i];
    for (long long i = threadIdx.x; i < a.rank; i += THREADS) context[i] = 0;
    __syncthreads();

    const long long first = split * cut.size;
    const long long end = first + cut.size < cut.pages ? first + cut.size : cut.pages;
    float max = -INFINITY, sum = 0;
    for (long long p = first; p < end; p++) {
        const long long left = cut.length - p * KL_PAGE_TOKENS, id = a.block_table[n * a.B + p];
        const Rows page(a.pages, a.row, id * KL_PAGE_TOKENS);
        attend_page(page, query, width, a.rank,
                    static_cast<int>(left < KL_PAGE_TOKENS ? left : KL_PAGE_TOKENS), s, context,
                    max, sum);
    }
    const long long at = (n * a.splits + split) * a.H + h;
    if (threadIdx.x == 0) a.max[at] = max, a.sum[at] = sum;
    for (long long c = threadIdx.x; c < a.rank; c += THREADS)
        a.context[at * a.rank + c] = context[c];
}

} // namespace

kl_status kl_cuda_mla_attend_any(const mla_arguments &a, int, cudaStream_t stream,
                                 kl_error *err)
{
    if (a.splits == 0) return KL_OK;
    if (a.N > MAX_BLOCKS / a.H || a.N * a.H > MAX_BLOCKS / a.splits)
        return kl_fail(
            err, KL_ERR_VALUE,
            "mla_decode: N * H * splits must be <= %lld, got N %lld, H %lld, splits %lld",
            MAX_BLOCKS, a.N, a.H, a.splits);
    const long long bytes = (a.width() + a.rank) * static_cast<long long>(sizeof(float));
    if (bytes > MAX_SHARED)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_decode: 2 rank + rope must be <= %lld, got rank %lld, rope %lld",
                       MAX_SHARED / static_cast<long long>(sizeof(float)), a.rank, a.rope);
    return with_rows(a.packed, a.act, [&](auto *rows) {
        const auto kernel = mla_attend_any<std::remove_pointer_t<decltype(rows)>>;
        KL_TRY(kl_cuda_allow_shared(kernel, MAX_SHARED, err));
        return kl_cuda_launch(kernel, static_cast<unsigned>(a.N * a.H * a.splits), THREADS,
                              static_cast<size_t>(bytes), stream, err, a);
    });
}
