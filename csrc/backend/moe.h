/*
 * moe.h -- kl_moe as the operations it stands for, for backends that run it so.
 */
#ifndef KL_BACKEND_MOE_H
#define KL_BACKEND_MOE_H

#include "backend/ends.h"

/* In this order; no part has its workspace yet. */
typedef struct {
    kl_rms_norm norm; /* unless norm_weight is absent */
    kl_linear router;
    kl_moe_route route;
    kl_moe_experts experts;
    kl_rms_norm add; /* residual += y, unless residual is absent */
    size_t bytes;    /* of `scratch` */
} kl_moe_parts;

/* The next rows of a scratch block, 256-byte aligned so that a workspace may follow; NULL only
 * measures. */
static inline kl_tensor kl_moe_rows(char *scratch, size_t *end, kl_dtype dtype, int64_t rows,
                                    int64_t cols)
{
    void *const data = scratch == NULL ? NULL : scratch + *end;
    const size_t bytes = (size_t)rows * (size_t)cols * kl_dtype_bytes(dtype);
    *end += (bytes + 255) / 256 * 256;
    return kl_tensor_2d(data, dtype, rows, cols);
}

/* scratch: memory for what one part hands to the next, of a call's `bytes`. */
static inline kl_moe_parts kl_moe_parts_of(const kl_moe *a, char *scratch)
{
    const int64_t T = a->x.shape[0], D = a->x.shape[1], E = a->w1.count;
    const bool normed = !kl_tensor_absent(&a->norm_weight);
    const bool adds = !kl_tensor_absent(&a->residual);
    kl_moe_parts p = {0};
    const kl_dtype act = kl_moe_act(a);
    const kl_tensor h = normed ? kl_moe_rows(scratch, &p.bytes, act, T, D) : a->x;
    p.norm = kl_norm_before(a->x, a->norm_weight, a->norm_eps, h);

    p.router.x = h, p.router.w = a->router;
    p.router.out = kl_moe_rows(scratch, &p.bytes, KL_F32, T, E);

    p.route.logits = p.router.out, p.route.bias = a->bias;
    p.route.ids = kl_moe_rows(scratch, &p.bytes, KL_I32, T, a->top_k);
    p.route.weights = kl_moe_rows(scratch, &p.bytes, KL_F32, T, a->top_k);
    p.route.score = a->score, p.route.scaling = a->scaling;
    p.route.groups = a->groups, p.route.top_groups = a->top_groups;
    p.route.renormalize = a->renormalize;

    p.experts.x = h, p.experts.ids = p.route.ids, p.experts.weights = p.route.weights;
    p.experts.w1 = a->w1, p.experts.w3 = a->w3, p.experts.w2 = a->w2;
    p.experts.shared_w1 = a->shared_w1, p.experts.shared_w3 = a->shared_w3;
    p.experts.shared_w2 = a->shared_w2;
    p.experts.out = adds ? kl_moe_rows(scratch, &p.bytes, act, T, D) : a->out;

    p.add = kl_sum_after(p.experts.out, a->residual);
    return p;
}

#endif
