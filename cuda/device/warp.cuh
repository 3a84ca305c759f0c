/*
 * warp.cuh -- reductions over a warp and over a block, in one fixed order.
 */
#ifndef KL_CUDA_DEVICE_WARP_H
#define KL_CUDA_DEVICE_WARP_H

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline int lane_id()
{
    return static_cast<int>(threadIdx.x) % WARP;
}

__device__ inline int warp_id()
{
    return static_cast<int>(threadIdx.x) / WARP;
}

/* Over groups of `width` neighbouring lanes (a power of two); the result is in every lane. */
template <int width = WARP> __device__ float warp_sum(float x)
{
#pragma unroll
    for (int d = width / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}

template <int width = WARP> __device__ float warp_max(float x)
{
#pragma unroll
    for (int d = width / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, d));
    return x;
}

/* Over all threads of a block of `threads` (a multiple of WARP). `shared` holds a value for each
 * warp; the result is in every thread. Barriers before and after: the caller may reuse it. */
template <int threads> __device__ float block_sum(float x, float *shared)
{
    x = warp_sum(x);
    if constexpr (threads == WARP) return x;
    __syncthreads();
    if (lane_id() == 0) shared[warp_id()] = x;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < threads / WARP; i++) sum += shared[i];
    return sum;
}

template <int threads> __device__ float block_max(float x, float *shared)
{
    x = warp_max(x);
    if constexpr (threads == WARP) return x;
    __syncthreads();
    if (lane_id() == 0) shared[warp_id()] = x;
    __syncthreads();
    float best = shared[0];
#pragma unroll
    for (int i = 1; i < threads / WARP; i++) best = fmaxf(best, shared[i]);
    return best;
}

#endif
