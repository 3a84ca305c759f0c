/*
 * types.cuh -- element types of activations: conversion, and vectors of up to 16 bytes.
 */
#ifndef KL_CUDA_DEVICE_TYPES_H
#define KL_CUDA_DEVICE_TYPES_H

#include "../cuda_backend.h"

#include <cuda_bf16.h>
#include <string.h>

using bf16 = __nv_bfloat16;

constexpr long long MAX_BLOCKS = 0x7fffffff; /* of a grid's x axis */

__device__ inline float to_float(float x)
{
    return x;
}

__device__ inline float to_float(bf16 x)
{
    return __bfloat162float(x);
}

template <class T> __device__ T from_float(float x)
{
    if constexpr (sizeof(T) == 2)
        return __float2bfloat16_rn(x);
    else
        return x;
}

/* Of two bf16 in a word, the first in the low half. */
__device__ inline float low_half(uint32_t x)
{
    return __uint_as_float(x << 16);
}

__device__ inline float high_half(uint32_t x)
{
    return __uint_as_float(x & 0xffff0000u);
}

/* N neighbours that are loaded and stored as one; N * sizeof(T) is 4, 8 or 16. */
template <class T, int N> struct alignas(N * sizeof(T)) vec {
    T x[N];
};

/* A pair of bf16 is a shift and a mask. */
template <class T, int N> __device__ void to_floats(const vec<T, N> &v, float (&to)[N])
{
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            uint32_t pair;
            memcpy(&pair, &v.x[i], sizeof pair);
            to[i] = low_half(pair), to[i + 1] = high_half(pair);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = to_float(v.x[i]);
    }
}

template <int N, class T> __device__ void load_floats(const T *from, float (&to)[N])
{
    const vec<T, N> v = *reinterpret_cast<const vec<T, N> *>(from);
    to_floats(v, to);
}

/* Rounded: a pair of bf16 is one instruction. */
template <class T, int N> __device__ vec<T, N> rounded(const float (&from)[N])
{
    vec<T, N> v;
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(from[i], from[i + 1]);
            memcpy(&v.x[i], &pair, sizeof pair);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) v.x[i] = from_float<T>(from[i]);
    }
    return v;
}

template <int N, class T> __device__ void store_floats(T *to, const float (&from)[N])
{
    *reinterpret_cast<vec<T, N> *>(to) = rounded<T>(from);
}

/* Host: whether a base address and a stride of elements allow vectors of `bytes`. */
inline bool is_aligned(const void *data, int64_t stride, size_t element, size_t bytes)
{
    return reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
           static_cast<size_t>(stride) * element % bytes == 0;
}

/* Host: call f with a value of the dtype's element type, float or bf16:
 *     return with_float_type(x.dtype, [&](auto t) { return launch<decltype(t)>(...); }); */
template <class F> kl_status with_float_type(kl_dtype dtype, F f)
{
    return dtype == KL_BF16 ? f(bf16{}) : f(float{});
}

#endif
