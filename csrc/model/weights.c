/*
 * weights.c -- the table of a model's weights. Names and shapes: those of the published
 * checkpoint (moonshotai/Kimi-Linear-48B-A3B).
 */
#include "model/weights.h"

#include "base/memory.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* State of one walk: what all rows of the table share. */
typedef struct {
    const kl_config *c;
    const kl_weight_visitor *v;
    kl_weight_format format; /* of the big matrices                        */
    kl_weight_format plain;  /* of the matrices that are never quantised   */
    kl_error *err;
    char layer[64], alias[64]; /* prefix of the names, and a second one or "" */
} walk;

static kl_status store(walk *s, kl_weight *dest, kl_weight_format format, int64_t count,
                       int64_t rows, int64_t cols)
{
    *dest = (kl_weight){.format = format,
                        .count = count,
                        .rows = rows,
                        .cols = cols,
                        .data = dest->data,
                        .scales = dest->scales};
    return s->v->store == NULL ? KL_OK : s->v->store(s->v->ctx, dest, s->err);
}

static kl_status part(walk *s, const char *name, kl_part p)
{
    char full[192], alias[192];
    if (s->v->part == NULL) return KL_OK;
    snprintf(full, sizeof full, "%s%s", s->layer, name);
    snprintf(alias, sizeof alias, "%s%s", s->alias, name);
    p.name = full;
    p.alias = s->alias[0] == '\0' ? NULL : alias;
    return s->v->part(s->v->ctx, &p, s->err);
}

/* A matrix [rows, cols] that goes to rows `row` on of matrix `index`. Standard deviation of a
 * random one: 1 / sqrt(cols), which keeps the size of what goes through it. */
static kl_status rows_of(walk *s, const char *name, kl_weight *dest, int64_t index, int64_t row,
                         int64_t rows)
{
    const float std = 1.0f / sqrtf((float)dest->cols);
    return part(s, name,
                (kl_part){.dest = dest, .index = index, .row = row, .rows = rows, .std = std});
}

static kl_status matrix(walk *s, const char *name, kl_weight *dest, kl_weight_format format,
                        int64_t rows, int64_t cols)
{
    KL_TRY(store(s, dest, format, 1, rows, cols));
    return rows_of(s, name, dest, 0, 0, rows);
}

/* A vector that is kept in f32. */
static kl_status vector(walk *s, const char *name, kl_weight *dest, int64_t n, kl_part how)
{
    KL_TRY(store(s, dest, KL_W_F32, 1, 1, n));
    how.dest = dest;
    how.rows = 1;
    how.vector = true;
    return part(s, name, how);
}

static kl_status norm(walk *s, const char *name, kl_weight *dest, int64_t n)
{
    return vector(s, name, dest, n, (kl_part){.mean = 1.0f});
}

static kl_status visit_kda(walk *s, kl_kda_weights *w)
{
    static const char *const qkv[] = {"self_attn.q_proj.weight", "self_attn.k_proj.weight",
                                      "self_attn.v_proj.weight"};
    static const char *const conv[] = {"self_attn.q_conv1d.weight", "self_attn.k_conv1d.weight",
                                       "self_attn.v_conv1d.weight"};
    const int64_t D = s->c->hidden_size, H = s->c->kda_heads, K = s->c->kda_head_dim;
    const int64_t HK = H * K, W = s->c->conv_width;

    KL_TRY(store(s, &w->qkv, s->format, 1, 3 * HK, D));
    for (int i = 0; i < 3; i++) KL_TRY(rows_of(s, qkv[i], &w->qkv, 0, i * HK, HK));

    KL_TRY(store(s, &w->conv, KL_W_F32, 1, 3 * HK, W));
    for (int i = 0; i < 3; i++)
        KL_TRY(part(s, conv[i],
                    (kl_part){.dest = &w->conv,
                              .row = i * HK,
                              .rows = HK,
                              .rule = KL_SHAPE_CONV,
                              .std = 1.0f / sqrtf((float)W)}));

    KL_TRY(store(s, &w->low, s->plain, 1, H + 2 * K, D));
    KL_TRY(rows_of(s, "self_attn.b_proj.weight", &w->low, 0, 0, H));
    KL_TRY(rows_of(s, "self_attn.f_a_proj.weight", &w->low, 0, H, K));
    KL_TRY(rows_of(s, "self_attn.g_a_proj.weight", &w->low, 0, H + K, K));
    KL_TRY(matrix(s, "self_attn.f_b_proj.weight", &w->f_b, s->format, HK, K));
    KL_TRY(matrix(s, "self_attn.g_b_proj.weight", &w->g_b, s->format, HK, K));

    /* Random ones near the published initialisation: rates exp(A_log) of 1 to 16, steps
     * softplus(dt_bias) of 1e-3 to 1e-1. */
    KL_TRY(vector(s, "self_attn.A_log", &w->A_log, H,
                  (kl_part){.rule = KL_SHAPE_AT_LEAST, .mean = 1.7f, .std = 0.5f}));
    KL_TRY(vector(s, "self_attn.dt_bias", &w->dt_bias, HK,
                  (kl_part){.rule = KL_SHAPE_COUNT, .mean = -4.6f, .std = 1.2f}));
    KL_TRY(norm(s, "self_attn.o_norm.weight", &w->o_norm, K));
    return matrix(s, "self_attn.o_proj.weight", &w->o, s->format, D, HK);
}

static kl_status visit_mla(walk *s, kl_mla_weights *w)
{
    const kl_config *c = s->c;
    const int64_t D = c->hidden_size, H = c->mla_heads, Q = H * (c->nope_dim + c->rope_dim);
    if (c->q_rank > 0) {
        KL_TRY(matrix(s, "self_attn.q_a_proj.weight", &w->q_a, s->format, c->q_rank, D));
        KL_TRY(norm(s, "self_attn.q_a_layernorm.weight", &w->q_norm, c->q_rank));
        KL_TRY(matrix(s, "self_attn.q_b_proj.weight", &w->q, s->format, Q, c->q_rank));
    } else {
        KL_TRY(matrix(s, "self_attn.q_proj.weight", &w->q, s->format, Q, D));
    }
    KL_TRY(matrix(s, "self_attn.kv_a_proj_with_mqa.weight", &w->kv_a, s->format,
                  c->kv_rank + c->rope_dim, D));
    KL_TRY(norm(s, "self_attn.kv_a_layernorm.weight", &w->kv_norm, c->kv_rank));
    KL_TRY(matrix(s, "self_attn.kv_b_proj.weight", &w->kv_b, s->plain,
                  H * (c->nope_dim + c->v_dim), c->kv_rank));
    return matrix(s, "self_attn.o_proj.weight", &w->o, s->format, D, H * c->v_dim);
}

/* gate_proj is w1, up_proj is w3, down_proj is w2. */
static kl_status visit_mlp(walk *s, const char *prefix, kl_weight *w1, kl_weight *w3,
                           kl_weight *w2, int64_t inner)
{
    const int64_t D = s->c->hidden_size;
    char name[96];
    snprintf(name, sizeof name, "%sgate_proj.weight", prefix);
    KL_TRY(matrix(s, name, w1, s->format, inner, D));
    snprintf(name, sizeof name, "%sup_proj.weight", prefix);
    KL_TRY(matrix(s, name, w3, s->format, inner, D));
    snprintf(name, sizeof name, "%sdown_proj.weight", prefix);
    return matrix(s, name, w2, s->format, D, inner);
}

static kl_status visit_experts(walk *s, kl_ffn_weights *w)
{
    static const char *const suffix[] = {"w1", "w3", "w2"};
    const int64_t D = s->c->hidden_size, I = s->c->moe_inner, E = s->c->n_experts;
    kl_weight *const dest[] = {&w->w1, &w->w3, &w->w2};
    char name[64];

    KL_TRY(store(s, &w->w1, s->format, E, I, D));
    KL_TRY(store(s, &w->w3, s->format, E, I, D));
    KL_TRY(store(s, &w->w2, s->format, E, D, I));
    for (int64_t e = 0; e < E; e++)
        for (int i = 0; i < 3; i++) {
            snprintf(name, sizeof name, "experts.%lld.%s.weight", (long long)e, suffix[i]);
            KL_TRY(rows_of(s, name, dest[i], e, 0, dest[i]->rows));
        }
    return KL_OK;
}

static kl_status visit_moe(walk *s, int64_t layer, kl_ffn_weights *w)
{
    const kl_config *c = s->c;
    snprintf(s->layer, sizeof s->layer, "model.layers.%lld.block_sparse_moe.",
             (long long)layer);
    snprintf(s->alias, sizeof s->alias, "model.layers.%lld.mlp.", (long long)layer);
    KL_TRY(matrix(s, "gate.weight", &w->router, KL_W_F32, c->n_experts, c->hidden_size));
    KL_TRY(vector(s, "gate.e_score_correction_bias", &w->bias, c->n_experts,
                  (kl_part){.optional = true, .router_bias = true, .std = 0.02f}));
    if (c->n_shared > 0)
        KL_TRY(visit_mlp(s, "shared_experts.", &w->shared_w1, &w->shared_w3, &w->shared_w2,
                         c->moe_inner * c->n_shared));
    return visit_experts(s, w);
}

static kl_status visit_layer(walk *s, int64_t layer, kl_layer_weights *w)
{
    const int64_t D = s->c->hidden_size;
    snprintf(s->layer, sizeof s->layer, "model.layers.%lld.", (long long)layer);
    s->alias[0] = '\0';
    KL_TRY(norm(s, "input_layernorm.weight", &w->mixer_norm, D));
    KL_TRY(s->c->mixer[layer] == KL_MIXER_KDA ? visit_kda(s, &w->kda) : visit_mla(s, &w->mla));
    KL_TRY(norm(s, "post_attention_layernorm.weight", &w->ffn_norm, D));
    if (s->c->ffn[layer] == KL_FFN_MOE) return visit_moe(s, layer, &w->ffn);
    return visit_mlp(s, "mlp.", &w->ffn.w1, &w->ffn.w3, &w->ffn.w2, s->c->dense_inner);
}

kl_status kl_weights_visit(kl_weights *w, const kl_config *config, kl_weight_format format,
                           const kl_weight_visitor *visitor, kl_error *err)
{
    walk s = {.c = config, .v = visitor, .format = format, .err = err};
    s.plain = format == KL_W_F32 ? KL_W_F32 : KL_W_BF16;
    const int64_t D = config->hidden_size, vocab = config->vocab_size;

    KL_TRY(store(&s, &w->embedding, s.plain, 1, vocab, D));
    KL_TRY(part(&s, "model.embed_tokens.weight",
                (kl_part){.dest = &w->embedding, .rows = vocab, .std = 1.0f}));
    for (int64_t i = 0; i < config->n_layers; i++) KL_TRY(visit_layer(&s, i, &w->layers[i]));

    s.layer[0] = s.alias[0] = '\0';
    KL_TRY(norm(&s, "model.norm.weight", &w->norm, D));
    if (!config->tied_embeddings)
        return matrix(&s, "lm_head.weight", &w->lm_head, format, vocab, D);
    w->lm_head = w->embedding;
    return KL_OK;
}

/* ---- layout ---------------------------------------------------------------------------- */

static kl_status layout_store(void *ctx, kl_weight *dest, kl_error *err)
{
    static const char placeholder[64];
    kl_arena *arena = ctx;
    const size_t scale_bytes = kl_weight_scale_bytes(dest);
    dest->data = kl_arena_take(arena, kl_weight_data_bytes(dest));
    dest->scales = scale_bytes == 0 ? NULL : kl_arena_take(arena, scale_bytes);
    if (arena->overflowed)
        return kl_fail(err, KL_ERR_MEMORY, "weights: the block of %zu bytes is too small",
                       arena->capacity);
    if (arena->base == NULL) {
        dest->data = (void *)placeholder;
        dest->scales = scale_bytes == 0 ? NULL : (uint16_t *)(void *)placeholder;
    }
    return KL_OK;
}

kl_status kl_weights_layout(kl_weights *w, const kl_config *config, kl_weight_format format,
                            kl_arena *arena, kl_error *err)
{
    const kl_weight_visitor visitor = {.store = layout_store, .ctx = arena};
    return kl_weights_visit(w, config, format, &visitor, err);
}

kl_status kl_weights_new(int64_t n_layers, kl_weights *out, kl_error *err)
{
    *out = (kl_weights){.n_layers = n_layers};
    out->layers = kl_calloc((size_t)n_layers, sizeof *out->layers);
    if (out->layers == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "weights: no memory for a table of %lld layers",
                       (long long)n_layers);
    return KL_OK;
}

void kl_weights_free(kl_weights *w)
{
    kl_free(w->layers);
    w->layers = NULL;
}
