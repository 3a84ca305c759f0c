/*
 * backend.h -- what the model runner may ask of a device.
 *
 * A backend is a table of functions behind an opaque context. The CPU's table is linked in;
 * the CUDA table comes from a second shared object, opened on first use, so that the package
 * imports where there is no driver. Work is enqueued in order on the backend's stream and may
 * return before it has run; sync() waits. Callers use kl_run_<op>(), which checks and then
 * dispatches.
 */
#ifndef KL_BACKEND_BACKEND_H
#define KL_BACKEND_BACKEND_H

#include "backend/arrivals.h"
#include "backend/ops.h"

#include <stddef.h>

/* Raised with every change to kl_backend_vtbl or to a struct of ops.h; a library built with
 * another number is refused. */
#define KL_BACKEND_ABI 17u

/* The only symbol the CUDA library exports. */
#define KL_CUDA_ENTRY "kl_cuda_backend_entry"

typedef struct kl_backend kl_backend;
typedef struct kl_mark kl_mark;           /* a point in a backend's order of work */
typedef struct kl_recording kl_recording; /* work that can be enqueued again      */

/* What a backend is opened with; zero means its own choice. batch_invariant: a row's result has
 * the same bits whichever rows share its call, at the cost of the fastest matrix products. */
typedef struct {
    int device;           /* ordinal; 0 on the CPU                                     */
    int threads;          /* CPU: worker threads, the caller's included                */
    const char *variant;  /* kl_backend_info's, "avx2", "sm_90"; NULL: the widest there is */
    bool batch_invariant; /* CUDA: see above; the CPU always is                        */
} kl_backend_options;

typedef struct {
    char name[128];       /* "AMD EPYC ...", "NVIDIA H100 ..."                   */
    char variant[32];     /* instruction set in use: "avx512bf16", "sm_90a"      */
    size_t total_bytes;   /* memory of the device                                */
    size_t free_bytes;    /* free now                                            */
    int threads;          /* CPU worker threads; multiprocessors of a GPU        */
    bool batch_invariant; /* see kl_backend_options                            */
} kl_backend_info;

typedef struct {
    unsigned abi;
    const char *name; /* "cpu", "cuda" */
    unsigned formats; /* of weights that it computes with: a set of 1u << kl_weight_format */

    kl_status (*open)(const kl_backend_options *options, kl_backend **out, kl_error *err);
    void (*close)(kl_backend *be);
    kl_status (*info)(kl_backend *be, kl_backend_info *out, kl_error *err);
    kl_status (*sync)(kl_backend *be, kl_error *err);
    /* Enqueue from now on on this stream of the caller's (a cudaStream_t; NULL: the legacy
     * default stream). NULL entry: the backend has no streams, or only its own. */
    kl_status (*set_stream)(kl_backend *be, void *stream, kl_error *err);

    /* Device memory, at least 64-byte aligned, uninitialised. zero() and the copies are
     * enqueued; copy_in and copy_out may return before the host buffer is free to reuse. */
    kl_status (*alloc)(kl_backend *be, size_t bytes, void **out, kl_error *err);
    void (*free)(kl_backend *be, void *ptr, size_t bytes);
    kl_status (*zero)(kl_backend *be, void *ptr, size_t bytes, kl_error *err);
    kl_status (*copy_in)(kl_backend *be, void *dst, const void *src, size_t bytes,
                         kl_error *err);
    kl_status (*copy_out)(kl_backend *be, void *dst, const void *src, size_t bytes,
                          kl_error *err);
    kl_status (*copy)(kl_backend *be, void *dst, const void *src, size_t bytes, kl_error *err);

    /* Host memory for copies at the device's full speed, in the background: pinned where the
     * device is not the host. Operations can read it, over the bus, like the device's own; where
     * the device is the host, alloc_host is alloc. 64-byte aligned, uninitialised. */
    kl_status (*alloc_host)(kl_backend *be, size_t bytes, void **out, kl_error *err);
    void (*free_host)(kl_backend *be, void *ptr, size_t bytes);

    /* set_mark() moves a mark to the end of the work enqueued so far; wait_mark() blocks the
     * caller, not the device, until that work has run (at once for a mark never set). For
     * buffers that are used again before everything has ended. */
    kl_status (*new_mark)(kl_backend *be, kl_mark **out, kl_error *err);
    void (*free_mark)(kl_backend *be, kl_mark *mark);
    kl_status (*set_mark)(kl_backend *be, kl_mark *mark, kl_error *err);
    kl_status (*wait_mark)(kl_backend *be, kl_mark *mark, kl_error *err);

    /* Between record_begin() and record_end(), operations, zero() and copy() are noted and not
     * run; replay() enqueues them with the pointers, shapes and values they were noted with.
     * record_end() also ends a recording that went wrong: then *out is NULL. All NULL: the
     * backend records nothing, and its callers enqueue each time. */
    kl_status (*record_begin)(kl_backend *be, kl_error *err);
    kl_status (*record_end)(kl_backend *be, kl_recording **out, kl_error *err);
    kl_status (*replay)(kl_backend *be, kl_recording *recording, kl_error *err);
    void (*free_recording)(kl_backend *be, kl_recording *recording);

    /* Operations. NULL: this backend lacks it. <op>_workspace NULL: it needs none. A larger
     * T, N or context never needs less workspace, so a plan may ask for the largest only. */
#define KL_ENTRY(op)                                                                           \
    kl_status (*op)(kl_backend * be, const kl_##op *a, kl_error *err);                         \
    size_t (*op##_workspace)(kl_backend * be, const kl_##op *a);
    KL_OPS(KL_ENTRY)
#undef KL_ENTRY

    /* Bytes of the sums that a linear by `before` leaves for the layer `a` of a single token,
     * whose x is its residual (router_ahead.h); 0: it leaves none. NULL: none ever does. */
    size_t (*router_sums)(kl_backend *be, const kl_weight *before, const kl_moe *a);

    /* Which operations of a KDA layer of a single token, enqueued in this order, may be told that
     * their inputs are arriving (arrivals.h). NULL: none. */
    kl_status (*arrivals)(kl_backend *be, const kl_linear_pair *in, const kl_kda_mixer *mixer,
                          const kl_linear *last, kl_arrivals *out, kl_error *err);
    /* The same of an MLA layer, whose mla_decode has no blanks yet. */
    kl_status (*mla_arrivals)(kl_backend *be, const kl_linear_pair *in, const kl_mla_decode *a,
                              const kl_linear *last, kl_mla_arrivals *out, kl_error *err);
} kl_backend_vtbl;

struct kl_backend {
    const kl_backend_vtbl *vt; /* first member of every backend's own struct */
};

typedef const kl_backend_vtbl *(*kl_backend_entry_fn)(void);

/* Open "cpu" or "cuda". cuda_library is where the CUDA backend's shared object lies (may be
 * NULL for "cpu"). */
kl_status kl_backend_open(const char *name, const char *cuda_library,
                          const kl_backend_options *options, kl_backend **out, kl_error *err);
void kl_backend_close(kl_backend *be); /* NULL is fine */

/* kl_run_<op>: refuse a call that breaks ops.h, has too small a workspace, or that the backend
 * lacks; else enqueue it. kl_workspace_<op>: bytes of workspace such a call needs. */
#define KL_DECLARE(op)                                                                         \
    kl_status kl_run_##op(kl_backend *be, const kl_##op *a, kl_error *err);                    \
    size_t kl_workspace_##op(kl_backend *be, const kl_##op *a);
KL_OPS(KL_DECLARE)
#undef KL_DECLARE

#endif
