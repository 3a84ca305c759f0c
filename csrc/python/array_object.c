/*
 * array_object.c -- kimi_linear._core.Array: memory of ours that others read in place, through
 * DLPack capsules of both kinds, the DLPack exchange API and the buffer protocol.
 */
#include "python/array_object.h"

#include "base/memory.h"

#include <string.h>

/* ---- making ---------------------------------------------------------------------------- */

ArrayObject *kl_array_alloc(PyTypeObject *type, kl_block *block)
{
    ArrayObject *self = (ArrayObject *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self == NULL)
        kl_block_unref(block);
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
    if (!kl_dense_bytes(dtype, ndim, shape, &bytes)) return PyErr_NoMemory();
    if (kl_block_new(dev, bytes, &block, &err) != KL_OK) return kl_raise(m, &err);
    ArrayObject *self = kl_array_alloc(m->array_type, block);
    if (self == NULL) return NULL;
    self->view = (DLTensor){
        .data = block->data,
        .device = {dev->is_cpu ? kDLCPU : kDLCUDA, dev->is_cpu ? 0 : dev->index},
        .dtype = dtype,
    };
    kl_dl_set_dense(&self->view, self->shape, self->strides, ndim, shape);
    *data = block->data;
    return (PyObject *)self;
}

void kl_array_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    kl_block_unref(((ArrayObject *)op)->block);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
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
    const bool sealed = (kl_array_flags(self) & KL_DL_READ_ONLY) != 0;
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
    {"__dlpack__", (PyCFunction)(void (*)(void))kl_array_dlpack, METH_VARARGS | METH_KEYWORDS,
     "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
     "A DLPack capsule of this memory."},
    {"__dlpack_device__", kl_array_dlpack_device, METH_NOARGS,
     "__dlpack_device__($self, /)\n--\n\n(device type, device id) of DLPack."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot array_slots[] = {
    {Py_tp_dealloc, kl_array_dealloc},
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
