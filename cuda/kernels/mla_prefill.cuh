/*
 * mla_prefill.cuh -- what the files of mla_prefill share: the call with its dimensions spelled
 * out, and the plan that the device makes of it.
 */
#ifndef KL_CUDA_KERNELS_MLA_PREFILL_H
#define KL_CUDA_KERNELS_MLA_PREFILL_H

#include "../device/ragged.cuh"
#include "../device/types.cuh"

/* Tokens of the context whose keys and values exist at a time: 16 KiB each at H = 32. */
constexpr int MLA_WINDOW_PAGES = 128;
/* Positions of a tile of queries, which starts at a multiple of it. */
constexpr int MLA_QUERIES = 128;

struct mla_call {
    const void *q, *pages, *w_kv_b;
    void *out;
    const int *block_table, *lengths, *cu_seqlens;
    long long q_stride; /* elements between tokens */
    long long T, N, B;
    int H, nope, rope, rank, V;
    bool packed; /* pages are of 8 bits */
    kl_latents_row row;
    float scale;
};

/* What of a sequence goes through the plain form: the positions [begin, end), which are its new
 * tokens but for a first and a last page with few of them. Pages and tiles count on from one
 * sequence to the next; entry N holds their totals. */
struct mla_sequence {
    int begin, end;
    int token_shift; /* position + token_shift = token */
    int first_page, first_tile;
};

/* The positions of a sequence that the plain form takes, without running numbers. The tiles of
 * ops.h are cut at pages: only a first and a last one can be few. */
__device__ inline mla_sequence mla_cut_sequence(const mla_call &a, long long n)
{
    const int page = KL_PAGE_TOKENS, length = a.lengths[n];
    const int count = a.cu_seqlens[n + 1] - a.cu_seqlens[n], start = length - count;
    const int first_end = min(start / page * page + page, length);
    mla_sequence s = {start, length, a.cu_seqlens[n] - start, 0, 0};
    if (first_end - start <= KL_MLA_FEW_TOKENS) s.begin = first_end;
    const int last_begin = (length - 1) / page * page;
    if (s.begin <= last_begin && length - last_begin <= KL_MLA_FEW_TOKENS) s.end = last_begin;
    return s;
}

__device__ inline int mla_find_sequence(const int *cu_seqlens, int N, int token)
{
    return last_begun(N, [&](int n) { return cu_seqlens[n] <= token; });
}

/* The other tokens. They become rows of calls of mla_decode, so many at a time; rows past the
 * count have length 0. */
struct mla_few {
    int *tokens; /* [most] */
    int *count;
    long long most;        /* that there can be, from shapes   */
    long long first, rows; /* of one call                      */
    void *q, *out;         /* [rows, H, nope+rope], [rows, H, V] */
    int *block_table;      /* [rows, B]                        */
    int *lengths;          /* [rows]                           */
    kl_workspace ws;       /* of mla_decode                    */
};

struct mla_plan {
    mla_sequence *sequences; /* [N+1] */
    unsigned *next_item;     /* [2] work counters of even and odd windows */
};

/* Memory of the plain form, all of it in the workspace. */
struct mla_window {
    bf16 *keys;      /* [H, window tokens, 128] W_UK c                               */
    bf16 *values;    /* [H, window tokens, 128] W_UV c                               */
    bf16 *k_pe;      /* [window tokens, 64]                                          */
    float *x;        /* [T, H, 128] sums not yet normalised, where a context spans windows */
    float *max_sum;  /* [T, H, 2] */
    long long pages; /* of a window: even */
};

/* Any dimensions and dtypes: a block for each row and head. */
kl_status mla_prefill_rows(const kl_mla_prefill *a, const mla_call &call, cudaStream_t stream,
                           kl_error *err);

/* The model's dimensions in bf16: tiles of queries, windows of contexts. */
kl_status mla_prefill_tiles(const mla_call &call, const mla_plan &plan,
                            const mla_window &window, cudaStream_t stream, kl_error *err);

#endif
