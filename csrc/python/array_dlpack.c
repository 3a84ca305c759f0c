/*
 * array_dlpack.c -- an Array's __dlpack__(), and the exchange API on its type.
 */
#include "python/array_object.h"

#include "base/memory.h"

#include <string.h>

/* ---- __dlpack__ ------------------------------------------------------------------------ */

uint64_t kl_array_flags(const ArrayObject *self)
{
    return self->block->foreign == NULL ? 0 : self->block->foreign->flags;
}

static kl_status fill_copy(const ArrayObject *self, void *dst, size_t bytes, kl_error *err)
{
    if (bytes == 0) return KL_OK;
    if (self->view.device.device_type == kDLCUDA) {
        kl_device *dev = self->block->dev;
        if (dev == NULL)
            return kl_fail(err, KL_ERR_UNAVAILABLE, "array: memory of another library");
        KL_TRY(dev->be->vt->copy_out(dev->be, dst, self->view.data, bytes, err));
        return dev->be->vt->sync(dev->be, err);
    }
    kl_array from = {.data = (char *)self->view.data + self->view.byte_offset,
                     .dtype = self->view.dtype,
                     .ndim = self->view.ndim};
    memcpy(from.shape, self->shape, sizeof from.shape);
    memcpy(from.stride, self->strides, sizeof from.stride);
    kl_array_copy_dense(&from, dst);
    return KL_OK;
}

/* A dense copy in host memory, lent at once. */
static PyObject *capsule_of_copy(PyObject *op, bool versioned)
{
    const ArrayObject *self = (ArrayObject *)op;
    int64_t shape[KL_ARRAY_NDIM], strides[KL_ARRAY_NDIM];
    size_t bytes;
    kl_block *block = NULL;
    kl_error err = {KL_OK, ""};
    if (!kl_dense_bytes(self->view.dtype, self->view.ndim, self->shape, &bytes))
        return PyErr_NoMemory();
    if (kl_block_new(NULL, bytes, &block, &err) != KL_OK ||
        fill_copy(self, block->data, bytes, &err) != KL_OK) {
        kl_block_unref(block);
        return kl_raise(kl_module_of_instance(op), &err);
    }
    DLTensor view = {.data = block->data, .device = {kDLCPU, 0}, .dtype = self->view.dtype};
    kl_dl_set_dense(&view, shape, strides, self->view.ndim, self->shape);
    PyObject *capsule = kl_block_capsule(block, &view, versioned, KL_DL_IS_COPIED);
    kl_block_unref(block);
    return capsule;
}

/* What __dlpack__ was asked for. */
typedef struct {
    bool versioned, copy;
} request;

static int parse_version(PyObject *max_version, request *out)
{
    int major, minor;
    if (max_version == Py_None) return 0;
    if (!PyTuple_Check(max_version) || !PyArg_ParseTuple(max_version, "ii", &major, &minor)) {
        PyErr_Format(PyExc_TypeError, "__dlpack__: max_version must be two ints, got %R",
                     max_version);
        return -1;
    }
    out->versioned = major >= KL_DLPACK_MAJOR;
    return 0;
}

/* Copy where it is asked for or where another device is; BufferError where that cannot be. */
static int parse_copy(const DLTensor *view, PyObject *dl_device, PyObject *copy, request *out)
{
    const bool forced = copy == Py_True, host = view->device.device_type == kDLCPU;
    int type = view->device.device_type, id = view->device.device_id;
    if (dl_device != Py_None &&
        (!PyTuple_Check(dl_device) || !PyArg_ParseTuple(dl_device, "ii", &type, &id))) {
        PyErr_Format(PyExc_TypeError, "__dlpack__: dl_device must be two ints, got %R",
                     dl_device);
        return -1;
    }
    const bool moved = type != view->device.device_type || id != view->device.device_id;
    if ((moved && (type != kDLCPU || copy == Py_False)) || (forced && !host && !moved)) {
        PyErr_SetString(PyExc_BufferError, "__dlpack__: copies are made in host memory only");
        return -1;
    }
    out->copy = forced || moved;
    return 0;
}

/* There is nothing to order: whoever made an Array on a GPU waited for what fills it. */
static int check_stream(const DLTensor *view, PyObject *stream)
{
    if (stream == Py_None) return 0;
    const long long value = PyLong_AsLongLong(stream);
    if (value == -1 && PyErr_Occurred()) return -1;
    if (view->device.device_type == kDLCUDA && (value == -1 || value > 0)) return 0;
    PyErr_Format(PyExc_BufferError, "__dlpack__: stream %R is not one of this device", stream);
    return -1;
}

PyObject *kl_array_dlpack(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
    const ArrayObject *self = (ArrayObject *)op;
    request r = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream,
                                     &version, &device, &copy))
        return NULL;
    if (parse_version(version, &r) < 0 || parse_copy(&self->view, device, copy, &r) < 0 ||
        check_stream(&self->view, stream) < 0)
        return NULL;
    if (r.copy) return capsule_of_copy(op, r.versioned);
    if (!r.versioned && (kl_array_flags(self) & KL_DL_READ_ONLY)) {
        PyErr_SetString(PyExc_BufferError,
                        "__dlpack__: a read-only array needs max_version=(1, 0) or later");
        return NULL;
    }
    return kl_block_capsule(self->block, &self->view, r.versioned, kl_array_flags(self));
}

PyObject *kl_array_dlpack_device(PyObject *op, PyObject *Py_UNUSED(none))
{
    const DLDevice device = ((ArrayObject *)op)->view.device;
    return Py_BuildValue("(ii)", (int)device.device_type, (int)device.device_id);
}

/* ---- the exchange API ------------------------------------------------------------------ */

static int exchange_allocate(DLTensor *prototype, DLManagedTensorVersioned **out,
                             void *error_ctx,
                             void (*set_error)(void *, const char *, const char *))
{
    int64_t shape[KL_ARRAY_NDIM], strides[KL_ARRAY_NDIM];
    size_t bytes;
    kl_block *block = NULL;
    kl_error err = {KL_OK, ""};
    *out = NULL;
    if (prototype->device.device_type != kDLCPU || prototype->ndim < 0 ||
        prototype->ndim > KL_ARRAY_NDIM || prototype->dtype.lanes != 1 ||
        !kl_dense_bytes(prototype->dtype, prototype->ndim, prototype->shape, &bytes)) {
        set_error(error_ctx, "BufferError", "kimi_linear: allocates CPU arrays of 0 to 8 axes");
        return -1;
    }
    if (kl_block_new(NULL, bytes, &block, &err) == KL_OK) {
        DLTensor view = {.data = block->data, .device = {kDLCPU, 0}, .dtype = prototype->dtype};
        kl_dl_set_dense(&view, shape, strides, prototype->ndim, prototype->shape);
        *out = kl_block_lend(block, &view, 0);
        kl_block_unref(block);
    }
    if (*out != NULL) return 0;
    set_error(error_ctx, "MemoryError", "kimi_linear: no memory for an array");
    return -1;
}

static ArrayObject *array_check(void *object)
{
    PyObject *op = object;
    if (PyType_GetSlot(Py_TYPE(op), Py_tp_dealloc) == (void *)kl_array_dealloc)
        return (ArrayObject *)op;
    PyErr_Format(PyExc_TypeError, "expected a kimi_linear Array, got %R",
                 (PyObject *)Py_TYPE(op));
    return NULL;
}

static int exchange_lend(void *object, DLManagedTensorVersioned **out)
{
    const ArrayObject *self = array_check(object);
    if (self == NULL) return -1;
    *out = kl_block_lend(self->block, &self->view, kl_array_flags(self));
    if (*out != NULL) return 0;
    PyErr_NoMemory();
    return -1;
}

static int exchange_view(void *object, DLTensor *out)
{
    const ArrayObject *self = array_check(object);
    if (self == NULL) return -1;
    *out = self->view;
    return 0;
}

static int adopt(const kl_module *m, DLManagedTensorVersioned *tensor, void **out)
{
    const DLTensor *t = &tensor->dl_tensor;
    if (tensor->version.major != KL_DLPACK_MAJOR || t->ndim < 0 || t->ndim > KL_ARRAY_NDIM) {
        PyErr_SetString(PyExc_BufferError, "kimi_linear: takes DLPack 1.x of 0 to 8 axes");
        return -1;
    }
    kl_block *block = kl_calloc(1, sizeof *block);
    if (block == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    atomic_init(&block->refs, 1);
    ArrayObject *self = kl_array_alloc(m->array_type, block);
    if (self == NULL) return -1;
    kl_dl_set_dense(&self->view, self->shape, self->strides, t->ndim, t->shape);
    if (t->strides != NULL)
        memcpy(self->strides, t->strides, sizeof(int64_t) * (size_t)t->ndim);
    self->view.data = t->data;
    self->view.byte_offset = t->byte_offset;
    self->view.device = t->device;
    self->view.dtype = t->dtype;
    block->foreign = tensor; /* ours from here on */
    *out = self;
    return 0;
}

static int exchange_adopt(DLManagedTensorVersioned *tensor, void **out)
{
    PyObject *module = PyImport_ImportModule("kimi_linear._core");
    if (module == NULL) return -1;
    const int result = adopt(kl_module_of(module), tensor, out);
    Py_DECREF(module);
    return result;
}

/* Our backends run on the stream of whoever calls; there is no stream of our own to order
 * against, and on the CPU there is none at all. */
static int exchange_stream(int32_t device_type, int32_t device_id, void **out)
{
    (void)device_type;
    (void)device_id;
    *out = NULL;
    return 0;
}

static const DLPackExchangeAPI exchange_api = {
    .header = {{KL_DLPACK_MAJOR, 3}, NULL}, /* 1.3 brought this table */
    .managed_tensor_allocator = exchange_allocate,
    .managed_tensor_from_py_object_no_sync = exchange_lend,
    .managed_tensor_to_py_object_no_sync = exchange_adopt,
    .dltensor_from_py_object_no_sync = exchange_view,
    .current_work_stream = exchange_stream,
};

int kl_array_type_init(kl_module *m)
{
    PyObject *capsule = PyCapsule_New((void *)&exchange_api, KL_CAPSULE_EXCHANGE, NULL);
    if (capsule == NULL) return -1;
    const int result = PyObject_SetAttr((PyObject *)m->array_type,
                                        m->names.__dlpack_c_exchange_api__, capsule);
    Py_DECREF(capsule);
    return result;
}
