/*
 * moe_layer.c -- the feed-forward layers, dense and mixture of experts, as operations.
 */
#include "model/pass.h"

#include "base/memory.h"

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

static kl_moe moe_of(const kl_pass *p, const kl_ends *ends, const kl_ffn_weights *w)
{
    const kl_config *c = p->config;
    return (kl_moe){.x = ends->x,
                    .norm_weight = ends->norm_weight,
                    .router = w->router,
                    .bias = kl_vector_of(&w->bias),
                    .w1 = w->w1,
                    .w3 = w->w3,
                    .w2 = w->w2,
                    .shared_w1 = w->shared_w1,
                    .shared_w3 = w->shared_w3,
                    .shared_w2 = w->shared_w2,
                    .out = ends->out,
                    .residual = ends->residual,
                    .act = p->act,
                    .norm_eps = c->rms_eps,
                    .score = c->score,
                    .top_k = (int)c->top_k,
                    .groups = (int)c->groups,
                    .top_groups = (int)c->top_groups,
                    .scaling = c->routed_scaling,
                    .renormalize = c->renormalize};
}

size_t kl_moe_sums_bytes(const kl_pass *p, int64_t layer)
{
    const kl_layer_weights *w = &p->weights->layers[layer];
    const kl_weight *before = p->config->mixer[layer] == KL_MIXER_KDA ? &w->kda.o : &w->mla.o;
    if (p->be->vt->router_sums == NULL || !p->shape.decode || p->shape.T != 1 ||
        p->config->ffn[layer] != KL_FFN_MOE)
        return 0;
    const kl_ends ends = {
        .x = p->x, .norm_weight = kl_vector_of(&w->ffn_norm), .residual = p->x};
    const kl_moe a = moe_of(p, &ends, &w->ffn);
    return kl_align_up(p->be->vt->router_sums(p->be, before, &a), KL_SUMS_ALIGNMENT);
}

kl_status kl_moe_layer(kl_pass *p, const kl_ffn_weights *w, kl_error *err)
{
    kl_moe a = moe_of(p, &p->ends, w);
    a.sums = p->ahead.sums;
    return kl_pass_moe(p, &a, err);
}
