/*
 * weight.h -- a matrix of the model in the format it is stored in.
 *
 * Row r of the logical matrix [rows, cols] (out, in) is read by dequantising `row_bytes`
 * bytes at data + r * row_bytes with that row's scales. A stack of `count` matrices (the
 * experts of a layer) lies one behind the other.
 *
 *   KL_W_F32, KL_W_BF16   cols values a row, no scales
 *   KL_W_INT8             groups of 64 columns: w = q * scale, q in [-127, 127]
 *   KL_W_INT4             groups of 32 columns in 16 bytes: byte i holds column i in its low
 *                         nibble and column i + 16 in its high one, each as q + 8, q in [-7, 7]
 *   KL_W_FP8              groups of 64 columns: w = q * scale, q an e4m3 number of one byte (no
 *                         infinities, at most 448 either way); a format of CUDA only
 *
 * Scales are bf16, one a row and group, [count, rows, groups]. The last group is padded with
 * q = 0. q has at most 7 bits and a scale 8, so q * scale is exact in float32 unless it is
 * subnormal: every kernel sees the same dequantised matrix. CUDA reads them by aligned words of
 * two: those at both ends of the array must lie in memory as a whole, as all allocations' do; the
 * half that is not the array's may hold anything.
 */
#ifndef KL_BASE_WEIGHT_H
#define KL_BASE_WEIGHT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    KL_W_F32,
    KL_W_BF16,
    KL_W_INT8,
    KL_W_INT4,
    KL_W_FP8,
    KL_N_WEIGHT_FORMATS
} kl_weight_format;

#define KL_INT8_GROUP 64
#define KL_INT4_GROUP 32
#define KL_FP8_GROUP  64
#define KL_FP8_MAX    448.0f

typedef struct {
    kl_weight_format format;
    int64_t count, rows, cols;
    void *data;
    uint16_t *scales; /* bf16, or NULL */

    /* A call enqueued before may still be writing it, as it may an array of the caller's. Others
     * never change: a kernel reads them before those ahead of it have ended. */
    bool unsettled;
} kl_weight;

static inline const char *kl_weight_format_name(kl_weight_format format)
{
    static const char *const names[] = {"float32", "bfloat16", "int8", "int4", "fp8"};
    return (unsigned)format < KL_N_WEIGHT_FORMATS ? names[format] : "?";
}

/* Columns that share a scale; 0 without scales. */
static inline int64_t kl_weight_group(kl_weight_format format)
{
    switch (format) {
    case KL_W_INT8:
        return KL_INT8_GROUP;
    case KL_W_INT4:
        return KL_INT4_GROUP;
    case KL_W_FP8:
        return KL_FP8_GROUP;
    default:
        return 0;
    }
}

static inline int64_t kl_weight_groups(kl_weight_format format, int64_t cols)
{
    const int64_t group = kl_weight_group(format);
    return group == 0 ? 0 : (cols + group - 1) / group;
}

static inline size_t kl_weight_row_bytes(kl_weight_format format, int64_t cols)
{
    switch (format) {
    case KL_W_F32:
        return (size_t)cols * 4;
    case KL_W_BF16:
        return (size_t)cols * 2;
    case KL_W_INT8:
        return (size_t)kl_weight_groups(format, cols) * KL_INT8_GROUP;
    case KL_W_INT4:
        return (size_t)kl_weight_groups(format, cols) * KL_INT4_GROUP / 2;
    case KL_W_FP8:
        return (size_t)kl_weight_groups(format, cols) * KL_FP8_GROUP;
    case KL_N_WEIGHT_FORMATS:
        break;
    }
    return 0;
}

/* Bytes of data and of scales; callers bound rows and cols so that neither overflows. */
static inline size_t kl_weight_data_bytes(const kl_weight *w)
{
    return (size_t)w->count * (size_t)w->rows * kl_weight_row_bytes(w->format, w->cols);
}

static inline size_t kl_weight_scale_bytes(const kl_weight *w)
{
    return (size_t)w->count * (size_t)w->rows * (size_t)kl_weight_groups(w->format, w->cols) *
           sizeof(uint16_t);
}

/* Rows [first, first + rows) of matrix `index` of a stack, as a weight of its own. */
static inline kl_weight kl_weight_slice(const kl_weight *w, int64_t index, int64_t first,
                                        int64_t rows)
{
    const size_t row = (size_t)(index * w->rows + first);
    kl_weight s = *w;
    s.count = 1;
    s.rows = rows;
    s.data = (char *)w->data + row * kl_weight_row_bytes(w->format, w->cols);
    if (w->scales != NULL)
        s.scales = w->scales + row * (size_t)kl_weight_groups(w->format, w->cols);
    return s;
}

#endif
