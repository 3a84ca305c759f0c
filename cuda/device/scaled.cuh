/*
 * scaled.cuh -- x w^T for one row of x and fp8 weights, as float16 on the tensor cores: one operation
 * makes two weights float16, where bf16 takes five.
 *
 * A group of x, the columns that share a scale of the weight, is multiplied by a power of two that
 * brings its largest to 2^15 or more. That is exact for a bf16 of 2^-32 of the largest or more; a
 * smaller one is off by at most 2^-40 of the largest. Sums of a group are f32, and multiplied by
 * both scales.
 */
#ifndef KL_CUDA_DEVICE_SCALED_H
#define KL_CUDA_DEVICE_SCALED_H

#include "float16.cuh"
#include "ring.cuh"

/* The largest exponent of a group's numbers, each of LANES neighbouring lanes with 8 of them as pairs
 * of bf16, or a least one: of smaller numbers all bits are few. */
template <int LANES> __device__ uint32_t exponent_of_group(const uint32_t (&pairs)[4])
{
    constexpr uint32_t LEAST = 30;
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        most = max(most, max(pairs[i] << 16 & 0x7fff0000u, pairs[i] & 0x7fff0000u));
#pragma unroll
    for (int d = LANES / 2; d > 0; d /= 2)
        most = max(most, __shfl_xor_sync(ALL_LANES, most, d));
    return max(most >> 23, LEAST);
}

/* A row in shared memory, 128-byte aligned, with a scale for each group. */
struct scaled_row {
    using raw_type = uint4;
    static constexpr int LANES = weight_codec<KL_W_FP8>::GROUP / 8; /* units of a group */
    const shared_rows x;
    float *const scales;

    static __host__ __device__ int bytes_of(int cols)
    {
        const int pitch = shared_rows::pitch_of(cols);
        return pitch + pitch / 16 / LANES * static_cast<int>(sizeof(float));
    }

    __device__ scaled_row(unsigned char *shared, int cols)
        : x{shared, shared_rows::pitch_of(cols)},
          scales(reinterpret_cast<float *>(shared + x.pitch))
    {
    }

    __device__ int units() const { return x.pitch / 16; }

    static __device__ uint4 load(const bf16 *from, int u)
    {
        return *reinterpret_cast<const uint4 *>(from + 8 * u);
    }

    static __device__ uint4 load(const shared_rows &from, int u) { return *from.unit(0, u); }

    /* Columns 8 u and on by all lanes of a warp, neighbouring lanes with neighbouring units; those
     * that are not `inside` put nothing. */
    __device__ void put(int u, uint4 raw, bool inside) const
    {
        const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
        uint32_t v[4];
        const uint32_t e = exponent_of_group<LANES>(pairs);
        const float up = __uint_as_float((269 - e) << 23); /* 2^(142 - e): x < 2^(e - 126) */
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = pack_half(low_half(pairs[i]) * up, high_half(pairs[i]) * up);
        if (!inside) return;
        *x.unit(0, u) = {v[0], v[1], v[2], v[3]};
        if (u % LANES == 0) scales[u / LANES] = __uint_as_float((e - 15) << 23);
    }
};

/* Where a lane finds the columns of x that meet its pieces, and how it multiplies them: acc[i] += the
 * step's rows r + 8 i times x. All columns of the narrow side are the same. */
struct ring_scaled : ring_x<KL_W_FP8, 1> {
    const float *scale;

    __device__ explicit ring_scaled(const scaled_row &row)
        : ring_x<KL_W_FP8, 1>(row.x, 1), scale(row.scales + warp_id())
    {
    }

    __device__ void advance()
    {
        ring_x<KL_W_FP8, 1>::advance();
        scale += STREAM_WARPS;
    }

    __device__ void multiply(float (&acc)[2], const ring_pieces &p) const
    {
        const uint32_t raw[2][4] = {{p.raw[0].x, p.raw[0].y, p.raw[0].z, p.raw[0].w},
                                    {p.raw[1].x, p.raw[1].y, p.raw[1].z, p.raw[1].w}};
        float sum[4] = {};
#pragma unroll
        for (int u = 0; u < 2; u++) {
            uint32_t b[4];
            load(b, 0, u);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                uint32_t a[4];
                pairs_of_fp8(raw[0][2 * u + i], a[0], a[2]);
                pairs_of_fp8(raw[1][2 * u + i], a[1], a[3]);
                mma_half(sum, a, {b[2 * i], b[2 * i + 1]});
            }
        }
        acc[0] = fmaf(sum[0], p.scale[0] * *scale, acc[0]);
        acc[1] = fmaf(sum[2], p.scale[1] * *scale, acc[1]);
    }

    static __device__ float total(float acc)
    {
        return acc;
    }
};

#endif
