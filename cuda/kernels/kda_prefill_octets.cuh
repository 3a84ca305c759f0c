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
__device__ inline int lane_channel(unsigned thread)
{
    return thread / WARP * 32 + thread % 4 * CHANNELS;
}

/* ---- A and M ----------------------------------------------------------------------------- */

/* Where a lane puts its two neighbours of the 8 x 8 of A of a pair of octets, and PART further
 * those of M. Those of the next pair lie behind. */
using lane_part = float2 *;

__device__ inline lane_part lane_part_of(prepare_memory &m, int o, unsigned thread)
{
    const int warp = thread / WARP;
    const int tile =
        o < OCTETS - 1 ? EARLY_TILES * warp + tile_of(o, 0) : EARLY_TILES + OCTETS * warp;
    return reinterpret_cast<lane_part>(m.part[tile]) + thread % WARP;
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
__device__ inline char *lane_piece(kda_chunk &out, unsigned thread)
{
    const unsigned piece = thread / WARP * 4 + thread % 4, row = thread / 4 % OCTET;
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
__device__ inline float4 *left_piece(prepare_memory &m, char *lane, unsigned thread, int c,
                                     int half)
{
    char *X = reinterpret_cast<char *>(m.chunk.X) + thread * 16;
    char *own = lane + K_LEFT * sizeof(kda_chunk::k_decayed) + 2 * c * OCTET_BYTES;
    return reinterpret_cast<float4 *>(c == 2 ? X + half * GROUP * 16
                                             : own + half * OCTET_BYTES);
}

__device__ inline void put_left(prepare_memory &m, char *lane, unsigned thread, int c,
                                const float (&x)[CHANNELS])
{
    *left_piece(m, lane, thread, c, 0) = float4{x[0], x[1], x[2], x[3]};
    *left_piece(m, lane, thread, c, 1) = float4{x[4], x[5], x[6], x[7]};
}

__device__ inline void get_left(prepare_memory &m, char *lane, unsigned thread, int c,
                                float (&x)[CHANNELS])
{
    const float4 u = *left_piece(m, lane, thread, c, 0), v = *left_piece(m, lane, thread, c, 1);
    x[0] = u.x, x[1] = u.y, x[2] = u.z, x[3] = u.w;
    x[4] = v.x, x[5] = v.y, x[6] = v.z, x[7] = v.w;
}

/* Octet o's rows, over its start, against the k of the octets before it, which then reach to its
 * end; with the last octet they are what the chunk leaves. The next k are on their way meanwhile.
 */
template <int o>
__device__ void meet_earlier(const left_rows &rows, const float (&end)[CHANNELS],
                             lane_part part, unsigned thread, prepare_memory &m, char *out)
{
    float k[2][CHANNELS];
    get_left(m, out, thread, 0, k[0]);
#pragma unroll
    for (int c = 0; c < o; c++) {
        float(&x)[CHANNELS] = k[c % 2];
        if (c + 1 < o) get_left(m, out, thread, c + 1, k[(c + 1) % 2]);
        multiply_octets(rows, x, part + 2 * PART * c);
        if constexpr (o == OCTETS - 1) {
            write_piece(out + c * OCTET_BYTES, K_LEFT, pack(x, end));
        } else {
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) x[i] *= end[i];
            put_left(m, out, thread, c, x);
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

/* Sums of the octets' log2-decays, in the order in which they lie in registers. */
__device__ inline float2 *lane_totals(prepare_memory &m, unsigned thread)
{
    return reinterpret_cast<float2 *>(totals_of(m) + lane_channel(thread));
}

__device__ inline void begin_totals(prepare_memory &m)
{
    const unsigned thread = made_here(threadIdx.x % GROUP);
    if (thread % WARP >= 4) return;
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i++) lane_totals(m, thread)[i] = float2{0, 0};
}

__device__ inline void add_total(const float (&x)[CHANNELS], unsigned thread, prepare_memory &m)
{
    if (thread % WARP >= 4) return;
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i++) {
        float2 &total = lane_totals(m, thread)[i];
        total = float2{total.x + x[i], total.y + x[4 + i]};
    }
}

/* What an octet needs from device memory: the lane's pieces of its row. */
struct raw_octet {
    uint4 k, q;
    raw_gates g;
};

__device__ inline int gate_bytes(const kda_arguments &a)
{
    return a.g.is_bf16 ? 2 : 4;
}

__device__ inline const char *first_row_of(const kda_operand &x, const item &c, int head,
                                           int bytes)
{
    return static_cast<const char *>(x.data) +
           (c.token * x.stride + static_cast<long long>(head) * KDA_K) * bytes;
}

__device__ inline chunk_rows rows_of(const kda_arguments &a, const item &c)
{
    return {first_row_of(a.k, c, c.hk, 2), first_row_of(a.q, c, c.hk, 2),
            first_row_of(a.g, c, c.h, gate_bytes(a))};
}

/* Bytes from a chunk's first row to another one. Past the last token that one's again: such a
 * token's b and log-decays count as 0. */
__device__ inline unsigned long long row_offset(const kda_operand &x, const item &c,
                                                unsigned row, unsigned bytes)
{
    const unsigned at = min(row, static_cast<unsigned>(c.tokens) - 1);
    return static_cast<unsigned long long>(at * bytes) * x.stride;
}

/* An octet's gates, read once. */
template <class T>
__device__ void read_gates(const kda_arguments &a, const item &c, const chunk_rows &rows,
                           raw_gates &to, int o, unsigned thread)
{
#pragma unroll
    for (int t = 0; t < 2; t++) {
        const int row = OCTET * o + thread % 4 + t * OCTET / 2;
        const char *from = rows.g + gate_channel(thread) * gate_bytes(a) +
                           row_offset(a.g, c, row, gate_bytes(a));
        *reinterpret_cast<T *>(&to.x[t]) = __ldcs(reinterpret_cast<const T *>(from));
    }
}

__device__ inline uint4 read_row(const kda_operand &x, const item &c, const char *first, int o,
                                 unsigned thread)
{
    const char *from =
        first + lane_channel(thread) * 2 + row_offset(x, c, OCTET * o + thread % WARP / 4, 2);
    return __ldg(reinterpret_cast<const uint4 *>(from)); /* says that it is device memory */
}

__device__ inline void read_octet(const kda_arguments &a, const item &c, const chunk_rows &rows,
                                  raw_octet &to, int o, unsigned thread)
{
    to.k = read_row(a.k, c, rows.k, o, thread);
    to.q = read_row(a.q, c, rows.q, o, thread);
    if (a.g.is_bf16)
        read_gates<uint2>(a, c, rows, to.g, o, thread);
    else
        read_gates<uint4>(a, c, rows, to.g, o, thread);
}

/* Sums of squares over a warp's channels: the diagonal of an octet's rows times themselves, k
 * above q. */
__device__ inline void sum_squares(const raw_octet &x, int o, unsigned thread,
                                   prepare_memory &m)
{
    const uint32_t low[4] = {x.k.x, x.q.x, x.k.y, x.q.y};
    const uint32_t high[4] = {x.k.z, x.q.z, x.k.w, x.q.w};
    float of_k[4] = {0, 0, 0, 0}, of_q[4] = {0, 0, 0, 0};
    mma_bf16(of_k, low, {x.k.x, x.k.y});
    mma_bf16(of_q, low, {x.q.x, x.q.y});
    mma_bf16(of_k, high, {x.k.z, x.k.w});
    mma_bf16(of_q, high, {x.q.z, x.q.w});
    const int row = thread % WARP / 4, warp = thread / WARP;
    if (thread % 4 != row / 2) return;
    m.squares[0][OCTET * o + row][warp] = row % 2 ? of_k[1] : of_k[0];
    m.squares[1][OCTET * o + row][warp] = row % 2 ? of_q[3] : of_q[2];
}

/* To length 1, by the sums of squares. */
__device__ inline void normalize_octet(float (&k)[CHANNELS], float (&q)[CHANNELS], int o,
                                       unsigned lane, const prepare_memory &m)
{
    const float2 s = squares_of(m, OCTET * o + lane / 4);
    const float of_k = kda_unit_factor(s.x), of_q = kda_unit_factor(s.y);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) k[i] *= of_k, q[i] *= of_q;
}

/* The lane's row of q as it came, and its factor. It is read again where it is needed again, which
 * is rare: registers are few. */
struct raw_row {
    uint4 x;
    float factor;

    __device__ float operator[](int i) const
    {
        const uint32_t pair = i < 2 ? x.x : i < 4 ? x.y : i < 6 ? x.z : x.w;
        return (i % 2 ? high_half(pair) : low_half(pair)) * factor;
    }
};

/* An octet's rows against its own k, from differences of the sums L. Lane 4 g + 0 writes row g. */
__device__ inline void steep_octet(const float (&k)[CHANNELS], const raw_row &q,
                                   const float (&L)[CHANNELS], unsigned lane, lane_part to)
{
    const int row = lane / 4;
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
        if (lane % 4 == 0 && row >= d) A[row - d] = a, M[row - d] = b;
    }
}

/* An octet's own product, measured to its middle, whose log2-decays are in the lane of the row
 * there. */
__device__ inline void meet_in_middle(const float (&k)[CHANNELS], const raw_row &q,
                                      const float (&L)[CHANNELS], int middle, lane_part own)
{
    float sum[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < CHANNELS; s += 2) {
        uint32_t a[4], b[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float above = L[s + j] - __shfl_sync(ALL_LANES, L[s + j], middle);
            const float f = exp2_approx(above);
            a[2 * j] = to_tf32(k[s + j] * f), a[2 * j + 1] = to_tf32(q[s + j] * f);
            b[j] = to_tf32(k[s + j] * exp2_approx(-above));
        }
        mma_tf32(sum, a, b);
    }
    own[0] = float2{sum[0], sum[1]}, own[PART] = float2{sum[2], sum[3]};
}

/* An octet's own product, and its k up to its end, where that may be 2^-63 or less. */
__device__ inline void meet_itself_far(float (&k)[CHANNELS], const raw_row &q,
                                       const float (&L)[CHANNELS], unsigned lane, lane_part own)
{
    const int middle = 4 * (OCTET / 2 - 1) + lane % 4;
    bool steep = false;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
        steep |= fabsf(L[i] - __shfl_sync(ALL_LANES, L[i], middle)) > STEEPEST;
    if (__any_sync(ALL_LANES, steep))
        steep_octet(k, q, L, lane, own);
    else
        meet_in_middle(k, q, L, middle, own);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++)
        k[i] *= exp2_approx(__shfl_sync(ALL_LANES, L[i], LAST_ROW + lane % 4) - L[i]);
}

/* An octet's rows and its own product; its k reach to its end then. */
__device__ inline void meet_itself(float (&k)[CHANNELS], const float (&L)[CHANNELS],
                                   const float (&end)[CHANNELS], const left_rows &rows,
                                   unsigned lane, lane_part own, auto read_q)
{
    uint32_t common = IS_NEAR;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) common &= __float_as_uint(end[i]);
    if (__any_sync(ALL_LANES, common == 0)) {
        meet_itself_far(k, read_q(), L, lane, own);
        return;
    }
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) k[i] *= exp2_approx(-L[i]);
    multiply_octets(rows, k, own);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) k[i] *= end[i];
}

/* What an octet leaves to its meetings with earlier ones. */
struct octet_sums {
    left_rows rows;
    float k[CHANNELS], end[CHANNELS];
};

/* Octet o, whose rows and gates are x, up to its own product; then x are the next one's. `start` are
 * the decays of those before it, and `part` is where A and M of octets (o, 0) go. */
__device__ inline void begin_octet(const kda_arguments &a, const item &c, raw_octet &x, int o,
                                   unsigned thread, bool is_raw, float (&start)[CHANNELS],
                                   octet_sums &to, lane_part part, prepare_memory &m)
{
    const unsigned lane = thread % WARP;
    float L[CHANNELS]; /* log2-decays' sums */
    {
        float q[CHANNELS], f[CHANNELS];
        lane_gates decays;
        unpack_gates(x.g, a.g.is_bf16, decays);
        apply_gate(a, m.gate, &m.bias[gate_channel(thread)], decays);
        if (is_raw && a.normalize) sum_squares(x, o, thread, m);
        sum_over_octet(decays, c.tokens - OCTET * o, lane, L, to.end);
        add_total(to.end, thread, m);
        unpack(x.k, to.k);
        unpack(x.q, q);
        if (!is_raw) normalize_octet(to.k, q, o, lane, m);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            f[i] = exp2_approx(L[i]);
            to.end[i] = exp2_approx(to.end[i]);
        }
        left_operands(to.k, q, f, to.rows);
    }
    write_rows(to.rows, start, lane_piece(m.chunk, thread) + o * OCTET_BYTES);
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) start[i] *= to.end[i];
    /* Behind the last octet rows that nobody wants: where reading depends on o, x stays in its
     * registers until here. */
    read_octet(a, c, m.rows, x, o + 1, thread);
    meet_itself(to.k, L, to.end, to.rows, lane, part + 2 * PART * o, [&] {
        const float factor =
            is_raw ? 1.0f : kda_unit_factor(squares_of(m, OCTET * o + lane / 4).y);
        return raw_row{read_row(a.q, c, m.rows.q, o, thread), factor};
    });
}

/* The first octet's rows and gates are x. Rows stay as they are, and the factors that bring them to
 * unit length are found on the way; or, given these, they are multiplied. */
__device__ inline void prepare_octets(const kda_arguments &a, const item &c, raw_octet &x,
                                      bool is_raw, int group, prepare_memory &m)
{
    constexpr int LAST = OCTETS - 1;
    float start[CHANNELS] = {1, 1, 1, 1, 1, 1, 1, 1};
    octet_sums now;
    begin_totals(m);
#pragma unroll 1 /* four times the code would not stay in the instruction cache */
    for (int o = 0;; o++) {
        const unsigned thread = made_here(threadIdx.x % GROUP);
        if (o == LAST) {
            group_barrier(group);
            add_early_parts(m);
            group_barrier(group);
        }
        const lane_part part = lane_part_of(m, o, thread);
        begin_octet(a, c, x, o, thread, is_raw, start, now, part, m);
        if (o == LAST) break;
        char *const out = lane_piece(m.chunk, thread);
        if (o == 1) meet_earlier<1>(now.rows, now.end, part, thread, m, out);
        if (o == 2) meet_earlier<2>(now.rows, now.end, part, thread, m, out);
        put_left(m, out, thread, o, now.k);
    }
    const float one[CHANNELS] = {1, 1, 1, 1, 1, 1, 1, 1};
    const unsigned thread = made_here(threadIdx.x % GROUP);
    char *const out = lane_piece(m.chunk, thread);
    meet_earlier<LAST>(now.rows, now.end, lane_part_of(m, LAST, thread), thread, m, out);
    write_piece(out + LAST * OCTET_BYTES, K_LEFT, pack(now.k, one));
}

} // namespace kda

#endif
