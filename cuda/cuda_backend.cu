/*
 * cuda_backend.cu -- memory, stream and lifetime on one CUDA device.
 *
 * Built into its own shared object with the CUDA runtime linked statically and libcuda not
 * linked at all: loading it needs no driver, opening a device does.
 */
#include "cuda_backend.h"

#include <stdio.h>
#include <stdlib.h>

/* The kernels are compiled for sm_90a, whose code runs on this capability and no other. */
static constexpr int MAJOR = 9, MINOR = 0;

static kl_cuda_backend *self_of(kl_backend *be)
{
    return reinterpret_cast<kl_cuda_backend *>(be);
}

kl_status kl_cuda_bind(kl_backend *be, kl_error *err)
{
    KL_CUDA_TRY(cudaSetDevice(self_of(be)->device), err);
    return KL_OK;
}

/* ---- life and info --------------------------------------------------------------------- */

static kl_status check_device(int device, kl_error *err)
{
    int count = 0;
    const cudaError_t e = cudaGetDeviceCount(&count);
    if (e != cudaSuccess)
        return kl_fail(err, KL_ERR_UNAVAILABLE, "cuda: no device can be used: %s",
                       cudaGetErrorString(e));
    if (device < 0 || device >= count)
        return kl_fail(err, KL_ERR_UNAVAILABLE, "cuda: device must be in 0 .. %d, got %d",
                       count - 1, device);
    cudaDeviceProp prop;
    KL_CUDA_TRY(cudaGetDeviceProperties(&prop, device), err);
    if (prop.major != MAJOR || prop.minor != MINOR)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "cuda: device %d must have compute capability %d.%d, got %d.%d (%s)",
                       device, MAJOR, MINOR, prop.major, prop.minor, prop.name);
    return KL_OK;
}

static void cuda_close(kl_backend *be)
{
    kl_cuda_backend *self = self_of(be);
    if (self->own != nullptr && cudaSetDevice(self->device) == cudaSuccess)
        cudaStreamDestroy(self->own);
    free(self);
}

static kl_status cuda_info(kl_backend *be, kl_backend_info *out, kl_error *err)
{
    cudaDeviceProp prop;
    KL_TRY(kl_cuda_bind(be, err));
    KL_CUDA_TRY(cudaGetDeviceProperties(&prop, self_of(be)->device), err);
    *out = {};
    KL_CUDA_TRY(cudaMemGetInfo(&out->free_bytes, &out->total_bytes), err);
    snprintf(out->name, sizeof out->name, "%.127s", prop.name);
    snprintf(out->variant, sizeof out->variant, "sm_%d%da", MAJOR, MINOR);
    out->threads = prop.multiProcessorCount;
    return KL_OK;
}

static kl_status cuda_sync(kl_backend *be, kl_error *err)
{
    KL_TRY(kl_cuda_bind(be, err));
    KL_CUDA_TRY(cudaStreamSynchronize(self_of(be)->stream), err);
    return KL_OK;
}

static kl_status cuda_set_stream(kl_backend *be, void *stream, kl_error *)
{
    self_of(be)->stream = static_cast<cudaStream_t>(stream);
    return KL_OK;
}

/* ---- memory ---------------------------------------------------------------------------- */

static kl_status cuda_alloc(kl_backend *be, size_t bytes, void **out, kl_error *err)
{
    *out = nullptr;
    KL_TRY(kl_cuda_bind(be, err));
    const cudaError_t e = cudaMalloc(out, bytes == 0 ? 1 : bytes);
    if (e == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError(); /* or the next launch would be blamed for it */
        return kl_fail(err, KL_ERR_MEMORY,
                       "cuda: no %zu bytes of memory to be had on device %d", bytes,
                       self_of(be)->device);
    }
    KL_CUDA_TRY(e, err);
    return KL_OK;
}

/* cudaFree waits for the device, so work that still uses the block has ended. */
static void cuda_free(kl_backend *be, void *ptr, size_t)
{
    kl_error err;
    if (kl_cuda_bind(be, &err) == KL_OK) (void)cudaFree(ptr);
}

static kl_status cuda_zero(kl_backend *be, void *ptr, size_t bytes, kl_error *err)
{
    KL_TRY(kl_cuda_bind(be, err));
    KL_CUDA_TRY(cudaMemsetAsync(ptr, 0, bytes, self_of(be)->stream), err);
    return KL_OK;
}

static kl_status copy(kl_backend *be, void *dst, const void *src, size_t bytes,
                      cudaMemcpyKind kind, kl_error *err)
{
    KL_TRY(kl_cuda_bind(be, err));
    KL_CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, kind, self_of(be)->stream), err);
    return KL_OK;
}

static kl_status cuda_copy_in(kl_backend *be, void *dst, const void *src, size_t bytes,
                              kl_error *err)
{
    return copy(be, dst, src, bytes, cudaMemcpyHostToDevice, err);
}

static kl_status cuda_copy_out(kl_backend *be, void *dst, const void *src, size_t bytes,
                               kl_error *err)
{
    return copy(be, dst, src, bytes, cudaMemcpyDeviceToHost, err);
}

static kl_status cuda_copy(kl_backend *be, void *dst, const void *src, size_t bytes,
                           kl_error *err)
{
    return copy(be, dst, src, bytes, cudaMemcpyDeviceToDevice, err);
}

/* ---- the table ------------------------------------------------------------------------- */

static kl_status cuda_open(const kl_backend_options *options, kl_backend **out, kl_error *err);

static constexpr kl_backend_vtbl make_table()
{
    kl_backend_vtbl t = {
        .abi = KL_BACKEND_ABI,
        .name = "cuda",
        .formats = (1u << KL_N_WEIGHT_FORMATS) - 1u,
        .open = cuda_open,
        .close = cuda_close,
        .info = cuda_info,
        .sync = cuda_sync,
        .set_stream = cuda_set_stream,
        .alloc = cuda_alloc,
        .free = cuda_free,
        .zero = cuda_zero,
        .copy_in = cuda_copy_in,
        .copy_out = cuda_copy_out,
        .copy = cuda_copy,
    };
#define KL_ENTRY(op) t.op = kl_cuda_##op;
    KL_CUDA_OPS(KL_ENTRY)
#undef KL_ENTRY
#define KL_ENTRY(op) t.op##_workspace = kl_cuda_##op##_workspace;
    KL_CUDA_WORKSPACES(KL_ENTRY)
#undef KL_ENTRY
    return t;
}

static constexpr kl_backend_vtbl cuda_vtbl = make_table();

static kl_status create_stream(kl_cuda_backend *self, kl_error *err)
{
    KL_TRY(kl_cuda_bind(&self->base, err));
    KL_CUDA_TRY(cudaStreamCreateWithFlags(&self->own, cudaStreamNonBlocking), err);
    self->stream = self->own;
    return KL_OK;
}

static kl_status cuda_open(const kl_backend_options *options, kl_backend **out, kl_error *err)
{
    *out = nullptr;
    KL_TRY(check_device(options->device, err));
    kl_cuda_backend *self = static_cast<kl_cuda_backend *>(calloc(1, sizeof *self));
    if (self == nullptr) return kl_fail(err, KL_ERR_MEMORY, "cuda: no memory for a backend");
    self->base.vt = &cuda_vtbl;
    self->device = options->device;
    self->batch_invariant = options->batch_invariant;
    const kl_status status = create_stream(self, err);
    if (status != KL_OK) {
        cuda_close(&self->base);
        return status;
    }
    *out = &self->base;
    return KL_OK;
}

extern "C" __attribute__((visibility("default"))) const kl_backend_vtbl *
kl_cuda_backend_entry(void)
{
    return &cuda_vtbl;
}
