/*
 * norm.c -- rms_norm and gated_rms_norm on the CPU: rows dealt out to the threads. Formulas:
 * backend/ops.h; arithmetic: simd/rows.h.
 */
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"

static void *row_of(const kl_tensor *t, int64_t row)
{
    if (kl_tensor_absent(t)) return NULL;
    return (char *)t->data + (size_t)(row * t->stride[0]) * kl_dtype_bytes(t->dtype);
}

typedef struct {
    const kl_rows_kernels *kernels;
    const kl_rms_norm *rms;
    const kl_gated_rms_norm *gated;
    int64_t rows, per_task;
} norm_call;

static void rms_norm_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const norm_call *call = ctx;
    const kl_rms_norm *a = call->rms;
    const kl_dtype act = kl_tensor_absent(&a->x) ? a->out.dtype : a->x.dtype;
    const int64_t first = task * call->per_task, end = first + call->per_task;
    for (int64_t t = first; t < end && t < call->rows; t++)
        call->kernels->rms_norm(row_of(&a->x, t), row_of(&a->residual, t), a->weight.data,
                                row_of(&a->out, t), a->weight.shape[0], a->eps, act,
                                a->residual.dtype);
}

kl_status kl_cpu_rms_norm(kl_backend *be, const kl_rms_norm *a, kl_error *err)
{
    (void)err;
    kl_cpu *cpu = (kl_cpu *)be;
    norm_call call = {.kernels = &cpu->kernels->rows, .rms = a};
    call.rows = kl_tensor_absent(&a->x) ? a->residual.shape[0] : a->x.shape[0];
    call.per_task = kl_rows_per_task(a->weight.shape[0]);
    kl_pool_run(cpu->pool, (call.rows + call.per_task - 1) / call.per_task, rms_norm_task,
                &call);
    return KL_OK;
}

static void gated_rms_norm_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const norm_call *call = ctx;
    const kl_gated_rms_norm *a = call->gated;
    const int64_t H = a->x.shape[1], D = a->x.shape[2];
    const size_t head_bytes = (size_t)D * kl_dtype_bytes(a->x.dtype);
    const int64_t first = task * call->per_task, end = first + call->per_task;
    for (int64_t r = first; r < end && r < call->rows; r++) {
        const size_t at = (size_t)(r % H) * head_bytes;
        const int64_t t = r / H;
        call->kernels->gated_rms_norm((char *)row_of(&a->x, t) + at,
                                      (char *)row_of(&a->z, t) + at, a->weight.data,
                                      (char *)row_of(&a->out, t) + at, D, a->eps, a->x.dtype);
    }
}

kl_status kl_cpu_gated_rms_norm(kl_backend *be, const kl_gated_rms_norm *a, kl_error *err)
{
    (void)err;
    kl_cpu *cpu = (kl_cpu *)be;
    norm_call call = {.kernels = &cpu->kernels->rows, .gated = a};
    call.rows = a->x.shape[0] * a->x.shape[1];
    call.per_task = kl_rows_per_task(a->x.shape[2]);
    kl_pool_run(cpu->pool, (call.rows + call.per_task - 1) / call.per_task, gated_rms_norm_task,
                &call);
    return KL_OK;
}

KL_CPU_NO_WORKSPACE(rms_norm)
KL_CPU_NO_WORKSPACE(gated_rms_norm)
