/*
 * fill_normal.c -- normally distributed numbers by their index.
 *
 * A task is a run of pairs: the formula of kl_fill_normal in backend/ops.h needs no state, so
 * any of them can be asked for alone. Double throughout, rounded once to the dtype of out.
 */
#include "base/bf16.h"
#include "base/rng.h"
#include "cpu/cpu_backend.h"

#include <math.h>

#define PAIRS_PER_TASK 4096 /* about 200 us: random numbers are not cheap */

static void normal_pair(uint64_t seed, int64_t pair, double z[2])
{
    uint32_t r[4];
    kl_philox(seed, (uint64_t)pair, r);
    const double u = (double)(((uint64_t)r[0] << 32 | r[1]) >> 11) * 0x1p-53;
    const double w = (double)(((uint64_t)r[2] << 32 | r[3]) >> 11) * 0x1p-53;
    const double radius = sqrt(-2.0 * log1p(-u)), angle = 6.283185307179586 * w;
    z[0] = radius * cos(angle);
    z[1] = radius * sin(angle);
}

static void fill_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const kl_fill_normal *a = ctx;
    const int64_t size = kl_tensor_size(&a->out);
    for (int64_t p = task * PAIRS_PER_TASK; p < (task + 1) * PAIRS_PER_TASK; p++) {
        if (2 * p >= size) break;
        double z[2];
        normal_pair(a->seed, p, z);
        for (int64_t i = 2 * p; i < 2 * p + 2 && i < size; i++) {
            const float value = (float)(a->mean + (double)a->std * z[i - 2 * p]);
            if (a->out.dtype == KL_BF16)
                ((uint16_t *)a->out.data)[i] = kl_f32_to_bf16(value);
            else
                ((float *)a->out.data)[i] = value;
        }
    }
}

kl_status kl_cpu_fill_normal(kl_backend *be, const kl_fill_normal *a, kl_error *err)
{
    (void)err;
    kl_fill_normal call = *a;
    const int64_t pairs = (kl_tensor_size(&a->out) + 1) / 2;
    kl_pool_run(((kl_cpu *)be)->pool, (pairs + PAIRS_PER_TASK - 1) / PAIRS_PER_TASK, fill_task,
                &call);
    return KL_OK;
}

KL_CPU_NO_WORKSPACE(fill_normal)
