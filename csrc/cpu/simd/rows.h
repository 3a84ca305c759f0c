/*
 * rows.h -- norms and the short convolution, written in the words of vec_*.h; included by
 * variant_*.c only.
 *
 * Computes   rms_norm, gated_rms_norm, short_conv of backend/ops.h
 * Shapes     a row of D elements; a strip of C channels over T tokens, W taps
 * Layout     lanes along D; lanes along C, so that a channel never sees another one
 * Precision  f32 or bf16 in and out, f32 inside; a sum of squares takes 4 interleaved vectors
 *            of partial sums, then a fixed tree
 * Roofline   one read and one write of each element: bound by memory
 */
#ifndef KL_CPU_SIMD_ROWS_H
#define KL_CPU_SIMD_ROWS_H

#include "cpu/rows_kernels.h"
#include "cpu/simd/act.h"
#include "cpu/simd/special.h"

#include <math.h>

#define ROWS_SUMS 4 /* independent partial sums: hides the latency of an FMA */

typedef struct {
    vf part[ROWS_SUMS];
} rows_squares;

static inline rows_squares rows_squares_new(void)
{
    return (rows_squares){{v_zero(), v_zero(), v_zero(), v_zero()}};
}

/* 1 / sqrt(mean + eps). */
static inline float rows_inverse_rms(const rows_squares *s, int64_t D, float eps)
{
    const vf sum = v_add(v_add(s->part[0], s->part[1]), v_add(s->part[2], s->part[3]));
    return 1.0f / sqrtf(v_sum(sum) / (float)D + eps);
}

static inline float rows_measure(const void *x, kl_dtype dtype, int64_t D, float eps)
{
    rows_squares s = rows_squares_new();
    for (int64_t i = 0; i < D; i += ROWS_SUMS * VL)
        for (int p = 0; p < ROWS_SUMS; p++) {
            const int64_t at = i + p * VL;
            const vf v = v_load_act(x, dtype, at, v_left(at, D));
            s.part[p] = v_fma(v, v, s.part[p]);
        }
    return rows_inverse_rms(&s, D, eps);
}

static void rows_rms_norm(const void *x, void *residual, const float *weight, void *out,
                          int64_t D, float eps, kl_dtype act, kl_dtype residual_dtype)
{
    if (x != NULL && residual != NULL)
        for (int64_t i = 0; i < D; i += VL) {
            const int n = v_left(i, D);
            const vf r = v_load_act(residual, residual_dtype, i, n);
            v_store_act(residual, residual_dtype, i, v_add(r, v_load_act(x, act, i, n)), n);
        }
    if (out == NULL) return;

    const void *row = residual != NULL ? residual : x;
    const kl_dtype dtype = residual != NULL ? residual_dtype : act;
    const vf inverse = v_set1(rows_measure(row, dtype, D, eps));
    for (int64_t i = 0; i < D; i += VL) {
        const int n = v_left(i, D);
        const vf r = v_mul(v_load_act(row, dtype, i, n), inverse);
        v_store_act(out, act, i, v_mul(r, v_load_act(weight, KL_F32, i, n)), n);
    }
}

static void rows_gated_rms_norm(const void *x, const void *z, const float *weight, void *out,
                                int64_t D, float eps, kl_dtype act)
{
    const vf inverse = v_set1(rows_measure(x, act, D, eps));
    for (int64_t i = 0; i < D; i += VL) {
        const int n = v_left(i, D);
        const vf r = v_mul(v_load_act(x, act, i, n), inverse);
        const vf gate = v_sigmoid(v_load_act(z, act, i, n));
        v_store_act(out, act, i, v_mul(v_mul(r, v_load_act(weight, KL_F32, i, n)), gate), n);
    }
}

/* Taps and history of a strip with the channels in the lanes; the history is in the dtype of
 * x, so that a token's inputs are W rows of one kind wherever they lie. */
typedef struct {
    _Alignas(64) float weight[KL_CONV_MAX_WIDTH][KL_CONV_STRIP];
    _Alignas(64) char past[KL_CONV_MAX_WIDTH - 1][KL_CONV_STRIP * sizeof(float)];
} rows_taps;

static inline void rows_turn(const kl_conv_strip *s, rows_taps *t)
{
    const int64_t W = s->width, C = s->channels, H = W - 1;
    for (int64_t c = 0; c < C; c++)
        for (int64_t j = 0; j < W; j++) t->weight[j][c] = s->weight[c * W + j];
    for (int64_t c = 0; c < C; c++)
        for (int64_t j = 0; j < H; j++)
            if (s->dtype == KL_BF16)
                ((uint16_t *)t->past[j])[c] = ((const uint16_t *)s->state)[c * H + j];
            else
                ((float *)t->past[j])[c] = ((const float *)s->state)[c * H + j];
}

/* One token. `width` and `dtype` are constants where it pays. */
static inline __attribute__((always_inline)) void
rows_conv_token(const rows_taps *taps, const void *const *rows, void *out, int64_t C,
                int64_t width, kl_dtype dtype, bool silu)
{
    for (int64_t c = 0; c < C; c += VL) {
        const int n = v_left(c, C);
        vf y = v_zero();
        for (int64_t j = 0; j < width; j++)
            y = v_fma(v_load_n(taps->weight[j] + c, n), v_load_act(rows[j], dtype, c, n), y);
        v_store_act(out, dtype, c, silu ? v_mul(y, v_sigmoid(y)) : y, n);
    }
}

static void rows_conv(const kl_conv_strip *s)
{
    rows_taps taps;
    rows_turn(s, &taps);
    const size_t bytes = kl_dtype_bytes(s->dtype);
    const int64_t W = s->width, C = s->channels;
    for (int64_t t = 0; t < s->tokens; t++) {
        const void *rows[KL_CONV_MAX_WIDTH]; /* inputs of the taps, oldest first */
        for (int64_t j = 0; j < W; j++) {
            const int64_t from = t - (W - 1) + j;
            rows[j] = from < 0 ? (const void *)taps.past[W - 1 + from]
                               : (const char *)s->x + (size_t)(from * s->x_stride) * bytes;
        }
        void *out = (char *)s->out + (size_t)(t * s->out_stride) * bytes;
        if (W == 4 && s->dtype == KL_BF16) /* as every published model has it */
            rows_conv_token(&taps, rows, out, C, 4, KL_BF16, s->silu);
        else if (W == 4)
            rows_conv_token(&taps, rows, out, C, 4, KL_F32, s->silu);
        else
            rows_conv_token(&taps, rows, out, C, W, s->dtype, s->silu);
    }
}

#define KL_ROWS_KERNELS                                                                        \
    {                                                                                          \
        .rms_norm = rows_rms_norm, .gated_rms_norm = rows_gated_rms_norm, .conv = rows_conv    \
    }

#endif
