/*
 * mla.cuh -- what the kernels of mla_decode share: the cut of a context into splits, and the
 * scratch memory through which they pass their results.
 *
 * A sequence's context is cut into splits of a number of pages that follows from its length.
 * Short contexts have small splits, for one sequence to occupy many multiprocessors; long ones
 * have large splits, for the f32 results of a split (rank + 2 values a head) are written and read
 * again. The fewer the rows, the more splits each may have, `fine`; on a batch-invariant backend
 * that is 0, and a row's result does not depend on its batch.
 */
#ifndef KL_CUDA_DEVICE_MLA_H
#define KL_CUDA_DEVICE_MLA_H

#include "types.cuh"

constexpr int MLA_MAX_SPLITS = 128; /* of a row: just under an H100's 132 multiprocessors */
constexpr float LOG2_E = 1.4426950408889634f;

/* Splits of `size` pages that a row may have. */
__host__ __device__ inline long long mla_splits_of(long long size, long long fine)
{
    const long long most = 8 * size < MLA_MAX_SPLITS ? 8 * size : MLA_MAX_SPLITS;
    return most > fine ? most : fine;
}

/* Pages of a split: the smallest power of two that makes no more splits than it may. With a
 * `fine` of 0, 16 pages (1K tokens) make 8 splits, 128 pages 32, 2048 pages 128. */
__host__ __device__ inline long long mla_split_pages(long long pages, long long fine)
{
    long long size = 1;
    while (pages > size * mla_splits_of(size, fine)) size *= 2;
    return size;
}

__host__ __device__ inline long long mla_divide_up(long long a, long long b)
{
    return (a + b - 1) / b;
}

/* The cut of one sequence; a sequence that sees nothing has no splits. */
struct mla_cut {
    long long length, pages, size, count;

    __device__ mla_cut(long long tokens, long long fine)
        : length(tokens > 0 ? tokens : 0), pages(mla_divide_up(length, KL_PAGE_TOKENS)),
          size(mla_split_pages(pages, fine)), count(mla_divide_up(pages, size))
    {
    }
};

/* The most splits of a row of at most `pages` pages; falls neither with `pages` nor `fine`. */
inline long long mla_most_splits(long long pages, long long fine)
{
    const long long size = mla_split_pages(pages, 0), last = mla_divide_up(pages, size);
    const long long before = 4 * size < MLA_MAX_SPLITS ? 4 * size : MLA_MAX_SPLITS;
    const long long most = last > before ? last : before, any = most > fine ? most : fine;
    return any < pages ? any : pages;
}

/* One call, or for the kernels that make and merge splits those N of its rows whose results the
 * workspace holds at once. */
struct mla_arguments {
    const void *q, *pages, *w_kv_b;
    const int *block_table, *lengths;
    void *out;
    float *query;   /* [N, H, width] absorbed, times scale and log2(e)             */
    float *max;     /* [N, splits, H] of a split's scores, in units of the above   */
    float *sum;     /* [N, splits, H] of 2^(score - max)                           */
    float *context; /* [N, splits, H, rank] sum of 2^(score - max) c               */
    float *merged;  /* [N, H, rank]                                                */
    long long N, H, B, q_stride, nope, rope, rank, V, splits, fine;
    float scale;

    __host__ __device__ long long width() const { return rank + rope; }
};

/* The attention of all splits of the N rows, into max, sum and context. */
kl_status kl_cuda_mla_attend_any(const mla_arguments &a, kl_dtype act, cudaStream_t stream,
                                 kl_error *err);
bool kl_cuda_mla_tensor_fits(const mla_arguments &a, kl_dtype act);
kl_status kl_cuda_mla_attend_tensor(const mla_arguments &a, int multiprocessors,
                                    cudaStream_t stream, kl_error *err);

#endif
