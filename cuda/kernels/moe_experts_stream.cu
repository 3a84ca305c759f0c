/*
 * moe_experts_stream.cu -- the products of moe_experts for few tokens an expert, of matrices so
 * wide that moe_experts_few.cu has no room for x.
 *
 * Computes     out = x w^T, or silu(x w^T) * (x up^T), tile by tile (device/moe.cuh)
 * Shapes       x [., K] rows gathered; w, up [E, N, K]; out [., N]; K and N multiples of 64
 * Layout       dense, 16-byte aligned rows; w and up of one format
 * Precision    x bf16; int4 weights to bf16, the others exact; f32 sums; out bf16 gated, f32
 *              plain
 * Grid         one block for each tile of 8 tokens and 16 rows of the matrix, its warps taking
 *              turns at the columns. Weights go from memory straight into the fragments of the
 *              tensor cores, as A, with the tokens as B: the columns of a product may come in
 *              any order that both share, so a lane reads 16 bytes of a row as they lie
 * Order        an element: a warp's columns in rising order, then the warps in order
 * Roofline     bytes = the weights of the experts chosen, read once for every 8 tokens: 42 us
 *              for a token of the model in bf16 at 3.0 TB/s
 * Measured     H100, in a CUDA graph, the whole operation with 256 experts, 8 chosen and a shared
 *              one: T = 8 bf16 292 us, 2.8 TB/s, int8 203 us, 2.1 TB/s (2026-11-22)
 */
#include "../device/math.cuh"
#include "../device/moe.cuh"
#include "../device/stream.cuh"

namespace {

/* Row i of a block's: of one matrix, or half from each of two. */
template <bool gated> __device__ weight_row tile_row(const moe_operand &o, int64_t first, int i)
{
    constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    return row_of(gated && i >= EACH ? o.up : o.w, first + i % EACH);
}

template <kl_weight_format format, bool gated>
__global__ __launch_bounds__(STREAM_THREADS,
                             2) void moe_stream_kernel(__grid_constant__ const moe_product p)
{
    constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    __shared__ float shared[STREAM_FLOATS<1>];
    wait_for_inputs();
    let_next_start(); /* the next product takes the plan for complete then */
    const moe_tile tile = tile_of_block(p);
    const moe_operand &o = operand_of(p, tile);
    const int64_t column = group_of_block(p) * EACH;
    if (tile.n == 0 || column >= o.n) return;
    const int64_t first = first_weight_row(o, tile) + column;
    const int r = lane_id() / STREAM_LANES; /* of the fragments: a row, or a token */
    const bf16 *x = r < tile.n
                        ? static_cast<const bf16 *>(o.x) + source_row(o, tile, r) * o.w.cols
                        : nullptr;
    float acc[1][4];
    stream_multiply<format, 1>(
        acc, {{tile_row<gated>(o, first, r), tile_row<gated>(o, first, r + 8)},
              {x},
              static_cast<int>(o.w.cols)});
    stream_share<1>(shared, acc);
    __syncthreads();
    const int i = threadIdx.x % EACH, t = threadIdx.x / EACH;
    if (t >= tile.n) return;
    const int64_t at = (tile.first + t) * o.n + column + i;
    const float sum = stream_sum<1>(shared, t, i);
    if constexpr (gated)
        static_cast<bf16 *>(o.out)[at] =
            from_float<bf16>(silu(sum) * stream_sum<1>(shared, t, i + EACH));
    else
        static_cast<float *>(o.out)[at] = sum;
}

} // namespace

kl_status kl_cuda_moe_stream(moe_product p, bool gated, cudaStream_t stream, kl_error *err)
{
    unsigned blocks;
    KL_TRY(moe_grid(p, gated ? STREAM_ROWS / 2 : STREAM_ROWS, &blocks, err));
    return with_format(p.routed.format, [&](auto f) {
        return kl_cuda_launch_with_l1(gated ? moe_stream_kernel<f.value, true>
                                            : moe_stream_kernel<f.value, false>,
                                      blocks, STREAM_THREADS, stream, err, p);
    });
}
