/*
 * mla_decode_finish_page.cu -- mla_decode's last step for a single token whose pages' results are
 * arriving (device/arriving.cuh).
 *
 * Computes     ctx = the sum of the pages' results, each times 2^(its max - the largest) / whole
 *              sum; out = W_UV ctx
 * Shapes       context [pages, H, 512] f32; max, sum [H, 64] f32; w_kv_b [H, nope+128, 512] bf16;
 *              out [H, 128] bf16
 * Layout       dense, w_kv_b at a multiple of 16 bytes
 * Precision    that of mla_decode_finish_tensor.cu, with its bits
 * Grid         as there, of one row: a warp merges every eighth page of the block's channels, whose
 *              factors are known before the last of their results are there
 * Order        that of mla_decode_finish_tensor.cu
 * Roofline     half of w_kv_b, 4.2 MB with the model's shapes: 1.4 us at 3.0 TB/s
 * Measured     H200, in a step (bf16, context 1024), from the end of the kernel before: 2.9 us
 *              (2026-11-23)
 */
#include "mla_decode_finish_tensor.cuh"

namespace {

static_assert((MLA_PAGES / RUNS + 1) * RUNS <= MOST_PIECES);

/* A lane looks until a word is there. */
template <class T> __device__ void await_by_one(const T *word)
{
    if (lane_id() == 0) await(word);
    __syncwarp();
}

/* Until q is there, whose weights are not to share the memory with those of this kernel and of the
 * next one: there is time enough for them afterwards. */
__device__ void await_q(const mla_arguments &a, long long h)
{
    await_by_one(static_cast<const bf16 *>(a.q) + (h + 1) * (a.nope + a.rope) - 1);
}

/* The factors of a head's pages. Before they can be known the query is there: until then a word of
 * that is looked at. */
__device__ void await_factors(const mla_arguments &a, int count, long long h, float *factors)
{
    constexpr int EACH = MLA_PAGES / WARP;
    const uint32_t *const maxima = reinterpret_cast<const uint32_t *>(a.max) + h * MLA_PAGES;
    const uint32_t *const sums = reinterpret_cast<const uint32_t *>(a.sum) + h * MLA_PAGES;
    float max[EACH], sum[EACH];
    bool all;
    await_by_one(reinterpret_cast<const uint4 *>(a.query) + mla_query_place(a, 0, h, 0) / 8);
    do {
        all = true;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int p = i * WARP + lane_id();
            const bool inside = p < count;
            const uint32_t x = inside ? load_here(maxima + p) : __float_as_uint(-INFINITY);
            const uint32_t y = inside ? load_here(sums + p) : 0;
            all = all && x != BLANK_FLOAT && y != BLANK_FLOAT;
            max[i] = __uint_as_float(x), sum[i] = __uint_as_float(y);
        }
    } while (!__all_sync(ALL_LANES, all));
    weigh(max, sum, count, factors);
}

/* The warp's run of pages, of its lane's channels. One turn is spare, for a sum has the sign that it
 * has in mla_decode_finish_tensor.cu, where turns are more than pages. */
__device__ float4 merge_arriving(const mla_arguments &a, int count, long long h, int run,
                                 float *factors)
{
    constexpr int TURNS = MLA_PAGES / RUNS + 1;
    const int channel = block_of_cluster() * CHANNELS;
    const uint4 *from =
        reinterpret_cast<const uint4 *>(a.context + (run * a.H + h) * RANK + channel) +
        lane_id();
    uint4 x[TURNS];
    float4 acc = {};
    await_factors(a, count, h, factors);
    await_all<floats>(from, RUNS * static_cast<int>(a.H) * (RANK / 4),
                      (count - run + RUNS - 1) / RUNS, x);
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const int p = run + t * RUNS;
        const float any = factors[p], factor = p < count ? any : 0.0f;
        acc.x = fmaf(factor, __uint_as_float(x[t].x), acc.x);
        acc.y = fmaf(factor, __uint_as_float(x[t].y), acc.y);
        acc.z = fmaf(factor, __uint_as_float(x[t].z), acc.z);
        acc.w = fmaf(factor, __uint_as_float(x[t].w), acc.w);
    }
    return acc;
}

/* Three would fit a multiprocessor: one, a block of the pages and one of the next kernel do. */
__global__ __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(THREADS, 3) void mla_finish_page(__grid_constant__ const mla_arguments a)
{
    extern __shared__ __align__(16) char memory[];
    shared_memory<1> &s = *reinterpret_cast<shared_memory<1> *>(memory);
    const long long h = blockIdx.x / CLUSTER;
    const int pages = static_cast<int>(mla_pages_of(__ldcg(a.lengths)));
    bf16 *to =
        static_cast<bf16 *>(a.out) + h * OUTS + block_of_cluster() * OUT_QUARTER + threadIdx.x;
    asm volatile("" : "+l"(to)); /* known before the pages' results are there */
    await_q(a, h);
    begin(a, h, 1, s);
    let_next_start();
    reinterpret_cast<float4 *>(s.parts[warp_id()])[lane_id()] =
        merge_arriving(a, pages, h, warp_id(), s.factors[warp_id()]);
    copy_wait<0>();
    __syncthreads();
    uint32_t w[STEPS][4], x[4];
#pragma unroll
    for (int step = 0; step < STEPS; step++) load_weights(s, step, w[step]);
    add_parts<1>(1, s);
    __syncthreads();
    float acc[1][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        load_merged(s, step, 0, x);
        mma_bf16(acc[0], w[step], {x[0], x[1]});
        mma_bf16(acc[0], w[step], {x[2], x[3]});
    }
    cluster_wait();
    send_out(s, 1, acc);
    barrier_wait_for_cluster(&s.outs, 0);
    if (threadIdx.x < OUT_QUARTER) store_arriving(to, total_of(s, 0, threadIdx.x));
    wait_for_inputs();
}

} // namespace

kl_status kl_cuda_mla_finish_page(const mla_arguments &a, cudaStream_t stream, kl_error *err)
{
    constexpr int BYTES = sizeof(shared_memory<1>);
    KL_TRY(kl_cuda_allow_shared(mla_finish_page, BYTES, err));
    return kl_cuda_launch(mla_finish_page, static_cast<unsigned>(a.H * CLUSTER), THREADS, BYTES,
                          stream, err, a);
}
