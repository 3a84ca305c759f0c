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
 * octet the right one's is not; where eight tokens decay by more than 2^-63, m is the value in
 * the middle there, four tokens away at most, and if those decay by more than 2^-100, the octet's
 * own product is formed pair by pair from differences.
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

/* Where a lane puts its two neighbours of the 8 x 8 of A of a pair of octets, and PART further
 * those of M. Those of the next pair lie behind. */
using lane_part = float2 *;

__device__ inline lane_part lane_part_of(prepare_memory &m)
{
    const int thread = made_here(threadIdx.x % GROUP);
    float(*first)[OCTET] = m.part[thread / WARP][0][0];
    return reinterpret_cast<lane_part>(&first[thread / 4 % OCTET][thread % 4 * 2]);
}

/* An octet's rows against its own k, from differences of the sums L. Lane 4 g + 0 writes row g. */
__device__ inline void steep_octet(const float (&k)[CHANNELS], const float (&q)[CHANNELS],
                                   const float (&L)[CHANNELS], lane_part to)
{
    const int row = lane_id() / 4;
    float *const A = &to->x, *const M =
                                 &to[PART].x; /* of its first column, in its first lane */
#pragma unroll 1
    for (int d = 0; d < OCTET; d++) {
        float a = 0, b = 0;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            const float other = __shfl_up_sync(ALL_LANES, k[i], 4 * d);
            const float from = __shfl_up_sync(ALL_LANES, L[i], 4 * d);
            const float y = other * exp2_approx(fminf(L[i] - from, 0.0f));
            a = fmaf(k[i], y, a), b = fmaf(q[i], y, b);
        }
        a = warp_sum<4>(a), b = warp_sum<4>(b);
        if (lane_id() % 4 == 0 && row >= d) A[row - d] = a, M[row - d] = b;
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
                                       lane_part to)
{
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < CHANNELS / 2; s++) {
        const uint32_t b[2] = {to_tf32(k[2 * s]), to_tf32(k[2 * s + 1])};
        mma_tf32(sum, a[s], b);
    }
    to[0] = float2{sum[0], sum[1]}, to[PART] = float2{sum[2], sum[3]};
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
/* Numbers from 2^-63 to 1 have this bit of the exponent, and smaller ones have not. */
constexpr uint32_t IS_NEAR = 0x20000000u;

enum operand { K_DECAYED, Q_DECAYED, K_LEFT };
static_assert(offsetof(kda_chunk, q_decayed) == Q_DECAYED * sizeof(kda_chunk::k_decayed));
static_assert(offsetof(kda_chunk, k_left) == K_LEFT * sizeof(kda_chunk::k_decayed));

constexpr int OCTET_BYTES = OCTET * KDA_K; /* of half the channels */

__device__ inline void write_piece(char *lane, operand which, const uint4 &x)
{
    *reinterpret_cast<uint4 *>(lane + which * sizeof(kda_chunk::k_decayed)) = x;
}

/* ---- a chunk ----------------------------------------------------------------------------- */

/* Where the lane keeps its k of octet c < 3 times their decays up to the end of the latest octet,
 * half of the channels: in its own pieces of F k and where X is to come. The last octet writes
 * F k of an octet when it has read what the lane keeps there. */
__device__ inline float4 *left_piece(prepare_memory &m, char *lane, int c, int half)
{
    char *X = reinterpret_cast<char *>(m.chunk.X) + threadIdx.x % GROUP * 16;
    char *own = lane + K_LEFT * sizeof(kda_chunk::k_decayed) + 2 * c * OCTET_BYTES;
    return reinterpret_cast<float4 *>(c == 2 ? X + half * GROUP * 16
                                             : own + half * OCTET_BYTES);
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

/* Octet o's rows, over its start, against the k of the octets before it, which then reach to its
 * end; with the last octet they are what the chunk leaves. */
template <int o>
__device__ void meet_earlier(const left_rows &rows, const float (&end)[CHANNELS],
                             lane_part part, prepare_memory &m, char *out)
{
    float k[o][CHANNELS];
#pragma unroll
    for (int c = 0; c < o; c++) get_left(m, out, c, k[c]);
#pragma unroll
    for (int c = 0; c < o; c++) {
        multiply_octets(rows, k[c], part + 2 * PART * c);
        if constexpr (o == OCTETS - 1) {
            write_piece(out + c * OCTET_BYTES, K_LEFT, pack(k[c], end));
        } else {
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) k[c][i] *= end[i];
            put_left(m, out, c, k[c]);
        }
    }
}

/* The rows as they have been since the chunk's start, E k and E q. */
__device__ inline void write_rows(const left_rows &a, const float (&start)[CHANNELS], char *out)
{
    uint32_t k[CHANNELS / 2], q[CHANNELS / 2];
#pragma unroll
    for (int s = 0; s < CHANNELS / 2; s++) {
        const float x = start[2 * s], y = start[2 * s + 1];
        k[s] = pack_bf16(__uint_as_float(a[s][0]) * x, __uint_as_float(a[s][2]) * y);
        q[s] = pack_bf16(__uint_as_float(a[s][1]) * x, __uint_as_float(a[s][3]) * y);
    }
    write_piece(out, K_DECAYED, uint4{k[0], k[1], k[2], k[3]});
    write_piece(out, Q_DECAYED, uint4{q[0], q[1], q[2], q[3]});
}

/* An octet's own product, and its k up to its end, where that may be 2^-63 or less. */
__device__ inline void meet_itself_far(float (&k)[CHANNELS], const float (&q)[CHANNELS],
                                       const float (&L)[CHANNELS], lane_part own)
{
    constexpr int MIDDLE_ROW = 4 * (OCTET / 2 - 1); /* its first lane */
    float above[CHANNELS];
    bool steep = false;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        above[i] = L[i] - __shfl_sync(ALL_LANES, L[i], MIDDLE_ROW + lane_id() % 4);
        steep |= fabsf(above[i]) > STEEPEST;
    }
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

/* Whether an octet fades by 2^-63 or more in some channel. */
__device__ inline bool is_far(const float (&end)[CHANNELS])
{
    uint32_t common = IS_NEAR;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) common &= __float_as_uint(end[i]);
    return __any_sync(ALL_LANES, common == 0);
}

/* An octet's own product otherwise; its k reach to its end then. */
__device__ inline void meet_itself(float (&k)[CHANNELS], const float (&L)[CHANNELS],
                                   const float (&end)[CHANNELS], const left_rows &rows,
                                   lane_part own)
{
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) k[i] *= exp2_approx(-L[i]);
    multiply_octets(rows, k, own);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) k[i] *= end[i];
}

/* The octet's log2-decays, in the order in which they lie in registers. */
__device__ inline void put_total(const float (&x)[CHANNELS], float *to)
{
    if (lane_id() >= 4) return;
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i++)
        *reinterpret_cast<float2 *>(to + lane_channel() + 2 * i) = float2{x[i], x[4 + i]};
}

/* An octet on its way. */
struct octet {
    float k[CHANNELS], q[CHANNELS];
    float L[CHANNELS], end[CHANNELS]; /* log2-decays' sums; 2^ the last */
    left_rows rows;
};

/* An octet's rows, over its start and over the chunk's, given its log2-decays; `start` are the
 * decays of the octets before it. */
__device__ inline void put_rows(octet &x, int o, int left, const lane_gates &decays,
                                float (&start)[CHANNELS], prepare_memory &m, char *out)
{
    float f[CHANNELS];
    sum_over_octet(decays, left, x.L, x.end);
    put_total(x.end, m.total[o]);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
        f[i] = exp2_approx(x.L[i]), x.end[i] = exp2_approx(x.end[i]);
    left_operands(x.k, x.q, f, x.rows);
    write_rows(x.rows, start, out + o * OCTET_BYTES);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) start[i] *= x.end[i];
}

/* Its k reach to its end then. `part` is where A and M of octets (o, 0) go. */
template <int o>
__device__ inline void end_octet(octet &x, lane_part part, prepare_memory &m, char *out)
{
    if constexpr (o > 0) meet_earlier<o>(x.rows, x.end, part, m, out);
    if constexpr (o < OCTETS - 1) {
        put_left(m, out, o, x.k);
    } else {
        const float one[CHANNELS] = {1, 1, 1, 1, 1, 1, 1, 1};
        write_piece(out + o * OCTET_BYTES, K_LEFT, pack(x.k, one));
    }
}

/* Any but the last. */
__device__ inline void end_octet(int o, octet &x, lane_part part, prepare_memory &m, char *out)
{
    if (o == 0)
        end_octet<0>(x, part, m, out);
    else if (o == 1)
        end_octet<1>(x, part, m, out);
    else
        end_octet<2>(x, part, m, out);
}

/* What an octet needs from device memory: the lane's pieces of its row. */
struct raw_octet {
    uint4 k, q;
    raw_gates g;
};

/* One sum from here on, where a compiler would add its terms anew for each row. */
__device__ inline void keep_whole(const char *&p)
{
    asm("" : "+l"(p));
}

/* A lane's column of an operand in a chunk. */
struct lane_column {
    const char *first; /* of the lane's piece in the chunk's first row */
    long long stride;  /* elements between rows, of so many bytes      */
    unsigned bytes, last;

    __device__ lane_column(const kda_operand &x, const item &c, int head, int channel,
                           unsigned bytes)
        : stride(x.stride), bytes(bytes), last((c.tokens - 1) * bytes)
    {
        first = static_cast<const char *>(x.data) +
                (c.token * stride + static_cast<long long>(head) * KDA_K + channel) * bytes;
        keep_whole(first);
    }

    /* Past the last token its piece again: such a token's b and log-decays count as 0. */
    __device__ const char *piece(unsigned row) const
    {
        return first + static_cast<unsigned long long>(min(row * bytes, last)) * stride;
    }
};

/* The lane's gates, an octet after the other: of bf16, or of what the call says. */
template <bool is_bf16> struct gate_column {
    lane_column g;
    bool is_short;

    __device__ gate_column(const kda_arguments &a, const item &c)
        : g(a.g, c, c.h, gate_channel(), is_bf16 ? sizeof(bf16) : a.g.element()),
          is_short(is_bf16 || a.g.is_bf16)
    {
    }

    template <class T> __device__ void read_as(raw_gates &to, int o) const
    {
        const int row = OCTET * o + made_here(lane_id()) % 4;
#pragma unroll
        for (int t = 0; t < 2; t++)
            *reinterpret_cast<T *>(&to.x[t]) =
                __ldcs(reinterpret_cast<const T *>(g.piece(row + t * OCTET / 2)));
    }

    __device__ void read(raw_gates &to, int o) const
    {
        if (is_short)
            read_as<uint2>(to, o);
        else
            read_as<uint4>(to, o);
    }
};

/* Goes through the octets of a chunk. */
template <bool gates_are_bf16> struct octet_reader {
    lane_column k, q;
    gate_column<gates_are_bf16> g;

    __device__ octet_reader(const kda_arguments &a, const item &c)
        : k(a.k, c, c.hk, lane_channel(), 2), q(a.q, c, c.hk, lane_channel(), 2), g(a, c)
    {
    }

    __device__ void read(raw_octet &to, int o) const
    {
        const int row = OCTET * o + made_here(lane_id()) / 4;
        to.k = __ldg(reinterpret_cast<const uint4 *>(k.piece(row)));
        to.q = __ldg(reinterpret_cast<const uint4 *>(q.piece(row)));
        g.read(to.g, o);
    }
};

/* Sums of squares over a warp's channels: the diagonal of an octet's rows times themselves, k
 * above q. */
__device__ inline void sum_squares(const raw_octet &x, int o, prepare_memory &m)
{
    const uint32_t low[4] = {x.k.x, x.q.x, x.k.y, x.q.y};
    const uint32_t high[4] = {x.k.z, x.q.z, x.k.w, x.q.w};
    float of_k[4] = {0, 0, 0, 0}, of_q[4] = {0, 0, 0, 0};
    mma_bf16(of_k, low, {x.k.x, x.k.y});
    mma_bf16(of_q, low, {x.q.x, x.q.y});
    mma_bf16(of_k, high, {x.k.z, x.k.w});
    mma_bf16(of_q, high, {x.q.z, x.q.w});
    const int lane = made_here(lane_id()), row = lane / 4, warp = warp_id() % PREPARERS;
    const bool has_diagonal = lane % 4 == row / 2;
    store_if(has_diagonal, m.squares[0][OCTET * o + row][warp], row % 2 ? of_k[1] : of_k[0]);
    store_if(has_diagonal, m.squares[1][OCTET * o + row][warp], row % 2 ? of_q[3] : of_q[2]);
}

/* To length 1, by the sums of squares. */
__device__ inline void normalize_octet(float (&k)[CHANNELS], float (&q)[CHANNELS], int o,
                                       const prepare_memory &m)
{
    const float2 s = squares_of(m, OCTET * o + lane_id() / 4);
    const float of_k = kda_unit_factor(s.x), of_q = kda_unit_factor(s.y);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) k[i] *= of_k, q[i] *= of_q;
}

/* Octet o up to its own product. `raw` is that octet, and the next one afterwards. */
template <bool is_raw, kl_gate kind, class Reader>
__device__ inline void begin_octet(octet &x, int o, const kda_arguments &a, const item &c,
                                   const head_gate<kind> &gate, const Reader &from,
                                   raw_octet &raw, float (&start)[CHANNELS], prepare_memory &m,
                                   char *out)
{
    lane_gates decays;
    unpack(raw.k, x.k);
    unpack(raw.q, x.q);
    unpack_gates(raw.g, from.g.is_short, decays);
    apply_gate(gate, &m.bias[gate_channel()], decays);
    if (is_raw)
        sum_squares(raw, o, m);
    else
        normalize_octet(x.k, x.q, o, m);
    if (o < OCTETS - 1) from.read(raw, o + 1);
    put_rows(x, o, c.tokens - OCTET * o, decays, start, m, out);
}

/* `raw` is the first octet. Rows stay as they are, and the factors that bring them to unit length
 * are found on the way; or, given these, they are multiplied.
 *
 * A loop around the loop: ptxas lays code before what it joins. A branch that joins the loop's body
 * again lies in its middle, for all octets to jump over; far octets leave the loop and come back by
 * the outer one, so that they lie behind it.
 */
template <bool is_raw, kl_gate kind, class Reader>
__device__ void prepare_octets(const kda_arguments &a, const item &c,
                               const head_gate<kind> &gate, const Reader &from, raw_octet &raw,
                               prepare_memory &m)
{
    float start[CHANNELS] = {1, 1, 1, 1, 1, 1, 1, 1};
    lane_part part = lane_part_of(m);
    char *out = lane_piece(m.chunk);
    octet x;
    for (int o = 0;;) {
        bool far;
#pragma unroll 1 /* four times the code would not stay in the instruction cache */
        for (;;) {
            begin_octet<is_raw>(x, o, a, c, gate, from, raw, start, m, out);
            far = is_far(x.end);
            if (far) break;
            meet_itself(x.k, x.L, x.end, x.rows, part + 2 * PART * o);
            if (o == OCTETS - 1) break;
            const int now = o;
            const lane_part its = part;
            part += 2 * PART * ++o; /* here, so that each octet's end is a jump to the next */
            end_octet(now, x, its, m, out);
        }
        if (!far) break;
        meet_itself_far(x.k, x.q, x.L, part + 2 * PART * o);
        if (o == OCTETS - 1) break;
        end_octet(o, x, part, m, out);
        part += 2 * PART * ++o;
    }
    end_octet<OCTETS - 1>(x, part, m, out);
}

} // namespace kda

#endif
