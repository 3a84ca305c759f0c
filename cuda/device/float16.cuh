/*
 * float16.cuh -- pairs of float16 in a register, from float32 and from e4m3 codes.
 */
#ifndef KL_CUDA_DEVICE_FLOAT16_H
#define KL_CUDA_DEVICE_FLOAT16_H

#include <cuda_fp16.h>
#include <stdint.h>

__device__ inline uint32_t pack_half(float low, float high)
{
    const __half2 p = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&p);
}

/* Four e4m3 codes as two pairs, exact. */
__device__ inline void pairs_of_fp8(uint32_t codes, uint32_t &low, uint32_t &high)
{
    asm("{ .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.rn.f16x2.e4m3x2 %0, l;\n"
        "cvt.rn.f16x2.e4m3x2 %1, h; }"
        : "=r"(low), "=r"(high)
        : "r"(codes));
}

#endif
