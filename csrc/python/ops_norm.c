/*
 * ops_norm.c -- rms_norm and gated_rms_norm over the last axis of arrays of any rank.
 */
#include "python/call.h"

static PyObject *run_rms_norm(kl_call *c, PyObject *const *args)
{
    kl_rms_norm a = {0};
    kl_tensor view, sum, residual = {0};
    int64_t shape[KL_ARRAY_NDIM], other[KL_ARRAY_NDIM];
    int ndim, ndim_residual, y, r;
    if (KL_NEEDS(c, rms_norm) < 0 || kl_arg_rows(c, "x", args[1], &a.x, shape, &ndim) < 0 ||
        kl_arg(c, "weight", args[2], KL_SET(KL_F32), 1, KL_DENSE, &a.weight) < 0 ||
        kl_parse_float(c->op, "eps", args[3], &a.eps) < 0)
        return NULL;
    if (kl_out(c, "out", args[5], a.x.dtype, ndim, shape, "x", &view, &y) < 0) return NULL;
    a.out = kl_tensor_2d(view.data, view.dtype, a.x.shape[0], a.x.shape[1]);

    if (args[4] == Py_None) return kl_call_rms_norm(c, &a) < 0 ? NULL : kl_out_take(c, y);
    /* The operation adds in place; the caller gets the sum as a new array. */
    if (kl_arg_rows(c, "residual", args[4], &residual, other, &ndim_residual) < 0) return NULL;
    if (residual.shape[0] != a.x.shape[0] || residual.shape[1] != a.x.shape[1]) {
        PyErr_Format(PyExc_ValueError, "%s: residual must have the shape of x", c->op);
        return NULL;
    }
    if (kl_out(c, "residual", Py_None, residual.dtype, ndim, shape, NULL, &sum, &r) < 0 ||
        kl_call_fill(c, &sum, &residual) < 0)
        return NULL;
    a.residual = kl_tensor_2d(sum.data, sum.dtype, a.x.shape[0], a.x.shape[1]);
    return kl_call_rms_norm(c, &a) < 0 ? NULL : kl_out_take_all(c);
}

PyObject *kl_py_rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "rms_norm", args, nargs, 7, true, run_rms_norm);
}

/* [rows, D] as [rows, 1, D]: heads share the weight, so one head of more rows is the same. */
static kl_tensor one_head(const kl_tensor *t)
{
    kl_tensor u = kl_tensor_3d(t->data, t->dtype, t->shape[0], 1, t->shape[1]);
    u.stride[0] = t->stride[0];
    return u;
}

/* Whether an array is [T, H, D] with whole tokens that may lie apart, as the slice of a projection
 * does: the operation takes those as they are. */
static int is_of_tokens(kl_call *c, const char *name, PyObject *o)
{
    kl_array probe;
    const intptr_t stream = c->stream == NULL ? 1 : (intptr_t)c->stream;
    if (kl_array_borrow(c->m, c->op, name, o, stream, &probe) < 0) return -1;
    const int is = probe.ndim == 3 && probe.stride[0] > 0 && kl_array_dense_from(&probe, 1);
    kl_array_release(&probe);
    return is;
}

static int take_tokens(kl_call *c, PyObject *const *args, kl_gated_rms_norm *a)
{
    if (kl_arg(c, "x", args[1], KL_FLOATS, 3, KL_ROWS, &a->x) < 0) return -1;
    return kl_arg(c, "z", args[2], KL_FLOATS, 3, KL_ROWS, &a->z);
}

static int take_rows(kl_call *c, PyObject *const *args, int64_t *shape, int *ndim,
                     kl_gated_rms_norm *a)
{
    kl_tensor x, z;
    int64_t other[KL_ARRAY_NDIM];
    int ndim_z;
    if (kl_arg_rows(c, "x", args[1], &x, shape, ndim) < 0 ||
        kl_arg_rows(c, "z", args[2], &z, other, &ndim_z) < 0)
        return -1;
    a->x = one_head(&x);
    a->z = one_head(&z);
    return 0;
}

static PyObject *run_gated_rms_norm(kl_call *c, PyObject *const *args)
{
    kl_gated_rms_norm a = {0};
    kl_tensor view;
    int64_t shape[KL_ARRAY_NDIM];
    int ndim = 3, y;
    if (KL_NEEDS(c, gated_rms_norm) < 0) return NULL;
    const int x = is_of_tokens(c, "x", args[1]);
    const int z = x < 0 ? -1 : is_of_tokens(c, "z", args[2]);
    const bool tokens = x == 1 && z == 1;
    if (z < 0 ||
        (tokens ? take_tokens(c, args, &a) : take_rows(c, args, shape, &ndim, &a)) < 0 ||
        kl_arg(c, "weight", args[3], KL_SET(KL_F32), 1, KL_DENSE, &a.weight) < 0 ||
        kl_parse_float(c->op, "eps", args[4], &a.eps) < 0 ||
        kl_out(c, "out", args[5], a.x.dtype, ndim, tokens ? a.x.shape : shape, "x", &view, &y) <
            0)
        return NULL;
    a.out = kl_tensor_3d(view.data, view.dtype, a.x.shape[0], a.x.shape[1], a.x.shape[2]);
    return kl_call_gated_rms_norm(c, &a) < 0 ? NULL : kl_out_take(c, y);
}

PyObject *kl_py_gated_rms_norm(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "gated_rms_norm", args, nargs, 7, true, run_gated_rms_norm);
}
