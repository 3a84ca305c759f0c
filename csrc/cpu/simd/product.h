/*
 * product.h -- products of rows with rows; written in the words of vec_*.h, included by
 * variant_*.c only.
 * Computes     out[t, o] = sum_k x[t, k] w[o, k], in the order of product_kernels.h
 * Shapes       any; w in any format of base/weight.h
 * Layout       x in panels; w in panels or where it lies; dot_f32: both where they lie
 * Precision    f32 multiply-add; pairs of bfloat16 where the CPU has them (`dot`)
 * Tile         TILE_X x TILE_W accumulators in registers, each a vector of lanes along k
 * Roofline     few rows of x: the weights' bytes; many: multiply-adds
 * Measured     one core of a Zen 5 beside others at work, thread time, best of 30. T = 512,
 *              K = 2304, O = 4096, share of multiply-adds on registers: AVX-512 f32 74 %, int8
 *              77 %, int4 78 % (of 233 GFLOP/s), bf16 pairs 74 % (of 464); AVX2 80 % (of 118).
 *              T = 1, 80 MB of weights, share of a plain read at 38 GB/s: AVX-512 f32 93 %,
 *              bf16 87 %, int8 92 %, int4 58 %; AVX2 82, 84, 52, 27 % (2026-11-22)
 */
#ifndef KL_CPU_SIMD_PRODUCT_H
#define KL_CPU_SIMD_PRODUCT_H

#include "cpu/product_kernels.h"
#include "cpu/simd/product_rows.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* As many accumulators as there are registers, less those that hold the operands. A function
 * below is compiled for each number of rows R, which must be a constant for the loops over the
 * accumulators to vanish. */
#define TILE_W KL_TILE_W
#if VL == 16
#    define TILE_X       6
#    define EACH_R(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#elif VL == 8
#    define TILE_X       3
#    define EACH_R(CASE) CASE(1) CASE(2) CASE(3)
#else
#    define TILE_X       4
#    define EACH_R(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#endif

/* Steps between which a tile's lanes are put aside: 6 rows of x and 4 of w take 40 KiB of a
 * first-level cache of 48 at 16 floats a step. */
#define BLOCK_STEPS 64

typedef vf tile[TILE_X][TILE_W];

ALWAYS_INLINE void tile_zero(const int R, tile acc)
{
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++) acc[r][c] = v_zero();
}

ALWAYS_INLINE void tile_load(const int R, tile acc, const float *from)
{
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++) acc[r][c] = v_load(from + (r * TILE_W + c) * VL);
}

ALWAYS_INLINE void tile_store(const int R, tile acc, float *to)
{
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++) v_store(to + (r * TILE_W + c) * VL, acc[r][c]);
}

/* Sum the lanes of a tile; only its first `cols` columns exist in out. */
ALWAYS_INLINE void tile_sum(const int R, tile acc, int cols, float *out, int64_t out_stride)
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

/* Add one vector of w's row c, times that of each row of x. */
ALWAYS_INLINE void tile_add(const int R, tile acc, int c, const float *x, int64_t x_stride,
                            vf w)
{
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r][c] = v_fma(v_load(x + r * x_stride), w, acc[r][c]);
}

#if defined(KL_VEC_BF16_DOT)
ALWAYS_INLINE void tile_add_dot(const int R, tile acc, int c, const uint16_t *x, vh w)
{
#    pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r][c] = v_dot_bf16(acc[r][c], v_load_h(x + r * 2 * VL), w);
}
#endif

/* Vectors of a row of w, and the columns they hold: whole groups for the integer formats. */
static inline int64_t count_steps(kl_weight_format format, int64_t K, bool dot)
{
    if (format == KL_W_INT8) return kl_weight_groups(format, K) * (KL_INT8_GROUP / VL);
    if (format == KL_W_INT4) return kl_weight_groups(format, K) * (KL_INT4_GROUP / VL);
    const int64_t step = dot ? 2 * VL : VL;
    return (K + step - 1) / step;
}

/* ---- dot_f32: both operands where they lie --------------------------------------------- */

ALWAYS_INLINE void dot_step(const int R, const float *x, int64_t x_stride,
                            const float *const *w, int64_t k, int n, tile acc)
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
    /* Rows that do not exist repeat the last one; their sums are not stored. */
    const float *rows[TILE_W];
    for (int c = 0; c < TILE_W; c++) rows[c] = w + (c < cols ? c : cols - 1) * w_stride;
    const int64_t whole = K / VL * VL;
    tile acc;
    tile_zero(R, acc);
    for (int64_t k = 0; k < whole; k += VL) dot_step(R, x, x_stride, rows, k, VL, acc);
    if (whole < K) dot_step(R, x, x_stride, rows, whole, (int)(K - whole), acc);
    tile_sum(R, acc, cols, out, out_stride);
}

static void dot_f32(const float *x, int64_t x_stride, int64_t T, const float *w,
                    int64_t w_stride, int64_t O, int64_t K, float *out, int64_t out_stride)
{
    for (int64_t t = 0; t < T; t += TILE_X)
        for (int64_t o = 0; o < O; o += TILE_W) {
            const int cols = O - o < TILE_W ? (int)(O - o) : TILE_W;
            const float *xt = x + t * x_stride, *wo = w + o * w_stride;
            float *to = out + t * out_stride + o;
#define CASE(R)                                                                                \
case R:                                                                                        \
    dot_tile(R, xt, x_stride, wo, w_stride, cols, K, to, out_stride);                          \
    break;
            switch (T - t < TILE_X ? (int)(T - t) : TILE_X) {
                EACH_R(CASE)
            }
#undef CASE
        }
}

/* ---- packing --------------------------------------------------------------------------- */

static inline vf load_as_f32(const void *row, bool bf16, int64_t k, int n)
{
    if (!bf16) return v_load_n((const float *)row + k, n);
    return v_load_bf16_n((const uint16_t *)row + k, n);
}

/* Spread one row over a panel of `rows` rows. */
static void spread_row(const void *row, bool bf16, int64_t K, int64_t steps, int rows,
                       float *to)
{
    for (int64_t s = 0; s < steps; s++) {
        const int64_t left = K - s * VL;
        const vf v = left >= VL  ? bf16 ? v_load_bf16((const uint16_t *)row + s * VL)
                                        : v_load((const float *)row + s * VL)
                      : left <= 0 ? v_zero()
                                 : load_as_f32(row, bf16, s * VL, (int)left);
        v_store(to + s * rows * VL, v);
    }
}

#if defined(KL_VEC_BF16_DOT)
static void spread_row_h(const uint16_t *row, int64_t K, int64_t steps, int rows, uint16_t *to)
{
    for (int64_t s = 0; s < steps; s++) {
        const int64_t k = s * 2 * VL, left = K - k;
        v_store_h(to + k * rows, left >= 2 * VL
                                     ? v_load_h(row + k)
                                     : v_load_h_n(row + k, left < 0 ? 0 : (int)left));
    }
}
#endif

static void pack_x(const kl_rows *x, int64_t first, int n, int64_t K, bool dot, void *panel)
{
    const int64_t cols = kl_panel_cols(K);
    for (int r = 0; r < n; r++) {
        const int64_t i = x->index == NULL ? first + r : x->index[first + r];
        const char *row =
            (const char *)x->data + i * x->stride * (int64_t)kl_dtype_bytes(x->dtype);
#if defined(KL_VEC_BF16_DOT)
        if (dot) {
            spread_row_h((const uint16_t *)row, K, cols / (2 * VL), n,
                         (uint16_t *)panel + r * 2 * VL);
            continue;
        }
#endif
        (void)dot;
        spread_row(row, x->dtype == KL_BF16, K, cols / VL, n, (float *)panel + r * VL);
    }
}

static void spread_int8(const int8_t *q, const uint16_t *scales, int64_t groups, float *to)
{
    for (int64_t g = 0; g < groups; g++) {
        const vf scale = v_set1_bf16(scales + g);
        for (int i = 0; i < KL_INT8_GROUP; i += VL, to += TILE_W * VL)
            v_store(to, v_mul(v_load_i8(q + g * KL_INT8_GROUP + i), scale));
    }
}

static void spread_int4(const uint8_t *q, const uint16_t *scales, int64_t groups, float *to)
{
    for (int64_t g = 0; g < groups; g++) {
        vf w[KL_INT4_GROUP / VL];
        v_load_i4(q + g * (KL_INT4_GROUP / 2), v_set1_bf16(scales + g), w);
        for (int i = 0; i < KL_INT4_GROUP / VL; i++, to += TILE_W * VL) v_store(to, w[i]);
    }
}

static void spread_weight_row(const kl_weight *w, int64_t row, bool dot, float *to)
{
    const int64_t groups = kl_weight_groups(w->format, w->cols);
    const int64_t steps = count_steps(w->format, w->cols, dot);
    const void *data =
        (const char *)w->data + (size_t)row * kl_weight_row_bytes(w->format, w->cols);
    const uint16_t *scales = groups == 0 ? NULL : w->scales + row * groups;
#if defined(KL_VEC_BF16_DOT)
    if (dot) {
        spread_row_h(data, w->cols, steps, TILE_W, (uint16_t *)to);
        return;
    }
#endif
    if (w->format == KL_W_INT8)
        spread_int8(data, scales, groups, to);
    else if (w->format == KL_W_INT4)
        spread_int4(data, scales, groups, to);
    else
        spread_row(data, w->format == KL_W_BF16, w->cols, steps, TILE_W, to);
}

static void pack_w(const kl_weight *w, int64_t first, int64_t n, bool dot, void *panels)
{
    const int64_t steps = count_steps(w->format, w->cols, dot);
    for (int64_t o = 0; o < n; o++) {
        float *panel = (float *)panels + o / TILE_W * steps * TILE_W * VL;
        spread_weight_row(w, first + o, dot, panel + o % TILE_W * VL);
    }
    /* Rows that do not exist: anything finite will do, as long as it was written. */
    for (int64_t o = n; o % TILE_W != 0; o++) {
        float *panel = (float *)panels + o / TILE_W * steps * TILE_W * VL;
        for (int64_t s = 0; s < steps; s++)
            v_store(panel + (s * TILE_W + o % TILE_W) * VL, v_zero());
    }
}

/* ---- packed x times packed w ----------------------------------------------------------- */

ALWAYS_INLINE void packed_steps(const int R, const bool dot, const float *x, const float *w,
                                int64_t steps, tile acc)
{
    for (int64_t s = 0; s < steps; s++, x += R * VL, w += TILE_W * VL) {
#pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++) {
#if defined(KL_VEC_BF16_DOT)
            if (dot) {
                tile_add_dot(R, acc, c, (const uint16_t *)x,
                             v_load_h((const uint16_t *)(w + c * VL)));
                continue;
            }
#endif
            (void)dot;
            tile_add(R, acc, c, x, VL, v_load(w + c * VL));
        }
    }
}

/* One panel of x, a block of steps at a time so that the block stays in the first-level cache
 * while the panels of w pass. */
ALWAYS_INLINE void packed_panel(const int R, const bool dot, const float *x, const float *w,
                                int64_t n, int64_t steps, float *partial, float *out,
                                int64_t out_stride)
{
    const int64_t blocks = (steps + BLOCK_STEPS - 1) / BLOCK_STEPS;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = b * steps / blocks, end = (b + 1) * steps / blocks;
        for (int64_t o = 0; o < n; o += TILE_W) {
            float *lanes = partial + o * TILE_X * VL;
            tile acc;
            if (b == 0)
                tile_zero(R, acc);
            else
                tile_load(R, acc, lanes);
            packed_steps(R, dot, x + begin * R * VL, w + (o * steps + begin * TILE_W) * VL,
                         end - begin, acc);
            if (b < blocks - 1)
                tile_store(R, acc, lanes);
            else
                tile_sum(R, acc, n - o < TILE_W ? (int)(n - o) : TILE_W, out + o, out_stride);
        }
    }
}

static void packed(const void *x, int R, const void *panels, int64_t n, kl_weight_format format,
                   int64_t K, bool dot, float *partial, float *out, int64_t out_stride)
{
    const int64_t steps = count_steps(format, K, dot);
#if defined(KL_VEC_BF16_DOT)
    if (dot) {
#    define CASE(r)                                                                            \
    case r:                                                                                    \
        packed_panel(r, true, x, panels, n, steps, partial, out, out_stride);                  \
        break;
        switch (R) {
            EACH_R(CASE)
        }
#    undef CASE
        return;
    }
#endif
#define CASE(r)                                                                                \
case r:                                                                                        \
    packed_panel(r, false, x, panels, n, steps, partial, out, out_stride);                     \
    break;
    switch (R) {
        EACH_R(CASE)
    }
#undef CASE
}

/* ---- packed x times w where it lies ---------------------------------------------------- */

/* TILE_W rows of w with their scales. */
typedef struct {
    const char *data[TILE_W];
    const uint16_t *scales[TILE_W];
    int64_t K;
    int64_t ahead; /* bytes from a row to the one in the same place of the next tile */
} weight_rows;

/* Ask for the next tile while this one is computed: a row is too short for the hardware to
 * learn its stream and run ahead of it. */
#define FETCH_AHEAD(w, c, byte) __builtin_prefetch((w)->data[c] + (w)->ahead + (byte))

static inline weight_rows find_rows(const kl_weight *w, int64_t first, int cols)
{
    const size_t bytes = kl_weight_row_bytes(w->format, w->cols);
    const int64_t groups = kl_weight_groups(w->format, w->cols);
    weight_rows rows = {.K = w->cols, .ahead = TILE_W * (int64_t)bytes};
    for (int c = 0; c < TILE_W; c++) {
        const int64_t row = first + (c < cols ? c : cols - 1);
        rows.data[c] = (const char *)w->data + (size_t)row * bytes;
        rows.scales[c] = groups == 0 ? NULL : w->scales + row * groups;
    }
    return rows;
}

ALWAYS_INLINE void direct_float(const int R, const bool bf16, const float *x,
                                const weight_rows *w, tile acc)
{
    const int64_t whole = w->K / VL * VL;
    for (int64_t k = 0; k < whole; k += VL) {
#pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++) {
            FETCH_AHEAD(w, c, k * (bf16 ? 2 : 4));
            tile_add(R, acc, c, x + k * R, VL,
                     bf16 ? v_load_bf16((const uint16_t *)w->data[c] + k)
                          : v_load((const float *)w->data[c] + k));
        }
    }
    if (whole < w->K) {
#pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++)
            tile_add(R, acc, c, x + whole * R, VL,
                     load_as_f32(w->data[c], bf16, whole, (int)(w->K - whole)));
    }
}

ALWAYS_INLINE void direct_int8(const int R, const float *x, const weight_rows *w, tile acc)
{
    const int64_t groups = kl_weight_groups(KL_W_INT8, w->K);
    for (int64_t g = 0; g < groups; g++, x += KL_INT8_GROUP * R) {
#pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++) {
            const vf scale = v_set1_bf16(w->scales[c] + g);
            const int8_t *q = (const int8_t *)w->data[c] + g * KL_INT8_GROUP;
            FETCH_AHEAD(w, c, g * KL_INT8_GROUP);
#pragma GCC unroll 4
            for (int i = 0; i < KL_INT8_GROUP; i += VL)
                tile_add(R, acc, c, x + i * R, VL, v_mul(v_load_i8(q + i), scale));
        }
    }
}

ALWAYS_INLINE void direct_int4(const int R, const float *x, const weight_rows *w, tile acc)
{
    const int64_t groups = kl_weight_groups(KL_W_INT4, w->K);
    for (int64_t g = 0; g < groups; g++, x += KL_INT4_GROUP * R) {
#pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++) {
            vf wv[KL_INT4_GROUP / VL];
            FETCH_AHEAD(w, c, g * (KL_INT4_GROUP / 2));
            v_load_i4((const uint8_t *)w->data[c] + g * (KL_INT4_GROUP / 2),
                      v_set1_bf16(w->scales[c] + g), wv);
#pragma GCC unroll 4
            for (int i = 0; i < KL_INT4_GROUP / VL; i++)
                tile_add(R, acc, c, x + i * VL * R, VL, wv[i]);
        }
    }
}

#if defined(KL_VEC_BF16_DOT)
ALWAYS_INLINE void direct_dot(const int R, const uint16_t *x, const weight_rows *w, tile acc)
{
    const int64_t whole = w->K / (2 * VL) * (2 * VL);
    for (int64_t k = 0; k < whole; k += 2 * VL) {
#    pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++) {
            FETCH_AHEAD(w, c, k * 2);
            tile_add_dot(R, acc, c, x + k * R, v_load_h((const uint16_t *)w->data[c] + k));
        }
    }
    if (whole < w->K) {
#    pragma GCC unroll 4
        for (int c = 0; c < TILE_W; c++)
            tile_add_dot(R, acc, c, x + whole * R,
                         v_load_h_n((const uint16_t *)w->data[c] + whole, (int)(w->K - whole)));
    }
}
#endif

ALWAYS_INLINE void direct_tile(const int R, const void *x, const kl_weight *w, int64_t first,
                               int cols, bool dot, float *out, int64_t out_stride)
{
    const weight_rows rows = find_rows(w, first, cols);
    tile acc;
    tile_zero(R, acc);
#if defined(KL_VEC_BF16_DOT)
    if (dot)
        direct_dot(R, x, &rows, acc);
    else
#endif
        if (w->format == KL_W_F32)
        direct_float(R, false, x, &rows, acc);
    else if (w->format == KL_W_BF16)
        direct_float(R, true, x, &rows, acc);
    else if (w->format == KL_W_INT8)
        direct_int8(R, x, &rows, acc);
    else
        direct_int4(R, x, &rows, acc);
    (void)dot;
    tile_sum(R, acc, cols, out, out_stride);
}

static void direct(const void *x, int64_t T, const kl_weight *w, int64_t first, int64_t n,
                   bool dot, float *out, int64_t out_stride)
{
    const int64_t row_bytes = kl_panel_cols(w->cols) * (dot ? 2 : 4);
    for (int64_t o = 0; o < n; o += TILE_W) {
        const int cols = n - o < TILE_W ? (int)(n - o) : TILE_W;
        for (int64_t t = 0; t < T; t += TILE_X) {
            const void *panel = (const char *)x + t * row_bytes;
            float *to = out + t * out_stride + o;
#define CASE(R)                                                                                \
case R:                                                                                        \
    direct_tile(R, panel, w, first + o, cols, dot, to, out_stride);                            \
    break;
            switch (T - t < TILE_X ? (int)(T - t) : TILE_X) {
                EACH_R(CASE)
            }
#undef CASE
        }
    }
}

#if defined(KL_VEC_BF16_DOT)
#    define HAS_BF16_DOT true
#else
#    define HAS_BF16_DOT false
#endif

#define KL_PRODUCT_KERNELS                                                                     \
    {                                                                                          \
        .tile_x = TILE_X, .bf16_dot = HAS_BF16_DOT, .dot_f32 = dot_f32, .pack_x = pack_x,      \
        .pack_w = pack_w, .direct = direct, .packed = packed, .finish = finish,                \
        .combine = combine, .row_max = row_max, .row_sum_exp = row_sum_exp,                    \
        .quantize = quantize,                                                                  \
    }

#endif
