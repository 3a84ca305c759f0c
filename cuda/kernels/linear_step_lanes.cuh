/*
 * linear_step_lanes.cuh -- linear_step.cu's tiles of halves: their weights come by rings of each
 * lane's own (device/ring.cuh), where each block has one tile all of it before x is there.
 */
#ifndef KL_CUDA_KERNELS_LINEAR_STEP_LANES_H
#define KL_CUDA_KERNELS_LINEAR_STEP_LANES_H

#include "linear_step_rows.cuh"
#include "linear_step_tiles.cuh"

namespace {

/* Row i of a tile. Rows past the end repeat the last one, which is read anyway. */
__device__ inline weight_row half_row(const step_product &p, unsigned tile, int i)
{
    constexpr unsigned EACH = EACH_OF<tile_of::HALVES>;
    const unsigned last = static_cast<unsigned>(p.w.rows) - 1;
    const unsigned row = min(tile * EACH + i % EACH, last);
    const bool second = i >= EACH;
    return row_of(p.w, 2 * int64_t{row} + second);
}

/* Which halves of their words the scales of this lane's rows lie in. */
template <kl_weight_format format>
__device__ void odd_scales(bool (&odd)[2], const step_product &p, unsigned tile)
{
    const int r = lane_id() / STREAM_LANES;
    odd[0] = ring_feed<format>::odd(half_row(p, tile, r));
    odd[1] = ring_feed<format>::odd(half_row(p, tile, r + 8));
}

/* What the ring is to hold next: this warp's steps of the block's tiles. */
template <kl_weight_format format> struct tile_walk {
    const step_arguments &a;
    unsigned tile;
    int steps = 0; /* of the tile, still to be asked for */
    ring_feed<format> feed;

    __device__ explicit tile_walk(const step_arguments &args) : a(args), tile(blockIdx.x)
    {
        enter();
    }

    /* The next tile, if it has a step for this warp. */
    __device__ void enter()
    {
        const step_product &p = a.first;
        const int row_bytes = static_cast<int>(p.w.row_bytes), r = lane_id() / STREAM_LANES;
        steps = tile < a.tiles ? ring_steps(row_bytes) : 0;
        if (steps > 0) feed.start(half_row(p, tile, r), half_row(p, tile, r + 8), row_bytes);
    }

    template <class Ring> __device__ void put(Ring &ring)
    {
        if (steps == 0) return ring.put_none();
        ring.put(feed);
        feed.advance();
        if (--steps > 0) return;
        tile += gridDim.x;
        enter();
    }
};

/* This warp's steps of a tile whose steps a ring holds. */
template <kl_weight_format format, int DEPTH, class Ring>
__device__ void fill_ring(Ring &ring, const step_product &p, unsigned tile, int steps)
{
    const int r = lane_id() / STREAM_LANES;
    ring_feed<format> feed;
    feed.start(half_row(p, tile, r), half_row(p, tile, r + 8), static_cast<int>(p.w.row_bytes));
#pragma unroll
    for (int d = 0; d < DEPTH; d++, feed.advance())
        if (d < steps)
            ring.put(feed);
        else
            ring.put_none();
}

/* What a tile's sums are added to; for a router's work there is routed.load_weight(), too. */
__device__ inline void load_tile(const step_product &p, const router_work &router,
                                 unsigned tile, tile_output<1, tile_of::HALVES> &output,
                                 routed_rows &routed)
{
    if (router.sums != nullptr)
        routed.load_residual(p, tile);
    else
        output.load(p, tile, 1);
}

__device__ inline void store_tile(const step_product &p, const router_work &router,
                                  unsigned tile, const tile_output<1, tile_of::HALVES> &output,
                                  const routed_rows &routed, const router_share &share,
                                  const float *sums)
{
    if (router.sums != nullptr)
        routed.store(p, router, share, tile, sums);
    else
        output.store(p, tile, 1, sums);
}

template <kl_weight_format format, x_as numbers>
__device__ void multiply_halves(const step_arguments &a, unsigned tile,
                                const step_rows<format, numbers> &x, float *sums,
                                typename step_rows<format, numbers>::ring_type &ring,
                                tile_walk<format> &walk, const router_share &share)
{
    constexpr tile_of kind = tile_of::HALVES;
    bool odd[2];
    odd_scales<format>(odd, a.first, tile);
    tile_output<1, kind> output;
    routed_rows routed;
    routed.load_weight(a.router, tile);
    load_tile(a.first, a.router, tile, output, routed);
    step_sums<format, 1, format, numbers> own(x, a.x.T);
    for (int s = ring_steps(static_cast<int>(a.first.w.row_bytes)); s > 0; s--) {
        own.add(ring.template take<format>(odd));
        walk.put(ring);
    }
    own.template share<kind>(sums);
    __syncthreads();
    store_tile(a.first, a.router, tile, output, routed, share, sums);
}

template <kl_weight_format format, x_as numbers>
__global__ __launch_bounds__(STREAM_THREADS, 2 * RING_BLOCKS) void product_halves_kernel(
    const __grid_constant__ step_arguments a)
{
    using rows_type = step_rows<format, numbers>;
    using ring_type = typename rows_type::ring_type;
    extern __shared__ __align__(128) unsigned char shared[];
    const rows_type x(shared + ring_type::BYTES, a.x.cols);
    float *const sums =
        reinterpret_cast<float *>(x.plain.data + rows_type::bytes_of(a.x.T, a.x.cols));
    ring_type ring(shared);
    if (a.unsettled) wait_for_inputs();
    tile_walk<format> walk(a);
#pragma unroll 1
    for (int d = 0; d < STEPS_AHEAD<numbers>; d++) walk.put(ring);
    router_share share; /* of the tile that comes first, then of the next one */
    share.load(a.router, blockIdx.x * SHARE_ROWS);
    wait_for_inputs();
    let_next_start(); /* not before: rings of two kernels ahead would stand in the way of this one,
                         and the next ones may rely on it (arriving.cuh) */
    copy_halves<STREAM_THREADS, false>(x.plain, a.x);
    __syncthreads();
    float *own = sums; /* this tile's: those of the one before are being read */
    for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        own = own == sums ? sums + tile_sums<1, tile_of::HALVES>::FLOATS : sums;
        multiply_halves<format, numbers>(a, tile, x, own, ring, walk, share);
        if (const unsigned next = tile + gridDim.x; next < a.tiles)
            share.load(a.router, next * SHARE_ROWS);
    }
}

/* Tiles of halves, one a block, whose weights are all in the rings before x is there: no more is
 * asked for, and nothing but products stands between x and the sums. */
template <kl_weight_format format, x_as numbers, bool arriving>
__global__ __launch_bounds__(STREAM_THREADS, 2 * RING_BLOCKS) void product_held_kernel(
    const __grid_constant__ step_arguments a)
{
    constexpr tile_of kind = tile_of::HALVES;
    using rows_type = step_rows<format, numbers>;
    using ring_type = typename rows_type::ring_type;
    extern __shared__ __align__(128) unsigned char shared[];
    const rows_type x(shared + ring_type::BYTES, a.x.cols);
    float *const sums =
        reinterpret_cast<float *>(x.plain.data + rows_type::bytes_of(a.x.T, a.x.cols));
    const unsigned tile = blockIdx.x;
    const int steps = ring_steps(static_cast<int>(a.first.w.row_bytes));
    bool odd[2];
    odd_scales<format>(odd, a.first, tile);
    ring_type ring(shared);
    if (a.unsettled) wait_for_inputs();
    fill_ring<format, STEPS_AHEAD<numbers>>(ring, a.first, tile, steps);
    router_share share;
    share.load(a.router, tile * SHARE_ROWS);
    routed_rows routed;
    routed.load_weight(a.router, tile);
    step_sums<format, 1, format, numbers> own(x, a.x.T);
    tile_output<1, kind> output;
    if constexpr (arriving) {
        load_tile(a.first, a.router, tile, output, routed);
        await_some<STREAM_THREADS>(a.x);
    } else {
        wait_for_inputs();
    }
    let_next_start(); /* not before: rings of two kernels ahead would stand in the way of this one */
    if constexpr (!arriving) load_tile(a.first, a.router, tile, output, routed);
    copy_halves<STREAM_THREADS, arriving>(x.plain, a.x);
    copy_wait<0>();
    __syncthreads();
    add_held<HELD_AT_ONCE<format>, format>(own, ring, odd, steps);
    own.template share<kind>(sums);
    __syncthreads();
    store_tile(a.first, a.router, tile, output, routed, share, sums);
    if constexpr (arriving) wait_for_inputs();
}

} // namespace

#endif
