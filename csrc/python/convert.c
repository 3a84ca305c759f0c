/*
 * convert.c -- what an argument is: the order in which its protocols are tried, dtypes by
 * name, dense copies, the buffer protocol, id arrays.
 */
#include "python/convert.h"

#include "base/memory.h"

#include <string.h>

/* ---- dtypes ---------------------------------------------------------------------------- */

const char *kl_dtype_describe(DLDataType dtype, char text[32])
{
    static const char *const names[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
    if (dtype.code == kDLBool && dtype.bits == 8)
        PyOS_snprintf(text, 32, "bool");
    else if (dtype.code < sizeof names / sizeof *names)
        PyOS_snprintf(text, 32, "%s%d", names[dtype.code], dtype.bits);
    else
        PyOS_snprintf(text, 32, "DLPack dtype (%d, %d)", dtype.code, dtype.bits);
    return text;
}

const char *kl_device_describe(DLDevice device, char text[32])
{
    if (device.device_type == kDLCPU || device.device_type == kDLCUDAHost)
        PyOS_snprintf(text, 32, "cpu");
    else if (device.device_type == kDLCUDA)
        PyOS_snprintf(text, 32, "cuda:%d", device.device_id);
    else
        PyOS_snprintf(text, 32, "DLPack device (%d, %d)", device.device_type, device.device_id);
    return text;
}

DLDataType kl_dtype_to_dl(kl_dtype dtype)
{
    switch (dtype) {
    case KL_F32:
        return (DLDataType){kDLFloat, 32, 1};
    case KL_BF16:
        return (DLDataType){kDLBfloat, 16, 1};
    case KL_I32:
        return (DLDataType){kDLInt, 32, 1};
    case KL_U8:
    case KL_N_DTYPES:
        break;
    }
    return (DLDataType){kDLUInt, 8, 1};
}

bool kl_dtype_from_dl(DLDataType dl, kl_dtype *out)
{
    for (int i = 0; i < KL_N_DTYPES; i++) {
        const DLDataType known = kl_dtype_to_dl((kl_dtype)i);
        if (dl.code == known.code && dl.bits == known.bits) {
            *out = (kl_dtype)i;
            return true;
        }
    }
    if (dl.code == kDLBool && dl.bits == 8) {
        *out = KL_U8; /* the same bytes */
        return true;
    }
    return false;
}

/* ---- layout ---------------------------------------------------------------------------- */

bool kl_array_dense_from(const kl_array *a, int first)
{
    int64_t dense = 1;
    for (int i = first; i < a->ndim; i++)
        if (a->shape[i] == 0) return true; /* whatever the strides, which NumPy sets to zero */
    for (int i = a->ndim - 1; i >= first; i--) {
        if (a->shape[i] != 1 && a->stride[i] != dense) return false;
        dense *= a->shape[i];
    }
    return true;
}

/* Copy axes axis .. ndim-1 to dst, which is advanced past them. */
static char *copy_axis(const kl_array *a, int axis, const char *src, size_t item, char *dst)
{
    if (axis == a->ndim || kl_array_dense_from(a, axis)) {
        size_t bytes = item;
        for (int i = axis; i < a->ndim; i++) bytes *= (size_t)a->shape[i];
        memcpy(dst, src, bytes);
        return dst + bytes;
    }
    for (int64_t i = 0; i < a->shape[axis]; i++)
        dst = copy_axis(a, axis + 1, src + i * a->stride[axis] * (int64_t)item, item, dst);
    return dst;
}

void kl_array_copy_dense(const kl_array *a, void *dst)
{
    for (int i = 0; i < a->ndim; i++)
        if (a->shape[i] == 0) return;
    copy_axis(a, 0, a->data, a->dtype.bits / 8u, dst);
}

/* ---- the buffer protocol --------------------------------------------------------------- */

/* A struct format of one native item; 'e', 'c' and compounds are left to the dtype check. */
static DLDataType dtype_of_format(const char *format, Py_ssize_t item)
{
    int code = 3; /* opaque */
    if (format == NULL) format = "B";
    if (*format == '@' || *format == '=') format++;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    else if (*format == '<')
        format++;
#endif
    if (format[0] != '\0' && format[1] == '\0') {
        if (strchr("fde", *format) != NULL) code = kDLFloat;
        if (strchr("bhilqn", *format) != NULL) code = kDLInt;
        if (strchr("BHILQN", *format) != NULL) code = kDLUInt;
        if (*format == '?') code = kDLBool;
    }
    return (DLDataType){(uint8_t)code, (uint8_t)(item < 32 ? 8 * item : 0), 1};
}

/* Shape and strides in elements. Some exporters (ctypes) leave strides NULL even when asked for
 * them, which means dense. */
static const char *copy_buffer_axes(const Py_buffer *b, kl_array *out)
{
    int64_t dense = 1;
    if (b->ndim > KL_ARRAY_NDIM) return "it must have at most 8 axes";
    if (b->ndim > 0 && b->shape == NULL) return "it must have a shape";
    for (int i = b->ndim - 1; i >= 0; i--) {
        out->shape[i] = b->shape[i];
        out->stride[i] = b->strides == NULL ? dense : b->strides[i] / b->itemsize;
        if (b->strides != NULL && b->shape[i] > 1 && b->strides[i] % b->itemsize != 0)
            return "its strides must be multiples of its item size";
        dense *= b->shape[i];
    }
    return NULL;
}

static int buffer_borrow(const char *op, const char *name, PyObject *o, kl_array *out)
{
    if (!PyObject_CheckBuffer(o)) return 0;
    if (PyObject_GetBuffer(o, &out->buffer, PyBUF_RECORDS_RO) < 0) return -1;
    out->has_buffer = true;
    const Py_buffer *b = &out->buffer;
    const char *wrong = NULL;
    if (b->itemsize < 1)
        wrong = "its items must have a size";
    else if ((uintptr_t)b->buf % (uintptr_t)b->itemsize != 0)
        wrong = "data must be aligned to its item size";
    else
        wrong = copy_buffer_axes(b, out);
    if (wrong != NULL) {
        PyErr_Format(PyExc_BufferError, "%s: %s: %s", op, name, wrong);
        return -1;
    }
    out->dtype = dtype_of_format(b->format, b->itemsize);
    out->device = (DLDevice){kDLCPU, 0};
    out->ndim = b->ndim;
    out->data = b->buf;
    out->sealed = b->readonly ? "it is read-only" : NULL;
    return 1;
}

/* ---- any array ------------------------------------------------------------------------- */

int kl_array_borrow(const kl_module *m, const char *op, const char *name, PyObject *o,
                    intptr_t stream, kl_array *out)
{
    memset(out, 0, sizeof *out);
    out->owner = Py_NewRef(o);
    int taken = kl_numpy_borrow(o, op, name, out);
    if (taken == 0) taken = kl_exchange_borrow(m, op, name, o, out);
    if (taken == 0) taken = kl_dlpack_borrow(m, op, name, o, stream, out);
    if (taken == 0) taken = buffer_borrow(op, name, o, out);
    if (taken == 0)
        PyErr_Format(PyExc_TypeError,
                     "%s: %s must be an array (DLPack or the buffer protocol), got %R", op,
                     name, (PyObject *)Py_TYPE(o));
    if (taken == 1) return 0;
    kl_array_release(out);
    return -1;
}

void kl_array_release(kl_array *a)
{
    /* A deleter may run Python; an exception in flight must survive it. */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (a->managed != NULL && a->managed->deleter != NULL) a->managed->deleter(a->managed);
    if (a->legacy != NULL && a->legacy->deleter != NULL) a->legacy->deleter(a->legacy);
    if (a->has_buffer) PyBuffer_Release(&a->buffer);
    Py_XDECREF(a->owner);
    memset(a, 0, sizeof *a);
    PyErr_Restore(type, value, trace);
}

/* The device, without taking the data. */
static int find_device(const kl_module *m, PyObject *o, DLDevice *out)
{
    *out = (DLDevice){kDLCPU, 0};
    if (kl_numpy_check(o) || kl_exchange_device(m, o, out) == 1) return 0;
    const int found = kl_dlpack_device(m, o, out);
    if (found != 0) return found < 0 ? -1 : 0;
    if (PyObject_CheckBuffer(o)) return 0;
    PyErr_Format(PyExc_TypeError,
                 "the first argument must be an array (DLPack or the buffer protocol), got %R",
                 (PyObject *)Py_TYPE(o));
    return -1;
}

PyObject *kl_py_device_of(PyObject *module, PyObject *array)
{
    const kl_module *m = kl_module_of(module);
    DLDevice device;
    char text[32];
    if (find_device(m, array, &device) < 0) return NULL;
    switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
        return Py_BuildValue("(si)", "cpu", 0);
    case kDLCUDA:
    case kDLCUDAManaged:
        return Py_BuildValue("(si)", "cuda", (int)device.device_id);
    }
    PyErr_Format(m->DeviceError, "arrays must be on the CPU or a CUDA device, got %s",
                 kl_device_describe(device, text));
    return NULL;
}

/* ---- ids ------------------------------------------------------------------------------- */

/* Narrow n values to int32; the index of the first outside [lo, hi], or -1. Where that range is
 * wider than int32, what does not fit becomes -1. */
static int64_t narrow(const void *src, bool wide, int64_t n, int64_t lo, int64_t hi,
                      int32_t *dst)
{
    for (int64_t i = 0; i < n; i++) {
        const int64_t v = wide ? ((const int64_t *)src)[i] : ((const int32_t *)src)[i];
        if (v < lo || v > hi) return i;
        dst[i] = v < INT32_MIN || v > INT32_MAX ? -1 : (int32_t)v;
    }
    return -1;
}

static int narrow_array(const char *op, const char *name, const kl_array *a, const void *dense,
                        int64_t n, int64_t lo, int64_t hi, int32_t *dst)
{
    const bool wide = a->dtype.bits == 64;
    const int64_t bad = narrow(dense, wide, n, lo, hi, dst);
    if (bad < 0) return 0;
    const long long v =
        wide ? ((const int64_t *)dense)[bad] : (long long)((const int32_t *)dense)[bad];
    PyErr_Format(PyExc_ValueError, "%s: %s must lie in [%lld, %lld], got %lld at %lld", op,
                 name, (long long)lo, (long long)hi, v, (long long)bad);
    return -1;
}

static int copy_ids(const char *op, const char *name, const kl_array *a, int64_t lo, int64_t hi,
                    int32_t **out)
{
    int64_t n = 1;
    for (int i = 0; i < a->ndim; i++) n *= a->shape[i];
    const bool dense = kl_array_dense_from(a, 0);
    int32_t *ids = kl_malloc((size_t)n * sizeof *ids);
    void *copy = dense ? NULL : kl_malloc((size_t)n * (a->dtype.bits / 8u));
    int result = -1;
    if (ids == NULL || (!dense && copy == NULL)) {
        PyErr_NoMemory();
        goto done;
    }
    if (!dense) kl_array_copy_dense(a, copy);
    result = narrow_array(op, name, a, dense ? a->data : copy, n, lo, hi, ids);
done:
    kl_free(copy);
    if (result < 0) {
        kl_free(ids);
        return -1;
    }
    *out = ids;
    return 0;
}

int kl_ids_copy(const kl_module *m, const char *op, const char *name, PyObject *o, int ndim,
                int64_t lo, int64_t hi, int32_t **out, int64_t *shape)
{
    kl_array a;
    char text[32];
    int result = -1;
    if (kl_array_borrow(m, op, name, o, -1, &a) < 0) return -1;
    if (a.dtype.code != kDLInt || (a.dtype.bits != 32 && a.dtype.bits != 64))
        PyErr_Format(PyExc_TypeError, "%s: %s must be int32 or int64, got %s", op, name,
                     kl_dtype_describe(a.dtype, text));
    else if (a.device.device_type == kDLCUDA)
        PyErr_Format(PyExc_ValueError, "%s: %s must be on the cpu, got %s", op, name,
                     kl_device_describe(a.device, text));
    else if (a.ndim != ndim)
        PyErr_Format(PyExc_ValueError, "%s: %s must have %d axes, got %d", op, name, ndim,
                     a.ndim);
    else {
        for (int i = 0; i < ndim; i++) shape[i] = a.shape[i];
        result = copy_ids(op, name, &a, lo, hi, out);
    }
    kl_array_release(&a);
    return result;
}
