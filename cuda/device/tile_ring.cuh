/*
 * tile_ring.cuh -- what the kernels of tiles share (kernels/linear_tiles.cu, linear_ordered.cu):
 * operands, the items of work that they are cut into, the ring of steps in shared memory and the
 * weights that come to it.
 *
 * An item is TILE_ROWS rows of weights by a tile of rows of x. One warpgroup fills the ring, two
 * multiply, 64 of the rows of weights each. A kernel's shape S says how its ring lies: FORMAT,
 * STAGES of STAGE_BYTES, in each X_BYTES of x and behind them W_BYTES of weights, in rows of
 * W_ROW_BYTES, W_SWIZZLED or as they are.
 */
#ifndef KL_CUDA_DEVICE_TILE_RING_H
#define KL_CUDA_DEVICE_TILE_RING_H

#include "../tiles.h"
#include "barrier.cuh"
#include "types.cuh"
#include "warp.cuh"
#include "wgmma.cuh"

constexpr int TILE_ROWS = 128; /* of weights */
constexpr int MULTIPLIERS = 2; /* warpgroups, behind the one that fills */
constexpr int TILE_THREADS = (1 + MULTIPLIERS) * WARPGROUP;
constexpr int BAND = 12; /* tiles whose blocks run together, times 11 groups: 132 */

/* Shared memory of a block, where its ring may begin, and a slot's two barriers. */
constexpr int MOST_SHARED = 227 << 10, ALIGNED = 1024, SLOT_BARRIERS = 2 * 8;

/* An operand as the kernel takes it. */
struct tile_operand {
    box_map maps[2]; /* the weight; the second one, or the weight again */
    const bf16 *scales[2];
    int64_t matrix_rows, first, n, K, groups;
    const bf16 *x;
    int64_t x_stride;
    const int *rows;
    void *out;
    int64_t out_stride;
    bool pairs; /* neighbours of out can be stored together */
};

struct tile_arguments {
    tile_operand routed, shared;
    const moe_tile *tiles;
    const int *surplus;  /* how many of the last tiles are; null: none */
    int n_tiles, groups; /* blocks of TILE_ROWS for a tile      */
    int tile, T;         /* without `tiles`: rows of each, of all */
};

/* One item of work of a block. */
struct tile_item {
    moe_tile tile;
    int64_t column; /* of out */
};

/* What a block's threads share. */
template <class S> struct tile_ring {
    uint8_t *stages;
    barrier *full, *empty;

    __device__ uint8_t *x(int slot) const { return stages + slot * S::STAGE_BYTES; }
    __device__ uint8_t *w(int slot) const { return x(slot) + S::X_BYTES; }
};

template <class A> __device__ const auto &operand_of(const A &p, const moe_tile &tile)
{
    return tile.expert == MOE_SHARED ? p.shared : p.routed;
}

/* Columns of out in an item. */
template <bool gated> constexpr int TILE_WIDTH = gated ? TILE_ROWS / 2 : TILE_ROWS;

/* Tiles of a band come first: blocks that run together share rows of x, and of weights where
 * their tiles are of one matrix. */
template <bool gated, class A> __device__ tile_item item_at(const A &p, int n_tiles, int i)
{
    const int band = i / (BAND * p.groups), rest = i % (BAND * p.groups);
    const int width = min(BAND, n_tiles - band * BAND);
    const int at = band * BAND + rest % width;
    const int first = at * p.tile;
    return {p.tiles != nullptr ? p.tiles[at] : moe_tile{0, first, min(p.tile, p.T - first)},
            static_cast<int64_t>(rest / width) * TILE_WIDTH<gated>};
}

/* product::run<N>(), with as many columns N of wgmma as the tile has rows, in steps of 32. */
template <class product, class S, int N = 32>
__device__ __forceinline__ void multiply_rows(const tile_operand &o, const tile_item &item,
                                              const tile_ring<S> &ring, ring_place<S> &at)
{
    if constexpr (N == S::MOST_ROWS)
        product::template run<N>(o, item, ring, at);
    else if (item.tile.n <= N)
        product::template run<N>(o, item, ring, at);
    else
        multiply_rows<product, S, N + 32>(o, item, ring, at);
}

/* After the wait: the plan's tiles without the surplus. */
template <class A> __device__ int tiles_of(const A &p)
{
    return p.n_tiles - (p.surplus == nullptr ? 0 : *p.surplus);
}

/* Columns that one of the operands does not have are no work. */
template <class O> __device__ bool has_work(const O &o, const tile_item &item)
{
    return item.column < o.n;
}

/* Rows of weights of an item: two boxes of 64, of both weights in a gated product. */
template <class S, bool gated>
__device__ void copy_weights(uint8_t *to, const tile_operand &o, int row, int step, barrier *b)
{
    constexpr int BYTES = S::W_ROW_BYTES;
    copies_begin(b, S::W_BYTES);
    copy_box<WARP_ARRIVALS>(to, &o.maps[0], step * BYTES, row, b);
    copy_box<WARP_ARRIVALS>(to + S::W_BYTES / 2, &o.maps[1], step * BYTES,
                            gated ? row : row + TILE_ROWS / 2, b);
    copies_end(b);
}

__device__ inline int first_weight_row(const tile_operand &o, const tile_item &item)
{
    const int64_t matrix = item.tile.expert == MOE_SHARED ? 0 : item.tile.expert;
    return static_cast<int>(matrix * o.matrix_rows + o.first + item.column);
}

/* Where a warp's rows of weights lie in the ring, and where in out. */
template <bool gated> struct tile_rows {
    int bases[2];   /* in the ring, of eight rows each                      */
    int columns[2]; /* of out, from the item's; one and the same when gated */

    __device__ tile_rows()
    {
        const int warp = warp_id() - WARPGROUP / WARP; /* 0 .. 7 */
#pragma unroll
        for (int h = 0; h < 2; h++) {
            bases[h] = gated ? h * TILE_ROWS / 2 + warp * 8 : warp * 16 + h * 8;
            columns[h] = gated ? warp * 8 : warp * 16 + h * 8;
        }
    }
};

template <class S> __device__ tile_ring<S> ring_in(uint8_t *shared)
{
    tile_ring<S> ring;
    ring.stages = shared + -shared_address(shared) % ALIGNED;
    ring.full = reinterpret_cast<barrier *>(ring.x(S::STAGES));
    ring.empty = ring.full + S::STAGES;
    return ring;
}

/* A phase of `full` ends with every filling thread's pieces and the bytes of the weights, one of
 * `empty` with every multiplying warp. */
template <class S> __device__ void open_ring(const tile_ring<S> &ring)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init(ring.full + i, WARPGROUP + WARP_ARRIVALS);
            barrier_init(ring.empty + i, MULTIPLIERS * WARPGROUP / WARP * WARP_ARRIVALS);
        }
        barrier_init_done();
    }
    __syncthreads();
}

#endif
