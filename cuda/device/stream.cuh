/*
 * stream.cuh -- x w^T for a few rows of x: each weight is read once, straight from memory to
 * the registers that feed the tensor cores.
 *
 * The weight's rows are the m side of the mma, rows of x its narrow n side. Which columns an
 * mma multiplies together is free, as long as both operands agree: lane (r, c) of 4 r + c takes
 * the c-th piece of 16 bytes of rows r and r + 8, and column group i of four columns of those
 * pieces goes to mma i. So no shuffle and no shared memory lies between memory and mma.
 *
 * The warps of a block take turns along the columns; a warp keeps DEPTH steps on their way and
 * asks for the next one as soon as it has used one. The sums of the warps are added in their
 * order. Neither that order nor an mma's depends on how many rows of x there are; for many of them
 * kernels/linear_ordered.cu has it too, so whoever changes it here changes it there.
 *
 * Weights of one byte become bf16 exactly, but for a power of two that their scale makes good: the
 * pieces of four lanes are one group, whose scale is applied to the f32 sum of their products.
 * Those of four bits become q * scale, rounded to bf16. float32 weights are split into three bf16
 * numbers, which hold all of their 24 bits.
 */
#ifndef KL_CUDA_DEVICE_STREAM_H
#define KL_CUDA_DEVICE_STREAM_H

#include "launch.cuh"
#include "mma.cuh"
#include "warp.cuh"
#include "weight.cuh"

constexpr int STREAM_ROWS = 16;  /* of the weight in a tile: m of an mma */
constexpr int STREAM_TOKENS = 8; /* rows of x in a fragment: n of an mma */
constexpr int STREAM_LANES = 4;  /* that share a row of the weight */
constexpr int STREAM_WARPS = 8;
constexpr int STREAM_THREADS = STREAM_WARPS * WARP;

/* Sums of the warps: [STREAM_WARPS][N * STREAM_TOKENS][STREAM_PITCH]; odd, so that the
 * tokens of a fragment lie in different banks. */
constexpr int STREAM_PITCH = STREAM_ROWS + 1;
template <int N> constexpr int STREAM_FLOATS = STREAM_WARPS *N *STREAM_TOKENS *STREAM_PITCH;

/* How a lane multiplies its two pieces of the weight with its columns of x, N fragments of
 * them. TERMS of bf16 make a weight; DEPTH pieces of a row are in flight: what fits in 128
 * registers, which leaves room for two blocks a multiprocessor. */
template <kl_weight_format format, int N> struct stream_format {
    using codec = weight_codec<format>;
    static constexpr int PIECE = codec::PIECE, TERMS = format == KL_W_F32 ? 3 : 1;
    static constexpr bool WHOLE = codec::GROUP == STREAM_LANES * PIECE; /* scaled as a sum */
    static constexpr int DEPTH = format == KL_W_BF16   ? (N == 1 ? 7 : 5)
                                 : format == KL_W_F32  ? (N == 1 ? 8 : 6)
                                 : format == KL_W_INT4 ? 2
                                                       : (N == 1 ? 5 : 3);
    static constexpr int STEP = STREAM_LANES * PIECE; /* columns of a row, of a warp's step */

    /* before + what a sum of split() weights and its scale are together, where that is WHOLE. */
    static __device__ float add_scaled(float scale, float sum, float before)
    {
        return fmaf(codec::ONE * scale, sum, before);
    }

    /* The piece as `TERMS` numbers of bf16 that add up to it, in pairs; where it is WHOLE without
     * its scale, as the codec's unscaled(). */
    static __device__ void split(uint4 raw, float scale, uint32_t (&to)[TERMS][PIECE / 2])
    {
        if constexpr (WHOLE) {
            codec::unscaled(raw, to[0]);
        } else if constexpr (TERMS == 1) {
            codec::pairs(raw, scale, to[0]);
        } else {
            float rest[PIECE];
            codec::floats(raw, scale, rest);
#pragma unroll
            for (int t = 0; t < TERMS; t++) {
                round_pairs(rest, to[t]);
#pragma unroll
                for (int i = 0; i < PIECE; i++)
                    rest[i] -= i % 2 == 0 ? low_half(to[t][i / 2]) : high_half(to[t][i / 2]);
            }
        }
    }
};

/* PIECE columns of a row of x, as pairs. */
template <int PIECE> __device__ void stream_load_x(uint32_t (&to)[PIECE / 2], const bf16 *from)
{
    if constexpr (PIECE == 4) {
        const uint2 v = *reinterpret_cast<const uint2 *>(from);
        to[0] = v.x;
        to[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < PIECE / 8; i++) {
            const uint4 v = reinterpret_cast<const uint4 *>(from)[i];
            to[4 * i] = v.x;
            to[4 * i + 1] = v.y;
            to[4 * i + 2] = v.z;
            to[4 * i + 3] = v.w;
        }
    }
}

/* Where a lane reads next, and how many columns are left from there on. Rows of x that are
 * absent are null. */
template <kl_weight_format format, int N> struct stream_place {
    using F = stream_format<format, N>;
    weight_row w[2];
    const bf16 *x[N];
    int left;

    /* Whole pieces. */
    __device__ void advance(int columns)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            w[i].data += columns / F::PIECE * 16;
            if constexpr (F::codec::GROUP > 0) w[i].scales += columns / F::codec::GROUP;
        }
#pragma unroll
        for (int n = 0; n < N; n++)
            if (x[n] != nullptr) x[n] += columns;
        left -= columns;
    }
};

/* What a lane holds of one step: pieces of two rows of the weight and of N rows of x. */
template <kl_weight_format format, int N> struct stream_step {
    using F = stream_format<format, N>;
    uint4 raw[2];
    float scale[2];
    uint32_t x[N][F::PIECE / 2];

    /* `skip` columns from the place on: a constant, so that it becomes part of the loads. Columns
     * past the end are zeros; the weight's padding is finite. */
    __device__ void load(const stream_place<format, N> &at, int skip)
    {
        constexpr int PART = F::PIECE < 8 ? F::PIECE : 8;
        /* The lanes of a group take it whole: each of them scales a sum over all of it. */
        const int left = at.left + (F::WHOLE ? lane_id() % STREAM_LANES * F::PIECE : 0);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool inside = skip < left;
            raw[i] = inside ? load_once(at.w[i].data + skip / F::PIECE * 16) : uint4{};
            scale[i] = inside ? scale_at<format>(at.w[i], skip) : 0.0f;
        }
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < F::PIECE / PART; i++) {
                uint32_t part[PART / 2] = {};
                if (at.x[n] != nullptr && skip + i * PART < at.left)
                    stream_load_x<PART>(part, at.x[n] + skip + i * PART);
#pragma unroll
                for (int e = 0; e < PART / 2; e++) x[n][i * PART / 2 + e] = part[e];
            }
    }

    /* sum += weights x, without the scale where that is WHOLE. */
    __device__ void multiply_raw(float (&sum)[N][4]) const
    {
        uint32_t top[F::TERMS][F::PIECE / 2], bottom[F::TERMS][F::PIECE / 2];
        F::split(raw[0], scale[0], top);
        F::split(raw[1], scale[1], bottom);
#pragma unroll
        for (int i = 0; i < F::PIECE / 4; i++)
#pragma unroll
            for (int t = F::TERMS - 1; t >= 0; t--) /* small terms first */
#pragma unroll
                for (int n = 0; n < N; n++)
                    mma_bf16(sum[n],
                             {top[t][2 * i], bottom[t][2 * i], top[t][2 * i + 1],
                              bottom[t][2 * i + 1]},
                             {x[n][2 * i], x[n][2 * i + 1]});
    }

    __device__ void multiply(float (&acc)[N][4]) const
    {
        if constexpr (F::WHOLE) {
            float part[N][4] = {};
            multiply_raw(part);
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[n][e] = F::add_scaled(scale[e / 2], part[n][e], acc[n][e]);
        } else {
            multiply_raw(acc);
        }
    }
};

/* This warp's share of a tile's sums. at: the start of rows r and r + 8 of the tile and of rows
 * r, r + 8, ... of x, r = lane / 4, with all K columns left. K is a multiple of 8, rows of x are
 * 16-byte aligned. */
template <kl_weight_format format, int N>
__device__ void stream_multiply(float (&acc)[N][4], stream_place<format, N> at)
{
    using F = stream_format<format, N>;
    constexpr int TURN = STREAM_WARPS * F::STEP, ALL = F::DEPTH * TURN;
    const int start = warp_id() * F::STEP, end = at.left;
    stream_step<format, N> steps[F::DEPTH];
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] = 0;
    at.advance(start + lane_id() % STREAM_LANES * F::PIECE);
#pragma unroll
    for (int d = 0; d < F::DEPTH; d++) steps[d].load(at, d * TURN);
    for (int k = start; k < end; k += ALL) {
#pragma unroll
        for (int d = 0; d < F::DEPTH; d++) {
            if (k + d * TURN >= end) break; /* the same for the whole warp */
            steps[d].multiply(acc);
            steps[d].load(at, ALL + d * TURN);
        }
        at.advance(ALL);
    }
}

/* Put the warp's sums where stream_sum() finds them; a barrier goes between. */
template <int N> __device__ void stream_share(float *shared, const float (&acc)[N][4])
{
    float *const own = shared + warp_id() * N * STREAM_TOKENS * STREAM_PITCH;
    const int row = lane_id() / 4, token = lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < N; n++) {
        float *const to = own + (n * STREAM_TOKENS + token) * STREAM_PITCH + row;
        to[0] = acc[n][0];
        to[STREAM_PITCH] = acc[n][1];
        to[8] = acc[n][2];
        to[STREAM_PITCH + 8] = acc[n][3];
    }
}

/* The product of row `token` of x and row `row` of the tile. */
template <int N> __device__ float stream_sum(const float *shared, int token, int row)
{
    float sum = 0;
#pragma unroll
    for (int w = 0; w < STREAM_WARPS; w++)
        sum += shared[(w * N * STREAM_TOKENS + token) * STREAM_PITCH + row];
    return sum;
}

/* Before the inputs are there: ask for the first bytes of a weight's row. */
__device__ inline void stream_prefetch(const weight_row &row, int64_t row_bytes, int64_t bytes)
{
    prefetch_l2(row.data, static_cast<uint32_t>(bytes < row_bytes ? bytes : row_bytes));
}

/* Host: bytes of each row of a tile that a grid of so many blocks asks for ahead. Small weights
 * come whole; of large ones what arrives in the microseconds of a wait, for more would stand in
 * the way of the kernel that is waited for. */
inline int64_t stream_ahead(int64_t blocks)
{
    constexpr int64_t ALL = 6 << 20, AT_ONCE = 264; /* blocks that an H100 or H200 holds */
    return ALL / ((blocks < AT_ONCE ? blocks : AT_ONCE) * STREAM_ROWS) / 16 * 16;
}

#endif
