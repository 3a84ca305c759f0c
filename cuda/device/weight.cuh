/*
 * weight.cuh -- a kl_weight as kernels read it: rows in pieces of 16 bytes, dequantised to
 * floats or to bf16 pairs.
 *
 * A piece holds PIECE neighbouring columns, a divisor of the group, so one scale serves it.
 * Integers become floats without a conversion: the byte q is placed in the mantissa of a large
 * power of two, which makes the number 2^15 + q (f32) or 2^7 + q (bf16), exactly.
 *
 * bf16 pairs of quantised weights are the exact product q * scale, rounded once.
 */
#ifndef KL_CUDA_DEVICE_WEIGHT_H
#define KL_CUDA_DEVICE_WEIGHT_H

#include "mma.cuh"
#include "types.cuh"

#include <cuda_fp8.h>
#include <stdint.h>

/* One stack of matrices; `rows` counts those of a single matrix. */
struct weight_view {
    const uint8_t *data;
    const bf16 *scales;
    int64_t rows, cols, row_bytes, groups;
};

inline weight_view weight_view_of(const kl_weight &w)
{
    return {
        .data = static_cast<const uint8_t *>(w.data),
        .scales = reinterpret_cast<const bf16 *>(w.scales),
        .rows = w.rows,
        .cols = w.cols,
        .row_bytes = static_cast<int64_t>(kl_weight_row_bytes(w.format, w.cols)),
        .groups = kl_weight_groups(w.format, w.cols),
    };
}

/* Host: whether every row can be read in 16-byte pieces. */
inline bool has_pieces(const weight_view &w)
{
    return is_aligned(w.data, w.row_bytes, 1, 16);
}

/* Row `row` of the stack; matrix i of it begins at row i * rows. */
struct weight_row {
    const uint8_t *data;
    const bf16 *scales;
};

__device__ inline weight_row row_of(const weight_view &w, int64_t row)
{
    return {w.data + row * w.row_bytes,
            w.scales == nullptr ? nullptr : w.scales + row * w.groups};
}

/* Bytes of a and b chosen by the four nibbles of `selector`; 0-3 are those of a. */
__device__ inline uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t selector)
{
    return __byte_perm(a, b, selector);
}

/* 2^15 + byte i of `bytes`. Times a scale s, less (2^15 + bias) s, is exact in one fma: both
 * products fit in 24 bits. */
__device__ inline float raise_byte(uint32_t bytes, int i)
{
    return __uint_as_float(
        choose_bytes(bytes, 0x47000000u, 0x7504u | static_cast<uint32_t>(i) << 4));
}

__device__ inline uint32_t multiply_bf16(uint32_t a, __nv_bfloat162 s)
{
    const __nv_bfloat162 p = __hmul2(*reinterpret_cast<const __nv_bfloat162 *>(&a), s);
    return *reinterpret_cast<const uint32_t *>(&p);
}

/* Two bytes b in the lower bits of bf16 numbers, b 2^-133: below 128 as subnormal numbers, above as
 * ones of the least exponent. To (b / times - less) 2^-6, exactly, by one fma. */
__device__ inline uint32_t centred(uint32_t raised, float times, float less)
{
    const __nv_bfloat162 p =
        __hfma2(*reinterpret_cast<const __nv_bfloat162 *>(&raised),
                __float2bfloat162_rn(0x1p127f / times), __float2bfloat162_rn(-less * 0x1p-6f));
    return *reinterpret_cast<const uint32_t *>(&p);
}

template <int PIECE>
__device__ void round_pairs(const float (&from)[PIECE], uint32_t (&to)[PIECE / 2])
{
#pragma unroll
    for (int i = 0; i < PIECE / 2; i++) to[i] = pack_bf16(from[2 * i], from[2 * i + 1]);
}

/* A format: PIECE columns in 16 bytes, GROUP columns with one scale (0: none), floats() and
 * pairs() of a piece in the order of its columns, and at(), one value of a row. Formats of one
 * byte also have unscaled(): the pairs without their scale, ONE times too small, exactly. ONE is a
 * power of two: a sum times ONE times the scale has the bits of the whole numbers' sum times the
 * scale. */
template <kl_weight_format format> struct weight_codec;

template <> struct weight_codec<KL_W_F32> {
    static constexpr int PIECE = 4, GROUP = 0;
    static __device__ void floats(uint4 raw, float, float (&to)[PIECE])
    {
        to[0] = __uint_as_float(raw.x);
        to[1] = __uint_as_float(raw.y);
        to[2] = __uint_as_float(raw.z);
        to[3] = __uint_as_float(raw.w);
    }
    static __device__ void pairs(uint4 raw, float s, uint32_t (&to)[PIECE / 2])
    {
        float f[PIECE];
        floats(raw, s, f);
        round_pairs(f, to);
    }
    static __device__ float at(weight_row row, int64_t col)
    {
        return reinterpret_cast<const float *>(row.data)[col];
    }
};

template <> struct weight_codec<KL_W_BF16> {
    static constexpr int PIECE = 8, GROUP = 0;
    static __device__ void floats(uint4 raw, float, float (&to)[PIECE])
    {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            to[2 * i] = low_half(words[i]);
            to[2 * i + 1] = high_half(words[i]);
        }
    }
    static __device__ void pairs(uint4 raw, float, uint32_t (&to)[PIECE / 2])
    {
        to[0] = raw.x;
        to[1] = raw.y;
        to[2] = raw.z;
        to[3] = raw.w;
    }
    static __device__ float at(weight_row row, int64_t col)
    {
        return to_float(reinterpret_cast<const bf16 *>(row.data)[col]);
    }
};

template <> struct weight_codec<KL_W_INT8> {
    static constexpr int PIECE = 16, GROUP = KL_INT8_GROUP;
    static constexpr float ONE = 64;
    static __device__ void floats(uint4 raw, float s, float (&to)[PIECE])
    {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
        const float less = -(32768.0f + 128.0f) * s;
#pragma unroll
        for (int i = 0; i < PIECE; i++)
            to[i] = fmaf(raise_byte(words[i / 4] ^ 0x80808080u, i % 4), s, less);
    }
    static __device__ void unscaled(uint4 raw, uint32_t (&to)[PIECE / 2])
    {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < PIECE / 2; i++)
            to[i] = centred(
                choose_bytes(words[i / 2] ^ 0x80808080u, 0, i % 2 == 0 ? 0x4140u : 0x4342u), 1,
                128);
    }
    static __device__ void pairs(uint4 raw, float s, uint32_t (&to)[PIECE / 2])
    {
        float f[PIECE];
        floats(raw, s, f);
        round_pairs(f, to);
    }
    static __device__ float at(weight_row row, int64_t col)
    {
        return reinterpret_cast<const int8_t *>(row.data)[col] *
               to_float(row.scales[col / GROUP]);
    }
};

template <> struct weight_codec<KL_W_INT4> {
    static constexpr int PIECE = 32, GROUP = KL_INT4_GROUP;
    static __device__ void floats(uint4 raw, float s, float (&to)[PIECE])
    {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
        const float less = -(32768.0f + 8.0f) * s;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const uint32_t w = words[i / 4];
            to[i] = fmaf(raise_byte(w & 0x0f0f0f0fu, i % 4), s, less);
            to[i + 16] = fmaf(raise_byte((w >> 4) & 0x0f0f0f0fu, i % 4), s, less);
        }
    }
    /* Nibbles n to the bf16 pair (128 + n), then - 136, which is exact, then times the
     * scale. */
    static __device__ uint32_t pair(uint32_t nibbles, uint32_t selector, __nv_bfloat162 s)
    {
        const uint32_t raised = choose_bytes(nibbles, 0x43434343u, selector);
        const __nv_bfloat162 less = __float2bfloat162_rn(136.0f);
        const __nv_bfloat162 q =
            __hsub2(*reinterpret_cast<const __nv_bfloat162 *>(&raised), less);
        return multiply_bf16(*reinterpret_cast<const uint32_t *>(&q), s);
    }
    static __device__ void pairs(uint4 raw, float scale, uint32_t (&to)[PIECE / 2])
    {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
        const __nv_bfloat162 s = __float2bfloat162_rn(scale);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t low = words[i] & 0x0f0f0f0fu, high = (words[i] >> 4) & 0x0f0f0f0fu;
            to[2 * i] = pair(low, 0x4140u, s);
            to[2 * i + 1] = pair(low, 0x4342u, s);
            to[2 * i + 8] = pair(high, 0x4140u, s);
            to[2 * i + 9] = pair(high, 0x4342u, s);
        }
    }
    static __device__ float at(weight_row row, int64_t col)
    {
        const int i = static_cast<int>(col % GROUP);
        const int byte = row.data[col / GROUP * (GROUP / 2) + i % 16];
        return ((i < 16 ? byte & 15 : byte >> 4) - 8) * to_float(row.scales[col / GROUP]);
    }
};

template <> struct weight_codec<KL_W_FP8> {
    static constexpr int PIECE = 16, GROUP = KL_FP8_GROUP;
    static constexpr float ONE = 1;
    /* Two e4m3 numbers, which float16 holds exactly. */
    static __device__ float2 two(uint32_t bytes)
    {
        const __half2_raw h =
            __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(bytes), __NV_E4M3);
        return __half22float2(h);
    }
    static __device__ void floats(uint4 raw, float s, float (&to)[PIECE])
    {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < PIECE / 2; i++) {
            const float2 q = two(words[i / 2] >> i % 2 * 16 & 0xffffu);
            to[2 * i] = q.x * s;
            to[2 * i + 1] = q.y * s;
        }
    }
    /* Bytes 2 i and 2 i + 1 of a word as a bf16 pair, exactly, of finite numbers. A byte whose sign
     * fills the upper half goes four places up: exponent and mantissa are where a bf16 has them,
     * which makes 2^-120 q, subnormal numbers included. The conversion instruction has a quarter
     * of the rate. */
    static __device__ uint32_t pair(uint32_t word, int i)
    {
        uint32_t wide; /* selectors from 8 on: the sign of a byte, eight times */
        asm("prmt.b32 %0, %1, 0, %2;" : "=r"(wide) : "r"(word), "r"(i == 0 ? 0x9180 : 0xb3a2));
        return multiply_bf16(wide << 4 & 0x87f087f0u, __float2bfloat162_rn(0x1p120f));
    }
    static __device__ void unscaled(uint4 raw, uint32_t (&to)[PIECE / 2])
    {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < PIECE / 2; i++) to[i] = pair(words[i / 2], i % 2);
    }
    static __device__ void pairs(uint4 raw, float s, uint32_t (&to)[PIECE / 2])
    {
        float f[PIECE];
        floats(raw, s, f);
        round_pairs(f, to);
    }
    static __device__ float at(weight_row row, int64_t col)
    {
        return two(row.data[col]).x * to_float(row.scales[col / GROUP]);
    }
};

template <kl_weight_format format> __device__ float scale_at(weight_row row, int64_t col)
{
    if constexpr (weight_codec<format>::GROUP == 0)
        return 1;
    else
        return to_float(row.scales[col / weight_codec<format>::GROUP]);
}

/* 16 bytes that are read once: not worth a line of the L1. */
__device__ inline uint4 load_once(const uint8_t *from)
{
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

/* Host: call f with the format as a compile-time constant:
 *     return with_format(w.format, [&](auto f) { return launch<f.value>(...); }); */
template <kl_weight_format format> struct format_constant {
    static constexpr kl_weight_format value = format;
};

template <class F> auto with_format(kl_weight_format format, F f)
{
    switch (format) {
    case KL_W_F32:
        return f(format_constant<KL_W_F32>{});
    case KL_W_INT8:
        return f(format_constant<KL_W_INT8>{});
    case KL_W_INT4:
        return f(format_constant<KL_W_INT4>{});
    case KL_W_FP8:
        return f(format_constant<KL_W_FP8>{});
    default:
        return f(format_constant<KL_W_BF16>{});
    }
}

#endif
