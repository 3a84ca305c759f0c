/*
 * ops_sample.c -- sample: draw tokens from rows of logits.
 */
#include "python/call.h"

/* (temperature, top_k, top_p, min_p, repetition_penalty, seed, position). */
static int take_row(const kl_call *c, PyObject *row, kl_sampling *out)
{
    int64_t top_k, position;
    PyObject *seed;
    if (!PyTuple_Check(row) || PyTuple_Size(row) != 7) {
        PyErr_Format(PyExc_TypeError, "%s: params must be tuples of 7 numbers, got %R", c->op,
                     row);
        return -1;
    }
    if (kl_parse_float(c->op, "temperature", PyTuple_GetItem(row, 0), &out->temperature) < 0 ||
        kl_parse_int(c->op, "top_k", PyTuple_GetItem(row, 1), 0, INT32_MAX, &top_k) < 0 ||
        kl_parse_float(c->op, "top_p", PyTuple_GetItem(row, 2), &out->top_p) < 0 ||
        kl_parse_float(c->op, "min_p", PyTuple_GetItem(row, 3), &out->min_p) < 0 ||
        kl_parse_float(c->op, "repetition_penalty", PyTuple_GetItem(row, 4),
                       &out->repetition_penalty) < 0 ||
        kl_parse_int(c->op, "position", PyTuple_GetItem(row, 6), 0, INT64_MAX, &position) < 0)
        return -1;
    seed = PyTuple_GetItem(row, 5);
    out->seed = PyLong_AsUnsignedLongLong(seed);
    if (PyErr_Occurred()) return -1;
    out->top_k = (int32_t)top_k;
    out->position = (uint64_t)position;
    if (out->temperature >= 0 && out->top_p > 0 && out->top_p <= 1 && out->min_p >= 0 &&
        out->min_p <= 1 && out->repetition_penalty > 0)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s: temperature must be >= 0, top_p in (0, 1], min_p in [0, 1] and "
                 "repetition_penalty > 0, got %R",
                 c->op, row);
    return -1;
}

static int take_params(kl_call *c, PyObject *params, int64_t N, kl_sample *a)
{
    const Py_ssize_t n = PySequence_Size(params);
    if (n < 0) return -1;
    if (n != N) {
        PyErr_Format(PyExc_ValueError, "%s: params must have %lld rows, got %zd", c->op,
                     (long long)N, n);
        return -1;
    }
    kl_sampling *rows = kl_call_malloc(c, (size_t)(N + 1) * sizeof *rows);
    if (rows == NULL) return -1;
    a->greedy = true;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *row = PySequence_GetItem(params, i);
        const int failed = row == NULL || take_row(c, row, &rows[i]) < 0;
        Py_XDECREF(row);
        if (failed) return -1;
        if (rows[i].temperature > 0) a->greedy = false;
    }
    void *there = rows;
    if (kl_call_send(c, &there, (size_t)N * sizeof *rows) < 0) return -1;
    a->sampling = there;
    return 0;
}

static PyObject *run_sample(kl_call *c, PyObject *const *args)
{
    kl_sample a = {0};
    int64_t top;
    int index;
    if (KL_NEEDS(c, sample) < 0 ||
        kl_arg(c, "logits", args[1], KL_SET(KL_F32), 2, KL_DENSE, &a.logits) < 0 ||
        take_params(c, args[2], a.logits.shape[0], &a) < 0 ||
        kl_arg_opt(c, "seen", args[3], KL_SET(KL_I32), 2, KL_DENSE, &a.seen) < 0 ||
        kl_parse_int(c->op, "top", args[4], 0, 256, &top) < 0)
        return NULL;
    const int64_t shape[2] = {a.logits.shape[0], top};
    if (kl_out(c, "ids", Py_None, KL_I32, 1, shape, NULL, &a.ids, &index) < 0 ||
        kl_out(c, "logprobs", Py_None, KL_F32, 1, shape, NULL, &a.logprobs, &index) < 0)
        return NULL;
    if (kl_out_top(c, shape, &a.top_ids, &a.top_logprobs) < 0) return NULL;
    return kl_call_sample(c, &a) < 0 ? NULL : kl_out_take_all(c);
}

PyObject *kl_py_sample(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "sample", args, nargs, 5, false, run_sample);
}
