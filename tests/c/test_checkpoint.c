/*
 * test_checkpoint.c -- a tiny checkpoint that is broken, or spelled otherwise.
 */
#include "test.h"

#include "model/engine_struct.h"
#include "model/prompt.h"
#include "tiny_model.h"

#include <unistd.h>

enum { VOCAB = 97 };

static kl_source *source_named(checkpoint *c, const char *name)
{
    for (int64_t i = 0; i < c->n; i++)
        if (strcmp(c->sources[i].name, name) == 0) return &c->sources[i];
    abort();
}

static void expect_unloadable(kl_engine *e, checkpoint *c, kl_status wanted, const char *text)
{
    kl_error err = {KL_OK, ""};
    EXPECT(tiny_load(e, c, &err) == wanted);
    EXPECT(strstr(err.message, text) != NULL);
    if (strstr(err.message, text) == NULL) printf("  got '%s'\n", err.message);
}

#define WITH(source_name, change, status, text)                                                \
    do {                                                                                       \
        c = whole;                                                                             \
        kl_source *s = source_named(&c, source_name);                                          \
        change;                                                                                \
        expect_unloadable(e, &c, status, text);                                                \
    } while (0)

static void broken_checkpoints_are_named(void)
{
    static checkpoint whole, c;
    kl_backend *be = tiny_backend(1);
    kl_error err = {KL_OK, ""};
    kl_engine *e;
    tiny_checkpoint(&whole, &tiny_config, true);
    EXPECT(kl_engine_new(be, &tiny_config, &tiny_options, &e, &err) == KL_OK);

    WITH("model.norm.weight", s->name = "model.nom.weight", KL_ERR_WEIGHTS,
         "1 tensors are missing: model.norm.weight");
    WITH("model.layers.2.self_attn.k_proj.weight", s->shape[0] = 17, KL_ERR_WEIGHTS,
         "model.layers.2.self_attn.k_proj.weight must have shape [16, 24], got [17, 24]");
    WITH("lm_head.weight", s->ndim = 1, KL_ERR_WEIGHTS, "must have shape [97, 24], got [97]");
    WITH("lm_head.weight", s->bytes -= 2, KL_ERR_WEIGHTS, "must lie in the bytes of its shape");
    WITH("lm_head.weight", s->offset = UINT64_MAX - 5, KL_ERR_WEIGHTS, "must lie in the bytes");
    WITH("lm_head.weight", s->dtype = KL_I32, KL_ERR_WEIGHTS, "must be F32 or BF16");
    WITH("lm_head.weight", s->name = "model.norm.weight", KL_ERR_WEIGHTS, "is there twice");
    WITH("lm_head.weight", s->file = 1, KL_ERR_VALUE, "must be in [0, 1), got 1");
    WITH("model.layers.0.self_attn.dt_bias", s->shape[0] = INT64_MAX, KL_ERR_WEIGHTS,
         "dt_bias");
    WITH("model.layers.0.self_attn.dt_bias",
         (s->ndim = 3, s->shape[1] = INT64_MAX, s->shape[2] = INT64_MAX), KL_ERR_WEIGHTS,
         "dt_bias");
    c = whole;
    for (int64_t i = 0; i < c.n; i++) c.sources[i].name = "x";
    expect_unloadable(e, &c, KL_ERR_WEIGHTS, "x is there twice");
    c = whole;
    c.n = 2;
    expect_unloadable(e, &c, KL_ERR_WEIGHTS, "tensors are missing: model.layers.0.self_attn");

    int32_t id = 1;
    float logits[VOCAB];
    const kl_prompt p = {.ids = &id, .n = 1, .last_logits = logits};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_ERR_VALUE); /* nothing was loaded */
    EXPECT(tiny_load(e, &whole, &err) == KL_OK);
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    c = whole;
    EXPECT(ftruncate(whole.fd, (off_t)whole.end - 10) == 0);
    expect_unloadable(e, &c, KL_ERR_IO, "the file ends within");
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_ERR_VALUE); /* half loaded is not loaded */
    c.fd = 9999;
    expect_unloadable(e, &c, KL_ERR_IO, "Bad file descriptor");
    kl_engine_free(e);
    fclose(whole.file);
    kl_backend_close(be);
}

/* Other names and shapes for the same numbers: squeezed or not, under either prefix, a padded
 * A_log, no correction bias. */
static void spellings_do_not_matter(void)
{
    static checkpoint plain, other;
    float wanted[VOCAB], got[VOCAB];
    int32_t ids[20];
    kl_backend *be = tiny_backend(1);
    kl_engine *e;
    kl_error err = {KL_OK, ""};
    tiny_ids(ids, 20, 3);
    tiny_checkpoint(&plain, &tiny_config, false);
    EXPECT(kl_engine_new(be, &tiny_config, &tiny_options, &e, &err) == KL_OK);
    kl_prompt p = {.ids = ids, .n = 20, .last_logits = wanted};
    EXPECT(tiny_load(e, &plain, &err) == KL_OK && kl_engine_prompt(e, &p, &err) == KL_OK);

    other = plain;
    for (int64_t i = 0; i < other.n; i++) {
        kl_source *s = &other.sources[i];
        char *moe = strstr(other.names[i], "block_sparse_moe");
        s->name = other.names[i];
        if (moe != NULL) { /* "mlp" and the rest moved up */
            memmove(moe + 3, moe + 16, strlen(moe + 16) + 1);
            memcpy(moe, "mlp", 3);
        }
        if (strstr(s->name, "conv1d") != NULL)
            s->ndim = 3, s->shape[2] = s->shape[1], s->shape[1] = 1;
        if (strstr(s->name, "A_log") != NULL)
            s->ndim = 4, s->shape[2] = 2, s->shape[0] = s->shape[1] = s->shape[3] = 1;
        if (strstr(s->name, "dt_bias") != NULL) s->ndim = 2, s->shape[0] = 2, s->shape[1] = 8;
    }
    p.last_logits = got;
    EXPECT(tiny_load(e, &other, &err) == KL_OK && kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    EXPECT(memcmp(wanted, got, sizeof wanted) == 0);

    /* A longer A_log: its first values are the heads'. It runs into what follows in the file. */
    source_named(&other, "model.layers.0.self_attn.A_log")->shape[0] = 2;
    source_named(&other, "model.layers.0.self_attn.A_log")->bytes *= 2;
    EXPECT(tiny_load(e, &other, &err) == KL_OK && kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT(memcmp(wanted, got, sizeof wanted) == 0);

    for (int64_t i = 0; i < other.n; i++)
        if (strstr(other.names[i], "e_score_correction_bias") != NULL)
            other.sources[i].name = other.names[i] + 1;
    EXPECT(tiny_load(e, &other, &err) == KL_OK && kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT(memcmp(wanted, got, sizeof wanted) != 0); /* zeros instead of the bias */
    for (int64_t layer = 1; layer <= 2; layer++)
        for (int i = 0; i < 6; i++)
            EXPECT(((float *)e->weights.layers[layer].ffn.bias.data)[i] == 0.0f);
    kl_engine_free(e);
    fclose(plain.file);
    kl_backend_close(be);
}

static void tied_embeddings_share_memory(void)
{
    static checkpoint c;
    kl_config config = tiny_config;
    kl_backend *be = tiny_backend(1);
    kl_engine *e;
    kl_error err = {KL_OK, ""};
    kl_plan tied, untied;
    EXPECT(kl_plan_make(be, &config, &tiny_options, &untied, &err) == KL_OK);
    config.tied_embeddings = true;
    EXPECT(kl_plan_make(be, &config, &tiny_options, &tied, &err) == KL_OK);
    EXPECT(untied.weight_bytes - tied.weight_bytes == kl_align_up(97 * 24 * 4, 64));
    tiny_checkpoint(&c, &config, true);
    for (int64_t i = 0; i < c.n; i++) EXPECT(strcmp(c.names[i], "lm_head.weight") != 0);
    EXPECT(kl_engine_new(be, &config, &tiny_options, &e, &err) == KL_OK);
    EXPECT(tiny_load(e, &c, &err) == KL_OK);
    EXPECT(e->weights.lm_head.data == e->weights.embedding.data);
    kl_engine_free(e);
    fclose(c.file);
    kl_backend_close(be);
}

int main(void)
{
    RUN(broken_checkpoints_are_named);
    RUN(spellings_do_not_matter);
    RUN(tied_embeddings_share_memory);
    return test_failures != 0;
}
