/*
 * dlpack_import.c -- arrays that come through DLPack: by the exchange API of their type, or by
 * a capsule from __dlpack__().
 *
 * Both end with a managed tensor that we own until its deleter is called. A capsule is renamed
 * only when everything in it has been checked: until then dropping it lets its own destructor
 * free what it holds.
 */
#include "python/convert.h"

#include <string.h>

/* ---- one DLTensor ---------------------------------------------------------------------- */

static int refuse(const char *op, const char *name, const char *what)
{
    PyErr_Format(PyExc_BufferError, "%s: %s: %s", op, name, what);
    return -1;
}

/* Copy shape and strides; no product or extent in bytes may leave int64. */
static const char *copy_axes(const DLTensor *t, int64_t item, kl_array *out)
{
    int64_t size = item, extent = item, dense = 1, bytes;
    for (int i = t->ndim - 1; i >= 0; i--) {
        const int64_t n = t->shape[i];
        if (n < 0) return "DLPack shape must not be negative";
        const int64_t stride = t->strides == NULL ? dense : t->strides[i];
        if (n > 1 && (__builtin_mul_overflow(n - 1, stride, &bytes) || bytes == INT64_MIN ||
                      __builtin_mul_overflow(bytes < 0 ? -bytes : bytes, item, &bytes) ||
                      __builtin_add_overflow(extent, bytes, &extent)))
            return "DLPack strides must span less than 2^63 bytes";
        if (n > 0 && __builtin_mul_overflow(size, n, &size))
            return "DLPack shape must hold less than 2^63 bytes";
        out->shape[i] = n;
        out->stride[i] = stride;
        dense *= n > 0 ? n : 1;
    }
    return NULL;
}

static const char *check_data(const DLTensor *t, size_t item, kl_array *out)
{
    bool empty = false;
    for (int i = 0; i < t->ndim; i++) empty = empty || t->shape[i] == 0;
    if (t->data == NULL) {
        out->data = NULL;
        return empty ? NULL : "DLPack data must not be NULL";
    }
    uintptr_t address;
    if (__builtin_add_overflow((uintptr_t)t->data, t->byte_offset, &address))
        return "DLPack byte_offset must stay inside memory";
    out->data = (void *)address;
    if (item > 1 && address % item != 0) return "data must be aligned to its item size";
    return NULL;
}

static int view_tensor(const DLTensor *t, const char *op, const char *name, kl_array *out)
{
    const char *wrong = NULL;
    const int item = (t->dtype.bits + 7) / 8;
    if (t->ndim < 0 || t->ndim > KL_ARRAY_NDIM)
        wrong = "DLPack ndim must lie in [0, 8]";
    else if (t->ndim > 0 && t->shape == NULL)
        wrong = "DLPack shape must not be NULL";
    else if (t->dtype.lanes != 1)
        wrong = "DLPack dtype must have one lane";
    else if (item == 0)
        wrong = "DLPack dtype must have bits";
    else
        wrong = copy_axes(t, item, out);
    if (wrong == NULL) wrong = check_data(t, (size_t)item, out);
    if (wrong != NULL) return refuse(op, name, wrong);
    out->ndim = t->ndim;
    out->dtype = t->dtype;
    out->device = t->device;
    return 0;
}

static const char *sealed_by(uint64_t flags)
{
    if (flags & KL_DL_READ_ONLY) return "it is read-only";
    if (flags & KL_DL_IS_COPIED) return "its producer lent a copy";
    return NULL;
}

/* ---- exchange API ---------------------------------------------------------------------- */

/* An attribute of a type, or NULL without an exception. */
static PyObject *find_attribute(PyObject *o, PyObject *name)
{
    PyObject *found = PyObject_GetAttr(o, name);
    if (found == NULL) PyErr_Clear();
    return found;
}

const DLPackExchangeAPI *kl_exchange_of(const kl_module *m, PyTypeObject *type)
{
    PyObject *found = find_attribute((PyObject *)type, m->names.__dlpack_c_exchange_api__);
    if (found == NULL) /* its name and form in 2025 */
        found = find_attribute((PyObject *)type, m->names.__c_dlpack_exchange_api__);
    if (found == NULL) return NULL;

    const DLPackExchangeAPIHeader *header = NULL;
    if (PyCapsule_IsValid(found, KL_CAPSULE_EXCHANGE))
        header = PyCapsule_GetPointer(found, KL_CAPSULE_EXCHANGE);
    else if (PyLong_Check(found))
        header = PyLong_AsVoidPtr(found);
    PyErr_Clear();
    Py_DECREF(found); /* the table itself lives as long as the process */
    while (header != NULL && header->version.major != KL_DLPACK_MAJOR)
        header = header->prev_api;
    return (const DLPackExchangeAPI *)header; /* its first member */
}

/* A tensor under autograd: its own __dlpack__ knows how to say that this cannot be. */
static bool has_gradient(const kl_module *m, PyObject *o)
{
    PyObject *found = find_attribute(o, m->names.requires_grad);
    const bool yes = found == Py_True;
    Py_XDECREF(found);
    return yes;
}

int kl_exchange_device(const kl_module *m, PyObject *o, DLDevice *out)
{
    const DLPackExchangeAPI *api = kl_exchange_of(m, Py_TYPE(o));
    DLTensor view;
    if (api == NULL || api->dltensor_from_py_object_no_sync == NULL) return 0;
    if (api->dltensor_from_py_object_no_sync(o, &view) != 0) {
        PyErr_Clear(); /* __dlpack_device__() may still know */
        return 0;
    }
    *out = view.device;
    return 1;
}

int kl_exchange_borrow(const kl_module *m, const char *op, const char *name, PyObject *o,
                       kl_array *out)
{
    const DLPackExchangeAPI *api = kl_exchange_of(m, Py_TYPE(o));
    if (api == NULL || api->managed_tensor_from_py_object_no_sync == NULL || has_gradient(m, o))
        return 0;
    /* Managed, not the cheaper view: only it says whether the array may be written to, and a
     * view need not outlive the next time that Python runs, which it does while we compute. */
    DLManagedTensorVersioned *managed = NULL;
    if (api->managed_tensor_from_py_object_no_sync(o, &managed) != 0 || managed == NULL)
        return PyErr_Occurred() ? -1 : refuse(op, name, "its exchange API gave no tensor");
    out->managed = managed;
    if (managed->version.major != KL_DLPACK_MAJOR)
        return refuse(op, name, "its DLPack version is not 1.x");
    out->sealed = sealed_by(managed->flags);
    return view_tensor(&managed->dl_tensor, op, name, out) < 0 ? -1 : 1;
}

/* ---- capsules -------------------------------------------------------------------------- */

static int consume_versioned(PyObject *capsule, const char *op, const char *name, kl_array *out)
{
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, KL_CAPSULE_VERSIONED);
    if (managed == NULL) return -1;
    if (managed->version.major != KL_DLPACK_MAJOR) {
        /* Of another major only the place of the deleter is known: free it, touch nothing. */
        const DLPackVersion version = managed->version;
        if (PyCapsule_SetName(capsule, KL_CAPSULE_VERSIONED_USED) < 0) return -1;
        if (managed->deleter != NULL) managed->deleter(managed);
        PyErr_Format(PyExc_BufferError, "%s: %s: its DLPack version must be 1.x, got %u.%u", op,
                     name, version.major, version.minor);
        return -1;
    }
    if (view_tensor(&managed->dl_tensor, op, name, out) < 0) return -1;
    if (PyCapsule_SetName(capsule, KL_CAPSULE_VERSIONED_USED) < 0) return -1;
    out->sealed = sealed_by(managed->flags);
    out->managed = managed;
    return 1;
}

static int consume_legacy(PyObject *capsule, const char *op, const char *name, kl_array *out)
{
    DLManagedTensor *managed = PyCapsule_GetPointer(capsule, KL_CAPSULE_LEGACY);
    if (managed == NULL) return -1;
    if (view_tensor(&managed->dl_tensor, op, name, out) < 0) return -1;
    if (PyCapsule_SetName(capsule, KL_CAPSULE_LEGACY_USED) < 0) return -1;
    out->sealed = "its DLPack capsule is of the old kind, which cannot say that it is writable";
    out->legacy = managed;
    return 1;
}

static bool has_streams(DLDevice device)
{
    return device.device_type == kDLCUDA || device.device_type == kDLCUDAManaged;
}

/* o.__dlpack__(max_version=..., stream=...), again without max_version for old producers. */
static PyObject *request_capsule(const kl_module *m, PyObject *method, bool with_stream,
                                 intptr_t stream)
{
    PyObject *none = PyTuple_New(0), *options = PyDict_New(), *result = NULL;
    PyObject *version = Py_BuildValue("(ii)", KL_DLPACK_MAJOR, KL_DLPACK_MINOR);
    PyObject *number = PyLong_FromSsize_t(stream);
    if (none == NULL || options == NULL || version == NULL || number == NULL) goto done;
    if (with_stream && PyDict_SetItem(options, m->names.stream, number) < 0) goto done;
    if (PyDict_SetItem(options, m->names.max_version, version) < 0) goto done;
    result = PyObject_Call(method, none, options);
    if (result == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        if (PyDict_DelItem(options, m->names.max_version) < 0) goto done;
        result = PyObject_Call(method, none, options);
    }
done:
    Py_XDECREF(none);
    Py_XDECREF(options);
    Py_XDECREF(version);
    Py_XDECREF(number);
    return result;
}

int kl_dlpack_device(const kl_module *m, PyObject *o, DLDevice *out)
{
    PyObject *method = find_attribute(o, m->names.__dlpack_device__);
    if (method == NULL) return 0;
    int type, id, result = -1;
    PyObject *pair = PyObject_CallNoArgs(method);
    if (pair != NULL && !PyTuple_Check(pair))
        PyErr_SetString(PyExc_BufferError, "__dlpack_device__() must return a tuple");
    else if (pair != NULL && PyArg_ParseTuple(pair, "ii", &type, &id)) {
        *out = (DLDevice){type, id};
        result = 1;
    }
    Py_DECREF(method);
    Py_XDECREF(pair);
    return result;
}

/* A refused capsule frees its tensor, which may run Python: the exception must survive that. */
static void drop_quietly(PyObject *capsule)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    Py_XDECREF(capsule);
    PyErr_Restore(type, value, trace);
}

int kl_dlpack_borrow(const kl_module *m, const char *op, const char *name, PyObject *o,
                     intptr_t stream, kl_array *out)
{
    PyObject *method = find_attribute(o, m->names.__dlpack__);
    if (method == NULL) return 0;
    int result = -1;
    PyObject *capsule = NULL;
    DLDevice device = {kDLCPU, 0};
    if (kl_dlpack_device(m, o, &device) >= 0)
        capsule = request_capsule(m, method, has_streams(device), stream);
    if (capsule == NULL)
        result = -1;
    else if (PyCapsule_IsValid(capsule, KL_CAPSULE_VERSIONED))
        result = consume_versioned(capsule, op, name, out);
    else if (PyCapsule_IsValid(capsule, KL_CAPSULE_LEGACY))
        result = consume_legacy(capsule, op, name, out);
    else
        refuse(op, name,
               "__dlpack__() must return a fresh DLPack capsule (a used one, or "
               "something else, came)");
    Py_DECREF(method);
    drop_quietly(capsule);
    return result;
}
