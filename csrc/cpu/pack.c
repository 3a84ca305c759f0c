/*
 * pack.c -- storing a matrix in a weight's format. Formula and shapes: backend/ops.h.
 *
 * A row is quantised alone, so any partition gives the same bytes. A checkpoint with a NaN or
 * an infinity would spread it over a whole group, so the integer formats refuse it by place.
 */
#include "cpu/cpu_backend.h"

#include <inttypes.h>
#include <stdatomic.h>

#define TASK_ELEMENTS ((int64_t)1 << 16)

typedef struct {
    const kl_product_kernels *kernels;
    const kl_pack_weight *a;
    int64_t task_rows;
    _Atomic int64_t bad_row; /* the lowest one that is not finite, or the number of rows */
} packing;

static int64_t pack_row(const packing *p, int64_t row)
{
    const kl_tensor *src = &p->a->src;
    const kl_weight out = kl_weight_slice(&p->a->out, 0, row, 1);
    const int64_t at = row * src->stride[0] * (int64_t)kl_dtype_bytes(src->dtype);
    return p->kernels->quantize((const char *)src->data + at, src->dtype, out.cols, out.format,
                                out.data, out.scales);
}

static void pack_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    packing *p = ctx;
    const int64_t rows = p->a->out.rows, first = task * p->task_rows;
    const int64_t end = rows - first < p->task_rows ? rows : first + p->task_rows;
    for (int64_t row = first; row < end; row++) {
        if (pack_row(p, row) < 0) continue;
        int64_t lowest = atomic_load(&p->bad_row);
        while (row < lowest && !atomic_compare_exchange_weak(&p->bad_row, &lowest, row)) {
        }
        return;
    }
}

size_t kl_cpu_pack_weight_workspace(kl_backend *be, const kl_pack_weight *a)
{
    (void)be, (void)a;
    return 0;
}

kl_status kl_cpu_pack_weight(kl_backend *be, const kl_pack_weight *a, kl_error *err)
{
    const kl_cpu *cpu = (const kl_cpu *)be;
    const int64_t rows = a->out.rows, cols = a->out.cols;
    const int64_t task_rows = cols < TASK_ELEMENTS ? TASK_ELEMENTS / (cols > 0 ? cols : 1) : 1;
    packing p = {&cpu->kernels->product, a, task_rows, rows};
    kl_pool_run(cpu->pool, (rows + task_rows - 1) / task_rows, pack_task, &p);

    const int64_t bad = atomic_load(&p.bad_row);
    if (bad == rows) return KL_OK;
    return kl_fail(err, KL_ERR_NUMERICAL,
                   "pack_weight: w must be finite, got NaN or infinity at row %" PRId64
                   ", column %" PRId64,
                   bad, pack_row(&p, bad));
}
