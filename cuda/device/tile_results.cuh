/*
 * tile_results.cuh -- the sums of an item (tile_ring.cuh), as wgmma leaves them, to rows of out.
 */
#ifndef KL_CUDA_DEVICE_TILE_RESULTS_H
#define KL_CUDA_DEVICE_TILE_RESULTS_H

#include "math.cuh"
#include "tile_ring.cuh"

/* Lane 4 r + c has two neighbours of row r, columns 2 c and 2 c + 1, of an 8 x 8 matrix; then of
 * its transpose. */
__device__ inline uint32_t transpose_pairs(uint32_t pair)
{
    uint32_t to;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(pair));
    return to;
}

/* Sums of eight rows of x, of fragment j: [h][e] is row bases[h] + lane / 4 of the weights, row
 * 8 j + 2 (lane % 4) + e of x. */
template <int N>
__device__ __forceinline__ void store_f32(const float (&acc)[N / 2], const tile_operand &o,
                                          const tile_item &item, const tile_rows<false> &rows)
{
    const int first = lane_id() % 4 * 2;
    const int64_t column = item.column + lane_id() / 4;
    const bool inside[2] = {column + rows.columns[0] < o.n, column + rows.columns[1] < o.n};
    float *line =
        static_cast<float *>(o.out) + (item.tile.first + first) * o.out_stride + column;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (8 * j + first + e >= item.tile.n) continue;
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (inside[h])
                    line[e * o.out_stride + rows.columns[h]] = acc[4 * j + 2 * h + e];
        }
        line += 8 * o.out_stride;
    }
}

/* Two neighbours of a row of out, as many as there are. */
__device__ inline void store_two(bf16 *to, int64_t left, bool pairs, uint32_t two)
{
    if (pairs && left >= 2) {
        *reinterpret_cast<uint32_t *>(to) = two;
        return;
    }
    const __nv_bfloat162 both = *reinterpret_cast<const __nv_bfloat162 *>(&two);
    if (left >= 1) to[0] = both.x;
    if (left >= 2) to[1] = both.y;
}

/* f(j, e, h) is the result of a place of the fragments; h = 0 alone when gated. */
template <int N, bool gated, class F>
__device__ __forceinline__ void store_bf16(const tile_operand &o, const tile_item &item,
                                           const tile_rows<gated> &rows, F f)
{
    const int64_t column = item.column + lane_id() % 4 * 2;
    bf16 *line =
        static_cast<bf16 *>(o.out) + (item.tile.first + lane_id() / 4) * o.out_stride + column;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int h = 0; h < (gated ? 1 : 2); h++) {
            const uint32_t two = transpose_pairs(pack_bf16(f(j, 0, h), f(j, 1, h)));
            if (8 * j + lane_id() / 4 < item.tile.n)
                store_two(line + rows.columns[h], o.n - column - rows.columns[h], o.pairs, two);
        }
        line += 8 * o.out_stride;
    }
}

template <int N, bool gated, class Out>
__device__ __forceinline__ void store_item(const float (&acc)[N / 2], const tile_operand &o,
                                           const tile_item &item)
{
    const tile_rows<gated> rows;
    if constexpr (sizeof(Out) == 4)
        store_f32<N>(acc, o, item, rows);
    else if constexpr (gated)
        store_bf16<N>(o, item, rows, [&](int j, int e, int) {
            return silu(acc[4 * j + e]) * acc[4 * j + 2 + e];
        });
    else
        store_bf16<N>(o, item, rows,
                      [&](int j, int e, int h) { return acc[4 * j + 2 * h + e]; });
}

#endif
