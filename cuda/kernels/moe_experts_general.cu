/*
 * moe_experts_general.cu -- the products of moe_experts for any dtype, format and size.
 *
 * Computes     out = x w^T, or silu(x w^T) * (x up^T), tile by tile (device/moe.cuh)
 * Shapes       x [., K] rows gathered; w, up [E, N, K]; out [., N]
 * Layout       dense; rows of weights as base/weight.h lays them
 * Precision    x f32 or bf16, weights dequantised to f32, f32 arithmetic; out act, or f32 plain
 * Grid         one block for each tile of 32 rows and each 32 rows of the matrix, a thread for
 *              four elements of the result; 32 columns at a time cross shared memory
 * Order        an element adds its products in the order of the columns
 * Roofline     not meant to reach one: 2 FMA for each word read from shared memory
 * Measured     not timed yet; right on an H100 (tests/ops/test_moe_experts.py, 2026-11-22)
 */
#include "../device/math.cuh"
#include "../device/moe.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int TILE = 32, STEP = 32, THREADS = 256;
constexpr int EACH = TILE * TILE / THREADS; /* elements of a thread, in one column */
constexpr int STRIDE = THREADS / TILE;      /* between them                        */

/* A tile of x or of a matrix, column by column; padding keeps both accesses off one bank. */
using panel = float[STEP][TILE + 1];

__device__ float weight_at(const weight_view &w, kl_weight_format format, int64_t row,
                           int64_t col)
{
    const weight_row at = row_of(w, row);
    switch (format) {
    case KL_W_F32:
        return weight_codec<KL_W_F32>::at(at, col);
    case KL_W_INT8:
        return weight_codec<KL_W_INT8>::at(at, col);
    case KL_W_INT4:
        return weight_codec<KL_W_INT4>::at(at, col);
    case KL_W_FP8:
        return weight_codec<KL_W_FP8>::at(at, col);
    default:
        return weight_codec<KL_W_BF16>::at(at, col);
    }
}

/* Columns [k, k + STEP) of the rows that `at(row, column)` reads, zeros outside. */
template <class F>
__device__ void fill_panel(panel &to, int rows, int64_t k, int64_t cols, F at)
{
    const int column = lane_id();
    for (int row = warp_id(); row < TILE; row += THREADS / WARP)
        to[column][row] = row < rows && k + column < cols ? at(row, k + column) : 0.0f;
}

__device__ void accumulate(const panel &x, const panel &w, float (&sum)[EACH])
{
    for (int k = 0; k < STEP; k++) {
        const float weight = w[k][lane_id()];
#pragma unroll
        for (int i = 0; i < EACH; i++)
            sum[i] = fmaf(x[k][warp_id() + i * STRIDE], weight, sum[i]);
    }
}

template <class act, bool gated>
__global__
__launch_bounds__(THREADS) void moe_general_kernel(__grid_constant__ const moe_product p)
{
    __shared__ panel xs, ws, ups;
    __shared__ int64_t sources[TILE];
    const moe_tile tile = tile_of_block(p);
    const moe_operand &o = operand_of(p, tile);
    const int64_t column = group_of_block(p) * TILE, K = o.w.cols;
    if (tile.n == 0 || column >= o.n) return;
    const int width = o.n - column < TILE ? static_cast<int>(o.n - column) : TILE;
    const int64_t first = first_weight_row(o, tile) + column;
    if (threadIdx.x < tile.n) sources[threadIdx.x] = source_row(o, tile, threadIdx.x);
    __syncthreads();

    const act *x = static_cast<const act *>(o.x);
    float sum[EACH] = {}, up[EACH] = {};
    for (int64_t k = 0; k < K; k += STEP) {
        fill_panel(xs, tile.n, k, K,
                   [&](int r, int64_t c) { return to_float(x[sources[r] * K + c]); });
        fill_panel(ws, width, k, K,
                   [&](int r, int64_t c) { return weight_at(o.w, o.format, first + r, c); });
        if constexpr (gated)
            fill_panel(ups, width, k, K, [&](int r, int64_t c) {
                return weight_at(o.up, o.up_format, first + r, c);
            });
        __syncthreads();
        accumulate(xs, ws, sum);
        if constexpr (gated) accumulate(xs, ups, up);
        __syncthreads();
    }

    if (lane_id() >= width) return;
    for (int i = 0; i < EACH; i++) {
        const int row = warp_id() + i * STRIDE;
        if (row >= tile.n) continue;
        const int64_t at = (tile.first + row) * o.n + column + lane_id();
        if constexpr (gated)
            static_cast<act *>(o.out)[at] = from_float<act>(silu(sum[i]) * up[i]);
        else
            static_cast<float *>(o.out)[at] = sum[i];
    }
}

kl_status run_general(moe_product p, bool gated, kl_dtype dtype, cudaStream_t stream,
                      kl_error *err)
{
    unsigned blocks;
    KL_TRY(moe_grid(p, TILE, &blocks, err));
    return with_float_type(dtype, [&](auto t) {
        using act = decltype(t);
        if (gated)
            moe_general_kernel<act, true><<<blocks, THREADS, 0, stream>>>(p);
        else
            moe_general_kernel<act, false><<<blocks, THREADS, 0, stream>>>(p);
        KL_CUDA_TRY(cudaGetLastError(), err);
        return KL_OK;
    });
}

} // namespace

const moe_path kl_moe_general = {TILE, run_general};
