/*
 * kda_layer.c -- a Kimi Delta Attention layer as a list of operations.
 *
 *     q, k, v = silu(conv(W_qkv h));   g = W_fb W_fa h;   beta = W_b h;   z = W_gb W_ga h
 *     y = W_o (norm(kda(q, k, v, g, beta)) * sigmoid(z))
 *
 * What can be computed beside one another goes in one operation: a token step is as long as its
 * chain of kernels.
 */
#include "model/pass.h"

#include <math.h>

/* Between the projections of h and that of o. */
static kl_status mix(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_kda_mixer *a,
                     kl_error *err)
{
    const kl_config *c = p->config;
    const int64_t H = c->kda_heads, K = c->kda_head_dim;
    a->conv_weight = kl_matrix_of(&w->conv);
    a->conv_state = p->cache->windows[index];
    a->state = p->cache->states[index];
    a->slots = p->in.slots;
    a->cu_seqlens = p->in.cu_seqlens;
    a->A_log = kl_vector_of(&w->A_log);
    a->dt_bias = kl_tensor_2d(w->dt_bias.data, KL_F32, H, K);
    a->norm_weight = kl_vector_of(&w->o_norm);
    a->gate = c->gate;
    a->lower_bound = c->gate_lower_bound;
    a->scale = 1.0f / sqrtf((float)K);
    a->eps = c->rms_eps;
    a->single = p->shape.decode;
    return kl_pass_kda_mixer(p, a, err);
}

kl_status kl_kda_layer(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_error *err)
{
    const int64_t T = p->shape.T, H = p->config->kda_heads, K = p->config->kda_head_dim;
    const kl_tensor qkv = kl_pass_take(p, p->act, T, w->qkv.rows);
    const kl_tensor low = kl_pass_take(p, p->act, T, w->low.rows);
    kl_linear_pair in = {.first = kl_pass_first_map(p, &w->low, low),
                         .second = kl_pass_first_map(p, &w->qkv, qkv)};
    KL_TRY(kl_pass_linear_pair(p, &in, err));

    const kl_tensor o = kl_pass_take(p, p->act, T, H * K);
    kl_kda_mixer mixer = {.qkv = qkv,
                          .beta = kl_columns(&low, 0, H),
                          .f_low = kl_columns(&low, H, K),
                          .f_b = w->f_b,
                          .g_low = kl_columns(&low, H + K, K),
                          .g_b = w->g_b,
                          .out = kl_heads(o, H, K)};
    KL_TRY(mix(p, w, index, &mixer, err));
    return kl_pass_last_map(p, o, &w->o, err);
}
