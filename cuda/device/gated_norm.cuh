/*
 * gated_norm.cuh -- the arithmetic of gated_rms_norm, of which a row has the same bits in every
 * kernel that ends with it:
 *
 *     out = x / sqrt(mean(x^2) + eps) * weight * sigmoid(z)
 *
 * A lane adds the squares of 16 bytes in rising order; then sums of neighbours are added, and
 * those of neighbours of such. So half of a row has a sum of its own, whoever finds it.
 */
#ifndef KL_CUDA_DEVICE_GATED_NORM_H
#define KL_CUDA_DEVICE_GATED_NORM_H

#include "math.cuh"
#include "warp.cuh"
#include "wide.cuh"

/* Over groups of `width` neighbouring lanes; the result is in every lane. */
template <int width> __device__ float sum_of_neighbours(float x)
{
#pragma unroll
    for (int d = 1; d < width; d *= 2) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}

/* The factor of a row of D numbers whose squares add up to `sum`, and sigmoid(z). For 16 bits a few
 * instructions each, to 1e-6; the exponential is infinite where 0 is right. */
template <class A> __device__ float norm_factor(float sum, long long D, float eps)
{
    if constexpr (sizeof(A) == sizeof(float)) return inverse_rms(sum, D, eps);
    return rsqrtf(sum / static_cast<float>(D) + eps);
}

template <class A> __device__ float norm_gate(float z)
{
    if constexpr (sizeof(A) == sizeof(float)) return sigmoid(z);
    return reciprocal(1 + exp2_approx(-1.4426950408889634f * z));
}

__device__ inline float gated(float x, float factor, float weight, float gate)
{
    return x * factor * weight * gate;
}

/* A row of D <= CHUNKS * LANES * VEC elements by neighbouring lanes of a warp, this the lane-th;
 * all of the warp's are here, `inside` or not. */
template <class A, int VEC, int LANES, int CHUNKS>
__device__ void gated_row(const A *from, const A *gates, const float *weights, A *out, int lane,
                          bool inside, int64_t D, float eps)
{
    float x[CHUNKS][VEC], z[CHUNKS][VEC];
    float sum = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int64_t i = (c * LANES + lane) * VEC;
#pragma unroll
        for (int j = 0; j < VEC; j++) x[c][j] = 0;
        if (!inside || i >= D) continue;
        load_wide(from + i, x[c]);
        load_wide(gates + i, z[c]);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int j = 0; j < VEC; j++) sum = fmaf(x[c][j], x[c][j], sum);
    const float factor = norm_factor<A>(sum_of_neighbours<LANES>(sum), D, eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int64_t i = (c * LANES + lane) * VEC;
        if (!inside || i >= D) continue;
        float weight[VEC];
        load_wide(weights + i, weight);
#pragma unroll
        for (int j = 0; j < VEC; j++)
            x[c][j] = gated(x[c][j], factor, weight[j], norm_gate<A>(z[c][j]));
        store_wide(out + i, x[c]);
    }
}

#endif
