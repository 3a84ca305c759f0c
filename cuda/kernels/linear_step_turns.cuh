/*
 * linear_step_turns.cuh -- linear_step.cu's tiles of rows and of pairs of rows: their weights come by
 * the copy engine (device/turn_ring.cuh), for which a ninth warp asks.
 */
#ifndef KL_CUDA_KERNELS_LINEAR_STEP_TURNS_H
#define KL_CUDA_KERNELS_LINEAR_STEP_TURNS_H

#include "../device/turn_ring.cuh"
#include "linear_step_rows.cuh"
#include "linear_step_tiles.cuh"

namespace {

/* Behind the warps that bring x and multiply, one brings the weights. */
constexpr int STEP_THREADS = STREAM_THREADS + WARP;

/* Registers, as threads of which a multiprocessor would hold four blocks: two of these leave room for
 * the 16 warps of kda_mixer_step.cu, whose part of a quarter of the registers is four warps beside six.
 * What does not fit is read from local memory a few times a tile. */
constexpr int BOUND = STEP_THREADS + WARP;
template <int N> constexpr int FITTING = N > 1 ? 3 : 4;

/* What a block's weights come by: boxes of the first product's weight, and of its second one or of
 * the second product's; and the room that scales need. */
struct step_turns {
    box_map maps[2];
    int room_bytes, rooms;
};

/* x and what is made of it, in whole units of the copy engine. */
inline __host__ __device__ int whole_units(int bytes)
{
    return (bytes + 15) / 16 * 16;
}

/* What the warp that brings asks for: the block's tiles, turn by turn. */
template <tile_of kind> struct turn_walk {
    const step_arguments &a;
    const step_turns &turns;
    unsigned tile;
    turn_rows rows[2] = {}; /* of the next turn, */
    int left = 0;           /* and how many the tile has from there on */
    turn_feed<RING_DEPTH> feed;

    __device__ turn_walk(const step_arguments &args, const step_turns &of,
                         const turn_ring<RING_DEPTH> &ring)
        : a(args), turns(of), tile(blockIdx.x), feed(ring)
    {
    }

    /* Rows past the last have no scales: nobody looks at what they make. */
    __device__ void start()
    {
        unsigned own = tile;
        const step_product &p = product_of(a, own);
        const int64_t row = int64_t{own} * EACH_OF<kind>;
        const int first = static_cast<int>(row), groups = static_cast<int>(p.w.groups);
        const int scales = p.w.scales == nullptr ? 0 : turn_scale_bytes(groups);
        const box_map *const map =
            turns.maps + (kind == tile_of::ROWS && tile >= a.first_tiles);
        rows[0] = {map, 0, first, p.w.scales + row * groups, scales};
        if constexpr (kind == tile_of::ROWS) {
            const bool inside = row + TURN_ROWS < p.w.rows;
            rows[1] = {map, 0, first + TURN_ROWS, rows[0].scales + TURN_ROWS * groups,
                       inside ? scales : 0};
        } else {
            rows[1] = {map + 1, 0, first, p.up.scales + row * groups, scales};
        }
        left = turns_of(static_cast<int>(p.w.row_bytes));
        tile += gridDim.x;
    }

    __device__ void put()
    {
        if (left == 0) start();
        feed.put(rows);
#pragma unroll
        for (int i = 0; i < 2; i++) rows[i].column += RING_TURN, rows[i].scale_bytes = 0;
        left--;
    }

    /* As much as the ring holds before the wait: no more is free until x is there. */
    __device__ void put_all()
    {
#pragma unroll 1
        for (int n = 0; left > 0 || tile < a.tiles; n++) {
            if (n == RING_DEPTH) {
                wait_for_inputs();
                let_next_start();
            }
            put();
        }
        wait_for_inputs();
    }
};

template <kl_weight_format format, int N, tile_of kind, bool logits, kl_weight_format scales,
          x_as numbers>
__device__ void multiply_tile(const step_product &p, unsigned tile, int T,
                              const step_rows<scales, numbers> &x, float *sums,
                              turn_reader<RING_DEPTH> &ring)
{
    tile_output<N, kind> output;
    output.load(p, tile, T);
    step_sums<format, N, scales, numbers> own(x, T);
    ring.start<format>(static_cast<int>(p.w.row_bytes), static_cast<int>(p.w.groups));
#pragma unroll 1
    for (int s = ring.steps; s > 0; s--) own.add(ring.take<format>());
    ring.end();
    own.template share<kind>(sums);
    rows_barrier<STREAM_THREADS>();
    if (logits && p.peaks != nullptr)
        output.store_logits(p, tile, T, sums);
    else
        output.store(p, tile, T, sums);
}

template <kl_weight_format first, kl_weight_format second, int N, tile_of kind, x_as numbers>
__global__ __launch_bounds__(BOUND, FITTING<N>) void product_step_kernel(
    const __grid_constant__ step_arguments a, const __grid_constant__ step_turns turns)
{
    using rows_type = step_rows<SCALES<first, second>, numbers>;
    using ring_type = turn_ring<RING_DEPTH>;
    constexpr bool logits = kind == tile_of::ROWS && first == second; /* may have peaks */
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ ring_type::barriers bars;
    const rows_type x(shared + ring_type::BYTES, a.x.cols);
    float *const sums = reinterpret_cast<float *>(
        x.plain.data + whole_units(rows_type::bytes_of(a.x.T, a.x.cols)));
    const ring_type ring = {
        shared, reinterpret_cast<unsigned char *>(sums + 2 * tile_sums<N, kind>::FLOATS), bars,
        turns.room_bytes, turns.rooms};
    if (threadIdx.x == STREAM_THREADS) {
        ring.init();
        barrier_init_done();
    }
    if (a.unsettled) wait_for_inputs();
    __syncthreads();
    if (warp_id() == STREAM_WARPS) {
        turn_walk<kind>(a, turns, ring).put_all();
        return;
    }
    const held_norm<STREAM_THREADS> norm(a.x);
    wait_for_inputs();
    let_next_start(); /* not before: rings of two kernels ahead would stand in the way of this one,
                         and the next ones may rely on it (arriving.cuh) */
    bring_rows<STREAM_THREADS>(x.plain, a.x, norm, sums);
    rows_barrier<STREAM_THREADS>();
    x.finish();
    turn_reader<RING_DEPTH> reader(ring);
    float *own = sums; /* this tile's: those of the one before are being read */
    for (unsigned t = blockIdx.x; t < a.tiles; t += gridDim.x) {
        own = own == sums ? sums + tile_sums<N, kind>::FLOATS : sums;
        unsigned tile = t;
        const step_product &p = product_of(a, tile);
        if (first == second || t < a.first_tiles) /* one piece of code where one will do */
            multiply_tile<first, N, kind, logits>(p, tile, a.x.T, x, own, reader);
        else
            multiply_tile<second, N, kind, logits>(p, tile, a.x.T, x, own, reader);
    }
}

} // namespace

#endif
