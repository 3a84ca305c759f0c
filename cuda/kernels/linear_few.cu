/*
 * linear_few.cu -- a matrix product of a few tokens: the weight streams by once.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T)
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

template <int N, bool gated, class Out>
__device__ void store_tile(const product_arguments &a, const float *shared, int64_t t,
                           int64_t tile)
{
    constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    for (int at = threadIdx.x; at < N * STREAM_TOKENS * EACH; at += STREAM_THREADS) {
        const int token = at / EACH, row = at % EACH;
        const int64_t o = tile * EACH + row;
        if (t + token >= a.T || o >= a.w.rows) continue;
        float y = stream_sum<N>(shared, token, row);
        if constexpr (gated) y = silu(y) * stream_sum<N>(shared, token, row + EACH);
        static_cast<Out *>(a.out)[(t + token) * a.out_stride + o] = from_float<Out>(y);
    }
}

template <kl_weight_format format, int N, bool gated, class Out>
__global__
__launch_bounds__(STREAM_THREADS,
                  2) void product_few_kernel(const __grid_constant__ product_arguments a)
{
    __shared__ float shared[STREAM_FLOATS<N>];
    const int64_t t = blockIdx.x % a.t_tiles * N * STREAM_TOKENS, tile = blockIdx.x / a.t_tiles;
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
    store_tile<N, gated, Out>(a, shared, t, tile);
}

template <kl_weight_format format, int N, bool gated, class Out>
kl_status launch(kl_backend *be, product_arguments a, kl_error *err)
{
    constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    const int64_t tiles = (a.w.rows + EACH - 1) / EACH;
    a.t_tiles = (a.T + N * STREAM_TOKENS - 1) / (N * STREAM_TOKENS);
    unsigned blocks;
    KL_TRY(product_grid(a, tiles, &blocks, err));
    a.ahead = stream_ahead(blocks);
    return kl_cuda_launch(product_few_kernel<format, N, gated, Out>, blocks, STREAM_THREADS, 0,
                          kl_cuda_stream(be), err, a);
}

template <kl_weight_format format, bool gated, class Out>
kl_status launch_for(kl_backend *be, const product_arguments &a, kl_error *err)
{
    if (a.T <= STREAM_TOKENS) return launch<format, 1, gated, Out>(be, a, err);
    return launch<format, 2, gated, Out>(be, a, err);
}

} // namespace

kl_status kl_cuda_product_few(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const product_arguments a = product_arguments_of(p);
    return with_format(p->w.format, [&](auto f) {
        return with_output(p, [&](auto gated, auto out) {
            return launch_for<f.value, gated.value, decltype(out)>(be, a, err);
        });
    });
}
