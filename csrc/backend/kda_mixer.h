/*
 * kda_mixer.h -- kl_kda_mixer as the three operations it stands for, for backends that run it so.
 */
#ifndef KL_BACKEND_KDA_MIXER_H
#define KL_BACKEND_KDA_MIXER_H

#include "backend/ops.h"

typedef struct {
    kl_short_conv conv;
    kl_kda kda;             /* kl_kda_decode if the mixer's tokens are single, else prefill */
    kl_gated_rms_norm norm; /* in place in the mixer's out                                  */
} kl_kda_mixer_parts;

/* convolved: memory for [T, C] act between the first two. No part has its workspace yet. */
static inline kl_kda_mixer_parts kl_kda_mixer_parts_of(const kl_kda_mixer *a, void *convolved)
{
    const int64_t T = a->qkv.shape[0], C = a->qkv.shape[1];
    const int64_t H = a->state.shape[1], V = a->state.shape[2], K = a->state.shape[3];
    const kl_tensor qkv = kl_tensor_2d(convolved, a->qkv.dtype, T, C), none = {0};
    kl_kda_mixer_parts p = {0};
    p.conv.x = a->qkv, p.conv.out = qkv;
    p.conv.weight = a->conv_weight, p.conv.state = a->conv_state;
    p.conv.slots = a->slots, p.conv.cu_seqlens = a->cu_seqlens;
    p.conv.silu = true;

    p.kda.q = kl_heads(kl_columns(&qkv, 0, H * K), H, K);
    p.kda.k = kl_heads(kl_columns(&qkv, H * K, H * K), H, K);
    p.kda.v = kl_heads(kl_columns(&qkv, 2 * H * K, H * V), H, V);
    p.kda.g = a->g, p.kda.beta = a->beta;
    p.kda.state = a->state, p.kda.slots = a->slots;
    p.kda.cu_seqlens = a->single ? none : a->cu_seqlens;
    p.kda.A_log = a->A_log, p.kda.dt_bias = a->dt_bias;
    p.kda.out = a->out;
    p.kda.gate = a->gate, p.kda.lower_bound = a->lower_bound, p.kda.scale = a->scale;
    p.kda.normalize = p.kda.beta_logits = true;

    p.norm.x = p.norm.out = a->out;
    p.norm.z = a->z, p.norm.weight = a->norm_weight, p.norm.eps = a->eps;
    return p;
}

/* Bytes of `convolved`, rounded up so that a workspace may follow. */
static inline size_t kl_kda_mixer_convolved_bytes(const kl_kda_mixer *a)
{
    const size_t n = (size_t)a->qkv.shape[0] * (size_t)a->qkv.shape[1];
    return (n * kl_dtype_bytes(a->qkv.dtype) + 255) / 256 * 256;
}

#endif
