/*
 * mla.c -- laying out pages, writing latents into them, reading them back. Formulas:
 * backend/ops.h; 8-bit rows: base/latents.h.
 *
 * Computes     row = [ rms_norm(raw[:rank]) * norm_weight | raw[rank:] ]
 * Shapes       raw [T, rank+rope], pages [P, 64, rank+rope] or 8-bit
 * Precision    f32 arithmetic, rounded once to act, then to 8 bits
 * Tasks        runs of 64 tokens; a token is written by one task
 * Roofline     4 bytes a channel of bf16: memory-bound
 */
#include "cpu/mla.h"

#include <math.h>
#include <string.h>

#define TOKENS_PER_TASK 64

/* A row of 8-bit latents in f32. */
static void load_packed(const kl_mla_view *v, const uint8_t *row, float *to)
{
    const float *scales = (const float *)(row + v->row.scales_at);
    for (int64_t i = 0; i < v->rank; i += KL_LATENTS_GROUP)
        v->kernels->mla.decode(row + i, kl_mla_min(v->rank - i, KL_LATENTS_GROUP),
                               scales[i / KL_LATENTS_GROUP], to + i);
    v->kernels->mla.widen(row + v->row.rope_at, KL_BF16, v->rope, 1.0f, to + v->rank);
}

const float *kl_mla_load_page(const kl_mla_view *v, int64_t seq, int64_t page, int64_t count,
                              float *scratch)
{
    const kl_mla *a = v->a;
    const int32_t *table = a->block_table.data;
    const int64_t id = table[seq * a->block_table.shape[1] + page];
    const void *from = kl_mla_at(&a->pages, id * KL_PAGE_TOKENS * a->pages.shape[2]);
    if (a->pages.dtype == KL_F32) return from;
    if (!kl_latents_are_packed(&a->pages)) {
        v->kernels->mla.widen(from, a->pages.dtype, count * v->width, 1.0f, scratch);
        return scratch;
    }
    for (int64_t i = 0; i < count; i++)
        load_packed(v, (const uint8_t *)from + i * v->row.row_bytes, scratch + i * v->width);
    return scratch;
}

typedef struct {
    const kl_mla_append *a;
    const kl_mla_kernels *kernels;
    int64_t normalised; /* channels of a row */
    kl_latents_row row; /* of 8-bit pages    */
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

/* Channels first .. first + n - 1 of a row, all of them normalised or none. */
static void make_channels(const append_run *run, const void *raw, int64_t first, int64_t n,
                          float factor, void *to)
{
    const kl_dtype dtype = run->a->raw.dtype;
    const void *from = (const char *)raw + (size_t)first * kl_dtype_bytes(dtype);
    if (first < run->normalised)
        run->kernels->weigh(from, dtype, n, factor,
                            (const float *)run->a->norm_weight.data + first, to);
    else
        memcpy(to, from, (size_t)n * kl_dtype_bytes(dtype));
}

/* Up to KL_LATENTS_GROUP channels as they are in act, widened. */
static void make_group(const append_run *run, const void *raw, int64_t first, int64_t n,
                       float factor, float *to)
{
    const kl_dtype dtype = run->a->raw.dtype;
    float in_act[KL_LATENTS_GROUP];
    make_channels(run, raw, first, n, factor, in_act);
    run->kernels->widen(in_act, dtype, n, 1.0f, to);
}

static float pack_group(const float *x, int64_t n, uint8_t *codes)
{
    float most = 0.0f;
    for (int64_t i = 0; i < n; i++)
        if (fabsf(x[i]) > most || isnan(x[i])) most = fabsf(x[i]); /* a NaN stays */
    const float scale = kl_latents_scale(most), factor = 1.0f / scale;
    for (int64_t i = 0; i < n; i++) codes[i] = kl_latents_code(x[i] * factor);
    return scale;
}

static void pack_row(const append_run *run, const void *raw, float factor, uint8_t *to)
{
    const kl_latents_row *row = &run->row;
    float x[KL_LATENTS_GROUP];
    memset(to, 0, (size_t)row->row_bytes); /* what lies between the parts */
    for (int64_t i = 0; i < row->rank; i += KL_LATENTS_GROUP) {
        const int64_t n = kl_mla_min(row->rank - i, KL_LATENTS_GROUP);
        make_group(run, raw, i, n, factor, x);
        ((float *)(to + row->scales_at))[i / KL_LATENTS_GROUP] = pack_group(x, n, to + i);
    }
    for (int64_t i = 0; i < row->rope; i += KL_LATENTS_GROUP) {
        const int64_t n = kl_mla_min(row->rope - i, KL_LATENTS_GROUP);
        make_group(run, raw, row->rank + i, n, factor, x);
        run->kernels->narrow(x, n, 1.0f, to + row->rope_at + 2 * i, KL_BF16);
    }
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

    const int64_t width = a->raw.shape[1], rank = run->normalised;
    const size_t size = kl_dtype_bytes(a->pages.dtype);
    const void *from = kl_mla_at(&a->raw, token * a->raw.stride[0]);
    char *to = (char *)a->pages.data + (size_t)(row * a->pages.shape[2]) * size;
    const float factor =
        rank > 0 ? run->kernels->inverse_norm(from, a->raw.dtype, rank, a->eps) : 1.0f;
    if (kl_latents_are_packed(&a->pages)) {
        pack_row(run, from, factor, (uint8_t *)to);
        return;
    }
    if (rank > 0) make_channels(run, from, 0, rank, factor, to);
    make_channels(run, from, rank, width - rank, factor, to + (size_t)rank * size);
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
    append_run run = {.a = a,
                      .kernels = &cpu->kernels->mla,
                      .normalised = a->norm_weight.shape[0],
                      .row = kl_latents_row_of(a->rank, a->raw.shape[1] - a->rank)};
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
