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
 * back. So guesses are read by a copy, which is forgotten; what the layer computed from them is
 * kept, and once the last layer has told which were right, the state reads these again. It reads
 * them one by one, as token steps would, for the order of a chunk's sums is another.
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

/* Those of layer `index`, in memory that outlives the layer where tokens are guesses. */
static inputs inputs_of(kl_pass *p, int64_t index)
{
    if (!p->shape.verify) return take_inputs(p, &p->arena);
    const size_t bytes = kl_kda_kept_bytes(p);
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
                          .single = p->shape.decode};
}

/* ---- guesses --------------------------------------------------------------------------- */

/* Token t of feed n by itself. */
static kl_kda_mixer token_of(const kl_pass *p, const kl_kda_mixer *a, int64_t n, int64_t t)
{
    kl_kda_mixer one = *a;
    one.qkv = kl_row_slice(&a->qkv, t, 1);
    one.beta = kl_row_slice(&a->beta, t, 1);
    one.f_low = kl_row_slice(&a->f_low, t, 1);
    one.g_low = kl_row_slice(&a->g_low, t, 1);
    one.out = a->out.shape[0] == 1 ? a->out : kl_row_slice(&a->out, t, 1);
    one.slots = kl_row_slice(&a->slots, n, 1);
    one.cu_seqlens = p->in.one;
    one.single = true;
    return one;
}

/* Tokens of feed n; dry, all are the first one's. */
static int64_t count_of(const kl_pass *p, int64_t n)
{
    if (kl_pass_dry(p)) return n == 0 ? p->shape.T : 0;
    return p->step->feeds[n].n_tokens;
}

/* A copy of entry `slot` in memory like that of *t, which it becomes. */
static kl_status copy_entry(kl_pass *p, kl_tensor *t, int64_t slot, kl_error *err)
{
    size_t bytes;
    const void *const from = kl_cache_entry(t, slot, &bytes);
    t->shape[0] = 1;
    t->data = kl_arena_take(&p->arena, bytes);
    if (kl_pass_dry(p) || bytes == 0) return KL_OK;
    return p->be->vt->copy(p->be, t->data, from, bytes, err);
}

/* The certain token of feed n, then its guesses on a copy. */
static kl_status mix_feed(kl_pass *p, const kl_kda_mixer *a, int64_t n, int64_t first,
                          kl_error *err)
{
    kl_kda_mixer one = token_of(p, a, n, first), copy = *a;
    KL_TRY(kl_pass_kda_mixer(p, &one, err));
    if (count_of(p, n) == 1) return KL_OK;
    const int64_t slot =
        kl_pass_dry(p) ? 0 : (int64_t)(p->step->feeds[n].seq & 0xffffffffu) - 1;
    const size_t mark = p->arena.used;
    KL_TRY(copy_entry(p, &copy.state, slot, err));
    KL_TRY(copy_entry(p, &copy.conv_state, slot, err));
    for (int64_t t = 1; t < count_of(p, n); t++) {
        one = token_of(p, &copy, n, first + t);
        one.slots = (kl_tensor){0}; /* the only one of the copy */
        KL_TRY(kl_pass_kda_mixer(p, &one, err));
    }
    kl_arena_rewind(&p->arena, mark);
    return KL_OK;
}

static kl_status mix_guesses(kl_pass *p, const kl_kda_mixer *a, kl_error *err)
{
    int64_t first = 0;
    for (int64_t n = 0; n < p->shape.N && first < p->shape.T; n++) {
        KL_TRY(mix_feed(p, a, n, first, err));
        first += count_of(p, n);
    }
    return KL_OK;
}

kl_status kl_kda_advance(kl_pass *p, const kl_kda_weights *w, int64_t index,
                         const int64_t *taken, kl_error *err)
{
    const inputs in = inputs_of(p, index);
    const size_t mark = p->arena.used;
    const kl_tensor unread = kl_pass_take(p, p->act, 1, w->o.cols);
    const kl_kda_mixer all = mixer_of(p, w, index, &in, unread);
    int64_t first = 0;
    for (int64_t n = 0; n < p->shape.N; n++) {
        for (int64_t t = 1; t < taken[n]; t++) {
            kl_kda_mixer one = token_of(p, &all, n, first + t);
            KL_TRY(kl_pass_kda_mixer(p, &one, err));
        }
        first += count_of(p, n);
    }
    kl_arena_rewind(&p->arena, mark);
    return KL_OK;
}

/* ---- the layer ------------------------------------------------------------------------- */

kl_status kl_kda_layer(kl_pass *p, const kl_kda_weights *w, int64_t index, kl_error *err)
{
    const inputs in = inputs_of(p, index);
    kl_linear_pair first = {.first = kl_pass_first_map(p, &w->low, in.low),
                            .second = kl_pass_first_map(p, &w->qkv, in.qkv)};
    KL_TRY(kl_pass_linear_pair(p, &first, err));
    const kl_tensor o = kl_pass_take(p, p->act, p->shape.T, w->o.cols);
    kl_kda_mixer mixer = mixer_of(p, w, index, &in, o);
    KL_TRY(p->shape.verify ? mix_guesses(p, &mixer, err) : kl_pass_kda_mixer(p, &mixer, err));
    return kl_pass_last_map(p, o, &w->o, err);
}
