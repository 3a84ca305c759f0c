/*
 * mma.cuh -- tensor-core products of one warp (mma.sync, any sm_80 and later), the shared-memory
 * loads that feed them and asynchronous copies that fill it.
 *
 * Fragments of m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"), lane = 4 r + c:
 *   A 16 x 16  a[0] rows r, columns 2c..;  a[1] rows r + 8;  a[2], a[3] the same, columns + 8
 *   B 16 x 8   b[0] rows (k) 2c.., column (n) r;  b[1] rows + 8
 *   C 16 x 8   c[0], c[1] row r, columns 2c, 2c + 1;  c[2], c[3] row r + 8
 */
#ifndef KL_CUDA_DEVICE_MMA_H
#define KL_CUDA_DEVICE_MMA_H

#include "types.cuh"

#include <stdint.h>

/* c += a b, bf16 operands, f32 sums. */
__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* The same 8 deep: a[0] and a[1] of A, b[0] of B. */
__device__ inline void mma_bf16(float (&c)[4], uint32_t a_0, uint32_t a_1, uint32_t b)
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a_0), "r"(a_1), "r"(b));
}

/* c += a b, float16 operands, f32 sums; fragments as mma_bf16 has them. */
__device__ inline void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* c += a b with m16n8k8 operands in tf32 (f32 bits, the low 13 ignored): A rows r, r + 8 by
 * columns c, c + 4 in the order (r, c), (r + 8, c), (r, c + 4), (r + 8, c + 4); B rows c, c + 4,
 * column r. */
__device__ inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline uint32_t shared_address(const void *p)
{
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/* Four 8 x 8 matrices of 16-bit values: lane 8 m + i names the start of row i of matrix m. */
__device__ inline void ldmatrix(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

__device__ inline uint32_t pack_bf16(float low, float high)
{
    const __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&p);
}

/* 16 bytes from device to shared memory, past the L1; zeros where `inside` is false. */
__device__ inline void copy_async(void *shared, const void *global, bool inside)
{
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
}

__device__ inline void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Wait until at most `pending` committed groups of this thread are unfinished. */
template <int pending> __device__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#endif
