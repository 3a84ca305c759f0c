/*
 * moe_layer.c -- the feed-forward layers, dense and mixture of experts, as operations.
 */
#include "model/pass.h"

kl_status kl_dense_layer(kl_pass *p, const kl_ffn_weights *w, kl_error *err)
{
    kl_mlp a = {.x = p->h, .w1 = w->w1, .w3 = w->w3, .w2 = w->w2, .out = p->y};
    return kl_pass_mlp(p, &a, err);
}

/* Router logits stay in f32: two experts that almost tie must not be swapped by a rounding. */
kl_status kl_moe_layer(kl_pass *p, const kl_ffn_weights *w, kl_error *err)
{
    const kl_config *c = p->config;
    kl_tensor logits;
    KL_TRY(kl_pass_project(p, p->h, &w->router, KL_F32, &logits, err));
    kl_moe_route route = {.logits = logits,
                          .bias = kl_vector_of(&w->bias),
                          .ids = kl_pass_take(p, KL_I32, p->shape.T, c->top_k),
                          .weights = kl_pass_take(p, KL_F32, p->shape.T, c->top_k),
                          .score = c->score,
                          .groups = (int)c->groups,
                          .top_groups = (int)c->top_groups,
                          .scaling = c->routed_scaling,
                          .renormalize = c->renormalize};
    KL_TRY(kl_pass_moe_route(p, &route, err));
    kl_moe_experts experts = {.x = p->h,
                              .ids = route.ids,
                              .weights = route.weights,
                              .w1 = w->w1,
                              .w3 = w->w3,
                              .w2 = w->w2,
                              .shared_w1 = w->shared_w1,
                              .shared_w3 = w->shared_w3,
                              .shared_w2 = w->shared_w2,
                              .out = p->y};
    return kl_pass_moe_experts(p, &experts, err);
}
