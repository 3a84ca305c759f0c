/*
 * moe_experts_many.cu -- the products of moe_experts for many tokens: a prefill.
 *
 * Computes     out = x w^T, or silu(x w^T) * (x up^T), tile by tile (device/moe.cuh)
 * Shapes       x [., K] rows gathered; w, up [E, N, K]; out [., N]; K and N multiples of 64
 * Layout       dense, 16-byte aligned rows; w and up of one format
 * Precision    x bf16; weights to bf16 unless they are; f32 sums; out bf16 gated, f32 plain
 * Grid         that of linear_tiles.cu, or in the order of moe_experts_few.cu of linear_ordered.cu,
 *              which do the work; float32 weights have no tiles of tensor cores for many rows and
 *              stream by as for few
 * Order        theirs
 * Roofline     2 * rows * N * K flops; 8192 tokens of the model's layer are 1.04e12, 1.3 ms at
 *              800 TFLOP/s, and 3.6 GB of bf16 weights, 1.2 ms at 3.0 TB/s
 * Measured     that of linear_tiles.cu
 */
#include "../device/moe.cuh"

namespace {

kl_weight weight_from(const weight_view &w, kl_weight_format format, int64_t count)
{
    return {
        .format = format,
        .count = count,
        .rows = w.rows,
        .cols = w.cols,
        .data = const_cast<uint8_t *>(w.data),
        .scales = reinterpret_cast<uint16_t *>(const_cast<bf16 *>(w.scales)),
    };
}

kl_cuda_tile_operand operand_from(const moe_operand &o, bool gated)
{
    return {
        .w = weight_from(o.w, o.format, o.count),
        .up = gated ? weight_from(o.up, o.up_format, o.count) : kl_weight{},
        .first = o.first,
        .n = o.n,
        .x = o.x,
        .x_stride = o.w.cols,
        .rows = o.rows,
        .out = o.out,
        .out_stride = o.n,
    };
}

kl_cuda_tile_product tiles_of(const moe_product &p, bool gated, bool narrow, kl_dtype act)
{
    return {
        .routed = operand_from(p.routed, gated),
        .shared = operand_from(p.shared, gated),
        .out_dtype = gated ? act : KL_F32,
        .tiles = p.tiles,
        .surplus = p.surplus,
        .n_tiles = p.n_tiles,
        .T = 0,
        .narrow = narrow,
    };
}

kl_status run_many(moe_product p, bool gated, kl_dtype act, cudaStream_t stream, kl_error *err)
{
    const kl_cuda_tile_product tiles = tiles_of(p, gated, false, act);
    return kl_cuda_tiles_run(&tiles, stream, err);
}

kl_status run_some(moe_product p, bool gated, kl_dtype act, cudaStream_t stream, kl_error *err)
{
    const kl_cuda_tile_product tiles = tiles_of(p, gated, true, act);
    return kl_cuda_tiles_run(&tiles, stream, err);
}

kl_status run_ordered(moe_product p, bool gated, kl_dtype act, cudaStream_t stream,
                      kl_error *err)
{
    const kl_cuda_tile_product tiles = tiles_of(p, gated, false, act);
    return kl_cuda_ordered_run(&tiles, stream, err);
}

} // namespace

const moe_path kl_moe_some = {NARROW_TILE_ROWS, run_some};
const moe_path kl_moe_many = {MOST_TILE_ROWS, run_many};
const moe_path kl_moe_ordered = {ORDERED_TILE_ROWS, run_ordered};
const moe_path kl_moe_ordered_quantised = {ORDERED_QUANTISED_ROWS, run_ordered};
