/*
 * logits_kernels.h -- the kernels of simd/logits.h, as each instruction set fills them in: one
 * row of scores, of a router or of the whole vocabulary.
 */
#ifndef KL_CPU_LOGITS_KERNELS_H
#define KL_CPU_LOGITS_KERNELS_H

#include <stdint.h>

typedef struct {
    /* The largest of z [n], n >= 1; NaN if there is one among them. */
    float (*max)(const float *z, int64_t n);

    /* e[i] = exp((z[i] - shift) / temperature), not stored where e is NULL; returns their sum,
     * taken in one order. */
    double (*exp)(const float *z, int64_t n, float shift, float temperature, float *e);

    /* s[i] = 1 / (1 + exp(-z[i])). */
    void (*sigmoid)(const float *z, int64_t n, float *s);
} kl_logits_kernels;

#endif
