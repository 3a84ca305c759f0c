/*
 * logits.h -- maxima, exponentials and sigmoids of a row of scores; written in the words of
 * vec_*.h, included by variant_*.c only.
 *
 * Computes     max z;  e = exp((z - shift) / temperature) and its sum;  1 / (1 + exp(-z))
 * Shapes       z, e, s [n]
 * Precision    f32; the sum over a vocabulary in f64 from partial sums of 64 vectors, so that
 *              its error does not grow with n
 * Roofline     4 to 8 bytes an element: bound by the cache
 */
#ifndef KL_CPU_SIMD_LOGITS_H
#define KL_CPU_SIMD_LOGITS_H

#include "cpu/logits_kernels.h"
#include "cpu/simd/act.h"
#include "cpu/simd/special.h"

#include <stddef.h>

#define LOGITS_RUN (64 * VL)

/* The maximum itself may drop a NaN; the sum of the values clamped to [-1, 1] does not. v_max
 * and v_min yield their second operand when one is NaN. */
static float logits_max(const float *z, int64_t n)
{
    const vf one = v_set1(1.0f), minus_one = v_set1(-1.0f);
    const int64_t whole = n / VL * VL;
    vf top = v_set1(z[0]), finite = v_zero();
    for (int64_t i = 0; i < whole; i += VL) {
        const vf x = v_load(z + i);
        top = v_max(top, x);
        finite = v_add(finite, v_min(one, v_max(minus_one, x)));
    }
    float max = v_hmax(top), sum = v_sum(finite);
    for (int64_t i = whole; i < n; i++) {
        max = max > z[i] ? max : z[i];
        sum += z[i] > 1.0f ? 1.0f : z[i] < -1.0f ? -1.0f : z[i];
    }
    return sum == sum ? max : sum;
}

/* Up to LOGITS_RUN elements. */
static float logits_exp_run(const float *z, int64_t n, vf shift, vf temperature, float *e)
{
    vf sum = v_zero();
    float rest = 0.0f, last[VL];
    for (int64_t i = 0; i < n; i += VL) {
        const int lanes = v_left(i, n);
        const vf x = lanes == VL ? v_load(z + i) : v_load_n(z + i, lanes);
        const vf y = v_exp(v_div(v_sub(x, shift), temperature));
        if (e != NULL) v_store_n(e + i, y, lanes);
        if (lanes == VL) {
            sum = v_add(sum, y);
        } else {
            v_store(last, y);
            for (int k = 0; k < lanes; k++) rest += last[k];
        }
    }
    return v_sum(sum) + rest;
}

static double logits_exp(const float *z, int64_t n, float shift, float temperature, float *e)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i += LOGITS_RUN) {
        const int64_t run = n - i < LOGITS_RUN ? n - i : LOGITS_RUN;
        sum += (double)logits_exp_run(z + i, run, v_set1(shift), v_set1(temperature),
                                      e == NULL ? NULL : e + i);
    }
    return sum;
}

static void logits_sigmoid(const float *z, int64_t n, float *s)
{
    for (int64_t i = 0; i < n; i += VL) {
        const int lanes = v_left(i, n);
        v_store_n(s + i, v_sigmoid(v_load_n(z + i, lanes)), lanes);
    }
}

#define KL_LOGITS_KERNELS                                                                      \
    {                                                                                          \
        .max = logits_max, .exp = logits_exp, .sigmoid = logits_sigmoid,                       \
    }

#endif
