/*
 * mla.cuh -- what the kernels of mla_decode share: the cut of a context into splits, and the
 * scratch memory through which they pass their results.
 *
 * A sequence's context is cut into splits of a number of pages that follows from its length
 * alone, so that a row's result does not depend on its batch. Short contexts have small splits,
 * for one sequence to occupy many multiprocessors; long ones have large splits, for the f32
 * results of a split (rank + 2 values a head) are written and read again.
 */
#ifndef KL_CUDA_DEVICE_MLA_H
#define KL_CUDA_DEVICE_MLA_H

#include "types.cuh"

constexpr int MLA_MAX_SPLITS = 128; /* of a row: just under an H100's 132 multiprocessors */
constexpr float LOG2_E = 1.4426950408889634f;

/* Pages of a split: the smallest power of two that makes no more splits than MLA_MAX_SPLITS nor
 * than eight times itself: 16 pages (1K tokens) make 8 splits, 128 pages 32, 2048 pages 128. */
__host__ __device__ inline long long mla_split_pages(long long pages)
{
    long long size = 1;
    while (pages > size * (8 * size < MLA_MAX_SPLITS ? 8 * size : MLA_MAX_SPLITS)) size *= 2;
    return size;
}

__host__ __device__ inline long long mla_divide_up(long long a, long long b)
{
    return (a + b - 1) / b;
}

/* The cut of one sequence; a sequence that sees nothing has no splits. */
struct mla_cut {
    long long length, pages, size, count;

    __device__ explicit mla_cut(long long tokens)
        : length(tokens > 0 ? tokens : 0), pages(mla_divide_up(length, KL_PAGE_TOKENS)),
          size(mla_split_pages(pages)), count(mla_divide_up(pages, size))
    {
    }
};

/* The most splits of a row of at most `pages` pages; never falls with `pages`. */
inline long long mla_most_splits(long long pages)
{
    const long long size = mla_split_pages(pages), last = mla_divide_up(pages, size);
    const long long before = 4 * size < MLA_MAX_SPLITS ? 4 * size : MLA_MAX_SPLITS;
    const long long most = last > before ? last : before;
    return most < pages ? most : pages;
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
    long long N, H, B, q_stride, nope, rope, rank, V, splits;
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
