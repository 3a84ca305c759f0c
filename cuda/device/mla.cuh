/*
 * mla.cuh -- what the kernels of mla_decode share: how contexts are cut into the pieces that
 * blocks attend, and the scratch memory through which they pass their results.
 *
 * A piece is a run of a sequence's pages; its results (rank + 2 values a head, f32) are written and
 * read again. There are two ways to cut:
 *
 *   shared out  the pages of all rows, one behind the other, in as many equal shares as there are
 *               blocks; a share's part of a row is a piece. Its results lie at slot share + row,
 *               which is another one for every piece: from a piece to the next, one or both grow.
 *   by length   on a batch-invariant backend, and where the kernel is the one for any shape. A
 *               sequence is cut into splits of a number of pages that follows from its length, so
 *               a row's result does not depend on its batch. Short contexts have small splits, for
 *               one sequence to occupy many multiprocessors; long ones have large splits.
 */
#ifndef KL_CUDA_DEVICE_MLA_H
#define KL_CUDA_DEVICE_MLA_H

#include "launch.cuh"
#include "types.cuh"
#include "warp.cuh"

#include <limits.h>

constexpr int MLA_MAX_SPLITS = 128;  /* of a row */
constexpr int MLA_MAX_SHARES = 132;  /* the multiprocessors of an H100 or H200 */
constexpr int MLA_TENSOR_HEADS = 32; /* of a block of mla_decode_{tensor,fp8}.cu */
constexpr int MLA_TENSOR_STAGES = 3; /* its pages on their way or in use */
constexpr int MLA_PACKED_STAGES = 4; /* the same, of 8-bit pages */
constexpr int MLA_PAGES = 64;        /* of a token whose inputs are arriving, at most */
constexpr float LOG2_E = 1.4426950408889634f;

__host__ __device__ inline long long mla_divide_up(long long a, long long b)
{
    return (a + b - 1) / b;
}

/* Splits of `size` pages that a row may have. */
__host__ __device__ inline long long mla_splits_of(long long size)
{
    return 8 * size < MLA_MAX_SPLITS ? 8 * size : MLA_MAX_SPLITS;
}

/* Pages of a split: the smallest power of two that makes no more splits than it may. 16 pages (1K
 * tokens) make 8 splits, 128 pages 32, 2048 pages 128. */
__host__ __device__ inline long long mla_split_pages(long long pages)
{
    long long size = 1;
    while (pages > size * mla_splits_of(size)) size *= 2;
    return size;
}

/* The most splits of a row of at most `pages` pages; does not fall with `pages`. */
inline long long mla_most_splits(long long pages)
{
    const long long size = mla_split_pages(pages), last = mla_divide_up(pages, size);
    const long long before = 4 * size < MLA_MAX_SPLITS ? 4 * size : MLA_MAX_SPLITS;
    const long long most = last > before ? last : before;
    return most < pages ? most : pages;
}

/* Of a ring of so many slots, and its barriers' phase. */
template <int SLOTS> struct mla_place {
    int slot = 0;
    uint32_t phase = 0;

    __device__ void advance()
    {
        if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
};

/* The cut of one sequence by its length; a sequence that sees nothing has no splits. */
struct mla_cut {
    long long length, pages, size, count;

    __device__ explicit mla_cut(long long tokens)
        : length(tokens > 0 ? tokens : 0), pages(mla_divide_up(length, KL_PAGE_TOKENS)),
          size(mla_split_pages(pages)), count(mla_divide_up(pages, size))
    {
    }
};

/* One call, or for the kernels that make and merge pieces those N of its rows whose results the
 * workspace holds at once. */
struct mla_arguments {
    const void *q, *pages, *w_kv_b;
    const int *block_table, *lengths;
    void *out;
    float *query;   /* [N, H, width] absorbed, times scale and log2(e); or as      */
                    /* mla_query_place() says                                      */
    float *max;     /* [slots, H] of a piece's scores, in units of the above       */
    float *sum;     /* [slots, H] of 2^(score - max)                               */
    float *context; /* [slots, H, rank] sum of 2^(score - max) c                   */
    long long N, H, B, P, q_stride, nope, rope, rank, V;
    long long splits; /* of a row at the most, where it is cut by length             */
    int shares;       /* into which pages are shared out; 0: they are cut by length  */
    bool tensor;      /* query is an operand of the tensor cores' scores             */
    bool unsettled;   /* w_kv_b may still be written until wait_for_inputs()         */
    bool packed;      /* pages are of 8 bits                                         */
    bool arriving;    /* q and raw, of one row: a piece is a page, at its number's slot, */
                      /* and max and sum are [H, MLA_PAGES]                       */
    bool asks;        /* the attention asks the L2 for W_UV, which is of bf16        */
    kl_latents_row row;
    kl_dtype act; /* of q, out, and pages that are not                           */
    float scale;

    __host__ __device__ long long width() const { return rank + rope; }
};

/* Heads of a row of operand A. */
__host__ __device__ inline long long mla_padded_heads(long long H)
{
    return mla_divide_up(H, MLA_TENSOR_HEADS) * MLA_TENSOR_HEADS;
}

/* Where q' is as operand A of mla_decode_tensor.cu's scores, in bf16: a head's channel; what it
 * lacks is two bf16 further on. For each eight heads and 16 channels there are the fragments of
 * a warp, m16n8k16, whose rows r are the heads and r + 8 what the same heads lack. */
__device__ inline long long mla_query_place(const mla_arguments &a, long long n, long long h,
                                            long long channel)
{
    const long long step = channel / 16, warp = h / 8, k = channel % 16;
    const long long lane = h % 8 * 4 + k % 8 / 2;
    const long long first = (n * mla_padded_heads(a.H) / 8 + warp) * (a.width() / 16) + step;
    return ((first * WARP + lane) * 4 + k / 8 * 2) * 2 + k % 2;
}

/* Of 8-bit pages q' is operand B of mla_decode_fp8.cu's scores: for each 32 heads and 64 channels
 * an array as wgmma_descriptor() has it, a head in row h % 32. Channels with codes are f16, in
 * units of their head and group of 128, powers of two that come behind the arrays, f32 [group, 32];
 * the others are q's own, bf16. Of each 16 channels with codes the first two of every four come
 * first. */
constexpr int MLA_QUERY_ARRAY = MLA_TENSOR_HEADS * 128; /* bytes */

__device__ inline uint8_t *mla_packed_query(const mla_arguments &a, long long n, long long h)
{
    const long long group = (n * mla_padded_heads(a.H) + h) / MLA_TENSOR_HEADS;
    return reinterpret_cast<uint8_t *>(a.query + group * MLA_TENSOR_HEADS * a.width());
}

/* Where channels `channel` and the next one are, an even number and an odd one. */
__device__ inline uint32_t *mla_query_column(const mla_arguments &a, long long n, long long h,
                                             int channel)
{
    const int row = static_cast<int>(h % MLA_TENSOR_HEADS), i = channel % 16;
    const int at = channel < a.rank ? channel - i + i / 4 * 2 + i / 2 % 2 * 8 : channel;
    uint8_t *array = mla_packed_query(a, n, h) + at / 64 * MLA_QUERY_ARRAY;
    return reinterpret_cast<uint32_t *>(array + row * 128 + (at % 64 / 8 ^ row % 8) * 16 +
                                        at % 8 * 2);
}

__device__ inline float *mla_query_unit(const mla_arguments &a, long long n, long long h,
                                        int group)
{
    uint8_t *units = mla_packed_query(a, n, h) + a.width() / 64 * MLA_QUERY_ARRAY;
    return reinterpret_cast<float *>(units) + group * MLA_TENSOR_HEADS + h % MLA_TENSOR_HEADS;
}

__device__ inline long long mla_pages_of(long long length)
{
    return length > 0 ? mla_divide_up(length, KL_PAGE_TOKENS) : 0;
}

__device__ inline long long mla_warp_total(long long x)
{
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}

/* The cut of `pages` pages, of all rows together: share i has first(i) .. first(i + 1) - 1, at
 * least one. */
struct mla_shares {
    long long pages, count;

    __device__ mla_shares(long long all, int most) : pages(all), count(all < most ? all : most)
    {
    }

    __device__ long long first(long long share) const { return share * pages / count; }

    __device__ long long of(long long page) const { return ((page + 1) * count - 1) / pages; }
};

/* Pages first, first + 1, ... of row n, the last of them with so many tokens; their results go to
 * `slot`. */
struct mla_piece {
    long long n, slot, first;
    int pages, last;
    bool ends; /* with the sequence's last page */

    __device__ int tokens(int i) const { return i + 1 < pages ? KL_PAGE_TOKENS : last; }

    /* The first pages, as many as a ring of so many has room for: they may be brought before the
     * kernel's inputs are there. Lengths and tables are inputs of the call, whose first kernel
     * lets others start once it has its own; and of pages it writes the last one of a sequence
     * alone. */
    __device__ int early(int stages) const
    {
        const int settled = pages - (ends ? 1 : 0);
        return settled < stages ? settled : stages;
    }
};

/* Numbers of a piece's pages, one after the other, by a whole warp: read 32 at a time, while the
 * ones before are still brought. */
struct mla_page_numbers {
    const int *table;
    int pages, now, coming;

    __device__ mla_page_numbers(const mla_arguments &a, const mla_piece &it)
        : table(a.block_table + it.n * a.B + it.first), pages(it.pages), now(0),
          coming(number(lane_id()))
    {
    }

    __device__ int number(int i) const { return i < pages ? table[i] : 0; }

    /* Of page i, for i = 0, 1, ... */
    __device__ int at(int i)
    {
        if (i % WARP == 0) now = coming, coming = number(i + WARP + lane_id());
        return __shfl_sync(ALL_LANES, now, i % WARP);
    }
};

/* The pieces of a block of mla_decode_{tensor,fp8}.cu one after the other, by a whole warp.
 * Units, pages or splits, are numbered row by row; the rows before `n` have `base` of them. */
struct mla_walk {
    const mla_arguments &a;
    const int share;
    long long n = 0, base = 0, at, end;

    __device__ mla_walk(const mla_arguments &from, int share)
        : a(from), share(share), at(share), end(LLONG_MAX)
    {
        if (a.shares == 0) return;
        long long all = 0;
        for (long long row = lane_id(); row < a.N; row += WARP)
            all += mla_pages_of(a.lengths[row]);
        const mla_shares shares(mla_warp_total(all), a.shares);
        const bool some = share < shares.count;
        at = some ? shares.first(share) : 0;
        end = some ? shares.first(share + 1) : 0;
    }

    __device__ bool next(mla_piece *out)
    {
        for (; at < end && n < a.N; n += WARP) {
            const long long row = n + lane_id();
            const mla_cut cut(row < a.N ? a.lengths[row] : 0);
            const long long units = a.shares == 0 ? cut.count : cut.pages;
            long long before = units;
#pragma unroll
            for (int d = 1; d < WARP; d *= 2) {
                const long long left = __shfl_up_sync(ALL_LANES, before, d);
                if (lane_id() >= d) before += left;
            }
            const unsigned found = __ballot_sync(ALL_LANES, at < base + before);
            if (found != 0) {
                take(cut, row, at - (base + before - units), __ffs(found) - 1, out);
                return true;
            }
            base += __shfl_sync(ALL_LANES, before, WARP - 1);
        }
        return false;
    }

    /* Lane `from` has the row, and the unit's number within it. */
    __device__ void take(const mla_cut &cut, long long row, long long unit, int from,
                         mla_piece *out)
    {
        const bool shared_out = a.shares > 0;
        const long long first = shared_out ? unit : unit * cut.size;
        const long long most = shared_out ? end - at : cut.size, left = cut.pages - first;
        const long long pages = most < left ? most : left;
        const long long tokens = cut.length - (first + pages - 1) * KL_PAGE_TOKENS;
        const long long slot = shared_out ? share + row : row * a.splits + unit;
        out->n = __shfl_sync(ALL_LANES, row, from);
        out->slot = __shfl_sync(ALL_LANES, slot, from);
        out->first = __shfl_sync(ALL_LANES, first, from);
        out->pages = __shfl_sync(ALL_LANES, static_cast<int>(pages), from);
        out->ends = __shfl_sync(ALL_LANES, pages == left, from) != 0;
        out->last = __shfl_sync(
            ALL_LANES, static_cast<int>(tokens < KL_PAGE_TOKENS ? tokens : KL_PAGE_TOKENS),
            from);
        at += shared_out ? out->pages : gridDim.x;
    }
};

/* Where the results of a row's pieces are: slots first, first + 1, ... */
struct mla_pieces {
    long long first, count;

    /* By a whole warp. */
    __device__ mla_pieces(const mla_arguments &a, long long n)
    {
        const mla_cut cut(a.lengths[n]);
        first = n * a.splits, count = cut.count;
        if (a.shares == 0 || count == 0) return;
        long long before = 0, all = 0;
        for (long long row = lane_id(); row < a.N; row += WARP) {
            const long long pages = mla_pages_of(a.lengths[row]);
            all += pages;
            if (row < n) before += pages;
        }
        before = mla_warp_total(before);
        const mla_shares shares(mla_warp_total(all), a.shares);
        const long long begin = shares.of(before);
        first = begin + n, count = shares.of(before + cut.pages - 1) - begin + 1;
    }
};

/* Of W_UV a quarter of a head, or several quarters: what the last kernel's blocks begin with.
 * Beside the attention's blocks they have no room, so that before these end nobody else asks for
 * it. By one thread, once the block's last page is on its way. */
__device__ inline void mla_ask_for_weights(const mla_arguments &a)
{
    const long long row = a.rank * static_cast<long long>(sizeof(bf16)), quarter = a.V / 4;
    const long long h0 = static_cast<long long>(blockIdx.y) * MLA_TENSOR_HEADS;
    const long long heads = a.H - h0 < MLA_TENSOR_HEADS ? a.H - h0 : MLA_TENSOR_HEADS;
    if (!a.asks) return;
    for (long long i = blockIdx.x; i < 4 * heads; i += gridDim.x) {
        const long long first = (h0 + i / 4) * (a.nope + a.V) + a.nope + i % 4 * quarter;
        prefetch_l2(static_cast<const char *>(a.w_kv_b) + first * row,
                    static_cast<uint32_t>(quarter * row));
    }
}

/* q' of the N rows into query, after errands: the latents of the call's `raw` into their pages. */
bool kl_cuda_mla_absorb_tensor_fits(const mla_arguments &a, kl_dtype weight);
kl_status kl_cuda_mla_absorb_tensor(const mla_arguments &a, const kl_mla *call,
                                    cudaStream_t stream, kl_error *err);

/* The same of one whose q is arriving, with blanks for what becomes of the pieces; and the attention,
 * with an append of one whose raw is. */
kl_status kl_cuda_mla_absorb_arriving(const mla_arguments &a, cudaStream_t stream,
                                      kl_error *err);
bool kl_cuda_mla_attend_page_fits(const mla_arguments &a, const kl_mla *call);
kl_status kl_cuda_mla_attend_page(const mla_arguments &a, const kl_mla *call,
                                  cudaStream_t stream, kl_error *err);

/* The attention of all pieces of the N rows, into max, sum and context; `blocks` of each group of
 * heads are as many as can run at a time, where a block goes on to other pieces. */
kl_status kl_cuda_mla_attend_any(const mla_arguments &a, int blocks, cudaStream_t stream,
                                 kl_error *err);
bool kl_cuda_mla_tensor_fits(const mla_arguments &a);
kl_status kl_cuda_mla_attend_tensor(const mla_arguments &a, int blocks, cudaStream_t stream,
                                    kl_error *err);

kl_status kl_cuda_mla_attend_fp8(const mla_arguments &a, int blocks, cudaStream_t stream,
                                 kl_error *err);

/* out = W_UV of the pieces, merged. */
kl_status kl_cuda_mla_finish(const mla_arguments &a, kl_dtype weight, cudaStream_t stream,
                             kl_error *err);
bool kl_cuda_mla_finish_tensor_fits(const mla_arguments &a, kl_dtype weight);
kl_status kl_cuda_mla_finish_tensor(const mla_arguments &a, cudaStream_t stream, kl_error *err);
kl_status kl_cuda_mla_finish_page(const mla_arguments &a, cudaStream_t stream, kl_error *err);

#endif
