/*
 * kda_layer.c -- a Kimi Delta Attention layer as a list of operations.
 *
 *     q, k, v = silu(conv(W_qkv h));   g = W_fb W_fa h;   beta = W_b h;   z = W_gb W_ga h
 *     y = W_o (norm(kda(q, k, v, g, beta)) * sigmoid(z))
 */
#include "model/pass.h"

#include <math.h>

/* q | k | v after the convolution, [T, 3HK]. */
static kl_status make_qkv(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_tensor *qkv,
                          kl_error *err)
{
    kl_tensor raw;
    KL_TRY(kl_pass_project(p, p->h, &w->qkv, p->act, &raw, err));
    *qkv = kl_pass_take(p, p->act, p->shape.T, w->qkv.rows);
    kl_short_conv conv = {.x = raw,
                          .weight = kl_matrix_of(&w->conv),
                          .state = p->cache->windows[index],
                          .slots = p->in.slots,
                          .cu_seqlens = p->in.cu_seqlens,
                          .out = *qkv,
                          .silu = true};
    return kl_pass_short_conv(p, &conv, err);
}

static kl_status delta_attention(kl_pass *p, const kl_kda_weights *w, int64_t index,
                                 kl_tensor qkv, kl_tensor g, kl_tensor beta, kl_tensor out,
                                 kl_error *err)
{
    const kl_config *c = p->config;
    const int64_t H = c->kda_heads, K = c->kda_head_dim, HK = H * K;
    kl_kda a = {.q = kl_heads(kl_columns(&qkv, 0, HK), H, K),
                .k = kl_heads(kl_columns(&qkv, HK, HK), H, K),
                .v = kl_heads(kl_columns(&qkv, 2 * HK, HK), H, K),
                .g = kl_heads(g, H, K),
                .beta = beta,
                .state = p->cache->states[index],
                .slots = p->in.slots,
                .A_log = kl_vector_of(&w->A_log),
                .dt_bias = kl_tensor_2d(w->dt_bias.data, KL_F32, H, K),
                .out = kl_heads(out, H, K),
                .gate = c->gate,
                .lower_bound = c->gate_lower_bound,
                .scale = 1.0f / sqrtf((float)K),
                .normalize = true,
                .beta_logits = true};
    if (p->shape.decode) return kl_pass_kda_decode(p, &a, err);
    a.cu_seqlens = p->in.cu_seqlens;
    return kl_pass_kda_prefill(p, &a, err);
}

kl_status kl_kda_layer(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_error *err)
{
    const int64_t H = p->config->kda_heads, K = p->config->kda_head_dim;
    kl_tensor qkv, low, g, z;
    KL_TRY(make_qkv(p, w, index, &qkv, err));
    KL_TRY(kl_pass_project(p, p->h, &w->low, p->act, &low, err));
    KL_TRY(kl_pass_project(p, kl_columns(&low, H, K), &w->f_b, KL_F32, &g, err));
    KL_TRY(kl_pass_project(p, kl_columns(&low, H + K, K), &w->g_b, p->act, &z, err));

    const kl_tensor o = kl_pass_take(p, p->act, p->shape.T, H * K);
    KL_TRY(delta_attention(p, w, index, qkv, g, kl_columns(&low, 0, H), o, err));
    kl_gated_rms_norm norm = {.x = kl_heads(o, H, K),
                              .z = kl_heads(z, H, K),
                              .weight = kl_vector_of(&w->o_norm),
                              .out = kl_heads(o, H, K),
                              .eps = p->config->rms_eps};
    KL_TRY(kl_pass_gated_rms_norm(p, &norm, err));
    kl_linear out = {.x = o, .w = w->o, .out = p->y};
    return kl_pass_linear(p, &out, err);
}
