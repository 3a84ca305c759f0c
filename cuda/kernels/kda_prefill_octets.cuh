/*
 * kda_prefill_octets.cuh -- k and q of a chunk times their products of decays, and the sums over
 * channels that A and M are made of, an octet of tokens after the other.
 *
 * The lanes' places are those of the operands of an m16n8k8 product over channels, for any order
 * of the channels that both sides share: so these come from registers. An octet's rows, its k
 * above its q, meet the k of its own and of earlier octets:
 *     sum_d x_i k_j 2^(L_i - L_j) = sum_d (x_i 2^(L_i - m)) (k_j 2^(m - L_j))
 * with L the sums of log2-decays and m their value where the octet starts, 0: against earlier
 * octets both exponents are negative then, and the left factor is what E x is made of. Within the
 * octet the right one's is not; where eight tokens decay by more than 2^-100, m is the value in
 * the middle there, four tokens away at most, and if those decay by as much, the octet's own
 * product is formed pair by pair from differences.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_OCTETS_H
#define KL_CUDA_KERNELS_KDA_PREFILL_OCTETS_H

#include "kda_prefill_group.cuh"

namespace kda {

/* The lane's first channel of a head. */
__device__ inline int lane_channel()
{
    return warp_id() % PREPARERS * 32 + lane_id() % 4 * CHANNELS;
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

/* Cut off, not rounded: see LOST_TO_TF32. */
__device__ inline uint32_t to_tf32(float x)
{
    return __float_as_uint(x);
}

/* Left operands of m16n8k8, for the lane's channels 2 s and 2 s + 1: rows of k above rows of q. */
using left_rows = uint32_t[CHANNELS / 2][4];

__device__ inline void left_operands(const float (&k)[CHANNELS], const float (&q)[CHANNELS],
                                     const float (&f)[CHANNELS], left_rows &a)
{
#pragma unroll
    for (int s = 0; s < CHANNELS / 2; s++) {
        a[s][0] = to_tf32(k[2 * s] * f[2 * s]), a[s][1] = to_tf32(q[2 * s] * f[2 * s]);
        a[s][2] = to_tf32(k[2 * s + 1] * f[2 * s + 1]);
        a[s][3] = to_tf32(q[2 * s + 1] * f[2 * s + 1]);
    }
}

/* An octet's rows against the k of an octet: 8 x 8 of A and of M, over the warp's channels. */
__device__ inline void multiply_octets(const left_rows &a, const float (&k)[CHANNELS],
                                       float (*to)[OCTET][OCTET])
{
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < CHANNELS / 2; s++) {
        const uint32_t b[2] = {to_tf32(k[2 * s]), to_tf32(k[2 * s + 1])};
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

constexpr int LAST_ROW = 4 * (OCTET - 1); /* its first lane */
constexpr float FURTHEST = 0x1p-100f;     /* 2^-STEEPEST     */

enum operand { K_DECAYED, Q_DECAYED, K_LEFT };
static_assert(offsetof(kda_chunk, q_decayed) == Q_DECAYED * sizeof(kda_chunk::k_decayed));
static_assert(offsetof(kda_chunk, k_left) == K_LEFT * sizeof(kda_chunk::k_decayed));

__device__ inline void write_piece(char *lane, operand which, int o, const uint4 &x)
{
    *reinterpret_cast<uint4 *>(lane + which * sizeof(kda_chunk::k_decayed) +
                               o * OCTET * KDA_K) = x;
}

/* ---- a chunk ----------------------------------------------------------------------------- */

/* Where the lane keeps its k of octet c < 3 times their decays up to the end of the latest octet,
 * half of the channels: in its own pieces of F k and, octet 1, where X is to come. The last octet
 * writes F k of an octet when it has read what the lane keeps there. */
__device__ inline float4 *left_piece(prepare_memory &m, char *lane, int c, int half)
{
    char *X = reinterpret_cast<char *>(m.chunk.X) + threadIdx.x % GROUP * 16;
    char *own = lane + K_LEFT * sizeof(kda_chunk::k_decayed) + c * OCTET * KDA_K;
    return reinterpret_cast<float4 *>(c == 1 ? X + half * GROUP * 16
                                             : own + half * OCTET * KDA_K);
}

__device__ inline void put_left(prepare_memory &m, char *lane, int c,
                                const float (&x)[CHANNELS])
{
    *left_piece(m, lane, c, 0) = float4{x[0], x[1], x[2], x[3]};
    *left_piece(m, lane, c, 1) = float4{x[4], x[5], x[6], x[7]};
}

__device__ inline void get_left(prepare_memory &m, char *lane, int c, float (&x)[CHANNELS])
{
    const float4 u = *left_piece(m, lane, c, 0), v = *left_piece(m, lane, c, 1);
    x[0] = u.x, x[1] = u.y, x[2] = u.z, x[3] = u.w;
    x[4] = v.x, x[5] = v.y, x[6] = v.z, x[7] = v.w;
}

/* An octet's rows, over its start, against the k of the octets before it, which then reach to its
 * end; with the last octet they are what the chunk leaves. */
__device__ inline void meet_earlier(const left_rows &rows, int o, const float (&end)[CHANNELS],
                                    prepare_memory &m, char *out)
{
#pragma unroll 1
    for (int c = 0; c < o; c++) {
        float k[CHANNELS];
        get_left(m, out, c, k);
        multiply_octets(rows, k, m.part[warp_id() % PREPARERS][tile_of(o, c)]);
        if (o == OCTETS - 1) {
            write_piece(out, K_LEFT, c, pack(k, end));
        } else {
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) k[i] *= end[i];
            put_left(m, out, c, k);
        }
    }
}

/* The rows as they have been since the chunk's start, E k and E q. */
__device__ inline void write_rows(const left_rows &a, const float (&start)[CHANNELS], int o,
                                  char *out)
{
    uint32_t k[CHANNELS / 2], q[CHANNELS / 2];
#pragma unroll
    for (int s = 0; s < CHANNELS / 2; s++) {
        const float x = start[2 * s], y = start[2 * s + 1];
        k[s] = pack_bf16(__uint_as_float(a[s][0]) * x, __uint_as_float(a[s][2]) * y);
        q[s] = pack_bf16(__uint_as_float(a[s][1]) * x, __uint_as_float(a[s][3]) * y);
    }
    write_piece(out, K_DECAYED, o, uint4{k[0], k[1], k[2], k[3]});
    write_piece(out, Q_DECAYED, o, uint4{q[0], q[1], q[2], q[3]});
}

/* An octet's own product, and its k up to its end, where that may be 2^-STEEPEST or less. */
__device__ inline void meet_itself_far(float (&k)[CHANNELS], const float (&q)[CHANNELS],
                                       const float (&L)[CHANNELS],
                                       const float (&above)[CHANNELS],
                                       float (*own)[OCTET][OCTET])
{
    bool steep = false;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) steep |= fabsf(above[i]) > STEEPEST;
    if (__any_sync(ALL_LANES, steep)) {
        steep_octet(k, q, L, own);
    } else {
        float f[CHANNELS], other[CHANNELS];
        left_rows rows;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            f[i] = exp2_approx(above[i]);
            other[i] = k[i] * exp2_approx(-above[i]);
        }
        left_operands(k, q, f, rows);
        multiply_octets(rows, other, own);
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
        k[i] *= exp2_approx(__shfl_sync(ALL_LANES, L[i], LAST_ROW + lane_id() % 4) - L[i]);
}

/* The sums of an octet's log2-decays to the chunk's, by the lanes that have its last row. */
__device__ inline void add_to_total(const float (&L)[CHANNELS], int o, prepare_memory &m)
{
    if (lane_id() < LAST_ROW) return;
    float *total = &m.total[lane_channel()], x[CHANNELS] = {};
    if (o > 0) load_floats(total, x);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) x[i] += L[i];
    store_floats(total, x);
}

/* Octet o, given its log2-decays; `start` are the decays of those before it. */
__device__ inline void prepare_octet(int o, float (&k)[CHANNELS], const float (&q)[CHANNELS],
                                     const lane_gates &decays, float (&start)[CHANNELS],
                                     prepare_memory &m, char *out)
{
    float L[CHANNELS], above[CHANNELS]; /* sums of log2-decays; the same over the middle's */
    float f[CHANNELS], end[CHANNELS];
    left_rows rows;
    bool far = false;
    float(*own)[OCTET][OCTET] = m.part[warp_id() % PREPARERS][tile_of(o, o)];
    sum_over_octet(decays, L, above);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        f[i] = exp2_approx(L[i]);
        end[i] = __shfl_sync(ALL_LANES, f[i], LAST_ROW + lane_id() % 4);
        far |= !(end[i] >= FURTHEST);
    }
    add_to_total(L, o, m);
    left_operands(k, q, f, rows);
    write_rows(rows, start, o, out);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) start[i] *= end[i];
    if (__any_sync(ALL_LANES, far)) {
        meet_itself_far(k, q, L, above, own);
    } else {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) k[i] *= exp2_approx(-L[i]);
        multiply_octets(rows, k, own);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) k[i] *= end[i];
    }
    meet_earlier(rows, o, end, m, out);
    const float one[CHANNELS] = {1, 1, 1, 1, 1, 1, 1, 1};
    if (o == OCTETS - 1)
        write_piece(out, K_LEFT, o, pack(k, one));
    else
        put_left(m, out, o, k);
}

/* The head's columns that a lane reads. */
struct lane_columns {
    long long qk, g;
};

__device__ inline lane_columns columns_of(const item &c)
{
    return {static_cast<long long>(c.hk) * KDA_K + lane_channel(),
            static_cast<long long>(c.h) * KDA_K + gate_channel()};
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
                                      const lane_columns &at, prepare_memory &m)
{
    const head_gate gate = gate_of(a, c.h);
    float start[CHANNELS] = {1, 1, 1, 1, 1, 1, 1, 1};
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
        prepare_octet(o, k, q, decays, start, m, lane_piece(m.chunk));
    }
}

} // namespace kda

#endif
