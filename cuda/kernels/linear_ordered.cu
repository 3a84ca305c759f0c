/*
 * linear_ordered.cu -- products of many rows with weights, each output summed in the order of the
 * kernels for few rows: what a batch-invariant backend multiplies many rows by.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T), tile by tile
 * Shapes       x [., K], rows gathered or not; w, up [E, N, K]; out [., N]; K a multiple of 8
 * Layout       rows of x and out strided; weights in pieces of 16 bytes, both of one format
 * Precision    x bf16; int4 weights to bf16, the others exact; f32 sums; f32 or bf16 out, bf16 with
 *              two weights
 * Grid         a block a multiprocessor, which takes every 132nd item: 128 rows of a weight (64 of
 *              each in the gated product) by a tile of up to 160 rows of x, 96 if w is quantised.
 *              One warpgroup fills a ring of steps, two multiply (linear_ordered.cuh)
 * Order        that of stream.cuh: the columns that a warp has there, in rising order, one warp
 *              after the other, and the same 16 columns in the same places of a product; then the
 *              sums of these warps in their order
 * Roofline     2 * rows * N * K flops at 800 TFLOP/s
 * Measured     H100, [8192, 2304] x [12288]: bf16, int8, int4, fp8 1656, 1692, 1647, 1677 us, 280
 *              TFLOP/s; experts of 256 rows 188, 218, 223, 219 TFLOP/s (2026-11-23, bf16 before its
 *              weights waited for the products before them)
 */
#include "../device/tile_launch.cuh"
#include "../device/tile_results.cuh"
#include "linear_ordered.cuh"

namespace {

/* Of an item, to the end. */
template <class S, bool gated, class Out> struct item_product {
    template <int N>
    static __device__ __forceinline__ void run(const tile_operand &o, const tile_item &item,
                                               const tile_ring<S> &ring, ring_place<S> &at)
    {
        ordered_sums<S, N> sums;
        multiply_ordered<S, gated, N>(sums, o, item, ring, at);
        store_item<N, gated, Out>(sums.total, o, item);
    }
};

template <class S, bool gated, class Out>
__global__ __launch_bounds__(TILE_THREADS,
                             1) void ordered_kernel(__grid_constant__ const tile_arguments p)
{
    if constexpr (!SM_90A) return stop_here();
    extern __shared__ __align__(1024) uint8_t shared[];
    const tile_ring<S> ring = ring_in<S>(shared);
    open_ring(ring);
    wait_for_inputs();
    let_next_start();
    if (threadIdx.x < WARPGROUP) {
        registers_down_to<ORDERED_FILL_REGISTERS>();
        fill_ordered<S, gated>(p, ring,
                               reinterpret_cast<const bf16 **>(ring.empty + S::STAGES));
    } else {
        registers_up_to<ORDERED_MULTIPLY_REGISTERS>();
        ring_place<S> at;
        const int n_tiles = tiles_of(p);
        for (int i = blockIdx.x; i < n_tiles * p.groups; i += gridDim.x) {
            const tile_item item = item_at<gated>(p, n_tiles, i);
            const tile_operand &o = operand_of(p, item.tile);
            if (has_work(o, item))
                multiply_rows<item_product<S, gated, Out>>(o, item, ring, at);
        }
    }
}

/* ---- host ------------------------------------------------------------------------------ */

template <class S, bool gated, class Out>
kl_status launch(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    return launch_tiles<S>(ordered_kernel<S, gated, Out>, TILE_WIDTH<gated>, p, stream, err);
}

template <kl_weight_format format>
kl_status launch_for(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    using S = ordered_shape<format>;
    if (p->routed.up.data != nullptr) return launch<S, true, bf16>(p, stream, err);
    return p->out_dtype == KL_BF16 ? launch<S, false, bf16>(p, stream, err)
                                   : launch<S, false, float>(p, stream, err);
}

} // namespace

kl_status kl_cuda_ordered_run(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    switch (p->routed.w.format) {
    case KL_W_INT8:
        return launch_for<KL_W_INT8>(p, stream, err);
    case KL_W_INT4:
        return launch_for<KL_W_INT4>(p, stream, err);
    case KL_W_FP8:
        return launch_for<KL_W_FP8>(p, stream, err);
    default:
        return launch_for<KL_W_BF16>(p, stream, err);
    }
}
