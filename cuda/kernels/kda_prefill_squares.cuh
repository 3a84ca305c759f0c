/*
 * kda_prefill_squares.cuh -- M and X = diag(f) (1 + A)^-1 diag(b) of a chunk, from the warps' sums.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_SQUARES_H
#define KL_CUDA_KERNELS_KDA_PREFILL_SQUARES_H

#include "kda_prefill_group.cuh"

namespace kda {

/* ---- sums --------------------------------------------------------------------------------- */

/* A piece of a row of X, in wgmma's order. */
template <class Square> __device__ char *square_piece(Square &x, int row, int piece)
{
    return reinterpret_cast<char *>(&x[0][0]) + swizzled<2 * KDA_TOKENS>(row, piece);
}

/* Octets of a tile's rows and columns. */
struct tile_place {
    int o, c;

    __device__ constexpr explicit tile_place(int tile)
        : o(tile < 1   ? 0
            : tile < 3 ? 1
            : tile < 6 ? 2
                       : 3),
          c(tile - tile_of(o, 0))
    {
    }
};

/* Two neighbours of a tile, summed over the warps; `part` is of the first warp's. */
__device__ inline float2 add_part(const float2 *part)
{
    constexpr int OF_WARP = sizeof(prepare_memory::part[0]) / sizeof(float2);
    float2 sum = *part;
#pragma unroll
    for (int w = 1; w < PREPARERS; w++) {
        const float2 x = part[w * OF_WARP];
        sum.x += x.x, sum.y += x.y;
    }
    return sum;
}

/* Every second tile of A, times the factors of the lane's rows, to where it is inverted. */
template <int half>
__device__ void add_A(const float2 *part, int lane, const float (&factor)[OCTETS],
                      prepare_memory &m)
{
    constexpr int OCTETS_OF_BLOCK = BLOCK / OCTET;
    const int i = lane / 4, j = lane % 4 * 2;
    inverse_memory &to = inverse_of(m);
#pragma unroll
    for (int n = 0; n < TILES / 2; n++) {
        const tile_place at(2 * n + half);
        const float f = factor[at.o];
        const float2 sum = add_part(part + 4 * PART * n);
        const float x = at.c < at.o || j < i ? sum.x * f : 0.0f;
        const float y = at.c < at.o || j + 1 < i ? sum.y * f : 0.0f;
        const int b = at.o / OCTETS_OF_BLOCK, row = OCTET * at.o + i, column = OCTET * at.c + j;
        if (at.c / OCTETS_OF_BLOCK == b) {
            to.A[b][column - b * BLOCK][row - b * BLOCK] = x;
            to.A[b][column - b * BLOCK + 1][row - b * BLOCK] = y;
        } else
            *reinterpret_cast<float2 *>(&to.A_left[row - BLOCK][column]) = float2{x, y};
    }
}

/* Every second tile of M, to the chunk; of an octet's own also what is rounded away, for where
 * decay is strong, the output is little more than M's diagonal times U. */
template <int half> __device__ void add_M(const float2 *part, int lane, prepare_memory &m)
{
    constexpr float one = 1 + LOST_TO_TF32;
    const int i = lane / 4, j = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < TILES / 2; n++) {
        const tile_place at(2 * n + half);
        const float2 sum = add_part(part + 4 * PART * n);
        const float x = at.c < at.o || j <= i ? sum.x * one : 0.0f;
        const float y = at.c < at.o || j + 1 <= i ? sum.y * one : 0.0f;
        const uint32_t high = pack_bf16(x, y);
        char *piece = square_piece(m.chunk.M, i, at.c) + 2 * j;
        *reinterpret_cast<uint32_t *>(piece + at.o * OCTET * 2 * KDA_TOKENS) = high;
        if (at.c == at.o)
            m.chunk.M_low[lane][at.o] = pack_bf16(x - low_half(high), y - high_half(high));
    }
}

/* A and M, each by two warps, from the warps' sums: what warp `warp` adds. `factor`: of A's rows,
 * lane t has token t's. */
template <int warp> __device__ void add_parts(prepare_memory &m, float factor)
{
    static_assert(PREPARERS == 4 && TILES % 2 == 0);
    const int thread = made_here(threadIdx.x % GROUP), lane = thread % WARP;
    const float2 *part = reinterpret_cast<const float2 *>(m.part) + thread; /* (A, M) twice */
    if constexpr (warp % 2 == 0) {
        float f[OCTETS];
#pragma unroll
        for (int o = 0; o < OCTETS; o++)
            f[o] = __shfl_sync(ALL_LANES, factor, OCTET * o + lane / 4);
        add_A<warp / 2>(part, lane, f, m);
    } else {
        add_M<warp / 2>(part, lane, m);
    }
}

/* ---- the inverse ------------------------------------------------------------------------- */

/* (1 + A_bb)^-1 of both diagonal blocks, by one warp: a lane has a column. */
__device__ inline void invert_diagonal(prepare_memory &m)
{
    const int lane = made_here(lane_id()), b = lane / BLOCK, j = lane % BLOCK;
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

/* A number as the sum of two tf32: 22 bits of it. */
__device__ inline void split(float x, uint32_t &high, uint32_t &low)
{
    high = __float_as_uint(x) & 0xffffe000u;
    low = __float_as_uint(x - __uint_as_float(high));
}

/* sum += a b of 16 x 16 blocks, by one warp; columns 8 n + 2 c of lane 4 r + c at sum[n]. */
template <int A_PITCH, int B_PITCH>
__device__ void multiply_blocks(float (&sum)[2][4], int lane, const float *a, const float *b)
{
    const int r = lane / 4, c = lane % 4;
#pragma unroll
    for (int k = 0; k < BLOCK; k += 8) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            split(a[(r + i % 2 * 8) * A_PITCH + k + c + i / 2 * 4], high[i], low[i]);
#pragma unroll
        for (int n = 0; n < 2; n++) {
            uint32_t b_high[2], b_low[2];
#pragma unroll
            for (int i = 0; i < 2; i++)
                split(b[(k + c + 4 * i) * B_PITCH + 8 * n + r], b_high[i], b_low[i]);
            mma_tf32(sum[n], low, b_high);
            mma_tf32(sum[n], high, b_low);
            mma_tf32(sum[n], high, b_high);
        }
    }
}

template <int PITCH>
__device__ void store_block(float *to, int lane, float sign, const float (&x)[2][4])
{
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            *reinterpret_cast<float2 *>(
                &to[(lane / 4 + 8 * half) * PITCH + 8 * n + lane % 4 * 2]) =
                float2{sign * x[n][2 * half], sign * x[n][2 * half + 1]};
}

/* X_21 = -X_22 A_21 X_11, by the warp that has inverted the diagonal. */
__device__ inline void join_blocks(prepare_memory &m)
{
    constexpr int PITCH = KDA_TOKENS + 4;
    const int lane = made_here(lane_id());
    float product[2][4] = {}, X[2][4] = {};
    __syncwarp();
    multiply_blocks<BLOCK_PITCH, PITCH>(product, lane, inverse_of(m).A_left[0], m.X[0]);
    store_block<BLOCK_PITCH>(m.product[0], lane, 1, product);
    __syncwarp();
    multiply_blocks<PITCH, BLOCK_PITCH>(X, lane, &m.X[BLOCK][BLOCK], m.product[0]);
    store_block<PITCH>(m.X[BLOCK], lane, -1, X);
}

/* ---- results ----------------------------------------------------------------------------- */

__device__ inline void load_halves(const float *from, float (&to)[8])
{
    const float4 u = reinterpret_cast<const float4 *>(from)[0];
    const float4 v = reinterpret_cast<const float4 *>(from)[1];
    to[0] = u.x, to[1] = u.y, to[2] = u.z, to[3] = u.w;
    to[4] = v.x, to[5] = v.y, to[6] = v.z, to[7] = v.w;
}

/* Eight neighbours of a row of X and X_low. */
__device__ inline void write_inverse(prepare_memory &m)
{
    const int thread = made_here(threadIdx.x % GROUP);
    const int row = thread / 4, piece = thread % 4, column = 8 * piece;
    float x[8] = {}, b[8];
    uint32_t high[4], low[4];
    if (row >= BLOCK || column < BLOCK) /* nobody has written the rest */
        load_halves(&m.X[row][column], x);
    load_halves(&m.column[column], b);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float u = x[2 * i] * b[2 * i], v = x[2 * i + 1] * b[2 * i + 1];
        high[i] = pack_bf16(u, v);
        low[i] = pack_bf16(u - low_half(high[i]), v - high_half(high[i]));
    }
    *reinterpret_cast<uint4 *>(square_piece(m.chunk.X, row, piece)) =
        uint4{high[0], high[1], high[2], high[3]};
    *reinterpret_cast<uint4 *>(square_piece(m.chunk.X_low, row, piece)) =
        uint4{low[0], low[1], low[2], low[3]};
}

/* 2^x - 1 for x <= 0, to 2e-6 of it. */
__device__ inline float exp2_less_1(float x)
{
    const float y = x * LN_2;
    float p = 1.0f / 120;
    p = fmaf(p, y, 1.0f / 24), p = fmaf(p, y, 1.0f / 6);
    p = fmaf(p, y, 0.5f), p = fmaf(p, y, 1.0f);
    return x > -0.25f ? p * y : exp2_approx(x) - 1;
}

/* By one warp, four channels a lane. */
__device__ inline void write_decays(prepare_memory &m)
{
    const int lane = made_here(lane_id());
#pragma unroll
    for (int i = 0; i < KDA_K; i += WARP) {
        const int channel = i + lane;
        const int at = channel / 8 * 8 + channel % 4 * 2 + channel / 4 % 2; /* put_total() */
        float total = 0;
#pragma unroll
        for (int o = 0; o < OCTETS; o++) total += m.total[o][at];
        m.chunk.decay[channel % 8 / 2][channel / 8 * 2 + channel % 2] = exp2_less_1(total);
    }
}

} // namespace kda

#endif
