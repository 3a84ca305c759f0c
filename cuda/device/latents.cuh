/*
 * latents.cuh -- a new token's latents on their way into its page, and how pages are read, those
 * of act and those of 8 bits.
 */
#ifndef KL_CUDA_DEVICE_LATENTS_H
#define KL_CUDA_DEVICE_LATENTS_H

#include "float16.cuh"
#include "mma.cuh"
#include "types.cuh"
#include "warp.cuh"

extern "C" {
#include "backend/mla.h"
}

/* ---- reading --------------------------------------------------------------------------- */

/* Rows of pages from row number `first` on. */
template <class T> struct act_rows {
    const T *data;
    long long width;

    __device__ act_rows(const void *pages, const kl_latents_row &row, long long first)
        : data(static_cast<const T *>(pages) + first * (row.rank + row.rope)),
          width(row.rank + row.rope)
    {
    }

    /* VEC channels of row j from i on. */
    template <int VEC> __device__ void load(long long j, long long i, float (&to)[VEC]) const
    {
        load_floats(data + j * width + i, to);
    }
    __device__ float at(long long j, long long i) const
    {
        return to_float(data[j * width + i]);
    }
};

/* The same of 8 bits. */
struct packed_rows {
    const uint8_t *data;
    const kl_latents_row &row;

    __device__ packed_rows(const void *pages, const kl_latents_row &of, long long first)
        : data(static_cast<const uint8_t *>(pages) + first * of.row_bytes), row(of)
    {
    }

    template <int VEC> __device__ void load(long long j, long long i, float (&to)[VEC]) const
    {
#pragma unroll
        for (int v = 0; v < VEC; v++) to[v] = at(j, i + v);
    }
    __device__ float at(long long j, long long i) const
    {
        const uint8_t *at = data + j * row.row_bytes;
        if (i >= row.rank)
            return to_float(reinterpret_cast<const bf16 *>(at + row.rope_at)[i - row.rank]);
        const float *scales = reinterpret_cast<const float *>(at + row.scales_at);
        return kl_latents_value(at[i]) * scales[i / KL_LATENTS_GROUP];
    }
};

/* Host: call f with a null pointer to the rows' type, as with_float_type() does with a number. */
template <class F> auto with_rows(bool packed, kl_dtype act, F f)
{
    if (packed) return f(static_cast<packed_rows *>(nullptr));
    return with_float_type(
        act, [&](auto t) { return f(static_cast<act_rows<decltype(t)> *>(nullptr)); });
}

/* What multiplies the pairs below: two scales, raised by 2^120. */
__device__ inline uint32_t code_factors(float low, float high)
{
    return pack_bf16(low * 0x1p120f, high * 0x1p120f);
}

__device__ inline uint32_t multiply_pairs(uint32_t x, uint32_t y)
{
    const __nv_bfloat162 p = __hmul2(*reinterpret_cast<const __nv_bfloat162 *>(&x),
                                     *reinterpret_cast<const __nv_bfloat162 *>(&y));
    return *reinterpret_cast<const uint32_t *>(&p);
}

/* Bytes of codes picked by a selector's digits; from 8 on, eight times the sign of byte
 * digit - 8. */
__device__ inline uint32_t codes_and_signs(uint32_t codes, uint32_t digits)
{
    uint32_t x;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(x) : "r"(codes), "r"(digits));
    return x;
}

/* Of four codes the first and the third as bf16, and the second and the fourth. A code's bits,
 * moved to where bf16 has exponent and fraction, are 2^-120 times its number, exactly. */
__device__ inline uint32_t even_codes(uint32_t codes, uint32_t factors)
{
    return multiply_pairs(codes_and_signs(codes, 0xa280) << 4 & 0x87f087f0u, factors);
}

__device__ inline uint32_t odd_codes(uint32_t codes, uint32_t factors)
{
    return multiply_pairs(codes_and_signs(codes, 0xb391) << 4 & 0x87f087f0u, factors);
}

/* Of two neighbours' codes, two each: the first ones together, then the second ones. */
__device__ inline uint32_t sorted_codes(uint32_t codes)
{
    return __byte_perm(codes, 0, 0x3120);
}

/* ---- writing --------------------------------------------------------------------------- */

/* New tokens and the pages that they are written to. Of a row `width` channels are written, the
 * first `normalised` of them as norm_weight * x / sqrt(mean(x^2) + eps). */
struct new_latents {
    const void *raw;
    void *pages;
    const float *norm_weight;
    const int *block_table, *lengths;
    long long B, stride, width, normalised;
    float eps;
    bool packed; /* pages are of 8 bits */
    kl_latents_row row;
    bool vectors; /* of 16 bytes: rows of raw and of pages, and `normalised`, allow them */
};

/* In which row of all pages position `position` of sequence n is. */
__device__ inline long long latents_row(const new_latents &a, long long n, long long position)
{
    const long long page = a.block_table[n * a.B + position / KL_PAGE_TOKENS];
    return page * KL_PAGE_TOKENS + position % KL_PAGE_TOKENS;
}

template <int VEC, class T> __device__ float sum_of_squares(const T *x, long long count)
{
    float sum = 0;
    for (long long i = lane_id() * VEC; i < count; i += WARP * VEC) {
        float v[VEC];
        load_floats<VEC>(x + i, v);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum = fmaf(v[j], v[j], sum);
    }
    return warp_sum(sum);
}

/* VEC divides `normalised` and `width`: a vector is normalised or copied as a whole. */
template <int VEC, class T>
__device__ void write_latents_by(const new_latents &a, const T *from, T *to)
{
    float factor = 1;
    if (a.normalised > 0)
        factor = 1 / sqrtf(sum_of_squares<VEC>(from, a.normalised) /
                               static_cast<float>(a.normalised) +
                           a.eps);
    for (long long i = lane_id() * VEC; i < a.width; i += WARP * VEC) {
        float v[VEC];
        load_floats<VEC>(from + i, v);
        if (i < a.normalised)
            for (int j = 0; j < VEC; j++) v[j] = v[j] * factor * a.norm_weight[i + j];
        store_floats<VEC>(to + i, v);
    }
}

/* Four channels as they are in act; zeros past the last. */
template <class T>
__device__ void make_four(const new_latents &a, const T *from, float factor, long long first,
                          long long end, float (&x)[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const long long i = first + j;
        x[j] = i < end ? to_float(from[i]) : 0.0f;
        if (i < a.normalised) x[j] = to_float(from_float<T>(x[j] * factor * a.norm_weight[i]));
    }
}

/* 128 channels from `first` on. */
template <class T>
__device__ void write_group(const new_latents &a, const T *from, float factor, long long first,
                            uint8_t *to)
{
    const long long i = first + lane_id() * 4;
    float x[4];
    uint32_t most = 0; /* magnitudes are in the order of their bits, a NaN on top */
    make_four(a, from, factor, i, a.row.rank, x);
#pragma unroll
    for (int j = 0; j < 4; j++) most = max(most, kl_latents_bits(x[j]) & 0x7fffffffu);
    const float scale = kl_latents_scale(kl_latents_float(__reduce_max_sync(ALL_LANES, most)));
    for (int j = 0; j < 4 && i + j < a.row.rank; j++)
        to[i + j] = kl_latents_code(x[j] * (1 / scale));
    if (lane_id() == 0)
        reinterpret_cast<float *>(to + a.row.scales_at)[first / KL_LATENTS_GROUP] = scale;
}

__device__ inline void clear_bytes(uint8_t *to, long long first, long long end)
{
    for (long long i = first + lane_id(); i < end; i += WARP) to[i] = 0;
}

template <class T>
__device__ void write_packed(const new_latents &a, const T *from, uint8_t *to)
{
    const kl_latents_row &row = a.row;
    float factor = 1;
    if (a.normalised > 0)
        factor =
            1 / sqrtf(sum_of_squares<1>(from, a.normalised) / static_cast<float>(a.normalised) +
                      a.eps);
    for (long long i = 0; i < row.rank; i += KL_LATENTS_GROUP)
        write_group(a, from, factor, i, to);
    bf16 *rope = reinterpret_cast<bf16 *>(to + row.rope_at);
    for (long long i = lane_id(); i < row.rope; i += WARP)
        rope[i] = from_float<bf16>(to_float(from[row.rank + i]));
    clear_bytes(to, row.rank, row.rope_at);
    clear_bytes(to, row.rope_at + 2 * row.rope, row.scales_at);
    clear_bytes(to, row.scales_at + (row.rank + KL_LATENTS_GROUP - 1) / KL_LATENTS_GROUP * 4,
                row.row_bytes);
}

/* One token's, by a warp; the second reading comes from the L1. */
template <class T, bool packed>
__device__ void write_latents_as(const new_latents &a, long long token, long long n,
                                 long long position)
{
    const T *from = static_cast<const T *>(a.raw) + token * a.stride;
    const long long row = latents_row(a, n, position);
    if constexpr (packed) {
        write_packed(a, from, static_cast<uint8_t *>(a.pages) + row * a.row.row_bytes);
    } else {
        T *to = static_cast<T *>(a.pages) + row * a.width;
        if (a.vectors)
            write_latents_by<16 / sizeof(T)>(a, from, to);
        else
            write_latents_by<1>(a, from, to);
    }
}

template <class T>
__device__ void write_latents(const new_latents &a, long long token, long long n,
                              long long position)
{
    if (a.packed)
        write_latents_as<T, true>(a, token, n, position);
    else
        write_latents_as<T, false>(a, token, n, position);
}

/* Host: the arguments of a call of mla_append. */
inline new_latents new_latents_of(const kl_mla_append *a)
{
    const bool norm = !kl_tensor_absent(&a->norm_weight);
    const size_t element = kl_dtype_bytes(a->raw.dtype);
    new_latents l = {
        .raw = a->raw.data,
        .pages = a->pages.data,
        .norm_weight = static_cast<const float *>(a->norm_weight.data),
        .block_table = static_cast<const int *>(a->block_table.data),
        .lengths = static_cast<const int *>(a->lengths.data),
        .B = a->block_table.shape[1],
        .stride = a->raw.stride[0],
        .width = a->raw.shape[1],
        .normalised = norm ? a->norm_weight.shape[0] : 0,
        .eps = a->eps,
        .packed = kl_latents_are_packed(&a->pages),
        .row = kl_latents_row_of(a->rank, a->raw.shape[1] - a->rank),
    };
    const int64_t vec = static_cast<int64_t>(16 / element);
    l.vectors = l.normalised % vec == 0 && l.width % vec == 0 &&
                is_aligned(l.raw, l.stride, element, 16) &&
                is_aligned(l.pages, l.width, element, 16);
    return l;
}

#endif
