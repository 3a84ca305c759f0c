/*
 * engine_kda.c -- the memory of a KDA layer as NumPy arrays, for looking at and for keeping.
 */
#include "python/engine_object.h"

typedef struct {
    int64_t state[3], window[2];
} shapes;

static int begin(EngineObject *self, const char *op, PyObject *const *args, kl_seq *seq,
                 int64_t *layer, shapes *s)
{
    if (kl_parse_seq(op, args[0], seq) < 0 ||
        kl_parse_int(op, "layer", args[1], 0, KL_MAX_LAYERS - 1, layer) < 0 ||
        kl_engine_enter(self) < 0)
        return -1;
    const kl_config *c = kl_engine_config(self->engine);
    const int64_t H = c->kda_heads, K = c->kda_head_dim;
    *s = (shapes){{H, K, K}, {3 * H * K, c->conv_width - 1}};
    kl_engine_leave(self);
    return 0;
}

static PyObject *finish(EngineObject *self, kl_status status, const kl_error *err,
                        PyObject *result)
{
    kl_engine_leave(self);
    if (status == KL_OK) return result;
    Py_XDECREF(result);
    return kl_raise(kl_module_of_instance((PyObject *)self), err);
}

PyObject *kl_engine_py_read_kda(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    EngineObject *self = (EngineObject *)op;
    kl_seq seq;
    int64_t layer;
    shapes s;
    void *state, *window;
    kl_error err = {KL_OK, ""};
    if (kl_parse_count("seq_read_kda", nargs, 2) < 0 ||
        begin(self, "seq_read_kda", args, &seq, &layer, &s) < 0)
        return NULL;
    PyObject *first = kl_numpy_empty(KL_F32, 3, s.state, &state);
    PyObject *second = kl_numpy_empty(KL_F32, 2, s.window, &window);
    PyObject *pair = first == NULL || second == NULL ? NULL : PyTuple_Pack(2, first, second);
    Py_XDECREF(first);
    Py_XDECREF(second);
    if (pair == NULL) return NULL;
    if (kl_engine_enter(self) < 0) {
        Py_DECREF(pair);
        return NULL;
    }
    const kl_status status = kl_seq_read_kda(self->engine, seq, layer, state, window, &err);
    return finish(self, status, &err, pair);
}

/* A dense float32 array of the host of exactly this shape. */
static int borrow(const kl_module *m, const char *name, PyObject *o, int ndim,
                  const int64_t *shape, kl_array *out)
{
    kl_dtype dtype;
    if (kl_array_borrow(m, "seq_write_kda", name, o, 1, out) < 0) return -1;
    bool fits = kl_dtype_from_dl(out->dtype, &dtype) && dtype == KL_F32 && out->ndim == ndim &&
                out->device.device_type == kDLCPU && kl_array_dense_from(out, 0);
    for (int i = 0; fits && i < ndim; i++) fits = out->shape[i] == shape[i];
    if (fits) return 0;
    PyErr_Format(PyExc_ValueError,
                 "seq_write_kda: %s must be a dense float32 array of the shape that "
                 "seq_read_kda gives",
                 name);
    return -1;
}

PyObject *kl_engine_py_write_kda(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    EngineObject *self = (EngineObject *)op;
    const kl_module *m = kl_module_of_instance(op);
    kl_array state = {0}, window = {0};
    PyObject *result = NULL;
    kl_seq seq;
    int64_t layer;
    shapes s;
    kl_error err = {KL_OK, ""};
    if (kl_parse_count("seq_write_kda", nargs, 4) < 0 ||
        begin(self, "seq_write_kda", args, &seq, &layer, &s) < 0)
        return NULL;
    if (borrow(m, "state", args[2], 3, s.state, &state) == 0 &&
        borrow(m, "window", args[3], 2, s.window, &window) == 0 && kl_engine_enter(self) == 0)
        result = finish(
            self, kl_seq_write_kda(self->engine, seq, layer, state.data, window.data, &err),
            &err, Py_NewRef(Py_None));
    kl_array_release(&window);
    kl_array_release(&state);
    return result;
}
