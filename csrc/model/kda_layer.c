/*
 * kda_layer.c -- a Kimi Delta Attention layer as a list of operations.
 *
 *     q, k, v = silu(conv(W_qkv h));   g = W_fb W_fa h;   beta = W_b h;   z = W_gb W_ga h
 *     y = W_o (norm(kda(q, k, v, g, beta)) * sigmoid(z))
 *
 * What can be computed beside one another goes in one operation: a token step is as long as its
 * chain of kernels.
 *
 * Where tokens are guesses, a state that has read a wrong one is of no use, and it cannot be taken
 * back. So guesses leave no trace in it; what the layer computed from them is kept, and once the
 * head has told which were right, the states read these.
 */
#include "model/pass.h"

#include "base/memory.h"

#include <math.h>

/* What is computed of every token before the state reads it. */
typedef struct {
    kl_tensor qkv, low;
} inputs;

static kl_tensor take(const kl_pass *p, kl_arena *arena, kl_dtype dtype, int64_t cols)
{
    const size_t bytes = (size_t)(p->shape.T * cols) * kl_dtype_bytes(dtype);
    return kl_tensor_2d(kl_arena_take(arena, bytes), dtype, p->shape.T, cols);
}

static inputs take_inputs(const kl_pass *p, kl_arena *arena)
{
    const int64_t H = p->config->kda_heads, K = p->config->kda_head_dim;
    return (inputs){.qkv = take(p, arena, p->act, 3 * H * K),
                    .low = take(p, arena, p->act, H + 2 * K)};
}

size_t kl_kda_kept_bytes(const kl_pass *p)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    take_inputs(p, &arena);
    return kl_align_up(arena.used, 64);
}

/* Those of layer `index` where tokens are guesses: in memory that outlives the layer. */
static inputs kept_inputs(const kl_pass *p, int64_t index)
{
    const size_t bytes = p->kept_bytes;
    kl_arena arena;
    kl_arena_init(&arena, p->kept == NULL ? NULL : (char *)p->kept + (size_t)index * bytes,
                  bytes);
    return take_inputs(p, &arena);
}

/* Between the projections of h and that of o [T, H K]. */
static kl_kda_mixer mixer_of(const kl_pass *p, const kl_kda_weights *w, int64_t index,
                             const inputs *in, kl_tensor o)
{
    const kl_config *c = p->config;
    const int64_t H = c->kda_heads, K = c->kda_head_dim;
    return (kl_kda_mixer){.qkv = in->qkv,
                          .conv_weight = kl_matrix_of(&w->conv),
                          .conv_state = p->cache->windows[index],
                          .beta = kl_columns(&in->low, 0, H),
                          .f_low = kl_columns(&in->low, H, K),
                          .f_b = w->f_b,
                          .g_low = kl_columns(&in->low, H + K, K),
                          .g_b = w->g_b,
                          .state = p->cache->states[index],
                          .slots = p->in.slots,
                          .cu_seqlens = p->in.cu_seqlens,
                          .A_log = kl_vector_of(&w->A_log),
                          .dt_bias = kl_tensor_2d(w->dt_bias.data, KL_F32, H, K),
                          .norm_weight = kl_vector_of(&w->o_norm),
                          .out = kl_heads(o, H, K),
                          .gate = c->gate,
                          .lower_bound = c->gate_lower_bound,
                          .scale = 1.0f / sqrtf((float)K),
                          .eps = c->rms_eps,
                          .single = p->shape.decode,
                          .guesses = p->shape.verify};
}

kl_status kl_kda_advance(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_error *err)
{
    const inputs in = kept_inputs(p, index);
    const size_t mark = p->arena.used;
    const kl_tensor untouched = kl_pass_take(p, p->act, p->shape.T, w->o.cols);
    kl_kda_mixer mixer = mixer_of(p, w, index, &in, untouched);
    mixer.tokens = p->in.ids;
    mixer.drawn = p->out.ids;
    KL_TRY(kl_pass_kda_mixer(p, &mixer, err));
    kl_arena_rewind(&p->arena, mark);
    return KL_OK;
}

static kl_linear_pair first_of(const kl_pass *p, const kl_kda_weights *w, const inputs *in)
{
    return (kl_linear_pair){.first = kl_pass_first_map(p, &w->low, in->low),
                            .second = kl_pass_first_map(p, &w->qkv, in->qkv)};
}

/* Of all heads. */
static kl_tensor take_o(const kl_pass *p, kl_arena *arena)
{
    return take(p, arena, p->act, p->config->kda_heads * p->config->kda_head_dim);
}

size_t kl_kda_arriving_bytes(const kl_pass *p)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    take_inputs(p, &arena);
    take_o(p, &arena);
    return kl_align_up(arena.used, 64);
}

kl_status kl_kda_find_arrivals(kl_pass *p, const kl_kda_weights *w, kl_error *err)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    const inputs in = take_inputs(p, &arena);
    const kl_tensor o = take_o(p, &arena);
    const kl_linear_pair first = first_of(p, w, &in);
    const kl_kda_mixer mixer = mixer_of(p, w, 0, &in, o);
    const kl_linear last = kl_pass_last_map(p, &w->o, o);
    return p->be->vt->arrivals(p->be, &first, &mixer, &last, &p->arrivals, err);
}

/* Layer `index`'s own part of p->arriving. */
static kl_arena own_memory(const kl_pass *p, int64_t index)
{
    const size_t bytes = kl_kda_arriving_bytes(p);
    char *const first = p->arriving;
    kl_arena arena;
    kl_arena_init(&arena, first == NULL ? NULL : first + (size_t)index * bytes, bytes);
    return arena;
}

kl_status kl_kda_layer(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_error *err)
{
    const bool arrives = p->arrivals.mixer || p->arrivals.out;
    kl_arena own = own_memory(p, index), *const arena = arrives ? &own : &p->arena;
    const inputs in = p->shape.verify ? kept_inputs(p, index) : take_inputs(p, arena);
    kl_linear_pair first = first_of(p, w, &in);
    KL_TRY(kl_pass_linear_pair(p, &first, err));
    const kl_tensor o = take_o(p, arena);
    kl_kda_mixer mixer = mixer_of(p, w, index, &in, o);
    mixer.arriving = p->arrivals.mixer;
    KL_TRY(kl_pass_kda_mixer(p, &mixer, err));
    kl_linear last = kl_pass_last_map(p, &w->o, o);
    last.arriving = p->arrivals.out;
    return kl_pass_linear(p, &last, err);
}
