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

/* What turns A into X, in the place of X's two parts until they are known. */
struct inverse_memory {
    float A[2][BLOCK][BLOCK];   /* diagonal blocks, transposed */
    float A_left[BLOCK][BLOCK]; /* the block below them        */
    float product[BLOCK][BLOCK];
};
static_assert(sizeof(inverse_memory) == sizeof(kda_chunk::X) + sizeof(kda_chunk::X_low));
static_assert(offsetof(kda_chunk, X_low) == offsetof(kda_chunk, X) + sizeof(kda_chunk::X));

/* A chunk to prepare. */
struct item {
    long long token; /* its first */
    int tokens;      /* 0: there is no such chunk; -1: nor any later one */
    int h, hk;
    int pair, slot; /* of the ring */
    unsigned serial;
};

/* Shared memory of a group. */
struct alignas(128) prepare_memory {
    kda_chunk chunk; /* until it is copied to its slot */
    union {
        float part[PREPARERS][TILES][2][OCTET][OCTET]; /* A and M over a warp's channels */
        float X[KDA_TOKENS][KDA_TOKENS + 4];           /* (1 + A)^-1, afterwards */
    };
    float squares[2][KDA_TOKENS][PREPARERS]; /* sums of k^2 and q^2 */
    float total[KDA_K];                      /* log2 of the chunk's decays */
    float beta[KDA_TOKENS];
    float bias[KDA_K]; /* of the gate */
    item items[2];     /* the group's and its next */
};

__device__ inline inverse_memory &inverse_of(prepare_memory &m)
{
    return reinterpret_cast<inverse_memory &>(m.chunk.X);
}

__device__ inline void group_barrier(int group)
{
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP) : "memory");
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

/* log(1 + e) / e on [0, 1], to 9e-6 (Chebyshev, degree 5): a decay enters products with as many
 * bits as bf16 and tf32 leave it. */
__device__ inline float log1p_quotient(float e)
{
    float p = -0.02397957f;
    p = fmaf(p, e, 0.10150005f);
    p = fmaf(p, e, -0.21029369f);
    p = fmaf(p, e, 0.32529514f);
    p = fmaf(p, e, -0.4993726f);
    return fmaf(p, e, 0.99999183f);
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

/* Gates are loaded and applied where the right operand of an m16n8k8 product over tokens has them:
 * lane 4 c + t has tokens t and t + 4 of an octet, and channels 4 c .. 4 c + 3 of its warp. */
using lane_gates = float[2][CHANNELS / 2];

__device__ inline int gate_channel()
{
    return warp_id() % PREPARERS * 32 + lane_id() / 4 * (CHANNELS / 2);
}

/* Raw gates to log2-decays; those past the last of `tokens` are 0. */
__device__ inline void apply_gate(const kda_arguments &a, const head_gate &gate, int tokens,
                                  const float *bias, lane_gates &x)
{
    float *const y = x[0]; /* all eight: a loop a gate, so that they go side by side */
    if (a.gate != KL_GATE_DIRECT) {
        float b[CHANNELS / 2];
        load_floats(bias, b);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) y[i] += b[i % 4];
    }
    if (a.gate == KL_GATE_SOFTPLUS) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            const float e = exp2_approx(-LOG2_E * fabsf(y[i]));
            y[i] = fmaf(e, log1p_quotient(e), fmaxf(y[i], 0.0f));
        }
    } else if (a.gate == KL_GATE_BOUNDED) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) y[i] = sigmoid(gate.rate * y[i]);
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        const bool inside = lane_id() % 4 + i / 4 * 4 < tokens;
        y[i] = at_least(y[i] * (inside ? gate.outer : 0.0f), LEAST);
    }
}

/* Sums L of an octet's log2-decays from its first token to the lane's, and the same less the sum
 * to the octet's middle. By a product with ones and zeros, in which a decay travels as two tf32;
 * they keep 22 bits of it. */
__device__ inline void sum_over_octet(const lane_gates &x, float (&L)[CHANNELS],
                                      float (&above)[CHANNELS])
{
    const int token = lane_id() / 4, other = lane_id() % 4;
    const float first = token >= other ? 1.0f : 0.0f, second = token >= other + 4 ? 1.0f : 0.0f;
    const uint32_t rows[4] = {__float_as_uint(first), __float_as_uint(first - 1),
                              __float_as_uint(second), __float_as_uint(second)};
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i++) {
        uint32_t high[2], low[2];
        float sum[4] = {0, 0, 0, 0};
#pragma unroll
        for (int t = 0; t < 2; t++) {
            high[t] = __float_as_uint(x[t][i]) & 0xffffe000u;
            low[t] = __float_as_uint(x[t][i] - __uint_as_float(high[t]));
        }
        mma_tf32(sum, rows, low);
        mma_tf32(sum, rows, high);
        L[i] = sum[0], L[4 + i] = sum[1];
        above[i] = sum[2], above[4 + i] = sum[3];
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

/* Gates of two tokens, as they are given. */
struct raw_gates {
    uint4 x[2];
};

__device__ inline void unpack_gates(const raw_gates &g, bool is_bf16, lane_gates &to)
{
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const uint4 &x = g.x[t];
        if (is_bf16) {
            to[t][0] = low_half(x.x), to[t][1] = high_half(x.x);
            to[t][2] = low_half(x.y), to[t][3] = high_half(x.y);
        } else {
            to[t][0] = __uint_as_float(x.x), to[t][1] = __uint_as_float(x.y);
            to[t][2] = __uint_as_float(x.z), to[t][3] = __uint_as_float(x.w);
        }
    }
}

/* A channel a thread. */
__device__ inline void load_bias(const kda_arguments &a, const item &c, prepare_memory &m)
{
    const int i = threadIdx.x % GROUP;
    if (a.gate == KL_GATE_DIRECT) return;
    m.bias[i] = a.dt_bias == nullptr ? 0.0f : a.dt_bias[c.h * KDA_K + i];
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
    return kda_unit_factor((s[0] + s[1]) + (s[2] + s[3]));
}

__device__ constexpr int tile_of(int row, int column)
{
    return row * (row + 1) / 2 + column;
}

} // namespace kda

#endif
