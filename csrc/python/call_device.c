/*
 * call_device.c -- what a call needs of a device besides its arrays: temporaries there.
 */
#include "python/call.h"

/* The framework's memory is given back in the order of its current stream, so the call need not
 * wait for its end. */
static int alloc_managed(kl_call *c, kl_device_block *block)
{
    const int64_t shape[1] = {(int64_t)block->bytes};
    if (kl_call_new_managed(c, (DLDataType){kDLUInt, 8, 1}, 1, shape, &block->managed) < 0)
        return -1;
    block->data = kl_managed_data(block->managed);
    return 0;
}

static int alloc_of_backend(kl_call *c, kl_device_block *block)
{
    kl_error err = {KL_OK, ""};
    if (c->dev->be->vt->alloc(c->dev->be, block->bytes, &block->data, &err) == KL_OK) return 0;
    kl_raise(c->m, &err);
    return -1;
}

int kl_call_alloc(kl_call *c, size_t bytes, void **out)
{
    const bool managed =
        !c->dev->is_cpu && c->stream_is_current && c->api->managed_tensor_allocator != NULL;
    kl_device_block block = {.bytes = bytes};
    if (c->n_device_blocks == KL_CALL_DEVICE_BLOCKS) {
        PyErr_Format(c->m->OutOfMemory, "%s: more than %d temporaries", c->op,
                     KL_CALL_DEVICE_BLOCKS);
        return -1;
    }
    if ((managed ? alloc_managed(c, &block) : alloc_of_backend(c, &block)) < 0) return -1;
    c->device_blocks[c->n_device_blocks++] = block;
    *out = block.data;
    return 0;
}

void kl_call_give_back(kl_call *c)
{
    const kl_device_block *block = &c->device_blocks[--c->n_device_blocks];
    if (block->managed == NULL)
        c->dev->be->vt->free(c->dev->be, block->data, block->bytes);
    else if (block->managed->deleter != NULL)
        block->managed->deleter(block->managed);
}

int kl_call_on_gpu(const kl_call *c, PyObject *o)
{
    DLDevice device = {kDLCPU, 0};
    if (c->dev->is_cpu) return 0; /* where an array on a GPU is refused by whoever reads it */
    int found = kl_exchange_device(c->m, o, &device);
    if (found == 0) found = kl_dlpack_device(c->m, o, &device);
    if (found < 0) return -1;
    return device.device_type == kDLCUDA || device.device_type == kDLCUDAManaged;
}
