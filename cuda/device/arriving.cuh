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
 * In an MLA layer of a single token linear_pair lets the first of mla_decode's three kernels start
 * likewise, and each of these the next one, and the last one o: again what came before linear_pair
 * is complete when a block of any starts. Beside words they write
 *   - blanks, over what the pieces' results will be: the first kernel, before it lets others start;
 *     those of the second read words of it, and those of the third start behind them.
 *   - the token's own latents: the second kernel, in memory that no other one of the layer reads.
 */
#ifndef KL_CUDA_DEVICE_ARRIVING_H
#define KL_CUDA_DEVICE_ARRIVING_H

#include "load_here.cuh"
#include "warp.cuh"

__device__ inline bool is_there(bf16 x)
{
    return __bfloat16_as_ushort(x) != KL_BLANK;
}

__device__ inline bool is_there(uint32_t pair)
{
    return (pair & 0xffff) != KL_BLANK && pair >> 16 != KL_BLANK;
}

/* All eight words: the largest as an unsigned number is no blank. */
__device__ inline bool is_there(uint4 x)
{
    return is_there(__vmaxu2(__vmaxu2(x.x, x.y), __vmaxu2(x.z, x.w)));
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

/* Eight roundings. */
__device__ inline void store_arriving(uint4 *to, uint4 x)
{
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x),
                 "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

/* ---- f32, whose blank is the last of the NaNs: another one stands for it ------------------- */

constexpr uint32_t BLANK_FLOAT = KL_BLANK << 16 | KL_BLANK;

__device__ inline void store_arriving(float *to, float x)
{
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to),
                 "r"(min(__float_as_uint(x), BLANK_FLOAT - 1))
                 : "memory");
}

/* ---- many at once ------------------------------------------------------------------------- */

/* Of words of a kind, as unsigned numbers, the largest; whether that is one. */
struct bf16_pairs {
    static __device__ uint32_t largest(uint32_t x, uint32_t y, uint32_t z)
    {
        return __vimax3_u16x2(x, y, z);
    }
    static __device__ bool are_there(uint32_t most) { return is_there(most); }
};

struct floats {
    static __device__ uint32_t largest(uint32_t x, uint32_t y, uint32_t z)
    {
        return __vimax3_u32(x, y, z);
    }
    static __device__ bool are_there(uint32_t most) { return most != BLANK_FLOAT; }
};

/* load_here() into x, or not. */
__device__ inline void load_here_if(bool wanted, const uint4 *from, uint4 &x)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "setp.ne.s32 p, %4, 0;\n"
                 "@p ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%5];\n"
                 "}"
                 : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w)
                 : "r"(static_cast<int>(wanted)), "l"(from)
                 : "memory");
}

/* n pieces from `from` on, `stride` apart, but zeros for those past `count`, once a warp's are all
 * there: those that are missing are asked for together. */
template <class Words, int n>
__device__ void await_all(const uint4 *from, int stride, int count, uint4 (&x)[n])
{
    bool all;
#pragma unroll
    for (int i = 0; i < n; i++) x[i] = {};
    do {
        uint32_t low = 0, high = 0;
#pragma unroll
        for (int i = 0; i < n; i++) load_here_if(i < count, from + i * stride, x[i]);
#pragma unroll
        for (int i = 0; i < n; i++) {
            low = Words::largest(low, x[i].x, x[i].y);
            high = Words::largest(high, x[i].z, x[i].w);
        }
        all = Words::are_there(Words::largest(low, high, 0));
    } while (!__all_sync(ALL_LANES, all));
}

#endif
