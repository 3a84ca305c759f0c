/*
 * test_engine.c -- a tiny random model from its plan to its last token: what is refused, what
 * is cancelled, and that every allocation may fail without harm.
 */
#include "test.h"

#include "base/memory.h"
#include "model/engine_struct.h"
#include "model/plan.h"
#include "model/prompt.h"
#include "tiny_model.h"

#include <math.h>
#include <unistd.h>

enum { VOCAB = 97, MAX_EVENTS = 256 };

static kl_backend *open_backend(void)
{
    const kl_backend_options options = {.threads = 1};
    kl_backend *be = NULL;
    kl_error err = {KL_OK, ""};
    EXPECT(kl_backend_open("cpu", NULL, &options, &be, &err) == KL_OK);
    return be;
}

static kl_engine *open_engine(kl_backend *be, const kl_engine_options *options)
{
    kl_engine *e = NULL;
    kl_error err = {KL_OK, ""};
    EXPECT(kl_engine_new(be, &tiny_config, options, &e, &err) == KL_OK);
    EXPECT(kl_engine_randomize(e, 7, 1, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    return e;
}

static void make_ids(int32_t *ids, int64_t n, uint64_t seed)
{
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)(kl_rng_uniform(seed, (uint64_t)i) * VOCAB);
}

/* ---- configuration and plan ------------------------------------------------------------ */

/* The tiny configuration with one field changed must be refused with these words. */
#define REFUSED(field, value, text)                                                            \
    do {                                                                                       \
        kl_config c = tiny_config;                                                             \
        c.field = (value);                                                                     \
        EXPECT(kl_config_check(&c, &err) == KL_ERR_CONFIG);                                    \
        EXPECT(strstr(err.message, text) != NULL);                                             \
    } while (0)

static void configurations_are_bounded(void)
{
    kl_error err = {KL_OK, ""};
    EXPECT(kl_config_check(&tiny_config, &err) == KL_OK);
    REFUSED(vocab_size, 0, "vocab_size must be in [1, 16777216], got 0");
    REFUSED(vocab_size, INT64_MAX, "vocab_size");
    REFUSED(hidden_size, -1, "hidden_size");
    REFUSED(n_layers, 0, "n_layers");
    REFUSED(n_layers, KL_MAX_LAYERS + 1, "n_layers");
    REFUSED(max_length, (int64_t)1 << 31, "max_length");
    REFUSED(mixer[2], 7, "mixer[2]");
    REFUSED(ffn[1], 9, "ffn[1]");
    REFUSED(kda_heads, 0, "kda_heads");
    REFUSED(kda_head_dim, KL_KDA_MAX_K + 1, "kda_head_dim");
    REFUSED(conv_width, 9, "conv_width");
    REFUSED(gate, KL_GATE_DIRECT, "gate");
    REFUSED(mla_heads, INT64_MIN, "mla_heads");
    REFUSED(kv_rank, 0, "kv_rank");
    REFUSED(rope_dim, -1, "rope_dim");
    REFUSED(nope_dim, (1 << 14) + 1, "nope_dim");
    REFUSED(kv_norm_eps, 0.0f, "kv_norm_eps");
    REFUSED(q_norm_eps, NAN, "q_norm_eps");
    REFUSED(dense_inner, 0, "dense_inner");
    REFUSED(n_experts, 0, "n_experts");
    REFUSED(top_k, 7, "top_k must be in [1, 6], got 7");
    REFUSED(groups, 4, "n_experts must be a multiple of groups, got 6 and 4");
    REFUSED(n_shared, 65, "n_shared");
    REFUSED(score, KL_N_SCORES, "score");
    REFUSED(routed_scaling, INFINITY, "routed_scaling");
    REFUSED(rms_eps, -1.0f, "rms_eps");

    kl_config wide = tiny_config; /* each alone is in its range */
    wide.mla_heads = 4096;
    wide.nope_dim = 1 << 14;
    EXPECT(kl_config_check(&wide, &err) == KL_ERR_CONFIG);
    EXPECT(strstr(err.message, "at most 1048576, got 4096 * 16388") != NULL);
}

/* Dimensions of a layer that the model lacks are nobody's business. */
static void absent_layers_are_not_checked(void)
{
    kl_config c = tiny_config;
    kl_backend *be = open_backend();
    kl_error err = {KL_OK, ""};
    kl_plan plan;
    for (int i = 0; i < 4; i++) c.mixer[i] = KL_MIXER_KDA, c.ffn[i] = KL_FFN_DENSE;
    c.mla_heads = c.kv_rank = c.rope_dim = c.n_experts = c.moe_inner = INT64_MAX;
    EXPECT(kl_plan_make(be, &c, &tiny_options, &plan, &err) == KL_OK);
    EXPECT(plan.page_bytes == 0 && plan.page_bytes_per_token == 0 && plan.n_pages == 0);
    c = tiny_config;
    for (int i = 0; i < 4; i++) c.mixer[i] = KL_MIXER_MLA;
    c.kda_heads = c.kda_head_dim = c.conv_width = INT64_MAX;
    EXPECT(kl_plan_make(be, &c, &tiny_options, &plan, &err) == KL_OK);
    EXPECT(plan.state_bytes == 0 && plan.state_bytes_per_sequence == 0);
    kl_backend_close(be);
}

static kl_config published_config(void)
{
    kl_config c = {.vocab_size = 163840,
                   .hidden_size = 2304,
                   .n_layers = 27,
                   .max_length = 1048576,
                   .kda_heads = 32,
                   .kda_head_dim = 128,
                   .conv_width = 4,
                   .gate = KL_GATE_SOFTPLUS,
                   .mla_heads = 32,
                   .kv_rank = 512,
                   .nope_dim = 128,
                   .rope_dim = 64,
                   .v_dim = 128,
                   .kv_norm_eps = 1e-6f,
                   .dense_inner = 9216,
                   .n_experts = 256,
                   .top_k = 8,
                   .moe_inner = 1024,
                   .n_shared = 1,
                   .groups = 1,
                   .top_groups = 1,
                   .score = KL_SCORE_SIGMOID,
                   .routed_scaling = 2.446f,
                   .renormalize = true,
                   .rms_eps = 1e-5f};
    for (int i = 0; i < 27; i++) {
        c.mixer[i] = i % 4 == 3 || i == 26 ? KL_MIXER_MLA : KL_MIXER_KDA;
        c.ffn[i] = i == 0 ? KL_FFN_DENSE : KL_FFN_MOE;
    }
    return c;
}

/* The 48B model's figures, computed by hand in spec/model.md: 49,122,681,728 parameters, all
 * but A_log and dt_bias in bf16 on disk; here norms, convolutions and routers are f32 too. */
static void the_published_model_has_its_size(void)
{
    const kl_config c = published_config();
    const kl_engine_options options = {.format = KL_W_BF16,
                                       .max_context = 1048576,
                                       .max_batch = 1,
                                       .budget_bytes = (size_t)141 << 30};
    const size_t norms = 126720 + 7 * 512 + 20 * 128, kda = 20 * (12288 * 4 + 32 + 4096);
    const size_t f32_extra = 2 * (norms + kda + 26 * (2304 + 1) * 256);
    kl_backend *be = open_backend();
    kl_error err = {KL_OK, ""};
    kl_plan plan;
    EXPECT(kl_plan_make(be, &c, &options, &plan, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    EXPECT(plan.weight_bytes == 2 * (size_t)49122681728 + f32_extra);
    EXPECT(plan.state_bytes_per_sequence == 41943040 + 1474560);
    EXPECT(plan.page_bytes_per_token == 8064);
    EXPECT(plan.page_bytes == (size_t)8064 * 1048576);
    kl_backend_close(be);
}

/* No step within a plan may need more scratch than the plan has: dry passes of random shapes,
 * the largest sizes among them more often than chance would have it. */
static int64_t up_to(uint64_t seed, uint64_t *index, int64_t n)
{
    const double u = kl_rng_uniform(seed, (*index)++);
    return u < 0.2 ? n : 1 + (int64_t)(kl_rng_uniform(seed, (*index)++) * (double)n * u * u);
}

static kl_pass_shape random_shape(const kl_plan *plan, const kl_config *c, uint64_t seed)
{
    uint64_t i = 0;
    kl_pass_shape s = {.N = up_to(seed, &i, plan->max_batch),
                       .B = up_to(seed, &i, kl_cache_pages_for(c, plan->max_context))};
    s.decode = up_to(seed, &i, 4) == 1;
    s.T = s.decode ? s.N : s.N + up_to(seed, &i, plan->step_tokens - s.N + 1) - 1;
    s.targets = up_to(seed, &i, 2) == 1;
    s.sampling = !s.targets && up_to(seed, &i, 2) == 1;
    s.seen = s.sampling && up_to(seed, &i, 2) == 1;
    s.logits = up_to(seed, &i, 2) == 1;
    s.R = s.targets || s.logits || s.sampling ? up_to(seed, &i, s.sampling ? s.N : s.T) : 0;
    s.top = (int)up_to(seed, &i, kl_min_i64(KL_MAX_TOP, c->vocab_size));
    s.verify = s.sampling && up_to(seed, &i, 2) == 1;
    if (!s.verify) return s;
    s.decode = s.targets = false;
    s.T = s.R = up_to(seed, &i, kl_plan_guessing(plan));
    s.N = up_to(seed, &i, kl_min_i64(s.T, plan->max_batch));
    return s;
}

static void random_steps_fit(kl_backend *be, const kl_config *c, const kl_engine_options *o)
{
    kl_weights w;
    kl_cache cache;
    kl_plan plan;
    kl_arena none;
    kl_error err = {KL_OK, ""};
    const kl_cache_shape shape = {1, 1, 1, 0, KL_LATENTS_ACT};
    kl_arena_init(&none, NULL, 0);
    EXPECT(kl_plan_make(be, c, o, &plan, &err) == KL_OK);
    EXPECT(kl_weights_new(c->n_layers, &w, &err) == KL_OK);
    EXPECT(kl_weights_layout(&w, c, o->format, &none, &err) == KL_OK);
    EXPECT(kl_cache_init(&cache, be, c, kl_act_of(o->format), &shape, &none, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    for (uint64_t seed = 0; seed < 500 && test_failed_here == 0; seed++) {
        const kl_pass_shape s = random_shape(&plan, c, seed);
        kl_pass p = {.be = be,
                     .config = c,
                     .weights = &w,
                     .cache = &cache,
                     .act = kl_act_of(o->format),
                     .row_block = plan.max_batch};
        kl_arena_init(&p.arena, NULL, 0);
        EXPECT(kl_pass_start(&p, &s, &err) == KL_OK && kl_pass_compute(&p, &err) == KL_OK);
        EXPECT(p.arena.peak <= plan.scratch_bytes);
        if (p.arena.peak > plan.scratch_bytes)
            printf("  T %lld, N %lld, B %lld, R %lld, decode %d: %zu of %zu bytes\n",
                   (long long)s.T, (long long)s.N, (long long)s.B, (long long)s.R, s.decode,
                   p.arena.peak, plan.scratch_bytes);
    }
    kl_cache_free(&cache);
    kl_weights_free(&w);
}

static void no_step_needs_more_than_its_plan(void)
{
    static const kl_weight_format formats[] = {KL_W_F32, KL_W_BF16, KL_W_INT8, KL_W_INT4};
    const kl_config published = published_config();
    for (int threads = 1; threads <= 3; threads += 2) {
        const kl_backend_options options = {.threads = threads};
        kl_backend *be = NULL;
        kl_error err;
        EXPECT(kl_backend_open("cpu", NULL, &options, &be, &err) == KL_OK);
        for (int f = 0; f < 4; f++) {
            kl_engine_options o = {.format = formats[f],
                                   .max_batch = 32,
                                   .step_tokens = 300,
                                   .max_context = 4096,
                                   .budget_bytes = (size_t)500 << 30};
            random_steps_fit(be, &tiny_config, &o);
            random_steps_fit(be, &published, &o);
        }
        kl_backend_close(be);
    }
}

static void plans_add_up_and_refuse(void)
{
    kl_backend *be = open_backend();
    kl_engine_options o = tiny_options;
    kl_error err = {KL_OK, ""};
    kl_engine *e;
    kl_plan p, q;
    EXPECT(kl_plan_make(be, &tiny_config, &o, &p, &err) == KL_OK);
    EXPECT(p.total_bytes ==
           p.weight_bytes + p.state_bytes + p.snapshot_bytes + p.page_bytes + p.scratch_bytes);
    EXPECT(p.snapshot_slots == 2 && p.state_bytes == 2 * p.snapshot_bytes);
    EXPECT(p.max_context == 256 && p.max_batch == 4 && p.step_tokens == 64 && p.n_pages == 16);
    EXPECT(p.page_bytes == p.page_bytes_per_token * 64 * 16);

    o.cache_bytes = p.state_bytes + 5 * 64 * p.page_bytes_per_token; /* fewer than wanted */
    EXPECT(kl_plan_make(be, &tiny_config, &o, &q, &err) == KL_OK);
    EXPECT(q.n_pages == 5 && q.snapshot_slots == 0 && q.snapshot_bytes == 0);
    o.cache_bytes = p.state_bytes + 3 * 64 * p.page_bytes_per_token; /* less than a context */
    EXPECT(kl_plan_make(be, &tiny_config, &o, &q, &err) == KL_OK);
    EXPECT(q.n_pages == 4 && q.max_context == 256); /* what it would take */
    EXPECT(kl_plan_check(&q, &err) == KL_ERR_MEMORY);
    EXPECT(strstr(err.message, "cache_bytes limits the cache") != NULL);
    EXPECT(kl_engine_new(be, &tiny_config, &o, &e, &err) == KL_ERR_MEMORY && e == NULL);
    o.max_context = 0; /* the planner's own choice gives way instead */
    EXPECT(kl_plan_make(be, &tiny_config, &o, &q, &err) == KL_OK);
    EXPECT(q.max_context == 192 && q.n_pages == 3 && kl_plan_check(&q, &err) == KL_OK);

    o = tiny_options;
    o.budget_bytes = p.total_bytes;
    EXPECT(kl_plan_make(be, &tiny_config, &o, &q, &err) == KL_OK && q.n_pages == 16);
    EXPECT(kl_plan_check(&q, &err) == KL_OK);
    o.budget_bytes = p.weight_bytes;
    EXPECT(kl_plan_make(be, &tiny_config, &o, &q, &err) == KL_OK);
    EXPECT(q.weight_bytes == p.weight_bytes && q.total_bytes > o.budget_bytes);
    EXPECT(kl_plan_check(&q, &err) == KL_ERR_MEMORY);
    EXPECT(strstr(err.message, "weights need") != NULL);
    o.max_context = 0; /* and of what nobody asked for, the least */
    EXPECT(kl_plan_make(be, &tiny_config, &o, &q, &err) == KL_OK && q.max_context == 64);
    EXPECT(kl_plan_check(&q, &err) == KL_ERR_MEMORY);
    o = tiny_options;
    o.max_context = 5000;
    EXPECT(kl_plan_make(be, &tiny_config, &o, &q, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "plan: max_context must be in [1, 4096], got 5000");
    o.max_context = -1;
    EXPECT(kl_plan_make(be, &tiny_config, &o, &q, &err) == KL_ERR_VALUE);
    kl_backend_close(be);
}

/* ---- steps ----------------------------------------------------------------------------- */

/* The largest steps of a plan must fit its scratch memory to the byte. */
static void the_largest_steps_fit_the_plan(void)
{
    static float logits[64 * VOCAB], logprobs[64], top_logprobs[64 * VOCAB], id_logprobs[4];
    static int32_t ids[64], rows[64], targets[64], top_ids[64 * VOCAB], drawn[4], seen[16];
    static uint8_t greedy[64];
    static kl_sampling sampling[4];
    kl_backend *be = open_backend();
    kl_engine *e = open_engine(be, &tiny_options);
    kl_seq seqs[4];
    kl_feed feeds[4];
    kl_error err = {KL_OK, ""};
    make_ids(ids, 64, 1);
    for (int i = 0; i < 64; i++) rows[i] = i, targets[i] = ids[(i + 1) % 64];
    for (int i = 0; i < 4; i++) {
        EXPECT(kl_seq_new(e, &seqs[i], &err) == KL_OK);
        feeds[i] = (kl_feed){seqs[i], ids + 16 * i, 16};
        sampling[i] = (kl_sampling){1.0f, 0, 1.0f, 0.0f, 1.1f, 1, 0};
    }
    kl_step s = {.feeds = feeds,
                 .n_feeds = 4,
                 .rows = rows,
                 .n_rows = 64,
                 .logits = logits,
                 .targets = targets,
                 .logprobs = logprobs,
                 .greedy = greedy,
                 .top = VOCAB,
                 .top_ids = top_ids,
                 .top_logprobs = top_logprobs};
    for (int turn = 0; turn < 3; turn++) EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    for (int i = 0; i < 4; i++) feeds[i].n_tokens = 1;
    s.targets = NULL;
    s.n_rows = 4;
    s.sampling = sampling;
    s.seen = seen;
    s.ids = drawn;
    s.id_logprobs = id_logprobs;
    EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    EXPECT(kl_engine_sample(e, logits, 4, &s, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    kl_engine_free(e);
    kl_backend_close(be);
}

static void expect_refused(kl_engine *e, const kl_step *s, const char *text)
{
    kl_error err = {KL_OK, ""};
    EXPECT(kl_engine_step(e, s, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, text);
}

/* A refused step changes nothing: the next right one gives the bits of a fresh start. */
static void wrong_steps_change_nothing(void)
{
    float first[VOCAB], again[VOCAB];
    int32_t ids[6] = {1, 2, 3, 4, 5, 6}, bad[3] = {4, 97, 5}, row = 5;
    kl_backend *be = open_backend();
    kl_engine *e = open_engine(be, &tiny_options);
    kl_seq seq, other;
    kl_error err = {KL_OK, ""};
    EXPECT(kl_seq_new(e, &seq, &err) == KL_OK && kl_seq_new(e, &other, &err) == KL_OK);
    kl_feed feeds[2] = {{seq, ids, 6}, {seq, ids, 1}};
    kl_step s = {.feeds = feeds, .n_feeds = 1, .rows = &row, .n_rows = 1, .logits = first};
    EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    EXPECT(kl_seq_release(e, seq, &err) == KL_OK && kl_seq_new(e, &seq, &err) == KL_OK);

    feeds[0].seq = feeds[1].seq = seq;
    s.logits = again;
    s.n_feeds = 2;
    expect_refused(e, &s, "step: a sequence must be fed once, feeds 0 and 1 are the same");
    feeds[1] = (kl_feed){other, bad, 3};
    expect_refused(e, &s, "step: token id 97 at position 1 must be in [0, 97)");
    feeds[1].n_tokens = 59;
    expect_refused(e, &s,
                   "step: feeds must have 1 token or more and 64 together, got 59 after 6");
    feeds[1].seq = 999;
    expect_refused(e, &s, "sequence: must be one that is alive, got handle 999");
    s.n_feeds = 1;
    row = 6;
    expect_refused(e, &s, "step: rows[0] must be in [0, 6), got 6");
    row = 5;
    const kl_capture capture = {4, first};
    s.captures = &capture;
    s.n_captures = 1;
    expect_refused(e, &s, "step: layer must be in [0, 4), got 4");
    s.n_captures = 0;
    EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    EXPECT(memcmp(first, again, sizeof first) == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

typedef struct {
    int calls, stop_at;
} countdown;

static int stop_after(void *ctx)
{
    countdown *c = ctx;
    return ++c->calls == c->stop_at;
}

/* Cancelled at every place where it can be: the sequence is broken, the engine is not. */
static void cancelling_breaks_only_the_sequence(void)
{
    float wanted[VOCAB], got[VOCAB];
    int32_t ids[40], more = 3;
    kl_backend *be = open_backend();
    kl_engine *e = open_engine(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    int64_t length, sequences, pages;
    make_ids(ids, 40, 5);
    kl_prompt p = {.ids = ids, .n = 40, .last_logits = wanted};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    p.last_logits = got;
    for (int stop_at = 1; stop_at < 20; stop_at++) {
        countdown c = {0, stop_at};
        kl_seq seq;
        EXPECT(kl_seq_new(e, &seq, &err) == KL_OK);
        const kl_feed feed = {seq, ids, 40}, next = {seq, &more, 1};
        kl_step s = {.feeds = &feed, .n_feeds = 1, .poll = stop_after, .poll_ctx = &c};
        const kl_status status = kl_engine_step(e, &s, &err);
        if (status == KL_OK) {
            EXPECT(stop_at == 9); /* four layers, polled twice each */
            EXPECT(kl_seq_release(e, seq, &err) == KL_OK);
            break;
        }
        EXPECT(status == KL_ERR_CANCELLED);
        s = (kl_step){.feeds = &next, .n_feeds = 1};
        EXPECT(kl_engine_step(e, &s, &err) == KL_ERR_VALUE);
        EXPECT(kl_seq_length(e, seq, &length, &err) == KL_ERR_VALUE);
        EXPECT(kl_seq_release(e, seq, &err) == KL_OK);
        EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
        EXPECT(memcmp(wanted, got, sizeof wanted) == 0);
    }
    kl_engine_usage(e, &sequences, &pages);
    EXPECT(sequences == 0 && pages == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

static char mark_log[64];

static kl_status log_mark(const char *what, kl_mark *mark)
{
    const size_t n = strlen(mark_log);
    if (n + 2 < sizeof mark_log) memcpy(mark_log + n, what + 2 * (mark != NULL), 2);
    return KL_OK;
}

static kl_status log_set(kl_backend *be, kl_mark *mark, kl_error *err)
{
    (void)err;
    return log_mark("s1s0", mark == (kl_mark *)be ? NULL : mark);
}

static kl_status log_wait(kl_backend *be, kl_mark *mark, kl_error *err)
{
    (void)err;
    return log_mark("w1w0", mark == (kl_mark *)be ? NULL : mark);
}

/* Before layer i is enqueued, layer i - 2 has run: a poll can end a long prompt in time. */
static void the_host_stays_near_a_long_prompt(void)
{
    enum { T = 600 };
    static int32_t ids[T];
    static kl_backend_vtbl table;
    kl_engine_options o = tiny_options;
    kl_backend *be = open_backend();
    kl_error err = {KL_OK, ""};
    float logits[VOCAB];
    o.max_context = o.step_tokens = T;
    kl_engine *e = open_engine(be, &o);
    table = *be->vt;
    table.set_mark = log_set;
    table.wait_mark = log_wait;
    be->vt = &table;
    e->marks[0] = (kl_mark *)&table; /* told from the other one, which is the backend itself */
    make_ids(ids, T, 8);
    kl_prompt p = {.ids = ids, .n = T, .last_logits = logits};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT_TEXT(mark_log, "s0w1s1w0s0w1s1w0");
    p.n = 511;
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK && strlen(mark_log) == 16);
    kl_engine_free(e);
    kl_backend_close(be);
}

static void captures_are_the_stream_after_a_layer(void)
{
    enum { T = 70, D = 24 };
    static float one[T * D], both[2][T * D], logprobs[T];
    static uint8_t greedy[T];
    int32_t ids[T], targets[T];
    const int64_t layers[] = {3, 0}, last[] = {3};
    float *const out[] = {both[0], both[1]}, *const single[] = {one};
    kl_backend *be = open_backend();
    kl_engine *e = open_engine(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    make_ids(ids, T, 9);
    for (int i = 0; i < T; i++) targets[i] = i == 65 ? ids[0] : -1;
    memset(both, 0xff, sizeof both); /* NaN */
    kl_prompt p = {.ids = ids, .n = T, .layers = layers, .hidden = out, .n_layers = 2};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    p = (kl_prompt){.ids = ids,
                    .n = T,
                    .layers = last,
                    .hidden = single,
                    .n_layers = 1,
                    .targets = targets,
                    .logprobs = logprobs,
                    .greedy = greedy};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT(memcmp(one, both[0], sizeof one) == 0);
    EXPECT(memcmp(both[0], both[1], sizeof one) != 0);
    for (int i = 0; i < T * D; i++) EXPECT(isfinite(both[0][i]) && isfinite(both[1][i]));
    for (int i = 0; i < T; i++) EXPECT(i == 65 ? logprobs[i] < 0.0f : isnan(logprobs[i]));
    kl_engine_free(e);
    kl_backend_close(be);
}

/* ---- generation ------------------------------------------------------------------------ */

enum { N_REQUESTS = 7 };

typedef struct {
    int32_t prompts[N_REQUESTS][160], stops[2], out[N_REQUESTS][32];
    kl_request requests[N_REQUESTS];
    int64_t n_out[N_REQUESTS];
    kl_finish finish[N_REQUESTS];
} load;

static void make_load(load *l)
{
    static const int64_t lengths[N_REQUESTS] = {1, 130, 17, 64, 65, 3, 150};
    memset(l, 0, sizeof *l);
    for (int i = 0; i < N_REQUESTS; i++) {
        make_ids(l->prompts[i], lengths[i], 50 + (uint64_t)i);
        l->requests[i] =
            (kl_request){.prompt = l->prompts[i],
                         .n_prompt = lengths[i],
                         .max_new_tokens = 5 + 4 * i,
                         .sampling = {.temperature = i % 3 == 0 ? 0.0f : 0.8f,
                                      .top_p = 1.0f,
                                      .repetition_penalty = i % 2 == 0 ? 1.0f : 1.3f,
                                      .seed = 11 + (uint64_t)i},
                         .top = i};
    }
}

/* Run to the end, `per_call` events at a time. */
static kl_status run_load(kl_engine *e, load *l, int64_t per_call, kl_error *err)
{
    static kl_event events[MAX_EVENTS];
    kl_generation *g;
    int64_t n = 0;
    kl_status status = kl_generation_new(e, l->requests, N_REQUESTS, &g, err);
    if (status != KL_OK) return status;
    while (status == KL_OK && !kl_generation_done(g)) {
        status = kl_generation_run(g, 1000, events, per_call, &n, NULL, NULL, NULL, NULL, err);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = events[k].request;
            EXPECT(l->finish[i] == KL_RUNNING && l->n_out[i] < 32);
            if (events[k].finish == KL_FINISH_ERROR && status == KL_OK) {
                *err = events[k].error;
                status = err->status;
            }
            if (events[k].id >= 0) l->out[i][l->n_out[i]++] = events[k].id;
            l->finish[i] = events[k].finish;
            EXPECT(events[k].n_top == l->requests[i].top || events[k].id < 0);
        }
    }
    kl_generation_free(g);
    return status;
}

/* Which requests share a step, and how large steps are, must not change a token. */
static void schedules_do_not_change_tokens(void)
{
    static const struct {
        int64_t max_batch, step_tokens, n_pages, per_call;
    } ways[] = {{1, 64, 0, 1}, {2, 64, 0, 3}, {8, 512, 0, MAX_EVENTS}, {3, 128, 4, 2}};
    static load wanted, got;
    kl_backend *be = open_backend();
    make_load(&wanted);
    for (int i = 0; i < N_REQUESTS; i++) wanted.requests[i].top = 0;
    for (int k = 0; k < 4; k++) {
        kl_engine_options o = tiny_options;
        kl_error err = {KL_OK, ""};
        int64_t sequences, pages;
        kl_plan plan;
        o.max_batch = ways[k].max_batch;
        o.step_tokens = ways[k].step_tokens;
        EXPECT(kl_plan_make(be, &tiny_config, &o, &plan, &err) == KL_OK);
        if (ways[k].n_pages > 0) /* requests wait for one another's pages */
            o.cache_bytes =
                plan.state_bytes + (size_t)ways[k].n_pages * 64 * plan.page_bytes_per_token;
        kl_engine *e = open_engine(be, &o);
        load *l = k == 0 ? &wanted : &got;
        make_load(l);
        EXPECT(run_load(e, l, ways[k].per_call, &err) == KL_OK);
        EXPECT(memcmp(l->out, wanted.out, sizeof wanted.out) == 0);
        for (int i = 0; i < N_REQUESTS; i++) {
            EXPECT(l->n_out[i] == l->requests[i].max_new_tokens);
            EXPECT(l->finish[i] == KL_FINISH_LENGTH);
        }
        kl_engine_usage(e, &sequences, &pages);
        EXPECT(sequences == 0 && pages == 0);
        kl_engine_free(e);
    }
    kl_backend_close(be);
}

static void endings(void)
{
    static load first, l;
    kl_backend *be = open_backend();
    kl_engine *e = open_engine(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    make_load(&first);
    EXPECT(run_load(e, &first, MAX_EVENTS, &err) == KL_OK);
    make_load(&l);
    l.stops[0] = first.out[4][2]; /* stop where it was drawn for the first time */
    int64_t at = 0;
    while (first.out[4][at] != l.stops[0]) at++;
    l.requests[4].stop_ids = l.stops;
    l.requests[4].n_stop_ids = 1;
    l.requests[2].max_new_tokens = 0;
    EXPECT(run_load(e, &l, 2, &err) == KL_OK);
    EXPECT(l.finish[4] == KL_FINISH_STOP && l.n_out[4] == at + 1);
    EXPECT(l.finish[2] == KL_FINISH_LENGTH && l.n_out[2] == 0);
    EXPECT(l.finish[6] == KL_FINISH_LENGTH && l.n_out[6] == first.n_out[6]);

    make_load(&l);
    l.requests[3].max_new_tokens = 193;
    EXPECT(run_load(e, &l, 2, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message,
                "generate: request 3: 64 prompt tokens and max_new_tokens 193 must "
                "be at most 256 together (max_context)");
    make_load(&l);
    l.requests[5].sampling.top_p = NAN;
    EXPECT(run_load(e, &l, 2, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "generate: request 5: sampling: top_p must be in (0, 1], got nan");
    make_load(&l);
    l.prompts[0][0] = -1;
    EXPECT(run_load(e, &l, 2, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message,
                "generate: request 0: prompt: token id -1 at position 0 must be in [0, 97)");
    kl_engine_free(e);
    kl_backend_close(be);
}

/* A request cut in two draws what it would have drawn in one: `position` counts its draws. */
static void draws_have_positions(void)
{
    static load whole, rest;
    enum { CUT = 7 };
    kl_backend *be = open_backend();
    kl_engine *e = open_engine(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    make_load(&whole);
    make_load(&rest);
    for (int i = 0; i < N_REQUESTS; i++) {
        kl_request *a = &whole.requests[i];
        a->n_prompt = 5 + i;
        a->max_new_tokens = 2 * CUT;
        a->sampling.temperature = 3.0f;
    }
    EXPECT(run_load(e, &whole, MAX_EVENTS, &err) == KL_OK);
    for (int i = 0; i < N_REQUESTS; i++) {
        const kl_request *a = &whole.requests[i];
        kl_request *b = &rest.requests[i];
        *b = *a;
        b->prompt = rest.prompts[i];
        b->n_prompt = a->n_prompt + CUT;
        b->max_new_tokens = CUT;
        b->sampling.position = CUT;
        memcpy(rest.prompts[i], a->prompt, (size_t)a->n_prompt * sizeof(int32_t));
        memcpy(rest.prompts[i] + a->n_prompt, whole.out[i], CUT * sizeof(int32_t));
    }
    EXPECT(run_load(e, &rest, MAX_EVENTS, &err) == KL_OK);
    for (int i = 0; i < N_REQUESTS; i++)
        EXPECT(memcmp(rest.out[i], whole.out[i] + CUT, CUT * sizeof(int32_t)) == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* Under a penalty this large no token comes twice, from the prompt or from before; the request
 * beside it, without one, is not touched by it. */
static void penalties_remember_all_tokens(void)
{
    static load l, alone;
    kl_backend *be = open_backend();
    kl_engine *e = open_engine(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    make_load(&l);
    for (int i = 0; i < N_REQUESTS; i++) {
        l.requests[i].n_prompt = 5;
        l.requests[i].max_new_tokens = 15;
        l.requests[i].sampling.temperature = 0.0f;
        l.requests[i].sampling.repetition_penalty = i % 2 == 0 ? 1e6f : 1.0f;
    }
    EXPECT(run_load(e, &l, MAX_EVENTS, &err) == KL_OK);
    int repeats = 0;
    for (int i = 0; i < N_REQUESTS; i++)
        for (int t = 0; t < 15; t++) {
            for (int p = 0; p < 5; p++) EXPECT(i % 2 == 1 || l.out[i][t] != l.prompts[i][p]);
            for (int before = 0; before < t; before++) {
                EXPECT(i % 2 == 1 || l.out[i][t] != l.out[i][before]);
                repeats += l.out[i][t] == l.out[i][before];
            }
        }
    EXPECT(repeats > 0); /* greedy does repeat itself where nothing forbids it */
    make_load(&alone);
    for (int i = 0; i < N_REQUESTS; i++) {
        alone.requests[i] = l.requests[i];
        alone.requests[i].prompt = alone.prompts[i];
        alone.requests[i].sampling.repetition_penalty = 1.0f;
    }
    EXPECT(run_load(e, &alone, MAX_EVENTS, &err) == KL_OK);
    for (int i = 1; i < N_REQUESTS; i += 2)
        EXPECT(memcmp(alone.out[i], l.out[i], sizeof l.out[i]) == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* One request meets a NaN: it is named, the others get the tokens they get without it. */
static void a_nan_ends_one_request(void)
{
    enum { BAD = 96 };
    static load clean, l;
    static kl_event events[MAX_EVENTS];
    kl_backend *be = open_backend();
    kl_engine *e = open_engine(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    kl_generation *g;
    int64_t n, failures = 0, sequences, pages;
    make_load(&clean);
    for (int i = 0; i < N_REQUESTS; i++)
        for (int t = 0; t < 160; t++) clean.prompts[i][t] %= BAD;
    l = clean;
    for (int i = 0; i < N_REQUESTS; i++) l.requests[i].prompt = l.prompts[i];
    for (int i = 0; i < N_REQUESTS; i++) clean.requests[i].prompt = clean.prompts[i];
    EXPECT(run_load(e, &clean, MAX_EVENTS, &err) == KL_OK);
    for (int i = 0; i < N_REQUESTS; i++)
        for (int t = 0; t < clean.n_out[i]; t++)
            if (clean.out[i][t] == BAD) l.n_out[i] = -1000; /* would meet the NaN by itself */
    ((float *)e->weights.embedding.data)[BAD * 24 + 5] = NAN;
    l.prompts[1][77] = BAD;

    EXPECT(kl_generation_new(e, l.requests, N_REQUESTS, &g, &err) == KL_OK);
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 1000, events, 3, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = events[k].request;
            EXPECT(i != 1 || events[k].finish == KL_FINISH_ERROR);
            if (events[k].finish == KL_FINISH_ERROR) {
                failures++;
                EXPECT(events[k].id == -1 && events[k].error.status == KL_ERR_NUMERICAL);
                if (i == 1)
                    EXPECT_TEXT(events[k].error.message,
                                "generate: request 1: logits after 130 tokens must be finite");
            } else if (l.n_out[i] >= 0) {
                l.out[i][l.n_out[i]++] = events[k].id;
            }
        }
    }
    EXPECT(failures >= 1);
    kl_generation_free(g);
    for (int i = 0; i < N_REQUESTS; i++)
        if (i != 1 && l.n_out[i] >= 0)
            EXPECT(memcmp(l.out[i], clean.out[i], sizeof l.out[i]) == 0);
    kl_engine_usage(e, &sequences, &pages);
    EXPECT(sequences == 0 && pages == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* Pages that others hold are not promised twice. */
static void generation_waits_for_nobody_in_vain(void)
{
    static load l;
    kl_engine_options o = tiny_options;
    kl_backend *be = open_backend();
    kl_error err = {KL_OK, ""};
    kl_seq held[4];
    o.max_batch = 4;
    kl_engine *e = open_engine(be, &o);
    for (int i = 0; i < 4; i++) EXPECT(kl_seq_new(e, &held[i], &err) == KL_OK);
    make_load(&l);
    EXPECT(run_load(e, &l, 2, &err) == KL_ERR_MEMORY);
    EXPECT_TEXT(err.message, "generate: request 0 needs a sequence and 1 pages, but other "
                             "sequences leave 0 and 16");
    EXPECT(kl_seq_release(e, held[2], &err) == KL_OK);
    make_load(&l);
    EXPECT(run_load(e, &l, 2, &err) == KL_OK);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* ---- loading --------------------------------------------------------------------------- */

static kl_status load_file(kl_engine *e, checkpoint *c, kl_error *err)
{
    int64_t unused = -1;
    return kl_engine_load(e, &c->fd, 1, c->sources, c->n, &unused, NULL, NULL, NULL, err);
}

static kl_source *source_named(checkpoint *c, const char *name)
{
    for (int64_t i = 0; i < c->n; i++)
        if (strcmp(c->sources[i].name, name) == 0) return &c->sources[i];
    abort();
}

static void expect_unloadable(kl_engine *e, checkpoint *c, kl_status wanted, const char *text)
{
    kl_error err = {KL_OK, ""};
    EXPECT(load_file(e, c, &err) == wanted);
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
    kl_backend *be = open_backend();
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
    EXPECT(load_file(e, &whole, &err) == KL_OK);
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
    kl_backend *be = open_backend();
    kl_engine *e;
    kl_error err = {KL_OK, ""};
    make_ids(ids, 20, 3);
    tiny_checkpoint(&plain, &tiny_config, false);
    EXPECT(kl_engine_new(be, &tiny_config, &tiny_options, &e, &err) == KL_OK);
    kl_prompt p = {.ids = ids, .n = 20, .last_logits = wanted};
    EXPECT(load_file(e, &plain, &err) == KL_OK && kl_engine_prompt(e, &p, &err) == KL_OK);

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
    EXPECT(load_file(e, &other, &err) == KL_OK && kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    EXPECT(memcmp(wanted, got, sizeof wanted) == 0);

    /* A longer A_log: its first values are the heads'. It runs into what follows in the file. */
    source_named(&other, "model.layers.0.self_attn.A_log")->shape[0] = 2;
    source_named(&other, "model.layers.0.self_attn.A_log")->bytes *= 2;
    EXPECT(load_file(e, &other, &err) == KL_OK && kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT(memcmp(wanted, got, sizeof wanted) == 0);

    for (int64_t i = 0; i < other.n; i++)
        if (strstr(other.names[i], "e_score_correction_bias") != NULL)
            other.sources[i].name = other.names[i] + 1;
    EXPECT(load_file(e, &other, &err) == KL_OK && kl_engine_prompt(e, &p, &err) == KL_OK);
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
    kl_backend *be = open_backend();
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
    EXPECT(load_file(e, &c, &err) == KL_OK);
    EXPECT(e->weights.lm_head.data == e->weights.embedding.data);
    kl_engine_free(e);
    fclose(c.file);
    kl_backend_close(be);
}

/* ---- failing allocations --------------------------------------------------------------- */

/* Load and generate in a format, everything that the core allocates on the way. */
static kl_status live(kl_backend *be, checkpoint *c, kl_weight_format format, kl_error *err)
{
    static load l;
    kl_engine_options o = tiny_options;
    kl_engine *e;
    int64_t sequences = 1, pages = 1;
    o.format = format;
    kl_status status = kl_engine_new(be, &tiny_config, &o, &e, err);
    if (status != KL_OK) return status;
    status = load_file(e, c, err);
    make_load(&l);
    for (int i = 0; i < N_REQUESTS; i++) l.requests[i].max_new_tokens = 2;
    if (status == KL_OK) status = run_load(e, &l, 2, err);
    kl_engine_usage(e, &sequences, &pages);
    EXPECT(sequences == 0 && pages == 0);
    kl_engine_free(e);
    return status;
}

static void every_allocation_may_fail(void)
{
    static checkpoint c;
    static const kl_weight_format formats[] = {KL_W_F32, KL_W_INT4};
    kl_backend *be = open_backend();
    kl_error err = {KL_OK, ""};
    tiny_checkpoint(&c, &tiny_config, true);
    for (int f = 0; f < 2; f++) {
        EXPECT(live(be, &c, formats[f], &err) == KL_OK); /* what a backend keeps is there now */
        kl_fault_arm(0);
        EXPECT(live(be, &c, formats[f], &err) == KL_OK);
        const int64_t n = kl_fault_count();
        EXPECT(n > 30);
        for (int64_t k = 1; k <= n; k++) {
            kl_fault_arm(k);
            EXPECT(live(be, &c, formats[f], &err) == KL_ERR_MEMORY);
            EXPECT(err.status == KL_ERR_MEMORY && err.message[0] != '\0');
        }
        kl_fault_arm(0);
        EXPECT(live(be, &c, formats[f], &err) == KL_OK);
    }
    fclose(c.file);
    kl_backend_close(be);
}

int main(void)
{
    RUN(configurations_are_bounded);
    RUN(absent_layers_are_not_checked);
    RUN(the_published_model_has_its_size);
    RUN(no_step_needs_more_than_its_plan);
    RUN(plans_add_up_and_refuse);
    RUN(the_largest_steps_fit_the_plan);
    RUN(wrong_steps_change_nothing);
    RUN(cancelling_breaks_only_the_sequence);
    RUN(the_host_stays_near_a_long_prompt);
    RUN(captures_are_the_stream_after_a_layer);
    RUN(schedules_do_not_change_tokens);
    RUN(endings);
    RUN(draws_have_positions);
    RUN(penalties_remember_all_tokens);
    RUN(a_nan_ends_one_request);
    RUN(generation_waits_for_nobody_in_vain);
    RUN(broken_checkpoints_are_named);
    RUN(spellings_do_not_matter);
    RUN(tied_embeddings_share_memory);
    RUN(every_allocation_may_fail);
    return test_failures != 0;
}
