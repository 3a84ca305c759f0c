/*
 * backend.c -- find and open backends; the checked entry of every operation.
 */
#include "backend/backend.h"

#include "cpu/cpu_backend.h"

#include <dlfcn.h>
#include <string.h>

/* Load the CUDA backend's table. The library is never closed: dlopen counts, and its kernels
 * must outlive every backend opened from it. */
static kl_status load_cuda(const char *path, const kl_backend_vtbl **out, kl_error *err)
{
    void *library = path == NULL ? NULL : dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return kl_fail(err, KL_ERR_UNAVAILABLE, "cuda: this build has no CUDA backend: %s",
                       path == NULL ? "no library was named" : dlerror());

    kl_backend_entry_fn entry;
    *(void **)&entry = dlsym(library, KL_CUDA_ENTRY); /* POSIX's own spelling of this cast */
    if (entry == NULL) return kl_fail(err, KL_ERR_UNAVAILABLE, "cuda: %s", dlerror());

    const kl_backend_vtbl *vt = entry();
    if (vt->abi != KL_BACKEND_ABI)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "cuda: %s has backend ABI %u, this build needs %u", path, vt->abi,
                       KL_BACKEND_ABI);
    *out = vt;
    return KL_OK;
}

kl_status kl_backend_open(const char *name, const char *cuda_library,
                          const kl_backend_options *options, kl_backend **out, kl_error *err)
{
    const kl_backend_vtbl *vt = NULL;
    *out = NULL;
    if (strcmp(name, "cpu") == 0)
        vt = &kl_cpu_vtbl;
    else if (strcmp(name, "cuda") == 0)
        KL_TRY(load_cuda(cuda_library, &vt, err));
    else
        return kl_fail(err, KL_ERR_VALUE, "backend must be 'cpu' or 'cuda', got '%s'", name);
    return vt->open(options, out, err);
}

void kl_backend_close(kl_backend *be)
{
    if (be != NULL) be->vt->close(be);
}

/* ---- formats ----------------------------------------------------------------------------- */

/* The set of formats that an operation's weights have. */
#define FORMAT(w) ((w).data == NULL ? 0u : 1u << (w).format)

static unsigned of_embedding(const kl_embedding *a)
{
    return FORMAT(a->table);
}

static unsigned of_linear(const kl_linear *a)
{
    return FORMAT(a->w);
}

static unsigned of_linear_pair(const kl_linear_pair *a)
{
    return FORMAT(a->first.w) | FORMAT(a->second.w);
}

static unsigned of_mlp(const kl_mlp *a)
{
    return FORMAT(a->w1) | FORMAT(a->w3) | FORMAT(a->w2);
}

static unsigned of_moe_experts(const kl_moe_experts *a)
{
    return FORMAT(a->w1) | FORMAT(a->w3) | FORMAT(a->w2) | FORMAT(a->shared_w1) |
           FORMAT(a->shared_w3) | FORMAT(a->shared_w2);
}

static unsigned of_moe(const kl_moe *a)
{
    return FORMAT(a->router) | FORMAT(a->w1) | FORMAT(a->w3) | FORMAT(a->w2) |
           FORMAT(a->shared_w1) | FORMAT(a->shared_w3) | FORMAT(a->shared_w2);
}

static unsigned of_token_logprobs(const kl_token_logprobs *a)
{
    return FORMAT(a->lm_head);
}

static unsigned of_pack_weight(const kl_pack_weight *a)
{
    return FORMAT(a->out);
}

static unsigned of_none(const void *a)
{
    (void)a;
    return 0;
}

#define FORMATS_OF(a)                                                                          \
    _Generic(*(a), kl_embedding                                                                \
             : of_embedding, kl_linear                                                         \
             : of_linear, kl_linear_pair                                                       \
             : of_linear_pair, kl_mlp                                                          \
             : of_mlp, kl_moe_experts                                                          \
             : of_moe_experts, kl_moe                                                          \
             : of_moe, kl_token_logprobs                                                       \
             : of_token_logprobs, kl_pack_weight                                               \
             : of_pack_weight, default                                                         \
             : of_none)(a)

static kl_status check_formats(const char *op, const kl_backend_vtbl *vt, unsigned formats,
                               kl_error *err)
{
    for (int f = 0; f < KL_N_WEIGHT_FORMATS; f++)
        if ((formats & ~vt->formats & 1u << f) != 0)
            return kl_fail(err, KL_ERR_VALUE, "%s: the %s backend does not compute with %s", op,
                           vt->name, kl_weight_format_name((kl_weight_format)f));
    return KL_OK;
}

/* ---- operations -------------------------------------------------------------------------- */

#define KL_DEFINE(op)                                                                          \
    size_t kl_workspace_##op(kl_backend *be, const kl_##op *a)                                 \
    {                                                                                          \
        return be->vt->op##_workspace == NULL ? 0 : be->vt->op##_workspace(be, a);             \
    }                                                                                          \
    kl_status kl_run_##op(kl_backend *be, const kl_##op *a, kl_error *err)                     \
    {                                                                                          \
        if (be->vt->op == NULL)                                                                \
            return kl_fail(err, KL_ERR_UNAVAILABLE, #op ": the %s backend does not have it",   \
                           be->vt->name);                                                      \
        KL_TRY(kl_check_##op(a, err));                                                         \
        KL_TRY(check_formats(#op, be->vt, FORMATS_OF(a), err));                                \
        const size_t need = kl_workspace_##op(be, a);                                          \
        if (a->ws.bytes < need || (need != 0 && a->ws.data == NULL))                           \
            return kl_fail(err, KL_ERR_VALUE, #op ": needs %zu bytes of workspace, got %zu",   \
                           need, a->ws.bytes);                                                 \
        return be->vt->op(be, a, err);                                                         \
    }
KL_OPS(KL_DEFINE)
#undef KL_DEFINE
