/*
 * product_kernels.h -- the kernels of simd/product.h and simd/product_rows.h, as each
 * instruction set fills them in.
 *
 * One order of summation everywhere: an element sum_k x[k] w[k] is gathered in a vector, lane j
 * taking the columns k = j mod VL in turn by fused multiply-add, and the lanes are added by the
 * tree of v_sum(). Columns past K count as zeros. So an element has the same bits whether it is
 * computed alone or in a tile, from packed operands or not.
 *
 * Panels: packed x is cut in panels of tile_x rows (the last may have fewer), each holding, for
 * every step of VL columns, that vector of each of its rows: a tile then reads one stream. With
 * `dot`, x and w are bfloat16 and a vector holds 2 VL columns; lane j takes k = 2j, 2j + 1 mod
 * 2 VL. A panel spans kl_panel_cols(K) columns, zeros past K.
 */
#ifndef KL_CPU_PRODUCT_KERNELS_H
#define KL_CPU_PRODUCT_KERNELS_H

#include "base/tensor.h"
#include "base/weight.h"

#include <stdbool.h>

#define KL_TILE_W 4 /* rows of w in a tile, on every machine */

/* Rows of activations: row i stands at data + (index[i], or i) * stride elements. */
typedef struct {
    const void *data;
    kl_dtype dtype; /* KL_F32 or KL_BF16 */
    int64_t stride;
    const int32_t *index; /* NULL: i -> i */
    int64_t n;
} kl_rows;

/* A multiple of every vector and of every quantisation group. */
static inline int64_t kl_panel_cols(int64_t K)
{
    return (K + 63) / 64 * 64;
}

typedef struct {
    int tile_x;    /* rows of x in a panel                              */
    bool bf16_dot; /* bfloat16 times bfloat16 has an instruction of its own */

    /* out[t, o] = sum_k x[t, k] w[o, k], all f32, strides between rows, k contiguous. Small
     * enough operands to stay in cache; runs on the calling thread. */
    void (*dot_f32)(const float *x, int64_t x_stride, int64_t T, const float *w,
                    int64_t w_stride, int64_t O, int64_t K, float *out, int64_t out_stride);

    /* Rows [first, first + n), n <= tile_x, of x as one panel. */
    void (*pack_x)(const kl_rows *x, int64_t first, int n, int64_t K, bool dot, void *panel);

    /* Rows [first, first + n) of w, dequantised, as panels of KL_TILE_W rows. */
    void (*pack_w)(const kl_weight *w, int64_t first, int64_t n, bool dot, void *panels);

    /* out [T, n] f32 = packed x times rows [first, first + n) of w, which are read where they
     * lie: for few rows of x. */
    void (*direct)(const void *x, int64_t T, const kl_weight *w, int64_t first, int64_t n,
                   bool dot, float *out, int64_t out_stride);

    /* out [R, n] f32 = one panel of x times packed rows of w of this format. `partial`, of
     * kl_partial_floats(n), keeps the lanes between blocks of columns. */
    void (*packed)(const void *x, int R, const void *panels, int64_t n, kl_weight_format format,
                   int64_t K, bool dot, float *partial, float *out, int64_t out_stride);

    /* Store a [rows, cols] as dtype: a, or silu(a) * b (b may be NULL). stride is that of a and
     * b; a may be dst itself. */
    void (*finish)(const float *a, const float *b, int64_t stride, int64_t rows, int64_t cols,
                   void *dst, kl_dtype dtype, int64_t dst_stride);

    /* dst[0..D) = sum_j weights[j] y[rows[j] * D ..], j ascending, + last[0..D) (or NULL). */
    void (*combine)(const float *y, const int32_t *rows, const float *weights, int64_t n,
                    const float *last, int64_t D, void *dst, kl_dtype dtype);

    float (*row_max)(const float *z, int64_t n);
    float (*row_sum_exp)(const float *z, int64_t n,
                         float reference); /* sum exp(z - reference) */

    /* Store a row of src [K] in a format. The first column that is not finite, for the integer
     * formats, or -1. */
    int64_t (*quantize)(const void *src, kl_dtype dtype, int64_t K, kl_weight_format format,
                        void *dst, uint16_t *scales);
} kl_product_kernels;

static inline int64_t kl_partial_floats(int64_t n)
{
    return (n + KL_TILE_W - 1) / KL_TILE_W * 6 * KL_TILE_W *
           16; /* the widest tile and vector */
}

#endif
