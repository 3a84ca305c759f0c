/*
 * load_here.cuh -- relaxed loads of the device's scope: past the L1, and where they are written. The
 * compiler would rather have a load where its value is used. So flags are read, and words that say by
 * themselves that they are there; what is to be ordered behind one takes an acquire.
 */
#ifndef KL_CUDA_DEVICE_LOAD_HERE_H
#define KL_CUDA_DEVICE_LOAD_HERE_H

#include "types.cuh"

#include <stdint.h>

__device__ inline bf16 load_here(const bf16 *from)
{
    unsigned short x;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(x) : "l"(from) : "memory");
    return __ushort_as_bfloat16(x);
}

__device__ inline uint4 load_here(const uint4 *from)
{
    uint4 x;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

__device__ inline uint32_t load_here(const uint32_t *from)
{
    uint32_t x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

__device__ inline int load_here(const int *from)
{
    return static_cast<int>(load_here(reinterpret_cast<const uint32_t *>(from)));
}

__device__ inline float load_here(const float *from)
{
    return __uint_as_float(load_here(reinterpret_cast<const uint32_t *>(from)));
}

__device__ inline uint64_t load_here(const uint64_t *from)
{
    uint64_t x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(from) : "memory");
    return x;
}

#endif
