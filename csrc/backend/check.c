/*
 * check.c -- see check.h.
 */
#include "backend/check.h"

#include "base/memory.h"

#include <math.h>
#include <stdio.h>

/* ---- one tensor ------------------------------------------------------------------------ */

static kl_status check_dtype(const char *op, const kl_rule *r, kl_error *err)
{
    char wanted[64] = "";
    int used = 0;
    if ((unsigned)r->t->dtype < KL_N_DTYPES && (r->dtypes & KL_DTYPE_BIT(r->t->dtype)) != 0)
        return KL_OK;
    for (kl_dtype d = 0; d < KL_N_DTYPES; d++)
        if ((r->dtypes & KL_DTYPE_BIT(d)) != 0)
            used += snprintf(wanted + used, sizeof wanted - (size_t)used, "%s%s",
                             used == 0 ? "" : " or ", kl_dtype_name(d));
    return kl_fail(err, KL_ERR_TYPE, "%s: %s must be %s, got %s", op, r->name, wanted,
                   (unsigned)r->t->dtype < KL_N_DTYPES ? kl_dtype_name(r->t->dtype) : "?");
}

static kl_status check_shape(const char *op, const kl_rule *r, kl_error *err)
{
    const kl_tensor *t = r->t;
    if (t->ndim != r->ndim)
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must have %d axes, got %d", op, r->name,
                       r->ndim, t->ndim);
    for (int i = 0; i < r->ndim; i++) {
        if (t->shape[i] != r->shape[i])
            return kl_fail(err, KL_ERR_VALUE, "%s: %s.shape[%d] must be %lld, got %lld", op,
                           r->name, i, (long long)r->shape[i], (long long)t->shape[i]);
        const int64_t least = i == 0 || (r->flags & KL_EMPTY) != 0 ? 0 : 1;
        if (t->shape[i] < least)
            return kl_fail(err, KL_ERR_VALUE, "%s: %s.shape[%d] must be >= %lld, got %lld", op,
                           r->name, i, (long long)least, (long long)t->shape[i]);
    }
    return KL_OK;
}

/* Strides of an axis of length 1, or of an empty tensor, are never used, so frameworks leave
 * anything there. */
static kl_status check_strides(const char *op, const kl_rule *r, int64_t *row, kl_error *err)
{
    const kl_tensor *t = r->t;
    const bool rows = (r->flags & KL_ROWS) != 0;
    int64_t dense = 1;
    bool empty = false;
    for (int i = 0; i < t->ndim; i++) empty = empty || t->shape[i] == 0;
    for (int i = t->ndim - 1; i >= 0; i--) {
        *row = dense; /* elements of one index of the first axis, when the loop ends */
        const bool free_axis = empty || t->shape[i] == 1 || (rows && i == 0);
        if (!free_axis && t->stride[i] != dense)
            return kl_fail(err, KL_ERR_VALUE,
                           "%s: %s must be dense%s: stride[%d] must be %lld, got %lld", op,
                           r->name, rows ? " past its first axis" : "", i, (long long)dense,
                           (long long)t->stride[i]);
        if (__builtin_mul_overflow(dense, t->shape[i], &dense) || dense > INT64_MAX / 8)
            return kl_fail(err, KL_ERR_VALUE, "%s: %s must have fewer than 2^60 elements", op,
                           r->name);
    }
    return KL_OK;
}

static kl_status check_data(const char *op, const kl_rule *r, int64_t row, kl_error *err)
{
    const kl_tensor *t = r->t;
    if (kl_tensor_size(t) == 0) return KL_OK;
    if (t->data == NULL)
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must have data, got NULL", op, r->name);
    if ((uintptr_t)t->data % kl_dtype_bytes(t->dtype) != 0)
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must be aligned to its %zu-byte elements", op,
                       r->name, kl_dtype_bytes(t->dtype));
    const bool writes_rows = (r->flags & KL_OUT) != 0 && t->ndim > 0 && t->shape[0] > 1;
    if (writes_rows && t->stride[0] < row && t->stride[0] > -row)
        return kl_fail(err, KL_ERR_VALUE,
                       "%s: rows of %s must not overlap: stride[0] must be >= %lld, got %lld",
                       op, r->name, (long long)row, (long long)t->stride[0]);
    return KL_OK;
}

static kl_status check_tensor(const char *op, const kl_rule *r, kl_error *err)
{
    int64_t row = 1;
    if (kl_tensor_absent(r->t)) {
        if ((r->flags & KL_OPT) != 0) return KL_OK;
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must be given", op, r->name);
    }
    KL_TRY(check_dtype(op, r, err));
    KL_TRY(check_shape(op, r, err));
    KL_TRY(check_strides(op, r, &row, err));
    return check_data(op, r, row, err);
}

/* ---- overlaps -------------------------------------------------------------------------- */

/* A checked tensor as `rows` pieces of `row` bytes, `stride` bytes apart, from `first` on. */
typedef struct {
    uintptr_t first, end;
    uintptr_t row, stride;
} extent;

static extent extent_of(const kl_tensor *t)
{
    const uintptr_t bytes = kl_dtype_bytes(t->dtype), size = (uintptr_t)kl_tensor_size(t);
    extent e = {.first = (uintptr_t)t->data};
    if (size == 0 || kl_tensor_absent(t)) return e;
    const uintptr_t rows = t->ndim == 0 ? 1 : (uintptr_t)t->shape[0];
    const int64_t stride = rows == 1 ? 0 : t->stride[0];
    e.row = size / rows * bytes;
    e.stride = (stride < 0 ? 0 - (uintptr_t)stride : (uintptr_t)stride) * bytes;
    if (stride < 0) e.first -= (rows - 1) * e.stride;
    e.end = e.first + (rows - 1) * e.stride + e.row;
    return e;
}

/* Column slices of one buffer interleave without touching: they have the same stride, and the
 * distance of their rows tells. Otherwise, whoever shares the range overlaps. */
static bool overlap(const kl_tensor *a, const kl_tensor *b)
{
    const extent x = extent_of(a), y = extent_of(b);
    if (x.row == 0 || y.row == 0 || x.first >= y.end || y.first >= x.end) return false;
    if (x.stride != y.stride || x.stride == 0) return true;
    const uintptr_t apart = x.first <= y.first
                                ? (y.first - x.first) % x.stride
                                : (x.stride - (x.first - y.first) % x.stride) % x.stride;
    return apart < x.row || apart + y.row > x.stride;
}

static bool same_place(const kl_tensor *a, const kl_tensor *b)
{
    return a->data == b->data && a->dtype == b->dtype &&
           (a->shape[0] <= 1 || a->stride[0] == b->stride[0]);
}

static kl_status check_overlaps(const char *op, const kl_rule *out, const kl_rule *rules,
                                size_t n, kl_error *err)
{
    for (size_t i = 0; i < n; i++) {
        const kl_tensor *t = rules[i].t;
        const bool twice = (rules[i].flags & KL_OUT) != 0 && &rules[i] < out;
        if (&rules[i] == out || twice || !overlap(out->t, t)) continue;
        if (t == out->may_be && same_place(out->t, t)) continue;
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must not overlap %s", op, out->name,
                       rules[i].name);
    }
    return KL_OK;
}

kl_status kl_require_tensors(const char *op, const kl_rule *rules, size_t n, kl_error *err)
{
    for (size_t i = 0; i < n; i++) KL_TRY(check_tensor(op, &rules[i], err));
    for (size_t i = 0; i < n; i++)
        if ((rules[i].flags & KL_OUT) != 0)
            KL_TRY(check_overlaps(op, &rules[i], rules, n, err));
    return KL_OK;
}

/* ---- weights --------------------------------------------------------------------------- */

static kl_status check_weight_size(const char *op, const char *name, const kl_weight *w,
                                   kl_error *err)
{
    size_t rows;
    const bool fits =
        w->cols <= INT64_MAX / 8 && kl_mul_size((size_t)w->count, (size_t)w->rows, &rows) &&
        kl_mul_size(rows, kl_weight_row_bytes(w->format, w->cols), &rows) && rows <= INT64_MAX;
    if (fits) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "%s: %s must have fewer than 2^63 bytes", op, name);
}

kl_status kl_require_weight(const char *op, const char *name, const kl_weight *w, int64_t count,
                            int64_t rows, int64_t cols, unsigned formats, kl_error *err)
{
    if ((unsigned)w->format >= KL_N_WEIGHT_FORMATS || (formats & KL_FORMAT_BIT(w->format)) == 0)
        return kl_fail(err, KL_ERR_TYPE, "%s: %s must be float32 or bfloat16%s, got %s", op,
                       name, formats == KL_FLOAT_FORMATS ? "" : ", int8, int4 or fp8",
                       kl_weight_format_name(w->format));
    if (w->count != count || w->rows != rows || w->cols != cols || count < 1 || rows < 1 ||
        cols < 1)
        return kl_fail(err, KL_ERR_VALUE,
                       "%s: %s must be %lld x [%lld, %lld], each at least 1, got "
                       "%lld x [%lld, %lld]",
                       op, name, (long long)count, (long long)rows, (long long)cols,
                       (long long)w->count, (long long)w->rows, (long long)w->cols);
    KL_TRY(check_weight_size(op, name, w, err));
    if (w->data == NULL)
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must have data, got NULL", op, name);
    if (kl_weight_groups(w->format, w->cols) != 0 && w->scales == NULL)
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must have scales as it is %s, got NULL", op,
                       name, kl_weight_format_name(w->format));
    return KL_OK;
}

/* ---- numbers --------------------------------------------------------------------------- */

kl_status kl_require_range(const char *op, const char *name, int64_t value, int64_t low,
                           int64_t high, kl_error *err)
{
    if (value >= low && value <= high) return KL_OK;
    if (high == INT64_MAX)
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must be >= %lld, got %lld", op, name,
                       (long long)low, (long long)value);
    return kl_fail(err, KL_ERR_VALUE, "%s: %s must be in %lld .. %lld, got %lld", op, name,
                   (long long)low, (long long)high, (long long)value);
}

kl_status kl_require_aligned(const char *op, const char *name, const void *data, size_t bytes,
                             kl_error *err)
{
    const size_t past = (uintptr_t)data % bytes;
    if (past == 0) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "%s: %s must be aligned to %zu bytes, got %zu past it",
                   op, name, bytes, past);
}

kl_status kl_require_arriving(const char *op, const char *name, const kl_tensor *t,
                              kl_error *err)
{
    if (t->dtype == KL_BF16 && t->shape[0] == 1) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE,
                   "%s: an arriving %s must be bfloat16 of one token, got %s of %lld", op, name,
                   kl_dtype_name(t->dtype), (long long)t->shape[0]);
}

kl_status kl_require_finite(const char *op, const char *name, double value, kl_error *err)
{
    if (isfinite(value)) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "%s: %s must be finite, got %g", op, name, value);
}

kl_status kl_require_positive(const char *op, const char *name, double value, kl_error *err)
{
    if (isfinite(value) && value > 0) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "%s: %s must be finite and > 0, got %g", op, name, value);
}
