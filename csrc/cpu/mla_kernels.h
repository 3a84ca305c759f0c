/*
 * mla_kernels.h -- the kernels of simd/mla.h, as each instruction set fills them in.
 */
#ifndef KL_CPU_MLA_KERNELS_H
#define KL_CPU_MLA_KERNELS_H

#include "base/tensor.h"

/* A matrix of a product, read at data[i * stride + j * step]. */
typedef struct {
    const float *data;
    int64_t stride, step;
} kl_mla_left;

typedef struct {
    /* out[m, n] = keep[m] out[m, n] + sum_k a[m, k] b[k, n], without the first term when keep
     * is NULL. b is f32 or bf16 with n contiguous. An element is a chain of multiply-adds with
     * k rising (cut every KL_MLA_CHAIN and the pieces added), so it depends neither on M and N
     * nor on the width of a vector. */
    void (*product)(kl_mla_left a, int64_t M, const void *b, kl_dtype b_dtype, int64_t b_stride,
                    int64_t N, int64_t K, const float *keep, float *out, int64_t out_stride);

    /* A page of scores s [J, N] becomes exp(s - max), where max [N] and sum [N] run over the
     * pages of a context; keep[n] is the factor that brings earlier results to the new max. */
    void (*softmax)(float *s, int64_t stride, int64_t J, int64_t N, float *max, float *sum,
                    float *keep);

    /* to[i] = scale * from[i] in f32; and its inverse, rounding to dtype. */
    void (*widen)(const void *from, kl_dtype dtype, int64_t n, float scale, float *to);
    void (*narrow)(const float *from, int64_t n, float scale, void *to, kl_dtype dtype);

    /* 1 / sqrt(mean(from^2) + eps); and to = from * factor * weight, of from's dtype. */
    float (*inverse_norm)(const void *from, kl_dtype dtype, int64_t n, float eps);
    void (*weigh)(const void *from, kl_dtype dtype, int64_t n, float factor,
                  const float *weight, void *to);

    /* to[i] = scale * the value of code i (base/latents.h). */
    void (*decode)(const uint8_t *codes, int64_t n, float scale, float *to);
} kl_mla_kernels;

#define KL_MLA_CHAIN 128 /* rows of b that stay in the L1 cache while rows of a pass by */

#endif
