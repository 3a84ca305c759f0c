/*
 * engine.c -- an engine's life and its sequences.
 */
#include "model/engine_struct.h"

#include "base/memory.h"
#include "model/plan.h"
#include "model/scheduler.h"

/* ---- life ------------------------------------------------------------------------------ */

static kl_status alloc_block(kl_engine *e, size_t bytes, void **out, kl_error *err)
{
    return e->be->vt->alloc(e->be, bytes == 0 ? 1 : bytes, out, err);
}

static void free_block(kl_engine *e, void *block, size_t bytes)
{
    if (block != NULL) e->be->vt->free(e->be, block, bytes == 0 ? 1 : bytes);
}

static kl_status make_weights(kl_engine *e, kl_error *err)
{
    kl_arena arena;
    KL_TRY(kl_weights_new(e->config.n_layers, &e->weights, err));
    KL_TRY(alloc_block(e, e->plan.weight_bytes, &e->weight_block, err));
    kl_arena_init(&arena, e->weight_block, e->plan.weight_bytes);
    return kl_weights_layout(&e->weights, &e->config, e->format, &arena, err);
}

static size_t cache_bytes(const kl_plan *p)
{
    return p->state_bytes + p->snapshot_bytes + p->page_bytes;
}

static kl_status make_cache(kl_engine *e, kl_error *err)
{
    const kl_plan *p = &e->plan;
    const kl_cache_shape shape = {p->max_batch, p->n_pages, p->max_context, p->snapshot_slots,
                                  p->latents};
    const size_t bytes = cache_bytes(p);
    kl_arena arena;
    KL_TRY(alloc_block(e, bytes, &e->cache_block, err));
    kl_arena_init(&arena, e->cache_block, bytes);
    kl_prefix_init(&e->prefix, &e->cache);
    return kl_cache_init(&e->cache, e->be, &e->config, kl_act_of(e->format), &shape, &arena,
                         err);
}

/* Where a step runs while it is enqueued, one that is ahead would bring each token a step late.
 * Backends that record do not, and enqueue a step in no time. */
static kl_status make_flights(kl_engine *e, kl_error *err)
{
    const kl_backend_vtbl *const vt = e->be->vt;
    if (vt->record_begin == NULL) return KL_OK;
    e->flight_bytes = kl_plan_flight_bytes(&e->config, &e->plan);
    for (int i = 0; i < 2; i++) {
        KL_TRY(vt->alloc_host(e->be, e->flight_bytes, &e->flights[i].host, err));
        KL_TRY(vt->new_mark(e->be, &e->flights[i].mark, err));
    }
    return KL_OK;
}

static void free_flights(kl_engine *e)
{
    for (int i = 0; i < 2; i++) {
        const kl_flight *f = &e->flights[i];
        if (f->host != NULL) e->be->vt->free_host(e->be, f->host, e->flight_bytes);
        if (f->mark != NULL) e->be->vt->free_mark(e->be, f->mark);
    }
}

static kl_status make_scratch(kl_engine *e, kl_error *err)
{
    KL_TRY(alloc_block(e, e->plan.scratch_bytes, &e->scratch, err));
    e->host_bytes = kl_plan_host_bytes(&e->config, &e->plan);
    KL_TRY(e->be->vt->alloc_host(e->be, e->host_bytes, &e->host, err));
    for (int i = 0; i < 2; i++) KL_TRY(e->be->vt->new_mark(e->be, &e->marks[i], err));
    e->slots = kl_calloc((size_t)e->plan.max_batch, sizeof *e->slots);
    e->counts = kl_calloc((size_t)e->plan.max_batch, sizeof *e->counts);
    if (e->slots == NULL || e->counts == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "engine: no memory for the slots of a step");
    return KL_OK;
}

static kl_status make_engine(kl_engine *e, const kl_engine_options *options, kl_error *err)
{
    kl_backend_info info;
    KL_TRY(e->be->vt->info(e->be, &info, err));
    e->batch_invariant = info.batch_invariant;
    KL_TRY(kl_plan_make(e->be, &e->config, options, &e->plan, err));
    KL_TRY(kl_plan_check(&e->plan, err));
    KL_TRY(make_weights(e, err));
    KL_TRY(make_cache(e, err));
    KL_TRY(make_scratch(e, err));
    return make_flights(e, err);
}

kl_status kl_engine_new(kl_backend *be, const kl_config *config,
                        const kl_engine_options *options, kl_engine **out, kl_error *err)
{
    *out = NULL;
    kl_engine *e = kl_calloc(1, sizeof *e);
    if (e == NULL) return kl_fail(err, KL_ERR_MEMORY, "engine: no memory for its bookkeeping");
    e->be = be;
    e->config = *config;
    e->format = options->format;
    const kl_status status = make_engine(e, options, err);
    if (status == KL_OK)
        *out = e;
    else
        kl_engine_free(e);
    return status;
}

void kl_engine_free(kl_engine *e)
{
    kl_error ignored;
    if (e == NULL) return;
    (void)e->be->vt->sync(e->be, &ignored); /* a step that nobody waits for may be under way */
    kl_recordings_free(&e->recordings, e->be);
    free_block(e, e->weight_block, e->plan.weight_bytes);
    free_block(e, e->cache_block, cache_bytes(&e->plan));
    free_block(e, e->scratch, e->plan.scratch_bytes);
    kl_weights_free(&e->weights);
    kl_prefix_free(&e->prefix);
    kl_cache_free(&e->cache);
    if (e->host != NULL) e->be->vt->free_host(e->be, e->host, e->host_bytes);
    for (int i = 0; i < 2; i++)
        if (e->marks[i] != NULL) e->be->vt->free_mark(e->be, e->marks[i]);
    free_flights(e);
    kl_free(e->slots);
    kl_free(e->counts);
    kl_free(e);
}

int64_t kl_engine_lead(const kl_engine *e, int64_t before, int64_t n)
{
    return e->batch_invariant ? kl_sched_lead(before, n) : 0;
}

const kl_plan *kl_engine_plan(const kl_engine *e)
{
    return &e->plan;
}

const kl_config *kl_engine_config(const kl_engine *e)
{
    return &e->config;
}

kl_pass kl_engine_pass(kl_engine *e)
{
    kl_pass pass = {.be = e->be,
                    .config = &e->config,
                    .weights = &e->weights,
                    .cache = &e->cache,
                    .act = kl_act_of(e->format),
                    .row_block = kl_plan_draws(&e->plan),
                    .marks = e->marks};
    kl_arena_init(&pass.arena, e->scratch, e->plan.scratch_bytes);
    e->n_passes++;
    return pass;
}

void kl_engine_unload(kl_engine *e)
{
    e->loaded = false;
    kl_prefix_clear(&e->prefix);
}

kl_status kl_engine_check_loaded(const kl_engine *e, kl_error *err)
{
    if (e->loaded) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "engine: weights must be loaded first");
}

/* ---- sequences ------------------------------------------------------------------------- */

kl_status kl_seq_new(kl_engine *e, kl_seq *out, kl_error *err)
{
    return kl_cache_new(&e->cache, out, err);
}

kl_status kl_seq_fork(kl_engine *e, kl_seq seq, kl_seq *out, kl_error *err)
{
    return kl_cache_fork(&e->cache, seq, out, err);
}

kl_status kl_seq_release(kl_engine *e, kl_seq seq, kl_error *err)
{
    return kl_cache_release(&e->cache, seq, err);
}

kl_status kl_seq_length(const kl_engine *e, kl_seq seq, int64_t *out, kl_error *err)
{
    int64_t slot;
    KL_TRY(kl_cache_find(&e->cache, seq, false, &slot, err));
    *out = e->cache.seqs[slot].length;
    return KL_OK;
}

kl_status kl_seq_pages(const kl_engine *e, kl_seq seq, int64_t *pages, int64_t *shared,
                       kl_error *err)
{
    int64_t slot;
    KL_TRY(kl_cache_find(&e->cache, seq, true, &slot, err));
    const int32_t *table = kl_cache_table(&e->cache, slot);
    *pages = e->cache.seqs[slot].n_pages;
    *shared = 0;
    for (int64_t i = 0; i < *pages; i++) *shared += e->cache.refs[table[i]] > 1;
    return KL_OK;
}

kl_status kl_seq_draft(kl_engine *e, kl_seq seq, int64_t n_tokens, kl_seq *out, kl_error *err)
{
    kl_cache *const c = &e->cache;
    int64_t slot;
    KL_TRY(kl_cache_find(c, seq, false, &slot, err));
    const int64_t length = c->seqs[slot].length;
    *out = seq;
    if (n_tokens > c->max_context - length || kl_cache_free_seqs(c) == 0 ||
        kl_cache_fork_pages(c, slot, length + n_tokens) > kl_cache_available(c))
        return KL_OK;
    return kl_cache_fork(c, seq, out, err);
}

kl_status kl_seq_restore(kl_engine *e, int64_t length, kl_seq *out, kl_error *err)
{
    return kl_cache_restore(&e->cache, length, out, err);
}

void kl_engine_usage(const kl_engine *e, int64_t *sequences, int64_t *pages_used)
{
    *sequences = e->cache.n_alive;
    *pages_used = e->cache.n_pages - e->cache.n_free - e->cache.n_spare;
}

/* ---- prefixes -------------------------------------------------------------------------- */

kl_status kl_engine_keep_prefixes(kl_engine *e, bool on, kl_error *err)
{
    if (on && e->plan.step_tokens < KL_PAGE_TOKENS)
        return kl_fail(err, KL_ERR_VALUE,
                       "prefix cache: step_tokens must be at least %d, got %lld: prompts are "
                       "cut at its borders only",
                       KL_PAGE_TOKENS, (long long)e->plan.step_tokens);
    e->prefix.on = on;
    if (!on) kl_prefix_clear(&e->prefix);
    return KL_OK;
}

void kl_engine_clear_prefixes(kl_engine *e)
{
    kl_prefix_clear(&e->prefix);
}

void kl_engine_prefix_stats(const kl_engine *e, kl_prefix_stats *out)
{
    const kl_cache *c = &e->cache;
    const size_t page = KL_PAGE_TOKENS * e->plan.page_bytes_per_token;
    *out = (kl_prefix_stats){.on = e->prefix.on,
                             .hits = e->prefix.hits,
                             .cached_tokens = e->prefix.cached_tokens,
                             .evicted = (int64_t)c->n_evicted,
                             .snapshots = c->n_snapshots};
    out->bytes =
        (size_t)c->n_snapshots * e->plan.state_bytes_per_sequence + (size_t)c->n_spare * page;
}
