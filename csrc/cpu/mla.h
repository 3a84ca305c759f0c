/*
 * mla.h -- what the files of latent attention on the CPU share.
 */
#ifndef KL_CPU_MLA_H
#define KL_CPU_MLA_H

#include "base/arena.h"
#include "cpu/cpu_backend.h"

/* A call with its dimensions spelled out. */
typedef struct {
    const kl_mla *a;
    const kl_cpu_kernels *kernels;
    kl_pool *pool;
    int64_t H, nope, rope, rank, V;
    int64_t width;      /* rank + rope, a latent */
    kl_latents_row row; /* of 8-bit pages        */
} kl_mla_view;

static inline kl_mla_view kl_mla_view_of(kl_backend *be, const kl_mla *a)
{
    const kl_cpu *cpu = (const kl_cpu *)be;
    kl_mla_view v = {.a = a, .kernels = cpu->kernels, .pool = cpu->pool};
    v.H = a->q.shape[1];
    v.rank = a->w_kv_b.shape[2];
    v.V = a->out.shape[2];
    v.nope = a->w_kv_b.shape[1] - v.V;
    v.rope = a->q.shape[2] - v.nope;
    v.width = v.rank + v.rope;
    v.row = kl_latents_row_of(v.rank, v.rope);
    return v;
}

static inline const void *kl_mla_at(const kl_tensor *t, int64_t element)
{
    return (const char *)t->data + (size_t)element * kl_dtype_bytes(t->dtype);
}

/* Query channels of a token and head. */
static inline const void *kl_mla_query(const kl_mla_view *v, int64_t token, int64_t h,
                                       int64_t channel)
{
    return kl_mla_at(&v->a->q, token * v->a->q.stride[0] + h * (v->nope + v->rope) + channel);
}

/* A row of a head's w_kv_b: W_UK from row 0, W_UV from row nope. */
static inline const void *kl_mla_weight(const kl_mla_view *v, int64_t h, int64_t row)
{
    return kl_mla_at(&v->a->w_kv_b, (h * (v->nope + v->V) + row) * v->rank);
}

static inline void *kl_mla_out(const kl_mla_view *v, int64_t token, int64_t h)
{
    return (char *)v->a->out.data +
           (size_t)((token * v->H + h) * v->V) * kl_dtype_bytes(v->a->out.dtype);
}

/* The first `count` latents of page `page` of a sequence in f32: the page itself where it is
 * f32, else a copy in `scratch` [64, width]. */
const float *kl_mla_load_page(const kl_mla_view *v, int64_t seq, int64_t page, int64_t count,
                              float *scratch);

/* One query token of the absorbed form: it sees positions 0 .. length-1. */
typedef struct {
    int32_t token, seq, length;
    int32_t first_part; /* set while it is computed */
} kl_mla_row;

/* Workspace of the absorbed form. */
typedef struct {
    int64_t max_rows, max_parts; /* computed at a time */
    float *query;                /* [max_rows, H, width], absorbed and scaled */
    int32_t *part_row;           /* [max_parts] index of the row a part belongs to */
    float *max, *sum;            /* [max_parts, H] */
    float *context;              /* [max_parts, H, rank] */
    char *scratch;               /* scratch_bytes for each worker */
    size_t scratch_bytes;
} kl_mla_absorbed;

/* Lay the workspace out for up to `rows` rows, measuring when the arena has no memory. */
void kl_mla_absorbed_layout(kl_arena *arena, const kl_mla_view *v, int64_t rows,
                            kl_mla_absorbed *out);

/* Attention of each row, in the absorbed form; its result is stored in out. */
void kl_mla_absorbed_run(const kl_mla_view *v, const kl_mla_absorbed *ws, kl_mla_row *rows,
                         int64_t n_rows);

static inline int64_t kl_mla_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* `count` values of `bytes` each; shapes are bounded by their tensors, so nothing wraps. */
static inline void *kl_mla_take(kl_arena *arena, int64_t count, size_t bytes)
{
    return kl_arena_take(arena, (size_t)count * bytes);
}

static inline float *kl_mla_floats(kl_arena *arena, int64_t count)
{
    return kl_mla_take(arena, count, sizeof(float));
}

#endif
