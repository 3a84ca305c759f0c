/*
 * config.h -- the shape of a Kimi Linear model, as validated numbers.
 *
 * kimi_linear/config.py reads config.json and names the key in its errors; kl_config_check()
 * is the last line of defence: nothing later multiplies numbers that it has not bounded.
 */
#ifndef KL_MODEL_CONFIG_H
#define KL_MODEL_CONFIG_H

#include "backend/ops.h"

#define KL_MAX_LAYERS 512

typedef enum { KL_MIXER_KDA, KL_MIXER_MLA } kl_mixer;
typedef enum { KL_FFN_DENSE, KL_FFN_MOE } kl_ffn;

typedef struct {
    int64_t vocab_size, hidden_size, n_layers, max_length;
    uint8_t mixer[KL_MAX_LAYERS]; /* kl_mixer of each layer */
    uint8_t ffn[KL_MAX_LAYERS];   /* kl_ffn of each layer   */

    int64_t kda_heads, kda_head_dim, conv_width; /* K = V = kda_head_dim */
    kl_gate gate;                                /* softplus or bounded  */
    float gate_lower_bound;

    int64_t mla_heads, q_rank /* 0: none */, kv_rank, nope_dim, rope_dim, v_dim;
    float q_norm_eps, kv_norm_eps; /* 1e-6 in the reference code, not rms_eps */

    int64_t dense_inner;
    int64_t n_experts, top_k, moe_inner, n_shared, groups, top_groups;
    kl_score score;
    float routed_scaling;
    bool renormalize;

    float rms_eps;
    bool tied_embeddings;
} kl_config;

kl_status kl_config_check(const kl_config *c, kl_error *err);

static inline int64_t kl_config_count(const kl_config *c, kl_mixer mixer)
{
    int64_t n = 0;
    for (int64_t i = 0; i < c->n_layers; i++) n += c->mixer[i] == mixer;
    return n;
}

#endif
