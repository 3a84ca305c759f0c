/*
 * engine_scores.c -- Engine.score: log-probabilities of many continuations.
 */
#include "python/engine_object.h"

#include "base/memory.h"
#include "model/score.h"

/* What a call owns. */
typedef struct {
    int32_t **contexts, **ids; /* [n_contexts], [n]; NULL from the first one not parsed on */
    int64_t *lengths;          /* of the contexts */
    kl_continuation *rows;     /* [n] */
    Py_ssize_t n_contexts, n;
    int64_t total; /* ids of all rows */
} score_args;

static void free_args(score_args *a)
{
    for (Py_ssize_t i = 0; a->contexts != NULL && i < a->n_contexts; i++)
        kl_free(a->contexts[i]);
    for (Py_ssize_t i = 0; a->ids != NULL && i < a->n; i++) kl_free(a->ids[i]);
    kl_free(a->contexts);
    kl_free(a->lengths);
    kl_free(a->ids);
    kl_free(a->rows);
}

static int parse_contexts(const kl_module *m, PyObject *o, score_args *a)
{
    PyObject *list = kl_parse_list("score", "contexts", o, &a->n_contexts);
    if (list == NULL) return -1;
    a->contexts = kl_calloc((size_t)a->n_contexts, sizeof *a->contexts);
    a->lengths = kl_calloc((size_t)a->n_contexts, sizeof *a->lengths);
    int result = a->contexts == NULL || a->lengths == NULL ? -1 : 0;
    if (result < 0) PyErr_NoMemory();
    for (Py_ssize_t i = 0; result == 0 && i < a->n_contexts; i++)
        result = kl_parse_ids(m, "score", "contexts", PyList_GetItem(list, i), &a->contexts[i],
                              &a->lengths[i]);
    Py_DECREF(list);
    return result;
}

/* (index of the context, ids) */
static int parse_row(const kl_module *m, PyObject *o, score_args *a, Py_ssize_t i)
{
    PyObject *index, *ids;
    int64_t k;
    if (!PyTuple_Check(o) || !PyArg_ParseTuple(o, "OO:row", &index, &ids)) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "score: a row must be a tuple, got %R", o);
        return -1;
    }
    if (kl_parse_int("score", "context", index, 0, a->n_contexts - 1, &k) < 0 ||
        kl_parse_ids(m, "score", "ids", ids, &a->ids[i], &a->rows[i].n) < 0)
        return -1;
    a->rows[i].context = a->contexts[k];
    a->rows[i].n_context = a->lengths[k];
    a->rows[i].ids = a->ids[i];
    a->total += a->rows[i].n;
    return 0;
}

static int parse_rows(const kl_module *m, PyObject *o, score_args *a)
{
    PyObject *list = kl_parse_list("score", "rows", o, &a->n);
    if (list == NULL) return -1;
    a->ids = kl_calloc((size_t)a->n, sizeof *a->ids);
    a->rows = kl_calloc((size_t)a->n, sizeof *a->rows);
    int result = a->ids == NULL || a->rows == NULL ? -1 : 0;
    if (result < 0) PyErr_NoMemory();
    for (Py_ssize_t i = 0; result == 0 && i < a->n; i++)
        result = parse_row(m, PyList_GetItem(list, i), a, i);
    Py_DECREF(list);
    return result;
}

/* (logprobs, greedy), the rows' one behind the other. */
static PyObject *new_results(score_args *a)
{
    static const DLDataType boolean = {kDLBool, 8, 1};
    void *logprobs, *greedy;
    PyObject *first = kl_numpy_empty(KL_F32, 1, &a->total, &logprobs);
    PyObject *second =
        first == NULL ? NULL : kl_numpy_new(boolean, NULL, 1, &a->total, &greedy);
    PyObject *result = second == NULL ? NULL : PyTuple_Pack(2, first, second);
    Py_XDECREF(first);
    Py_XDECREF(second);
    int64_t at = 0;
    for (Py_ssize_t i = 0; result != NULL && i < a->n; at += a->rows[i++].n) {
        a->rows[i].logprobs = (float *)logprobs + at;
        a->rows[i].greedy = (uint8_t *)greedy + at;
    }
    return result;
}

static int run_scores(EngineObject *self, kl_seq seq, const score_args *a, PyObject *progress)
{
    kl_caller caller;
    kl_error err = {KL_OK, ""};
    if (kl_caller_init(&caller, "score", progress) < 0 || kl_engine_enter(self) < 0) return -1;
    const kl_scoring scoring = {.seq = seq,
                                .scores = a->rows,
                                .n = a->n,
                                .progress = kl_caller_progress,
                                .poll = kl_caller_poll,
                                .ctx = &caller};
    kl_caller_release_gil(&caller);
    const kl_status status = kl_engine_score(self->engine, &scoring, &err);
    kl_caller_take_gil(&caller);
    const int result =
        kl_caller_finish(&caller, kl_module_of_instance((PyObject *)self), status, &err);
    kl_engine_leave(self);
    return result;
}

PyObject *kl_engine_py_score(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    const kl_module *m = kl_module_of_instance(op);
    PyObject *result = NULL;
    score_args a = {0};
    kl_seq seq;
    if (kl_parse_count("score", nargs, 4) == 0 && kl_parse_seq("score", args[0], &seq) == 0 &&
        parse_contexts(m, args[1], &a) == 0 && parse_rows(m, args[2], &a) == 0)
        result = new_results(&a);
    if (result != NULL && run_scores((EngineObject *)op, seq, &a, args[3]) < 0)
        Py_CLEAR(result);
    free_args(&a);
    return result;
}
