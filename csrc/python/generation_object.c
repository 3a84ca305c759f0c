/*
 * generation_object.c -- kimi_linear._core.Generation: requests under way on an engine.
 */
#include "python/engine_object.h"

#include "base/memory.h"

#include <string.h>

#define KL_FASTCALL(function) (PyCFunction)(void (*)(void))(function)

/* Tokens of each row that a call has room for: those of as many steps as generate() asks for. */
#define STEPS_A_CALL 16

typedef struct {
    PyObject_HEAD
    EngineObject *engine; /* strong */
    kl_gen_node *node;    /* the engine frees it */
    kl_event *events;     /* [n_events] */
    int64_t n_events, vocab;
} GenerationObject;

/* ---- requests -------------------------------------------------------------------------- */

static int parse_sampling(PyObject *dict, kl_sampling *out)
{
    static const float zero = 0.0f, one = 1.0f;
    static const int64_t none = 0;
    int64_t top_k, seed, position;
    if (kl_dict_float("generate", dict, "temperature", &zero, &out->temperature) < 0 ||
        kl_dict_int("generate", dict, "top_k", 0, INT32_MAX, &none, &top_k) < 0 ||
        kl_dict_float("generate", dict, "top_p", &one, &out->top_p) < 0 ||
        kl_dict_float("generate", dict, "min_p", &zero, &out->min_p) < 0 ||
        kl_dict_float("generate", dict, "repetition_penalty", &one, &out->repetition_penalty) <
            0 ||
        kl_dict_int("generate", dict, "seed", 0, INT64_MAX, &none, &seed) < 0 ||
        kl_dict_int("generate", dict, "position", 0, INT64_MAX, &none, &position) < 0)
        return -1;
    out->top_k = (int32_t)top_k;
    out->seed = (uint64_t)seed;
    out->position = (uint64_t)position;
    return 0;
}

/* Copy an array of logits [vocab]. */
static int read_logits(const kl_module *m, const char *op, PyObject *o, int64_t vocab,
                       float *out)
{
    kl_array a;
    int result = -1;
    if (kl_array_borrow(m, op, "logits", o, -1, &a) < 0) return -1;
    if (a.dtype.code != kDLFloat || a.dtype.bits != 32 || a.device.device_type != kDLCPU ||
        a.ndim != 1 || a.shape[0] != vocab) {
        PyErr_Format(PyExc_ValueError,
                     "%s: logits must be a float32 array of %lld on the cpu, got %R", op,
                     (long long)vocab, o);
    } else {
        kl_array_copy_dense(&a, out);
        result = 0;
    }
    kl_array_release(&a);
    return result;
}

/* The logits that a request draws from before it feeds anything. */
static int parse_logits(const kl_module *m, PyObject *dict, int64_t vocab, float **out)
{
    PyObject *value = PyDict_GetItemString(dict, "logits");
    if (value == NULL || value == Py_None) return 0;
    *out = kl_calloc((size_t)vocab, sizeof **out);
    if (*out != NULL) return read_logits(m, "generate", value, vocab, *out);
    PyErr_NoMemory();
    return -1;
}

/* What a request continues. */
static int parse_past(PyObject *dict, kl_request *out)
{
    static const int64_t none = 0;
    int64_t seq, in_place;
    if (kl_dict_int("generate", dict, "seq", 0, INT64_MAX, &none, &seq) < 0 ||
        kl_dict_int("generate", dict, "in_place", 0, 1, &none, &in_place) < 0 ||
        kl_dict_int("generate", dict, "n_history", 0, INT64_MAX, &none, &out->n_history) < 0)
        return -1;
    out->seq = (kl_seq)seq;
    out->in_place = in_place != 0;
    return 0;
}

/* What a request points to. */
typedef struct {
    int32_t *ids, *stop_ids;
    float *logits;
} request_arrays;

/* The arrays are the caller's to free, whatever is returned. */
static int parse_request(const kl_module *m, PyObject *dict, int64_t vocab, kl_request *out,
                         request_arrays *arrays)
{
    static const int64_t none = 0, yes = 1;
    int64_t top, process;
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "generate: a request must be a dict, got %R", dict);
        return -1;
    }
    PyObject *prompt = PyDict_GetItemString(dict, "ids");
    PyObject *stops = PyDict_GetItemString(dict, "stop_ids");
    if (prompt == NULL) {
        PyErr_SetString(PyExc_ValueError, "generate: a request's ids are missing");
        return -1;
    }
    if (kl_parse_ids(m, "generate", "ids", prompt, &arrays->ids, &out->n_prompt) < 0 ||
        (stops != NULL && kl_parse_ids(m, "generate", "stop_ids", stops, &arrays->stop_ids,
                                       &out->n_stop_ids) < 0) ||
        kl_dict_int("generate", dict, "max_new_tokens", 0, INT64_MAX, NULL,
                    &out->max_new_tokens) < 0 ||
        kl_dict_int("generate", dict, "top", 0, 256, &none, &top) < 0 ||
        kl_dict_int("generate", dict, "process", 0, 1, &yes, &process) < 0 ||
        kl_dict_int("generate", dict, "guesses", 0, INT64_MAX, &none, &out->guesses) < 0 ||
        parse_past(dict, out) < 0 || parse_logits(m, dict, vocab, &arrays->logits) < 0)
        return -1;
    out->prompt = arrays->ids;
    out->stop_ids = arrays->stop_ids;
    out->logits = arrays->logits;
    out->top = (int)top;
    out->process = process != 0;
    return parse_sampling(dict, &out->sampling);
}

typedef struct {
    kl_request *requests;
    request_arrays *arrays;
    Py_ssize_t n;
} request_args;

static void free_arrays(request_arrays *a)
{
    kl_free(a->ids);
    kl_free(a->stop_ids);
    kl_free(a->logits);
}

static int parse_requests(const kl_module *m, PyObject *list, int64_t vocab, request_args *out)
{
    out->requests = kl_calloc((size_t)out->n, sizeof *out->requests);
    out->arrays = kl_calloc((size_t)out->n, sizeof *out->arrays);
    if (out->requests == NULL || out->arrays == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < out->n; i++)
        if (parse_request(m, PyList_GetItem(list, i), vocab, &out->requests[i],
                          &out->arrays[i]) < 0)
            return -1;
    return 0;
}

static void free_requests(request_args *a)
{
    for (Py_ssize_t i = 0; a->arrays != NULL && i < a->n; i++) free_arrays(&a->arrays[i]);
    kl_free(a->arrays);
    kl_free(a->requests);
}

/* ---- life ------------------------------------------------------------------------------ */

/* The C part of a generation, in the engine's list; under the engine's lock. */
static kl_status make_node(EngineObject *engine, const request_args *a, kl_gen_node **out,
                           kl_error *err)
{
    kl_gen_node *node = kl_calloc(1, sizeof *node);
    if (node == NULL) return kl_fail(err, KL_ERR_MEMORY, "generate: no memory");
    const kl_status status =
        kl_generation_new(engine->engine, a->requests, a->n, &node->g, err);
    if (status != KL_OK) {
        kl_free(node);
        return status;
    }
    node->next = engine->generations;
    engine->generations = node;
    *out = node;
    return KL_OK;
}

static int fill_object(GenerationObject *self, const kl_module *m, const request_args *a)
{
    kl_error err = {KL_OK, ""};
    if (kl_engine_enter(self->engine) < 0) return -1;
    const int64_t rows = kl_engine_plan(self->engine->engine)->max_batch;
    self->n_events = rows * STEPS_A_CALL + KL_MAX_GUESSES;
    self->vocab = kl_engine_config(self->engine->engine)->vocab_size;
    kl_status status = make_node(self->engine, a, &self->node, &err);
    kl_engine_leave(self->engine);
    if (status == KL_OK) {
        self->events = kl_calloc((size_t)self->n_events, sizeof *self->events);
        if (self->events == NULL)
            status = kl_fail(&err, KL_ERR_MEMORY, "generate: no memory for events");
    }
    if (status == KL_OK) return 0;
    kl_raise(m, &err);
    return -1;
}

PyObject *kl_generation_object_new(EngineObject *engine, PyObject *requests)
{
    const kl_module *m = kl_module_of_instance((PyObject *)engine);
    GenerationObject *self = NULL;
    request_args a = {0};
    if (kl_engine_enter(engine) < 0) return NULL;
    const int64_t vocab = kl_engine_config(engine->engine)->vocab_size;
    kl_engine_leave(engine);
    PyObject *list = kl_parse_list("generate", "requests", requests, &a.n);
    if (list == NULL) return NULL;
    if (parse_requests(m, list, vocab, &a) == 0) {
        PyTypeObject *type = m->generation_type;
        self = (GenerationObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    }
    if (self != NULL) {
        self->engine = (EngineObject *)Py_NewRef((PyObject *)engine);
        if (fill_object(self, m, &a) < 0) Py_CLEAR(self);
    }
    free_requests(&a);
    Py_DECREF(list);
    return (PyObject *)self;
}

static void drop_node(GenerationObject *self)
{
    if (self->node != NULL) kl_engine_drop(self->engine, self->node);
    self->node = NULL;
}

static void generation_dealloc(PyObject *op)
{
    GenerationObject *self = (GenerationObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    drop_node(self);
    kl_free(self->events);
    Py_XDECREF((PyObject *)self->engine);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

/* Take the engine's lock for a generation that is alive. */
static int enter(GenerationObject *self)
{
    if (kl_engine_enter(self->engine) < 0) return -1;
    if (self->node != NULL && self->node->g != NULL) return 0;
    kl_engine_leave(self->engine);
    PyErr_SetString(PyExc_ValueError, "generation: it is closed");
    return -1;
}

static PyObject *generation_close(PyObject *op, PyObject *Py_UNUSED(none))
{
    drop_node((GenerationObject *)op);
    Py_RETURN_NONE;
}

static PyObject *generation_submit(PyObject *op, PyObject *dict)
{
    GenerationObject *self = (GenerationObject *)op;
    const kl_module *m = kl_module_of_instance(op);
    kl_request request = {0};
    request_arrays arrays = {0};
    PyObject *result = NULL;
    kl_error err = {KL_OK, ""};
    int64_t id;
    if (parse_request(m, dict, self->vocab, &request, &arrays) == 0 && enter(self) == 0) {
        const kl_status status = kl_generation_submit(self->node->g, &request, &id, &err);
        kl_engine_leave(self->engine);
        result = status == KL_OK ? PyLong_FromLongLong(id) : kl_raise(m, &err);
    }
    free_arrays(&arrays);
    return result;
}

/* ---- the logits processor -------------------------------------------------------------- */

typedef struct {
    kl_caller *caller;
    const kl_module *m;
    PyObject *process;
    int64_t vocab;
} processor;

static int call_process(const processor *p, int64_t request, const int32_t *ids, int64_t n_ids,
                        float *logits)
{
    void *id_data, *logit_data;
    int result = -1;
    PyObject *id_array = kl_numpy_empty(KL_I32, 1, &n_ids, &id_data);
    PyObject *array =
        id_array == NULL ? NULL : kl_numpy_empty(KL_F32, 1, &p->vocab, &logit_data);
    if (array != NULL) {
        memcpy(id_data, ids, (size_t)n_ids * sizeof *ids);
        memcpy(logit_data, logits, (size_t)p->vocab * sizeof *logits);
        PyObject *returned =
            PyObject_CallFunction(p->process, "LOO", (long long)request, id_array, array);
        if (returned != NULL) /* None: changed in place */
            result = read_logits(p->m, "process", returned == Py_None ? array : returned,
                                 p->vocab, logits);
        Py_XDECREF(returned);
    }
    Py_XDECREF(id_array);
    Py_XDECREF(array);
    return result;
}

/* A kl_logits_fn: called without the GIL. */
static int process_row(void *ctx, int64_t request, const int32_t *ids, int64_t n_ids,
                       float *logits)
{
    const processor *p = ctx;
    if (p->caller->failed) return 1;
    kl_caller_take_gil(p->caller);
    p->caller->failed = call_process(p, request, ids, n_ids, logits) < 0;
    kl_caller_release_gil(p->caller);
    return p->caller->failed;
}

/* ---- running --------------------------------------------------------------------------- */

static PyObject *top_tuple(const kl_event *event, int top)
{
    PyObject *tuple = PyTuple_New(top);
    for (int i = 0; tuple != NULL && i < top; i++) {
        PyObject *pair =
            Py_BuildValue("(id)", (int)event->top_ids[i], (double)event->top_logprobs[i]);
        if (pair == NULL || PyTuple_SetItem(tuple, i, pair) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *finish_object(const kl_module *m, const kl_event *event)
{
    if (event->finish == KL_FINISH_ERROR) return kl_exception(m, &event->error);
    if (event->finish == KL_RUNNING) Py_RETURN_NONE;
    return PyUnicode_FromString(event->finish == KL_FINISH_STOP ? "stop" : "length");
}

/* (request, id, logprob, finish or None, ((id, logprob), ...), cached tokens, guesses, right ones)
 */
static PyObject *event_tuple(const kl_module *m, const kl_event *event)
{
    PyObject *finish = finish_object(m, event);
    PyObject *top = finish == NULL ? NULL : top_tuple(event, event->n_top);
    if (top == NULL) {
        Py_XDECREF(finish);
        return NULL;
    }
    return Py_BuildValue("(LidNNLLL)", (long long)event->request, (int)event->id,
                         (double)event->logprob, finish, top, (long long)event->n_cached,
                         (long long)event->n_drafted, (long long)event->n_accepted);
}

static PyObject *event_list(const kl_module *m, const kl_event *events, int64_t n)
{
    PyObject *list = PyList_New((Py_ssize_t)n);
    for (int64_t i = 0; list != NULL && i < n; i++) {
        PyObject *tuple = event_tuple(m, &events[i]);
        if (tuple == NULL || PyList_SetItem(list, (Py_ssize_t)i, tuple) < 0) Py_CLEAR(list);
    }
    return list;
}

static PyObject *generation_run(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    GenerationObject *self = (GenerationObject *)op;
    const kl_module *m = kl_module_of_instance(op);
    PyObject *result = NULL;
    kl_caller caller;
    kl_error err = {KL_OK, ""};
    int64_t max_steps, n;
    if (kl_parse_count("run", nargs, 3) < 0 ||
        kl_parse_int("run", "max_steps", args[0], 1, INT64_MAX, &max_steps) < 0 ||
        kl_caller_init(&caller, "run", args[2]) < 0)
        return NULL;
    if (args[1] != Py_None && !PyCallable_Check(args[1])) {
        PyErr_Format(PyExc_TypeError, "run: process must be callable or None, got %R", args[1]);
        return NULL;
    }
    processor p = {&caller, m, args[1] == Py_None ? NULL : args[1], self->vocab};
    if (enter(self) < 0) return NULL;
    /* Not the object's node from here on: without the GIL another thread may close the object,
     * whose C part then lives until the lock is given back. */
    kl_generation *g = self->node->g;
    kl_caller_follow(&caller, g);
    kl_caller_release_gil(&caller);
    const kl_status status = kl_generation_run(g, max_steps, self->events, self->n_events, &n,
                                               p.process == NULL ? NULL : process_row, &p,
                                               kl_caller_poll, &caller, &err);
    kl_caller_take_gil(&caller);
    if (kl_caller_finish(&caller, m, status, &err) == 0)
        result = event_list(m, self->events, n);
    kl_engine_leave(self->engine);
    return result;
}

static PyObject *generation_finish(PyObject *op, PyObject *arg)
{
    GenerationObject *self = (GenerationObject *)op;
    kl_error err = {KL_OK, ""};
    int64_t request;
    if (kl_parse_int("finish", "request", arg, 0, INT64_MAX, &request) < 0 || enter(self) < 0)
        return NULL;
    const kl_status status = kl_generation_finish(self->node->g, request, &err);
    kl_engine_leave(self->engine);
    if (status != KL_OK) return kl_raise(kl_module_of_instance(op), &err);
    Py_RETURN_NONE;
}

static PyObject *generation_done(PyObject *op, PyObject *Py_UNUSED(none))
{
    GenerationObject *self = (GenerationObject *)op;
    if (enter(self) < 0) return NULL;
    const bool done = kl_generation_done(self->node->g);
    kl_engine_leave(self->engine);
    return PyBool_FromLong(done);
}

static PyObject *generation_stats(PyObject *op, PyObject *Py_UNUSED(none))
{
    GenerationObject *self = (GenerationObject *)op;
    kl_generation_stats s;
    if (enter(self) < 0) return NULL;
    kl_generation_get_stats(self->node->g, &s);
    kl_engine_leave(self->engine);
    return Py_BuildValue("{s:L,s:L,s:L,s:d,s:d,s:L,s:L}", "prompt_tokens",
                         (long long)s.prompt_tokens, "prompt_done", (long long)s.prompt_done,
                         "new_tokens", (long long)s.new_tokens, "prefill_s", s.prefill_s,
                         "decode_s", s.decode_s, "running", (long long)s.running, "waiting",
                         (long long)s.waiting);
}

static PyMethodDef generation_methods[] = {
    {"run", KL_FASTCALL(generation_run), METH_FASTCALL,
     "run($self, max_steps, process, progress, /)\n--\n\n"
     "[(request, id, logprob, finish or None, ((id, logprob), ...), cached, drafted, "
     "accepted), "
     "...] of so many steps; finish is an exception where the request failed."},
    {"submit", generation_submit, METH_O,
     "submit($self, request, /)\n--\n\nOne more request, behind those that wait; its number."},
    {"finish", generation_finish, METH_O,
     "finish($self, request, /)\n--\n\nEnd one request; its sequence is released."},
    {"done", generation_done, METH_NOARGS,
     "done($self, /)\n--\n\nWhether nothing is left to run or to be told."},
    {"stats", generation_stats, METH_NOARGS,
     "stats($self, /)\n--\n\nTokens and seconds of all requests so far."},
    {"close", generation_close, METH_NOARGS,
     "close($self, /)\n--\n\nRelease every sequence still held."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot generation_slots[] = {
    {Py_tp_dealloc, generation_dealloc},
    {Py_tp_methods, generation_methods},
    {Py_tp_doc, "Requests under way on an engine; made by Engine.generate()."},
    {0, NULL},
};

PyType_Spec kl_generation_spec = {
    .name = "kimi_linear._core.Generation",
    .basicsize = sizeof(GenerationObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = generation_slots,
};
