/*
 * linear_tiles.cu -- products of many rows with weights: linear, mlp and the experts.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T), tile by tile
 * Shapes       x [., K], rows gathered or not; w, up [E, N, K]; out [., N]; K a multiple of 8
 * Layout       rows of x and out strided; weights in pieces of 16 bytes, both of one format
 * Precision    x bf16; weights rounded to bf16; f32 sums; f32 or bf16 out
 * Grid         a block a multiprocessor, which takes every 132nd item: 128 rows of a weight (64
 *              of each in the gated product) by a tile of up to 320 rows of x, or of 64 where all
 *              are narrow. One warpgroup fills a ring of four steps, of as many as fit beside
 *              narrow tiles; two multiply (device/tiles.cuh)
 * Order        one chain over the columns, 16 at a time, the same for every tile and T
 * Roofline     2 * rows * N * K flops at 800 TFLOP/s, or the weights at 3.0 TB/s: with 256 rows
 *              an expert both take about the same time
 * Measured     H100, 8192 tokens, 8 of 256 experts: gate and up 1.81 ms, down 0.87 ms in bf16;
 *              [12288, 2304] int8 0.82 ms, 567 TFLOP/s (cuBLAS in bf16 756). H200: the layer of
 *              experts 2.55 ms, 409 TFLOP/s; by narrow tiles 64 tokens 755 us (4.2 TB/s), 128 865,
 *              256 897, 1024 995 (2026-11-22)
 */
#include "../device/tile_launch.cuh"
#include "../device/tile_results.cuh"
#include "../device/tiles.cuh"

namespace {

/* Of an item, to the end. */
template <class S, bool gated, class Out> struct item_product {
    template <int N>
    static __device__ __forceinline__ void run(const tile_operand &o, const tile_item &item,
                                               const tile_ring<S> &ring, ring_place<S> &at)
    {
        float acc[N / 2];
        multiply_item<S, gated, N>(acc, o, item, ring, at);
        store_item<N, gated, Out>(acc, o, item);
    }
};

template <class S, bool gated, class Out>
__global__ __launch_bounds__(TILE_THREADS,
                             1) void tiles_kernel(__grid_constant__ const tile_arguments p)
{
    if constexpr (!SM_90A) return stop_here();
    extern __shared__ __align__(1024) uint8_t shared[];
    const tile_ring<S> ring = ring_in<S>(shared);
    open_ring(ring);
    wait_for_inputs();
    let_next_start();
    if (threadIdx.x < WARPGROUP) {
        registers_down_to<FILL_REGISTERS>();
        fill_ring<S, gated>(p, ring);
    } else {
        registers_up_to<MULTIPLY_REGISTERS>();
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
    return launch_tiles<S>(tiles_kernel<S, gated, Out>, TILE_WIDTH<gated>, p, stream, err);
}

template <class S>
kl_status launch_for(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    if (p->routed.up.data != nullptr) return launch<S, true, bf16>(p, stream, err);
    return p->out_dtype == KL_BF16 ? launch<S, false, bf16>(p, stream, err)
                                   : launch<S, false, float>(p, stream, err);
}

template <int ROWS>
kl_status run_tiles(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    switch (p->routed.w.format) {
    case KL_W_INT8:
        return launch_for<tile_shape<KL_W_INT8, ROWS>>(p, stream, err);
    case KL_W_INT4:
        return launch_for<tile_shape<KL_W_INT4, ROWS>>(p, stream, err);
    case KL_W_FP8:
        return launch_for<tile_shape<KL_W_FP8, ROWS>>(p, stream, err);
    default:
        return launch_for<tile_shape<KL_W_BF16, ROWS>>(p, stream, err);
    }
}

} // namespace

kl_status kl_cuda_tiles_run(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    return p->narrow ? run_tiles<NARROW_TILE_ROWS>(p, stream, err)
                     : run_tiles<MOST_TILE_ROWS>(p, stream, err);
}
