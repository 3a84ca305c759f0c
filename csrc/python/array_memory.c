/*
 * array_memory.c -- the memory behind an Array, counted, and what DLPack lends of it.
 *
 * What is lent keeps the memory alive by a count of its own, so that a consumer may drop it on
 * any thread, without an interpreter, after Python has ended.
 */
#include "python/array_object.h"

#include "base/memory.h"

#include <string.h>

/* ---- memory ---------------------------------------------------------------------------- */

void kl_block_unref(kl_block *b)
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

kl_block *kl_block_ref(kl_block *b)
{
    atomic_fetch_add_explicit(&b->refs, 1, memory_order_relaxed);
    return b;
}

kl_status kl_block_new(kl_device *dev, size_t bytes, kl_block **out, kl_error *err)
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

bool kl_dense_bytes(DLDataType dtype, int ndim, const int64_t *shape, size_t *out)
{
    size_t bytes = (dtype.bits + 7u) / 8u;
    for (int i = 0; i < ndim; i++)
        if (shape[i] < 0 || !kl_mul_size(bytes, (size_t)shape[i], &bytes)) return false;
    *out = bytes;
    return bytes <= INT64_MAX;
}

void kl_dl_set_dense(DLTensor *t, int64_t *shape, int64_t *strides, int ndim,
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
    kl_block_unref(lent->block);
    kl_free(lent);
}

static void return_legacy(DLManagedTensor *tensor)
{
    lent_legacy *lent = tensor->manager_ctx;
    kl_block_unref(lent->block);
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

DLManagedTensorVersioned *kl_block_lend(kl_block *block, const DLTensor *view, uint64_t flags)
{
    lent_versioned *lent = kl_calloc(1, sizeof *lent);
    if (lent == NULL) return NULL;
    lent->block = kl_block_ref(block);
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
    lent->block = kl_block_ref(block);
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

PyObject *kl_block_capsule(kl_block *block, const DLTensor *view, bool versioned,
                           uint64_t flags)
{
    PyObject *capsule = NULL;
    if (versioned) {
        DLManagedTensorVersioned *t = kl_block_lend(block, view, flags);
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
