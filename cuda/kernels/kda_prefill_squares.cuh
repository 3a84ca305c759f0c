/*
 * kda_prefill_squares.cuh -- M and X = (1 + A)^-1 diag(b) of a chunk, from the warps' sums.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_SQUARES_H
#define KL_CUDA_KERNELS_KDA_PREFILL_SQUARES_H

#include "kda_prefill_group.cuh"

namespace kda {

/* ---- sums --------------------------------------------------------------------------------- */

/* A piece of a row of M or X, in wgmma's order. */
template <class Square> __device__ char *square_piece(Square &x, int row, int piece)
{
    return reinterpret_cast<char *>(&x[0][0]) + swizzled<2 * KDA_TOKENS>(row, piece);
}

/* Two neighbours of A or M, summed over the warps, to where they are used next. */
__device__ inline void put_sums(prepare_memory &m, int tile, int is_M, int i, int j, float2 sum)
{
    const int o = tile < 1 ? 0 : tile < 3 ? 1 : tile < 6 ? 2 : 3;
    const int row = OCTET * o + i, column = OCTET * (tile - tile_of(o, 0)) + j;
    if (is_M) {
        const float one = 1 + LOST_TO_TF32;
        const float x = column <= row ? sum.x * one : 0.0f;
        const float y = column + 1 <= row ? sum.y * one : 0.0f;
        *reinterpret_cast<uint32_t *>(square_piece(m.chunk.M, row, column / 8) + 2 * j) =
            pack_bf16(x, y);
        return;
    }
    const float beta = m.beta[row] * (1 + LOST_TO_TF32);
    const float x = column < row ? sum.x * beta : 0.0f;
    const float y = column + 1 < row ? sum.y * beta : 0.0f;
    const int b = row / BLOCK;
    inverse_memory &to = inverse_of(m);
    if (column / BLOCK == b) {
        to.A[b][column % BLOCK][row % BLOCK] = x;
        to.A[b][column % BLOCK + 1][row % BLOCK] = y;
    } else
        *reinterpret_cast<float2 *>(&to.A_left[row - BLOCK][column]) = float2{x, y};
}

__device__ inline void add_parts(prepare_memory &m)
{
    constexpr int PAIRS = TILES * OCTET * OCTET; /* of neighbours, A and M */
    static_assert(PAIRS % GROUP == 0);
    const float2 *part = reinterpret_cast<const float2 *>(m.part);
#pragma unroll
    for (int n = 0; n < PAIRS / GROUP; n++) {
        const int at = n * GROUP + threadIdx.x % GROUP;
        float2 sum = part[at];
#pragma unroll
        for (int w = 1; w < PREPARERS; w++) {
            const float2 x = part[w * PAIRS + at];
            sum.x += x.x, sum.y += x.y;
        }
        put_sums(m, at / (OCTET * OCTET), at / (OCTET * OCTET / 2) % 2, at / 4 % OCTET,
                 at % 4 * 2, sum);
    }
}

/* ---- the inverse ------------------------------------------------------------------------- */

/* (1 + A_bb)^-1 of both diagonal blocks, by one warp: a lane has a column. */
__device__ inline void invert_diagonal(prepare_memory &m)
{
    const int b = lane_id() / BLOCK, j = lane_id() % BLOCK;
    float x[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; i++) x[i] = i == j ? 1.0f : 0.0f;
#pragma unroll
    for (int l = 0; l < BLOCK - 1; l++)
#pragma unroll
        for (int i = (l + 1) / 4 * 4; i < BLOCK; i += 4) {
            float A[4];
            load_floats(&inverse_of(m).A[b][l][i], A);
#pragma unroll
            for (int c = 0; c < 4; c++)
                if (i + c > l) x[i + c] = fmaf(-A[c], x[l], x[i + c]);
        }
#pragma unroll
    for (int i = 0; i < BLOCK; i++) m.X[b * BLOCK + i][b * BLOCK + j] = x[i];
}

/* to[i][j] = sign sum_l a[i][l] x[l][j] of 16 x 16 blocks: a thread has two elements. */
template <int A_PITCH, int X_PITCH, int PITCH>
__device__ void multiply_blocks(const float *a, const float *x, float sign, float *to)
{
    const int j = threadIdx.x % BLOCK, i = threadIdx.x % GROUP / BLOCK;
    float sum[2] = {0, 0};
#pragma unroll
    for (int l = 0; l < BLOCK; l += 4) {
        float u[4], v[4];
        load_floats(a + i * A_PITCH + l, u);
        load_floats(a + (i + 8) * A_PITCH + l, v);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const float y = x[(l + c) * X_PITCH + j];
            sum[0] = fmaf(u[c], y, sum[0]), sum[1] = fmaf(v[c], y, sum[1]);
        }
    }
    to[i * PITCH + j] = sign * sum[0];
    to[(i + 8) * PITCH + j] = sign * sum[1];
}

/* X_21 = -X_22 A_21 X_11. */
__device__ inline void invert(prepare_memory &m, int group)
{
    constexpr int PITCH = KDA_TOKENS + 4;
    inverse_memory &in = inverse_of(m);
    if (warp_id() % PREPARERS == 0) invert_diagonal(m);
    group_barrier(group);
    multiply_blocks<BLOCK, PITCH, BLOCK>(&in.A_left[0][0], &m.X[0][0], 1.0f, &in.product[0][0]);
    group_barrier(group);
    multiply_blocks<PITCH, BLOCK, PITCH>(&m.X[BLOCK][BLOCK], &in.product[0][0], -1.0f,
                                         &m.X[BLOCK][0]);
    group_barrier(group);
}

/* ---- results ----------------------------------------------------------------------------- */

/* Eight neighbours of a row of X and X_low, zeros above the diagonal. */
__device__ inline void write_inverse(prepare_memory &m)
{
    const int row = threadIdx.x % GROUP / 4, piece = threadIdx.x % 4, column = 8 * piece;
    float high[8], low[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int j = column + i;
        const float x = j <= row ? m.X[row][j] * m.beta[j] : 0.0f;
        high[i] = to_float(from_float<bf16>(x));
        low[i] = x - high[i];
    }
    store_floats(reinterpret_cast<bf16 *>(square_piece(m.chunk.X, row, piece)), high);
    store_floats(reinterpret_cast<bf16 *>(square_piece(m.chunk.X_low, row, piece)), low);
}

__device__ inline void write_decays(prepare_memory &m)
{
    const int i = threadIdx.x % GROUP;
    m.chunk.decay[i % 8 / 2][i / 8 * 2 + i % 2] = expm1f(m.total[i] * LN_2);
}

} // namespace kda

#endif
