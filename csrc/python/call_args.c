/*
 * call_args.c -- arguments that are more than an array: weights, id arrays, scales.
 */
#include "python/call.h"

#include "base/memory.h"

#include <math.h>

/* ---- weights --------------------------------------------------------------------------- */

/* The weight of a PackedWeight, with an exception where it is on another device; NULL without
 * one for another object. */
static const kl_weight *packed_weight(const kl_call *c, const char *name, PyObject *o)
{
    const kl_device *dev = NULL;
    const kl_weight *w = kl_weight_of(c->m, o, &dev);
    if (w == NULL || (dev->is_cpu == c->dev->is_cpu && dev->index == c->dev->index)) return w;
    PyErr_Format(PyExc_ValueError, "%s: %s must be on %s:%d, got a PackedWeight on %s:%d",
                 c->op, name, c->dev->be->vt->name, c->dev->index, dev->be->vt->name,
                 dev->index);
    return NULL;
}

int kl_arg_weight(kl_call *c, const char *name, PyObject *o, int ndim, kl_weight *out)
{
    const kl_weight *packed = packed_weight(c, name, o);
    kl_tensor t = {0};
    if (packed == NULL && PyErr_Occurred()) return -1;
    if (packed != NULL) {
        if (ndim == 2 && packed->count != 1) {
            PyErr_Format(PyExc_ValueError, "%s: %s must be one matrix, got a stack of %lld",
                         c->op, name, (long long)packed->count);
            return -1;
        }
        *out = *packed; /* alive as long as the arguments of the call are */
        return 0;
    }
    if (kl_arg(c, name, o, KL_FLOATS, ndim, KL_DENSE, &t) < 0) return -1;
    *out = (kl_weight){
        .format = t.dtype == KL_F32 ? KL_W_F32 : KL_W_BF16,
        .count = ndim == 3 ? t.shape[0] : 1,
        .rows = t.shape[ndim - 2],
        .cols = t.shape[ndim - 1],
        .data = t.data,
        .unsettled = true,
    };
    return 0;
}

int kl_arg_weight_3d(kl_call *c, const char *name, PyObject *o, kl_tensor *out)
{
    const kl_weight *packed = packed_weight(c, name, o);
    if (packed == NULL && PyErr_Occurred()) return -1;
    if (packed == NULL) return kl_arg(c, name, o, KL_FLOATS, 3, KL_DENSE, out);
    if (packed->format != KL_W_F32 && packed->format != KL_W_BF16) {
        PyErr_Format(PyExc_TypeError, "%s: %s must be float32 or bfloat16, got a quantised one",
                     c->op, name);
        return -1;
    }
    *out = kl_tensor_3d(packed->data, packed->format == KL_W_F32 ? KL_F32 : KL_BF16,
                        packed->count, packed->rows, packed->cols);
    return 0;
}

/* ---- ids ------------------------------------------------------------------------------- */

/* Validated and copied, on the host. */
static int host_ids(kl_call *c, const char *name, PyObject *o, int ndim, int64_t lo, int64_t hi,
                    kl_tensor *out)
{
    int32_t *ids = NULL;
    int64_t shape[KL_ARRAY_NDIM];
    if (kl_ids_copy(c->m, c->op, name, o, ndim, lo, hi, &ids, shape) < 0 ||
        kl_call_keep(c, ids) < 0)
        return -1;
    *out = kl_tensor_dense(ids, KL_I32, ndim, shape);
    return 0;
}

int kl_arg_ids(kl_call *c, const char *name, PyObject *o, int ndim, int64_t lo, int64_t hi,
               kl_tensor *out)
{
    const int on_gpu = kl_call_on_gpu(c, o);
    if (on_gpu < 0) return -1;
    if (on_gpu) return kl_arg(c, name, o, KL_SET(KL_I32), ndim, KL_DENSE, out);
    if (host_ids(c, name, o, ndim, lo, hi, out) < 0) return -1;
    return kl_call_send(c, &out->data, (size_t)kl_tensor_size(out) * sizeof(int32_t));
}

/* Without boundaries all T tokens are one sequence. On the host. */
static int one_sequence(kl_call *c, int64_t T, kl_tensor *out)
{
    int32_t *cu = kl_call_malloc(c, 2 * sizeof *cu);
    if (cu == NULL) return -1;
    cu[0] = 0;
    cu[1] = (int32_t)T;
    *out = kl_tensor_1d(cu, KL_I32, 2);
    return 0;
}

static int host_cu_seqlens(kl_call *c, PyObject *o, int64_t T, kl_tensor *out)
{
    if (o == Py_None) return one_sequence(c, T, out);
    if (host_ids(c, "cu_seqlens", o, 1, 0, T, out) < 0) return -1;
    const int32_t *cu = out->data;
    const int64_t N = out->shape[0] - 1;
    if (N < 0 || cu[0] != 0 || cu[N] != T) {
        PyErr_Format(PyExc_ValueError,
                     "%s: cu_seqlens must start at 0 and end at T = %lld, got %d .. %d", c->op,
                     (long long)T, N < 0 ? -1 : cu[0], N < 0 ? -1 : cu[N]);
        return -1;
    }
    for (int64_t n = 0; n < N; n++)
        if (cu[n + 1] < cu[n]) {
            PyErr_Format(PyExc_ValueError, "%s: cu_seqlens must not fall, got %d after %d",
                         c->op, cu[n + 1], cu[n]);
            return -1;
        }
    return 0;
}

int kl_arg_cu_seqlens(kl_call *c, PyObject *o, int64_t T, kl_tensor *out, const int32_t **host)
{
    if (host != NULL) *host = NULL;
    const int on_gpu = o == Py_None ? 0 : kl_call_on_gpu(c, o);
    if (on_gpu < 0) return -1;
    if (T > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: at most %d tokens, got %lld", c->op, INT32_MAX,
                     (long long)T);
        return -1;
    }
    if (on_gpu) {
        if (kl_arg(c, "cu_seqlens", o, KL_SET(KL_I32), 1, KL_DENSE, out) < 0) return -1;
        if (out->shape[0] > 0) return 0;
        PyErr_Format(PyExc_ValueError, "%s: cu_seqlens must have at least one entry", c->op);
        return -1;
    }
    if (host_cu_seqlens(c, o, T, out) < 0) return -1;
    if (host != NULL) *host = out->data;
    return kl_call_send(c, &out->data, (size_t)out->shape[0] * sizeof(int32_t));
}

static int check_distinct(kl_call *c, const int32_t *slots, int64_t N, int64_t S)
{
    unsigned char *seen = kl_calloc((size_t)S + 1, 1);
    int64_t twice = -1;
    if (seen == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int64_t n = 0; n < N && twice < 0; n++)
        if (seen[slots[n]]++ != 0) twice = slots[n];
    kl_free(seen);
    if (twice < 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s: slots must be distinct, got %lld twice", c->op,
                 (long long)twice);
    return -1;
}

int kl_arg_slots(kl_call *c, PyObject *o, int64_t N, int64_t S, kl_tensor *out)
{
    if (o == Py_None) return 0;
    const int on_gpu = kl_call_on_gpu(c, o);
    if (on_gpu != 0)
        return on_gpu < 0 ? -1 : kl_arg(c, "slots", o, KL_SET(KL_I32), 1, KL_DENSE, out);
    if (host_ids(c, "slots", o, 1, 0, S - 1, out) < 0) return -1;
    if (out->shape[0] != N) {
        PyErr_Format(PyExc_ValueError, "%s: slots must have shape (%lld,), got (%lld,)", c->op,
                     (long long)N, (long long)out->shape[0]);
        return -1;
    }
    if (check_distinct(c, out->data, N, S) < 0) return -1;
    return kl_call_send(c, &out->data, (size_t)N * sizeof(int32_t));
}

int kl_arg_scale(kl_call *c, PyObject *o, int64_t size, float *out)
{
    if (o != Py_None) return kl_parse_float(c->op, "scale", o, out);
    *out = size > 0 ? (float)(1.0 / sqrt((double)size)) : 1.0f;
    return 0;
}
