/*
 * blas.cu -- cuBLASLt behind dlopen: its library, its handle, and the algorithm of each shape.
 *
 * Row-major out = x w^T is, to a library of column-major matrices, out^T [O, T] = (w^T)^T x^T.
 * Sums are f32 without TF32. An algorithm may split the columns, whose sums it adds in f32 and in
 * one order: [2304, 9216] by few tokens is eighteen tiles otherwise, 210 us on an H200 instead of
 * 17. So a shape has one order of sums; which one depends on T: a batch-invariant backend does not
 * come here.
 *
 * Shapes recur (a model has a dozen weights, a prefill one length of chunk), so a shape is
 * looked up in a small table before cuBLASLt is asked for its algorithm, which takes tens of
 * microseconds.
 */
#include "blas.h"

#include "device/types.cuh"

#include <cublasLt.h>
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr char LIBRARY[] = "libcublasLt.so.13";
constexpr int PLANS = 64;               /* a model's weights in a few lengths of chunk */
constexpr uint32_t ALIGNMENT = 16;      /* of all operands, for vector loads */
constexpr uintptr_t WS_ALIGNMENT = 256; /* of a workspace; an arena's blocks have less */

struct functions {
    decltype(&cublasLtCreate) create;
    decltype(&cublasLtDestroy) destroy;
    decltype(&cublasLtGetStatusString) status_string;
    decltype(&cublasLtMatmul) matmul;
    decltype(&cublasLtMatmulDescCreate) desc_create;
    decltype(&cublasLtMatmulDescDestroy) desc_destroy;
    decltype(&cublasLtMatmulDescSetAttribute) desc_set;
    decltype(&cublasLtMatrixLayoutCreate) layout_create;
    decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
    decltype(&cublasLtMatmulPreferenceCreate) preference_create;
    decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
    decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
    decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
};

/* What an algorithm depends on. */
struct shape {
    int64_t T, in, O, x_stride, out_stride;
    int64_t dtype, out_dtype;
};

struct plan {
    shape of;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t w, x, out;
    cublasLtMatmulAlgo_t algorithm;
};

} // namespace

struct kl_cuda_blas {
    functions f;
    cublasLtHandle_t handle;
    plan plans[PLANS];
    int n_plans, oldest; /* a full table replaces its plans in turn */
};

#define BLAS_TRY(f, call, err)                                                                 \
    do {                                                                                       \
        const cublasStatus_t blas_s_ = (call);                                                 \
        if (blas_s_ != CUBLAS_STATUS_SUCCESS)                                                  \
            return kl_fail((err), KL_ERR_DEVICE, "cuda: %s:%d: %s: %s", __FILE__, __LINE__,    \
                           #call, (f).status_string(blas_s_));                                 \
    } while (0)

/* ---- the library ----------------------------------------------------------------------- */

/* NVIDIA's wheels lie beside this package in site-packages. */
static void *open_beside_us(const char *folder)
{
    Dl_info self;
    if (dladdr(reinterpret_cast<const void *>(&kl_cuda_blas_free), &self) == 0) return nullptr;
    const char *const slash = strrchr(self.dli_fname, '/');
    if (slash == nullptr) return nullptr;
    char path[PATH_MAX];
    const int length =
        snprintf(path, sizeof path, "%.*s/../nvidia/%s/lib/%s",
                 static_cast<int>(slash - self.dli_fname), self.dli_fname, folder, LIBRARY);
    if (length < 0 || static_cast<size_t>(length) >= sizeof path) return nullptr;
    return dlopen(path, RTLD_NOW | RTLD_LOCAL);
}

/* One that the process has already comes first: two of 100 MB would be one too many. */
static void *open_library()
{
    void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) library = open_beside_us("cu13");
    if (library == nullptr) library = open_beside_us("cublas");
    return library;
}

template <class F> static bool find(void *library, const char *name, F *to)
{
    *to = reinterpret_cast<F>(dlsym(library, name));
    return *to != nullptr;
}

static bool find_all(void *library, functions *f)
{
    return find(library, "cublasLtCreate", &f->create) &&
           find(library, "cublasLtDestroy", &f->destroy) &&
           find(library, "cublasLtGetStatusString", &f->status_string) &&
           find(library, "cublasLtMatmul", &f->matmul) &&
           find(library, "cublasLtMatmulDescCreate", &f->desc_create) &&
           find(library, "cublasLtMatmulDescDestroy", &f->desc_destroy) &&
           find(library, "cublasLtMatmulDescSetAttribute", &f->desc_set) &&
           find(library, "cublasLtMatrixLayoutCreate", &f->layout_create) &&
           find(library, "cublasLtMatrixLayoutDestroy", &f->layout_destroy) &&
           find(library, "cublasLtMatmulPreferenceCreate", &f->preference_create) &&
           find(library, "cublasLtMatmulPreferenceDestroy", &f->preference_destroy) &&
           find(library, "cublasLtMatmulPreferenceSetAttribute", &f->preference_set) &&
           find(library, "cublasLtMatmulAlgoGetHeuristic", &f->heuristic);
}

/* The library stays loaded: one that registered kernels cannot be unloaded safely. */
static kl_status open_blas(kl_cuda_blas **out, kl_error *err)
{
    void *const library = open_library();
    if (library == nullptr)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "cuda: %s is not to be found (pip install 'nvidia-cublas==13.*')",
                       LIBRARY);
    functions f;
    if (!find_all(library, &f))
        return kl_fail(err, KL_ERR_UNAVAILABLE, "cuda: %s lacks a function of cuBLASLt",
                       LIBRARY);
    kl_cuda_blas *const blas = static_cast<kl_cuda_blas *>(calloc(1, sizeof *blas));
    if (blas == nullptr) return kl_fail(err, KL_ERR_MEMORY, "cuda: no memory for cuBLASLt");
    blas->f = f;
    const cublasStatus_t status = f.create(&blas->handle);
    if (status != CUBLAS_STATUS_SUCCESS) {
        free(blas);
        return kl_fail(err, KL_ERR_UNAVAILABLE, "cuda: cublasLtCreate: %s",
                       f.status_string(status));
    }
    *out = blas;
    return KL_OK;
}

/* ---- plans ----------------------------------------------------------------------------- */

static void free_plan(const functions &f, plan *p)
{
    if (p->desc != nullptr) f.desc_destroy(p->desc);
    if (p->w != nullptr) f.layout_destroy(p->w);
    if (p->x != nullptr) f.layout_destroy(p->x);
    if (p->out != nullptr) f.layout_destroy(p->out);
    *p = {};
}

static cudaDataType type_of(int64_t dtype)
{
    return dtype == KL_BF16 ? CUDA_R_16BF : CUDA_R_32F;
}

static kl_status describe(const functions &f, plan *p, kl_error *err)
{
    const shape &s = p->of;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    BLAS_TRY(f, f.desc_create(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), err);
    BLAS_TRY(f,
             f.desc_set(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed),
             err);
    BLAS_TRY(f, f.layout_create(&p->w, type_of(s.dtype), s.in, s.O, s.in), err);
    BLAS_TRY(f, f.layout_create(&p->x, type_of(s.dtype), s.in, s.T, s.x_stride), err);
    BLAS_TRY(f, f.layout_create(&p->out, type_of(s.out_dtype), s.O, s.T, s.out_stride), err);
    return KL_OK;
}

static kl_status prefer(const functions &f, cublasLtMatmulPreference_t preference,
                        kl_error *err)
{
    const size_t bytes = KL_CUDA_BLAS_BYTES - WS_ALIGNMENT;
    const uint32_t scheme = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    BLAS_TRY(f,
             f.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                              sizeof bytes),
             err);
    BLAS_TRY(f,
             f.preference_set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme,
                              sizeof scheme),
             err);
    constexpr cublasLtMatmulPreferenceAttributes_t operands[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES};
    for (const auto operand : operands)
        BLAS_TRY(f, f.preference_set(preference, operand, &ALIGNMENT, sizeof ALIGNMENT), err);
    return KL_OK;
}

static kl_status choose_algorithm(kl_cuda_blas *blas, plan *p, kl_error *err)
{
    const functions &f = blas->f;
    cublasLtMatmulPreference_t preference;
    BLAS_TRY(f, f.preference_create(&preference), err);
    cublasLtMatmulHeuristicResult_t best;
    int found = 0;
    kl_status status = prefer(f, preference, err);
    if (status == KL_OK) {
        const cublasStatus_t s = f.heuristic(blas->handle, p->desc, p->w, p->x, p->out, p->out,
                                             preference, 1, &best, &found);
        if (s != CUBLAS_STATUS_SUCCESS || found == 0)
            status = kl_fail(err, KL_ERR_DEVICE,
                             "cuda: cuBLASLt has no algorithm for %lld x %lld x %lld: %s",
                             static_cast<long long>(p->of.T), static_cast<long long>(p->of.O),
                             static_cast<long long>(p->of.in), f.status_string(s));
    }
    f.preference_destroy(preference);
    if (status == KL_OK) p->algorithm = best.algo;
    return status;
}

static kl_status plan_for(kl_cuda_blas *blas, const shape &s, const plan **out, kl_error *err)
{
    for (int i = 0; i < blas->n_plans; i++)
        if (memcmp(&blas->plans[i].of, &s, sizeof s) == 0) {
            *out = &blas->plans[i];
            return KL_OK;
        }
    plan made = {};
    made.of = s;
    kl_status status = describe(blas->f, &made, err);
    if (status == KL_OK) status = choose_algorithm(blas, &made, err);
    if (status != KL_OK) {
        free_plan(blas->f, &made);
        return status;
    }
    plan *const place = &blas->plans[blas->oldest];
    free_plan(blas->f, place);
    *place = made;
    blas->oldest = (blas->oldest + 1) % PLANS;
    if (blas->n_plans < PLANS) blas->n_plans++;
    *out = place;
    return KL_OK;
}

/* ---- what others call ------------------------------------------------------------------ */

bool kl_cuda_blas_takes(const kl_cuda_product *p)
{
    const size_t element = kl_dtype_bytes(p->act), out_element = kl_dtype_bytes(p->out_dtype);
    const bool plain = (p->act == KL_BF16 && p->w.format == KL_W_BF16) ||
                       (p->act == KL_F32 && p->w.format == KL_W_F32);
    return plain && p->w.cols > 0 && p->up.data == nullptr && p->x_stride >= p->w.cols &&
           p->out_stride >= p->w.rows && is_aligned(p->x, p->x_stride, element, ALIGNMENT) &&
           is_aligned(p->w.data, p->w.cols, element, ALIGNMENT) &&
           is_aligned(p->out, p->out_stride, out_element, ALIGNMENT);
}

kl_status kl_cuda_blas_run(kl_backend *be, const kl_cuda_product *p, kl_workspace ws,
                           kl_error *err)
{
    kl_cuda_backend *const self = reinterpret_cast<kl_cuda_backend *>(be);
    if (self->blas == nullptr) KL_TRY(open_blas(&self->blas, err));
    const shape s = {p->T,          p->w.cols, p->w.rows,   p->x_stride,
                     p->out_stride, p->act,    p->out_dtype};
    const plan *chosen = nullptr;
    KL_TRY(plan_for(self->blas, s, &chosen, err));
    const functions &f = self->blas->f;
    const float one = 1, zero = 0;
    const uintptr_t at = reinterpret_cast<uintptr_t>(ws.data);
    void *const scratch =
        reinterpret_cast<void *>((at + WS_ALIGNMENT - 1) / WS_ALIGNMENT * WS_ALIGNMENT);
    BLAS_TRY(f,
             f.matmul(self->blas->handle, chosen->desc, &one, p->w.data, chosen->w, p->x,
                      chosen->x, &zero, p->out, chosen->out, p->out, chosen->out,
                      &chosen->algorithm, scratch, KL_CUDA_BLAS_BYTES - WS_ALIGNMENT,
                      self->stream),
             err);
    return KL_OK;
}

void kl_cuda_blas_free(kl_cuda_blas *blas)
{
    if (blas == nullptr) return;
    for (plan &p : blas->plans) free_plan(blas->f, &p);
    blas->f.destroy(blas->handle);
    free(blas);
}
