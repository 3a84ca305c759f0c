/*
 * tensor.h -- views of memory that somebody else owns.
 *
 * A kl_tensor is passed by value and never freed. Strides count elements. The last axis is
 * contiguous unless an operation says otherwise; what an operation needs beyond that, its
 * check in backend/ops_check.c enforces.
 */
#ifndef KL_BASE_TENSOR_H
#define KL_BASE_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define KL_MAX_NDIM 5

typedef enum { KL_F32, KL_BF16, KL_I32, KL_U8, KL_N_DTYPES } kl_dtype;

typedef struct {
    void *data;
    kl_dtype dtype;
    int ndim;
    int64_t shape[KL_MAX_NDIM];
    int64_t stride[KL_MAX_NDIM];
} kl_tensor;

static inline size_t kl_dtype_bytes(kl_dtype dtype)
{
    switch (dtype) {
    case KL_F32:
    case KL_I32: return 4;
    case KL_BF16: return 2;
    case KL_U8: return 1;
    case KL_N_DTYPES: break;
    }
    return 0;
}

static inline const char *kl_dtype_name(kl_dtype dtype)
{
    static const char *const names[] = {"float32", "bfloat16", "int32", "uint8"};
    return dtype < KL_N_DTYPES ? names[dtype] : "?";
}

/* Dense row-major views, the common case: kl_tensor_2d(p, KL_F32, T, D). */
static inline kl_tensor kl_tensor_dense(void *data, kl_dtype dtype, int ndim,
                                        const int64_t *shape)
{
    kl_tensor t = {.data = data, .dtype = dtype, .ndim = ndim};
    int64_t dense = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        t.shape[i] = shape[i];
        t.stride[i] = dense;
        dense *= shape[i];
    }
    return t;
}

static inline kl_tensor kl_tensor_1d(void *data, kl_dtype dtype, int64_t a)
{
    const int64_t shape[] = {a};
    return kl_tensor_dense(data, dtype, 1, shape);
}

static inline kl_tensor kl_tensor_2d(void *data, kl_dtype dtype, int64_t a, int64_t b)
{
    const int64_t shape[] = {a, b};
    return kl_tensor_dense(data, dtype, 2, shape);
}

static inline kl_tensor kl_tensor_3d(void *data, kl_dtype dtype, int64_t a, int64_t b,
                                     int64_t c)
{
    const int64_t shape[] = {a, b, c};
    return kl_tensor_dense(data, dtype, 3, shape);
}

static inline kl_tensor kl_tensor_4d(void *data, kl_dtype dtype, int64_t a, int64_t b,
                                     int64_t c, int64_t d)
{
    const int64_t shape[] = {a, b, c, d};
    return kl_tensor_dense(data, dtype, 4, shape);
}

/* An optional argument that was not given. */
static inline bool kl_tensor_absent(const kl_tensor *t)
{
    return t->data == NULL && t->ndim == 0;
}

static inline int64_t kl_tensor_size(const kl_tensor *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

/* Columns [first, first + cols) of a [T, n] buffer. */
static inline kl_tensor kl_columns(const kl_tensor *t, int64_t first, int64_t cols)
{
    kl_tensor v = *t;
    v.data =
        t->data == NULL ? NULL : (char *)t->data + (size_t)first * kl_dtype_bytes(t->dtype);
    v.shape[1] = cols;
    return v;
}

/* Rows [first, first + rows) of a tensor, which may be absent. */
static inline kl_tensor kl_row_slice(const kl_tensor *t, int64_t first, int64_t rows)
{
    kl_tensor v = *t;
    const int64_t at = first * t->stride[0] * (int64_t)kl_dtype_bytes(t->dtype);
    v.data = t->data == NULL ? NULL : (char *)t->data + at;
    v.shape[0] = rows;
    return v;
}

/* A [T, H * K] view, rows strided, as [T, H, K]. */
static inline kl_tensor kl_heads(kl_tensor t, int64_t H, int64_t K)
{
    t.ndim = 3;
    t.shape[1] = H;
    t.shape[2] = K;
    t.stride[1] = K;
    t.stride[2] = 1;
    return t;
}

#endif
