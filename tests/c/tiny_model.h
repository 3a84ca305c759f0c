/*
 * tiny_model.h -- a model small enough to be run thousands of times, and its checkpoint as a
 * file: every tensor that the weight table names, random bytes behind it.
 */
#ifndef KL_TINY_MODEL_H
#define KL_TINY_MODEL_H

#include "base/bf16.h"
#include "base/memory.h"
#include "base/rng.h"
#include "model/engine_struct.h"
#include "model/weights.h"
#include "test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* K != V cannot be had here (a checkpoint has one head dimension), every other pair differs. */
static const kl_config tiny_config = {
    .vocab_size = 97,
    .hidden_size = 24,
    .n_layers = 4,
    .max_length = 4096,
    .mixer = {KL_MIXER_KDA, KL_MIXER_MLA, KL_MIXER_KDA, KL_MIXER_MLA},
    .ffn = {KL_FFN_DENSE, KL_FFN_MOE, KL_FFN_MOE, KL_FFN_DENSE},
    .kda_heads = 2,
    .kda_head_dim = 8,
    .conv_width = 4,
    .gate = KL_GATE_SOFTPLUS,
    .mla_heads = 3,
    .q_rank = 10,
    .kv_rank = 12,
    .nope_dim = 6,
    .rope_dim = 4,
    .v_dim = 5,
    .q_norm_eps = 1e-6f,
    .kv_norm_eps = 1e-6f,
    .dense_inner = 20,
    .n_experts = 6,
    .top_k = 2,
    .moe_inner = 14,
    .n_shared = 1,
    .groups = 1,
    .top_groups = 1,
    .score = KL_SCORE_SIGMOID,
    .routed_scaling = 2.0f,
    .renormalize = true,
    .rms_eps = 1e-5f,
};

static const kl_engine_options tiny_options = {
    .format = KL_W_F32, .max_context = 256, .max_batch = 4, .step_tokens = 64};

enum { MAX_SOURCES = 128 };

typedef struct {
    FILE *file;
    int fd;
    kl_source sources[MAX_SOURCES];
    char names[MAX_SOURCES][96];
    int64_t n;
    uint64_t end;
    bool bf16; /* matrices in bf16 */
} checkpoint;

static inline float tiny_value(const kl_part *p, uint64_t tensor, int64_t i)
{
    const double u = kl_rng_uniform(1000 + tensor, (uint64_t)i) * 2.0 - 1.0;
    return p->mean + p->std * 1.7f * (float)u;
}

static inline kl_status tiny_write(void *ctx, const kl_part *p, kl_error *err)
{
    checkpoint *c = ctx;
    kl_source *s = &c->sources[c->n];
    const int64_t cols = p->dest->cols, size = p->rows * cols;
    (void)err;
    snprintf(c->names[c->n], sizeof c->names[0], "%s", p->name);
    *s = (kl_source){.name = c->names[c->n], .offset = c->end, .ndim = p->vector ? 1 : 2};
    s->shape[0] = p->vector ? cols : p->rows;
    s->shape[1] = cols;
    s->dtype = c->bf16 && !p->vector ? KL_BF16 : KL_F32;
    s->bytes = (uint64_t)size * kl_dtype_bytes(s->dtype);
    for (int64_t i = 0; i < size; i++) {
        const float f = tiny_value(p, (uint64_t)c->n, i);
        const uint16_t b = kl_f32_to_bf16(f);
        if (s->dtype == KL_F32)
            fwrite(&f, sizeof f, 1, c->file);
        else
            fwrite(&b, sizeof b, 1, c->file);
    }
    c->end += s->bytes;
    c->n++;
    return KL_OK;
}

static inline void tiny_checkpoint(checkpoint *c, const kl_config *config, bool bf16)
{
    const kl_weight_visitor visitor = {.part = tiny_write, .ctx = c};
    kl_weights w;
    kl_error err;
    memset(c, 0, sizeof *c);
    c->bf16 = bf16;
    c->file = tmpfile();
    if (c->file == NULL || kl_weights_new(config->n_layers, &w, &err) != KL_OK) abort();
    if (kl_weights_visit(&w, config, KL_W_F32, &visitor, &err) != KL_OK) abort();
    kl_weights_free(&w);
    fflush(c->file);
    c->fd = fileno(c->file);
}

static inline kl_status tiny_load(kl_engine *e, checkpoint *c, kl_error *err)
{
    int64_t unused = -1;
    return kl_engine_load(e, &c->fd, 1, c->sources, c->n, &unused, NULL, NULL, NULL, err);
}

static inline void tiny_ids(int32_t *ids, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)(kl_rng_uniform(seed, (uint64_t)i) * (double)tiny_config.vocab_size);
}

static inline kl_backend *tiny_backend(int threads)
{
    const kl_backend_options options = {.threads = threads};
    kl_backend *be = NULL;
    kl_error err = {KL_OK, ""};
    EXPECT(kl_backend_open("cpu", NULL, &options, &be, &err) == KL_OK);
    return be;
}

/* The tiny model with random weights, on a backend or on a CPU of its own. */
static inline kl_engine *tiny_engine_on(kl_backend *be, const kl_engine_options *options)
{
    kl_engine *e = NULL;
    kl_error err = {KL_OK, ""};
    EXPECT(kl_engine_new(be, &tiny_config, options, &e, &err) == KL_OK);
    EXPECT(kl_engine_randomize(e, 7, 1, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    return e;
}

static inline kl_engine *tiny_engine(kl_backend **be, const kl_engine_options *options)
{
    *be = tiny_backend(1);
    return tiny_engine_on(*be, options);
}

/* A cache in a block of its own, poisoned. */
static inline void *tiny_cache(kl_backend *be, const kl_config *config,
                               const kl_cache_shape *shape, kl_cache *cache, size_t *bytes)
{
    kl_error err = {KL_OK, ""};
    size_t states, pages;
    kl_arena a;
    kl_arena_init(&a, NULL, 0);
    EXPECT(kl_cache_layout(NULL, config, KL_F32, shape, &a, &states, &pages, &err) == KL_OK);
    *bytes = states + pages;
    float *const block = kl_aligned_alloc(*bytes);
    for (size_t i = 0; i < *bytes / sizeof *block; i++) block[i] = NAN;
    kl_arena_init(&a, block, *bytes);
    EXPECT(kl_cache_init(cache, be, config, KL_F32, shape, &a, &err) == KL_OK);
    EXPECT(a.used == *bytes);
    return block;
}

/* Nothing of it is in use any more. */
static inline void tiny_engine_close(kl_engine *e, kl_backend *be)
{
    int64_t sequences, pages;
    kl_engine_usage(e, &sequences, &pages);
    EXPECT(sequences == 0 && pages == 0 && e->cache.n_reserved == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* So many greedy tokens after a prompt of one, alone or of two requests: a row of ids each. */
static inline void greedy_tokens(kl_engine *e, int n, int tokens, int32_t *ids)
{
    static const int32_t prompt[] = {5, 9};
    static kl_event events[64];
    kl_request requests[2];
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    int64_t got = 0, count[2] = {0, 0};
    for (int i = 0; i < n; i++)
        requests[i] = (kl_request){.prompt = prompt + i,
                                   .n_prompt = 1,
                                   .max_new_tokens = tokens,
                                   .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    EXPECT(kl_generation_new(e, requests, n, &g, &err) == KL_OK);
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 1000, events, 64, &got, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < got; k++) {
            const int64_t r = events[k].request;
            if (count[r] < tokens) ids[r * tokens + count[r]++] = events[k].id;
        }
    }
    EXPECT_TEXT(err.message, "");
    EXPECT(count[0] == tokens);
    kl_generation_free(g);
}

#endif
