/*
 * convert.h -- Python's arrays as memory that the core can read and write, and back.
 *
 * In: NumPy arrays through NumPy's C API; anything with the DLPack exchange API on its type;
 * anything with __dlpack__; anything with the buffer protocol. Out: NumPy arrays, arrays of
 * the framework that the arguments came from, or our own Array.
 *
 * Nothing a producer says is believed before it is checked here: sizes, strides, offsets,
 * alignment, versions.
 */
#ifndef KL_PYTHON_CONVERT_H
#define KL_PYTHON_CONVERT_H

#include "python/binding.h"
#include "python/dlpack.h"

#include "base/tensor.h"

#define KL_ARRAY_NDIM 8 /* axes of an argument at most */

/* An argument borrowed from Python: what the memory looks like, and what keeps it alive. */
typedef struct {
    PyObject *owner; /* strong */
    void *data;
    DLDataType dtype;
    DLDevice device;
    int ndim;
    int64_t shape[KL_ARRAY_NDIM], stride[KL_ARRAY_NDIM]; /* elements */
    const char *sealed; /* why it must not be written to, or NULL */

    DLManagedTensorVersioned *managed; /* each of these may be NULL */
    DLManagedTensor *legacy;
    bool has_buffer;
    Py_buffer buffer;
} kl_array;

/* Borrow `o`; `stream` is the CUDA stream the work will go to (1 where unknown). -1 with an
 * exception naming `op` and `name`. */
int kl_array_borrow(const kl_module *m, const char *op, const char *name, PyObject *o,
                    intptr_t stream, kl_array *out);
void kl_array_release(kl_array *a);

/* The steps of kl_array_borrow that other files hold. 1: taken, 0: not one of these, -1. */
int kl_numpy_borrow(PyObject *o, const char *op, const char *name, kl_array *out);
int kl_exchange_borrow(const kl_module *m, const char *op, const char *name, PyObject *o,
                       kl_array *out);
int kl_dlpack_borrow(const kl_module *m, const char *op, const char *name, PyObject *o,
                     intptr_t stream, kl_array *out);

/* The device that the exchange table tells: 1, or 0. */
int kl_exchange_device(const kl_module *m, PyObject *o, DLDevice *out);
/* The device that __dlpack_device__() names: 1, 0 without that method, or -1. */
int kl_dlpack_device(const kl_module *m, PyObject *o, DLDevice *out);

/* The exchange API that a type offers in a version we read, or NULL (no exception). */
const DLPackExchangeAPI *kl_exchange_of(const kl_module *m, PyTypeObject *type);

/* "float64", "int3x4", ... */
const char *kl_dtype_describe(DLDataType dtype, char text[32]);
const char *kl_device_describe(DLDevice device, char text[32]);
DLDataType kl_dtype_to_dl(kl_dtype dtype);
/* false where the core has no such dtype. */
bool kl_dtype_from_dl(DLDataType dl, kl_dtype *out);

bool kl_array_dense_from(const kl_array *a, int first); /* axes first .. ndim-1 are dense */
/* Lay a strided array out densely at dst. */
void kl_array_copy_dense(const kl_array *a, void *dst);

/* ---- NumPy ----------------------------------------------------------------------------- */

bool kl_numpy_check(PyObject *o); /* false as long as NumPy is not imported */
/* The descriptor of a NumPy array (new reference); NULL without exception for others. */
PyObject *kl_numpy_descr(PyObject *o);

/* A new uninitialised C-contiguous array; imports NumPy at the first call. bf16 takes its
 * descriptor from `like` (from kl_numpy_descr), else from ml_dtypes. */
PyObject *kl_numpy_new(DLDataType dtype, PyObject *like, int ndim, const int64_t *shape,
                       void **data);
/* The same for a dtype of the core; bf16 needs ml_dtypes. */
PyObject *kl_numpy_empty(kl_dtype dtype, int ndim, const int64_t *shape, void **data);

/* ---- our own arrays -------------------------------------------------------------------- */

/* A new uninitialised Array of this device's memory. */
PyObject *kl_array_object_new(const kl_module *m, kl_device *dev, DLDataType dtype, int ndim,
                              const int64_t *shape, void **data);

/* ---- id arrays ------------------------------------------------------------------------- */

/* A dense int32 copy of an int32 or int64 host array of `ndim` axes with every value in
 * [lo, hi]; freed with kl_free(). Where [lo, hi] is wider than int32, what does not fit becomes
 * -1. -1 with an exception naming `op` and `name`. */
int kl_ids_copy(const kl_module *m, const char *op, const char *name, PyObject *o, int ndim,
                int64_t lo, int64_t hi, int32_t **out, int64_t *shape);

#endif
