/*
 * stream.cuh -- x w^T for a few rows of x: each weight is read once, straight from memory to
 * the registers that feed the tensor cores.
 *
 * The weight's rows are the m side of the mma, rows of x its narrow n side. Which columns an
 * mma multiplies together is free, as long as both operands agree: lane (r, c) of 4 r + c takes
 * the c-th piece of 16 bytes of rows r and r + 8, and column group i of four columns of those
 * pieces goes to mma i. So no shuffle and no shared memory lies between memory and mma.
 *
 * The warps of a block take turns along the columns; their sums are added in the order of the
 * warps. Neither that order nor an mma's depends on how many rows of x there are.
 *
 * float32 weights are split into three bf16 numbers, which hold all of their 24 bits.
 */
#ifndef KL_CUDA_DEVICE_STREAM_H
#define KL_CUDA_DEVICE_STREAM_H

#include "mma.cuh"
#include "warp.cuh"
#include "weight.cuh"

constexpr int STREAM_ROWS = 16;  /* of the weight in a tile: m of an mma */
constexpr int STREAM_TOKENS = 8; /* rows of x in a fragment: n of an mma */
constexpr int STREAM_WARPS = 8;
constexpr int STREAM_THREADS = STREAM_WARPS * WARP;

/* Sums of the warps: [STREAM_WARPS][N * STREAM_TOKENS][STREAM_PITCH]; odd, so that the
 * tokens of a fragment lie in different banks. */
constexpr int STREAM_PITCH = STREAM_ROWS + 1;
template <int N> constexpr int STREAM_FLOATS = STREAM_WARPS *N *STREAM_TOKENS *STREAM_PITCH;

/* How a lane multiplies its two pieces of the weight with its columns of x, N fragments of
 * them. TERMS of bf16 make a weight; DEPTH pieces of a row are in flight. */
template <kl_weight_format format> struct stream_format {
    using codec = weight_codec<format>;
    static constexpr int PIECE = codec::PIECE, TERMS = format == KL_W_F32 ? 3 : 1;
    static constexpr int DEPTH = codec::GROUP == 0 ? 32 / PIECE : 64 / PIECE;
    static constexpr int STEP = 4 * PIECE; /* columns that the lanes of a row take at once */

    /* The piece as `TERMS` numbers of bf16 that add up to it, in pairs. */
    static __device__ void split(uint4 raw, float scale, uint32_t (&to)[TERMS][PIECE / 2])
    {
        if constexpr (TERMS == 1) {
            codec::pairs(raw, scale, to[0]);
        } else {
            float rest[PIECE];
            codec::floats(raw, scale, rest);
#pragma unroll
            for (int t = 0; t < TERMS; t++) {
                round_pairs(rest, to[t]);
#pragma unroll
                for (int i = 0; i < PIECE; i++)
                    rest[i] -= __uint_as_float(i % 2 == 0 ? to[t][i / 2] << 16
                                                          : to[t][i / 2] & 0xffff0000u);
            }
        }
    }
};

/* PIECE columns of a row of x, as pairs. */
template <int PIECE> __device__ void stream_load_x(uint32_t (&to)[PIECE / 2], const bf16 *from)
{
    if constexpr (PIECE == 4) {
        const uint2 v = __ldg(reinterpret_cast<const uint2 *>(from));
        to[0] = v.x;
        to[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < PIECE / 8; i++) {
            const uint4 v = __ldg(reinterpret_cast<const uint4 *>(from) + i);
            to[4 * i] = v.x;
            to[4 * i + 1] = v.y;
            to[4 * i + 2] = v.z;
            to[4 * i + 3] = v.w;
        }
    }
}

/* What a lane holds of one step: pieces of two rows of the weight and of N rows of x. */
template <kl_weight_format format, int N> struct stream_step {
    using F = stream_format<format>;
    uint4 raw[2];
    float scale[2];
    uint32_t x[N][F::PIECE / 2];

    __device__ void load_weight(const weight_row (&w)[2], int col, int K)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool inside = col < K && w[i].data != nullptr;
            raw[i] = inside ? load_once(w[i].data + col / F::PIECE * 16) : uint4{};
            scale[i] = inside ? scale_at<format>(w[i], col) : 0.0f;
        }
    }

    /* Columns past K are zeros; the weight's padding is finite. */
    __device__ void load_x(const bf16 *const (&rows)[N], int col, int K)
    {
        constexpr int PART = F::PIECE < 8 ? F::PIECE : 8;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < F::PIECE / PART; i++) {
                uint32_t part[PART / 2] = {};
                if (rows[n] != nullptr && col + i * PART < K)
                    stream_load_x<PART>(part, rows[n] + col + i * PART);
#pragma unroll
                for (int e = 0; e < PART / 2; e++) x[n][i * PART / 2 + e] = part[e];
            }
    }

    __device__ void multiply(float (&acc)[N][4]) const
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
                    mma_bf16(acc[n],
                             {top[t][2 * i], bottom[t][2 * i], top[t][2 * i + 1],
                              bottom[t][2 * i + 1]},
                             {x[n][2 * i], x[n][2 * i + 1]});
    }
};

/* This warp's share of a tile's sums. w: rows r and r + 8 of the tile, x: rows r, r + 8, ...
 * of x, r = lane / 4; absent rows are null. K is a multiple of 8, rows of x are 16-byte
 * aligned. */
template <kl_weight_format format, int N>
__device__ void stream_multiply(float (&acc)[N][4], const weight_row (&w)[2],
                                const bf16 *const (&x)[N], int K)
{
    using F = stream_format<format>;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[n][e] = 0;
    const int first = warp_id() * F::STEP + lane_id() % 4 * F::PIECE;
    constexpr int TURN = STREAM_WARPS * F::STEP;
    for (int k = 0; k < K; k += F::DEPTH * TURN) {
        stream_step<format, N> steps[F::DEPTH];
#pragma unroll
        for (int d = 0; d < F::DEPTH; d++) steps[d].load_weight(w, first + k + d * TURN, K);
#pragma unroll
        for (int d = 0; d < F::DEPTH; d++) steps[d].load_x(x, first + k + d * TURN, K);
#pragma unroll
        for (int d = 0; d < F::DEPTH; d++) steps[d].multiply(acc);
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

#endif
