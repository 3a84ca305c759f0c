/*
 * array_object.c -- kimi_linear._core.Array: memory of ours that others read in place, through
 * DLPack capsules of both kinds, the DLPack exchange API and the buffer protocol.
 *
 * What is lent keeps the memory alive by a count of its own, so that a consumer may drop it on
 * any thread, without an interpreter, after Python has ended.
 */
#include "python/convert.h"

#include "base/memory.h"

#include <string.h>

/* Memory shared by an Array and everything that was lent from it. */
typedef struct {
    atomic_int refs;
    void *data;
    size_t bytes;
    kl_device *dev;                    /* whose memory it is; NULL: kl_aligned_alloc() */
    DLManagedTensorVersioned *foreign; /* or another library's, adopted                */
} kl_block;

typedef struct {
    PyObject_HEAD
    kl_block *block; /* one reference of ours */
    DLTensor view;   /* shape and strides point below */
    int64_t shape[KL_ARRAY_NDIM], strides[KL_ARRAY_NDIM];
} ArrayObject;

/* ---- memory ---------------------------------------------------------------------------- */

static void block_unref(kl_block *b)
{
    if (b == NULL || atomic_fetch_sub_explicit(&b->refs, 1, memory_order_acq_rel) != 1) return;
    if (b->foreign != NULL) {
        if (b->foreign->deleter != NULL) b->foreign->deleter(b->foreign);
    } else if (b->dev != NULL) {
        b->dev->be->vt->free(b->dev->be, b->data, b->bytes);
    } else {
        kl_free(b->data);
    }
    kl_device_unref(b->dev);
    kl_free(b);
}

static kl_block *block_ref(kl_block *b)
{
    atomic_fetch_add_explicit(&b->refs, 1, memory_order_relaxed);
    return b;
}

/* dev NULL: host memory. */
static kl_status block_new(kl_device *dev, size_t bytes, kl_block **out, kl_error *err)
{
    kl_status status = KL_OK;
    kl_block *b = kl_calloc(1, sizeof *b);
    if (b == NULL) return kl_fail(err, KL_ERR_MEMORY, "array: no memory");
    atomic_init(&b->refs, 1);
    b->bytes = bytes;
    if (dev != NULL)
        status = dev->be->vt->alloc(dev->be, bytes, &b->data, err);
    else if ((b->data = kl_aligned_alloc(bytes)) == NULL)
        status = kl_fail(err, KL_ERR_MEMORY, "array: no memory for %zu bytes", bytes);
    if (status != KL_OK) {
        kl_free(b);
        return status;
    }
    if (dev != NULL) b->dev = kl_device_ref(dev);
    *out = b;
    return KL_OK;
}

/* Bytes of a dense array; false where they pass what a size can count. */
static bool dense_bytes(DLDataType dtype, int ndim, const int64_t *shape, size_t *out)
{
    size_t bytes = (dtype.bits + 7u) / 8u;
    for (int i = 0; i < ndim; i++)
        if (shape[i] < 0 || !kl_mul_size(bytes, (size_t)shape[i], &bytes)) return false;
    *out = bytes;
    return bytes <= INT64_MAX;
}

static void set_dense(DLTensor *t, int64_t *shape, int64_t *strides, int ndim,
                      const int64_t *from)
{
    int64_t dense = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        shape[i] = from[i];
        strides[i] = dense;
        dense *= from[i] > 0 ? from[i] : 1;
    }
    t->ndim = ndim;
    t->shape = shape;
    t->strides = strides;
}

/* ---- lending --------------------------------------------------------------------------- */

/* One allocation holds what a consumer may look at until it calls the deleter. */
typedef struct {
    DLManagedTensorVersioned tensor;
    kl_block *block;
    int64_t shape[KL_ARRAY_NDIM], strides[KL_ARRAY_NDIM];
} lent_versioned;

typedef struct {
    DLManagedTensor tensor;
    kl_block *block;
    int64_t shape[KL_ARRAY_NDIM], strides[KL_ARRAY_NDIM];
} lent_legacy;

static void return_versioned(DLManagedTensorVersioned *tensor)
{
    lent_versioned *lent = tensor->manager_ctx;
    block_unref(lent->block);
    kl_free(lent);
}

static void return_legacy(DLManagedTensor *tensor)
{
    lent_legacy *lent = tensor->manager_ctx;
    block_unref(lent->block);
    kl_free(lent);
}

static void copy_view(const DLTensor *from, DLTensor *to, int64_t *shape, int64_t *strides)
{
    *to = *from;
    memcpy(shape, from->shape, sizeof(int64_t) * (size_t)from->ndim);
    memcpy(strides, from->strides, sizeof(int64_t) * (size_t)from->ndim);
    to->shape = shape;
    to->strides = strides;
}

/* NULL without memory. Takes a reference to block. */
static DLManagedTensorVersioned *lend_versioned(kl_block *block, const DLTensor *view,
                                                uint64_t flags)
{
    lent_versioned *lent = kl_calloc(1, sizeof *lent);
    if (lent == NULL) return NULL;
    lent->block = block_ref(block);
    lent->tensor = (DLManagedTensorVersioned){
        .version = {KL_DLPACK_MAJOR, KL_DLPACK_MINOR},
        .manager_ctx = lent,
        .deleter = return_versioned,
        .flags = flags,
    };
    copy_view(view, &lent->tensor.dl_tensor, lent->shape, lent->strides);
    return &lent->tensor;
}

static DLManagedTensor *lend_legacy(kl_block *block, const DLTensor *view)
{
    lent_legacy *lent = kl_calloc(1, sizeof *lent);
    if (lent == NULL) return NULL;
    lent->block = block_ref(block);
    lent->tensor.manager_ctx = lent;
    lent->tensor.deleter = return_legacy;
    copy_view(view, &lent->tensor.dl_tensor, lent->shape, lent->strides);
    return &lent->tensor;
}

/* A capsule that nobody consumed still owns its tensor. */
static void capsule_destroy(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, KL_CAPSULE_VERSIONED)) {
        DLManagedTensorVersioned *t = PyCapsule_GetPointer(capsule, KL_CAPSULE_VERSIONED);
        t->deleter(t);
    } else if (PyCapsule_IsValid(capsule, KL_CAPSULE_LEGACY)) {
        DLManagedTensor *t = PyCapsule_GetPointer(capsule, KL_CAPSULE_LEGACY);
        t->deleter(t);
    }
}

static PyObject *capsule_of(kl_block *block, const DLTensor *view, bool versioned,
                            uint64_t flags)
{
    PyObject *capsule = NULL;
    if (versioned) {
        DLManagedTensorVersioned *t = lend_versioned(block, view, flags);
        if (t == NULL) return PyErr_NoMemory();
        capsule = PyCapsule_New(t, KL_CAPSULE_VERSIONED, capsule_destroy);
        if (capsule == NULL) t->deleter(t);
    } else {
        DLManagedTensor *t = lend_legacy(block, view);
        if (t == NULL) return PyErr_NoMemory();
        capsule = PyCapsule_New(t, KL_CAPSULE_LEGACY, capsule_destroy);
        if (capsule == NULL) t->deleter(t);
    }
    return capsule;
}

/* ---- making ---------------------------------------------------------------------------- */

/* Steals block. */
static ArrayObject *array_alloc(PyTypeObject *type, kl_block *block)
{
    ArrayObject *self = (ArrayObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL)
        block_unref(block);
    else
        self->block = block;
    return self;
}

PyObject *kl_array_object_new(const kl_module *m, kl_device *dev, DLDataType dtype, int ndim,
                              const int64_t *shape, void **data)
{
    size_t bytes;
    kl_block *block = NULL;
    kl_error err = {KL_OK, ""};
    if (!dense_bytes(dtype, ndim, shape, &bytes)) return PyErr_NoMemory();
    if (block_new(dev, bytes, &block, &err) != KL_OK) return kl_raise(m, &err);
    ArrayObject *self = array_alloc(m->array_type, block);
    if (self == NULL) return NULL;
    self->view = (DLTensor){
        .data = block->data,
        .device = {dev->is_cpu ? kDLCPU : kDLCUDA, dev->is_cpu ? 0 : dev->index},
        .dtype = dtype,
    };
    set_dense(&self->view, self->shape, self->strides, ndim, shape);
    *data = block->data;
    return (PyObject *)self;
}

static void array_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    block_unref(((ArrayObject *)op)->block);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

/* ---- __dlpack__ ------------------------------------------------------------------------ */

static uint64_t flags_of(const ArrayObject *self)
{
    return self->block->foreign == NULL ? 0 : self->block->foreign->flags;
}

/* Wait until what was enqueued on this memory's device has run. */
static int wait_for_device(PyObject *op)
{
    const ArrayObject *self = (ArrayObject *)op;
    kl_device *dev = self->block->dev;
    kl_error err = {KL_OK, ""};
    kl_status status = KL_OK;
    if (dev == NULL || dev->is_cpu) return 0;
    Py_BEGIN_ALLOW_THREADS status = dev->be->vt->sync(dev->be, &err);
    Py_END_ALLOW_THREADS if (status == KL_OK) return 0;
    kl_raise(kl_module_of_instance(op), &err);
    return -1;
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
    if (!dense_bytes(self->view.dtype, self->view.ndim, self->shape, &bytes))
        return PyErr_NoMemory();
    if (block_new(NULL, bytes, &block, &err) != KL_OK ||
        fill_copy(self, block->data, bytes, &err) != KL_OK) {
        block_unref(block);
        return kl_raise(kl_module_of_instance(op), &err);
    }
    DLTensor view = {.data = block->data, .device = {kDLCPU, 0}, .dtype = self->view.dtype};
    set_dense(&view, shape, strides, self->view.ndim, self->shape);
    PyObject *capsule = capsule_of(block, &view, versioned, KL_DL_IS_COPIED);
    block_unref(block);
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

static int parse_stream(PyObject *op, PyObject *stream)
{
    const bool host = ((ArrayObject *)op)->view.device.device_type == kDLCPU;
    if (stream == Py_None) return wait_for_device(op);
    const long long value = PyLong_AsLongLong(stream);
    if (value == -1 && PyErr_Occurred()) return -1;
    if (host || value == 0 || value < -1) {
        PyErr_Format(PyExc_BufferError, "__dlpack__: stream %R is not one of this device",
                     stream);
        return -1;
    }
    return value == -1 ? 0 : wait_for_device(op); /* -1: the consumer orders its own work */
}

static PyObject *array_dlpack(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *version = Py_None, *device = Py_None, *copy = Py_None;
    const ArrayObject *self = (ArrayObject *)op;
    request r = {0};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream,
                                     &version, &device, &copy))
        return NULL;
    if (parse_version(version, &r) < 0 || parse_copy(&self->view, device, copy, &r) < 0 ||
        parse_stream(op, stream) < 0)
        return NULL;
    if (r.copy) return capsule_of_copy(op, r.versioned);
    if (!r.versioned && (flags_of(self) & KL_DL_READ_ONLY)) {
        PyErr_SetString(PyExc_BufferError,
                        "__dlpack__: a read-only array needs max_version=(1, 0) or later");
        return NULL;
    }
    return capsule_of(self->block, &self->view, r.versioned, flags_of(self));
}

static PyObject *array_dlpack_device(PyObject *op, PyObject *Py_UNUSED(none))
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
        !dense_bytes(prototype->dtype, prototype->ndim, prototype->shape, &bytes)) {
        set_error(error_ctx, "BufferError", "kimi_linear: allocates CPU arrays of 0 to 8 axes");
        return -1;
    }
    if (block_new(NULL, bytes, &block, &err) == KL_OK) {
        DLTensor view = {.data = block->data, .device = {kDLCPU, 0}, .dtype = prototype->dtype};
        set_dense(&view, shape, strides, prototype->ndim, prototype->shape);
        *out = lend_versioned(block, &view, 0);
        block_unref(block);
    }
    if (*out != NULL) return 0;
    set_error(error_ctx, "MemoryError", "kimi_linear: no memory for an array");
    return -1;
}

static ArrayObject *array_check(void *object)
{
    PyObject *op = object;
    if (PyType_GetSlot(Py_TYPE(op), Py_tp_dealloc) == (void *)array_dealloc)
        return (ArrayObject *)op;
    PyErr_Format(PyExc_TypeError, "expected a kimi_linear Array, got %R",
                 (PyObject *)Py_TYPE(op));
    return NULL;
}

static int exchange_lend(void *object, DLManagedTensorVersioned **out)
{
    const ArrayObject *self = array_check(object);
    if (self == NULL) return -1;
    *out = lend_versioned(self->block, &self->view, flags_of(self));
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
    ArrayObject *self = array_alloc(m->array_type, block);
    if (self == NULL) return -1;
    set_dense(&self->view, self->shape, self->strides, t->ndim, t->shape);
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

/* ---- buffer protocol and attributes ---------------------------------------------------- */

/* bfloat16 has no code in struct's language: its bits are lent as uint16. */
static const char *format_of(DLDataType dtype)
{
    if (dtype.code == kDLFloat && dtype.bits == 32) return "f";
    if (dtype.code == kDLBfloat && dtype.bits == 16) return "H";
    if (dtype.code == kDLInt && dtype.bits == 32) return "i";
    if (dtype.code == kDLUInt && dtype.bits == 8) return "B";
    if (dtype.code == kDLBool && dtype.bits == 8) return "?";
    return NULL;
}

static bool is_dense(const ArrayObject *self)
{
    kl_array a = {.ndim = self->view.ndim};
    memcpy(a.shape, self->shape, sizeof a.shape);
    memcpy(a.stride, self->strides, sizeof a.stride);
    return kl_array_dense_from(&a, 0);
}

static int array_getbuffer(PyObject *op, Py_buffer *out, int flags)
{
    ArrayObject *self = (ArrayObject *)op;
    const bool sealed = (flags_of(self) & KL_DL_READ_ONLY) != 0;
    const char *format = format_of(self->view.dtype), *wrong = NULL;
    Py_ssize_t size = self->view.dtype.bits / 8;
    if (self->view.device.device_type != kDLCPU)
        wrong = "array: the buffer protocol reaches host memory only";
    else if (format == NULL)
        wrong = "array: its dtype has no buffer format";
    else if (sealed && (flags & PyBUF_WRITABLE) != 0)
        wrong = "array: it is read-only";
    else if (!is_dense(self))
        wrong = "array: it is not dense";
    out->obj = NULL;
    if (wrong != NULL) {
        PyErr_SetString(PyExc_BufferError, wrong);
        return -1;
    }
    for (int i = 0; i < self->view.ndim; i++) size *= self->shape[i];
    out->buf = (char *)self->view.data + self->view.byte_offset;
    out->len = size;
    out->readonly = sealed;
    out->itemsize = self->view.dtype.bits / 8;
    out->format = (flags & PyBUF_FORMAT) != 0 ? (char *)format : NULL;
    out->ndim = self->view.ndim;
    out->shape = (flags & PyBUF_ND) != 0 ? (Py_ssize_t *)self->shape : NULL;
    out->strides = NULL;
    out->suboffsets = NULL;
    out->internal = NULL;
    if ((flags & PyBUF_STRIDES) == PyBUF_STRIDES) {
        Py_ssize_t *strides = kl_malloc(sizeof(Py_ssize_t) * KL_ARRAY_NDIM);
        if (strides == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        for (int i = 0; i < self->view.ndim; i++)
            strides[i] = (Py_ssize_t)self->strides[i] * out->itemsize;
        out->strides = out->internal = strides;
    }
    out->obj = Py_NewRef(op);
    return 0;
}

static void array_releasebuffer(PyObject *Py_UNUSED(op), Py_buffer *buffer)
{
    kl_free(buffer->internal);
}

static PyObject *array_shape(PyObject *op, void *Py_UNUSED(closure))
{
    const ArrayObject *self = (ArrayObject *)op;
    PyObject *shape = PyTuple_New(self->view.ndim);
    for (int i = 0; shape != NULL && i < self->view.ndim; i++) {
        PyObject *n = PyLong_FromLongLong(self->shape[i]);
        if (n == NULL || PyTuple_SetItem(shape, i, n) < 0) Py_CLEAR(shape);
    }
    return shape;
}

static PyObject *array_dtype(PyObject *op, void *Py_UNUSED(closure))
{
    char text[32];
    return PyUnicode_FromString(kl_dtype_describe(((ArrayObject *)op)->view.dtype, text));
}

static PyGetSetDef array_getset[] = {
    {"shape", array_shape, NULL, "Length of each axis.", NULL},
    {"dtype", array_dtype, NULL, "Name of the dtype, such as 'float32'.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMethodDef array_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))array_dlpack, METH_VARARGS | METH_KEYWORDS,
     "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
     "A DLPack capsule of this memory."},
    {"__dlpack_device__", array_dlpack_device, METH_NOARGS,
     "__dlpack_device__($self, /)\n--\n\n(device type, device id) of DLPack."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot array_slots[] = {
    {Py_tp_dealloc, array_dealloc},
    {Py_tp_methods, array_methods},
    {Py_tp_getset, array_getset},
    {Py_bf_getbuffer, array_getbuffer},
    {Py_bf_releasebuffer, array_releasebuffer},
    {Py_tp_doc, "Memory of the core's own, lent through DLPack and the buffer protocol."},
    {0, NULL},
};

/* Not immutable, for kl_array_type_init(); no instances are made from Python. */
PyType_Spec kl_array_spec = {
    .name = "kimi_linear._core.Array",
    .basicsize = sizeof(ArrayObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = array_slots,
};
