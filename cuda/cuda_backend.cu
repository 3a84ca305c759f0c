/*
 * cuda_backend.cu -- memory, stream and lifetime on one CUDA device.
 *
 * Built into its own shared object with the CUDA runtime linked statically and libcuda not
 * linked at all: loading it needs no driver, opening a device does.
 */
#include "cuda_backend.h"

#include "blas.h"
#include "device/sm_90a.cuh"
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The kernels are compiled for sm_90a, whose code runs on capability 9.0 and no other, and to PTX
 * of compute_90, which the driver of a later device compiles. Of a block's shared memory they take
 * up to so much. */
static constexpr int LEAST_MAJOR = 9;
static constexpr size_t SHARED_BYTES = 227 * 1024;
static const char VARIANT_SM_90A[] = "sm_90a", VARIANT_SM_90[] = "sm_90";

static kl_cuda_backend *self_of(kl_backend *be)
{
    return reinterpret_cast<kl_cuda_backend *>(be);
}

/* ---- the caller's context -------------------------------------------------------------- */

/* The driver's own view of what is current on a thread. To restore it with cudaSetDevice() would
 * create a context on a device that the caller never used, and lose one that is not the
 * runtime's. Null where there is no driver: then nothing can become current. */
struct driver {
    decltype(&cuCtxGetCurrent) get = kl_cuda_driver_function<decltype(get)>("cuCtxGetCurrent");
    decltype(&cuCtxSetCurrent) set = kl_cuda_driver_function<decltype(set)>("cuCtxSetCurrent");
};

static const driver &the_driver()
{
    static const driver found;
    return found;
}

/* From here to the end of the scope the current context may change; then it is what it was. */
struct kept_context {
    CUcontext before = nullptr;

    kept_context()
    {
        (void)current(&before); /* fails before the first use: then there is none */
    }

    ~kept_context()
    {
        CUcontext now = nullptr;
        if (current(&now) && now != before) (void)the_driver().set(before);
    }

    static bool current(CUcontext *out)
    {
        const driver &d = the_driver();
        return d.get != nullptr && d.set != nullptr && d.get(out) == CUDA_SUCCESS;
    }

    kept_context(const kept_context &) = delete;
    kept_context &operator=(const kept_context &) = delete;
};

/* What the table has for f: unbound<f>::call leaves the calling thread's device as it was, and
 * entry<f>::call runs f on the backend's. */
template <auto f> struct unbound;

template <class R, class... A, R (*f)(A...)> struct unbound<f> {
    static R call(A... args)
    {
        const kept_context kept;
        return f(args...);
    }
};

/* Where a call's last argument wants its message, or null. */
static kl_error *error_in(kl_error *err)
{
    return err;
}

template <class T> static kl_error *error_in(T)
{
    return nullptr;
}

template <class T, class... Rest> static kl_error *error_in(T, Rest... rest)
{
    return error_in(rest...);
}

static kl_status bind(kl_backend *be, kl_error *err)
{
    KL_CUDA_TRY(cudaSetDevice(self_of(be)->device), err);
    return KL_OK;
}

template <auto f> struct entry;

template <class R, class... A, R (*f)(kl_backend *, A...)> struct entry<f> {
    static R call(kl_backend *be, A... args)
    {
        const kept_context kept;
        const kl_status status = bind(be, error_in(args...));
        return status == KL_OK ? f(be, args...) : static_cast<R>(status);
    }
};

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
    if (prop.major < LEAST_MAJOR)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "cuda: device %d must have compute capability >= %d.0, got %d.%d (%s)",
                       device, LEAST_MAJOR, prop.major, prop.minor, prop.name);
    if (prop.sharedMemPerBlockOptin < SHARED_BYTES)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "cuda: device %d must have %zu bytes of shared memory for a block, got "
                       "%zu (%s)",
                       device, SHARED_BYTES, prop.sharedMemPerBlockOptin, prop.name);
    return KL_OK;
}

/* The limit of its threads tells which of its two forms the driver has taken. */
static constexpr int SM_90A_THREADS = 64, PTX_THREADS = 32;

static __global__ __launch_bounds__(SM_90A ? SM_90A_THREADS : PTX_THREADS) void which_code() {}

static kl_status unavailable(cudaError_t e, kl_error *err)
{
    (void)cudaGetLastError(); /* or the next launch would be blamed for it */
    return kl_fail(err, KL_ERR_UNAVAILABLE, "cuda: the device does not run this build: %s",
                   cudaGetErrorString(e));
}

/* Asked of the code and not of the device: a driver can be told to compile the PTX anyway. */
static kl_status find_sm_90a(const char *variant, bool *has, kl_error *err)
{
    cudaFuncAttributes found;
    if (variant != nullptr && strcmp(variant, VARIANT_SM_90A) != 0 &&
        strcmp(variant, VARIANT_SM_90) != 0)
        return kl_fail(err, KL_ERR_VALUE, "cuda: variant must be '%s' or '%s', got '%s'",
                       VARIANT_SM_90A, VARIANT_SM_90, variant);
    const cudaError_t e = cudaFuncGetAttributes(&found, which_code);
    if (e != cudaSuccess) return unavailable(e, err);
    *has = found.maxThreadsPerBlock == SM_90A_THREADS;
    if (variant == nullptr) return KL_OK;
    const bool wanted = strcmp(variant, VARIANT_SM_90A) == 0;
    if (wanted && !*has)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "cuda: variant: the device must run '%s', and does not", variant);
    *has = wanted;
    return KL_OK;
}

static void cuda_close(kl_backend *be)
{
    kl_cuda_backend *self = self_of(be);
    if (self->own != nullptr && cudaSetDevice(self->device) == cudaSuccess) {
        kl_cuda_blas_free(self->blas);
        cudaStreamDestroy(self->own);
    }
    free(self);
}

static kl_status cuda_info(kl_backend *be, kl_backend_info *out, kl_error *err)
{
    cudaDeviceProp prop;
    KL_CUDA_TRY(cudaGetDeviceProperties(&prop, self_of(be)->device), err);
    *out = {};
    KL_CUDA_TRY(cudaMemGetInfo(&out->free_bytes, &out->total_bytes), err);
    snprintf(out->name, sizeof out->name, "%.127s", prop.name);
    snprintf(out->variant, sizeof out->variant, "%s",
             kl_cuda_has_sm_90a(be) ? VARIANT_SM_90A : VARIANT_SM_90);
    out->threads = prop.multiProcessorCount;
    out->batch_invariant = self_of(be)->batch_invariant;
    return KL_OK;
}

static kl_status cuda_sync(kl_backend *be, kl_error *err)
{
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
static void cuda_free(kl_backend *, void *ptr, size_t)
{
    (void)cudaFree(ptr);
}

static kl_status cuda_zero(kl_backend *be, void *ptr, size_t bytes, kl_error *err)
{
    KL_CUDA_TRY(cudaMemsetAsync(ptr, 0, bytes, self_of(be)->stream), err);
    return KL_OK;
}

static kl_status copy(kl_backend *be, void *dst, const void *src, size_t bytes,
                      cudaMemcpyKind kind, kl_error *err)
{
    KL_CUDA_TRY(cudaMemcpyAsync(dst, src, bytes, kind, self_of(be)->stream), err);
    return KL_OK;
}

/* So few bytes travel as a kernel's argument: boundaries and ids of a call. Such a copy can be
 * captured in a graph, for it does not come back to the host's memory when that is replayed. */
struct small_block {
    unsigned char bytes[2048];
};

static __global__ void store_small(unsigned char *dst, const __grid_constant__ small_block src,
                                   int n)
{
    for (int i = threadIdx.x; i < n; i += blockDim.x) dst[i] = src.bytes[i];
}

static kl_status copy_small(kl_backend *be, void *dst, const void *src, size_t bytes,
                            kl_error *err)
{
    small_block block;
    memcpy(block.bytes, src, bytes);
    store_small<<<1, 256, 0, self_of(be)->stream>>>(static_cast<unsigned char *>(dst), block,
                                                    static_cast<int>(bytes));
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

static kl_status refuse_capture(kl_backend *be, size_t bytes, kl_error *err)
{
    cudaStreamCaptureStatus now;
    KL_CUDA_TRY(cudaStreamIsCapturing(self_of(be)->stream, &now), err);
    if (now == cudaStreamCaptureStatusNone) return KL_OK;
    return kl_fail(err, KL_ERR_DEVICE,
                   "cuda: in a graph at most %zu bytes can come from the host's memory, got "
                   "%zu: pass arrays that are on the device",
                   sizeof(small_block), bytes);
}

static kl_status cuda_copy_in(kl_backend *be, void *dst, const void *src, size_t bytes,
                              kl_error *err)
{
    if (bytes <= sizeof(small_block))
        return bytes == 0 ? KL_OK : copy_small(be, dst, src, bytes, err);
    KL_TRY(refuse_capture(be, bytes, err));
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

static kl_status cuda_alloc_host(kl_backend *, size_t bytes, void **out, kl_error *err)
{
    *out = nullptr;
    const cudaError_t e = cudaMallocHost(out, bytes == 0 ? 1 : bytes);
    if (e == cudaErrorMemoryAllocation) {
        (void)cudaGetLastError();
        return kl_fail(err, KL_ERR_MEMORY, "cuda: no %zu bytes of pinned memory to be had",
                       bytes);
    }
    KL_CUDA_TRY(e, err);
    return KL_OK;
}

static void cuda_free_host(kl_backend *, void *ptr, size_t)
{
    if (ptr != nullptr) (void)cudaFreeHost(ptr);
}

/* ---- marks and recordings ------------------------------------------------------------ */

/* A kl_mark is an event, a kl_recording an executable graph. */
static cudaEvent_t event_of(kl_mark *mark)
{
    return reinterpret_cast<cudaEvent_t>(mark);
}

static cudaGraphExec_t graph_of(kl_recording *recording)
{
    return reinterpret_cast<cudaGraphExec_t>(recording);
}

static kl_status cuda_new_mark(kl_backend *, kl_mark **out, kl_error *err)
{
    cudaEvent_t event;
    *out = nullptr;
    KL_CUDA_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), err);
    *out = reinterpret_cast<kl_mark *>(event);
    return KL_OK;
}

static void cuda_free_mark(kl_backend *, kl_mark *mark)
{
    if (mark != nullptr) (void)cudaEventDestroy(event_of(mark));
}

static kl_status cuda_set_mark(kl_backend *be, kl_mark *mark, kl_error *err)
{
    KL_CUDA_TRY(cudaEventRecord(event_of(mark), self_of(be)->stream), err);
    return KL_OK;
}

static kl_status cuda_wait_mark(kl_backend *, kl_mark *mark, kl_error *err)
{
    KL_CUDA_TRY(cudaEventSynchronize(event_of(mark)), err);
    return KL_OK;
}

static kl_status cuda_record_begin(kl_backend *be, kl_error *err)
{
    /* Thread-local: other threads, torch's among them, may allocate meanwhile. */
    KL_CUDA_TRY(cudaStreamBeginCapture(self_of(be)->stream, cudaStreamCaptureModeThreadLocal),
                err);
    return KL_OK;
}

static kl_status cuda_record_end(kl_backend *be, kl_recording **out, kl_error *err)
{
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable;
    *out = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(self_of(be)->stream, &graph);
    if (ended != cudaSuccess) (void)cudaGetLastError(); /* or the next launch would be blamed */
    KL_CUDA_TRY(ended, err);
    const cudaError_t made = cudaGraphInstantiate(&executable, graph, 0);
    (void)cudaGraphDestroy(graph);
    if (made != cudaSuccess) (void)cudaGetLastError();
    if (made == cudaErrorMemoryAllocation)
        return kl_fail(err, KL_ERR_MEMORY, "cuda: no memory for the recording of a step");
    KL_CUDA_TRY(made, err);
    *out = reinterpret_cast<kl_recording *>(executable);
    return KL_OK;
}

static kl_status cuda_replay(kl_backend *be, kl_recording *recording, kl_error *err)
{
    KL_CUDA_TRY(cudaGraphLaunch(graph_of(recording), self_of(be)->stream), err);
    return KL_OK;
}

static void cuda_free_recording(kl_backend *, kl_recording *recording)
{
    if (recording != nullptr) (void)cudaGraphExecDestroy(graph_of(recording));
}

/* ---- the table ------------------------------------------------------------------------- */

static kl_status cuda_open(const kl_backend_options *options, kl_backend **out, kl_error *err);

static constexpr kl_backend_vtbl make_table()
{
    kl_backend_vtbl t = {
        .abi = KL_BACKEND_ABI,
        .name = "cuda",
        .formats = (1u << KL_N_WEIGHT_FORMATS) - 1u,
        .open = unbound<cuda_open>::call,
        .close = unbound<cuda_close>::call,
        .info = entry<cuda_info>::call,
        .sync = entry<cuda_sync>::call,
        .set_stream = cuda_set_stream,
        .alloc = entry<cuda_alloc>::call,
        .free = entry<cuda_free>::call,
        .zero = entry<cuda_zero>::call,
        .copy_in = entry<cuda_copy_in>::call,
        .copy_out = entry<cuda_copy_out>::call,
        .copy = entry<cuda_copy>::call,
        .alloc_host = entry<cuda_alloc_host>::call,
        .free_host = entry<cuda_free_host>::call,
        .new_mark = entry<cuda_new_mark>::call,
        .free_mark = entry<cuda_free_mark>::call,
        .set_mark = entry<cuda_set_mark>::call,
        .wait_mark = entry<cuda_wait_mark>::call,
        .record_begin = entry<cuda_record_begin>::call,
        .record_end = entry<cuda_record_end>::call,
        .replay = entry<cuda_replay>::call,
        .free_recording = entry<cuda_free_recording>::call,
    };
#define KL_ENTRY(op) t.op = entry<kl_cuda_##op>::call;
    KL_CUDA_OPS(KL_ENTRY)
#undef KL_ENTRY
#define KL_ENTRY(op) t.op##_workspace = kl_cuda_##op##_workspace;
    KL_CUDA_WORKSPACES(KL_ENTRY)
#undef KL_ENTRY
    t.router_sums = kl_cuda_router_sums;
    t.arrivals = entry<kl_cuda_arrivals>::call;
    t.mla_arrivals = entry<kl_cuda_mla_arrivals>::call;
    return t;
}

static constexpr kl_backend_vtbl cuda_vtbl = make_table();

/* What needs the device to be the current one. */
static kl_status start(kl_cuda_backend *self, const char *variant, kl_error *err)
{
    KL_TRY(bind(&self->base, err));
    KL_TRY(find_sm_90a(variant, &self->has_sm_90a, err));
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
    const kl_status status = start(self, options->variant, err);
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
