/*
 * mla_decode_finish_tensor.cu -- mla_decode's last step on tensor cores, for the shapes of
 * mla_decode_tensor.cu.
 *
 * Computes     ctx = the sum of a row's pieces, each times 2^(its max - the largest) / whole sum;
 *              out = W_UV ctx
 * Shapes       context [slots, H, 512] f32; w_kv_b [H, nope+128, 512] bf16; out [N, H, 128] bf16
 * Layout       dense, w_kv_b at a multiple of 16 bytes
 * Precision    ctx as a sum of two bf16 (16 bits), f32 sums, rounded once
 * Grid         a cluster of four blocks for a head, for 1, 2, 4 or 16 rows. A block has a quarter
 *              of the channels: its weights, all 128 outputs of them, are in shared memory before
 *              the pieces are there; it merges the pieces, eight or two warps a row, multiplies,
 *              and sends each block its quarter of the outputs, to be added up
 * Order        pieces in eight interleaved runs, which are added as a tree; channels in order
 *              within a quarter, then the quarters: the same for any N
 * Roofline     half of w_kv_b, 4.2 MB with the model's shapes: 1.4 us at 3.0 TB/s; 66 KB a piece,
 *              out of the L2
 * Measured     H200, traced: 11 to 13 us up to 8K tokens, 39 for 32 rows of 8K, 55 for 64
 *              (2026-11-22); in a step (context 1024) from the end of the kernel before 4.1, 8
 *              rows 9.9 (2026-11-23); the whole operation: mla_decode.cu
 */
#include "mla_decode_finish_tensor.cuh"

namespace {

/* ---- merging the pieces ---------------------------------------------------------------- */

/* The factors of a row's pieces. */
__device__ void weigh_pieces(const mla_arguments &a, const mla_pieces &pieces, long long h,
                             float *factors)
{
    constexpr int EACH = (MOST_PIECES + WARP - 1) / WARP;
    const long long at = pieces.first * a.H + h;
    float max[EACH], sum[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int p = i * WARP + lane_id();
        const bool inside = p < pieces.count;
        max[i] = inside ? a.max[at + p * a.H] : -INFINITY;
        sum[i] = inside ? a.sum[at + p * a.H] : 0.0f;
    }
    weigh(max, sum, pieces.count, factors);
}

/* A lane's four channels of `wide` pieces from p on, and of as many every eight pieces. */
template <int turns, int wide> struct piece_batch {
    float4 x[turns][wide];

    __device__ void load(const float4 *from, long long stride, int p, int count)
    {
#pragma unroll
        for (int t = 0; t < turns; t++)
#pragma unroll
            for (int j = 0; j < wide; j++) {
                const int i = p + t * RUNS + j;
                x[t][j] = i < count ? from[i * stride] : float4{0, 0, 0, 0};
            }
    }

    __device__ void add(const float *factors, int p, int count, float4 *acc) const
    {
#pragma unroll
        for (int t = 0; t < turns; t++)
#pragma unroll
            for (int j = 0; j < wide; j++) {
                const int i = p + t * RUNS + j;
                const float factor = i < count ? factors[i] : 0.0f;
                acc[j].x = fmaf(factor, x[t][j].x, acc[j].x);
                acc[j].y = fmaf(factor, x[t][j].y, acc[j].y);
                acc[j].z = fmaf(factor, x[t][j].z, acc[j].z);
                acc[j].w = fmaf(factor, x[t][j].w, acc[j].w);
            }
    }
};

/* This warp's runs of a row, of its lane's channels; the first pieces are on their way before
 * their factors are known. */
template <int runs>
__device__ float4 merge_runs(const mla_arguments &a, const mla_pieces &pieces, long long h,
                             int first_run, float *factors)
{
    constexpr int WIDE = runs < 4 ? runs : 4,
                  TURNS = runs == 1 ? (MOST_PIECES + RUNS - 1) / RUNS : 8 / runs;
    const int count = static_cast<int>(pieces.count), channel = block_of_cluster() * CHANNELS;
    const float4 *from = reinterpret_cast<const float4 *>(
                             a.context + (pieces.first * a.H + h) * RANK + channel) +
                         lane_id();
    const long long stride = a.H * (RANK / 4);
    float4 acc[runs] = {};
    piece_batch<TURNS, WIDE> x;
    x.load(from, stride, first_run, count);
    weigh_pieces(a, pieces, h, factors);
    for (int p = first_run; p < count; p += TURNS * RUNS)
#pragma unroll
        for (int j = 0; j < runs; j += WIDE) {
            if (p > first_run || j > 0) x.load(from, stride, p + j, count);
            x.add(factors, p + j, count, acc + j);
        }
    return tree_sum(acc);
}

/* Warps with all runs of a row. */
template <int runs>
__device__ void merge_whole_rows(const mla_arguments &a, long long n0, int rows, long long h,
                                 shared_memory<runs> &s)
{
    for (int row = warp_id(); row < rows; row += WARPS) {
        const mla_pieces pieces(a, n0 + row);
        store_merged(s, row, merge_runs<runs>(a, pieces, h, 0, s.factors[warp_id()]));
    }
}

/* Warps that share a row. */
template <int runs>
__device__ void merge_shared_rows(const mla_arguments &a, const mla_pieces &pieces, int rows,
                                  long long h, shared_memory<runs> &s)
{
    constexpr int SHARE = RUNS / runs; /* warps of a row */
    const int row = warp_id() / SHARE, run = warp_id() % SHARE * runs;
    if (row < rows)
        reinterpret_cast<float4 *>(s.parts[warp_id()])[lane_id()] =
            merge_runs<runs>(a, pieces, h, run, s.factors[warp_id()]);
    __syncthreads();
    add_parts<runs>(rows, s);
}

/* ---- out = W_UV ctx -------------------------------------------------------------------- */

/* acc[j][0], acc[j][1]: output 16 warp + lane / 4 of rows 8 j + 2 (lane % 4) and the next one;
 * then output + 8. */
template <int runs, int TILES>
__device__ void multiply(const shared_memory<runs> &s, int rows, float (&acc)[TILES][4])
{
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        uint32_t w[4], x[4];
        load_weights(s, step, w);
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            if (8 * j >= rows) break;
            load_merged(s, step, 8 * j, x);
            mma_bf16(acc[j], w, {x[0], x[1]});
            mma_bf16(acc[j], w, {x[2], x[3]});
        }
    }
}

/* At least two blocks fit a multiprocessor: one each, and an H100 would hold no more than 30
 * clusters of four. */
template <int runs>
__global__ __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(THREADS, runs == RUNS ? 4 : 2) void mla_finish_tensor(
        __grid_constant__ const mla_arguments a)
{
    extern __shared__ __align__(16) char memory[];
    shared_memory<runs> &s = *reinterpret_cast<shared_memory<runs> *>(memory);
    const long long unit = blockIdx.x / CLUSTER, h = unit % a.H, n0 = unit / a.H * ROWS<runs>;
    const int rows = static_cast<int>(a.N - n0 < ROWS<runs> ? a.N - n0 : ROWS<runs>);
    let_next_start();
    begin(a, h, rows, s);
    if constexpr (runs == RUNS) {
        wait_for_inputs();
        merge_whole_rows(a, n0, rows, h, s);
    } else {
        const int row = warp_id() * runs / RUNS;                 /* this warp's */
        const mla_pieces pieces(a, n0 + (row < rows ? row : 0)); /* see mla_piece::early() */
        wait_for_inputs();
        merge_shared_rows(a, pieces, rows, h, s);
    }
    copy_wait<0>();
    __syncthreads();
    float acc[(ROWS<runs> + 7) / 8][4] = {};
    multiply(s, rows, acc);
    cluster_wait(); /* the barriers of all four blocks are there */
    send_out(s, rows, acc);
    barrier_wait_for_cluster(&s.outs, 0);
    add_up(a, n0, rows, h, s);
}

template <int runs> kl_status launch(const mla_arguments &a, cudaStream_t stream, kl_error *err)
{
    const long long blocks = mla_divide_up(a.N, ROWS<runs>) * a.H * CLUSTER;
    constexpr int BYTES = sizeof(shared_memory<runs>);
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_decode: N * H must be <= %lld, got N %lld, H %lld",
                       MAX_BLOCKS / CLUSTER, a.N, a.H);
    const auto kernel = mla_finish_tensor<runs>;
    KL_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES), err);
    return kl_cuda_launch(kernel, static_cast<unsigned>(blocks), THREADS, BYTES, stream, err,
                          a);
}

} // namespace

bool kl_cuda_mla_finish_tensor_fits(const mla_arguments &a, kl_dtype weight)
{
    return a.tensor && a.V == OUTS && weight == KL_BF16 &&
           is_aligned(a.w_kv_b, 0, sizeof(bf16), 16);
}

kl_status kl_cuda_mla_finish_tensor(const mla_arguments &a, cudaStream_t stream, kl_error *err)
{
    if (a.N == 1) return launch<1>(a, stream, err);
    if (a.N == 2) return launch<2>(a, stream, err);
    if (a.N <= 4) return launch<4>(a, stream, err);
    return launch<RUNS>(a, stream, err);
}
