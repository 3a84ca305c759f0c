/*
 * wide.cuh -- N neighbours of a row as floats, in accesses of at most 16 bytes.
 */
#ifndef KL_CUDA_DEVICE_WIDE_H
#define KL_CUDA_DEVICE_WIDE_H

#include "types.cuh"

/* Rows of up to NORM_COLS columns have their squares added in one order wherever they are
 * normalised: those of an access, by butterflies those of 32 accesses, then every eighth of these,
 * then the eight sums. */
constexpr int NORM_COLS = 16384, NORM_SUMS = 8;

/* Elements of T in a piece of N that one access takes. */
template <class T, int N>
constexpr int access_of = N * sizeof(T) > 16 ? 16 / static_cast<int>(sizeof(T)) : N;

template <int N, class T> __device__ void load_wide(const T *from, float (&to)[N])
{
    constexpr int M = access_of<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += M) {
        float part[M];
        load_floats<M>(from + i, part);
#pragma unroll
        for (int j = 0; j < M; j++) to[i + j] = part[j];
    }
}

template <int N, class T> __device__ void store_wide(T *to, const float (&from)[N])
{
    constexpr int M = access_of<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += M) {
        float part[M];
#pragma unroll
        for (int j = 0; j < M; j++) part[j] = from[i + j];
        store_floats<M>(to + i, part);
    }
}

template <int N> __device__ float sum_of_squares(const float (&x)[N])
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) sum = fmaf(x[i], x[i], sum);
    return sum;
}

/* Host: the same alignment for rows of n elements, `stride` apart, as the accesses above need. A
 * single row has no stride. */
inline bool is_wide(const kl_tensor &t, int64_t row, int n)
{
    const size_t element = kl_dtype_bytes(t.dtype);
    const size_t bytes = n * element < 16 ? n * element : 16;
    const int64_t stride = t.ndim > 1 && t.shape[0] > 1 ? t.stride[0] : 0;
    return row % n == 0 && is_aligned(t.data, stride, element, bytes);
}

#endif
