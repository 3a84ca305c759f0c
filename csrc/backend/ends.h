/*
 * ends.h -- the norm before a product and the sum after it: the act between them, and the two as
 * operations, for backends that run them so.
 */
#ifndef KL_BACKEND_ENDS_H
#define KL_BACKEND_ENDS_H

#include "backend/ops.h"

/* Of h: with a norm before it, not x's. */
static inline kl_dtype kl_act_behind(const kl_tensor *x, const kl_tensor *norm_weight,
                                     kl_dtype act)
{
    return kl_tensor_absent(norm_weight) ? x->dtype : act;
}

static inline kl_dtype kl_linear_act(const kl_linear *a)
{
    return kl_act_behind(&a->x, &a->norm_weight, a->act);
}

static inline kl_dtype kl_mlp_act(const kl_mlp *a)
{
    return kl_act_behind(&a->x, &a->norm_weight, a->act);
}

static inline kl_dtype kl_moe_act(const kl_moe *a)
{
    return kl_act_behind(&a->x, &a->norm_weight, a->act);
}

/* h = norm(x). An x of another dtype than h goes in as a residual, which nothing is added to. */
static inline kl_rms_norm kl_norm_before(kl_tensor x, kl_tensor weight, float eps, kl_tensor h)
{
    kl_rms_norm a = {.weight = weight, .out = h, .eps = eps};
    if (x.dtype == h.dtype)
        a.x = x;
    else
        a.residual = x;
    return a;
}

/* residual += y. The weight says how long a row is; without an out nobody reads it. */
static inline kl_rms_norm kl_sum_after(kl_tensor y, kl_tensor residual)
{
    return (kl_rms_norm){
        .x = y, .residual = residual, .weight = kl_tensor_1d(NULL, KL_F32, y.shape[1])};
}

#endif
