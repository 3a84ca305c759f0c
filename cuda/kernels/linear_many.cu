/*
 * linear_many.cu -- a matrix product of many tokens on the tensor cores, any format but f32.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T)
 * Shapes       x [T, in]; w, up [O, in]; out [T, O]
 * Layout       rows of x and of out strided; weights in pieces of 16 bytes
 * Precision    bf16 x; weights rounded to bf16; f32 sums; f32 or bf16 out, bf16 with two weights
 * Grid         that of linear_tiles.cu, which does the work, or on a batch-invariant backend
 *              that of linear_ordered.cu
 * Roofline     2 T O in flops at 800 TFLOP/s
 * Measured     those of the two
 */
#include "../product.h"
#include "../tiles.h"

kl_status kl_cuda_product_many(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const bool ordered = reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
    const int64_t most = ordered ? ordered_tile_rows(p->w.format) : MOST_TILE_ROWS;
    const kl_cuda_tile_operand all = {
        .w = p->w,
        .up = p->up,
        .first = 0,
        .n = p->w.rows,
        .x = p->x,
        .x_stride = p->x_stride,
        .rows = nullptr,
        .out = p->out,
        .out_stride = p->out_stride,
    };
    const kl_cuda_tile_product tiles = {
        .routed = all,
        .shared = all,
        .out_dtype = p->out_dtype,
        .tiles = nullptr,
        .surplus = nullptr,
        .n_tiles = (p->T + most - 1) / most,
        .T = p->T,
        .narrow = false,
    };
    return ordered ? kl_cuda_ordered_run(&tiles, kl_cuda_stream(be), err)
                   : kl_cuda_tiles_run(&tiles, kl_cuda_stream(be), err);
}
