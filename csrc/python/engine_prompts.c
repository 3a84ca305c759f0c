/*
 * engine_prompts.c -- what Engine computes of tokens: whole prompts, and raw steps.
 *
 * Results are NumPy arrays that are made before the call and filled by it.
 */
#include "python/engine_object.h"

#include "base/memory.h"
#include "model/prompt.h"

/* ---- whole prompts --------------------------------------------------------------------- */

/* Parse (seq, ids) into a prompt; the ids are the caller's to free. */
static int parse_prompt(EngineObject *self, const char *op, PyObject *const *args,
                        kl_prompt *out, int32_t **ids)
{
    const kl_module *m = kl_module_of_instance((PyObject *)self);
    if (kl_parse_seq(op, args[0], &out->seq) < 0 ||
        kl_parse_ids(m, op, "ids", args[1], ids, &out->n) < 0)
        return -1;
    out->ids = *ids;
    return 0;
}

/* Run a prompt under the lock, without the GIL; 0, or -1 with an exception. */
static int run_prompt(EngineObject *self, const char *op, kl_prompt *p, PyObject *progress)
{
    kl_caller caller;
    kl_error err = {KL_OK, ""};
    if (kl_caller_init(&caller, op, progress) < 0 || kl_engine_enter(self) < 0) return -1;
    p->progress = kl_caller_progress;
    p->poll = kl_caller_poll;
    p->ctx = &caller;
    kl_caller_release_gil(&caller);
    const kl_status status = kl_engine_prompt(self->engine, p, &err);
    kl_caller_take_gil(&caller);
    const int result =
        kl_caller_finish(&caller, kl_module_of_instance((PyObject *)self), status, &err);
    kl_engine_leave(self);
    return result;
}

/* The model's sizes, which never change, while the engine is open. */
static int get_config(EngineObject *self, int64_t *vocab, int64_t *hidden, int64_t *layers)
{
    if (kl_engine_enter(self) < 0) return -1;
    const kl_config *c = kl_engine_config(self->engine);
    *vocab = c->vocab_size;
    *hidden = c->hidden_size;
    *layers = c->n_layers;
    kl_engine_leave(self);
    return 0;
}

PyObject *kl_engine_py_feed(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    EngineObject *self = (EngineObject *)op;
    kl_prompt p = {0};
    int32_t *ids = NULL;
    int failed = -1;
    if (kl_parse_count("feed", nargs, 3) < 0) return NULL;
    if (parse_prompt(self, "feed", args, &p, &ids) == 0)
        failed = run_prompt(self, "feed", &p, args[2]);
    kl_free(ids);
    return failed < 0 ? NULL : Py_NewRef(Py_None);
}

PyObject *kl_engine_py_logits(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    EngineObject *self = (EngineObject *)op;
    PyObject *result = NULL;
    kl_prompt p = {0};
    int32_t *ids = NULL;
    int64_t vocab, hidden, layers;
    void *data;
    bool last;
    if (kl_parse_count("logits", nargs, 4) < 0 ||
        kl_parse_bool("logits", "last", args[2], &last) < 0 ||
        get_config(self, &vocab, &hidden, &layers) < 0 ||
        parse_prompt(self, "logits", args, &p, &ids) < 0)
        goto done;
    const int64_t shape[] = {p.n, vocab};
    result = kl_numpy_empty(KL_F32, last ? 1 : 2, last ? shape + 1 : shape, &data);
    if (result == NULL) goto done;
    if (last)
        p.last_logits = data;
    else
        p.logits = data;
    if (run_prompt(self, "logits", &p, args[3]) < 0) Py_CLEAR(result);
done:
    kl_free(ids);
    return result;
}

/* (logprobs [n], greedy [n]) and with `top` (top_ids [n, top], top_logprobs [n, top]). */
static PyObject *new_scores(kl_prompt *p)
{
    static const DLDataType boolean = {kDLBool, 8, 1};
    const int64_t shape[] = {p->n, p->top};
    const int n = p->top > 0 ? 4 : 2;
    void *data[4] = {NULL};
    PyObject *tuple = PyTuple_New(n);
    if (tuple == NULL) return NULL;
    for (int i = 0; i < n; i++) {
        PyObject *array =
            i == 1 ? kl_numpy_new(boolean, NULL, 1, shape, &data[i])
                   : kl_numpy_empty(i == 2 ? KL_I32 : KL_F32, i < 2 ? 1 : 2, shape, &data[i]);
        if (array == NULL || PyTuple_SetItem(tuple, i, array) < 0) {
            Py_DECREF(tuple);
            return NULL;
        }
    }
    p->logprobs = data[0];
    p->greedy = data[1];
    p->top_ids = data[2];
    p->top_logprobs = data[3];
    return tuple;
}

PyObject *kl_engine_py_logprobs(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    EngineObject *self = (EngineObject *)op;
    PyObject *result = NULL;
    kl_prompt p = {0};
    int32_t *ids = NULL, *targets = NULL;
    int64_t n_targets, top;
    if (kl_parse_count("logprobs", nargs, 5) < 0 ||
        kl_parse_int("logprobs", "top", args[3], 0, 256, &top) < 0 ||
        parse_prompt(self, "logprobs", args, &p, &ids) < 0 ||
        kl_parse_ids(kl_module_of_instance(op), "logprobs", "targets", args[2], &targets,
                     &n_targets) < 0)
        goto done;
    if (n_targets != p.n) {
        PyErr_Format(PyExc_ValueError, "logprobs: targets must number %lld like ids, got %lld",
                     (long long)p.n, (long long)n_targets);
        goto done;
    }
    p.targets = targets;
    p.top = (int)top;
    result = new_scores(&p);
    if (result != NULL && run_prompt(self, "logprobs", &p, args[4]) < 0) Py_CLEAR(result);
done:
    kl_free(ids);
    kl_free(targets);
    return result;
}

/* {layer: new array [n, hidden]}; the arrays' memory in `data`. */
static PyObject *new_streams(PyObject *list, Py_ssize_t n_layers, int64_t max_layers, int64_t n,
                             int64_t hidden, int64_t *layers, float **data)
{
    const int64_t shape[] = {n, hidden};
    PyObject *dict = PyDict_New();
    for (Py_ssize_t i = 0; dict != NULL && i < n_layers; i++) {
        PyObject *key = PyList_GetItem(list, i), *array = NULL;
        void *memory = NULL;
        if (kl_parse_int("hidden", "layers", key, 0, max_layers - 1, &layers[i]) == 0)
            array = kl_numpy_empty(KL_F32, 2, shape, &memory);
        data[i] = memory;
        if (array == NULL || PyDict_SetItem(dict, key, array) < 0) Py_CLEAR(dict);
        Py_XDECREF(array);
    }
    return dict;
}

PyObject *kl_engine_py_hidden(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    EngineObject *self = (EngineObject *)op;
    PyObject *result = NULL, *list = NULL, *unique = NULL;
    kl_prompt p = {0};
    int32_t *ids = NULL;
    int64_t vocab, hidden, max_layers, layers[KL_MAX_LAYERS];
    float *data[KL_MAX_LAYERS];
    Py_ssize_t n;
    if (kl_parse_count("hidden", nargs, 4) < 0 ||
        get_config(self, &vocab, &hidden, &max_layers) < 0 ||
        parse_prompt(self, "hidden", args, &p, &ids) < 0)
        goto done;
    unique = PyFrozenSet_New(args[2]); /* a layer named twice is one entry of the dict */
    list = unique == NULL ? NULL : PySequence_List(unique);
    if (list == NULL) goto done;
    n = PyList_Size(list);
    if (n > max_layers) {
        PyErr_Format(PyExc_ValueError, "hidden: layers must lie in [0, %lld)",
                     (long long)max_layers);
        goto done;
    }
    result = new_streams(list, n, max_layers, p.n, hidden, layers, data);
    p.layers = layers;
    p.hidden = data;
    p.n_layers = n;
    if (result != NULL && run_prompt(self, "hidden", &p, args[3]) < 0) Py_CLEAR(result);
done:
    kl_free(ids);
    Py_XDECREF(list);
    Py_XDECREF(unique);
    return result;
}

/* ---- one raw step ---------------------------------------------------------------------- */

/* What the feeds of a step own. */
typedef struct {
    kl_feed *feeds;
    int32_t **ids, *rows;
    Py_ssize_t n;
} step_args;

static void free_step(step_args *s)
{
    for (Py_ssize_t i = 0; s->ids != NULL && i < s->n; i++) kl_free(s->ids[i]);
    kl_free(s->ids);
    kl_free(s->feeds);
    kl_free(s->rows);
}

/* [(seq, ids), ...]; the row of each is its last token. */
static int parse_step(const kl_module *m, PyObject *list, step_args *out)
{
    const size_t n = (size_t)out->n;
    int64_t end = 0;
    out->feeds = kl_calloc(n, sizeof *out->feeds);
    out->ids = kl_calloc(n, sizeof *out->ids);
    out->rows = kl_calloc(n, sizeof *out->rows);
    if (out->feeds == NULL || out->ids == NULL || out->rows == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < out->n; i++) {
        PyObject *pair = PyList_GetItem(list, i), *seq, *ids;
        if (!PyTuple_Check(pair) || !PyArg_ParseTuple(pair, "OO:feed", &seq, &ids)) {
            if (!PyErr_Occurred())
                PyErr_Format(PyExc_TypeError, "step: a feed must be a tuple, got %R", pair);
            return -1;
        }
        if (kl_parse_seq("step", seq, &out->feeds[i].seq) < 0 ||
            kl_parse_ids(m, "step", "ids", ids, &out->ids[i], &out->feeds[i].n_tokens) < 0)
            return -1;
        out->feeds[i].tokens = out->ids[i];
        end += out->feeds[i].n_tokens;
        out->rows[i] = (int32_t)(end - 1);
    }
    return 0;
}

static int run_step(EngineObject *self, const step_args *s, float *logits)
{
    kl_caller caller;
    kl_error err = {KL_OK, ""};
    if (kl_caller_init(&caller, "step", Py_None) < 0 || kl_engine_enter(self) < 0) return -1;
    const kl_step step = {.feeds = s->feeds,
                          .n_feeds = s->n,
                          .rows = s->rows,
                          .n_rows = s->n,
                          .logits = logits,
                          .poll = kl_caller_poll,
                          .poll_ctx = &caller};
    kl_caller_release_gil(&caller);
    const kl_status status = kl_engine_step(self->engine, &step, &err);
    kl_caller_take_gil(&caller);
    const int result =
        kl_caller_finish(&caller, kl_module_of_instance((PyObject *)self), status, &err);
    kl_engine_leave(self);
    return result;
}

PyObject *kl_engine_py_step(PyObject *op, PyObject *arg)
{
    EngineObject *self = (EngineObject *)op;
    PyObject *result = NULL, *list;
    step_args s = {0};
    int64_t vocab, hidden, layers;
    void *logits;
    if (get_config(self, &vocab, &hidden, &layers) < 0) return NULL;
    list = kl_parse_list("step", "feeds", arg, &s.n);
    if (list == NULL) return NULL;
    if (parse_step(kl_module_of_instance(op), list, &s) < 0) goto done;
    const int64_t shape[] = {s.n, vocab};
    result = kl_numpy_empty(KL_F32, 2, shape, &logits);
    if (result != NULL && run_step(self, &s, logits) < 0) Py_CLEAR(result);
done:
    free_step(&s);
    Py_DECREF(list);
    return result;
}
