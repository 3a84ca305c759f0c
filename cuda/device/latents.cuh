/*
 * latents.cuh -- a new token's latents on their way into its page.
 */
#ifndef KL_CUDA_DEVICE_LATENTS_H
#define KL_CUDA_DEVICE_LATENTS_H

#include "types.cuh"
#include "warp.cuh"

/* New tokens and the pages that they are written to. Of a row `width` channels are written, the
 * first `normalised` of them as norm_weight * x / sqrt(mean(x^2) + eps). */
struct new_latents {
    const void *raw;
    void *pages;
    const float *norm_weight;
    const int *block_table, *lengths;
    long long B, stride, width, normalised;
    float eps;
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

/* One token's, by a warp; the second reading comes from the L1. */
template <class T>
__device__ void write_latents(const new_latents &a, long long token, long long n,
                              long long position)
{
    const T *from = static_cast<const T *>(a.raw) + token * a.stride;
    T *to = static_cast<T *>(a.pages) + latents_row(a, n, position) * a.width;
    if (a.vectors)
        write_latents_by<16 / sizeof(T)>(a, from, to);
    else
        write_latents_by<1>(a, from, to);
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
    };
    const int64_t vec = static_cast<int64_t>(16 / element);
    l.vectors = l.normalised % vec == 0 && l.width % vec == 0 &&
                is_aligned(l.raw, l.stride, element, 16) &&
                is_aligned(l.pages, l.width, element, 16);
    return l;
}

#endif
