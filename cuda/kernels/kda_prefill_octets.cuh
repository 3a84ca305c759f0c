/*
 * kda_prefill_octets.cuh -- k and q of a chunk times their products of decays, and the sums over
 * channels that A and M are made of, an octet of tokens after the other.
 *
 * The lanes' places are those of the operands of an m16n8k8 product over channels, for any order
 * of the channels that both sides share: so these come from registers. An octet's rows, its k
 * above its q, meet the k of its own and of earlier octets:
 *     sum_d x_i k_j 2^(L_i - L_j) = sum_d (x_i 2^(L_i - m)) (k_j 2^(m - L_j))
 * with L the sums of log2-decays and m their value in the middle of i's octet. Against earlier
 * octets the right factor's exponent is negative and the left one's reaches back four tokens at
 * most; within the octet both span four tokens. If four tokens decay by more than 2^-100, the
 * octet's own product is formed pair by pair from differences, and m is its start.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_OCTETS_H
#define KL_CUDA_KERNELS_KDA_PREFILL_OCTETS_H

#include "kda_prefill_group.cuh"

namespace kda {

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

/* Cut off, not rounded: see LOST_TO_TF32. */
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

/* ---- results ----------------------------------------------------------------------------- */

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
__device__ inline void prepare_octet(int o, float (&k)[CHANNELS], const float (&q)[CHANNELS],
                                     const lane_gates &decays, float (&before)[CHANNELS],
                                     prepare_memory &m, char *out)
{
    float L[CHANNELS], above[CHANNELS]; /* sums of log2-decays; the same over the middle's */
    float middle[CHANNELS], total[CHANNELS], f[CHANNELS];
    float(*own)[OCTET][OCTET] = m.part[warp_id() % PREPARERS][tile_of(o, o)];
    sum_over_octet(decays, L, above);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        middle[i] = L[i] - above[i];
        total[i] = __shfl_sync(ALL_LANES, L[i], 4 * (OCTET - 1) + lane_id() % 4);
        f[i] = exp2_approx(L[i] + before[i]);
        before[i] += total[i];
    }
    write_piece(out, K_DECAYED, o, pack(k, f));
    write_piece(out, Q_DECAYED, o, pack(q, f));

    bool steep = false;
    uint32_t rows[CHANNELS / 2][4];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) steep |= fabsf(above[i]) > STEEPEST;
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

__device__ inline lane_columns columns_of(const item &c)
{
    const int channel = warp_id() % PREPARERS * 32 + lane_id() % 4 * CHANNELS;
    return {static_cast<long long>(c.hk) * KDA_K + channel,
            static_cast<long long>(c.h) * KDA_K + gate_channel(), channel};
}

/* What an octet needs from device memory: the lane's pieces of its row. */
struct raw_octet {
    uint4 k, q;
    raw_gates g;
};

/* Goes through the octets of a chunk. */
struct octet_reader {
    const kda_arguments &a;
    const char *k, *q, *g;
    long long g_stride; /* in bytes */
    int left;           /* tokens from the octet's first on */

    __device__ octet_reader(const kda_arguments &a, const item &c, const lane_columns &at)
        : a(a), k(piece(a.k, c, lane_id() / 4, at.qk)), q(piece(a.q, c, lane_id() / 4, at.qk)),
          g(piece(a.g, c, lane_id() % 4, at.g)), g_stride(a.g.stride * bytes_of(a.g)),
          left(c.tokens)
    {
    }

    __device__ static int bytes_of(const kda_operand &x) { return x.is_bf16 ? 2 : 4; }

    __device__ static const char *piece(const kda_operand &x, const item &c, int row,
                                        long long column)
    {
        return static_cast<const char *>(x.data) +
               ((c.token + row) * x.stride + column) * bytes_of(x);
    }

    /* whole: the octet has all its tokens. */
    template <class T, bool whole> __device__ void read_gates(raw_gates &to) const
    {
        constexpr int HALF = OCTET / 2;
        const int first = lane_id() % 4;
        const auto read = [](uint4 &x, const char *from) {
            *reinterpret_cast<T *>(&x) = __ldcs(reinterpret_cast<const T *>(from));
        };
        if (whole || first < left) read(to.x[0], g);
        if (whole || first + HALF < left) read(to.x[1], g + HALF * g_stride);
    }

    template <bool whole> __device__ void read_octet(raw_octet &to) const
    {
        if (whole || lane_id() / 4 < left) {
            to.k = *reinterpret_cast<const uint4 *>(k);
            to.q = *reinterpret_cast<const uint4 *>(q);
        }
        if (a.g.is_bf16)
            read_gates<uint2, whole>(to.g);
        else
            read_gates<uint4, whole>(to.g);
    }

    /* Zeros past the last token. */
    __device__ void read(raw_octet &to)
    {
        if (left >= OCTET) {
            read_octet<true>(to);
        } else {
            to = {};
            read_octet<false>(to);
        }
        left -= OCTET;
        k += OCTET * 2 * a.k.stride, q += OCTET * 2 * a.q.stride, g += OCTET * g_stride;
    }
};

/* What brings a row of k, and of q, to unit length. */
__device__ inline float2 factors_of(const prepare_memory &m, int row, bool normalize)
{
    if (!normalize) return float2{1.0f, 1.0f};
    return float2{norm_factor(m.squares[0][row]), norm_factor(m.squares[1][row])};
}

__device__ inline void prepare_octets(const kda_arguments &a, const item &c,
                                      const lane_columns &at, prepare_memory &m, kda_chunk &out)
{
    const head_gate gate = gate_of(a, c.h);
    float before[CHANNELS] = {};
    octet_reader from(a, c, at);
    raw_octet x;
    from.read(x);
#pragma unroll 1 /* four times the code would not stay in the instruction cache */
    for (int o = 0; o < OCTETS; o++) {
        const int row = OCTET * o + lane_id() / 4;
        const float2 factor = factors_of(m, row, a.normalize);
        float k[CHANNELS], q[CHANNELS];
        lane_gates decays;
        unpack(x.k, factor.x, k);
        unpack(x.q, factor.y * a.scale, q);
        unpack_gates(x.g, a.g.is_bf16, decays);
        apply_gate(a, gate, c.tokens - OCTET * o, &m.bias[gate_channel()], decays);
        if (o < OCTETS - 1) from.read(x);
        prepare_octet(o, k, q, decays, before, m, lane_piece(out));
    }
    if (lane_id() / 4 > 0) return;
    float4 *to = reinterpret_cast<float4 *>(&m.total[at.channel]);
    to[0] = float4{before[0], before[1], before[2], before[3]};
    to[1] = float4{before[4], before[5], before[6], before[7]};
}

} // namespace kda

#endif
