/*
 * mla_layer.c -- a multi-head latent attention layer as a list of operations.
 *
 *     q = W_q h, or W_qb norm(W_qa h);   [c | k_pe] = W_kva h, c normalised, into the pages
 *     y = W_o mla(q, pages)
 *
 * Nothing is rotated: the "rope" channels are plain key channels that the heads share.
 */
#include "model/pass.h"

#include <math.h>

/* q, and the latents before their norm. */
static kl_status project(kl_pass *p, const kl_mla_weights *w, kl_tensor q, kl_tensor raw,
                         kl_error *err)
{
    const bool direct = p->config->q_rank == 0;
    const kl_tensor low = direct ? q : kl_pass_take(p, p->act, p->shape.T, p->config->q_rank);
    kl_linear_pair in = {.first = kl_pass_first_map(p, &w->kv_a, raw),
                         .second = kl_pass_first_map(p, direct ? &w->q : &w->q_a, low)};
    KL_TRY(kl_pass_linear_pair(p, &in, err));
    if (direct) return KL_OK;
    kl_linear up = {.x = low,
                    .norm_weight = kl_vector_of(&w->q_norm),
                    .act = p->act,
                    .norm_eps = p->config->q_norm_eps,
                    .w = w->q,
                    .out = q};
    return kl_pass_linear(p, &up, err);
}

static kl_status append(kl_pass *p, const kl_mla_weights *w, int64_t index, kl_tensor raw,
                        kl_error *err)
{
    kl_mla_append a = {.raw = raw,
                       .norm_weight = kl_vector_of(&w->kv_norm),
                       .pages = p->cache->pages[index],
                       .block_table = p->in.table,
                       .lengths = p->in.lengths,
                       .cu_seqlens = p->in.cu_seqlens,
                       .rank = p->config->kv_rank,
                       .eps = p->config->kv_norm_eps};
    return kl_pass_mla_append(p, &a, err);
}

/* A step's tokens are appended by mla_decode itself. */
static kl_status attend(kl_pass *p, const kl_mla_weights *w, int64_t index, kl_tensor q,
                        kl_tensor raw, kl_tensor out, kl_error *err)
{
    const kl_config *c = p->config;
    const int64_t H = c->mla_heads, qk = c->nope_dim + c->rope_dim, kv = c->nope_dim + c->v_dim;
    const kl_dtype dtype = kl_matrix_of(&w->kv_b).dtype;
    kl_mla a = {.q = kl_heads(q, H, qk),
                .pages = p->cache->pages[index],
                .block_table = p->in.table,
                .lengths = p->in.lengths,
                .w_kv_b = kl_tensor_3d(w->kv_b.data, dtype, H, kv, c->kv_rank),
                .out = kl_heads(out, H, c->v_dim),
                .scale = 1.0f / sqrtf((float)qk)};
    if (p->shape.decode) {
        a.raw = raw;
        a.norm_weight = kl_vector_of(&w->kv_norm);
        a.norm_eps = c->kv_norm_eps;
        return kl_pass_mla_decode(p, &a, err);
    }
    KL_TRY(append(p, w, index, raw, err));
    a.cu_seqlens = p->in.cu_seqlens;
    return kl_pass_mla_prefill(p, &a, err);
}

kl_status kl_mla_layer(kl_pass *p, const kl_mla_weights *w, int64_t index, kl_error *err)
{
    const int64_t T = p->shape.T;
    const kl_tensor q = kl_pass_take(p, p->act, T, w->q.rows);
    const kl_tensor raw = kl_pass_take(p, p->act, T, w->kv_a.rows);
    KL_TRY(project(p, w, q, raw, err));
    const kl_tensor o = kl_pass_take(p, p->act, T, p->config->mla_heads * p->config->v_dim);
    KL_TRY(attend(p, w, index, q, raw, o, err));
    kl_linear last = kl_pass_last_map(p, &w->o, o);
    return kl_pass_linear(p, &last, err);
}
