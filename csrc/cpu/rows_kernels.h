/*
 * rows_kernels.h -- the kernels of simd/rows.h, as each instruction set fills them in: cheap
 * work on one row of activations, or on a strip of channels over time.
 */
#ifndef KL_CPU_ROWS_KERNELS_H
#define KL_CPU_ROWS_KERNELS_H

#include "base/tensor.h"

#include <stdbool.h>

#define KL_CONV_MAX_WIDTH 8
#define KL_CONV_STRIP     1024 /* channels of a strip: a multiple of the lanes */

/* A strip of `channels` <= KL_CONV_STRIP channels of one sequence of `tokens` tokens. */
typedef struct {
    const void *x;       /* [tokens, channels], x_stride elements between tokens */
    void *out;           /* likewise, out_stride                                 */
    void *state;         /* [channels, width - 1]                                */
    const float *weight; /* [channels, width]                              */
    int64_t x_stride, out_stride, tokens, channels, width;
    kl_dtype dtype;
    bool silu;
} kl_conv_strip;

typedef struct {
    /* residual += x, where both are given; out = r / sqrt(mean(r^2) + eps) * weight of the
     * residual as it is stored, or of x. Any of x, residual, out may be NULL as in ops.h. */
    void (*rms_norm)(const void *x, void *residual, const float *weight, void *out, int64_t D,
                     float eps, kl_dtype act, kl_dtype residual_dtype);

    /* out = x / sqrt(mean(x^2) + eps) * weight * sigmoid(z). out may be x. */
    void (*gated_rms_norm)(const void *x, const void *z, const float *weight, void *out,
                           int64_t D, float eps, kl_dtype act);

    /* The convolution of a strip; the state is read, not written. */
    void (*conv)(const kl_conv_strip *s);
} kl_rows_kernels;

#endif
