/*
 * ops_product.c -- linear and token_logprobs: products with a weight matrix.
 */
#include "python/call.h"

#include <string.h>

static PyObject *run_linear(kl_call *c, PyObject *const *args)
{
    kl_linear a = {0};
    int64_t shape[KL_ARRAY_NDIM];
    int ndim, y;
    kl_tensor view;
    if (KL_NEEDS(c, linear) < 0 || kl_arg_rows(c, "x", args[1], &a.x, shape, &ndim) < 0 ||
        kl_arg_weight(c, "w", args[2], 2, &a.w) < 0)
        return NULL;
    shape[ndim - 1] = a.w.rows;
    if (kl_out_or_f32(c, "out", args[3], a.x.dtype, ndim, shape, &view, &y) < 0) return NULL;
    a.out = kl_tensor_2d(view.data, view.dtype, a.x.shape[0], a.w.rows);
    return kl_call_linear(c, &a) < 0 ? NULL : kl_out_take(c, y);
}

PyObject *kl_py_linear(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "linear", args, nargs, 5, true, run_linear);
}

/* Outputs in the order of the tuple: logprobs, greedy, top_ids, top_logprobs. */
static PyObject *run_token_logprobs(kl_call *c, PyObject *const *args)
{
    kl_token_logprobs a = {0};
    int64_t top;
    int index;
    if (KL_NEEDS(c, token_logprobs) < 0 ||
        kl_arg(c, "hidden", args[1], KL_FLOATS, 2, KL_DENSE, &a.hidden) < 0 ||
        kl_arg_weight(c, "lm_head", args[2], 2, &a.lm_head) < 0 ||
        kl_arg_ids(c, "targets", args[3], 1, -1, a.lm_head.rows - 1, &a.targets) < 0 ||
        kl_parse_int(c->op, "top", args[4], 0, 256, &top) < 0)
        return NULL;
    const int64_t shape[2] = {a.hidden.shape[0], top};
    if (kl_out(c, "logprobs", Py_None, KL_F32, 1, shape, NULL, &a.logprobs, &index) < 0 ||
        kl_out_bool(c, 1, shape, &a.greedy, &index) < 0)
        return NULL;
    if (kl_out_top(c, shape, &a.top_ids, &a.top_logprobs) < 0) return NULL;
    return kl_call_token_logprobs(c, &a) < 0 ? NULL : kl_out_take_all(c);
}

PyObject *kl_py_token_logprobs(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "token_logprobs", args, nargs, 6, true, run_token_logprobs);
}
