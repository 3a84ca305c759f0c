/*
 * test_arrivals.c -- a backend that reads the inputs of a KDA or MLA layer as they arrive: the
 * runner hands over blank memory of each layer's own, in the steps of a single token alone, recorded
 * or not. What CUDA makes of it is in test_arriving.c and test_arriving_mla.c.
 */
#include "recorder.h"

enum { KDA_LAYERS = 2, MLA_LAYERS = 2, QKV = 3 * 2 * 8, TOKENS = 40 }; /* of the tiny model */
enum { BLANKS = 192 };

static const kl_backend_vtbl *plain;
static kl_arrivals wanted;
static kl_mla_arrivals mla_wanted;
static int n_asked_for, n_mixers, n_attentions, n_outs;

static bool is_blank(const void *data, size_t bytes)
{
    const unsigned char *const at = data;
    return at[0] == 0xff && memcmp(at, at + 1, bytes - 1) == 0;
}

static bool row_is_blank(const kl_tensor *t)
{
    return is_blank(t->data, (size_t)kl_tensor_size(t) * sizeof(uint16_t));
}

static bool has_blanks(const kl_tensor *t)
{
    bool any = false;
    for (int64_t i = 0; i < kl_tensor_size(t); i++)
        any = any || ((const uint16_t *)t->data)[i] == KL_BLANK;
    return any;
}

static kl_status pair_that_writes(kl_backend *be, const kl_linear_pair *a, kl_error *err)
{
    const kl_tensor *const low = &a->first.out, *const qkv = &a->second.out;
    EXPECT(!a->first.arriving && !a->second.arriving);
    if (wanted.mixer && qkv->shape[0] == 1 && qkv->shape[1] == QKV)
        EXPECT(row_is_blank(low) && row_is_blank(qkv));
    return plain->linear_pair(be, a, err);
}

static kl_status mixer_that_hears(kl_backend *be, const kl_kda_mixer *a, kl_error *err)
{
    const bool alone = a->single && a->qkv.shape[0] == 1;
    EXPECT(a->arriving == (alone && wanted.mixer));
    if (alone) EXPECT(!has_blanks(&a->qkv) && !has_blanks(&a->f_low) && !has_blanks(&a->beta));
    if (alone && wanted.out) EXPECT(row_is_blank(&a->out));
    n_mixers += a->arriving;
    return plain->kda_mixer(be, a, err);
}

/* What another layer has left there would be no blanks. */
static kl_status attention_that_hears(kl_backend *be, const kl_mla_decode *a, kl_error *err)
{
    const bool alone = a->q.shape[0] == 1, given = !kl_tensor_absent(&a->blanks);
    EXPECT(given == (alone && mla_wanted.blanks > 0));
    if (given) {
        EXPECT(a->blanks.shape[0] == BLANKS && is_blank(a->blanks.data, BLANKS));
        EXPECT(!has_blanks(&a->q) && !has_blanks(&a->raw));
        memset(a->blanks.data, 1, BLANKS);
        n_attentions++;
    }
    if (alone && mla_wanted.out) EXPECT(row_is_blank(&a->out));
    return plain->mla_decode(be, a, err);
}

static kl_status linear_that_hears(kl_backend *be, const kl_linear *a, kl_error *err)
{
    if (a->arriving)
        EXPECT((wanted.out || mla_wanted.out) && a->x.shape[0] == 1 && !has_blanks(&a->x));
    n_outs += a->arriving;
    return plain->linear(be, a, err);
}

/* The layer's operations as they will be called, without memory. */
static kl_status arrivals(kl_backend *be, const kl_linear_pair *in, const kl_kda_mixer *mixer,
                          const kl_linear *last, kl_arrivals *out, kl_error *err)
{
    (void)be, (void)err;
    EXPECT(in->first.x.shape[0] == 1 && in->second.out.shape[1] == mixer->qkv.shape[1]);
    EXPECT(!kl_tensor_absent(&in->first.norm_weight) && mixer->single && !mixer->arriving);
    EXPECT(last->x.shape[1] == last->w.cols && !kl_tensor_absent(&last->residual));
    n_asked_for++;
    *out = wanted;
    return KL_OK;
}

static kl_status mla_arrivals(kl_backend *be, const kl_linear_pair *in, const kl_mla_decode *a,
                              const kl_linear *last, kl_mla_arrivals *out, kl_error *err)
{
    (void)be, (void)err;
    EXPECT(in->first.out.shape[1] == a->raw.shape[1] && a->q.shape[0] == 1);
    EXPECT(kl_tensor_absent(&a->blanks) && !kl_tensor_absent(&a->norm_weight));
    EXPECT(last->x.shape[1] == last->w.cols && !kl_tensor_absent(&last->residual));
    n_asked_for++;
    *out = mla_wanted;
    return KL_OK;
}

static kl_backend *open_hearing(kl_arrivals kda, kl_mla_arrivals mla)
{
    static kl_backend_vtbl below, table;
    kl_backend *be = open_recording(false);
    plain = cpu;
    below = *cpu;
    below.linear_pair = pair_that_writes;
    below.kda_mixer = mixer_that_hears;
    below.mla_decode = attention_that_hears;
    below.linear = linear_that_hears;
    cpu = &below;
    table = *be->vt;
    table.arrivals = arrivals;
    table.mla_arrivals = mla_arrivals;
    be->vt = &table;
    wanted = kda, mla_wanted = mla;
    n_asked_for = n_mixers = n_attentions = n_outs = 0;
    return be;
}

/* The tiny model; direct: q is one product of the stream. */
static kl_engine *engine_on(kl_backend *be, bool direct)
{
    static const kl_engine_options options = {
        .format = KL_W_BF16, .max_context = 256, .max_batch = 2, .step_tokens = 2};
    kl_config config = tiny_config;
    kl_engine *e = NULL;
    kl_error err = {KL_OK, ""};
    if (direct) config.q_rank = 0;
    EXPECT(kl_engine_new(be, &config, &options, &e, &err) == KL_OK);
    EXPECT(kl_engine_randomize(e, 7, 1, &err) == KL_OK);
    return e;
}

/* Each combination. A q of two products is complete before mla_decode. */
static void a_single_token_hears(void)
{
    for (int i = 0; i < 32; i++) {
        int32_t want[2][TOKENS], got[2][TOKENS];
        const kl_arrivals kda = {i % 2 == 1, i / 2 % 2 == 1};
        const bool direct = i < 16;
        const kl_mla_arrivals offered = {i / 4 % 2 == 1 ? BLANKS : 0, i / 8 % 2 == 1};
        const kl_mla_arrivals mla = direct ? offered : (kl_mla_arrivals){0};
        kl_backend *other = tiny_backend(1), *be = open_hearing(kda, mla);
        kl_engine *a = engine_on(other, direct), *b = engine_on(be, direct);
        EXPECT(n_asked_for > 0); /* by its plan */
        greedy_tokens(a, 1, TOKENS, *want);
        greedy_tokens(b, 1, TOKENS, *got);
        EXPECT(memcmp(want[0], got[0], sizeof want[0]) == 0);
        EXPECT(n_replayed > TOKENS / 2);
        EXPECT(wanted.mixer ? n_mixers >= KDA_LAYERS * (TOKENS - 1) : n_mixers == 0);
        EXPECT(mla.blanks > 0 ? n_attentions >= MLA_LAYERS * (TOKENS - 1) : n_attentions == 0);
        const int outs = (wanted.out ? KDA_LAYERS : 0) + (mla.out ? MLA_LAYERS : 0);
        EXPECT(outs > 0 ? n_outs >= outs * (TOKENS - 1) : n_outs == 0);
        const int before = n_mixers + n_attentions + n_outs;
        greedy_tokens(a, 2, TOKENS, *want);
        greedy_tokens(b, 2, TOKENS, *got);
        EXPECT(memcmp(want, got, sizeof want) == 0);
        /* At the ends, where one is alone. */
        EXPECT(n_mixers + n_attentions + n_outs - before < TOKENS);
        kl_engine_free(b);
        kl_engine_free(a);
        kl_backend_close(other);
        kl_backend_close(be);
    }
}

int main(void)
{
    RUN(a_single_token_hears);
    return test_failures != 0;
}
