/*
 * test_plan.c -- which configurations are refused, and that a plan is what its steps take.
 */
#include "test.h"

#include "base/memory.h"
#include "model/engine_struct.h"
#include "model/plan.h"
#include "tiny_model.h"

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
    kl_backend *be = tiny_backend(1);
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
    kl_backend *be = tiny_backend(1);
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
    kl_backend *be = tiny_backend(1);
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
    EXPECT(strstr(err.message, "cache_bytes limits the cache to ") != NULL);
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

int main(void)
{
    RUN(configurations_are_bounded);
    RUN(absent_layers_are_not_checked);
    RUN(the_published_model_has_its_size);
    RUN(no_step_needs_more_than_its_plan);
    RUN(plans_add_up_and_refuse);
    return test_failures != 0;
}
