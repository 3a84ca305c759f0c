/*
 * mla.c -- laying out pages, writing latents into them, reading them back. Formulas:
 * backend/ops.h.
 *
 * Computes     row = [ rms_norm(raw[:rank]) * norm_weight | raw[rank:] ]
 * Shapes       raw [T, rank+rope], pages [P, 64, rank+rope]
 * Precision    f32 arithmetic, rounded once to act
 * Tasks        runs of 64 tokens; a token is written by one task
 * Roofline     4 bytes a channel of bf16: memory-bound
 */
#include "cpu/mla.h"

#include <string.h>

#define TOKENS_PER_TASK 64

const float *kl_mla_load_page(const kl_mla_view *v, int64_t seq, int64_t page, int64_t count,
                              float *scratch)
{
    const kl_mla *a = v->a;
    const int32_t *table = a->block_table.data;
    const int64_t id = table[seq * a->block_table.shape[1] + page];
    const void *from = kl_mla_at(&a->pages, id * KL_PAGE_TOKENS * v->width);
    if (a->pages.dtype == KL_F32) return from;
    v->kernels->mla.widen(from, a->pages.dtype, count * v->width, 1.0f, scratch);
    return scratch;
}

typedef struct {
    const kl_mla_append *a;
    const kl_cpu_kernels *kernels;
} append_run;

/* The sequence that owns a token: the last that begins at or before it, for empty ones before
 * it begin there too. */
static int64_t find_sequence(const int32_t *cu_seqlens, int64_t N, int64_t token)
{
    int64_t low = 0, high = N;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (cu_seqlens[middle] <= token)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void append_token(const append_run *run, int64_t token)
{
    const kl_mla_append *a = run->a;
    const int32_t *cu = a->cu_seqlens.data, *lengths = a->lengths.data;
    const int32_t *table = a->block_table.data;
    const int64_t n = cu == NULL ? token : find_sequence(cu, a->lengths.shape[0], token);
    const int64_t position = (int64_t)lengths[n] - (cu == NULL ? 1 : cu[n + 1] - token);
    const int64_t page = table[n * a->block_table.shape[1] + position / KL_PAGE_TOKENS];
    const int64_t row = page * KL_PAGE_TOKENS + position % KL_PAGE_TOKENS;

    const int64_t width = a->raw.shape[1];
    const size_t size = kl_dtype_bytes(a->raw.dtype);
    const void *from = kl_mla_at(&a->raw, token * a->raw.stride[0]);
    void *to = (char *)a->pages.data + (size_t)(row * width) * size;
    if (kl_tensor_absent(&a->norm_weight))
        memcpy(to, from, (size_t)width * size);
    else
        run->kernels->mla.latent(from, a->raw.dtype, a->norm_weight.shape[0], width,
                                 a->norm_weight.data, a->eps, to);
}

static void append_tokens(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const append_run *run = ctx;
    const int64_t first = task * TOKENS_PER_TASK;
    const int64_t end = kl_mla_min(first + TOKENS_PER_TASK, run->a->raw.shape[0]);
    for (int64_t token = first; token < end; token++) append_token(run, token);
}

kl_status kl_cpu_mla_append(kl_backend *be, const kl_mla_append *a, kl_error *err)
{
    (void)err;
    const kl_cpu *cpu = (const kl_cpu *)be;
    append_run run = {a, cpu->kernels};
    const int64_t tasks = (a->raw.shape[0] + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK;
    kl_pool_run(cpu->pool, tasks, append_tokens, &run);
    return KL_OK;
}

KL_CPU_NO_WORKSPACE(mla_append)

/* Some integers a sequence: not worth waking threads for. */
kl_status kl_cpu_mla_lay_out(kl_backend *be, const kl_mla_lay_out *a, kl_error *err)
{
    (void)be, (void)err;
    const bool has_past = !kl_tensor_absent(&a->cu_past);
    const int32_t *past = a->cu_past.data, *cu = a->cu_seqlens.data;
    const int64_t N = a->lengths.shape[0], B = a->block_table.shape[1];
    for (int64_t n = 0; n < N; n++) {
        const int64_t before = has_past ? past[n] : 0;
        const int64_t first = (before + cu[n]) / KL_PAGE_TOKENS + n;
        ((int32_t *)a->lengths.data)[n] =
            (has_past ? past[n + 1] - past[n] : 0) + cu[n + 1] - cu[n];
        for (int64_t b = 0; b < B; b++)
            ((int32_t *)a->block_table.data)[n * B + b] = (int32_t)(first + b);
    }
    return KL_OK;
}

KL_CPU_NO_WORKSPACE(mla_lay_out)
