/*
 * wgmma.cuh -- tensor-core products of a warpgroup (sm_90a): A from registers or shared memory,
 * B from shared memory, asynchronous.
 *
 *     D [64, N] += A [64, 16] B [16, N]       bf16 or f16 operands, f32 sums
 *
 * Warp w of the warpgroup holds rows 16 w .. 16 w + 15 of A and D, in the fragments of
 * mma.m16n8k16 (mma.cuh): D is N / 8 of its C one behind the other. B is given by its columns:
 * column n is row n of an array in shared memory whose rows have 128 bytes, in swizzled order:
 * 16 bytes number c of row n lie at 128 n + 16 (c ^ n % 8). The array begins at a multiple of
 * 1024 bytes.
 *
 * Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
 */
#ifndef KL_CUDA_DEVICE_WGMMA_H
#define KL_CUDA_DEVICE_WGMMA_H

#include "mma.cuh"
#include "sm_90a.cuh"

constexpr int WARPGROUP = 128; /* threads */

/* Byte of a row's 16-byte piece in an array of 128, 64 or 32 bytes a row, in the order that the
 * copy engine's swizzles give it; the array begins at a multiple of 1024 bytes. */
template <int ROW_BYTES> __device__ int swizzled(int row, int piece)
{
    static_assert(ROW_BYTES == 128 || ROW_BYTES == 64 || ROW_BYTES == 32);
    return row * ROW_BYTES + ((piece ^ row * ROW_BYTES / 128) % (ROW_BYTES / 16)) * 16;
}

/* B from row 0 of an array, its columns k from 64 bits at `shared`. Rows of 128 or 64 bytes. */
template <int ROW_BYTES = 128> __device__ uint64_t wgmma_descriptor(const void *shared)
{
    constexpr uint64_t EIGHT_ROWS = 8 * ROW_BYTES / 16, SWIZZLE = ROW_BYTES == 128 ? 1 : 2;
    static_assert(ROW_BYTES == 128 || ROW_BYTES == 64);
    return (shared_address(shared) & 0x3ffffu) / 16 | uint64_t{1} << 16 | EIGHT_ROWS << 32 |
           SWIZZLE << 62;
}

/* B transposed: row k of the array holds the columns of B, 64 of them in its 128 bytes; the next
 * 64 lie in another array `bytes` behind. From row k at `shared`, k a multiple of 8. */
__device__ inline uint64_t wgmma_descriptor_transposed(const void *shared, int bytes)
{
    constexpr uint64_t EIGHT_ROWS = 1024 / 16, SWIZZLE_128 = 1;
    return (shared_address(shared) & 0x3ffffu) / 16 | static_cast<uint64_t>(bytes / 16) << 16 |
           EIGHT_ROWS << 32 | SWIZZLE_128 << 62;
}

/* The same of what lies `bytes`, a multiple of 16, further on. */
__device__ inline uint64_t wgmma_moved(uint64_t descriptor, unsigned bytes)
{
    return descriptor + bytes / 16;
}

/* Before the first product, and after other instructions wrote to registers of the next. */
__device__ inline void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Until at most `pending` committed groups are unfinished. */
template <int pending> __device__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* Keeps the compiler from reading sums before the wait that stands above. */
template <int n> __device__ void wgmma_settle(float (&d)[n])
{
#pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define WGMMA_REGS_4 "%0, %1, %2, %3"
#define WGMMA_REGS_16                                                                          \
    "%0, %1, %2, %3, %4, %5, %6, %7, "                                                         \
    "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGS_32                                                                          \
    WGMMA_REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, "                                 \
                  "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGS_48                                                                          \
    WGMMA_REGS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, "                                 \
                  "%40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGS_64                                                                          \
    WGMMA_REGS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, "                                 \
                  "%56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_REGS_80                                                                          \
    WGMMA_REGS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, "                                 \
                  "%72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_ACC_4(d) "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3])
#define WGMMA_ACC_16(d, i)                                                                     \
    "+f"((d)[(i) + 0]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]),            \
        "+f"((d)[(i) + 4]), "+f"((d)[(i) + 5]), "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7]),        \
        "+f"((d)[(i) + 8]), "+f"((d)[(i) + 9]), "+f"((d)[(i) + 10]), "+f"((d)[(i) + 11]),      \
        "+f"((d)[(i) + 12]), "+f"((d)[(i) + 13]), "+f"((d)[(i) + 14]), "+f"((d)[(i) + 15])
#define WGMMA_ACC_32(d) WGMMA_ACC_16(d, 0), WGMMA_ACC_16(d, 16)
#define WGMMA_ACC_48(d) WGMMA_ACC_32(d), WGMMA_ACC_16(d, 32)
#define WGMMA_ACC_64(d) WGMMA_ACC_48(d), WGMMA_ACC_16(d, 48)
#define WGMMA_ACC_80(d) WGMMA_ACC_64(d), WGMMA_ACC_16(d, 64)

#define WGMMA(N, TYPE, REGS, ACC, A, B, T)                                                     \
    asm volatile("{\n"                                                                         \
                 ".reg .pred add;\n"                                                           \
                 "setp.eq.u32 add, 1, 1;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS     \
                 "}, {" A "}, " B ", add, 1, 1, " T ";\n"                                      \
                 "}"                                                                           \
                 : ACC                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                          \
                 : "memory")

/* d[0 .. N / 2 - 1] += a b. */
template <int N>
__device__ __forceinline__ void wgmma(float *d, const uint32_t (&a)[4], uint64_t b)
{
    static_assert(N == 32 || N == 64 || N == 96 || N == 128 || N == 160);
    if constexpr (N == 32)
        WGMMA(32, "bf16", WGMMA_REGS_16, WGMMA_ACC_16(d, 0), "%16, %17, %18, %19", "%20", "0");
    else if constexpr (N == 64)
        WGMMA(64, "bf16", WGMMA_REGS_32, WGMMA_ACC_32(d), "%32, %33, %34, %35", "%36", "0");
    else if constexpr (N == 96)
        WGMMA(96, "bf16", WGMMA_REGS_48, WGMMA_ACC_48(d), "%48, %49, %50, %51", "%52", "0");
    else if constexpr (N == 128)
        WGMMA(128, "bf16", WGMMA_REGS_64, WGMMA_ACC_64(d), "%64, %65, %66, %67", "%68", "0");
    else
        WGMMA(160, "bf16", WGMMA_REGS_80, WGMMA_ACC_80(d), "%80, %81, %82, %83", "%84", "0");
}

/* The same of f16. */
template <int N>
__device__ __forceinline__ void wgmma_half(float *d, const uint32_t (&a)[4], uint64_t b)
{
    static_assert(N == 32);
    WGMMA(32, "f16", WGMMA_REGS_16, WGMMA_ACC_16(d, 0), "%16, %17, %18, %19", "%20", "0");
}

/* The same with a transposed B. */
template <int N>
__device__ __forceinline__ void wgmma_transposed(float *d, const uint32_t (&a)[4], uint64_t b)
{
    static_assert(N == 128);
    WGMMA(128, "bf16", WGMMA_REGS_64, WGMMA_ACC_64(d), "%64, %65, %66, %67", "%68", "1");
}

#undef WGMMA

#define WGMMA_OF_TRANSPOSED(N, REGS, ACC, A, B)                                                \
    asm volatile("{\n"                                                                         \
                 ".reg .pred add;\n"                                                           \
                 "setp.eq.u32 add, 1, 1;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS "}, " A     \
                 ", " B ", add, 1, 1, 1, 0;\n"                                                 \
                 "}"                                                                           \
                 : ACC                                                                         \
                 : "l"(a), "l"(b)                                                              \
                 : "memory")

/* d[0 .. N / 2 - 1] += a b with both operands in shared memory: `a` is the transpose of an array
 * as wgmma_descriptor_transposed() describes it, row k of which holds the 64 rows of A. */
template <int N>
__device__ __forceinline__ void wgmma_of_transposed(float *d, uint64_t a, uint64_t b)
{
    static_assert(N == 8 || N == 32);
    if constexpr (N == 8)
        WGMMA_OF_TRANSPOSED(8, WGMMA_REGS_4, WGMMA_ACC_4(d), "%4", "%5");
    else
        WGMMA_OF_TRANSPOSED(32, WGMMA_REGS_16, WGMMA_ACC_16(d, 0), "%16", "%17");
}

#undef WGMMA_OF_TRANSPOSED

#endif
