/*
 * numpy.c -- NumPy arrays in and out through NumPy's C API. The only file that includes it.
 *
 * The API table is looked up when the first NumPy array is seen or made, so that importing this
 * package does not import NumPy. NumPy keeps the table in a static of this file; setting it
 * twice writes the same value.
 */
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION    NPY_2_0_API_VERSION
#include "python/convert.h"

#include <numpy/arrayobject.h>

#include <string.h>

static bool table_is_ready(void)
{
    return PyArray_API != NULL;
}

static int import_table(void)
{
    return table_is_ready() ? 0 : PyArray_ImportNumPyAPI();
}

bool kl_numpy_check(PyObject *o)
{
    if (!table_is_ready()) {
        PyObject *modules = PyImport_GetModuleDict(); /* borrowed */
        if (modules == NULL || PyDict_GetItemString(modules, "numpy") == NULL) return false;
        if (import_table() < 0) {
            PyErr_Clear(); /* NumPy is still being imported: o cannot be an array of it */
            return false;
        }
    }
    return PyArray_Check(o);
}

/* ml_dtypes.bfloat16 is a dtype registered from outside, known only by its type's name. */
static bool is_bfloat16(PyArray_Descr *descr)
{
    if (!PyTypeNum_ISUSERDEF(descr->type_num)) return false;
    PyObject *name = PyObject_GetAttrString((PyObject *)descr->typeobj, "__name__");
    const bool yes = name != NULL && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0;
    if (name == NULL) PyErr_Clear();
    Py_XDECREF(name);
    return yes;
}

static bool dtype_of(PyArrayObject *a, DLDataType *out)
{
    PyArray_Descr *descr = PyArray_DESCR(a);
    const npy_intp item = PyArray_ITEMSIZE(a);
    int code;
    switch (descr->kind) {
    case 'f':
        code = kDLFloat;
        break;
    case 'i':
        code = kDLInt;
        break;
    case 'u':
        code = kDLUInt;
        break;
    case 'b':
        code = kDLBool;
        break;
    case 'c':
        code = kDLComplex;
        break;
    default:
        if (item != 2 || !is_bfloat16(descr)) return false;
        code = kDLBfloat;
    }
    if (item < 1 || item > 31) return false;
    *out = (DLDataType){(uint8_t)code, (uint8_t)(8 * item), 1};
    return true;
}

int kl_numpy_borrow(PyObject *o, const char *op, const char *name, kl_array *out)
{
    if (!kl_numpy_check(o)) return 0;
    PyArrayObject *a = (PyArrayObject *)o;
    const npy_intp item = PyArray_ITEMSIZE(a);
    if (!PyArray_ISNOTSWAPPED(a) || !dtype_of(a, &out->dtype)) {
        PyErr_Format(PyExc_TypeError, "%s: %s has a dtype that is not supported: %R", op, name,
                     (PyObject *)PyArray_DESCR(a));
        return -1;
    }
    out->ndim = PyArray_NDIM(a);
    if (out->ndim > KL_ARRAY_NDIM) {
        PyErr_Format(PyExc_BufferError, "%s: %s must have at most %d axes, got %d", op, name,
                     KL_ARRAY_NDIM, out->ndim);
        return -1;
    }
    for (int i = 0; i < out->ndim; i++) {
        out->shape[i] = PyArray_DIM(a, i);
        out->stride[i] = PyArray_STRIDE(a, i) / item;
        if (out->shape[i] > 1 && PyArray_STRIDE(a, i) % item != 0) goto misaligned;
    }
    if (!PyArray_ISALIGNED(a)) goto misaligned;
    out->data = PyArray_DATA(a);
    out->device = (DLDevice){kDLCPU, 0};
    out->sealed = PyArray_ISWRITEABLE(a) ? NULL : "it is read-only";
    return 1;
misaligned:
    PyErr_Format(PyExc_BufferError, "%s: %s: data must be aligned to its item size", op, name);
    return -1;
}

PyObject *kl_numpy_descr(PyObject *o)
{
    return kl_numpy_check(o) ? Py_NewRef((PyObject *)PyArray_DESCR((PyArrayObject *)o)) : NULL;
}

/* The descriptor of ml_dtypes.bfloat16 (new reference). */
static PyArray_Descr *import_bfloat16(void)
{
    PyObject *module = PyImport_ImportModule("ml_dtypes");
    PyObject *scalar = module == NULL ? NULL : PyObject_GetAttrString(module, "bfloat16");
    PyArray_Descr *descr = NULL;
    if (scalar != NULL && PyArray_DescrConverter(scalar, &descr) != NPY_SUCCEED) descr = NULL;
    Py_XDECREF(module);
    Py_XDECREF(scalar);
    return descr;
}

static PyArray_Descr *descr_of(DLDataType dtype, PyObject *like)
{
    if (dtype.code == kDLBfloat) {
        if (like != NULL && is_bfloat16((PyArray_Descr *)like))
            return (PyArray_Descr *)Py_NewRef(like);
        return import_bfloat16();
    }
    int number = NPY_UINT8;
    if (dtype.code == kDLFloat) number = NPY_FLOAT32;
    if (dtype.code == kDLInt) number = NPY_INT32;
    if (dtype.code == kDLBool) number = NPY_BOOL;
    return PyArray_DescrFromType(number);
}

PyObject *kl_numpy_new(DLDataType dtype, PyObject *like, int ndim, const int64_t *shape,
                       void **data)
{
    npy_intp dims[KL_ARRAY_NDIM];
    if (import_table() < 0) return NULL;
    for (int i = 0; i < ndim; i++) dims[i] = (npy_intp)shape[i];
    PyArray_Descr *descr = descr_of(dtype, like);
    if (descr == NULL) return NULL;
    PyObject *array = PyArray_Empty(ndim, dims, descr, 0); /* takes descr */
    if (array != NULL) *data = PyArray_DATA((PyArrayObject *)array);
    return array;
}

PyObject *kl_numpy_empty(kl_dtype dtype, int ndim, const int64_t *shape, void **data)
{
    return kl_numpy_new(kl_dtype_to_dl(dtype), NULL, ndim, shape, data);
}
