/*
 * kda_prefill.cuh -- what the kernels of chunked KDA prefill hand to each other.
 *
 * A sequence is cut into chunks of 64 tokens from its first token of the call. Chunk c of
 * sequence n has number cu[n] / 64 + n + c: unique, below T / 64 + N, and found without a sum
 * over sequences; numbers that no chunk has are idle blocks. Chunks go through the workspace in
 * windows of consecutive numbers, so that its size is bounded for any T.
 *
 * With a_l = exp(log-decay of token l) and products over tokens, each at most 1:
 *     E_i = a_0 ... a_i (from the chunk's first token),  F_j = a_{j+1} ... a_last
 *     A[i, j] = b_i sum_d k_i k_j a_{j+1} ... a_i    j <  i
 *     M[i, j] = scale sum_d q_i k_j a_{j+1} ... a_i  j <= i
 *     (1 + A) U = b (V - (E k) S^T),  O = scale (E q) S^T + M U
 *     S' = S diag(E_last) + U^T (F k)
 * Nothing is ever divided by a decay: a product that underflows is the exact limit, 0.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_H
#define KL_CUDA_KERNELS_KDA_PREFILL_H

#include "../device/kda.cuh"

constexpr int KDA_TOKENS = 64; /* of a chunk */
constexpr int KDA_K = 128;
constexpr int KDA_BLOCK = 16; /* side of the blocks of A, M and X */

/* Rows of bf16 that ldmatrix reads, eight at a time: piece p (8 elements) of row i lies at
 * piece p ^ (i % 8), so that the eight rows of a matrix fall into different banks. */
__device__ inline int kda_swizzle(int row, int piece)
{
    return piece ^ (row % 8);
}

/* A prepared chunk of a head; it is copied to shared memory as it lies. X = (1 + A)^-1 diag(b).
 * Blocks of M and X above the diagonal are not written and not read. */
struct alignas(128) kda_chunk {
    bf16 k_decayed[KDA_TOKENS][KDA_K]; /* E k              */
    bf16 q_decayed[KDA_TOKENS][KDA_K]; /* scale E q        */
    bf16 k_left[KDA_TOKENS][KDA_K];    /* F k              */
    bf16 M[KDA_TOKENS][KDA_TOKENS];
    bf16 X[KDA_TOKENS][KDA_TOKENS];     /* without its diagonal, which is beta */
    bf16 X_low[KDA_TOKENS][KDA_TOKENS]; /* what X rounds away */
    float decay[KDA_K];                 /* E_last           */
    float decay_low[KDA_K];             /* what decay rounds away */
    float beta[KDA_TOKENS];
};

/* Numbers first .. first + count - 1 of a call's chunks. */
struct kda_window {
    kda_chunk *chunks; /* [count, H] */
    long long first, count;
};

__device__ inline long long kda_first_chunk(const int *cu, long long n)
{
    return cu[n] / KDA_TOKENS + n;
}

kl_status kda_prepare_window(const kda_arguments &a, long long N, const kda_window &w,
                             cudaStream_t stream, kl_error *err);
kl_status kda_scan_window(const kda_arguments &a, long long N, const kda_window &w,
                          cudaStream_t stream, kl_error *err);

#endif
