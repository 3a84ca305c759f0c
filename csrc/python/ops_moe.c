/*
 * ops_moe.c -- moe_route and moe_experts.
 */
#include "python/call.h"

static PyObject *run_moe_route(kl_call *c, PyObject *const *args)
{
    static const char *const scores[KL_N_SCORES] = {"sigmoid", "softmax"};
    kl_moe_route a = {0};
    int64_t top_k, groups, top_groups;
    int score, ids, weights;
    if (KL_NEEDS(c, moe_route) < 0 ||
        kl_arg(c, "logits", args[1], KL_SET(KL_F32), 2, KL_DENSE, &a.logits) < 0 ||
        kl_arg_opt(c, "bias", args[2], KL_SET(KL_F32), 1, KL_DENSE, &a.bias) < 0 ||
        kl_parse_int(c->op, "top_k", args[3], 1, a.logits.shape[1], &top_k) < 0 ||
        kl_parse_float(c->op, "scaling", args[4], &a.scaling) < 0 ||
        kl_parse_bool(c->op, "renormalize", args[5], &a.renormalize) < 0 ||
        kl_parse_choice(c->op, "score", args[6], scores, KL_N_SCORES, &score) < 0 ||
        kl_parse_int(c->op, "groups", args[7], 1, INT32_MAX, &groups) < 0 ||
        kl_parse_int(c->op, "top_groups", args[8], 1, groups, &top_groups) < 0)
        return NULL;
    a.score = (kl_score)score;
    a.groups = (int)groups;
    a.top_groups = (int)top_groups;
    const int64_t shape[2] = {a.logits.shape[0], top_k};
    if (kl_out(c, "ids", Py_None, KL_I32, 2, shape, NULL, &a.ids, &ids) < 0 ||
        kl_out(c, "weights", Py_None, KL_F32, 2, shape, NULL, &a.weights, &weights) < 0)
        return NULL;
    return kl_call_moe_route(c, &a) < 0 ? NULL : kl_out_take_all(c);
}

PyObject *kl_py_moe_route(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "moe_route", args, nargs, 10, true, run_moe_route);
}

/* shared: None, or (w1, w3, w2). */
static int take_shared(kl_call *c, PyObject *shared, kl_moe_experts *a)
{
    if (shared == Py_None) return 0;
    if (!PyTuple_Check(shared) || PyTuple_Size(shared) != 3) {
        PyErr_Format(PyExc_TypeError, "%s: shared must be None or (w1, w3, w2), got %R", c->op,
                     (PyObject *)Py_TYPE(shared));
        return -1;
    }
    if (kl_arg_weight(c, "shared[0]", PyTuple_GetItem(shared, 0), 2, &a->shared_w1) < 0 ||
        kl_arg_weight(c, "shared[1]", PyTuple_GetItem(shared, 1), 2, &a->shared_w3) < 0)
        return -1;
    return kl_arg_weight(c, "shared[2]", PyTuple_GetItem(shared, 2), 2, &a->shared_w2);
}

static PyObject *run_moe_experts(kl_call *c, PyObject *const *args)
{
    kl_moe_experts a = {0};
    int y;
    if (KL_NEEDS(c, moe_experts) < 0 ||
        kl_arg(c, "x", args[1], KL_FLOATS, 2, KL_DENSE, &a.x) < 0 ||
        kl_arg(c, "weights", args[3], KL_SET(KL_F32), 2, KL_DENSE, &a.weights) < 0 ||
        kl_arg_weight(c, "w1", args[4], 3, &a.w1) < 0 ||
        kl_arg_weight(c, "w3", args[5], 3, &a.w3) < 0 ||
        kl_arg_weight(c, "w2", args[6], 3, &a.w2) < 0 ||
        kl_arg_ids(c, "ids", args[2], 2, 0, a.w1.count - 1, &a.ids) < 0 ||
        take_shared(c, args[7], &a) < 0 ||
        kl_out(c, "out", args[8], a.x.dtype, 2, a.x.shape, NULL, &a.out, &y) < 0)
        return NULL;
    return kl_call_moe_experts(c, &a) < 0 ? NULL : kl_out_take(c, y);
}

PyObject *kl_py_moe_experts(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "moe_experts", args, nargs, 10, true, run_moe_experts);
}
