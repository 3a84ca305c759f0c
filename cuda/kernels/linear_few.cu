/*
 * linear_few.cu -- a matrix product of a few tokens: the weight streams by once.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T), where
 *              linear_step.cu has no room for x
 * Shapes       x [T, in]; w, up [O, in]; out [T, O]
 * Layout       rows of x and of out strided; weights in pieces of 16 bytes
 * Precision    bf16 x; int4 weights rounded to bf16, the others exact; f32 sums; f32 or bf16 out
 * Grid         a block for each 16 rows of weights and each 16 tokens, tokens fastest; warps
 *              share out the columns. A tile with a second weight holds 8 rows of each
 * Roofline     the bytes of the weight: [2304, 4096] in bf16 is 19 MB, 6.3 us at 3.0 TB/s
 * Measured     H100, in a CUDA graph, weight not in the L2, T = 1: [12288, 2304] bf16 20.9 us, 2.7
 *              TB/s, int8 15.1, fp8 15.0; [2304, 4096] bf16 8.7, int8 7.2; [163840, 2304] bf16 295,
 *              int8 157, 2.5 TB/s; [288, 2304] 2.9; [4096, 128] 2.0 (2026-11-22)
 */
#include "../device/math.cuh"
#include "../device/product.cuh"
#include "../device/stream.cuh"

namespace {

/* Row i of a tile. Rows past the end repeat the last one, which is read anyway. */
template <bool gated>
__device__ weight_row tile_row(const product_arguments &a, int64_t tile, int i)
{
    constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    const int64_t row = tile * EACH + i % EACH;
    return row_of(gated && i >= EACH ? a.up : a.w, row < a.w.rows ? row : a.w.rows - 1);
}

template <int N, bool gated>
__device__ void store_tile(const product_arguments &a, const float *shared, int64_t t,
                           int64_t tile)
{
    constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    for (int i = threadIdx.x; i < N * STREAM_TOKENS * EACH; i += STREAM_THREADS) {
        const int token = i / EACH, row = i % EACH;
        const int64_t o = tile * EACH + row, at = (t + token) * a.out_stride + o;
        if (t + token >= a.T || o >= a.w.rows) continue;
        float y = stream_sum<N>(shared, token, row);
        if constexpr (gated) y = silu(y) * stream_sum<N>(shared, token, row + EACH);
        if (a.out_is_bf16)
            static_cast<bf16 *>(a.out)[at] = from_float<bf16>(y);
        else
            static_cast<float *>(a.out)[at] = y;
    }
}

template <kl_weight_format format, int N, bool gated>
__device__ void product_tile(const product_arguments &a, unsigned block)
{
    __shared__ float shared[STREAM_FLOATS<N>];
    const unsigned t_tiles = static_cast<unsigned>(a.t_tiles); /* the grid bounds it */
    const int64_t t = int64_t{block % t_tiles} * N * STREAM_TOKENS, tile = block / t_tiles;
    const int r = lane_id() / 4;
    let_next_start();
    if (threadIdx.x < STREAM_ROWS)
        stream_prefetch(tile_row<gated>(a, tile, threadIdx.x), a.w.row_bytes, a.ahead);
    wait_for_inputs();
    stream_place<format, N> at = {
        {tile_row<gated>(a, tile, r), tile_row<gated>(a, tile, r + 8)},
        {},
        static_cast<int>(a.w.cols)};
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int64_t token = t + n * STREAM_TOKENS + r;
        at.x[n] = token < a.T ? static_cast<const bf16 *>(a.x) + token * a.x_stride : nullptr;
    }
    float acc[N][4];
    stream_multiply(acc, at);
    stream_share<N>(shared, acc);
    __syncthreads();
    store_tile<N, gated>(a, shared, t, tile);
}

template <kl_weight_format format, int N, bool gated>
__global__
__launch_bounds__(STREAM_THREADS,
                  2) void product_few_kernel(const __grid_constant__ product_arguments a)
{
    product_tile<format, N, gated>(a, blockIdx.x);
}

/* ---- host ------------------------------------------------------------------------------ */

/* Blocks of a product, N fragments of tokens each. */
template <int N, bool gated>
kl_status few_grid(product_arguments *a, unsigned *blocks, kl_error *err)
{
    constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    a->t_tiles = (a->T + N * STREAM_TOKENS - 1) / (N * STREAM_TOKENS);
    return product_grid(*a, (a->w.rows + EACH - 1) / EACH, blocks, err);
}

template <kl_weight_format format, int N, bool gated>
kl_status launch(kl_backend *be, product_arguments a, kl_error *err)
{
    unsigned blocks;
    KL_TRY((few_grid<N, gated>(&a, &blocks, err)));
    a.ahead = stream_ahead(blocks);
    return kl_cuda_launch_with_l1(product_few_kernel<format, N, gated>, blocks, STREAM_THREADS,
                                  kl_cuda_stream(be), err, a);
}

} // namespace

kl_status kl_cuda_product_few(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const product_arguments a = product_arguments_of(p);
    return with_format(p->w.format, [&](auto f) {
        const bool few = a.T <= STREAM_TOKENS;
        if (is_gated(p))
            return few ? launch<f.value, 1, true>(be, a, err)
                       : launch<f.value, 2, true>(be, a, err);
        return few ? launch<f.value, 1, false>(be, a, err)
                   : launch<f.value, 2, false>(be, a, err);
    });
}
