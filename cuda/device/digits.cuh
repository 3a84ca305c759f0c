/*
 * digits.cuh -- x w^T for one row of x and weights that are whole numbers, int8 or int4, by the
 * tensor cores' integer products: a weight is multiplied as it lies in memory, where making
 * bf16 of it takes more instructions than all else.
 *
 * A group of x, the columns that share a scale of the weight, becomes whole numbers X below 2^30
 * and a power of two: x = X 2^(e - 30), with 2^e just above the largest. That is exact for a
 * bf16 of 2^-22 of the largest or more; a smaller one is off by at most 2^-30 of the largest. X
 * in four signed bytes, the digits, makes four columns of the narrow side of m16n8k32. Sums of
 * a group are exact; two neighbouring digits are joined before the f32 sum, so an even lane has
 * those of the high digits, an odd one those of the low: digits_total() adds them. A group with
 * an infinity or a NaN becomes NaN.
 *
 * Rows of weights come through a ring as ring.cuh has it. In int8 a lane's piece is its share of
 * both products of a group. In int4 a piece is a group: lanes of a row exchange words by ldmatrix,
 * low and high nibbles times 16 are signed bytes but for the sign, and a step is four groups.
 */
#ifndef KL_CUDA_DEVICE_DIGITS_H
#define KL_CUDA_DEVICE_DIGITS_H

#include "ring.cuh"

constexpr int DIGITS = 4;
constexpr int DIGIT_CHUNK = 64; /* columns that lie together, a digit after the other */

template <kl_weight_format format>
constexpr bool HAS_DIGITS = format == KL_W_INT8 || format == KL_W_INT4;

/* c += a b of signed bytes, exact. Fragments of m16n8k32, lane 4 r + c: a[0] row r, columns 4 c
 * to 4 c + 3, a[1] row r + 8, a[2] and a[3] the same, columns + 16; b[0] rows (k) 4 c and on,
 * column r, b[1] rows + 16; c as in mma_bf16. */
__device__ inline void mma_bytes(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* ---- x --------------------------------------------------------------------------------- */

/* Byte i of four numbers each as a word, for all i. */
__device__ inline void transpose_bytes(uint32_t (&to)[4], const uint32_t *z)
{
    const uint32_t low[2] = {choose_bytes(z[0], z[1], 0x5140u),
                             choose_bytes(z[2], z[3], 0x5140u)};
    const uint32_t high[2] = {choose_bytes(z[0], z[1], 0x7362u),
                              choose_bytes(z[2], z[3], 0x7362u)};
    to[0] = choose_bytes(low[0], low[1], 0x5410u);
    to[1] = choose_bytes(low[0], low[1], 0x7632u);
    to[2] = choose_bytes(high[0], high[1], 0x5410u);
    to[3] = choose_bytes(high[0], high[1], 0x7632u);
}

/* A row in shared memory, 16-byte aligned: [chunk][digit, the highest first][64 bytes], in the
 * order in which lanes take them, and a scale for each group. */
template <kl_weight_format format> struct digit_row {
    static constexpr int GROUP = weight_codec<format>::GROUP, CHUNK_BYTES = DIGITS * 64;
    unsigned char *data;
    float *scales;

    /* Of so many columns, filled up to whole chunks. */
    static __host__ __device__ int chunks_of(int64_t cols)
    {
        return static_cast<int>((cols + DIGIT_CHUNK - 1) / DIGIT_CHUNK);
    }

    static __host__ __device__ int bytes_of(int chunks)
    {
        return chunks * (CHUNK_BYTES + DIGIT_CHUNK / GROUP * static_cast<int>(sizeof(float)));
    }

    __device__ digit_row(unsigned char *shared, int chunks)
        : data(shared), scales(reinterpret_cast<float *>(shared + chunks * CHUNK_BYTES))
    {
    }

    /* Columns 8 u and on, bf16, by all lanes of a warp, neighbouring lanes with neighbouring units;
     * those that are not `inside` put nothing. */
    __device__ void put(int u, uint4 raw, bool inside) const
    {
        constexpr int LANES = GROUP / 8;
        constexpr uint32_t LEAST = 30,
                           NOT_FINITE = 255; /* exponents; of smaller x all bits are few */
        const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < 4; i++)
            most = max(most, max(pairs[i] << 16 & 0x7fff0000u, pairs[i] & 0x7fff0000u));
#pragma unroll
        for (int d = LANES / 2; d > 0; d /= 2)
            most = max(most, __shfl_xor_sync(ALL_LANES, most, d));
        const uint32_t e = max(most >> 23, LEAST);
        const float up = __uint_as_float((283 - e) << 23); /* 2^(156 - e): x < 2^(e - 126) */
        uint32_t z[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float x = i % 2 == 0 ? low_half(pairs[i / 2]) : high_half(pairs[i / 2]);
            z[i] = (static_cast<uint32_t>(__float2int_rn(x * up)) + 0x00808080u) ^ 0x00808080u;
        }
        if (!inside) return;
        store(u, z);
        if (u % LANES == 0) /* of the two high digits as one number */
            scales[u / LANES] = __uint_as_float(e < NOT_FINITE ? (e - 13) << 23 : 0x7fffffffu);
    }

    __device__ void store(int u, const uint32_t (&z)[8]) const
    {
        uint32_t left[4], right[4];
        transpose_bytes(left, z);
        transpose_bytes(right, z + 4);
        unsigned char *const chunk = data + u / 8 * CHUNK_BYTES;
#pragma unroll
        for (int d = 0; d < DIGITS; d++) {
            unsigned char *const digit = chunk + (DIGITS - 1 - d) * 64;
            if constexpr (format == KL_W_INT8) {
                *reinterpret_cast<uint2 *>(digit + u % 8 * 8) = {left[d], right[d]};
            } else { /* 4 columns for each lane of every half of a group */
                uint32_t *const to =
                    reinterpret_cast<uint32_t *>(digit + u % 2 * 32 + u / 2 % 4 * 4);
                to[0] = left[d], to[4] = right[d];
            }
        }
    }
};

/* Of a row that lies in shared memory, by all threads, between barriers. */
template <int threads, kl_weight_format format>
__device__ void digits_of_row(const digit_row<format> &to, const shared_rows &x, int units)
{
    for (int first = threadIdx.x - lane_id(); first < units; first += threads) {
        const int u = first + lane_id();
        to.put(u, u < units ? *x.unit(0, u) : uint4{}, u < units);
    }
}

/* Where a lane finds the digits that meet its pieces. */
template <kl_weight_format format> struct ring_digits {
    using row_type = digit_row<format>;
    static constexpr int COLUMNS = STREAM_LANES * weight_codec<format>::PIECE; /* of a step */
    static constexpr int CHUNKS = COLUMNS / DIGIT_CHUNK, GROUPS = COLUMNS / row_type::GROUP;
    const unsigned char *at;
    const float *scale;

    __device__ explicit ring_digits(const row_type &x)
    {
        const int r = lane_id() / STREAM_LANES, c = lane_id() % STREAM_LANES;
        at = x.data + warp_id() * CHUNKS * row_type::CHUNK_BYTES + r % DIGITS * 64 + c * 16;
        scale = x.scales + warp_id() * GROUPS;
    }

    __device__ void advance()
    {
        at += STREAM_WARPS * CHUNKS * row_type::CHUNK_BYTES;
        scale += STREAM_WARPS * GROUPS;
    }

    __device__ uint4 chunk(int i) const
    {
        return *reinterpret_cast<const uint4 *>(at + i * row_type::CHUNK_BYTES);
    }
};

/* ---- the weights ----------------------------------------------------------------------- */

/* As weight_ring, but that lanes of a row read each other's copies: scales where a row has one,
 * pieces where they are whole groups. These are placed so that ldmatrix meets no bank twice. */
template <kl_weight_format format, int DEPTH> struct digit_ring {
    static constexpr bool WHOLE = format == KL_W_INT8; /* the pieces of a row are one group */
    static constexpr int WORDS =
        WHOLE ? STREAM_WARPS * 8 : STREAM_THREADS; /* of scales, half */
    static constexpr int SLOT = RING_PIECES + 2 * 4 * WORDS, BYTES = DEPTH * SLOT;
    static constexpr int GROUPS = WHOLE ? 1 : STREAM_LANES;

    unsigned char *first, *slot;

    __device__ explicit digit_ring(unsigned char *shared) : first(shared), slot(shared) {}

    __device__ void put_none()
    {
        copy_commit();
        slot = slot == first + BYTES - SLOT ? first : slot + SLOT;
    }

    __device__ static int place()
    {
        const int lane = lane_id();
        return threadIdx.x - lane + (WHOLE ? lane : lane ^ (lane >> 3 & 3));
    }

    __device__ uint32_t *scales() const
    {
        return reinterpret_cast<uint32_t *>(slot + RING_PIECES);
    }

    /* Pieces past the end of their row become zeros. */
    __device__ void put(const ring_feed<format> &feed)
    {
        const bool inside = feed.left > 0;
        __syncwarp(); /* all lanes have read what was here */
        uint4 *const to = reinterpret_cast<uint4 *>(slot) + place();
        uint32_t *const words = scales() + (WHOLE ? threadIdx.x / STREAM_LANES : threadIdx.x);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            copy_once(to + i * STREAM_THREADS, feed.row[i].data, inside);
            if (!WHOLE || lane_id() % STREAM_LANES == 0)
                copy_word(words + i * WORDS, feed.row[i].scales, inside);
        }
        put_none();
    }

    /* The oldest step, once it is there; odd as ring_feed says it of the lane's own groups. */
    struct step {
        uint32_t raw[2][4];
        float scale[2][GROUPS];
    };

    __device__ step take(const bool (&odd)[2]) const
    {
        copy_wait<DEPTH - 1>();
        __syncwarp();
        step s;
        if constexpr (WHOLE) {
            const uint4 *const own = reinterpret_cast<const uint4 *>(slot) + threadIdx.x;
            const uint32_t *const words = scales() + threadIdx.x / STREAM_LANES;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 v = own[i * STREAM_THREADS];
                s.raw[i][0] = v.x, s.raw[i][1] = v.y, s.raw[i][2] = v.z, s.raw[i][3] = v.w;
                s.scale[i][0] = scale_of(words[i * WORDS], odd[i]);
            }
        } else {
            const int lane = lane_id(), row = lane % 8, piece = lane / 8 ^ row / 2;
            const unsigned char *const from =
                slot + (threadIdx.x - lane + row * STREAM_LANES + piece) * 16;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                ldmatrix(s.raw[i], from + i * STREAM_THREADS * 16);
                const uint4 v = *reinterpret_cast<const uint4 *>(
                    scales() + i * WORDS + (threadIdx.x & ~(STREAM_LANES - 1)));
                const bool first_odd = odd[i] != (lane % 2 == 1);
                s.scale[i][0] = scale_of(v.x, first_odd);
                s.scale[i][1] = scale_of(v.y, !first_odd);
                s.scale[i][2] = scale_of(v.z, first_odd);
                s.scale[i][3] = scale_of(v.w, !first_odd);
            }
        }
        return s;
    }

    /* The same of weights without scales that pass through this ring. */
    template <kl_weight_format f> __device__ ring_pieces take(const bool (&)[2]) const
    {
        static_assert(weight_codec<f>::GROUP == 0);
        copy_wait<DEPTH - 1>();
        const uint4 *const own = reinterpret_cast<const uint4 *>(slot) + place();
        return {{own[0], own[STREAM_THREADS]}, {1, 1}};
    }

    __device__ static float scale_of(uint32_t word, bool odd)
    {
        return __uint_as_float(choose_bytes(word, 0, odd ? 0x3244u : 0x1044u));
    }
};

/* ---- the product ----------------------------------------------------------------------- */

/* acc[i] += a group of weight row r + 8 i times this lane's digits of x. */
__device__ inline void digits_add(float (&acc)[2], const int (&sum)[4], const float (&scale)[2])
{
#pragma unroll
    for (int i = 0; i < 2; i++)
        acc[i] = fmaf(static_cast<float>(sum[2 * i] * 256 + sum[2 * i + 1]), scale[i], acc[i]);
}

template <kl_weight_format format, class Step>
__device__ void digits_multiply(float (&acc)[2], const Step &s, const ring_digits<format> &x)
{
    using walk = ring_digits<format>;
#pragma unroll
    for (int chunk = 0; chunk < walk::CHUNKS; chunk++) {
        const uint4 v = x.chunk(chunk);
        const uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
        int sum[4] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int g = 2 * chunk + half;
            if constexpr (format == KL_W_INT8) {
                mma_bytes(sum,
                          {s.raw[0][2 * half], s.raw[1][2 * half], s.raw[0][2 * half + 1],
                           s.raw[1][2 * half + 1]},
                          b[half]);
            } else {
                uint32_t low[2], high[2]; /* nibbles q + 8 as the bytes 16 q */
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    low[i] = (s.raw[i][g] << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
                    high[i] = (s.raw[i][g] & 0xf0f0f0f0u) ^ 0x80808080u;
                }
                int own[4] = {};
                mma_bytes(own, {low[0], low[1], high[0], high[1]}, b[half]);
                const float scale = x.scale[g];
                digits_add(acc, own, {s.scale[0][g] * scale, s.scale[1][g] * scale});
            }
        }
        if constexpr (format == KL_W_INT8) {
            const float scale = x.scale[0];
            digits_add(acc, sum, {s.scale[0][0] * scale, s.scale[1][0] * scale});
        }
    }
}

/* High and low digits, in all lanes of a pair. */
template <kl_weight_format format> __device__ float digits_total(float acc)
{
    constexpr float WEIGHTS =
        format == KL_W_INT8 ? 1.0f : 0x1p-4f; /* that int4 is multiplied by 16 */
    acc *= lane_id() % 2 == 0 ? WEIGHTS : WEIGHTS * 0x1p-16f;
    return acc + __shfl_xor_sync(ALL_LANES, acc, 1);
}

#endif
