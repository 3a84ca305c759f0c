/*
 * math.cuh -- the model's scalar functions. None forms the exponential of a positive number where
 * an overflow would be seen.
 */
#ifndef KL_CUDA_DEVICE_MATH_H
#define KL_CUDA_DEVICE_MATH_H

__device__ inline float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* Of a normal number, to an ulp: one instruction where a division is ten. */
__device__ inline float reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / sqrt(x) of a normal number, to an ulp. */
__device__ inline float reciprocal_root(float x)
{
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float sigmoid(float x)
{
    const float e = expf(-fabsf(x));
    return (x >= 0 ? 1.0f : e) * reciprocal(1 + e);
}

__device__ inline float silu(float x)
{
    return x * sigmoid(x);
}

/* As good as needs be for a result that is rounded to A: to 1e-6 for 16 bits. Where 1 + e^-x is no
 * float, or its reciprocal none, x times that is 0 to 1e-36. */
template <class A> __device__ float silu_for(float x)
{
    if constexpr (sizeof(A) == sizeof(float)) return silu(x);
    return x * reciprocal(1 + exp2_approx(-1.4426950408889634f * x));
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
