/*
 * peaks.c -- what a draw asks of all logits of a row, said of 16 at a time. Formula: kl_linear of
 * backend/ops.h.
 *
 * Computes     of each KL_PEAK_OUTPUTS values the largest, and the sum of the others' weights
 *              beside it
 * Shapes       logits [N, V], rows strided; peaks [N, kl_peaks_of(V), 2]
 * Precision    exponentials in f32, their sum in f64, rounded to f32
 * Tasks        pieces of rows
 */
#include "cpu/cpu_backend.h"

#include <math.h>

#define PEAKS_A_TASK 512

typedef struct {
    const kl_logits_kernels *kernels;
    const kl_tensor *logits;
    float *peaks;
    int64_t pieces; /* of a row */
} run;

void kl_cpu_row_peaks(const kl_logits_kernels *kernels, const float *z, int64_t n, float *peaks)
{
    for (int64_t i = 0; i < n; i += KL_PEAK_OUTPUTS, peaks += 2) {
        const int64_t count = n - i < KL_PEAK_OUTPUTS ? n - i : KL_PEAK_OUTPUTS;
        const float top = peaks[0] = kernels->max(z + i, count);
        peaks[1] = isfinite(top) ? (float)kernels->exp(z + i, count, top, 1.0f, NULL) : 0.0f;
    }
}

static void piece_task(void *ctx, int64_t task, int worker)
{
    const run *r = ctx;
    const int64_t n = task / r->pieces, first = task % r->pieces * PEAKS_A_TASK;
    const int64_t V = r->logits->shape[1], at = first * KL_PEAK_OUTPUTS;
    const int64_t most = (int64_t)PEAKS_A_TASK * KL_PEAK_OUTPUTS;
    const float *z = (const float *)r->logits->data + n * r->logits->stride[0];
    (void)worker;
    kl_cpu_row_peaks(r->kernels, z + at, V - at < most ? V - at : most,
                     r->peaks + 2 * (n * kl_peaks_of(V) + first));
}

void kl_cpu_find_peaks(const kl_cpu *cpu, const kl_tensor *logits, float *peaks)
{
    const int64_t count = kl_peaks_of(logits->shape[1]);
    run r = {.kernels = &cpu->kernels->logits, .logits = logits, .peaks = peaks};
    r.pieces = (count + PEAKS_A_TASK - 1) / PEAKS_A_TASK;
    kl_pool_run(cpu->pool, logits->shape[0] * r.pieces, piece_task, &r);
}
