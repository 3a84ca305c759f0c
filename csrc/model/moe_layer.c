/*
 * moe_layer.c -- the feed-forward layers, dense and mixture of experts, as operations.
 */
#include "model/pass.h"

kl_status kl_dense_layer(kl_pass *p, const kl_ffn_weights *w, kl_error *err)
{
    kl_mlp a = {.x = p->ends.x,
                .norm_weight = p->ends.norm_weight,
                .w1 = w->w1,
                .w3 = w->w3,
                .w2 = w->w2,
                .out = p->ends.out,
                .residual = p->ends.residual,
                .act = p->act,
                .norm_eps = p->config->rms_eps};
    return kl_pass_mlp(p, &a, err);
}

kl_status kl_moe_layer(kl_pass *p, const kl_ffn_weights *w, kl_error *err)
{
    const kl_config *c = p->config;
    kl_moe a = {.x = p->ends.x,
                .norm_weight = p->ends.norm_weight,
                .router = w->router,
                .bias = kl_vector_of(&w->bias),
                .w1 = w->w1,
                .w3 = w->w3,
                .w2 = w->w2,
                .shared_w1 = w->shared_w1,
                .shared_w3 = w->shared_w3,
                .shared_w2 = w->shared_w2,
                .out = p->ends.out,
                .residual = p->ends.residual,
                .act = p->act,
                .norm_eps = c->rms_eps,
                .score = c->score,
                .top_k = (int)c->top_k,
                .groups = (int)c->groups,
                .top_groups = (int)c->top_groups,
                .scaling = c->routed_scaling,
                .renormalize = c->renormalize};
    return kl_pass_moe(p, &a, err);
}
