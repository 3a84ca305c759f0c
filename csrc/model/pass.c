/*
 * pass.c -- the order of a model: embedding, layers, head; see pass.h.
 *
 *     x = embedding;  for each layer: x += mixer(norm(x));  x += ffn(norm(x))
 *
 * An addition to x is done by the norm that follows it, in one walk over memory; with few tokens
 * both belong to the products on either side of them, for there each kernel costs more than its
 * bytes. The bits are the same (backend/ops.h says of which backends).
 */
#include "model/pass.h"

#define LONG_STEP 512 /* tokens: fewer take less than half a second even on a million */

/* ---- buffers and operations ------------------------------------------------------------ */

/* [rows], or with cols [rows, cols]. */
static kl_tensor take(kl_arena *a, kl_dtype dtype, int64_t rows, int64_t cols)
{
    const int64_t n = cols == 0 ? rows : rows * cols;
    void *data = kl_arena_take(a, (size_t)n * kl_dtype_bytes(dtype));
    return cols == 0 ? kl_tensor_1d(data, dtype, rows) : kl_tensor_2d(data, dtype, rows, cols);
}

size_t kl_pass_layout_inputs(kl_pass_inputs *in, const kl_pass_shape *s, int64_t vocab,
                             void *block)
{
    kl_arena a;
    kl_arena_init(&a, block, SIZE_MAX);
    *in = (kl_pass_inputs){.ids = take(&a, KL_I32, s->T, 0),
                           .cu_seqlens = take(&a, KL_I32, s->N + 1, 0),
                           .slots = take(&a, KL_I32, s->N, 0),
                           .lengths = take(&a, KL_I32, s->N, 0),
                           .table = take(&a, KL_I32, s->N, s->B > 0 ? s->B : 1),
                           .rows = take(&a, KL_I32, s->R, 0)};
    if (s->targets) in->targets = take(&a, KL_I32, s->R, 0);
    if (s->sampling) in->sampling = kl_arena_take(&a, (size_t)s->R * sizeof *in->sampling);
    if (s->seen) in->seen = take(&a, KL_I32, s->R, (vocab + 31) / 32);
    return a.used;
}

size_t kl_pass_layout_outputs(kl_pass_outputs *out, const kl_pass_shape *s, void *block)
{
    kl_arena a;
    kl_arena_init(&a, block, SIZE_MAX);
    *out = (kl_pass_outputs){0};
    if (!s->sampling && !s->targets) return 0;
    out->logprobs = take(&a, KL_F32, s->R, 0);
    if (s->top > 0) {
        out->top_ids = take(&a, KL_I32, s->R, s->top);
        out->top_logprobs = take(&a, KL_F32, s->R, s->top);
    }
    if (s->targets) out->greedy = take(&a, KL_U8, s->R, 0);
    if (s->sampling) out->ids = take(&a, KL_I32, s->R, 0);
    return a.used;
}

bool kl_pass_feeds_itself(const kl_pass_shape *s)
{
    return s->decode && s->sampling && s->all_rows;
}

/* Bytes of the ids at the beginning of the inputs, and at the end of such a step's outputs. */
static size_t ids_bytes(const kl_pass_shape *s)
{
    kl_arena a;
    kl_arena_init(&a, NULL, 0);
    take(&a, KL_I32, s->T, 0);
    return a.used;
}

kl_tensor kl_pass_take(kl_pass *p, kl_dtype dtype, int64_t rows, int64_t cols)
{
    const size_t bytes = (size_t)(rows * cols) * kl_dtype_bytes(dtype);
    return kl_tensor_2d(kl_arena_take(&p->arena, bytes), dtype, rows, cols);
}

static kl_status check_arena(const kl_pass *p, const char *op, kl_error *err)
{
    if (!p->arena.overflowed) return KL_OK;
    return kl_fail(err, KL_ERR_MEMORY,
                   "%s: the step needs more scratch memory than its plan of %zu bytes", op,
                   p->arena.capacity);
}

/* A dry pass too refuses what the backend lacks: a plan that stands can be run. */
#define KL_DEFINE(op)                                                                          \
    kl_status kl_pass_##op(kl_pass *p, kl_##op *a, kl_error *err)                              \
    {                                                                                          \
        if (p->be->vt->op == NULL)                                                             \
            return kl_fail(err, KL_ERR_UNAVAILABLE, #op ": the %s backend does not have it",   \
                           p->be->vt->name);                                                   \
        const size_t mark = p->arena.used;                                                     \
        a->ws.bytes = kl_workspace_##op(p->be, a);                                             \
        a->ws.data = a->ws.bytes == 0 ? NULL : kl_arena_take(&p->arena, a->ws.bytes);          \
        KL_TRY(check_arena(p, #op, err));                                                      \
        kl_arena_rewind(&p->arena, mark);                                                      \
        return kl_pass_dry(p) ? KL_OK : kl_run_##op(p->be, a, err);                            \
    }
KL_OPS(KL_DEFINE)
#undef KL_DEFINE

kl_linear kl_pass_first_map(const kl_pass *p, const kl_weight *w, kl_tensor out)
{
    return (kl_linear){.x = p->ends.x,
                       .norm_weight = p->ends.norm_weight,
                       .act = p->act,
                       .norm_eps = p->config->rms_eps,
                       .w = *w,
                       .out = out};
}

kl_linear kl_pass_last_map(const kl_pass *p, const kl_weight *w, kl_tensor x)
{
    return (kl_linear){
        .x = x, .w = *w, .out = p->ends.out, .residual = p->ends.residual, .ahead = p->ahead};
}

/* ---- layers ---------------------------------------------------------------------------- */

static bool is_few(const kl_pass *p)
{
    return p->shape.T <= KL_FEW_TOKENS;
}

/* Before a part of a layer: x += y, which the part before it has left (unless this is `first`),
 * and h = norm(x). */
static kl_status enter(kl_pass *p, const kl_weight *norm_weight, bool first, kl_error *err)
{
    const kl_tensor weight = kl_vector_of(norm_weight);
    if (is_few(p)) {
        p->ends = (kl_ends){.x = p->x, .norm_weight = weight, .residual = p->x};
        return KL_OK;
    }
    p->ends = (kl_ends){.x = p->h, .out = p->y};
    kl_rms_norm a = {
        .residual = p->x, .weight = weight, .out = p->h, .eps = p->config->rms_eps};
    if (!first) a.x = p->y;
    return kl_pass_rms_norm(p, &a, err);
}

/* After the last one: x += y. */
static kl_status leave(kl_pass *p, kl_error *err)
{
    kl_rms_norm last = {.x = p->y, .residual = p->x, .weight = kl_vector_of(&p->weights->norm)};
    return is_few(p) ? KL_OK : kl_pass_rms_norm(p, &last, err);
}

/* The stream after a layer goes out when the layer's addition to it has been done. */
static kl_status capture(kl_pass *p, int64_t layer, kl_error *err)
{
    if (kl_pass_dry(p)) return KL_OK;
    const size_t bytes = (size_t)kl_tensor_size(&p->x) * sizeof(float);
    for (int64_t i = 0; i < p->step->n_captures; i++) {
        const kl_capture *c = &p->step->captures[i];
        if (c->layer == layer)
            KL_TRY(p->be->vt->copy_out(p->be, c->out, p->x.data, bytes, err));
    }
    return KL_OK;
}

kl_status kl_pass_poll(const kl_pass *p, kl_error *err)
{
    if (kl_pass_dry(p) || p->step->poll == NULL || p->step->poll(p->step->poll_ctx) == 0)
        return KL_OK;
    return kl_fail(err, KL_ERR_CANCELLED, "step: the caller asked to stop");
}

/* The host enqueues layers far faster than the device runs those of a long prompt: seconds of work
 * that no poll could stop any more. So it stays a layer ahead, which is enough to lose no time. */
static kl_status keep_near(kl_pass *p, int64_t layer, kl_error *err)
{
    if (kl_pass_dry(p) || p->shape.decode || p->shape.T < LONG_STEP) return KL_OK;
    KL_TRY(p->be->vt->set_mark(p->be, p->marks[layer % 2], err));
    return p->be->vt->wait_mark(p->be, p->marks[(layer + 1) % 2], err);
}

/* For the sums of all layers, or absent: the embedding clears them. */
static kl_tensor take_sums(kl_pass *p)
{
    size_t bytes = 0;
    for (int64_t i = 0; i < p->config->n_layers; i++) bytes += kl_moe_sums_bytes(p, i);
    p->sums = bytes == 0 ? NULL : kl_arena_take(&p->arena, bytes);
    return bytes == 0 ? (kl_tensor){0} : kl_tensor_1d(p->sums, KL_U8, (int64_t)bytes);
}

/* The first layer with this mixer, or NULL. */
static const kl_layer_weights *first_with(const kl_pass *p, kl_mixer mixer)
{
    int64_t i = 0;
    while (i < p->config->n_layers && p->config->mixer[i] != mixer) i++;
    return i < p->config->n_layers ? &p->weights->layers[i] : NULL;
}

/* Find what of the KDA layers is read as it arrives: they are alike, so the first speaks for them.
 * The bytes of all of them. */
static kl_status find_kda_arrivals(kl_pass *p, size_t *bytes, kl_error *err)
{
    const kl_layer_weights *w = first_with(p, KL_MIXER_KDA);
    if (p->be->vt->arrivals == NULL || w == NULL) return KL_OK;
    KL_TRY(enter(p, &w->mixer_norm, true, err));
    KL_TRY(kl_kda_find_arrivals(p, &w->kda, err));
    if (p->arrivals.mixer || p->arrivals.out)
        *bytes = (size_t)p->cache->n_kda * kl_kda_arriving_bytes(p);
    return KL_OK;
}

/* The same of the MLA layers. */
static kl_status find_mla_arrivals(kl_pass *p, size_t *bytes, kl_error *err)
{
    const kl_layer_weights *w = first_with(p, KL_MIXER_MLA);
    if (p->be->vt->mla_arrivals == NULL || w == NULL) return KL_OK;
    KL_TRY(enter(p, &w->mixer_norm, true, err));
    KL_TRY(kl_mla_find_arrivals(p, &w->mla, err));
    if (p->mla_arrivals.blanks > 0 || p->mla_arrivals.out)
        *bytes = (size_t)p->cache->n_mla * kl_mla_arriving_bytes(p, &w->mla);
    return KL_OK;
}

/* Memory for what arrives, or absent: the embedding makes it blank. */
static kl_status take_arriving(kl_pass *p, kl_tensor *blanks, kl_error *err)
{
    size_t kda = 0, mla = 0;
    p->arrivals = (kl_arrivals){0}, p->mla_arrivals = (kl_mla_arrivals){0};
    if (!p->shape.decode || p->shape.T != 1) return KL_OK;
    KL_TRY(find_kda_arrivals(p, &kda, err));
    KL_TRY(find_mla_arrivals(p, &mla, err));
    if (kda + mla == 0) return KL_OK;
    p->arriving = kl_arena_take(&p->arena, kda + mla);
    p->mla_arriving = p->arriving == NULL ? NULL : p->arriving + kda;
    *blanks = kl_tensor_1d(p->arriving, KL_U8, (int64_t)(kda + mla));
    return KL_OK;
}

static void look_ahead(kl_pass *p, int64_t layer)
{
    const kl_layer_weights *w = &p->weights->layers[layer];
    const size_t bytes = p->sums == NULL ? 0 : kl_moe_sums_bytes(p, layer);
    p->ahead = (kl_router_ahead){0};
    if (bytes == 0) return;
    p->ahead = (kl_router_ahead){
        .router = w->ffn.router, .norm_weight = kl_vector_of(&w->ffn_norm), .sums = p->sums,
        .bias = kl_vector_of(&w->ffn.bias), .norm_eps = p->config->rms_eps, .top_k = (int)p->config->top_k};
    p->sums += bytes;
}

static kl_status run_mixer(kl_pass *p, int64_t layer, int64_t *n_kda, int64_t *n_mla,
                           kl_error *err)
{
    const kl_layer_weights *w = &p->weights->layers[layer];
    if (p->config->mixer[layer] == KL_MIXER_KDA)
        return kl_kda_layer(p, &w->kda, (*n_kda)++, err);
    return kl_mla_layer(p, &w->mla, (*n_mla)++, err);
}

static kl_status run_ffn(kl_pass *p, int64_t layer, kl_error *err)
{
    const kl_ffn_weights *w = &p->weights->layers[layer].ffn;
    return p->config->ffn[layer] == KL_FFN_MOE ? kl_moe_layer(p, w, err)
                                               : kl_dense_layer(p, w, err);
}

static kl_status run_layers(kl_pass *p, kl_error *err)
{
    int64_t n_kda = 0, n_mla = 0;
    for (int64_t i = 0; i < p->config->n_layers; i++) {
        const kl_layer_weights *w = &p->weights->layers[i];
        const size_t mark = p->arena.used;
        KL_TRY(keep_near(p, i, err));
        KL_TRY(kl_pass_poll(p, err));
        KL_TRY(enter(p, &w->mixer_norm, i == 0, err));
        if (i > 0) KL_TRY(capture(p, i - 1, err));
        look_ahead(p, i);
        KL_TRY(run_mixer(p, i, &n_kda, &n_mla, err));
        kl_arena_rewind(&p->arena, mark);
        KL_TRY(kl_pass_poll(p, err));
        KL_TRY(enter(p, &w->ffn_norm, false, err));
        KL_TRY(run_ffn(p, i, err));
        kl_arena_rewind(&p->arena, mark);
    }
    KL_TRY(leave(p, err));
    return capture(p, p->config->n_layers - 1, err);
}

/* ---- the whole ------------------------------------------------------------------------- */

kl_status kl_pass_start(kl_pass *p, const kl_pass_shape *shape, kl_error *err)
{
    const int64_t vocab = p->config->vocab_size;
    p->shape = *shape;
    kl_arena_rewind(&p->arena, 0);
    p->in_bytes = kl_pass_layout_inputs(&p->in, shape, vocab, NULL);
    p->out_bytes = kl_pass_layout_outputs(&p->out, shape, NULL);
    const size_t shared = kl_pass_feeds_itself(shape) ? ids_bytes(shape) : 0;
    p->out_block = kl_arena_take(&p->arena, p->out_bytes - shared);
    p->in_block = kl_arena_take(&p->arena, p->in_bytes);
    if (shape->verify && p->cache->n_kda > 0) {
        p->kept_bytes = kl_kda_kept_bytes(p);
        p->kept = kl_arena_take(&p->arena, (size_t)p->cache->n_kda * p->kept_bytes);
    }
    KL_TRY(check_arena(p, "step", err));
    kl_pass_layout_inputs(&p->in, shape, vocab, p->in_block);
    kl_pass_layout_outputs(&p->out, shape, p->out_block);
    return KL_OK;
}

kl_status kl_pass_send(kl_pass *p, const void *inputs, bool follows, kl_error *err)
{
    const size_t there = follows ? ids_bytes(&p->shape) : 0;
    return p->be->vt->copy_in(p->be, (char *)p->in_block + there, (const char *)inputs + there,
                              p->in_bytes - there, err);
}

kl_status kl_pass_fetch(kl_pass *p, void *outputs, kl_error *err)
{
    if (p->out_bytes == 0) return KL_OK;
    return p->be->vt->copy_out(p->be, outputs, p->out_block, p->out_bytes, err);
}

/* After the draws of a verify step. */
static kl_status advance(kl_pass *p, kl_error *err)
{
    int64_t index = 0;
    for (int64_t i = 0; i < p->config->n_layers; i++)
        if (p->config->mixer[i] == KL_MIXER_KDA)
            KL_TRY(kl_kda_advance(p, &p->weights->layers[i].kda, index++, err));
    return KL_OK;
}

kl_status kl_pass_compute(kl_pass *p, kl_error *err)
{
    const int64_t T = p->shape.T, D = p->config->hidden_size;
    p->x = kl_pass_take(p, KL_F32, T, D);
    const size_t mark = p->arena.used;
    if (!is_few(p)) {
        p->h = kl_pass_take(p, p->act, T, D);
        p->y = kl_pass_take(p, p->act, T, D);
    }

    kl_embedding embed = {
        .ids = p->in.ids, .table = p->weights->embedding, .out = p->x, .sums = take_sums(p)};
    KL_TRY(take_arriving(p, &embed.blanks, err));
    KL_TRY(kl_pass_embedding(p, &embed, err));
    KL_TRY(run_layers(p, err));
    kl_arena_rewind(&p->arena, mark); /* the head needs x alone */
    if (p->shape.R > 0) KL_TRY(kl_head(p, err));
    return p->shape.verify ? advance(p, err) : KL_OK;
}

kl_status kl_pass_sample_logits(kl_pass *p, const float *logits, kl_error *err)
{
    const kl_tensor z = kl_pass_take(p, KL_F32, p->shape.R, p->config->vocab_size);
    const size_t bytes = (size_t)kl_tensor_size(&z) * sizeof(float);
    KL_TRY(check_arena(p, "sample", err));
    if (!kl_pass_dry(p)) KL_TRY(p->be->vt->copy_in(p->be, z.data, logits, bytes, err));
    return kl_head_sample(p, z, (kl_tensor){0}, err);
}
