/*
 * product_rows.h -- what happens to rows before and after products: activation, rounding,
 * combination, reductions, quantisation; in the words of vec_*.h, included by product.h.
 * Precision    f32; bfloat16 stores and quantisation round to nearest, ties to even
 */
#ifndef KL_CPU_SIMD_PRODUCT_ROWS_H
#define KL_CPU_SIMD_PRODUCT_ROWS_H

#include "base/bf16.h"
#include "cpu/product_kernels.h"

#include <math.h>
#include <string.h>

static inline void store_as(void *row, kl_dtype dtype, int64_t i, int n, vf v)
{
    if (dtype == KL_BF16)
        v_store_bf16_n((uint16_t *)row + i, v, n);
    else
        v_store_n((float *)row + i, v, n);
}

static inline int lanes_left(int64_t n, int64_t i)
{
    return n - i < VL ? (int)(n - i) : VL;
}

static inline vf silu(vf x)
{
    const vf one = v_set1(1.0f);
    return v_div(x, v_add(one, v_exp(v_sub(v_zero(), x))));
}

static void finish(const float *a, const float *b, int64_t stride, int64_t rows, int64_t cols,
                   void *dst, kl_dtype dtype, int64_t dst_stride)
{
    for (int64_t r = 0; r < rows; r++, a += stride) {
        void *to = (char *)dst + r * dst_stride * (int64_t)kl_dtype_bytes(dtype);
        for (int64_t i = 0; i < cols; i += VL) {
            const int n = lanes_left(cols, i);
            vf v = v_load_n(a + i, n);
            if (b != NULL) v = v_mul(silu(v), v_load_n(b + r * stride + i, n));
            store_as(to, dtype, i, n, v);
        }
    }
}

static void combine(const float *y, const int32_t *rows, const float *weights, int64_t n,
                    const float *last, int64_t D, void *dst, kl_dtype dtype)
{
    for (int64_t i = 0; i < D; i += VL) {
        const int lanes = lanes_left(D, i);
        vf sum = v_zero();
        for (int64_t j = 0; j < n; j++)
            sum = v_fma(v_set1(weights[j]), v_load_n(y + rows[j] * D + i, lanes), sum);
        if (last != NULL) sum = v_add(sum, v_load_n(last + i, lanes));
        store_as(dst, dtype, i, lanes, sum);
    }
}

/* A NaN may or may not show in the maximum; it always shows in row_sum_exp(). */
static float row_max(const float *z, int64_t n)
{
    vf best = v_set1(-INFINITY);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) best = v_max(v_load(z + i), best);
    float m = v_hmax(best);
    for (; i < n; i++) m = z[i] > m ? z[i] : m;
    return m;
}

static float row_sum_exp(const float *z, int64_t n, float reference)
{
    const vf zero = v_set1(reference);
    vf sum = v_zero();
    int64_t i = 0;
    for (; i + VL <= n; i += VL) sum = v_add(sum, v_exp(v_sub(v_load(z + i), zero)));
    float lanes[VL];
    for (int j = 0; j < VL; j++) lanes[j] = i + j < n ? z[i + j] : -INFINITY;
    return v_sum(v_add(sum, v_exp(v_sub(v_load(lanes), zero))));
}

/* ---- quantisation ---------------------------------------------------------------------- */

/* Round to nearest, ties to even, for |x| < 2^22. */
static inline float round_even(float x)
{
    return (x + 0x1.8p23f) - 0x1.8p23f;
}

/* The scale of a group, and q as floats. False where an element is not finite. */
static bool quantize_group(const float *w, int n, float qmax, uint16_t *scale, float *q)
{
    uint32_t top = 0; /* of the bits without sign, which sort as the magnitudes do */
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, w + i, sizeof bits);
        bits &= 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    if (top >= 0x7f800000u) return false;
    float largest;
    memcpy(&largest, &top, sizeof largest);
    *scale = kl_f32_to_bf16(largest / qmax);
    const float s = kl_bf16_to_f32(*scale);
    for (int i = 0; i < n; i++) {
        const float r = s == 0.0f ? 0.0f : round_even(w[i] / s);
        q[i] = r > qmax ? qmax : r < -qmax ? -qmax : r;
    }
    return true;
}

static void load_group(const void *src, kl_dtype dtype, int64_t k, int64_t K, int n, float *w)
{
    const int have = K - k < n ? (int)(K - k) : n;
    for (int i = have; i < n; i++) w[i] = 0.0f;
    if (dtype == KL_F32)
        memcpy(w, (const float *)src + k, (size_t)have * sizeof *w);
    else
        for (int i = 0; i < have; i++) w[i] = kl_bf16_to_f32(((const uint16_t *)src)[k + i]);
}

static int64_t first_not_finite(const float *w, int64_t k, int n)
{
    for (int i = 0; i < n; i++)
        if (!isfinite(w[i])) return k + i;
    return -1;
}

static int64_t quantize_ints(const void *src, kl_dtype dtype, int64_t K,
                             kl_weight_format format, uint8_t *dst, uint16_t *scales)
{
    const int n = format == KL_W_INT8 ? KL_INT8_GROUP : KL_INT4_GROUP;
    for (int64_t k = 0; k < K; k += n) {
        float w[KL_INT8_GROUP], q[KL_INT8_GROUP];
        load_group(src, dtype, k, K, n, w);
        if (!quantize_group(w, n, format == KL_W_INT8 ? 127.0f : 7.0f, scales++, q))
            return first_not_finite(w, k, n);
        if (format == KL_W_INT8)
            for (int i = 0; i < n; i++) dst[k + i] = (uint8_t)(int8_t)q[i];
        else
            for (int i = 0; i < 16; i++)
                dst[k / 2 + i] = (uint8_t)(((int)q[i] + 8) | ((int)q[i + 16] + 8) << 4);
    }
    return -1;
}

static int64_t quantize(const void *src, kl_dtype dtype, int64_t K, kl_weight_format format,
                        void *dst, uint16_t *scales)
{
    if (format == KL_W_INT8 || format == KL_W_INT4)
        return quantize_ints(src, dtype, K, format, dst, scales);
    for (int64_t k = 0; k < K; k += VL) {
        const int n = lanes_left(K, k);
        const vf v = dtype == KL_BF16 ? v_load_bf16_n((const uint16_t *)src + k, n)
                                      : v_load_n((const float *)src + k, n);
        store_as(dst, format == KL_W_BF16 ? KL_BF16 : KL_F32, k, n, v);
    }
    return -1;
}

#endif
