/*
 * product_kernels.h -- the kernels of simd/product.h, as each instruction set fills them in.
 */
#ifndef KL_CPU_PRODUCT_KERNELS_H
#define KL_CPU_PRODUCT_KERNELS_H

#include "base/tensor.h"

typedef struct {
    /* out[t, o] = sum_k x[t, k] w[o, k], all f32, strides between rows, k contiguous. Small
     * enough operands to stay in cache; runs on the calling thread. Each element is summed in
     * one order: lanes along k, then v_sum. */
    void (*dot_f32)(const float *x, int64_t x_stride, int64_t T, const float *w,
                    int64_t w_stride, int64_t O, int64_t K, float *out, int64_t out_stride);
} kl_product_kernels;

#endif
