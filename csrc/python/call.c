/*
 * call.c -- the arguments of an operation's call.
 */
#include "python/call.h"

#include "base/memory.h"

#include <stddef.h>
#include <string.h>

/* ---- tables ---------------------------------------------------------------------------- */

static void table_init(kl_table *t, void *first, size_t item_bytes)
{
    *t = (kl_table){.items = first, .item_bytes = item_bytes, .room = KL_CALL_INLINE};
}

/* A place for one more item, not yet counted; NULL with an exception. */
static void *table_next(kl_table *t)
{
    if (t->n == t->room) {
        const size_t bytes = (size_t)t->room * t->item_bytes;
        void *grown = kl_malloc(2 * bytes);
        if (grown == NULL) return PyErr_NoMemory();
        memcpy(grown, t->items, bytes);
        if (t->on_heap) kl_free(t->items);
        t->items = grown;
        t->room *= 2;
        t->on_heap = true;
    }
    return (char *)t->items + (size_t)t->n * t->item_bytes;
}

static void table_end(kl_table *t)
{
    if (t->on_heap) kl_free(t->items);
}

/* ---- life ------------------------------------------------------------------------------ */

/* On failure nothing has to be ended. */
static int begin(kl_call *c, PyObject *module, const char *op, PyObject *backend,
                 PyObject *stream)
{
    /* The inline parts need no clearing: the tables say what is in them. */
    memset(c, 0, offsetof(kl_call, first_arrays));
    table_init(&c->arrays, c->first_arrays, sizeof *c->first_arrays);
    table_init(&c->spans, c->first_spans, sizeof *c->first_spans);
    table_init(&c->blocks, c->first_blocks, sizeof *c->first_blocks);
    c->m = kl_module_of(module);
    c->op = op;
    c->dev = kl_device_of(c->m, backend);
    if (c->dev == NULL) return -1;
    if (stream != Py_None) {
        int64_t value;
        if (kl_parse_int(op, "stream", stream, 0, INT64_MAX, &value) < 0) return -1;
        c->stream = (void *)(intptr_t)value;
        c->stream_given = true;
    }
    c->backend = Py_NewRef(backend);
    return 0;
}

static void drop_output(kl_output *out)
{
    if (out->managed != NULL && out->managed->deleter != NULL)
        out->managed->deleter(out->managed);
    Py_XDECREF(out->object);
}

static void end(kl_call *c)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace); /* dropping arrays may run Python */
    for (int i = 0; i < c->n_outputs; i++) drop_output(&c->outputs[i]);
    while (c->n_device_blocks > 0) kl_call_give_back(c);
    for (int i = 0; i < c->arrays.n; i++) kl_array_release((kl_array *)c->arrays.items + i);
    for (int i = 0; i < c->blocks.n; i++) kl_free(((void **)c->blocks.items)[i]);
    table_end(&c->arrays);
    table_end(&c->spans);
    table_end(&c->blocks);
    Py_XDECREF(c->like);
    Py_XDECREF(c->descr);
    Py_XDECREF(c->backend);
    PyErr_Restore(type, value, trace);
}

PyObject *kl_call_python(PyObject *module, const char *op, PyObject *const *args,
                         Py_ssize_t nargs, Py_ssize_t count, bool streams, kl_run_fn run)
{
    kl_call c;
    if (kl_parse_count(op, nargs, count) < 0 ||
        begin(&c, module, op, args[0], streams ? args[count - 1] : Py_None) < 0)
        return NULL;
    PyObject *result = run(&c, args);
    end(&c);
    return result;
}

int kl_call_lacks(const kl_call *c)
{
    PyErr_Format(c->m->DeviceError, "%s: the %s backend does not have it", c->op,
                 c->dev->be->vt->name);
    return -1;
}

int kl_call_keep(kl_call *c, void *block)
{
    void **place = table_next(&c->blocks);
    if (place == NULL) {
        kl_free(block);
        return -1;
    }
    *place = block;
    c->blocks.n++;
    return 0;
}

void *kl_call_malloc(kl_call *c, size_t bytes)
{
    void *block = kl_aligned_alloc(bytes);
    if (block == NULL) {
        PyErr_Format(c->m->OutOfMemory, "%s: no memory for %zu bytes", c->op, bytes);
        return NULL;
    }
    return kl_call_keep(c, block) < 0 ? NULL : block;
}

/* ---- one array ------------------------------------------------------------------------- */

/* The first array decides what outputs are. */
static void learn_family(kl_call *c, PyObject *o, const kl_array *a)
{
    c->like = Py_NewRef(o);
    if (kl_numpy_check(o) || a->has_buffer)
        c->family = KL_FROM_NUMPY;
    else if ((c->api = kl_exchange_of(c->m, Py_TYPE(o))) != NULL)
        c->family = KL_FROM_EXCHANGE;
    else
        c->family = KL_FROM_OTHER;
}

/* The caller's stream, from its framework, when it was not given. */
static int learn_stream(kl_call *c, const kl_array *a)
{
    if (c->stream_given || a->device.device_type != kDLCUDA || c->api == NULL ||
        c->api->current_work_stream == NULL)
        return 0;
    if (c->api->current_work_stream(a->device.device_type, a->device.device_id, &c->stream) !=
        0)
        return -1;
    c->stream_given = c->stream_is_current = true;
    return 0;
}

static int check_device(const kl_call *c, const char *name, const kl_array *a)
{
    const int type = a->device.device_type;
    char got[32];
    if (c->dev->is_cpu ? type == kDLCPU || type == kDLCUDAHost || type == kDLCUDAManaged
                       : (type == kDLCUDA && a->device.device_id == c->dev->index) ||
                             type == kDLCUDAManaged)
        return 0;
    if (c->dev->is_cpu)
        PyErr_Format(PyExc_ValueError, "%s: %s must be on the cpu, got %s", c->op, name,
                     kl_device_describe(a->device, got));
    else
        PyErr_Format(PyExc_ValueError, "%s: %s must be on %s:%d, got %s", c->op, name,
                     c->dev->be->vt->name, c->dev->index, kl_device_describe(a->device, got));
    return -1;
}

/* Borrow o as the call's next array. */
static kl_array *borrow(kl_call *c, const char *name, PyObject *o)
{
    kl_array *a = table_next(&c->arrays);
    if (a == NULL) return NULL;
    /* DLPack's 1: the legacy default stream, which is also what a NULL stream means. */
    const intptr_t stream = c->stream == NULL ? 1 : (intptr_t)c->stream;
    if (kl_array_borrow(c->m, c->op, name, o, stream, a) < 0) return NULL;
    c->arrays.n++;
    if (c->like == NULL) learn_family(c, o, a);
    if (check_device(c, name, a) < 0 || learn_stream(c, a) < 0) return NULL;
    return a;
}

static int refuse_dtype(const kl_call *c, const char *name, const kl_array *a, unsigned dtypes)
{
    char wanted[64] = "", got[32];
    for (int i = 0, used = 0; i < KL_N_DTYPES; i++)
        if ((dtypes & KL_SET(i)) != 0)
            used += PyOS_snprintf(wanted + used, sizeof wanted - (size_t)used, "%s%s",
                                  used == 0 ? "" : " or ", kl_dtype_name((kl_dtype)i));
    PyErr_Format(PyExc_TypeError, "%s: %s must be %s, got %s", c->op, name, wanted,
                 kl_dtype_describe(a->dtype, got));
    return -1;
}

static PyObject *shape_tuple(const int64_t *shape, int ndim)
{
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; tuple != NULL && i < ndim; i++) {
        PyObject *n = PyLong_FromLongLong(shape[i]);
        if (n == NULL || PyTuple_SetItem(tuple, i, n) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

static int refuse_ndim(const kl_call *c, const char *name, const kl_array *a, int ndim)
{
    PyObject *shape = shape_tuple(a->shape, a->ndim);
    if (shape != NULL)
        PyErr_Format(PyExc_ValueError, "%s: %s must have %d axes, got shape %R", c->op, name,
                     ndim, shape);
    Py_XDECREF(shape);
    return -1;
}

/* Remember bf16's NumPy descriptor, so that outputs can have it too. */
static void learn_descr(kl_call *c, const kl_array *a, kl_dtype dtype)
{
    if (dtype == KL_BF16 && c->descr == NULL) c->descr = kl_numpy_descr(a->owner);
}

static int note_span(kl_call *c, const char *name, const kl_array *a, bool written)
{
    kl_span *span = table_next(&c->spans);
    if (span == NULL) return -1;
    const int64_t item = a->dtype.bits / 8;
    int64_t below = 0, above = item;
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] == 0) return 0;
        const int64_t reach = (a->shape[i] - 1) * a->stride[i] * item;
        if (reach < 0)
            below += reach;
        else
            above += reach;
    }
    *span = (kl_span){name, (const char *)a->data + below, (const char *)a->data + above,
                      written, NULL};
    c->spans.n++;
    return 0;
}

/* Replace a strided array by a dense copy of it. */
static int make_dense(kl_call *c, const char *name, kl_array *a)
{
    if (!c->dev->is_cpu) {
        PyErr_Format(PyExc_BufferError, "%s: %s must be dense (C-contiguous) on a GPU", c->op,
                     name);
        return -1;
    }
    size_t bytes = a->dtype.bits / 8u;
    bool fits = true;
    for (int i = 0; i < a->ndim; i++)
        fits = fits && kl_mul_size(bytes, (size_t)a->shape[i], &bytes);
    void *copy = kl_call_malloc(c, fits ? bytes : SIZE_MAX / 2);
    if (copy == NULL) return -1;
    Py_BEGIN_ALLOW_THREADS kl_array_copy_dense(a, copy);
    Py_END_ALLOW_THREADS a->data = copy;
    int64_t dense = 1;
    for (int i = a->ndim - 1; i >= 0; i--) {
        a->stride[i] = dense;
        dense *= a->shape[i];
    }
    return 0;
}

static int check_writable(const kl_call *c, const char *name, const kl_array *a)
{
    if (a->sealed != NULL)
        PyErr_Format(PyExc_BufferError, "%s: %s must be writable, but %s", c->op, name,
                     a->sealed);
    else if (!kl_array_dense_from(a, 0))
        PyErr_Format(PyExc_BufferError, "%s: %s is written to and must be dense (C-contiguous)",
                     c->op, name);
    else
        return 0;
    return -1;
}

static int settle_layout(kl_call *c, const char *name, kl_array *a, kl_layout layout)
{
    if (layout == KL_INPLACE) {
        if (check_writable(c, name, a) < 0) return -1;
        return note_span(c, name, a, true);
    }
    const bool rows = layout == KL_ROWS && a->ndim > 1 && a->stride[0] > 0;
    if (!kl_array_dense_from(a, rows ? 1 : 0)) return make_dense(c, name, a);
    return note_span(c, name, a, false);
}

/* A view with canonical strides: axes of length 1 may carry any. */
static kl_tensor tensor_of(const kl_array *a, kl_dtype dtype, kl_layout layout)
{
    kl_tensor t = kl_tensor_dense(a->data, dtype, a->ndim, a->shape);
    if (layout == KL_ROWS && a->ndim > 1 && a->shape[0] > 1) t.stride[0] = a->stride[0];
    return t;
}

int kl_arg(kl_call *c, const char *name, PyObject *o, unsigned dtypes, int ndim,
           kl_layout layout, kl_tensor *out)
{
    kl_dtype dtype;
    kl_array *a = borrow(c, name, o);
    if (a == NULL) return -1;
    if (!kl_dtype_from_dl(a->dtype, &dtype) || (dtypes & KL_SET(dtype)) == 0)
        return refuse_dtype(c, name, a, dtypes);
    if (a->ndim != ndim) return refuse_ndim(c, name, a, ndim);
    learn_descr(c, a, dtype);
    if (settle_layout(c, name, a, layout) < 0) return -1;
    *out = tensor_of(a, dtype, layout);
    return 0;
}

int kl_arg_opt(kl_call *c, const char *name, PyObject *o, unsigned dtypes, int ndim,
               kl_layout layout, kl_tensor *out)
{
    return o == Py_None ? 0 : kl_arg(c, name, o, dtypes, ndim, layout, out);
}

/* Whether axes 0 .. ndim-2 step evenly, so that they are one axis; its stride. */
static bool rows_merge(const kl_array *a, int64_t *stride)
{
    int64_t next = 0;
    for (int i = a->ndim - 2; i >= 0; i--) {
        if (a->shape[i] == 1) continue;
        if (next == 0)
            *stride = a->stride[i];
        else if (a->stride[i] != next)
            return false;
        next = a->stride[i] * a->shape[i];
    }
    return true;
}

int kl_arg_rows(kl_call *c, const char *name, PyObject *o, kl_tensor *out, int64_t *shape,
                int *ndim)
{
    kl_dtype dtype;
    kl_array *a = borrow(c, name, o);
    if (a == NULL) return -1;
    if (!kl_dtype_from_dl(a->dtype, &dtype) || (KL_FLOATS & KL_SET(dtype)) == 0)
        return refuse_dtype(c, name, a, KL_FLOATS);
    if (a->ndim < 1 || a->ndim > KL_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have 1 to %d axes, got %d", c->op, name,
                     KL_MAX_NDIM, a->ndim);
        return -1;
    }
    learn_descr(c, a, dtype);

    int64_t rows = 1, stride = 0;
    const int64_t width = a->shape[a->ndim - 1];
    for (int i = 0; i < a->ndim - 1; i++) rows *= a->shape[i];
    *ndim = a->ndim;
    memcpy(shape, a->shape, sizeof(int64_t) * (size_t)a->ndim);
    const bool strided =
        kl_array_dense_from(a, a->ndim - 1) && rows_merge(a, &stride) && stride > 0;
    if ((strided ? note_span(c, name, a, false) : settle_layout(c, name, a, KL_DENSE)) < 0)
        return -1;
    *out = kl_tensor_2d(a->data, dtype, rows, width);
    if (strided) out->stride[0] = stride;
    return 0;
}
