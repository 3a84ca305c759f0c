/*
 * kda_prefill_invert.cuh -- X = (1 + A)^-1 diag(b) of a chunk, by a block of 256 threads.
 *
 * A's blocks on and below the diagonal lie in shared memory, row by row: kda_block_of().
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_INVERT_H
#define KL_CUDA_KERNELS_KDA_PREFILL_INVERT_H

#include "kda_prefill.cuh"

constexpr int KDA_BLOCKS = KDA_TOKENS / KDA_BLOCK;      /* on a side of A */
constexpr int KDA_SOLVERS = KDA_TOKENS * KDA_BLOCK / 4; /* threads        */

__device__ constexpr int kda_block_of(int row, int column)
{
    return row * (row + 1) / 2 + column;
}

struct kda_inverse {
    float diagonal[KDA_BLOCKS][KDA_BLOCK][KDA_BLOCK]; /* inverses of 1 + A's diagonal blocks */
    float right[KDA_BLOCK][KDA_TOKENS];               /* of the rows being solved            */
    float X[KDA_TOKENS][KDA_TOKENS];
};

/* (1 + A_bb)^-1 for the diagonal blocks b: a thread has a column, by forward substitution. */
__device__ inline void kda_invert_diagonal(const float (*A)[KDA_BLOCK][KDA_BLOCK],
                                           kda_inverse &s)
{
    if (threadIdx.x >= KDA_TOKENS) return;
    const int b = threadIdx.x / KDA_BLOCK, j = threadIdx.x % KDA_BLOCK;
    float x[KDA_BLOCK];
#pragma unroll
    for (int i = 0; i < KDA_BLOCK; i++) {
        x[i] = i == j ? 1.0f : 0.0f;
#pragma unroll
        for (int l = 0; l < i; l++) x[i] = fmaf(-A[kda_block_of(b, b)][i][l], x[l], x[i]);
        s.diagonal[b][i][j] = x[i];
    }
}

/* sum[q] += a[q][...] x[...][j] for four rows of a 16-wide block and a column. */
__device__ inline void kda_add_product(float (&sum)[4], const float (*a)[KDA_BLOCK],
                                       const float (*x)[KDA_TOKENS], int j)
{
#pragma unroll
    for (int l = 0; l < KDA_BLOCK; l += 4) {
        const float xs[4] = {x[l][j], x[l + 1][j], x[l + 2][j], x[l + 3][j]};
#pragma unroll
        for (int q = 0; q < 4; q++) {
            float row[4];
            load_floats(&a[q][l], row);
#pragma unroll
            for (int c = 0; c < 4; c++) sum[q] = fmaf(row[c], xs[c], sum[q]);
        }
    }
}

__device__ inline void kda_write_X(kda_chunk &out, int i, int j, float x)
{
    if (j / KDA_BLOCK > i / KDA_BLOCK) return;
    const int at = 8 * kda_swizzle(i, j / 8) + j % 8;
    const float exact = i > j ? x : 0.0f;
    const bf16 rounded = from_float<bf16>(exact);
    out.X[i][at] = rounded;
    out.X_low[i][at] = from_float<bf16>(exact - to_float(rounded));
}

/* By blocks of rows: X_r = (1 + A_rr)^-1 (1_r - sum_b A_rb X_b). A thread has a column and four
 * rows of a block. The loops stay loops: unrolled, a substitution of 64 rows is 40 KB of code
 * that passes through the instruction cache once a block, and took four times as long. */
__device__ inline void kda_invert(const float (*A)[KDA_BLOCK][KDA_BLOCK], const float *beta,
                                  kda_inverse &s, kda_chunk &out)
{
    const int j = threadIdx.x % KDA_TOKENS, first = threadIdx.x / KDA_TOKENS * 4;
    kda_invert_diagonal(A, s);
#pragma unroll 1
    for (int r = 0; r < KDA_BLOCKS; r++) {
        const int row = r * KDA_BLOCK + first;
        float sum[4] = {0, 0, 0, 0}, x[4] = {0, 0, 0, 0};
#pragma unroll 1
        for (int b = 0; b < r; b++)
            kda_add_product(sum, &A[kda_block_of(r, b)][first], &s.X[b * KDA_BLOCK], j);
#pragma unroll
        for (int q = 0; q < 4; q++)
            s.right[first + q][j] = (row + q == j ? 1.0f : 0.0f) - sum[q];
        __syncthreads();
        kda_add_product(x, &s.diagonal[r][first], s.right, j);
#pragma unroll
        for (int q = 0; q < 4; q++) {
            s.X[row + q][j] = x[q];
            kda_write_X(out, row + q, j, x[q] * beta[j]);
        }
        __syncthreads();
    }
}

#endif
