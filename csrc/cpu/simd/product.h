/*
 * product.h -- products of rows with rows; written in the words of vec_*.h, included by
 * variant_*.c only.
 */
#ifndef KL_CPU_SIMD_PRODUCT_H
#define KL_CPU_SIMD_PRODUCT_H

#include "cpu/product_kernels.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* A tile is TILE_X rows of x times TILE_W rows of w: as many accumulators as there are
 * registers, less those that hold the operands. */
#define TILE_W 4
#if VL == 16
#    define TILE_X 6
#elif VL == 8
#    define TILE_X 3
#else
#    define TILE_X 4
#endif

ALWAYS_INLINE void tile_zero(const int R, vf acc[TILE_X][TILE_W])
{
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++) acc[r][c] = v_zero();
}

/* Sum the lanes of a tile; only its first `cols` columns exist in out. */
ALWAYS_INLINE void tile_sum(const int R, vf acc[TILE_X][TILE_W], int cols, float *out,
                            int64_t out_stride)
{
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        float sums[TILE_W];
        float *to = cols == TILE_W ? out + r * out_stride : sums;
        v_sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], to);
        if (cols < TILE_W)
            for (int c = 0; c < cols; c++) out[r * out_stride + c] = sums[c];
    }
}

/* Rows of a tile that do not exist repeat the last one; their sums are not stored. */
#define TILE_ROWS(type, rows, base, stride, n)                                                 \
    const type *rows[TILE_W];                                                                  \
    for (int c = 0; c < TILE_W; c++) rows[c] = (base) + (c < (n) ? c : (n)-1) * (stride)

ALWAYS_INLINE void dot_step(const int R, const float *x, int64_t x_stride,
                            const float *const *w, int64_t k, int n, vf acc[TILE_X][TILE_W])
{
    vf xv[TILE_X];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        xv[r] = n == VL ? v_load(x + r * x_stride + k) : v_load_n(x + r * x_stride + k, n);
#pragma GCC unroll 4
    for (int c = 0; c < TILE_W; c++) {
        const vf wv = n == VL ? v_load(w[c] + k) : v_load_n(w[c] + k, n);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r][c] = v_fma(xv[r], wv, acc[r][c]);
    }
}

ALWAYS_INLINE void dot_tile(const int R, const float *x, int64_t x_stride, const float *w,
                            int64_t w_stride, int cols, int64_t K, float *out,
                            int64_t out_stride)
{
    TILE_ROWS(float, rows, w, w_stride, cols);
    const int64_t whole = K / VL * VL;
    vf acc[TILE_X][TILE_W];
    tile_zero(R, acc);
    for (int64_t k = 0; k < whole; k += VL) dot_step(R, x, x_stride, rows, k, VL, acc);
    if (whole < K) dot_step(R, x, x_stride, rows, whole, (int)(K - whole), acc);
    tile_sum(R, acc, cols, out, out_stride);
}

static void dot_f32(const float *x, int64_t x_stride, int64_t T, const float *w,
                    int64_t w_stride, int64_t O, int64_t K, float *out, int64_t out_stride)
{
    for (int64_t t = 0; t < T; t += TILE_X) {
        const int R = T - t < TILE_X ? (int)(T - t) : TILE_X;
        for (int64_t o = 0; o < O; o += TILE_W) {
            const int cols = O - o < TILE_W ? (int)(O - o) : TILE_W;
            const float *xt = x + t * x_stride, *wo = w + o * w_stride;
            float *to = out + t * out_stride + o;
#define CASE(n)                                                                                \
case n:                                                                                        \
    dot_tile(n, xt, x_stride, wo, w_stride, cols, K, to, out_stride);                          \
    break
            switch (R) {
                CASE(1);
                CASE(2);
                CASE(3);
#if TILE_X > 3
                CASE(4);
#endif
#if TILE_X > 4
                CASE(5);
                CASE(6);
#endif
            }
#undef CASE
        }
    }
}

#define KL_PRODUCT_KERNELS                                                                     \
    {                                                                                          \
        .dot_f32 = dot_f32,                                                                    \
    }

#endif
