/*
 * mla.h -- products, softmax and conversions of latent attention; written in the words of
 * vec_*.h, included by variant_*.c only.
 *
 * Computes     out = keep out + a b; the online softmax of a page; the norm of a latent
 * Shapes       a [M, K], b [K, N], out [M, N]; scores [J, N]
 * Layout       lanes run along N: queries or heads in the scores, channels elsewhere. Nothing
 *              is summed across lanes, so neither a transposed page nor a reduction is needed
 * Precision    f32 arithmetic; b may be bf16
 * Blocks       4 rows x 4 vectors of accumulators (8 x 1 at the edge): 16 independent chains
 *              hide the latency of a multiply-add on two ports
 * Roofline     2 M N K flops on operands that fit the L2: compute-bound
 */
#ifndef KL_CPU_SIMD_MLA_H
#define KL_CPU_SIMD_MLA_H

#include "base/latents.h"
#include "cpu/mla_kernels.h"
#include "cpu/simd/act.h"

#include <math.h>

#define MLA_INLINE static inline __attribute__((always_inline))
#if VL == 8
#    define MLA_WIDE 2 /* sixteen registers */
#else
#    define MLA_WIDE 4
#endif

typedef struct {
    kl_mla_left a;
    const void *b;
    int64_t b_stride, N, K;
    const float *keep;
    float *out;
    int64_t out_stride;
} mla_product_args;

/* Rows m .. m+R-1, W vectors from column n, terms k0 .. k1-1. */
MLA_INLINE void mla_block(const int R, const int W, const kl_dtype dtype, const bool whole,
                          const mla_product_args *p, int64_t m, int64_t n, int64_t k0,
                          int64_t k1)
{
    const int lanes = whole ? VL : (int)(p->N - n);
    const float *a = p->a.data + m * p->a.stride;
    vf acc[8][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) acc[r][w] = v_zero();

    for (int64_t k = k0; k < k1; k++) {
        vf b[4];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++)
            b[w] = v_load_act(p->b, dtype, k * p->b_stride + n + w * VL, lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vf x = v_set1(a[r * p->a.stride + k * p->a.step]);
#pragma GCC unroll 4
            for (int w = 0; w < W; w++) acc[r][w] = v_fma(x, b[w], acc[r][w]);
        }
    }

#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) {
            float *to = p->out + (m + r) * p->out_stride + n + w * VL;
            vf sum = acc[r][w];
            if (k0 > 0 || p->keep != NULL) {
                const vf factor = v_set1(k0 > 0 ? 1.0f : p->keep[m + r]);
                sum = v_fma(factor, whole ? v_load(to) : v_load_n(to, lanes), sum);
            }
            if (whole)
                v_store(to, sum);
            else
                v_store_n(to, sum, lanes);
        }
}

/* All rows of W vectors from column n. */
MLA_INLINE void mla_panel(const int W, const kl_dtype dtype, const bool whole,
                          const mla_product_args *p, int64_t M, int64_t n)
{
    enum { ROWS_WIDE = 4, ROWS_NARROW = 8 };
    const int rows = W > 1 ? ROWS_WIDE : ROWS_NARROW;
    int64_t k0 = 0;
    do {
        const int64_t k1 = p->K - k0 < KL_MLA_CHAIN ? p->K : k0 + KL_MLA_CHAIN;
        int64_t m = 0;
        for (; m + rows <= M; m += rows) mla_block(rows, W, dtype, whole, p, m, n, k0, k1);
        for (; m < M; m++) mla_block(1, W, dtype, whole, p, m, n, k0, k1);
        k0 = k1;
    } while (k0 < p->K);
}

MLA_INLINE void mla_panels(const kl_dtype dtype, const mla_product_args *p, int64_t M)
{
    int64_t n = 0;
    for (; n + MLA_WIDE * VL <= p->N; n += MLA_WIDE * VL)
        mla_panel(MLA_WIDE, dtype, true, p, M, n);
    for (; n + VL <= p->N; n += VL) mla_panel(1, dtype, true, p, M, n);
    if (n < p->N) mla_panel(1, dtype, false, p, M, n);
}

static void mla_product(kl_mla_left a, int64_t M, const void *b, kl_dtype b_dtype,
                        int64_t b_stride, int64_t N, int64_t K, const float *keep, float *out,
                        int64_t out_stride)
{
    const mla_product_args p = {a, b, b_stride, N, K, keep, out, out_stride};
    if (b_dtype == KL_BF16)
        mla_panels(KL_BF16, &p, M);
    else
        mla_panels(KL_F32, &p, M);
}

/* The running maximum starts at -FLT_MAX rather than -inf: a page of scores that are all -inf
 * then adds nothing, instead of exp(inf - inf). */
static void mla_softmax(float *s, int64_t stride, int64_t J, int64_t N, float *max, float *sum,
                        float *keep)
{
    for (int64_t n = 0; n < N; n += VL) {
        const int lanes = v_left(n, N);
        const vf before = v_load_n(max + n, lanes);
        vf top = before, total = v_zero();
        for (int64_t j = 0; j < J; j++) top = v_max(top, v_load_n(s + j * stride + n, lanes));
        for (int64_t j = 0; j < J; j++) {
            float *at = s + j * stride + n;
            const vf e = v_exp(v_sub(v_load_n(at, lanes), top));
            v_store_n(at, e, lanes);
            total = v_add(total, e);
        }
        const vf factor = v_exp(v_sub(before, top));
        v_store_n(keep + n, factor, lanes);
        v_store_n(max + n, top, lanes);
        v_store_n(sum + n, v_fma(factor, v_load_n(sum + n, lanes), total), lanes);
    }
}

static void mla_widen(const void *from, kl_dtype dtype, int64_t n, float scale, float *to)
{
    const vf factor = v_set1(scale);
    for (int64_t i = 0; i < n; i += VL) {
        const int lanes = v_left(i, n);
        const vf x = v_load_act(from, dtype, i, lanes);
        v_store_n(to + i, v_mul(factor, x), lanes);
    }
}

static void mla_narrow(const float *from, int64_t n, float scale, void *to, kl_dtype dtype)
{
    const vf factor = v_set1(scale);
    for (int64_t i = 0; i < n; i += VL) {
        const int lanes = v_left(i, n);
        v_store_act(to, dtype, i, v_mul(factor, v_load_n(from + i, lanes)), lanes);
    }
}

static float mla_inverse_norm(const void *from, kl_dtype dtype, int64_t n, float eps)
{
    vf squares = v_zero();
    for (int64_t i = 0; i < n; i += VL) {
        const int lanes = v_left(i, n);
        const vf x = v_load_act(from, dtype, i, lanes);
        squares = v_fma(x, x, squares);
    }
    return 1.0f / sqrtf(v_sum(squares) / (float)n + eps);
}

static void mla_weigh(const void *from, kl_dtype dtype, int64_t n, float factor,
                      const float *weight, void *to)
{
    for (int64_t i = 0; i < n; i += VL) {
        const int lanes = v_left(i, n);
        const vf x = v_mul(v_load_act(from, dtype, i, lanes), v_set1(factor));
        v_store_act(to, dtype, i, v_mul(x, v_load_n(weight + i, lanes)), lanes);
    }
}

/* In words that the compiler makes vectors of. */
static void mla_decode(const uint8_t *codes, int64_t n, float scale, float *to)
{
    for (int64_t i = 0; i < n; i++) to[i] = scale * kl_latents_value(codes[i]);
}

#define KL_MLA_KERNELS                                                                         \
    {                                                                                          \
        .product = mla_product, .softmax = mla_softmax, .widen = mla_widen,                    \
        .narrow = mla_narrow, .inverse_norm = mla_inverse_norm, .weigh = mla_weigh,            \
        .decode = mla_decode,                                                                  \
    }

#endif
