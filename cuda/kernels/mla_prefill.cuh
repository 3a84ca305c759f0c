/*
 * mla_prefill.cuh -- what the files of mla_prefill share: the call with its dimensions spelled
 * out, and the plan that the device makes of it.
 */
#ifndef KL_CUDA_KERNELS_MLA_PREFILL_H
#define KL_CUDA_KERNELS_MLA_PREFILL_H

#include "../device/types.cuh"

/* Tokens of the context whose keys and values exist at a time: 256 KiB each at H = 32, bf16. */
constexpr int MLA_WINDOW_PAGES = 128;
constexpr int MLA_QUERIES =
    128; /* positions of a tile of queries, which starts at a multiple */

struct mla_call {
    const void *q, *pages, *w_kv_b;
    void *out;
    const int *block_table, *lengths, *cu_seqlens;
    long long q_stride; /* elements between tokens */
    long long T, N, B;
    int H, nope, rope, rank, V;
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

/* Tokens for which the absorbed form is cheaper: the first *count of list; list null: all. */
struct mla_rows {
    int *list, *count;
    long long most; /* that there can be, from shapes */
};

struct mla_plan {
    mla_sequence *sequences; /* [N+1] */
    mla_rows few;
    unsigned *next_item; /* [2] work counters of even and odd windows */
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

/* The absorbed form, for any dimensions and dtypes: a block for each row and head. */
kl_status mla_prefill_rows(const kl_mla_prefill *a, const mla_call &call, const mla_rows &rows,
                           cudaStream_t stream, kl_error *err);

/* The plain form, for the model's dimensions in bf16: tiles of queries, windows of contexts. */
kl_status mla_prefill_tiles(const mla_call &call, const mla_plan &plan,
                            const mla_window &window, cudaStream_t stream, kl_error *err);

#endif
