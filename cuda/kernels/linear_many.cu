/*
 * linear_many.cu -- a matrix product of many tokens on the tensor cores, any format but f32.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T)
 * Shapes       x [T, in]; w, up [O, in]; out [T, O]
 * Layout       rows of x and of out strided; weights in pieces of 16 bytes
 * Precision    bf16 x; weights rounded to bf16; f32 sums; f32 or bf16 out, bf16 with two weights
 * Grid         that of linear_tiles.cu, which does the work
 * Roofline     2 T O in flops at 800 TFLOP/s
 * Measured     that of linear_tiles.cu
 */
#include "../product.h"
#include "../tiles.h"

kl_status kl_cuda_product_many(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
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
        .n_tiles = (p->T + MOST_TILE_ROWS - 1) / MOST_TILE_ROWS,
        .T = p->T,
    };
    return kl_cuda_tiles_run(&tiles, kl_cuda_stream(be), err);
}
