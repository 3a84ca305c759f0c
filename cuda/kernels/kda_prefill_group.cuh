/*
 * kda_prefill_group.cuh -- a group of four warps that prepares chunks: its shared memory, how its
 * lanes lie over a chunk, the gate, and rows on their way in.
 *
 * A warp has 32 channels; its lane 4 g + t has token g of each octet (8 tokens) and 8
 * neighbouring channels.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_GROUP_H
#define KL_CUDA_KERNELS_KDA_PREFILL_GROUP_H

#include "../device/launch.cuh"
#include "../device/wgmma.cuh"
#include "kda_prefill.cuh"

#include <stddef.h>

namespace kda {

constexpr int PREPARERS = 4; /* warps of a group */
constexpr int GROUP = PREPARERS * WARP;
constexpr int OCTET = 8, OCTETS = KDA_TOKENS / OCTET;
constexpr int TILES = OCTETS * (OCTETS + 1) / 2; /* pairs of octets, the earlier one second */
constexpr int BLOCK = KDA_TOKENS / 2;            /* side of the blocks that are inverted */
constexpr int CHANNELS = 8;                      /* of a lane */
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
/* Factors of a product that are at most 1 together: each stays far from the ends of bf16. */
constexpr float STEEPEST = 100;
/* 2^-160 is 0 in f32, and so is every product that it enters: sums of log-decays end here, so
 * that their differences keep their digits. */
constexpr float LEAST = -160;
/* The hardware drops the low 13 bits of a tf32 operand, on average 2^-11 / (2 ln 2) of a value
 * whose logarithm is evenly spread; put_sums() gives back what two operands lose. What is left is
 * as large as after rounding, which would be 150 instructions a lane. */
constexpr float LOST_TO_TF32 = 2 * 0.00035221f;

static_assert(GROUP == KDA_K, "a thread has a channel");
static_assert(PREPARERS * 4 * CHANNELS == KDA_K, "a warp has 32 channels");

/* What turns A into X. */
struct inverse_memory {
    float A[2][BLOCK][BLOCK];   /* diagonal blocks, transposed */
    float A_left[BLOCK][BLOCK]; /* the block below them        */
    float product[BLOCK][BLOCK];
    float X[KDA_TOKENS][KDA_TOKENS + 4]; /* (1 + A)^-1 */
};

/* Shared memory of a group. */
struct alignas(128) prepare_memory {
    float part[PREPARERS][TILES][2][OCTET][OCTET]; /* A and M over a warp's channels */
    union {
        float4 left[OCTETS][2][GROUP]; /* a lane's k times its decays up to the octet's end */
        inverse_memory inverse;        /* afterwards */
    };
    float squares[2][KDA_TOKENS][PREPARERS]; /* sums of k^2 and q^2 */
    bf16 M[KDA_TOKENS][KDA_TOKENS];
    float total[KDA_K]; /* log2 of the chunk's decays */
    float beta[KDA_TOKENS];
    unsigned ticket[2];
};

/* A chunk to prepare. */
struct item {
    long long token; /* its first */
    int tokens;      /* none: there is no such chunk */
    int pair, h;
    unsigned serial;
};

__device__ inline void group_barrier(int group)
{
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP) : "memory");
}

__device__ inline float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline void unpack(const uint4 &from, float factor, float (&to)[CHANNELS])
{
    const uint32_t x[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = low_half(x[i]) * factor;
        to[2 * i + 1] = high_half(x[i]) * factor;
    }
}

__device__ inline uint4 pack(const float (&x)[CHANNELS], const float (&factor)[CHANNELS])
{
    return {pack_bf16(x[0] * factor[0], x[1] * factor[1]),
            pack_bf16(x[2] * factor[2], x[3] * factor[3]),
            pack_bf16(x[4] * factor[4], x[5] * factor[5]),
            pack_bf16(x[6] * factor[6], x[7] * factor[7])};
}

/* ---- the gate ---------------------------------------------------------------------------- */

/* log(1 + e) / e on [0, 1], to 3e-7 in f32 (Chebyshev, degree 7). */
__device__ inline float log1p_quotient(float e)
{
    float p = -0.008574675768613815f;
    p = fmaf(p, e, 0.044214192777872086f);
    p = fmaf(p, e, -0.10785368084907532f);
    p = fmaf(p, e, 0.17757023870944977f);
    p = fmaf(p, e, -0.2449961155653f);
    p = fmaf(p, e, 0.3327617645263672f);
    p = fmaf(p, e, -0.49997448921203613f);
    return fmaf(p, e, 0.9999998211860657f);
}

/* What one head's gate holds for all tokens. */
struct head_gate {
    float rate;  /* exp(A_log), inside of the sigmoid                             */
    float outer; /* log2-decay = outer * (g | softplus(g + bias) | sigmoid(...))  */
};

__device__ inline head_gate gate_of(const kda_arguments &a, int h)
{
    const float rate = a.A_log == nullptr ? 1.0f : expf(a.A_log[h]);
    if (a.gate == KL_GATE_SOFTPLUS) return {rate, -rate * LOG2_E};
    if (a.gate == KL_GATE_BOUNDED) return {rate, a.lower_bound * LOG2_E};
    return {rate, LOG2_E};
}

/* fmaxf() would lose a NaN. */
__device__ inline float at_least(float x, float least)
{
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(least));
    return x;
}

/* Raw gates to log2-decays. */
__device__ inline void apply_gate(const kda_arguments &a, const head_gate &gate, float outer,
                                  const float *bias, float (&x)[CHANNELS])
{
    if (a.gate != KL_GATE_DIRECT && bias != nullptr) {
        float b[CHANNELS];
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) b[i] = bias[i];
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) x[i] += b[i];
    }
    if (a.gate == KL_GATE_SOFTPLUS) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            const float e = exp2_approx(-LOG2_E * fabsf(x[i]));
            x[i] = fmaf(e, log1p_quotient(e), fmaxf(x[i], 0.0f));
        }
    } else if (a.gate == KL_GATE_BOUNDED) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) x[i] = sigmoid(gate.rate * x[i]);
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) x[i] = at_least(x[i] * outer, LEAST);
}

/* From a token's values to their sums from the octet's first token on. */
__device__ inline void sum_over_octet(float (&x)[CHANNELS])
{
    const int token = lane_id() / 4;
#pragma unroll
    for (int d = 1; d < OCTET; d *= 2)
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            const float y = __shfl_up_sync(ALL_LANES, x[i], 4 * d);
            if (token >= d) x[i] += y;
        }
}

/* ---- inputs ------------------------------------------------------------------------------ */

/* A lane's piece of its row of an octet, zeros past the last token. */
__device__ inline uint4 load_piece(const kda_operand &x, const item &c, long long column, int o)
{
    const int row = OCTET * o + lane_id() / 4;
    if (row >= c.tokens) return uint4{0, 0, 0, 0};
    return *reinterpret_cast<const uint4 *>(static_cast<const bf16 *>(x.data) +
                                            (c.token + row) * x.stride + column);
}

/* The same of the gates, as they are given. */
struct raw_gates {
    uint4 x[2];
};

__device__ inline raw_gates load_gates(const kda_operand &x, const item &c, long long column,
                                       int o)
{
    const int row = OCTET * o + lane_id() / 4;
    const long long at = (c.token + row) * x.stride + column;
    raw_gates g = {};
    if (row >= c.tokens) return g;
    if (x.is_bf16) {
        g.x[0] =
            __ldcs(reinterpret_cast<const uint4 *>(static_cast<const bf16 *>(x.data) + at));
    } else {
        const uint4 *from =
            reinterpret_cast<const uint4 *>(static_cast<const float *>(x.data) + at);
        g.x[0] = __ldcs(from), g.x[1] = __ldcs(from + 1);
    }
    return g;
}

__device__ inline void unpack_gates(const raw_gates &g, bool is_bf16, float (&to)[CHANNELS])
{
    if (is_bf16) {
        unpack(g.x[0], 1.0f, to);
        return;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        to[4 * i] = __uint_as_float(g.x[i].x), to[4 * i + 1] = __uint_as_float(g.x[i].y);
        to[4 * i + 2] = __uint_as_float(g.x[i].z), to[4 * i + 3] = __uint_as_float(g.x[i].w);
    }
}

__device__ inline void load_beta(const kda_arguments &a, const item &c, prepare_memory &m)
{
    const int i = threadIdx.x % GROUP;
    if (i >= KDA_TOKENS) return;
    const float raw = i < c.tokens ? kda_load(a.beta, c.token + i, c.h) : 0.0f;
    m.beta[i] = i >= c.tokens ? 0.0f : a.beta_logits ? sigmoid(raw) : raw;
}

__device__ inline float norm_factor(const float (&squares)[PREPARERS])
{
    float s[PREPARERS];
    load_floats(squares, s);
    return 1 / sqrtf(((s[0] + s[1]) + (s[2] + s[3])) + KDA_NORM_EPS);
}

__device__ constexpr int tile_of(int row, int column)
{
    return row * (row + 1) / 2 + column;
}

} // namespace kda

#endif
