/*
 * cuda_backend.h -- shared by the CUDA backend's own files; nothing above includes it.
 */
#ifndef KL_CUDA_BACKEND_H
#define KL_CUDA_BACKEND_H

extern "C" {
#include "backend/backend.h"
}

#include <cuda_runtime.h>

struct kl_cuda_backend {
    kl_backend base;
    int device;
    cudaStream_t stream; /* where work goes: our own, or the caller's after set_stream() */
    cudaStream_t own;
    struct kl_cuda_blas *blas; /* blas.h; NULL until the first product that wants it */
    bool batch_invariant;      /* kl_backend_options: one order of sums, whatever the batch */
    bool has_sm_90a;           /* kl_cuda_has_sm_90a() */
};

/* Turn a CUDA result into a kl_status, naming the call. Also used right after a launch:
 *     kernel<<<...>>>(...);
 *     KL_CUDA_TRY(cudaGetLastError(), err); */
#define KL_CUDA_TRY(call, err)                                                                 \
    do {                                                                                       \
        const cudaError_t kl_e_ = (call);                                                      \
        if (kl_e_ != cudaSuccess)                                                              \
            return kl_fail((err), KL_ERR_DEVICE, "cuda: %s:%d: %s: %s", __FILE__, __LINE__,    \
                           #call, cudaGetErrorString(kl_e_));                                  \
    } while (0)

/* The current device is a property of the calling thread, and callers have many: the table makes
 * the backend's current around each of its entries, and puts back what was. */
static inline cudaStream_t kl_cuda_stream(kl_backend *be)
{
    return reinterpret_cast<kl_cuda_backend *>(be)->stream;
}

/* Whether kernels may be launched that are for sm_90a alone (device/sm_90a.cuh). Whoever chooses
 * between such a kernel and another asks this. */
static inline bool kl_cuda_has_sm_90a(const kl_backend *be)
{
    return reinterpret_cast<const kl_cuda_backend *>(be)->has_sm_90a;
}

/* Of the current device. */
static inline kl_status kl_cuda_multiprocessors(int *count, kl_error *err)
{
    int device;
    KL_CUDA_TRY(cudaGetDevice(&device), err);
    KL_CUDA_TRY(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device), err);
    return KL_OK;
}

/* The operations this backend has, a line each so that the list grows by lines:
 *     X(op)   kl_cuda_<op>, in kernels/<op>*.cu */
#define KL_CUDA_OPS(X)                                                                         \
    X(embedding)                                                                               \
    X(gather)                                                                                  \
    X(rms_norm)                                                                                \
    X(gated_rms_norm)                                                                          \
    X(short_conv)                                                                              \
    X(pack_weight)                                                                             \
    X(fill_normal)                                                                             \
    X(linear)                                                                                  \
    X(linear_pair)                                                                             \
    X(mlp)                                                                                     \
    X(kda_decode)                                                                              \
    X(kda_prefill)                                                                             \
    X(kda_mixer)                                                                               \
    X(moe_route)                                                                               \
    X(moe_experts)                                                                             \
    X(moe)                                                                                     \
    X(mla_lay_out)                                                                             \
    X(mla_append)                                                                              \
    X(mla_decode)                                                                              \
    X(mla_prefill)                                                                             \
    X(token_logprobs)                                                                          \
    X(sample)

/* Those of them that need scratch memory:  X(op)   kl_cuda_<op>_workspace */
#define KL_CUDA_WORKSPACES(X)                                                                  \
    X(kda_prefill)                                                                             \
    X(kda_mixer)                                                                               \
    X(linear)                                                                                  \
    X(linear_pair)                                                                             \
    X(mlp)                                                                                     \
    X(moe_experts)                                                                             \
    X(moe)                                                                                     \
    X(mla_decode)                                                                              \
    X(mla_prefill)                                                                             \
    X(token_logprobs)                                                                          \
    X(sample)

#define KL_DECLARE(op) kl_status kl_cuda_##op(kl_backend *be, const kl_##op *a, kl_error *err);
KL_CUDA_OPS(KL_DECLARE)
#undef KL_DECLARE
#define KL_DECLARE(op) size_t kl_cuda_##op##_workspace(kl_backend *be, const kl_##op *a);
KL_CUDA_WORKSPACES(KL_DECLARE)
#undef KL_DECLARE
size_t kl_cuda_router_sums(kl_backend *be, const kl_weight *before, const kl_moe *a);
kl_status kl_cuda_arrivals(kl_backend *be, const kl_linear_pair *in, const kl_kda_mixer *mixer,
                           const kl_linear *last, kl_arrivals *out, kl_error *err);
kl_status kl_cuda_mla_arrivals(kl_backend *be, const kl_linear_pair *in, const kl_mla_decode *a,
                               const kl_linear *last, kl_mla_arrivals *out, kl_error *err);

/* kda_prefill after the short_conv that makes its q, k and v, and before a gated_rms_norm of its
 * out: either may be null. In out, state and windows the bits of the three one after the other;
 * conv->out may be left unwritten in parts. */
kl_status kl_cuda_kda_prompt(kl_backend *be, const kl_short_conv *conv, const kl_kda *a,
                             const kl_gated_rms_norm *norm, kl_error *err);
/* Of a short_conv of bf16: the windows, and the last token of each sequence. */
kl_status kl_cuda_short_conv_ends(kl_backend *be, const kl_short_conv *a, kl_error *err);

#endif
