/*
 * kda_prefill_prepare.cuh -- what a chunk of 32 tokens asks of the state and leaves in it, by a
 * group of four warps: the gate, norms, A and M, X = (1 + A)^-1 diag(b), and k and q times their
 * products of decays.
 *
 * A warp has 32 channels; its lane 4 g + t has token g of each octet (8 tokens) and 8
 * neighbouring channels. That is how an m16n8k16 product over channels wants its operands, for
 * any order of the channels that both sides share: so A and M come from registers. An octet's
 * rows, its k above its q, meet the k of its own and of earlier octets:
 *     sum_d x_i k_j 2^(L_i - L_j) = sum_d (x_i 2^(L_i - m)) (k_j 2^(m - L_j))
 * with L the sums of log2-decays and m their value in the middle of i's octet. Against earlier
 * octets the right factor's exponent is negative and the left one's reaches back four tokens at
 * most; within the octet both span four tokens. If four tokens decay by more than 2^-100, the
 * octet's own product is formed pair by pair from differences, and m is its start.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_PREPARE_H
#define KL_CUDA_KERNELS_KDA_PREFILL_PREPARE_H

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

__device__ inline float low_half(uint32_t x)
{
    return __uint_as_float(x << 16);
}

__device__ inline float high_half(uint32_t x)
{
    return __uint_as_float(x & 0xffff0000u);
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

/* ---- A and M ----------------------------------------------------------------------------- */

/* An octet's rows against its own k, from differences of the sums L. Lane 4 g + 0 writes row g. */
__device__ inline void steep_octet(const float (&k)[CHANNELS], const float (&q)[CHANNELS],
                                   const float (&L)[CHANNELS], float (*to)[OCTET][OCTET])
{
    const int row = lane_id() / 4;
#pragma unroll 1
    for (int d = 0; d < OCTET; d++) {
        float A = 0, M = 0;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            const float other = __shfl_up_sync(ALL_LANES, k[i], 4 * d);
            const float from = __shfl_up_sync(ALL_LANES, L[i], 4 * d);
            const float y = other * exp2_approx(fminf(L[i] - from, 0.0f));
            A = fmaf(k[i], y, A), M = fmaf(q[i], y, M);
        }
        A = warp_sum<4>(A), M = warp_sum<4>(M);
        if (lane_id() % 4 == 0 && row >= d) to[0][row][row - d] = A, to[1][row][row - d] = M;
    }
}

/* The hardware drops the low 13 bits of an operand, on average 2^-11 / (2 ln 2) of a value whose
 * logarithm is evenly spread; put_sums() gives back what two operands lose. What is left is as
 * large as after rounding, which would be 150 instructions a lane. */
constexpr float LOST_TO_TF32 = 2 * 0.00035221f;

__device__ inline uint32_t to_tf32(float x)
{
    return __float_as_uint(x);
}

/* Left operands of m16n8k8, for the lane's channels 2 s and 2 s + 1: rows of k above rows of q. */
__device__ inline void left_operands(const float (&k)[CHANNELS], const float (&q)[CHANNELS],
                                     const float (&f)[CHANNELS], uint32_t (&a)[CHANNELS / 2][4])
{
#pragma unroll
    for (int s = 0; s < CHANNELS / 2; s++) {
        a[s][0] = to_tf32(k[2 * s] * f[2 * s]), a[s][1] = to_tf32(q[2 * s] * f[2 * s]);
        a[s][2] = to_tf32(k[2 * s + 1] * f[2 * s + 1]);
        a[s][3] = to_tf32(q[2 * s + 1] * f[2 * s + 1]);
    }
}

/* An octet's rows against the k of an octet: 8 x 8 of A and of M, over the warp's channels. */
__device__ inline void multiply_octets(const uint32_t (&a)[CHANNELS / 2][4],
                                       const float (&k)[CHANNELS], const float (&f)[CHANNELS],
                                       float (*to)[OCTET][OCTET])
{
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < CHANNELS / 2; s++) {
        const uint32_t b[2] = {to_tf32(k[2 * s] * f[2 * s]),
                               to_tf32(k[2 * s + 1] * f[2 * s + 1])};
        mma_tf32(sum, a[s], b);
    }
    const int row = lane_id() / 4, column = lane_id() % 4 * 2;
    *reinterpret_cast<float2 *>(&to[0][row][column]) = float2{sum[0], sum[1]};
    *reinterpret_cast<float2 *>(&to[1][row][column]) = float2{sum[2], sum[3]};
}

__device__ constexpr int tile_of(int row, int column)
{
    return row * (row + 1) / 2 + column;
}

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
        *reinterpret_cast<uint32_t *>(square_piece(m.M, row, column / 8) + 2 * j) =
            pack_bf16(x, y);
        return;
    }
    const float beta = m.beta[row] * (1 + LOST_TO_TF32);
    const float x = column < row ? sum.x * beta : 0.0f;
    const float y = column + 1 < row ? sum.y * beta : 0.0f;
    const int b = row / BLOCK;
    if (column / BLOCK == b) {
        m.inverse.A[b][column % BLOCK][row % BLOCK] = x;
        m.inverse.A[b][column % BLOCK + 1][row % BLOCK] = y;
    } else
        *reinterpret_cast<float2 *>(&m.inverse.A_left[row - BLOCK][column]) = float2{x, y};
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
            load_floats(&m.inverse.A[b][l][i], A);
#pragma unroll
            for (int c = 0; c < 4; c++)
                if (i + c > l) x[i + c] = fmaf(-A[c], x[l], x[i + c]);
        }
#pragma unroll
    for (int i = 0; i < BLOCK; i++) m.inverse.X[b * BLOCK + i][b * BLOCK + j] = x[i];
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
    if (warp_id() % PREPARERS == 0) invert_diagonal(m);
    group_barrier(group);
    multiply_blocks<BLOCK, PITCH, BLOCK>(&m.inverse.A_left[0][0], &m.inverse.X[0][0], 1.0f,
                                         &m.inverse.product[0][0]);
    group_barrier(group);
    multiply_blocks<PITCH, BLOCK, PITCH>(&m.inverse.X[BLOCK][BLOCK], &m.inverse.product[0][0],
                                         -1.0f, &m.inverse.X[BLOCK][0]);
    group_barrier(group);
}

/* ---- results ----------------------------------------------------------------------------- */

/* Eight neighbours of a row of M, X and X_low, zeros above the diagonal. */
__device__ inline void write_squares(prepare_memory &m, kda_chunk &out)
{
    const int row = threadIdx.x % GROUP / 4, piece = threadIdx.x % 4, column = 8 * piece;
    float high[8], low[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int j = column + i;
        const float x = j <= row ? m.inverse.X[row][j] * m.beta[j] : 0.0f;
        high[i] = to_float(from_float<bf16>(x));
        low[i] = x - high[i];
    }
    *reinterpret_cast<uint4 *>(square_piece(out.M, row, piece)) =
        *reinterpret_cast<const uint4 *>(square_piece(m.M, row, piece));
    store_floats(reinterpret_cast<bf16 *>(square_piece(out.X, row, piece)), high);
    store_floats(reinterpret_cast<bf16 *>(square_piece(out.X_low, row, piece)), low);
}

__device__ inline void write_decays(const prepare_memory &m, kda_chunk &out)
{
    const int i = threadIdx.x % GROUP;
    out.decay[i % 8 / 2][i / 8 * 2 + i % 2] = expm1f(m.total[i] * LN_2);
}

/* Where a lane's piece of its row of the first octet lies in the operands of a chunk; those of
 * the next octets and operands follow at fixed distances. */
__device__ inline char *lane_piece(kda_chunk &out)
{
    const unsigned piece = threadIdx.x / WARP % PREPARERS * 4 + threadIdx.x % 4;
    const unsigned row = threadIdx.x / 4 % OCTET;
    return reinterpret_cast<char *>(&out) + piece / 8 * sizeof out.k_decayed[0] + row * KDA_K +
           (piece % 8 ^ row) * 16;
}

enum operand { K_DECAYED, Q_DECAYED, K_LEFT };
static_assert(offsetof(kda_chunk, q_decayed) == Q_DECAYED * sizeof(kda_chunk::k_decayed));
static_assert(offsetof(kda_chunk, k_left) == K_LEFT * sizeof(kda_chunk::k_decayed));

__device__ inline void write_piece(char *lane, operand which, int o, const uint4 &x)
{
    *reinterpret_cast<uint4 *>(lane + which * sizeof(kda_chunk::k_decayed) +
                               o * OCTET * KDA_K) = x;
}

/* ---- a chunk ----------------------------------------------------------------------------- */

__device__ inline void put_left(prepare_memory &m, int c, const float (&x)[CHANNELS])
{
    const int thread = threadIdx.x % GROUP;
    m.left[c][0][thread] = float4{x[0], x[1], x[2], x[3]};
    m.left[c][1][thread] = float4{x[4], x[5], x[6], x[7]};
}

__device__ inline void get_left(const prepare_memory &m, int c, float (&x)[CHANNELS])
{
    const int thread = threadIdx.x % GROUP;
    const float4 u = m.left[c][0][thread], v = m.left[c][1][thread];
    x[0] = u.x, x[1] = u.y, x[2] = u.z, x[3] = u.w;
    x[4] = v.x, x[5] = v.y, x[6] = v.z, x[7] = v.w;
}

/* An octet's rows against the k of the octets before it, which then reach to its end; with the
 * last octet they are what the chunk leaves. */
__device__ inline void meet_earlier(const uint32_t (&rows)[CHANNELS / 2][4], int o,
                                    const float (&to_middle)[CHANNELS],
                                    const float (&to_end)[CHANNELS], prepare_memory &m,
                                    char *out)
{
#pragma unroll 1
    for (int c = 0; c < o; c++) {
        float k[CHANNELS];
        get_left(m, c, k);
        multiply_octets(rows, k, to_middle, m.part[warp_id() % PREPARERS][tile_of(o, c)]);
        if (o == OCTETS - 1) {
            write_piece(out, K_LEFT, c, pack(k, to_end));
        } else {
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) k[i] *= to_end[i];
            put_left(m, c, k);
        }
    }
}

/* Octet o, given its log2-decays; `before` are the sums of those of the octets before it. */
__device__ inline void prepare_octet(int o, const uint4 &raw_k, const uint4 &raw_q,
                                     float (&L)[CHANNELS], float k_factor, float q_factor,
                                     float (&before)[CHANNELS], prepare_memory &m, char *out)
{
    float k[CHANNELS], q[CHANNELS], middle[CHANNELS], total[CHANNELS], f[CHANNELS];
    float(*own)[OCTET][OCTET] = m.part[warp_id() % PREPARERS][tile_of(o, o)];
    unpack(raw_k, k_factor, k);
    unpack(raw_q, q_factor, q);
    sum_over_octet(L);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        middle[i] = __shfl_sync(ALL_LANES, L[i], 4 * (OCTET / 2 - 1) + lane_id() % 4);
        total[i] = __shfl_sync(ALL_LANES, L[i], 4 * (OCTET - 1) + lane_id() % 4);
        f[i] = exp2_approx(L[i] + before[i]);
        before[i] += total[i];
    }
    write_piece(out, K_DECAYED, o, pack(k, f));
    write_piece(out, Q_DECAYED, o, pack(q, f));

    bool steep = false;
    float above[CHANNELS]; /* L over the middle */
    uint32_t rows[CHANNELS / 2][4];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        above[i] = L[i] - middle[i];
        steep |= fabsf(above[i]) > STEEPEST;
    }
    steep = __any_sync(ALL_LANES, steep);
    if (steep) {
        steep_octet(k, q, L, own);
        /* The octet's start serves the earlier octets, then, for any decay. */
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) above[i] = L[i], middle[i] = 0;
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) f[i] = exp2_approx(above[i]);
    left_operands(k, q, f, rows);
    if (!steep) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) f[i] = exp2_approx(-above[i]);
        multiply_octets(rows, k, f, own);
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        k[i] *= exp2_approx(total[i] - L[i]);
        middle[i] = exp2_approx(middle[i]);
        total[i] = exp2_approx(total[i]);
    }
    meet_earlier(rows, o, middle, total, m, out);
    const float one[CHANNELS] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (o == OCTETS - 1)
        write_piece(out, K_LEFT, o, pack(k, one));
    else
        put_left(m, o, k);
}

/* The head's columns that a lane reads. */
struct lane_columns {
    long long qk, g;
    int channel;
};

__device__ inline lane_columns columns_of(const kda_arguments &a, const item &c)
{
    const int channel = warp_id() % PREPARERS * 32 + lane_id() % 4 * CHANNELS;
    const int hk = c.h / static_cast<int>(a.H / a.Hk);
    return {static_cast<long long>(hk) * KDA_K + channel,
            static_cast<long long>(c.h) * KDA_K + channel, channel};
}

/* What an octet needs from device memory. */
struct raw_octet {
    uint4 k, q;
    raw_gates g;

    __device__ raw_octet(const kda_arguments &a, const item &c, const lane_columns &at, int o)
        : k(load_piece(a.k, c, at.qk, o)), q(load_piece(a.q, c, at.qk, o)),
          g(load_gates(a.g, c, at.g, o))
    {
    }
};

__device__ inline void prepare_octets(const kda_arguments &a, const item &c,
                                      const lane_columns &at, prepare_memory &m, kda_chunk &out)
{
    const float *bias = a.dt_bias == nullptr ? nullptr : a.dt_bias + at.g;
    const head_gate gate = gate_of(a, c.h);
    float before[CHANNELS] = {};
    raw_octet next(a, c, at, 0);
#pragma unroll 1 /* four times the code would not stay in the instruction cache */
    for (int o = 0; o < OCTETS; o++) {
        const int row = OCTET * o + lane_id() / 4;
        const raw_octet x = next;
        if (o < OCTETS - 1) next = raw_octet(a, c, at, o + 1);
        float L[CHANNELS];
        unpack_gates(x.g, a.g.is_bf16, L);
        apply_gate(a, gate, row < c.tokens ? gate.outer : 0.0f, bias, L);
        const float k_factor = a.normalize ? norm_factor(m.squares[0][row]) : 1.0f;
        const float q_factor = a.normalize ? norm_factor(m.squares[1][row]) : 1.0f;
        prepare_octet(o, x.k, x.q, L, k_factor, q_factor * a.scale, before, m, lane_piece(out));
    }
    if (lane_id() / 4 > 0) return;
    float4 *to = reinterpret_cast<float4 *>(&m.total[at.channel]);
    to[0] = float4{before[0], before[1], before[2], before[3]};
    to[1] = float4{before[4], before[5], before[6], before[7]};
}

/* Sums of squares over a warp's channels. */
__device__ inline void sum_squares(const uint4 (&raw)[OCTETS], float (*to)[PREPARERS])
{
#pragma unroll
    for (int o = 0; o < OCTETS; o++) {
        float v[CHANNELS], sum = 0;
        unpack(raw[o], 1.0f, v);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) sum = fmaf(v[i], v[i], sum);
        sum = warp_sum<4>(sum);
        if (lane_id() % 4 == 0) to[OCTET * o + lane_id() / 4][warp_id() % PREPARERS] = sum;
    }
}

/* The factors that bring rows to unit length come from here; meanwhile() runs while they load. */
template <class F>
__device__ void find_squares(const kda_arguments &a, const item &c, const lane_columns &at,
                             prepare_memory &m, F meanwhile)
{
    uint4 k[OCTETS], q[OCTETS];
#pragma unroll
    for (int o = 0; o < OCTETS; o++) {
        k[o] = load_piece(a.k, c, at.qk, o);
        q[o] = load_piece(a.q, c, at.qk, o);
    }
    meanwhile();
    sum_squares(k, m.squares[0]);
    sum_squares(q, m.squares[1]);
}

/* Flags between blocks. Reads go past the L1; one that is to order what follows is an acquire,
 * which empties the L1, so polls are not. */
__device__ inline unsigned read_flag(const unsigned *p)
{
    unsigned x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ inline unsigned read_acquire(const unsigned *p)
{
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ inline void write_flag(unsigned *p, unsigned x)
{
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

/* What this thread wrote to device memory is there before the copy engine reads it. */
__device__ inline void fence_global_for_copies()
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

/* Until the chunk that lay in the item's slot has been copied by all tiles of its pair. */
__device__ inline void wait_for_room(const kda_plan &p, const item &c)
{
    for (int tile = 0; tile < p.tiles; tile++) {
        const unsigned *taken = &p.taken[(c.pair * p.tiles + tile) * KDA_FLAG];
        while (static_cast<int>(read_flag(taken) + p.slots - c.serial) <= 0) __nanosleep(200);
    }
}

/* A chunk that is written but not yet said to be. It is said when the group has begun the next:
 * by then the writes have arrived, and the release does not wait for them. */
struct announcement {
    unsigned *flag = nullptr;
    unsigned value;

    __device__ void say()
    {
        if (flag == nullptr) return;
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
        flag = nullptr;
    }
};

/* The rows of a chunk on their way to the L2, a line of 128 bytes a thread. */
__device__ inline void prefetch_rows(const kda_operand &x, const item &c, int head)
{
    const int element = x.is_bf16 ? 2 : 4, lines = KDA_K * element / 128;
    const char *from = static_cast<const char *>(x.data) +
                       (c.token * x.stride + static_cast<long long>(head) * KDA_K) * element;
    for (int i = threadIdx.x % GROUP; i < c.tokens * lines; i += GROUP)
        prefetch_line(from + i / lines * x.stride * element + i % lines * 128);
}

__device__ inline void prefetch_item(const kda_arguments &a, const item &c)
{
    const int hk = c.h / static_cast<int>(a.H / a.Hk);
    prefetch_rows(a.k, c, hk);
    prefetch_rows(a.q, c, hk);
    prefetch_rows(a.g, c, c.h);
}

__device__ inline void prepare_chunk(const kda_arguments &a, const kda_plan &p, const item &c,
                                     int group, prepare_memory &m, announcement &last)
{
    const int slot = c.pair * p.slots + static_cast<int>(c.serial % p.slots);
    const lane_columns at = columns_of(a, c);
    kda_chunk &out = p.ring[slot];
    load_beta(a, c, m);
    const auto say_last = [&] { last.say(); };
    if (a.normalize)
        find_squares(a, c, at, m, say_last);
    else
        say_last();
    if (threadIdx.x % GROUP == 0) wait_for_room(p, c); /* which may depend on what was said */
    group_barrier(group);
    prepare_octets(a, c, at, m, out);
    group_barrier(group);
    add_parts(m);
    write_decays(m, out);
    group_barrier(group);
    invert(m, group);
    write_squares(m, out);
    fence_global_for_copies();
    last = {&p.ready[slot * KDA_FLAG], c.serial + 1};
}

/* ---- all chunks -------------------------------------------------------------------------- */

/* Tickets go through the serials, and for each of them through the pairs. */
__device__ inline item item_of(const kda_arguments &a, const kda_plan &p,
                               const kda_lanes_of_call &lanes, unsigned ticket)
{
    const unsigned pair = ticket % p.pairs, serial = ticket / p.pairs;
    const int round = serial / lanes.longest, at = serial % lanes.longest;
    const int l = pair / p.groups, h = round * p.groups + pair % p.groups;
    item c = {
        .token = 0, .tokens = 0, .pair = static_cast<int>(pair), .h = h, .serial = serial};
    const kda_lane first = lanes.lane[l], end = lanes.lane[l + 1];
    const int number = first.number + at;
    if (h >= a.H || number >= end.number) return c;
    const int n = first.sequence + last_begun(end.sequence - first.sequence, [&](int i) {
                      return kda_first_number(a.cu, first.sequence + i) <= number;
                  });
    const int before = (number - kda_first_number(a.cu, n)) * KDA_TOKENS;
    const int left = kda_chunked_tokens(a.cu, n) - before;
    c.token = a.cu[n] + before;
    c.tokens = left < KDA_TOKENS ? left : KDA_TOKENS;
    return c;
}

__device__ inline void prepare_chunks(const kda_arguments &a, const kda_plan &p,
                                      const kda_lanes_of_call &lanes, int group,
                                      prepare_memory &m)
{
    const bool first = threadIdx.x % GROUP == 0;
    const unsigned tickets = static_cast<unsigned>(p.rounds) * lanes.longest * p.pairs;
    announcement last;
    /* Of M's octets above the diagonal two are read: they stay zero. */
    for (int i = threadIdx.x % GROUP; i < KDA_TOKENS * KDA_TOKENS / 2; i += GROUP)
        reinterpret_cast<uint32_t *>(m.M)[i] = 0;
    if (first) m.ticket[0] = atomicAdd(p.ticket, 2);
    group_barrier(group);
    unsigned ticket = m.ticket[0], next = ticket + 1, asked = 0;
    item c = item_of(a, p, lanes, ticket);
    for (int n = 1; ticket < tickets; n++) {
        if (first) asked = atomicAdd(p.ticket, 1); /* asked for now, needed after the chunk */
        const item d = item_of(a, p, lanes, next);
        if (next < tickets) prefetch_item(a, d);
        if (c.tokens > 0) prepare_chunk(a, p, c, group, m, last);
        if (first) m.ticket[n % 2] = asked;
        group_barrier(group); /* and the chunk is written */
        c = d, ticket = next, next = m.ticket[n % 2];
        if (!first) last.flag = nullptr;
    }
    if (first) last.say();
}

} // namespace kda

#endif
