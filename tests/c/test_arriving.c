/*
 * test_arriving.c -- inputs read as they arrive (backend/arrivals.h): a KDA layer's three operations
 * have the bits that they have one after the other, also of numbers that are none, and on CUDA so
 * have steps, enqueued and recorded. Skips CUDA where KL_CUDA_LIBRARY finds no device. An MLA
 * layer's operations are in test_arriving_mla.c.
 */
#include "pieces.h"

#include "model/engine_struct.h"

enum { K = 128, W = 4, SLOTS = 3, SLOT = 1 };

/* ---- the operations ---------------------------------------------------------------------- */

typedef struct {
    kl_linear_pair in;
    kl_kda_mixer mixer;
    kl_linear last;
} layer;

/* What operations share, in whatever memory it lies. */
static void connect(layer *a)
{
    const int64_t H = a->mixer.state.shape[1];
    const kl_tensor low = a->in.first.out;
    a->in.second.x = a->last.residual = a->in.first.x;
    a->in.second.norm_weight = a->in.first.norm_weight;
    a->mixer.qkv = a->in.second.out;
    a->mixer.beta = kl_columns(&low, 0, H);
    a->mixer.f_low = kl_columns(&low, H, K);
    a->mixer.g_low = kl_columns(&low, H + K, K);
    a->mixer.out = kl_heads(a->last.x, H, K);
}

/* Of a token of a layer with H heads, whose stream is D wide. Results are blank. */
static layer layer_of(int64_t H, int64_t D, kl_weight_format format)
{
    static const int32_t slot[] = {SLOT}, cu[] = {0, 1};
    layer a = {0};
    a.in.first = (kl_linear){.x = tensor(KL_F32, false, 2, 1, D, 1, 1),
                             .norm_weight = tensor(KL_F32, false, 1, D, 1, 1, 1),
                             .act = KL_BF16,
                             .norm_eps = 1e-5f,
                             .w = weight(format, H + 2 * K, D),
                             .out = tensor(KL_BF16, true, 2, 1, H + 2 * K, 1, 1)};
    a.in.second = a.in.first;
    a.in.second.w = weight(format, 3 * H * K, D);
    a.in.second.out = tensor(KL_BF16, true, 2, 1, 3 * H * K, 1, 1);
    a.mixer =
        (kl_kda_mixer){.conv_weight = tensor(KL_F32, false, 2, 3 * H * K, W, 1, 1),
                       .conv_state = tensor(KL_BF16, false, 3, SLOTS, 3 * H * K, W - 1, 1),
                       .f_b = weight(format, H * K, K),
                       .g_b = weight(format, H * K, K),
                       .state = tensor(KL_F32, false, 4, SLOTS, H, K, K),
                       .slots = integers(1, slot),
                       .cu_seqlens = integers(2, cu),
                       .A_log = tensor(KL_F32, false, 1, H, 1, 1, 1),
                       .dt_bias = tensor(KL_F32, false, 2, H, K, 1, 1),
                       .norm_weight = tensor(KL_F32, false, 1, K, 1, 1, 1),
                       .gate = KL_GATE_SOFTPLUS,
                       .scale = 0.1f,
                       .eps = 1e-5f,
                       .single = true};
    a.last.x = tensor(KL_BF16, true, 2, 1, H * K, 1, 1);
    a.last.w = weight(format, D, H * K);
    connect(&a);
    return a;
}

/* On a backend without it, where all is complete, any. */
static kl_arrivals arrivals_of(kl_backend *be, const layer *a)
{
    kl_arrivals all = {true, true};
    kl_error err = {KL_OK, ""};
    if (be->vt->arrivals == NULL) return all;
    EXPECT(be->vt->arrivals(be, &a->in, &a->mixer, &a->last, &all, &err) == KL_OK);
    return all;
}

/* All of it is on its way before one waits. */
static void run_layer(kl_backend *be, layer *a, kl_arrivals how)
{
    kl_error err = {KL_OK, ""};
    connect(a);
    a->mixer.arriving = how.mixer;
    a->last.arriving = how.out;
    const size_t bytes[] = {kl_workspace_linear_pair(be, &a->in),
                            kl_workspace_kda_mixer(be, &a->mixer),
                            kl_workspace_linear(be, &a->last)};
    kl_workspace ws[3];
    for (int i = 0; i < 3; i++) ws[i] = (kl_workspace){poisoned(be, bytes[i]), bytes[i]};
    a->in.ws = ws[0], a->mixer.ws = ws[1], a->last.ws = ws[2];
    EXPECT(kl_run_linear_pair(be, &a->in, &err) == KL_OK);
    EXPECT(kl_run_kda_mixer(be, &a->mixer, &err) == KL_OK);
    EXPECT(kl_run_linear(be, &a->last, &err) == KL_OK);
    EXPECT(be->vt->sync(be, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    for (int i = 0; i < 3; i++) be->vt->free(be, ws[i].data, ws[i].bytes);
}

static void run_arriving(kl_backend *be, void *call)
{
    run_layer(be, call, arrivals_of(be, call));
}

static void run_in_turn(kl_backend *be, void *call)
{
    run_layer(be, call, (kl_arrivals){0});
}

/* spoiled: one number of the stream, or 0. */
static void check_layer(int64_t H, int64_t D, kl_weight_format format, float spoiled)
{
    parts p = {0};
    layer a = layer_of(H, D, format);
    char name[64];
    snprintf(name, sizeof name, "layer: H %lld, D %lld, format %d, %g", (long long)H,
             (long long)D, format, (double)spoiled);
    if (spoiled != 0) put(&a.in.first.x, D / 2, spoiled);
    OUT(a.in.first.x, 0);
    IN(a.in.first.norm_weight);
    WEIGHT(a.in.first.w);
    WEIGHT(a.in.second.w);
    OUT(a.in.first.out, 0);
    OUT(a.in.second.out, 0);
    IN(a.mixer.conv_weight);
    OUT(a.mixer.conv_state, 0);
    WEIGHT(a.mixer.f_b);
    WEIGHT(a.mixer.g_b);
    OUT(a.mixer.state, 0);
    IN(a.mixer.slots);
    IN(a.mixer.cu_seqlens);
    IN(a.mixer.A_log);
    IN(a.mixer.dt_bias);
    IN(a.mixer.norm_weight);
    OUT(a.last.x, 0);
    WEIGHT(a.last.w);
    if ((cpu->vt->formats & 1u << format) != 0)
        same_bits(cpu, &p, &a, sizeof a, run_arriving, run_in_turn, name);
    if (cuda != NULL) {
        const kl_arrivals both = arrivals_of(cuda, &a);
        const bool hears = format != KL_W_BF16;
        EXPECT(both.mixer == hears && both.out == hears);
        same_bits(cuda, &p, &a, sizeof a, run_arriving, run_in_turn, name);
    }
    used = 0;
}

/* A NaN is a word like others: nobody waits for it. */
static void layers(void)
{
    static const float spoils[] = {0, NAN, INFINITY};
    for (kl_weight_format f = KL_W_BF16; f < KL_N_WEIGHT_FORMATS; f++)
        for (int i = 0; i < 3; i++) {
            check_layer(8, 384, f, spoils[i]);
            check_layer(24, 1024, f, spoils[i]);
        }
}

/* Other shapes wait for the end of what they follow, and cannot be told otherwise. */
static void others_are_refused(void)
{
    kl_error err = {KL_OK, ""};
    if (cuda == NULL) return;
    layer a = layer_of(8, 64, KL_W_INT8);
    a.last.w.rows = 4096; /* more tiles than blocks */
    EXPECT(arrivals_of(cuda, &a).mixer && !arrivals_of(cuda, &a).out);
    a.last.residual = tensor(KL_F32, false, 2, 1, 4096, 1, 1);
    a.last.arriving = true;
    const size_t bytes = kl_workspace_linear(cuda, &a.last);
    a.last.ws = (kl_workspace){poisoned(cuda, bytes), bytes};
    EXPECT(kl_run_linear(cuda, &a.last, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "linear: x must not be arriving where arrivals() says so");
    cuda->vt->free(cuda, a.last.ws.data, bytes);
    a.mixer.conv_weight = tensor(KL_F32, false, 2, 6 * K, W - 1, 1, 1);
    a.mixer.conv_state.shape[2] = W - 2;
    EXPECT(!arrivals_of(cuda, &a).mixer);
    used = 0;
}

/* ---- steps ------------------------------------------------------------------------------- */

/* Heads, widths and formats as the kernels have them, of the real model's sizes where blocks of
 * neighbours must find room beside one another. */
static const kl_config config = {
    .vocab_size = 512,
    .hidden_size = 2304,
    .n_layers = 4,
    .max_length = 4096,
    .mixer = {KL_MIXER_KDA, KL_MIXER_KDA, KL_MIXER_MLA, KL_MIXER_KDA},
    .ffn = {KL_FFN_DENSE, KL_FFN_MOE, KL_FFN_MOE, KL_FFN_MOE},
    .kda_heads = 32,
    .kda_head_dim = K,
    .conv_width = W,
    .gate = KL_GATE_SOFTPLUS,
    .mla_heads = 32,
    .kv_rank = 512,
    .nope_dim = 128,
    .rope_dim = 64,
    .v_dim = 128,
    .kv_norm_eps = 1e-6f,
    .dense_inner = 1024,
    .n_experts = 16,
    .top_k = 8,
    .moe_inner = 1024,
    .n_shared = 1,
    .groups = 1,
    .top_groups = 1,
    .score = KL_SCORE_SIGMOID,
    .routed_scaling = 2.0f,
    .renormalize = true,
    .rms_eps = 1e-5f,
};

enum { TOKENS = 150 };

typedef struct {
    int32_t id[TOKENS];
    float logprob[TOKENS];
} answer;

static void generate(kl_engine *e, answer *to)
{
    static const int32_t prompt[] = {5};
    static kl_event events[64];
    const kl_request request = {.prompt = prompt,
                                .n_prompt = 1,
                                .max_new_tokens = TOKENS,
                                .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f}};
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    int64_t got = 0, n = 0;
    EXPECT(kl_generation_new(e, &request, 1, &g, &err) == KL_OK);
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 1000, events, 64, &got, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < got && n < TOKENS; k++, n++)
            to->id[n] = events[k].id, to->logprob[n] = events[k].logprob;
    }
    EXPECT_TEXT(err.message, "");
    EXPECT(n == TOKENS);
    kl_generation_free(g);
}

/* With a table that has arrivals, or without. */
static void answer_with(kl_backend *be, const kl_backend_vtbl *table, kl_weight_format format,
                        answer *to)
{
    const kl_backend_vtbl *const own = be->vt;
    const kl_engine_options options = {
        .format = format, .max_context = 256, .max_batch = 1, .step_tokens = 64};
    kl_engine *e = NULL;
    kl_error err = {KL_OK, ""};
    be->vt = table;
    EXPECT(kl_engine_new(be, &config, &options, &e, &err) == KL_OK);
    EXPECT(kl_engine_randomize(e, 7, 1, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    generate(e, to);
    kl_engine_free(e);
    be->vt = own;
}

static const kl_backend_vtbl *below;
static kl_arrivals found;
static kl_mla_arrivals mla_found;

static kl_status noted_arrivals(kl_backend *be, const kl_linear_pair *in,
                                const kl_kda_mixer *mixer, const kl_linear *last,
                                kl_arrivals *out, kl_error *err)
{
    const kl_status status = below->arrivals(be, in, mixer, last, out, err);
    found = *out;
    return status;
}

static kl_status noted_mla_arrivals(kl_backend *be, const kl_linear_pair *in,
                                    const kl_mla_decode *a, const kl_linear *last,
                                    kl_mla_arrivals *out, kl_error *err)
{
    const kl_status status = below->mla_arrivals(be, in, a, last, out, err);
    mla_found = *out;
    return status;
}

/* alone: not batch-invariant, whose o and MLA layers wait. */
static void check_steps(kl_backend *be, bool alone)
{
    static answer with, without;
    kl_backend_vtbl noting = *be->vt, plain = *be->vt;
    below = be->vt;
    noting.arrivals = noted_arrivals;
    noting.mla_arrivals = noted_mla_arrivals;
    plain.arrivals = NULL;
    plain.mla_arrivals = NULL;
    for (kl_weight_format f = KL_W_BF16; f < KL_N_WEIGHT_FORMATS; f++) {
        found = (kl_arrivals){0};
        mla_found = (kl_mla_arrivals){0};
        answer_with(be, &noting, f, &with);
        const bool hears = f != KL_W_BF16;
        EXPECT(found.mixer == hears && found.out == (hears && alone));
        EXPECT((mla_found.blanks > 0) == alone && mla_found.out == alone);
        answer_with(be, &plain, f, &without);
        EXPECT(memcmp(&with, &without, sizeof with) == 0);
    }
}

static void steps(void)
{
    const kl_backend_options options = {.batch_invariant = true};
    kl_backend *invariant = NULL;
    kl_error err;
    if (cuda == NULL) return;
    check_steps(cuda, true);
    EXPECT(kl_backend_open("cuda", getenv("KL_CUDA_LIBRARY"), &options, &invariant, &err) ==
           KL_OK);
    check_steps(invariant, false);
    kl_backend_close(invariant);
}

int main(void)
{
    open_both();
    RUN(layers);
    RUN(others_are_refused);
    if (!brief) RUN(steps);
    return close_both();
}
