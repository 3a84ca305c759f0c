/*
 * call_out.c -- the outputs of an operation's call, and running it.
 *
 * A new output comes from the framework of the first array: NumPy's allocator, the allocator of
 * a type with the DLPack exchange API (so that torch's caching and stream order hold), or our
 * own Array handed over by that framework's from_dlpack.
 */
#include "python/call.h"

#include "base/memory.h"

#include <string.h>

/* ---- new outputs ----------------------------------------------------------------------- */

static void set_error(void *ctx, const char *kind, const char *message)
{
    const kl_call *c = ctx;
    PyErr_Format(strcmp(kind, "MemoryError") == 0 ? c->m->OutOfMemory : PyExc_BufferError,
                 "%s: %s: %s", c->op, kind, message);
}

int kl_call_new_managed(kl_call *c, DLDataType dtype, int ndim, const int64_t *shape,
                        DLManagedTensorVersioned **out)
{
    int64_t copy[KL_ARRAY_NDIM];
    memcpy(copy, shape, sizeof(int64_t) * (size_t)ndim);
    DLTensor prototype = {
        .device = {c->dev->is_cpu ? kDLCPU : kDLCUDA, c->dev->is_cpu ? 0 : c->dev->index},
        .ndim = ndim,
        .dtype = dtype,
        .shape = copy,
    };
    DLManagedTensorVersioned *managed = NULL;
    if (c->api->managed_tensor_allocator(&prototype, &managed, c, set_error) != 0) {
        if (!PyErr_Occurred())
            PyErr_Format(c->m->OutOfMemory, "%s: the framework has no memory", c->op);
        return -1;
    }
    *out = managed;
    return 0;
}

static int new_output(kl_call *c, DLDataType dtype, int ndim, const int64_t *shape,
                      kl_output *out, void **data)
{
    if (c->family == KL_FROM_EXCHANGE && c->api->managed_tensor_allocator != NULL &&
        c->api->managed_tensor_to_py_object_no_sync != NULL) {
        if (kl_call_new_managed(c, dtype, ndim, shape, &out->managed) < 0) return -1;
        *data = kl_managed_data(out->managed);
        return 0;
    }
    if (c->family == KL_FROM_NUMPY && c->dev->is_cpu)
        out->object = kl_numpy_new(dtype, c->descr, ndim, shape, data);
    else
        out->object = kl_array_object_new(c->m, c->dev, dtype, ndim, shape, data);
    return out->object == NULL ? -1 : 0;
}

static int add_new(kl_call *c, DLDataType dtype, int ndim, const int64_t *shape,
                   kl_tensor *view, int *index)
{
    kl_dtype known = KL_U8;
    void *data = NULL;
    kl_output out = {0};
    kl_dtype_from_dl(dtype, &known);
    if (new_output(c, dtype, ndim, shape, &out, &data) < 0) return -1;
    *view = kl_tensor_dense(data, known, ndim, shape);
    *index = c->n_outputs;
    c->outputs[c->n_outputs++] = out;
    return 0;
}

int kl_out_bool(kl_call *c, int ndim, const int64_t *shape, kl_tensor *view, int *index)
{
    return add_new(c, (DLDataType){kDLBool, 8, 1}, ndim, shape, view, index);
}

/* ---- given outputs --------------------------------------------------------------------- */

static int refuse_shape(const kl_call *c, const char *name, int ndim, const int64_t *shape,
                        const kl_tensor *got)
{
    PyObject *wanted = PyTuple_New(ndim), *found = PyTuple_New(ndim);
    for (int i = 0; wanted != NULL && found != NULL && i < ndim; i++) {
        PyObject *a = PyLong_FromLongLong(shape[i]), *b = PyLong_FromLongLong(got->shape[i]);
        if (a == NULL || b == NULL) {
            Py_XDECREF(a);
            Py_XDECREF(b);
            Py_CLEAR(wanted);
            break;
        }
        PyTuple_SetItem(wanted, i, a);
        PyTuple_SetItem(found, i, b);
    }
    if (wanted != NULL && found != NULL)
        PyErr_Format(PyExc_ValueError, "%s: %s must have shape %R, got %R", c->op, name, wanted,
                     found);
    Py_XDECREF(wanted);
    Py_XDECREF(found);
    return -1;
}

static int take_out(kl_call *c, const char *name, PyObject *given, kl_dtype dtype,
                    unsigned dtypes, int ndim, const int64_t *shape, const char *may_be,
                    kl_tensor *view, int *index)
{
    if (given == Py_None) return add_new(c, kl_dtype_to_dl(dtype), ndim, shape, view, index);
    if (kl_arg(c, name, given, dtypes, ndim, KL_INPLACE, view) < 0) return -1;
    for (int i = 0; i < ndim; i++)
        if (view->shape[i] != shape[i]) return refuse_shape(c, name, ndim, shape, view);
    kl_span *spans = c->spans.items;
    if (c->spans.n > 0 && spans[c->spans.n - 1].name == name)
        spans[c->spans.n - 1].may_be = may_be; /* empty arrays have none */
    *index = c->n_outputs;
    c->outputs[c->n_outputs++] = (kl_output){.object = Py_NewRef(given), .given = true};
    return 0;
}

int kl_out(kl_call *c, const char *name, PyObject *given, kl_dtype dtype, int ndim,
           const int64_t *shape, const char *may_be, kl_tensor *view, int *index)
{
    return take_out(c, name, given, dtype, KL_SET(dtype), ndim, shape, may_be, view, index);
}

int kl_out_top(kl_call *c, const int64_t *shape, kl_tensor *ids, kl_tensor *logprobs)
{
    int index; /* the tuple of all outputs is what is returned */
    if (shape[1] == 0) return 0;
    if (kl_out(c, "top_ids", Py_None, KL_I32, 2, shape, NULL, ids, &index) < 0) return -1;
    return kl_out(c, "top_logprobs", Py_None, KL_F32, 2, shape, NULL, logprobs, &index);
}

int kl_out_or_f32(kl_call *c, const char *name, PyObject *given, kl_dtype dtype, int ndim,
                  const int64_t *shape, kl_tensor *view, int *index)
{
    return take_out(c, name, given, dtype, KL_SET(dtype) | KL_SET(KL_F32), ndim, shape, NULL,
                    view, index);
}

/* ---- handing over ---------------------------------------------------------------------- */

/* The function of the first array's framework that takes DLPack, or NULL (no exception). */
static PyObject *find_importer(const kl_call *c)
{
    PyObject *space = NULL,
             *method = PyObject_GetAttr(c->like, c->m->names.__array_namespace__);
    if (method != NULL)
        space = PyObject_CallNoArgs(method);
    else {
        PyErr_Clear(); /* then the package that its type comes from, as in torch before 2.10 */
        PyObject *name = PyObject_GetAttr((PyObject *)Py_TYPE(c->like), c->m->names.__module__);
        PyObject *parts =
            name == NULL ? NULL : PyObject_CallMethod(name, "partition", "s", ".");
        PyObject *package = parts == NULL ? NULL : PySequence_GetItem(parts, 0);
        if (package != NULL)
            space = Py_XNewRef(PyDict_GetItemWithError(PyImport_GetModuleDict(), package));
        Py_XDECREF(name);
        Py_XDECREF(parts);
        Py_XDECREF(package);
    }
    PyObject *importer =
        space == NULL ? NULL : PyObject_GetAttr(space, c->m->names.from_dlpack);
    PyErr_Clear();
    Py_XDECREF(method);
    Py_XDECREF(space);
    return importer;
}

static PyObject *hand_over(kl_call *c, PyObject *ours)
{
    PyObject *importer = find_importer(c);
    if (importer == NULL) return Py_NewRef(ours);
    PyObject *theirs = PyObject_CallFunctionObjArgs(importer, ours, NULL);
    Py_DECREF(importer);
    return theirs;
}

PyObject *kl_out_take(kl_call *c, int index)
{
    kl_output *out = &c->outputs[index];
    if (out->managed != NULL) {
        void *object = NULL;
        if (c->api->managed_tensor_to_py_object_no_sync(out->managed, &object) != 0)
            return NULL;
        out->managed = NULL; /* the framework's now */
        return object;
    }
    if (out->given || c->family == KL_FROM_NUMPY) return Py_NewRef(out->object);
    return hand_over(c, out->object);
}

PyObject *kl_out_take_all(kl_call *c)
{
    PyObject *tuple = PyTuple_New(c->n_outputs);
    for (int i = 0; tuple != NULL && i < c->n_outputs; i++) {
        PyObject *one = kl_out_take(c, i);
        if (one == NULL || PyTuple_SetItem(tuple, i, one) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

/* ---- running --------------------------------------------------------------------------- */

/* Work goes to the caller's stream from here until unlock. */
static kl_status lock_stream(kl_call *c, kl_error *err)
{
    kl_backend *be = c->dev->be;
    if (be->vt->set_stream == NULL) return KL_OK;
    pthread_mutex_lock(&c->dev->lock);
    const kl_status status = be->vt->set_stream(be, c->stream, err);
    if (status != KL_OK) pthread_mutex_unlock(&c->dev->lock);
    return status;
}

static void unlock_stream(kl_call *c)
{
    if (c->dev->be->vt->set_stream != NULL) pthread_mutex_unlock(&c->dev->lock);
}

/* Wait where nobody else orders what follows: for memory that is given back with the call, and
 * for frameworks that cannot tell their stream and take our arrays. */
static kl_status settle(kl_call *c, kl_error *err)
{
    kl_backend *be = c->dev->be;
    bool ordered = be->vt->set_stream != NULL && c->family == KL_FROM_EXCHANGE;
    for (int i = 0; i < c->n_device_blocks; i++)
        ordered = ordered && c->device_blocks[i].managed != NULL;
    return c->dev->is_cpu || ordered ? KL_OK : be->vt->sync(be, err);
}

static kl_status copy_rows(kl_backend *be, const kl_tensor *dst, const kl_tensor *src,
                           kl_error *err)
{
    const size_t item = kl_dtype_bytes(dst->dtype), row = (size_t)src->shape[1] * item;
    for (int64_t i = 0; i < src->shape[0]; i++)
        KL_TRY(be->vt->copy(be, (char *)dst->data + (size_t)i * row,
                            (char *)src->data + (size_t)(i * src->stride[0]) * item, row, err));
    return KL_OK;
}

static kl_status send(kl_call *c, void *dst, const void *src, size_t bytes, kl_error *err)
{
    KL_TRY(lock_stream(c, err));
    const kl_status status = c->dev->be->vt->copy_in(c->dev->be, dst, src, bytes, err);
    unlock_stream(c);
    return status;
}

static kl_status wait(kl_call *c, kl_error *err)
{
    KL_TRY(lock_stream(c, err));
    const kl_status status = c->dev->be->vt->sync(c->dev->be, err);
    unlock_stream(c);
    return status;
}

static kl_status fill(kl_call *c, const kl_tensor *dst, const kl_tensor *src, kl_error *err)
{
    kl_backend *be = c->dev->be;
    const size_t bytes = (size_t)kl_tensor_size(dst) * kl_dtype_bytes(dst->dtype);
    if (bytes == 0) return KL_OK;
    KL_TRY(lock_stream(c, err));
    kl_status status = KL_OK;
    if (kl_tensor_absent(src))
        status = be->vt->zero(be, dst->data, bytes, err);
    else if (src->ndim != 2 || src->stride[0] == src->shape[1])
        status = be->vt->copy(be, dst->data, src->data, bytes, err);
    else
        status = copy_rows(be, dst, src, err);
    unlock_stream(c);
    return status;
}

static int finish(const kl_call *c, kl_status status, const kl_error *err)
{
    if (status == KL_OK) return 0;
    kl_raise(c->m, err);
    return -1;
}

int kl_call_fill(kl_call *c, const kl_tensor *dst, const kl_tensor *src)
{
    kl_error err = {KL_OK, ""};
    kl_status status;
    Py_BEGIN_ALLOW_THREADS status = fill(c, dst, src, &err);
    Py_END_ALLOW_THREADS return finish(c, status, &err);
}

int kl_call_send(kl_call *c, void **data, size_t bytes)
{
    kl_error err = {KL_OK, ""};
    kl_status status;
    void *there;
    if (c->dev->is_cpu) return 0;
    if (kl_call_alloc(c, bytes, &there) < 0) return -1;
    Py_BEGIN_ALLOW_THREADS status = send(c, there, *data, bytes, &err);
    Py_END_ALLOW_THREADS *data = there;
    return finish(c, status, &err);
}

int kl_call_sync(kl_call *c)
{
    kl_error err = {KL_OK, ""};
    kl_status status;
    Py_BEGIN_ALLOW_THREADS status = wait(c, &err);
    Py_END_ALLOW_THREADS return finish(c, status, &err);
}

static bool allowed_pair(const kl_span *a, const kl_span *b)
{
    return a->may_be != NULL && strcmp(a->may_be, b->name) == 0 && a->lo == b->lo &&
           a->hi == b->hi;
}

/* What is written may not share memory with anything else of the call, save for the pairs that
 * ops.h allows. Ranges, so interleaved views of one block are refused too. */
static int refuse_overlaps(const kl_call *c)
{
    const kl_span *spans = c->spans.items;
    for (int i = 0; i < c->spans.n; i++) {
        const kl_span *w = &spans[i];
        for (int j = 0; w->written && j < c->spans.n; j++) {
            const kl_span *s = &spans[j];
            if (i == j || w->lo >= s->hi || s->lo >= w->hi) continue;
            if (allowed_pair(w, s) || allowed_pair(s, w)) continue;
            PyErr_Format(PyExc_ValueError, "%s: %s must not share memory with %s", c->op,
                         w->name, s->name);
            return -1;
        }
    }
    return 0;
}

/* Checked before the workspace is asked for: its size is defined for checked arguments only. */
#define KL_DEFINE(name)                                                                        \
    static kl_status run_##name(kl_call *c, kl_##name *a, kl_error *err)                       \
    {                                                                                          \
        KL_TRY(lock_stream(c, err));                                                           \
        kl_status status = kl_run_##name(c->dev->be, a, err);                                  \
        if (status == KL_OK) status = settle(c, err);                                          \
        unlock_stream(c);                                                                      \
        return status;                                                                         \
    }                                                                                          \
    int kl_call_##name(kl_call *c, kl_##name *a)                                               \
    {                                                                                          \
        kl_error err = {KL_OK, ""};                                                            \
        if (refuse_overlaps(c) < 0) return -1;                                                 \
        kl_status status = kl_check_##name(a, &err);                                           \
        if (status != KL_OK) return finish(c, status, &err);                                   \
        a->ws = (kl_workspace){NULL, kl_workspace_##name(c->dev->be, a)};                      \
        if (a->ws.bytes != 0 && kl_call_alloc(c, a->ws.bytes, &a->ws.data) < 0) return -1;     \
        Py_BEGIN_ALLOW_THREADS status = run_##name(c, a, &err);                                \
        Py_END_ALLOW_THREADS if (a->ws.bytes != 0) kl_call_give_back(c);                       \
        return finish(c, status, &err);                                                        \
    }
KL_OPS(KL_DEFINE)
#undef KL_DEFINE
