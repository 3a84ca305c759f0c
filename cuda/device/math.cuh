/*
 * math.cuh -- the model's scalar functions. None forms the exponential of a positive number.
 */
#ifndef KL_CUDA_DEVICE_MATH_H
#define KL_CUDA_DEVICE_MATH_H

__device__ inline float sigmoid(float x)
{
    const float e = expf(-fabsf(x));
    return (x >= 0 ? 1.0f : e) / (1 + e);
}

__device__ inline float silu(float x)
{
    return x * sigmoid(x);
}

__device__ inline float softplus(float x)
{
    return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

/* Of D numbers whose squares add up to `sum`. */
__device__ inline float inverse_rms(float sum, long long D, float eps)
{
    return 1 / sqrtf(sum / static_cast<float>(D) + eps);
}

#endif
