/*
 * tiles.h -- products of many rows with weights, tile by tile: what linear, mlp and the experts
 * ask of kernels/linear_tiles.cu and kernels/linear_ordered.cu.
 */
#ifndef KL_CUDA_TILES_H
#define KL_CUDA_TILES_H

#include "cuda_backend.h"

/* Rows [first, first + n) of the product, all of one matrix of the stack, `expert`; of the
 * other operand where that is MOE_SHARED. n = 0: surplus, where the host knows only a bound. */
struct moe_tile {
    int expert, first, n;
};

constexpr int MOE_SHARED = -1;
constexpr int MOST_TILE_ROWS = 320;  /* n of a tile */
constexpr int NARROW_TILE_ROWS = 64; /* n where all are narrow */

/* n of a tile of kl_cuda_ordered_run(): as many as there are registers for. There are two sums an
 * output, three where a scale meets a sum. */
constexpr int ORDERED_TILE_ROWS = 160, ORDERED_QUANTISED_ROWS = 96;

constexpr int ordered_tile_rows(kl_weight_format format)
{
    return format == KL_W_BF16 ? ORDERED_TILE_ROWS : ORDERED_QUANTISED_ROWS;
}

/* out = x w^T, or with a second weight silu(x w^T) * (x up^T), for rows [first, first + n) of
 * the matrices: column i of out is row first + i. */
struct kl_cuda_tile_operand {
    kl_weight w, up; /* a stack each, of one format, not f32; up.data NULL: none     */
    int64_t first, n;
    const void *x; /* [., w.cols] bf16, rows of 16-byte multiples                */
    int64_t x_stride;
    const int *rows; /* on the device: row of x for each row of out; NULL: the same */
    void *out;       /* [., n] */
    int64_t out_stride;
};

struct kl_cuda_tile_product {
    kl_cuda_tile_operand routed, shared; /* shared: of tiles of MOE_SHARED; else routed again */
    kl_dtype out_dtype;                  /* bf16 with a second weight                        */
    const moe_tile *tiles;               /* on the device; NULL: rows [0, T) of matrix 0     */
    const int *surplus; /* on the device: how many of the last tiles are; NULL: none */
    int64_t n_tiles, T;
    bool narrow; /* no tile is wider than NARROW_TILE_ROWS */
};

/* On the current device, for sm_90a alone. Bits of the second do not depend on the tile: they are those of
 * kl_cuda_product_few(). Its tiles have ordered_tile_rows() at most. */
kl_status kl_cuda_tiles_run(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err);
kl_status kl_cuda_ordered_run(const kl_cuda_tile_product *p, cudaStream_t stream,
                              kl_error *err);

#endif
