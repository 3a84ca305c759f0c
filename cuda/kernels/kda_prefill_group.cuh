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
constexpr int BLOCK_PITCH = BLOCK + 4;  /* of one whose rows are read by lanes side by side */
constexpr int CHANNELS = 8;             /* of a lane */
constexpr int PART = OCTET * OCTET / 2; /* pairs of neighbours of 8 x 8 */
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
/* Factors of a product that are at most 1 together: each stays far from the ends of bf16. */
constexpr float STEEPEST = 100;
/* 2^-160 is 0 in f32, and so is every product that it enters: sums of log-decays end here, so
 * that their differences keep their digits. */
constexpr float LEAST = -160;
/* The hardware drops the low 13 bits of a tf32 operand, on average 2^-11 / (2 ln 2) of a value
 * whose logarithm is evenly spread; add_M() and find_factors() give back what two lose. What is left is
 * as large as after rounding, which would be 150 instructions a lane. */
constexpr float LOST_TO_TF32 = 2 * 0.00035221f;

static_assert(GROUP == KDA_K, "a thread has a channel");
static_assert(PREPARERS * 4 * CHANNELS == KDA_K, "a warp has 32 channels");

/* What turns A into X, in the place of X's two parts until they are known. */
struct inverse_memory {
    float A[2][BLOCK][BLOCK];         /* diagonal blocks, transposed */
    float A_left[BLOCK][BLOCK_PITCH]; /* the block below them        */
};
static_assert(sizeof(inverse_memory) <= sizeof(kda_chunk::X) + sizeof(kda_chunk::X_low));
static_assert(offsetof(kda_chunk, X_low) == offsetof(kda_chunk, X) + sizeof(kda_chunk::X));

constexpr int ITEMS = 3; /* a group's, and its next two */

/* A chunk to prepare. */
struct item {
    long long token; /* its first */
    int tokens;      /* 0: there is no such chunk; -1: nor any later one */
    int h, hk;
    int pair, slot; /* of the ring */
    unsigned serial;
    int window; /* of a convolution: the slot of what comes before, -1: rows of the call do */
};

/* Shared memory of a group. */
struct alignas(128) prepare_memory {
    kda_chunk chunk; /* until it is copied to its slot */
    union {
        float part[PREPARERS][TILES][2][OCTET][OCTET]; /* A and M over a warp's channels */
        struct {                                       /* afterwards */
            float X[KDA_TOKENS][KDA_TOKENS + 4];       /* (1 + A)^-1 */
            float product[BLOCK][BLOCK_PITCH];
        };
    };
    float squares[2][KDA_TOKENS][PREPARERS]; /* sums of k^2 and q^2 */
    float total[OCTETS][KDA_K];              /* log2 of its octets' decays */
    float beta[KDA_TOKENS];
    float column[KDA_TOKENS]; /* factors of X's columns */
    float bias[KDA_K];        /* of the gate, in its units */
    item items[ITEMS];        /* the group's and its next */
};

__device__ inline inverse_memory &inverse_of(prepare_memory &m)
{
    return reinterpret_cast<inverse_memory &>(m.chunk.X);
}

/* The same number. What is made of it is made here: compilers would make it before the loop over
 * chunks, and keep it in registers that octets need. */
__device__ inline int made_here(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}

__device__ inline void group_barrier(int group)
{
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP) : "memory");
}

__device__ inline void unpack(const uint4 &from, float (&to)[CHANNELS])
{
    const uint32_t x[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) to[2 * i] = low_half(x[i]), to[2 * i + 1] = high_half(x[i]);
}

__device__ inline uint4 pack(const float (&x)[CHANNELS], const float (&factor)[CHANNELS])
{
    return {pack_bf16(x[0] * factor[0], x[1] * factor[1]),
            pack_bf16(x[2] * factor[2], x[3] * factor[3]),
            pack_bf16(x[4] * factor[4], x[5] * factor[5]),
            pack_bf16(x[6] * factor[6], x[7] * factor[7])};
}

/* ---- the gate ---------------------------------------------------------------------------- */

/* log2(1 + e) / e on [0, 1], to 9e-6 (Chebyshev, degree 5): a decay enters products with as many
 * bits as bf16 and tf32 leave it. */
__device__ inline float log1p_quotient(float e)
{
    float p = -0.03459521f;
    p = fmaf(p, e, 0.14643362f);
    p = fmaf(p, e, -0.30338966f);
    p = fmaf(p, e, 0.46930169f);
    p = fmaf(p, e, -0.72044237f);
    return fmaf(p, e, 1.44268325f);
}

/* What one head's gate holds for all tokens:
 *     log2-decay = outer * (g | log2(1 + 2^(inner g + bias)) | sigmoid(inner (g + bias))) */
template <kl_gate kind> struct head_gate {
    float inner, outer;
};

/* inner g may overflow: a rate that sees the difference makes LEAST of it anyway, and one that is
 * next to nothing counts in larger units. */
template <kl_gate kind> __device__ head_gate<kind> gate_of(const kda_arguments &a, float A_log)
{
    const float rate = a.A_log == nullptr ? 1.0f : expf(A_log);
    if (kind == KL_GATE_BOUNDED) return {rate, a.lower_bound * LOG2_E};
    if (kind == KL_GATE_DIRECT) return {1.0f, LOG2_E};
    const bool is_nothing = rate < 0x1p-100f;
    return {is_nothing ? 0x1p-60f * LOG2_E : LOG2_E, is_nothing ? -rate * 0x1p60f : -rate};
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
    return made_here(threadIdx.x % GROUP) / 4 * (CHANNELS / 2);
}

/* Raw gates to log2-decays. */
template <kl_gate kind>
__device__ void apply_gate(const head_gate<kind> &gate, const float *bias, lane_gates &x)
{
    float *const y = x[0], b[CHANNELS / 2]; /* all eight: a loop a gate, that they go abreast */
    if constexpr (kind != KL_GATE_DIRECT) load_floats(bias, b);
    if constexpr (kind == KL_GATE_SOFTPLUS) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            const float z = fmaf(y[i], gate.inner, b[i % 4]), e = exp2_approx(-fabsf(z));
            y[i] = fmaf(e, log1p_quotient(e), fmaxf(z, 0.0f));
        }
    } else if constexpr (kind == KL_GATE_BOUNDED) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) y[i] = sigmoid(gate.inner * (y[i] + b[i % 4]));
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) y[i] = at_least(y[i] * gate.outer, LEAST);
}

/* Sums L of an octet's log2-decays from its first token to the lane's, and to its last, of `left`
 * tokens. By a product with ones and zeros, in which a decay travels as two tf32; they keep 22
 * bits of it. */
__device__ inline void sum_over_octet(const lane_gates &x, int left, float (&L)[CHANNELS],
                                      float (&total)[CHANNELS])
{
    const int token = lane_id() / 4, first = lane_id() % 4, second = first + OCTET / 2;
    const uint32_t one = __float_as_uint(1.0f);
    const uint32_t has_first = first < left ? one : 0, has_second = second < left ? one : 0;
    const uint32_t rows[4] = {token >= first ? has_first : 0, has_first,
                              token >= second ? has_second : 0, has_second};
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
        total[i] = sum[2], total[4 + i] = sum[3];
    }
}

/* ---- inputs ------------------------------------------------------------------------------ */

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

/* Where asked for. No branch, behind which the loads would come when what hides them is over. */
__device__ inline void load_if(bool asked, uint2 &to, const void *from)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.u32 p, %3, 0;\n"
                 "@p ld.global.v2.b32 {%0, %1}, [%2];\n"
                 "}"
                 : "+r"(to.x), "+r"(to.y)
                 : "l"(from), "r"(static_cast<int>(asked)));
}

__device__ inline void load_if(bool asked, float (&to)[KDA_TAPS], const float *from)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.u32 p, %5, 0;\n"
                 "@p ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];\n"
                 "}"
                 : "+f"(to[0]), "+f"(to[1]), "+f"(to[2]), "+f"(to[3])
                 : "l"(from), "r"(static_cast<int>(asked)));
}

__device__ inline void load_if(bool asked, float &to, const float *from)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.u32 p, %2, 0;\n"
                 "@p ld.global.nc.f32 %0, [%1];\n"
                 "}"
                 : "+f"(to)
                 : "l"(from), "r"(static_cast<int>(asked)));
}

/* To shared memory, likewise. */
__device__ inline void store_if(bool asked, float &to, float x)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.u32 p, %2, 0;\n"
                 "@p st.shared.f32 [%0], %1;\n"
                 "}" ::"r"(shared_address(&to)),
                 "f"(x), "r"(static_cast<int>(asked))
                 : "memory");
}

/* A bf16 or float32 number's bits. */
__device__ inline void load_if(bool asked, uint32_t &to, const void *from, bool is_bf16)
{
    asm volatile("{\n"
                 ".reg .pred p, q;\n"
                 "setp.ne.u32 q, %2, 0;\n"
                 "setp.ne.and.u32 p, %3, 0, q;\n"
                 "@p ld.global.nc.u16 %0, [%1];\n"
                 "setp.eq.and.u32 p, %3, 0, q;\n"
                 "@p ld.global.nc.u32 %0, [%1];\n"
                 "}"
                 : "+r"(to)
                 : "l"(from), "r"(static_cast<int>(asked)), "r"(static_cast<int>(is_bf16)));
}

/* A thread's share of what a chunk needs beside its rows, as it is given: its head's A_log, a
 * channel's bias, and of the warp that has it a token's beta. On its way before the rows are asked
 * for, that they come together. */
struct raw_scalars {
    static constexpr int BETA_WARP = 2;
    float A_log = 0, bias = 0;
    uint32_t beta = 0;

    __device__ raw_scalars(const kda_arguments &a, const item &c)
    {
        const int i = made_here(threadIdx.x % GROUP), token = i - BETA_WARP * WARP;
        load_if(a.A_log != nullptr, A_log, a.A_log + c.h);
        load_if(a.dt_bias != nullptr, bias, a.dt_bias + c.h * KDA_K + i);
        const long long at = (c.token + token) * a.beta.stride + c.h;
        load_if(token >= 0 && token < c.tokens, beta,
                static_cast<const char *>(a.beta.data) + at * a.beta.element(), a.beta.is_bf16);
    }

    /* The bias and beta to shared memory. */
    template <kl_gate kind>
    __device__ head_gate<kind> put(const kda_arguments &a, const item &c, int warp,
                                   prepare_memory &m) const
    {
        const int i = made_here(threadIdx.x % GROUP), token = i - BETA_WARP * WARP;
        const head_gate<kind> gate = gate_of<kind>(a, A_log);
        m.bias[i] = kind == KL_GATE_SOFTPLUS ? bias * gate.inner : bias;
        if (warp == BETA_WARP) {
            float x = __uint_as_float(a.beta.is_bf16 ? beta << 16 : beta);
            if (a.beta_logits) x = sigmoid(x);
            m.beta[token] = token < c.tokens ? x : 0.0f;
        }
        return gate;
    }
};

/* ---- lengths of rows --------------------------------------------------------------------- */

/* The sums of squares of a token's k and q. */
__device__ inline float2 squares_of(const prepare_memory &m, int token)
{
    float k[PREPARERS], q[PREPARERS];
    load_floats(m.squares[0][token], k);
    load_floats(m.squares[1][token], q);
    return {(k[0] + k[1]) + (k[2] + k[3]), (q[0] + q[1]) + (q[2] + q[3])};
}

/* Rows so long or short that products of them, or of decays with them, may leave the range of a
 * float: they are to have length 1 before. */
__device__ inline bool is_extreme(float squares)
{
    return !(squares == 0 || (squares >= 0x1p-24f && squares <= 0x1p40f));
}

/* Of a chunk that came raw. */
__device__ inline bool has_extremes(const prepare_memory &m)
{
    const float2 s = squares_of(m, made_here(lane_id()));
    return __any_sync(ALL_LANES, is_extreme(s.x) || is_extreme(s.y));
}

/* What products with rows of E k and E q are to be multiplied by, f and another: to the chunk. F k
 * and M want diag(f) U, so X becomes
 *     diag(f) (1 + A)^-1 diag(b) = (1 + diag(f) A diag(1 / f))^-1 diag(f b),
 * where A has rows times f b and columns times f: what is inverted has rows times f^2 b alone. That
 * is returned, lane t has token t's. */
__device__ inline float find_factors(const kda_arguments &a, bool is_raw, prepare_memory &m)
{
    const int token = made_here(lane_id());
    float2 f = {1, 1};
    if (a.normalize && is_raw) {
        const float2 s = squares_of(m, token);
        f = {kda_unit_factor(s.x), kda_unit_factor(s.y)};
    }
    const float column = m.beta[token] * f.x;
    if (warp_id() % PREPARERS == 0) {
        m.column[token] = column;
        m.chunk.factor[0][token] = f.x;
        m.chunk.factor[1][token] = f.y * a.scale;
    }
    return column * f.x * (1 + LOST_TO_TF32);
}

__device__ constexpr int tile_of(int row, int column)
{
    return row * (row + 1) / 2 + column;
}

} // namespace kda

#endif
