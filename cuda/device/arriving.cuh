/*
 * arriving.cuh -- inputs that a block reads word by word as they arrive (backend/arrivals.h), and
 * the stores that they come by.
 *
 * Words are stored and looked for in the L2, by relaxed accesses of the device's scope. What is not
 * KL_BLANK is the result: it was stored once, over a blank, and it stands for nothing else, so
 * neither a fence nor an order of stores is needed. A load of 16 bytes may find any of its eight
 * words before the others, and looks at each.
 *
 * launch.cuh has why what is looked for comes, and how such a kernel ends. Which other memory its
 * blocks may touch before that, in a KDA layer of a single token:
 *   - linear_pair (product_step_kernel) lets the mixer start after its own wait, and o starts after
 *     the mixer has. So what came before linear_pair is complete when a block of either starts:
 *     slots, states, windows and the residual. They are read past the L1, which may hold what
 *     was there before.
 *   - linear_pair may still run beside the mixer and o. It reads weights and the residual, which o
 *     writes. But a block of it stores its first word when it has read all of the residual, it
 *     stores one at least, and o writes when all words of all heads are there, which are made of
 *     all words of linear_pair.
 *   - the mixer may still run beside o. Of its states and windows each is read and written by one
 *     block, and by no other kernel of the layer.
 *   - what o adds to a router's sums is read behind o's end.
 *
 * In an MLA layer of a single token the first of mla_decode's three kernels lets the next one start
 * after its own wait, and each of the others once it has begun itself: so again what came before the
 * first one is complete when a block of o starts.
 */
#ifndef KL_CUDA_DEVICE_ARRIVING_H
#define KL_CUDA_DEVICE_ARRIVING_H

#include "types.cuh"

/* A load past the L1 that stays where it is written: the compiler would rather have it where the
 * value is used. */
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

__device__ inline bool is_there(bf16 x)
{
    return __bfloat16_as_ushort(x) != KL_BLANK;
}

/* All eight words: the largest as an unsigned number is no blank. */
__device__ inline bool is_there(uint4 x)
{
    const unsigned largest = __vmaxu2(__vmaxu2(x.x, x.y), __vmaxu2(x.z, x.w));
    return (largest & 0xffff) != KL_BLANK && largest >> 16 != KL_BLANK;
}

/* Once it is there. */
template <class T> __device__ T await(const T *from)
{
    T x;
    do x = load_here(from);
    while (!is_there(x));
    return x;
}

/* A rounding: never KL_BLANK. */
__device__ inline void store_arriving(bf16 *to, float x)
{
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to),
                 "h"(__bfloat16_as_ushort(from_float<bf16>(x)))
                 : "memory");
}

#endif
