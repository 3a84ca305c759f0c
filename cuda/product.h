/*
 * product.h -- the matrix product behind linear and mlp: out = h w^T, or with a second weight
 * `up`  out = silu(h w^T) * (h up^T). h is x, or the norm of x; what would be the out may instead
 * be added to a residual. See kl_linear of backend/ops.h.
 */
#ifndef KL_CUDA_PRODUCT_H
#define KL_CUDA_PRODUCT_H

#include "cuda_backend.h"

typedef struct {
    const void *x; /* [T, w.cols] of x_dtype: act, or f32 where it is normalised */
    kl_dtype act, x_dtype;
    int64_t T, x_stride;
    kl_weight w, up; /* [O, in]; up.data NULL: none */
    void *out;       /* [T, O]; NULL with a residual */
    kl_dtype out_dtype;
    int64_t out_stride;
    bool norms, adds;         /* a plan asks for workspace before there is memory to point to */
    const float *norm_weight; /* [w.cols], if it norms; else x is h */
    float norm_eps;
    float *residual; /* [T, O] dense, if it adds; not with an `up` */
    void *h;         /* [T, w.cols] act: h is stored, too; or NULL, but for ..._single() */
    kl_router_ahead ahead; /* only where ..._step_routes() */
    float *peaks;          /* kl_linear's, of an f32 out; or NULL, but for ..._step() */
    bool arriving;         /* x is (backend/arrivals.h): only where ..._step_holds() */
} kl_cuda_product;

/* Enqueue it, with at least kl_cuda_product_workspace() bytes of scratch memory. What the kernel
 * it falls to does not do of the norm and the sum is done before and after it. */
kl_status kl_cuda_product_run(kl_backend *be, const kl_cuda_product *p, kl_workspace ws,
                              kl_error *err);
size_t kl_cuda_product_workspace(const kl_cuda_product *p);

/* Whether a linear with a residual can do the work of a router `ahead`. */
bool kl_cuda_linear_routes(kl_backend *be, const kl_linear *a);

/* Whether the next kernel can read the results of a linear_pair as they arrive, and a linear its
 * x (device/arriving.cuh). */
bool kl_cuda_linear_pair_tells(kl_backend *be, const kl_linear_pair *a);
kl_status kl_cuda_linear_hears(kl_backend *be, const kl_linear *a, bool *hears, kl_error *err);

/* The ways to compute it: a weight that streams by once, for a few tokens; tiles of tokens and
 * outputs, for many (for sm_90a alone; not float32 weights; on a batch-invariant backend with the
 * bits of the former); those two on the tensor cores and only where kl_cuda_product_run() finds alignment
 * and bf16; and the one that takes everything. None of these takes a norm or a residual. */
kl_status kl_cuda_product_few(kl_backend *be, const kl_cuda_product *p, kl_error *err);
kl_status kl_cuda_product_many(kl_backend *be, const kl_cuda_product *p, kl_error *err);
kl_status kl_cuda_product_any(kl_backend *be, const kl_cuda_product *p, kl_error *err);

/* Where few's conditions hold and x fits in shared memory beside weights that are on their way
 * before it is there, with a norm: a float32 weight by one token, without an `up` or a residual;
 * of the same weight, without a norm, also by several tokens, with the bits of one.
 * And streaming as in few, also with a residual, bit for bit unless it halves the columns or makes
 * x whole numbers, as not on a batch-invariant backend; or two such products of one h at once,
 * which it does not halve: neither has an `up`, and their weights are of one format or the first's
 * is bf16. Where it does not halve, it leaves the peaks of one product. */
bool kl_cuda_product_single_takes(const kl_cuda_product *p); /* whatever T */
kl_status kl_cuda_product_single(kl_backend *be, const kl_cuda_product *p, kl_error *err);
kl_status kl_cuda_product_f32(kl_backend *be, const kl_cuda_product *p, kl_error *err);
bool kl_cuda_product_step_takes(const kl_cuda_product *p);
bool kl_cuda_product_step_halves(kl_backend *be, const kl_cuda_product *p);
bool kl_cuda_product_step_routes(kl_backend *be, const kl_cuda_product *p);
kl_status kl_cuda_product_step_holds(kl_backend *be, const kl_cuda_product *p, bool *holds,
                                     kl_error *err);
kl_status kl_cuda_product_step(kl_backend *be, const kl_cuda_product *p, kl_error *err);
kl_status kl_cuda_product_step_pair(kl_backend *be, const kl_cuda_product *first,
                                    const kl_cuda_product *second, kl_error *err);

#endif
