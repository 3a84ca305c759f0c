/*
 * mla_layer.c -- a multi-head latent attention layer as a list of operations.
 *
 *     q = W_q h, or W_qb norm(W_qa h);   [c | k_pe] = W_kva h, c normalised, into the pages
 *     y = W_o mla(q, pages)
 *
 * Nothing is rotated: the "rope" channels are plain key channels that the heads share.
 */
#include "model/pass.h"

#include "base/memory.h"

#include <math.h>

/* What passes between a layer's operations. */
typedef struct {
    kl_tensor q, raw, out; /* raw: the latents before their norm */
    kl_tensor blanks;      /* mla_decode's, or absent            */
} passed;

static kl_tensor take(const kl_pass *p, kl_arena *arena, int64_t cols)
{
    const size_t bytes = (size_t)(p->shape.T * cols) * kl_dtype_bytes(p->act);
    return kl_tensor_2d(kl_arena_take(arena, bytes), p->act, p->shape.T, cols);
}

static passed take_passed(const kl_pass *p, const kl_mla_weights *w, kl_arena *arena)
{
    const int64_t bytes = (int64_t)p->mla_arrivals.blanks;
    passed m = {.q = take(p, arena, w->q.rows),
                .raw = take(p, arena, w->kv_a.rows),
                .out = take(p, arena, p->config->mla_heads * p->config->v_dim)};
    if (bytes > 0) m.blanks = kl_tensor_1d(kl_arena_take(arena, (size_t)bytes), KL_U8, bytes);
    return m;
}

static kl_linear_pair first_of(const kl_pass *p, const kl_mla_weights *w, kl_tensor low,
                               kl_tensor raw)
{
    return (kl_linear_pair){
        .first = kl_pass_first_map(p, &w->kv_a, raw),
        .second = kl_pass_first_map(p, p->config->q_rank == 0 ? &w->q : &w->q_a, low)};
}

/* q, and the latents before their norm. */
static kl_status project(kl_pass *p, const kl_mla_weights *w, kl_tensor q, kl_tensor raw,
                         kl_error *err)
{
    const bool direct = p->config->q_rank == 0;
    const kl_tensor low = direct ? q : kl_pass_take(p, p->act, p->shape.T, p->config->q_rank);
    kl_linear_pair in = first_of(p, w, low, raw);
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
static kl_mla attention_of(const kl_pass *p, const kl_mla_weights *w, int64_t index,
                           const passed *m)
{
    const kl_config *c = p->config;
    const int64_t H = c->mla_heads, qk = c->nope_dim + c->rope_dim, kv = c->nope_dim + c->v_dim;
    const kl_dtype dtype = kl_matrix_of(&w->kv_b).dtype;
    kl_mla a = {.q = kl_heads(m->q, H, qk),
                .pages = p->cache->pages[index],
                .block_table = p->in.table,
                .lengths = p->in.lengths,
                .w_kv_b = kl_tensor_3d(w->kv_b.data, dtype, H, kv, c->kv_rank),
                .out = kl_heads(m->out, H, c->v_dim),
                .blanks = m->blanks,
                .scale = 1.0f / sqrtf((float)qk)};
    if (!p->shape.decode) {
        a.cu_seqlens = p->in.cu_seqlens;
        return a;
    }
    a.raw = m->raw;
    a.norm_weight = kl_vector_of(&w->kv_norm);
    a.norm_eps = c->kv_norm_eps;
    return a;
}

static kl_status attend(kl_pass *p, const kl_mla_weights *w, int64_t index, const passed *m,
                        kl_error *err)
{
    kl_mla a = attention_of(p, w, index, m);
    if (p->shape.decode) return kl_pass_mla_decode(p, &a, err);
    KL_TRY(append(p, w, index, m->raw, err));
    return kl_pass_mla_prefill(p, &a, err);
}

size_t kl_mla_arriving_bytes(const kl_pass *p, const kl_mla_weights *w)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    take_passed(p, w, &arena);
    return kl_align_up(arena.used, 64);
}

/* A q that comes by two products is complete before mla_decode. */
kl_status kl_mla_find_arrivals(kl_pass *p, const kl_mla_weights *w, kl_error *err)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    if (p->config->q_rank > 0) return KL_OK;
    const passed m = take_passed(p, w, &arena);
    const kl_linear_pair first = first_of(p, w, m.q, m.raw);
    const kl_mla_decode a = attention_of(p, w, 0, &m);
    const kl_linear last = kl_pass_last_map(p, &w->o, m.out);
    return p->be->vt->mla_arrivals(p->be, &first, &a, &last, &p->mla_arrivals, err);
}

/* Layer `index`'s own part of p->mla_arriving. */
static kl_arena own_memory(const kl_pass *p, const kl_mla_weights *w, int64_t index)
{
    const size_t bytes = kl_mla_arriving_bytes(p, w);
    char *const first = p->mla_arriving;
    kl_arena arena;
    kl_arena_init(&arena, first == NULL ? NULL : first + (size_t)index * bytes, bytes);
    return arena;
}

kl_status kl_mla_layer(kl_pass *p, const kl_mla_weights *w, int64_t index, kl_error *err)
{
    const bool arrives = p->mla_arrivals.blanks > 0 || p->mla_arrivals.out;
    kl_arena own = own_memory(p, w, index);
    const passed m = take_passed(p, w, arrives ? &own : &p->arena);
    KL_TRY(project(p, w, m.q, m.raw, err));
    KL_TRY(attend(p, w, index, &m, err));
    kl_linear last = kl_pass_last_map(p, &w->o, m.out);
    last.arriving = p->mla_arrivals.out;
    return kl_pass_linear(p, &last, err);
}
