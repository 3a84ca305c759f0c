/*
 * embedding.c -- picking rows: embedding and gather. Formulas: backend/ops.h.
 *
 * Shapes       table [rows, D] or x [T, D], out [N, D]
 * Precision    a copy, widened or rounded to the dtype of out
 * Tasks        runs of rows
 * Roofline     memory-bound
 */
#include "base/bf16.h"
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"

#include <string.h>

typedef struct {
    const void *from;
    const int32_t *rows;
    void *to;
    kl_dtype from_dtype, to_dtype;
    int64_t n, D, per_task;
} pick;

static void convert_row(const void *from, kl_dtype from_dtype, void *to, kl_dtype to_dtype,
                        int64_t D)
{
    if (from_dtype == to_dtype) {
        memcpy(to, from, (size_t)D * kl_dtype_bytes(to_dtype));
    } else if (to_dtype == KL_F32) {
        for (int64_t i = 0; i < D; i++)
            ((float *)to)[i] = kl_bf16_to_f32(((const uint16_t *)from)[i]);
    } else {
        for (int64_t i = 0; i < D; i++)
            ((uint16_t *)to)[i] = kl_f32_to_bf16(((const float *)from)[i]);
    }
}

static void pick_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const pick *p = ctx;
    const size_t from_bytes = (size_t)p->D * kl_dtype_bytes(p->from_dtype);
    const size_t to_bytes = (size_t)p->D * kl_dtype_bytes(p->to_dtype);
    const int64_t first = task * p->per_task, end = first + p->per_task;
    for (int64_t i = first; i < end && i < p->n; i++) {
        char *const to = (char *)p->to + (size_t)i * to_bytes;
        if (p->rows[i] < 0)
            memset(to, 0, to_bytes);
        else
            convert_row((const char *)p->from + (size_t)p->rows[i] * from_bytes, p->from_dtype,
                        to, p->to_dtype, p->D);
    }
}

static void run(kl_backend *be, pick *p)
{
    p->per_task = kl_rows_per_task(p->D);
    kl_pool_run(((const kl_cpu *)be)->pool, (p->n + p->per_task - 1) / p->per_task, pick_task,
                p);
}

kl_status kl_cpu_embedding(kl_backend *be, const kl_embedding *a, kl_error *err)
{
    (void)err;
    pick p = {.from = a->table.data, .rows = a->ids.data, .to = a->out.data};
    p.from_dtype = a->table.format == KL_W_F32 ? KL_F32 : KL_BF16;
    p.to_dtype = a->out.dtype;
    p.n = a->out.shape[0], p.D = a->out.shape[1];
    run(be, &p);
    if (!kl_tensor_absent(&a->sums)) memset(a->sums.data, 0, (size_t)a->sums.shape[0]);
    if (!kl_tensor_absent(&a->blanks)) memset(a->blanks.data, 0xff, (size_t)a->blanks.shape[0]);
    return KL_OK;
}

kl_status kl_cpu_gather(kl_backend *be, const kl_gather *a, kl_error *err)
{
    (void)err;
    pick p = {.from = a->x.data, .rows = a->rows.data, .to = a->out.data};
    p.from_dtype = p.to_dtype = a->out.dtype;
    p.n = a->out.shape[0], p.D = a->out.shape[1];
    run(be, &p);
    return KL_OK;
}

KL_CPU_NO_WORKSPACE(embedding)
KL_CPU_NO_WORKSPACE(gather)
