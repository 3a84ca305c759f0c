/*
 * digits.cuh -- x w^T for one row of x and weights that are whole numbers, int8 or int4, by the
 * tensor cores' integer products: a weight is multiplied as it lies in memory, where making
 * bf16 of it takes more instructions than all else.
 *
 * A group of x, the columns that share a scale of the weight, becomes whole numbers X below 2^30
 * and a power of two: x = X 2^(e - 30), with 2^e just above the largest. That is exact for a
 * bf16 of 2^-22 of the largest or more; a smaller one is off by at most 2^-30 of the largest. X
 * is four signed bytes, the digits, each a column of the narrow side of m16n8k32. Sums of a group
 * are exact; two neighbouring digits are joined before they become f32. A group with an infinity
 * or a NaN becomes NaN.
 *
 * int8: a lane's piece, four words of a row, is all four registers of the wide side: the second
 * and fourth word in the place of a row eight further down. These meet digits of their own, the
 * other four columns of the narrow side, so that lanes with c = 0, 1 find the high and the low
 * digits of the one half of a group's sum, those with c = 2, 3 of the other.
 *
 * int4: a lane's piece is a group of its own, so its columns of the narrow side are zeros but for
 * the two digits that lane c looks at, and the other two come in a second product. Nibbles are taken
 * out by one operation: the low ones as q + 8, the high ones as 16 (q + 8), so that their X is
 * that of x / 16 (exact from 2^-18 of the largest on, else off by 2^-26). What the 8 adds is
 * taken from the sum, exactly.
 *
 * Rows of weights come through a ring as ring.cuh has it.
 */
#ifndef KL_CUDA_DEVICE_DIGITS_H
#define KL_CUDA_DEVICE_DIGITS_H

#include "group_ring.cuh"
#include "scaled.cuh"

constexpr int DIGITS = 4;
constexpr int DIGIT_CHUNK = 64; /* columns that lie together, a digit after the other */

/* c += a b of signed bytes, exact. Fragments of m16n8k32, lane 4 r + c: a[0] row r, columns 4 c
 * to 4 c + 3, a[1] row r + 8, a[2] and a[3] the same, columns + 16; b[0] rows (k) 4 c and on,
 * column r, b[1] rows + 16; c as in mma_bf16. The same of unsigned bytes in a. */
__device__ inline void mma_bytes(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_unsigned(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
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

/* Eight columns of x, four and four, as bf16 pairs. */
struct digit_columns {
    uint2 part[2];
};

/* How digits of a chunk lie, and which columns are put at a time: unit u those from first(u) on
 * and those APART columns further, as its lane of a product needs them. */
template <kl_weight_format format> struct digit_layout;

template <> struct digit_layout<KL_W_INT8> {
    static constexpr int APART = 8;
    static constexpr uint32_t LESS =
        0; /* powers of two, by which the second four are smaller */
    using note = float;

    static __device__ int first(int u) { return 16 * (u / 2) + 4 * (u % 2); }

    /* Digit d, 0 the highest, for the half of the words, and lane c. Neighbouring chunks and
     * halves are swapped, so that neither loads nor stores meet a bank twice. */
    static __device__ int place(int chunk, int half, int d, int c)
    {
        return half * 128 + (d ^ 2 * half ^ (chunk & 1)) * 32 + c * 8;
    }

    static __device__ void store(unsigned char *data, int u, const uint32_t (&first)[DIGITS],
                                 const uint32_t (&second)[DIGITS])
    {
        unsigned char *const chunk = data + u / 8 * DIGIT_CHUNK * DIGITS;
#pragma unroll
        for (int d = 0; d < DIGITS; d++)
            *reinterpret_cast<uint2 *>(
                chunk + place(u / 8, u % 2, DIGITS - 1 - d, u % 8 / 2)) = {first[d], second[d]};
    }
};

template <> struct digit_layout<KL_W_INT4> {
    static constexpr int APART = 16;
    static constexpr uint32_t LESS = 4;
    struct alignas(16) note {
        int high, low; /* digits of what is added to a sum, two together */
        float scale;
    };

    static __device__ int first(int u) { return 32 * (u / 4) + 4 * (u % 4); }

    /* A group: for the first and the second digit of a pair, for each word of a piece, what its low
     * and its high nibbles meet in the product of the high pair, and in that of the low pair. */
    static __device__ void store(unsigned char *data, int u, const uint32_t (&first)[DIGITS],
                                 const uint32_t (&second)[DIGITS])
    {
        unsigned char *const group = data + u / 4 * 128 + u % 4 * 16;
#pragma unroll
        for (int i = 0; i < 2; i++)
            *reinterpret_cast<uint4 *>(group + i * 64) = {first[3 - i], second[3 - i],
                                                          first[1 - i], second[1 - i]};
    }
};

/* A row of so many columns in shared memory, 128-byte aligned: the digits of all chunks; zeros for
 * lanes whose part of the narrow side is none, in other banks than the digits; a note for each
 * group, with its scale. */
template <kl_weight_format format> struct digit_row {
    using raw_type = digit_columns;
    using layout = digit_layout<format>;
    using note = typename layout::note;
    static constexpr int GROUP = weight_codec<format>::GROUP,
                         CHUNK_BYTES = DIGITS * DIGIT_CHUNK;
    static constexpr int ZEROS = 64, BEFORE = 32; /* bytes */
    const int chunks;
    unsigned char *const data, *const zeros;
    note *const notes;

    static __host__ __device__ int chunks_of(int cols)
    {
        return shared_rows::pitch_of(cols) / 2 / DIGIT_CHUNK;
    }

    static __host__ __device__ int notes_at(int chunks)
    {
        return chunks * CHUNK_BYTES + BEFORE + ZEROS;
    }

    static __host__ __device__ int bytes_of(int cols)
    {
        return notes_at(chunks_of(cols)) +
               chunks_of(cols) * DIGIT_CHUNK / GROUP * static_cast<int>(sizeof(note));
    }

    __device__ digit_row(unsigned char *shared, int cols)
        : chunks(chunks_of(cols)), data(shared), zeros(shared + chunks * CHUNK_BYTES + BEFORE),
          notes(reinterpret_cast<note *>(shared + notes_at(chunks)))
    {
    }

    __device__ int units() const { return chunks * DIGIT_CHUNK / 8; }

    static __device__ digit_columns load(const bf16 *x, int u)
    {
        const bf16 *const from = x + layout::first(u);
        return {{*reinterpret_cast<const uint2 *>(from),
                 *reinterpret_cast<const uint2 *>(from + layout::APART)}};
    }

    static __device__ digit_columns load(const shared_rows &x, int u)
    {
        const int first = layout::first(u) / 8;
        return {{reinterpret_cast<const uint2 *>(x.unit(0, first))[u % 2],
                 reinterpret_cast<const uint2 *>(x.unit(0, first + layout::APART / 8))[u % 2]}};
    }

    /* Unit u by all lanes of a warp, neighbouring lanes with neighbouring units; those that are not
     * `inside` put nothing. */
    __device__ void put(int u, const digit_columns &x, bool inside) const
    {
        constexpr int LANES = GROUP / 8;
        constexpr uint32_t NOT_FINITE = 255; /* an exponent */
        const uint32_t pairs[4] = {x.part[0].x, x.part[0].y, x.part[1].x, x.part[1].y};
        const uint32_t e = exponent_of_group<LANES>(pairs);
        int whole[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t less = i < 4 ? 0 : layout::LESS;
            const float up = __uint_as_float((283 - less - e) << 23); /* 2^(156 - e) */
            const float v = i % 2 == 0 ? low_half(pairs[i / 2]) : high_half(pairs[i / 2]);
            whole[i] = __float2int_rn(v * up); /* v < 2^(e - 126) */
        }
        /* of the two high digits as one number */
        const float scale = __uint_as_float(e < NOT_FINITE ? (e - 13) << 23 : 0x7fffffffu);
        store(u, whole, inside);
        write_note(u, whole, scale, inside);
    }

    __device__ void store(int u, const int (&whole)[8], bool inside) const
    {
        uint32_t z[8], first[DIGITS], second[DIGITS];
#pragma unroll
        for (int i = 0; i < 8; i++)
            z[i] = (static_cast<uint32_t>(whole[i]) + 0x00808080u) ^ 0x00808080u;
        transpose_bytes(first, z);
        transpose_bytes(second, z + 4);
        if (inside) layout::store(data, u, first, second);
    }

    __device__ void write_note(int u, const int (&whole)[8], float scale, bool inside) const
    {
        if constexpr (format == KL_W_INT8) {
            if (inside && u % 8 == 0) notes[u / 8] = scale;
        } else {
            int high = 0, low = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int bias = i < 4 ? 8 : 8 << layout::LESS;
                high -= (whole[i] >> 16) * bias;
                low -= (whole[i] & 0xffff) * bias;
            }
#pragma unroll
            for (int d = 1; d < 4; d *= 2) {
                high += __shfl_xor_sync(ALL_LANES, high, d);
                low += __shfl_xor_sync(ALL_LANES, low, d);
            }
            if (inside && u % 4 == 0) notes[u / 4] = {high, low, scale};
            if (u < ZEROS / 16) reinterpret_cast<uint4 *>(zeros)[u] = {};
        }
    }
};

/* ---- the product ----------------------------------------------------------------------- */

/* Where a lane finds the digits that meet its pieces, and how it multiplies them: acc[i] += a step
 * of weight row r + 8 i times x, this lane's share of it. */
template <kl_weight_format format> struct ring_digits;

template <> struct ring_digits<KL_W_INT8> {
    using row_type = digit_row<KL_W_INT8>;
    const unsigned char *at;
    const float *scale;

    __device__ explicit ring_digits(const row_type &x)
    {
        const int r = lane_id() / STREAM_LANES, c = lane_id() % STREAM_LANES;
        at = x.data + warp_id() * row_type::CHUNK_BYTES +
             row_type::layout::place(warp_id(), r / DIGITS, r % DIGITS, c);
        scale = x.notes + warp_id();
    }

    __device__ void advance()
    {
        at += STREAM_WARPS * row_type::CHUNK_BYTES;
        scale += STREAM_WARPS;
    }

    __device__ void multiply(float (&acc)[2], const ring_pieces &p) const
    {
        const uint2 b = *reinterpret_cast<const uint2 *>(at);
        const bool second = lane_id() % STREAM_LANES >= 2;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int sum[4] = {};
            mma_bytes(sum, {p.raw[i].x, p.raw[i].y, p.raw[i].z, p.raw[i].w}, {b.x, b.y});
            const int joined = (second ? sum[2] : sum[0]) * 256 + (second ? sum[3] : sum[1]);
            acc[i] = fmaf(static_cast<float>(joined), p.scale[i] * *scale, acc[i]);
        }
    }

    /* High and low digits of both halves, in all lanes of a row. */
    static __device__ float total(float acc)
    {
        acc *= lane_id() % 2 == 0 ? 1.0f : 0x1p-16f;
        acc += __shfl_xor_sync(ALL_LANES, acc, 1);
        return acc + __shfl_xor_sync(ALL_LANES, acc, 2);
    }
};

template <> struct ring_digits<KL_W_INT4> {
    using row_type = digit_row<KL_W_INT4>;
    static constexpr int TURN = STREAM_WARPS * STREAM_LANES; /* groups */
    const unsigned char *at;
    const row_type::note *note;
    int turn; /* bytes of digits: none where they are zeros */

    __device__ explicit ring_digits(const row_type &x)
    {
        const int r = lane_id() / STREAM_LANES, c = lane_id() % STREAM_LANES;
        const int group = warp_id() * STREAM_LANES + c;
        const bool own = r / 2 == c;
        at = own ? x.data + group * 128 + r % 2 * 64 : x.zeros;
        turn = own ? TURN * 128 : 0;
        note = x.notes + group;
    }

    __device__ void advance()
    {
        at += turn;
        note += TURN;
    }

    __device__ void multiply(float (&acc)[2], const ring_pieces &p) const
    {
        constexpr uint32_t LOW = 0x0f0f0f0fu, HIGH = 0xf0f0f0f0u;
        const uint32_t raw[2][4] = {{p.raw[0].x, p.raw[0].y, p.raw[0].z, p.raw[0].w},
                                    {p.raw[1].x, p.raw[1].y, p.raw[1].z, p.raw[1].w}};
        int high[4] = {}, low[4] = {};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const uint4 b = reinterpret_cast<const uint4 *>(at)[w];
            const uint32_t a[4] = {raw[0][w] & LOW, raw[1][w] & LOW, raw[0][w] & HIGH,
                                   raw[1][w] & HIGH};
            mma_unsigned(high, a, {b.x, b.y});
            mma_unsigned(low, a, {b.z, b.w});
        }
        const row_type::note n = *note;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int h = high[2 * i] * 256 + n.high + high[2 * i + 1];
            const int l = low[2 * i] * 256 + n.low + low[2 * i + 1];
            const float sum = fmaf(static_cast<float>(l), 0x1p-16f, static_cast<float>(h));
            acc[i] = fmaf(sum, p.scale[i] * n.scale, acc[i]);
        }
    }

    /* The groups of a row, in all of its lanes. */
    static __device__ float total(float acc)
    {
        acc += __shfl_xor_sync(ALL_LANES, acc, 1);
        return acc + __shfl_xor_sync(ALL_LANES, acc, 2);
    }
};

/* ---- what a single row of x becomes ---------------------------------------------------- */

template <kl_weight_format format>
constexpr bool IS_QUANTISED = weight_codec<format>::GROUP > 0;

/* For quantised weights: itself, the ring for them, and the way to multiply. */
template <kl_weight_format format> struct numbers_of {
    using row = digit_row<format>;
    using walk = ring_digits<format>;
    template <int DEPTH> using ring = weight_ring<format, DEPTH>;
};

template <> struct numbers_of<KL_W_INT8> {
    using row = digit_row<KL_W_INT8>;
    using walk = ring_digits<KL_W_INT8>;
    template <int DEPTH> using ring = group_ring<KL_W_INT8, DEPTH>;
};

template <> struct numbers_of<KL_W_FP8> {
    using row = scaled_row;
    using walk = ring_scaled;
    template <int DEPTH> using ring = weight_ring<KL_W_FP8, DEPTH>;
};

#endif
