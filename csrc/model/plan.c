/*
 * plan.c -- every figure of an engine's memory, before any of it is taken.
 *
 * Weights come from a measuring walk of the weight table, scratch from dry passes of the
 * largest steps, the cache from its own layout. What the options leave open is chosen from what
 * is then left: a context of at most a quarter of the free memory, and pages for every sequence
 * of the context, or as many as fit. Where nobody said how long sequences are, the pages take no
 * more than the weights do: a small model must not take a GPU for itself.
 *
 * The prefix cache lives in what sequences leave of all that (cache.h). A batch that fills every
 * slot would leave it nothing, so it has a few more: one for four sequences and two at least (a
 * document and a question on it), as far as a thirty-second of what the pages may take pays for
 * them and a context still fits.
 */
#include "model/plan.h"

#include "base/memory.h"

#include <stdio.h>
#include <string.h>

#define MIN_CONTEXT 64

/* What the options of each kind of device are where they are left open. */
typedef struct {
    const char *backend;
    int64_t max_batch, step_tokens;
    size_t reserve; /* bytes that no plan takes; 0: a sixteenth of what is free */
} defaults;

/* The free memory is a moment's figure, and others live here too: hence the sixteenth. Of a GPU's
 * 80 GB that would be a fifth of the room beside 8-bit weights of 50 GB, so what is asked for by
 * size may go further there. What an engine of five layers took after its plan, code loaded at a
 * first use and recordings of steps, was under 20 MB on an H100; all recordings of the 48B model
 * would be some 90 MB.
 *
 * 512 tokens make every product of a CPU compute-bound. A prompt's step on a GPU reads the weights
 * of all experts, which takes as long as the arithmetic of some 3,000 tokens: 8,192 are well past
 * that. 32 sequences of the 48B model have 1.4 GB of states. */
static const defaults DEFAULTS[] = {{"cpu", 8, 512, 0}, {"cuda", 32, 8192, (size_t)1 << 30}};

static const defaults *defaults_of(const kl_backend *be)
{
    const size_t n = sizeof DEFAULTS / sizeof DEFAULTS[0];
    for (size_t i = 0; i < n; i++)
        if (strcmp(DEFAULTS[i].backend, be->vt->name) == 0) return &DEFAULTS[i];
    return &DEFAULTS[0];
}

static double mib(size_t bytes)
{
    return (double)bytes / (1024.0 * 1024.0);
}

/* What the figures are computed from. */
typedef struct {
    kl_backend *be;
    const kl_config *config;
    const kl_engine_options *options;
    const defaults *defaults;
    kl_dtype act;
    size_t ample; /* what the planner's own choices may take together */
    size_t page;  /* bytes of a page in all layers                    */
} planner;

/* ---- options --------------------------------------------------------------------------- */

static kl_status choose(const char *name, int64_t given, int64_t fallback, int64_t max,
                        int64_t *out, kl_error *err)
{
    *out = given == 0 ? fallback : given;
    if (given < 0 || *out > max)
        return kl_fail(err, KL_ERR_VALUE, "plan: %s must be in [1, %lld], got %lld", name,
                       (long long)max, (long long)given);
    return KL_OK;
}

static kl_status choose_counts(const planner *s, kl_plan *out, kl_error *err)
{
    const kl_engine_options *o = s->options;
    if ((int)o->format < 0 || o->format >= KL_N_WEIGHT_FORMATS)
        return kl_fail(err, KL_ERR_VALUE,
                       "plan: format must be f32, bf16, int8, int4 or fp8, got %d",
                       (int)o->format);
    if ((int)o->latents < 0 || o->latents >= KL_N_LATENTS)
        return kl_fail(err, KL_ERR_VALUE, "plan: latents must be act or fp8, got %d",
                       (int)o->latents);
    if ((s->be->vt->formats & 1u << o->format) == 0)
        return kl_fail(err, KL_ERR_VALUE, "plan: fp8 is a format of CUDA only, got the %s",
                       s->be->vt->name);
    KL_TRY(choose("max_batch", o->max_batch, s->defaults->max_batch, KL_MAX_BATCH,
                  &out->max_batch, err));
    KL_TRY(choose("step_tokens", o->step_tokens, s->defaults->step_tokens, KL_MAX_STEP_TOKENS,
                  &out->step_tokens, err));
    return choose("max_context", o->max_context, 0, s->config->max_length, &out->max_context,
                  err);
}

/* ---- weights and scratch --------------------------------------------------------------- */

static kl_status measure_weights(const planner *s, kl_weights *w, size_t *bytes, kl_error *err)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    KL_TRY(kl_weights_layout(w, s->config, s->options->format, &arena, err));
    *bytes = arena.used;
    return KL_OK;
}

enum { N_LARGEST = 7, TOKEN_STEP = 1 };

/* The steps that need most: a full prefill of which every row is wanted, one token of every
 * sequence, sampled, the last tokens of prompts that fill a step, the rows of
 * kl_engine_sample(), which may be more than a step has tokens, a full prefill of few tokens, whose
 * products hold more of it in their own memory, guesses, and a single token, which alone has sums
 * for its routers. */
static void largest_shapes(const kl_config *config, const kl_plan *plan,
                           kl_pass_shape out[N_LARGEST])
{
    const int64_t T = plan->step_tokens, N = kl_min_i64(plan->max_batch, T);
    const kl_pass_shape full = {.T = T,
                                .N = N,
                                .B = kl_cache_pages_for(config, plan->max_context),
                                .R = T,
                                .logits = true,
                                .top = (int)kl_min_i64(KL_MAX_TOP, config->vocab_size)};
    for (int i = 0; i < N_LARGEST; i++) {
        out[i] = full;
        out[i].targets = i == 0 || i == 4;
        out[i].sampling = out[i].seen = !out[i].targets;
    }
    out[TOKEN_STEP].T = out[TOKEN_STEP].R = N;
    out[TOKEN_STEP].decode = true;
    out[2].R = N;
    out[3].T = out[3].N = out[3].B = 0;
    out[3].R = plan->max_batch;
    out[4].T = out[4].R = kl_min_i64(T, KL_FEW_TOKENS);
    out[4].N = kl_min_i64(N, KL_FEW_TOKENS);
    out[5].T = out[5].R = kl_plan_guessing(plan);
    out[5].N = kl_min_i64(N, out[5].T);
    out[5].verify = true;
    out[6].T = out[6].N = out[6].R = 1;
    out[6].decode = true;
}

static size_t block_bytes(const kl_config *config, const kl_pass_shape *shape)
{
    kl_pass_inputs in;
    kl_pass_outputs out;
    return kl_pass_layout_inputs(&in, shape, config->vocab_size, NULL) +
           kl_pass_layout_outputs(&out, shape, NULL);
}

size_t kl_plan_host_bytes(const kl_config *config, const kl_plan *plan)
{
    kl_pass_shape shapes[N_LARGEST];
    size_t most = 0;
    largest_shapes(config, plan, shapes);
    for (int i = 0; i < N_LARGEST; i++) {
        const size_t bytes = block_bytes(config, &shapes[i]);
        if (bytes > most) most = bytes;
    }
    return most;
}

/* A penalty needs the tokens on the host: no step ahead has sets of those seen. */
size_t kl_plan_flight_bytes(const kl_config *config, const kl_plan *plan)
{
    kl_pass_shape shapes[N_LARGEST];
    largest_shapes(config, plan, shapes);
    shapes[TOKEN_STEP].seen = false;
    return block_bytes(config, &shapes[TOKEN_STEP]);
}

static kl_status measure_passes(kl_pass *p, const kl_plan *plan, size_t *bytes, kl_error *err)
{
    kl_pass_shape shapes[N_LARGEST];
    largest_shapes(p->config, plan, shapes);
    for (int i = 0; i < N_LARGEST; i++) {
        KL_TRY(kl_pass_start(p, &shapes[i], err));
        KL_TRY(shapes[i].T > 0 ? kl_pass_compute(p, err) : kl_pass_sample_logits(p, NULL, err));
    }
    *bytes = p->arena.peak;
    return KL_OK;
}

static kl_status measure_scratch(const planner *s, const kl_weights *w, const kl_plan *plan,
                                 size_t *bytes, kl_error *err)
{
    /* The cache only lends the shapes of its tensors here. */
    const kl_cache_shape shape = {plan->max_batch, 1, 1, 0, plan->latents};
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    kl_cache cache;
    kl_status status = kl_cache_init(&cache, s->be, s->config, s->act, &shape, &arena, err);
    if (status == KL_OK) {
        kl_pass pass = {.be = s->be,
                        .config = s->config,
                        .weights = w,
                        .cache = &cache,
                        .act = s->act,
                        .row_block = kl_plan_draws(plan)};
        kl_arena_init(&pass.arena, NULL, 0);
        status = measure_passes(&pass, plan, bytes, err);
    }
    kl_cache_free(&cache);
    return status;
}

/* ---- cache ----------------------------------------------------------------------------- */

/* The planner's context: what a quarter of the memory that the weights leave can hold. */
static void choose_context(const planner *s, kl_plan *out)
{
    if (out->max_context != 0) return;
    const size_t token = out->page_bytes_per_token;
    const size_t left = s->ample > out->weight_bytes ? s->ample - out->weight_bytes : 0;
    int64_t fits = s->config->max_length;
    if (token > 0 && left / 4 / token < (size_t)fits)
        fits = (int64_t)(left / 4 / token) / KL_PAGE_TOKENS * KL_PAGE_TOKENS;
    const int64_t least = kl_min_i64(MIN_CONTEXT, s->config->max_length);
    out->max_context = fits > least ? fits : least;
}

/* What the other parts leave of `limit`, or of what cache_bytes says. */
static size_t room_within(const kl_plan *p, size_t limit)
{
    const size_t states = p->state_bytes + p->snapshot_bytes;
    const size_t others = p->weight_bytes + p->scratch_bytes + states;
    const size_t cache = p->cache_limit_bytes;
    const size_t room = limit > others ? limit - others : 0;
    if (cache == 0) return room;
    const size_t asked = cache > states ? cache - states : 0;
    return asked < room ? asked : room;
}

static int64_t pages_within(const planner *s, const kl_plan *p, size_t limit)
{
    return s->page == 0 ? 0 : (int64_t)(room_within(p, limit) / s->page);
}

static int64_t pages_wanted(const planner *s, const kl_plan *p, int64_t one)
{
    const int64_t all = one * p->max_batch;
    if (s->options->max_context != 0 || s->page == 0) return all;
    const int64_t most = (int64_t)(p->weight_bytes / s->page);
    return kl_min_i64(all, most > one ? most : one);
}

/* A model without KDA layers has snapshots for nothing. */
static void choose_snapshots(const planner *s, kl_plan *out)
{
    const size_t room = room_within(out, s->ample), slot = out->state_bytes_per_sequence;
    const size_t context = (size_t)kl_cache_pages_for(s->config, out->max_context) * s->page;
    int64_t n = out->max_batch > 4 ? (out->max_batch + 3) / 4 : 2;
    if (slot > 0) n = kl_min_i64(n, (int64_t)(room / 32 / slot));
    if (context + (size_t)n * slot > room) n = 0;
    out->snapshot_slots = n;
}

/* As many as are wanted, or as fit; one sequence's in any case, even where they do not fit. A
 * context that nobody asked for gives way instead. */
static void choose_pages(const planner *s, kl_plan *out)
{
    const int64_t one = kl_cache_pages_for(s->config, out->max_context);
    const size_t ample = s->options->cache_bytes == 0 ? s->ample : out->limit_bytes;
    const int64_t n = kl_min_i64(pages_wanted(s, out, one), pages_within(s, out, ample));
    const int64_t most = pages_within(s, out, out->limit_bytes);
    out->n_pages = n < one ? one : n;
    if (n >= one || most >= one || s->options->max_context != 0 || most == 0) return;
    out->n_pages = most;
    out->max_context = most * KL_PAGE_TOKENS;
}

kl_status kl_plan_check(const kl_plan *p, kl_error *err)
{
    const size_t cache = p->state_bytes + p->snapshot_bytes + p->page_bytes;
    const bool cache_fits = p->cache_limit_bytes == 0 || cache <= p->cache_limit_bytes;
    char limit[64] = "";
    if (p->total_bytes <= p->limit_bytes && cache_fits) return KL_OK;
    if (!cache_fits) {
        snprintf(limit, sizeof limit, " (and cache_bytes limits the cache to %.1f MiB)",
                 mib(p->cache_limit_bytes));
    }
    return kl_fail(
        err, KL_ERR_MEMORY,
        "plan: weights need %.1f MiB, states of %lld sequences %.1f MiB, scratch "
        "%.1f MiB and %lld tokens of context %.1f MiB, but %.1f MiB are to be had%s; "
        "ask for less max_context or max_batch",
        mib(p->weight_bytes), (long long)p->max_batch, mib(p->state_bytes),
        mib(p->scratch_bytes), (long long)p->max_context, mib(p->page_bytes),
        mib(p->limit_bytes), limit);
}

static kl_status measure_cache(const planner *s, kl_plan *out, kl_error *err)
{
    kl_cache_shape shape = {out->max_batch, out->n_pages, out->max_context, 0, out->latents};
    kl_arena arena;
    size_t all_states;
    kl_arena_init(&arena, NULL, 0);
    KL_TRY(kl_cache_layout(NULL, s->config, s->act, &shape, &arena, &out->state_bytes,
                           &out->page_bytes, err));
    shape.n_extra = out->snapshot_slots;
    KL_TRY(kl_cache_layout(NULL, s->config, s->act, &shape, &arena, &all_states,
                           &out->page_bytes, err));
    out->snapshot_bytes = all_states - out->state_bytes;
    return KL_OK;
}

/* ---- the plan -------------------------------------------------------------------------- */

static kl_status fill_plan(planner *s, kl_weights *w, kl_plan *out, kl_error *err)
{
    KL_TRY(measure_weights(s, w, &out->weight_bytes, err));
    out->page_bytes_per_token = kl_cache_token_bytes(s->config, s->act, out->latents);
    out->state_bytes_per_sequence = kl_cache_seq_bytes(s->config, s->act);
    s->page = out->page_bytes_per_token * KL_PAGE_TOKENS;
    choose_context(s, out);
    KL_TRY(measure_scratch(s, w, out, &out->scratch_bytes, err));
    KL_TRY(measure_cache(s, out, err)); /* states, which the rest's room depends on */
    choose_snapshots(s, out);
    KL_TRY(measure_cache(s, out, err));
    choose_pages(s, out);
    KL_TRY(measure_cache(s, out, err));
    out->total_bytes = out->weight_bytes + out->state_bytes + out->snapshot_bytes +
                       out->page_bytes + out->scratch_bytes;
    return KL_OK;
}

/* Twice the same where a sixteenth is kept free anyway. */
static void set_limits(planner *s, size_t free_bytes, kl_plan *out)
{
    const size_t reserve = s->defaults->reserve, budget = s->options->budget_bytes;
    const size_t limit = free_bytes > reserve ? free_bytes - reserve : 0;
    s->ample = free_bytes - free_bytes / 16;
    if (s->ample > limit) s->ample = limit;
    out->limit_bytes = reserve == 0 ? s->ample : limit;
    if (budget != 0) out->limit_bytes = s->ample = budget;
    out->cache_limit_bytes = s->options->cache_bytes;
    out->free_bytes = free_bytes;
}

kl_status kl_plan_make(kl_backend *be, const kl_config *config,
                       const kl_engine_options *options, kl_plan *out, kl_error *err)
{
    planner s = {.be = be,
                 .config = config,
                 .options = options,
                 .defaults = defaults_of(be),
                 .act = kl_act_of(options->format)};
    kl_backend_info info;
    kl_weights w;
    *out = (kl_plan){.latents = options->latents};
    KL_TRY(kl_config_check(config, err));
    KL_TRY(choose_counts(&s, out, err));
    KL_TRY(be->vt->info(be, &info, err));
    set_limits(&s, info.free_bytes, out);

    KL_TRY(kl_weights_new(config->n_layers, &w, err));
    const kl_status status = fill_plan(&s, &w, out, err);
    kl_weights_free(&w);
    return status;
}
