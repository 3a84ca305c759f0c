/*
 * halves.cuh -- x w^T for two rows of x, the halves of a single token's, and quantised weights,
 * where row r of a step meets the first and row r + 8 the second: halves of the columns of the same
 * row of a weight.
 *
 * int8 and int4: one fma makes of a byte b (b - 128) 2^-6, of a nibble (b - 8) 2^-6 (centred() in
 * weight.cuh): exact, and without the scale, which meets the f32 sum. fp8 as weight.cuh has it,
 * without the scale too.
 *
 * 8 bits: lanes that are multiples of 4 find the sums. int4: a lane's piece is a group of its own,
 * so that its columns of the narrow side, one for each row of x, are zeros but for that lane's
 * piece, and all lanes of a row find sums, of their own groups.
 */
#ifndef KL_CUDA_DEVICE_HALVES_H
#define KL_CUDA_DEVICE_HALVES_H

#include "ring.cuh"

/* What sums are multiplied by in the end. */
template <kl_weight_format format> constexpr float HALVES_ONE = format == KL_W_FP8 ? 1 : 64;

/* Eight columns of a piece as bf16 pairs, the unit-th. */
template <kl_weight_format format>
__device__ void halves_pairs(const uint32_t (&raw)[4], int unit, uint32_t (&to)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t selector = i % 2 ? 0x4342u : 0x4140u; /* a byte for each number */
        if constexpr (format == KL_W_FP8) {
            to[i] = weight_codec<format>::pair(raw[2 * unit + i / 2], i % 2);
        } else if constexpr (format == KL_W_INT8) {
            const uint32_t word = raw[2 * unit + i / 2] ^ 0x80808080u;
            to[i] = centred(choose_bytes(word, 0, selector), 1, 128);
        } else {
            const uint32_t two = choose_bytes(raw[2 * (unit % 2) + i / 2], 0, selector);
            to[i] =
                unit < 2 ? centred(two & 0x000f000fu, 1, 8) : centred(two & 0x00f000f0u, 16, 8);
        }
    }
}

/* Where a lane finds the columns of x that meet its pieces, and how it multiplies them. Behind the
 * two rows lie ZEROS bytes of zeros, which clear() has written before a barrier. */
template <kl_weight_format format> struct ring_halves {
    static constexpr bool OWN = format == KL_W_INT4; /* a piece is a group */
    static constexpr int PIECE = weight_codec<format>::PIECE, UNITS = PIECE / 8;
    static constexpr int TURN = RING_TURN / 16 * PIECE * 2, ZEROS = OWN ? 128 : 0; /* bytes */
    const unsigned char *rows;
    int at, turn;

    static __host__ __device__ int bytes_of(int cols)
    {
        return 2 * shared_rows::pitch_of(cols) + ZEROS;
    }

    static __device__ void clear(const shared_rows &x)
    {
        if constexpr (OWN)
            if (threadIdx.x < ZEROS / 16)
                reinterpret_cast<uint4 *>(x.data + 2 * x.pitch)[threadIdx.x] = {};
    }

    __device__ explicit ring_halves(const shared_rows &x) : rows(x.data)
    {
        const int r = lane_id() / STREAM_LANES, c = lane_id() % STREAM_LANES;
        const bool zero = OWN && r / 2 != c;
        const int column = (warp_id() * STREAM_LANES + c) * PIECE;
        const auto *own =
            reinterpret_cast<unsigned char *>(x.unit(OWN ? r % 2 : min(r, 1), column / 8));
        at = zero ? 2 * x.pitch : static_cast<int>(own - rows);
        turn = zero ? 0 : TURN;
    }

    __device__ void advance() { at += turn; }

    /* acc[i] += the step's rows r + 8 i times row i of x, this lane's share of it. */
    __device__ void multiply(float (&acc)[2], const ring_pieces &p) const
    {
        const uint32_t raw[2][4] = {{p.raw[0].x, p.raw[0].y, p.raw[0].z, p.raw[0].w},
                                    {p.raw[1].x, p.raw[1].y, p.raw[1].z, p.raw[1].w}};
        float sum[4] = {};
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            uint32_t top[4], bottom[4];
            halves_pairs<format>(raw[0], u, top);
            halves_pairs<format>(raw[1], u, bottom);
            const uint4 b = *reinterpret_cast<const uint4 *>(rows + (at ^ u << 4));
            mma_bf16(sum, {top[0], bottom[0], top[1], bottom[1]}, {b.x, b.y});
            mma_bf16(sum, {top[2], bottom[2], top[3], bottom[3]}, {b.z, b.w});
        }
        acc[0] = fmaf(p.scale[0], sum[0], acc[0]);
        acc[1] = fmaf(p.scale[1], sum[3], acc[1]);
    }

    /* In lanes that are multiples of 4. */
    static __device__ float total(float acc)
    {
        acc *= HALVES_ONE<format>;
        if constexpr (!OWN) return acc;
        acc += __shfl_xor_sync(ALL_LANES, acc, 1);
        return acc + __shfl_xor_sync(ALL_LANES, acc, 2);
    }
};

#endif
