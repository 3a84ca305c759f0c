/*
 * kda_mixer.h -- kl_kda_mixer as the operations it stands for, for backends that run it so.
 */
#ifndef KL_BACKEND_KDA_MIXER_H
#define KL_BACKEND_KDA_MIXER_H

#include "backend/ops.h"

typedef struct {
    kl_linear_pair gates;
    kl_short_conv conv;
    kl_kda kda;             /* kl_kda_decode if the mixer's tokens are single, else prefill */
    kl_gated_rms_norm norm; /* in place in the mixer's out                                  */
} kl_kda_mixer_parts;

/* What passes between them, at the start of the mixer's workspace. The rest of it is for all of
 * them: they run in turn. */
typedef struct {
    kl_tensor qkv; /* [T, C] act, convolved */
    kl_tensor g;   /* [T, H K] f32          */
    kl_tensor z;   /* [T, H V] act          */
    size_t bytes;
} kl_kda_mixer_between;

/* The next [T, cols] of the workspace, which may be NULL. */
static inline kl_tensor kl_kda_mixer_take(const kl_kda_mixer *a, kl_kda_mixer_between *b,
                                          kl_dtype dtype, int64_t cols)
{
    char *const ws = (char *)a->ws.data;
    const int64_t T = a->qkv.shape[0];
    const kl_tensor t = kl_tensor_2d(ws == NULL ? NULL : ws + b->bytes, dtype, T, cols);
    b->bytes += ((size_t)T * (size_t)cols * kl_dtype_bytes(dtype) + 255) / 256 * 256;
    return t;
}

static inline kl_kda_mixer_between kl_kda_mixer_between_of(const kl_kda_mixer *a)
{
    kl_kda_mixer_between b = {0};
    b.qkv = kl_kda_mixer_take(a, &b, a->qkv.dtype, a->qkv.shape[1]);
    b.g = kl_kda_mixer_take(a, &b, KL_F32, a->f_b.rows);
    b.z = kl_kda_mixer_take(a, &b, a->qkv.dtype, a->g_b.rows);
    return b;
}

static inline kl_kda kl_kda_mixer_kda_of(const kl_kda_mixer *a, const kl_kda_mixer_between *b)
{
    const int64_t H = a->state.shape[1], V = a->state.shape[2], K = a->state.shape[3];
    const kl_tensor none = {0};
    kl_kda kda = {0};
    kda.q = kl_heads(kl_columns(&b->qkv, 0, H * K), H, K);
    kda.k = kl_heads(kl_columns(&b->qkv, H * K, H * K), H, K);
    kda.v = kl_heads(kl_columns(&b->qkv, 2 * H * K, H * V), H, V);
    kda.g = kl_heads(b->g, H, K), kda.beta = a->beta;
    kda.state = a->state, kda.slots = a->slots;
    kda.cu_seqlens = a->single ? none : a->cu_seqlens;
    kda.A_log = a->A_log, kda.dt_bias = a->dt_bias;
    kda.out = a->out;
    kda.gate = a->gate, kda.lower_bound = a->lower_bound, kda.scale = a->scale;
    kda.normalize = kda.beta_logits = true;
    return kda;
}

/* Without memory in a->ws: the shapes alone, to ask how much each part needs. */
static inline kl_kda_mixer_parts kl_kda_mixer_parts_of(const kl_kda_mixer *a)
{
    const int64_t H = a->state.shape[1], V = a->state.shape[2];
    const kl_kda_mixer_between b = kl_kda_mixer_between_of(a);
    kl_workspace rest = {NULL, 0};
    kl_kda_mixer_parts p = {0};
    if (a->ws.data != NULL)
        rest.data = (char *)a->ws.data + b.bytes, rest.bytes = a->ws.bytes - b.bytes;
    p.gates.first.x = a->f_low, p.gates.first.w = a->f_b, p.gates.first.out = b.g;
    p.gates.second.x = a->g_low, p.gates.second.w = a->g_b, p.gates.second.out = b.z;
    p.gates.ws = rest;

    p.conv.x = a->qkv, p.conv.out = b.qkv;
    p.conv.weight = a->conv_weight, p.conv.state = a->conv_state;
    p.conv.slots = a->slots, p.conv.cu_seqlens = a->cu_seqlens;
    p.conv.silu = true;

    p.kda = kl_kda_mixer_kda_of(a, &b);
    p.kda.ws = rest;

    p.norm.x = p.norm.out = a->out;
    p.norm.z = kl_heads(b.z, H, V), p.norm.weight = a->norm_weight, p.norm.eps = a->eps;
    return p;
}

/* The workspace of the whole, from those of its parts. */
static inline size_t kl_kda_mixer_bytes(const kl_kda_mixer *a, size_t gates, size_t kda)
{
    return kl_kda_mixer_between_of(a).bytes + (gates > kda ? gates : kda);
}

#endif
