/*
 * array_object.h -- shared by the files of Array.
 */
#ifndef KL_PYTHON_ARRAY_OBJECT_H
#define KL_PYTHON_ARRAY_OBJECT_H

#include "python/convert.h"

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

/* dev NULL: host memory. */
kl_status kl_block_new(kl_device *dev, size_t bytes, kl_block **out, kl_error *err);
kl_block *kl_block_ref(kl_block *b);
void kl_block_unref(kl_block *b); /* NULL is fine */

/* Bytes of a dense array; false where they pass what a size can count. */
bool kl_dense_bytes(DLDataType dtype, int ndim, const int64_t *shape, size_t *out);
/* Give a tensor a dense shape, kept in the two arrays. */
void kl_dl_set_dense(DLTensor *t, int64_t *shape, int64_t *strides, int ndim,
                     const int64_t *from);

/* A managed tensor over the memory, NULL without memory; a capsule of either kind, NULL with an
 * exception. Both take a reference to the block. */
DLManagedTensorVersioned *kl_block_lend(kl_block *block, const DLTensor *view, uint64_t flags);
PyObject *kl_block_capsule(kl_block *block, const DLTensor *view, bool versioned,
                           uint64_t flags);

/* A new object over the block, whose reference it takes even when it fails. */
ArrayObject *kl_array_alloc(PyTypeObject *type, kl_block *block);
void kl_array_dealloc(PyObject *op); /* also tells an Array from other objects */
uint64_t kl_array_flags(const ArrayObject *self);

/* Methods. */
PyObject *kl_array_dlpack(PyObject *op, PyObject *args, PyObject *kwargs);
PyObject *kl_array_dlpack_device(PyObject *op, PyObject *none);

#endif
