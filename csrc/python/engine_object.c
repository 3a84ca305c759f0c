/*
 * engine_object.c -- kimi_linear._core.Engine: a model on a device.
 */
#include "python/engine_object.h"

#include "base/memory.h"

#define KL_FASTCALL(function) (PyCFunction)(void (*)(void))(function)

/* ---- life ------------------------------------------------------------------------------ */

/* Room for a handle of every slot. */
static kl_status make_dropped(EngineObject *self, kl_error *err)
{
    const kl_plan *plan = kl_engine_plan(self->engine);
    self->max_dropped = plan->max_batch + plan->snapshot_slots;
    self->dropped = kl_calloc((size_t)self->max_dropped, sizeof *self->dropped);
    if (self->dropped != NULL) return KL_OK;
    return kl_fail(err, KL_ERR_MEMORY, "engine: no memory for its sequences");
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    const kl_module *m = PyType_GetModuleState(type);
    PyObject *backend, *config_dict, *options_dict;
    kl_config config;
    kl_engine_options options;
    kl_error err = {KL_OK, ""};
    kl_status status;
    if (kwargs != NULL && PyDict_Size(kwargs) != 0) {
        PyErr_SetString(PyExc_TypeError, "Engine: takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OOO:Engine", &backend, &config_dict, &options_dict))
        return NULL;
    kl_device *dev = kl_device_of(m, backend);
    if (dev == NULL || kl_parse_config(config_dict, &config) < 0 ||
        kl_parse_options(options_dict, &options) < 0)
        return NULL;

    EngineObject *self =
        (EngineObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL) return NULL;
    self->dev = kl_device_ref(dev);
    Py_BEGIN_ALLOW_THREADS status =
        kl_engine_new(dev->be, &config, &options, &self->engine, &err);
    Py_END_ALLOW_THREADS if (status == KL_OK) status = make_dropped(self, &err);
    if (status == KL_OK) return (PyObject *)self;
    Py_DECREF(self);
    return kl_raise(m, &err);
}

/* Free everything of the core's, and the device where nobody else holds it. Nobody uses them:
 * the lock is held, or no reference is left. */
static void destroy(EngineObject *self)
{
    for (kl_gen_node *node = self->generations; node != NULL; node = node->next) {
        kl_generation_free(node->g);
        node->g = NULL;
    }
    Py_BEGIN_ALLOW_THREADS /* giving back gigabytes takes a while */
        kl_engine_free(self->engine);
    kl_device_unref(self->dev);
    Py_END_ALLOW_THREADS self->engine = NULL;
    self->dev = NULL;
}

static void engine_dealloc(PyObject *op)
{
    EngineObject *self = (EngineObject *)op;
    PyTypeObject *type = Py_TYPE(op);
    destroy(self);
    while (self->generations != NULL) {
        kl_gen_node *node = self->generations;
        self->generations = node->next;
        kl_free(node);
    }
    kl_free(self->dropped);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static PyObject *engine_close(PyObject *op, PyObject *Py_UNUSED(none))
{
    EngineObject *self = (EngineObject *)op;
    if (kl_engine_lock(self) < 0) return NULL;
    if (self->engine != NULL) destroy(self); /* NULL: another thread was first */
    kl_engine_leave(self);
    Py_RETURN_NONE;
}

static PyObject *engine_plan(PyObject *op, PyObject *Py_UNUSED(none))
{
    EngineObject *self = (EngineObject *)op;
    if (kl_engine_enter(self) < 0) return NULL;
    const kl_plan plan = *kl_engine_plan(self->engine);
    kl_engine_leave(self);
    return kl_plan_dict(&plan);
}

static PyObject *engine_calls_back(PyObject *op, PyObject *Py_UNUSED(none))
{
    return PyBool_FromLong(((EngineObject *)op)->owner == PyThread_get_thread_ident());
}

static PyObject *engine_usage(PyObject *op, PyObject *Py_UNUSED(none))
{
    EngineObject *self = (EngineObject *)op;
    int64_t sequences, pages;
    if (kl_engine_enter(self) < 0) return NULL;
    kl_engine_usage(self->engine, &sequences, &pages);
    kl_engine_leave(self);
    return Py_BuildValue("(LL)", (long long)sequences, (long long)pages);
}

/* ---- weights --------------------------------------------------------------------------- */

static PyObject *engine_load(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    EngineObject *self = (EngineObject *)op;
    PyObject *list = NULL, *result = NULL;
    kl_source *sources = NULL;
    int *fds = NULL, n_fds;
    Py_ssize_t n;
    int64_t n_unused = 0;
    kl_caller caller;
    kl_error err = {KL_OK, ""};
    if (kl_parse_count("load", nargs, 3) < 0 || kl_caller_init(&caller, "load", args[2]) < 0)
        return NULL;
    if (kl_parse_fds(args[0], &fds, &n_fds) < 0) goto done;
    list = kl_parse_list("load", "sources", args[1], &n);
    if (list == NULL) goto done;
    sources = kl_calloc((size_t)n, sizeof *sources);
    if (sources == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n; i++)
        if (kl_parse_source(PyList_GetItem(list, i), &sources[i]) < 0) goto done;

    if (kl_engine_enter(self) < 0) goto done;
    kl_caller_release_gil(&caller);
    const kl_status status = kl_engine_load(self->engine, fds, n_fds, sources, n, &n_unused,
                                            kl_caller_progress, kl_caller_poll, &caller, &err);
    kl_caller_take_gil(&caller);
    if (kl_caller_finish(&caller, kl_module_of_instance(op), status, &err) == 0)
        result = PyLong_FromLongLong(n_unused);
    kl_engine_leave(self);
done:
    Py_XDECREF(list);
    kl_free(sources);
    kl_free(fds);
    return result;
}

static PyObject *engine_randomize(PyObject *op, PyObject *args)
{
    EngineObject *self = (EngineObject *)op;
    PyObject *number;
    int64_t seed;
    float skew;
    kl_error err = {KL_OK, ""};
    kl_status status;
    if (!PyArg_ParseTuple(args, "Of:randomize", &number, &skew) ||
        kl_parse_int("randomize", "seed", number, 0, INT64_MAX, &seed) < 0 ||
        kl_engine_enter(self) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS status =
        kl_engine_randomize(self->engine, (uint64_t)seed, skew, &err);
    Py_END_ALLOW_THREADS kl_engine_leave(self);
    if (status != KL_OK) return kl_raise(kl_module_of_instance(op), &err);
    Py_RETURN_NONE;
}

/* ---- the type -------------------------------------------------------------------------- */

static PyObject *engine_generate(PyObject *op, PyObject *arg)
{
    return kl_generation_object_new((EngineObject *)op, arg);
}

static PyMethodDef engine_methods[] = {
    {"plan", engine_plan, METH_NOARGS, "plan($self, /)\n--\n\nThe memory plan, in bytes."},
    {"load", KL_FASTCALL(engine_load), METH_FASTCALL,
     "load($self, fds, sources, progress, /)\n--\n\n"
     "Fill the weights from open files; returns how many sources were not used."},
    {"randomize", engine_randomize, METH_VARARGS,
     "randomize($self, seed, skew, /)\n--\n\n"
     "Random weights, the same for one seed everywhere; skew: a factor of the routers' "
     "biases."},
    {"close", engine_close, METH_NOARGS,
     "close($self, /)\n--\n\nGive all memory back; later calls raise ValueError."},
    {"calls_back", engine_calls_back, METH_NOARGS,
     "calls_back($self, /)\n--\n\nWhether this is a callback of a call on the engine."},
    {"usage", engine_usage, METH_NOARGS, "usage($self, /)\n--\n\n(sequences, pages) in use."},
    {"seq_new", kl_engine_py_seq_new, METH_NOARGS,
     "seq_new($self, /)\n--\n\nAn empty sequence."},
    {"seq_fork", kl_engine_py_seq_fork, METH_O,
     "seq_fork($self, seq, /)\n--\n\nAn independent copy of a sequence."},
    {"seq_release", kl_engine_py_seq_release, METH_O,
     "seq_release($self, seq, /)\n--\n\nGive a sequence back."},
    {"seq_length", kl_engine_py_seq_length, METH_O,
     "seq_length($self, seq, /)\n--\n\nTokens fed so far."},
    {"seq_draft", KL_FASTCALL(kl_engine_py_draft), METH_FASTCALL,
     "seq_draft($self, seq, n_tokens, /)\n--\n\n"
     "A fork that has room to grow so far, 0 where there is none."},
    {"seq_restore", kl_engine_py_restore, METH_O,
     "seq_restore($self, length, /)\n--\n\n"
     "A sequence of so many tokens whose image is to be written."},
    {"seq_pages", kl_engine_py_pages, METH_O,
     "seq_pages($self, seq, /)\n--\n\n(pages, of them shared) of a sequence."},
    {"keep_prefixes", kl_engine_py_keep_prefixes, METH_O,
     "keep_prefixes($self, on, /)\n--\n\n"
     "Whether prompts begin with what others have read; off gives all of it up."},
    {"clear_prefixes", kl_engine_py_clear_prefixes, METH_NOARGS,
     "clear_prefixes($self, /)\n--\n\nGive up what was kept."},
    {"prefix_stats", kl_engine_py_prefix_stats, METH_NOARGS,
     "prefix_stats($self, /)\n--\n\nCounts of use, and what is kept now."},
    {"image_bytes", kl_engine_py_image_bytes, METH_O,
     "image_bytes($self, length, /)\n--\n\nBytes of the image of a sequence of so many "
     "tokens."},
    {"seq_read_image", KL_FASTCALL(kl_engine_py_read_image), METH_FASTCALL,
     "seq_read_image($self, seq, offset, out, /)\n--\n\nFill a buffer from the image."},
    {"seq_write_image", KL_FASTCALL(kl_engine_py_write_image), METH_FASTCALL,
     "seq_write_image($self, seq, offset, data, /)\n--\n\nReplace a part of the image."},
    {"seq_read_kda", KL_FASTCALL(kl_engine_py_read_kda), METH_FASTCALL,
     "seq_read_kda($self, seq, layer, /)\n--\n\n"
     "(state [H, V, K], conv window [C, W-1]) of a KDA layer, f32."},
    {"seq_write_kda", KL_FASTCALL(kl_engine_py_write_kda), METH_FASTCALL,
     "seq_write_kda($self, seq, layer, state, window, /)\n--\n\n"
     "Replace what seq_read_kda gives."},
    {"feed", KL_FASTCALL(kl_engine_py_feed), METH_FASTCALL,
     "feed($self, seq, ids, progress, /)\n--\n\nAppend tokens to a sequence."},
    {"logits", KL_FASTCALL(kl_engine_py_logits), METH_FASTCALL,
     "logits($self, seq, ids, last, progress, /)\n--\n\n"
     "f32 [vocab] after the last token, or [n, vocab]."},
    {"logprobs", KL_FASTCALL(kl_engine_py_logprobs), METH_FASTCALL,
     "logprobs($self, seq, ids, targets, top, progress, /)\n--\n\n"
     "(logprobs [n], greedy [n]) and, with top, (top_ids, top_logprobs) [n, top]."},
    {"score", KL_FASTCALL(kl_engine_py_score), METH_FASTCALL,
     "score($self, seq, contexts, rows, progress, /)\n--\n\n"
     "(logprobs, greedy) of continuations: rows of (index of a context, ids), all after seq."},
    {"hidden", KL_FASTCALL(kl_engine_py_hidden), METH_FASTCALL,
     "hidden($self, seq, ids, layers, progress, /)\n--\n\n{layer: f32 [n, hidden]}."},
    {"step", kl_engine_py_step, METH_O,
     "step($self, feeds, /)\n--\n\n"
     "One step over several sequences: f32 [n, vocab] after each feed's last token."},
    {"generate", engine_generate, METH_O,
     "generate($self, requests, /)\n--\n\nA Generation over these requests."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot engine_slots[] = {
    {Py_tp_new, engine_new},
    {Py_tp_dealloc, engine_dealloc},
    {Py_tp_methods, engine_methods},
    {Py_tp_doc, "Engine(backend, config, options, /)\n--\n\nA model on a device."},
    {0, NULL},
};

PyType_Spec kl_engine_spec = {
    .name = "kimi_linear._core.Engine",
    .basicsize = sizeof(EngineObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = engine_slots,
};
