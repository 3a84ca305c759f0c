/*
 * generation.c -- a generation's requests: checked, copied, ended; see engine.h.
 */
#include "model/generation.h"

#include "base/memory.h"

#include <string.h>

/* Tokens of the sequence that a request continues. */
static kl_status length_before(const kl_engine *e, const kl_request *r, int64_t *out,
                               kl_error *err)
{
    *out = 0;
    return r->seq == 0 ? KL_OK : kl_seq_length(e, r->seq, out, err);
}

/* Pages that a request takes beside those of the sequence it forks, if it does. */
static int64_t pages_of(const kl_engine *e, const kl_request *r, int64_t tokens)
{
    const int64_t slot = (int64_t)(r->seq & 0xffffffffu) - 1;
    return r->seq == 0 ? kl_cache_pages_for(&e->config, tokens)
                       : kl_cache_fork_pages(&e->cache, slot, tokens);
}

/* What a request continues must leave room for it, now and in the end. */
static kl_status check_room(const kl_engine *e, const kl_request *r, int64_t i, kl_error *err)
{
    const int64_t context = e->plan.max_context, fed = r->n_prompt - r->n_history;
    int64_t before;
    KL_TRY(length_before(e, r, &before, err));
    if (fed < 0 || (r->n_history != 0 && r->n_history != before))
        return kl_fail(err, KL_ERR_VALUE,
                       "generate: request %lld: the history must be 0 or the sequence's %lld "
                       "tokens, got %lld of %lld",
                       (long long)i, (long long)before, (long long)r->n_history,
                       (long long)r->n_prompt);
    if (fed == 0 && (r->logits == NULL || before == 0))
        return kl_fail(err, KL_ERR_VALUE,
                       "generate: request %lld: the prompt must have a token or more, got none",
                       (long long)i);
    if (r->max_new_tokens < 0 || fed > context - before ||
        r->max_new_tokens > context - before - fed)
        return kl_fail(
            err, KL_ERR_VALUE,
            "generate: request %lld: %lld prompt tokens and max_new_tokens %lld must "
            "be at most %lld together (max_context)",
            (long long)i, (long long)(before + fed), (long long)r->max_new_tokens,
            (long long)context);
    const int64_t held = r->in_place ? 0 : kl_cache_pages_for(&e->config, before);
    const int64_t total = before + fed + r->max_new_tokens;
    if ((r->in_place ? kl_cache_pages_for(&e->config, total) : held + pages_of(e, r, total)) >
        e->plan.n_pages)
        return kl_fail(err, KL_ERR_VALUE,
                       "generate: request %lld needs more than the cache's %lld pages",
                       (long long)i, (long long)e->plan.n_pages);
    return KL_OK;
}

static kl_status check_request(const kl_engine *e, const kl_request *r, int64_t i,
                               kl_error *err)
{
    const int64_t vocab = e->config.vocab_size;
    const int64_t most = kl_min_i64(vocab, KL_MAX_TOP);
    kl_error cause;
    KL_TRY(check_room(e, r, i, err));
    if (r->top < 0 || r->top > most)
        return kl_fail(err, KL_ERR_VALUE,
                       "generate: request %lld: top must be in [0, %lld], "
                       "got %d",
                       (long long)i, (long long)most, r->top);
    if (kl_check_ids("prompt", r->prompt, r->n_prompt, vocab, &cause) != KL_OK ||
        kl_check_sampling("sampling", &r->sampling, &cause) != KL_OK)
        return kl_fail(err, KL_ERR_VALUE, "generate: request %lld: %s", (long long)i,
                       cause.message);
    return KL_OK;
}

static bool draws_first(const kl_request *r)
{
    return r->n_prompt == r->n_history;
}

static kl_status copy_arrays(kl_generation *g, const kl_request *r, int64_t i, kl_error *err)
{
    kl_request_state *q = &g->requests[i];
    const size_t n_ids = (size_t)(r->n_prompt + r->max_new_tokens);
    const size_t logits_bytes = (size_t)g->e->config.vocab_size * sizeof *q->logits;
    q->r = *r;
    q->ids = kl_calloc(n_ids, sizeof *q->ids);
    q->stop_ids = kl_calloc((size_t)r->n_stop_ids, sizeof *q->stop_ids);
    const bool penalty = r->sampling.repetition_penalty != 1.0f;
    if (penalty) q->seen = kl_calloc((size_t)g->words, sizeof *q->seen);
    if (draws_first(r)) q->logits = kl_malloc(logits_bytes);
    if (q->ids == NULL || q->stop_ids == NULL || (penalty && q->seen == NULL) ||
        (draws_first(r) && q->logits == NULL))
        return kl_fail(err, KL_ERR_MEMORY, "generate: no memory for request %lld",
                       (long long)i);
    if (r->n_prompt > 0) memcpy(q->ids, r->prompt, (size_t)r->n_prompt * sizeof *q->ids);
    if (q->logits != NULL) memcpy(q->logits, r->logits, logits_bytes);
    if (r->n_stop_ids > 0)
        memcpy(q->stop_ids, r->stop_ids, (size_t)r->n_stop_ids * sizeof *q->stop_ids);
    for (int64_t t = 0; t < r->n_prompt; t++) kl_mark_seen(q->seen, q->ids[t]);
    return KL_OK;
}

/* A request in place has its sequence already: its pages are promised at once. */
static kl_status seat(kl_generation *g, int64_t i, kl_error *err)
{
    kl_request_state *q = &g->requests[i];
    if (!q->r.in_place || q->r.max_new_tokens == 0) return KL_OK;
    KL_TRY(kl_cache_reserve(&g->e->cache, q->r.seq, kl_request_longest(q), err));
    q->seq = q->r.seq;
    g->phases[i].phase = KL_SCHED_PROMPT;
    return KL_OK;
}

static kl_status copy_request(kl_generation *g, const kl_request *r, int64_t i, kl_error *err)
{
    kl_request_state *q = &g->requests[i];
    KL_TRY(copy_arrays(g, r, i, err));
    KL_TRY(length_before(g->e, r, &q->before, err));
    g->phases[i] = (kl_sched_request){.phase = KL_SCHED_WAITING,
                                      .n_prompt = r->n_prompt,
                                      .fed = r->n_history,
                                      .pages = pages_of(g->e, r, kl_request_longest(q))};
    g->penalties = g->penalties || q->seen != NULL;
    if (r->top > g->top) g->top = r->top;
    g->stats.prompt_tokens += r->n_prompt - r->n_history;
    return seat(g, i, err);
}

static kl_status make_step_arrays(kl_generation *g, kl_error *err)
{
    const size_t n = (size_t)g->e->plan.max_batch, top = (size_t)g->top;
    g->queue = kl_calloc(n, sizeof *g->queue);
    g->feeds = kl_calloc(n, sizeof *g->feeds);
    g->sampling = kl_calloc(n, sizeof *g->sampling);
    g->rows = kl_calloc(n, sizeof *g->rows);
    g->ids = kl_calloc(n, sizeof *g->ids);
    g->logprobs = kl_calloc(n, sizeof *g->logprobs);
    g->of_row = kl_calloc(n, sizeof *g->of_row);
    g->top_ids = kl_calloc(n * top, sizeof *g->top_ids);
    g->top_logprobs = kl_calloc(n * top, sizeof *g->top_logprobs);
    if (g->penalties) g->seen = kl_calloc(n * (size_t)g->words, sizeof *g->seen);
    g->items = kl_calloc(n, sizeof *g->items);
    if (g->queue == NULL || g->feeds == NULL || g->sampling == NULL || g->rows == NULL ||
        g->ids == NULL || g->logprobs == NULL || g->of_row == NULL || g->top_ids == NULL ||
        g->top_logprobs == NULL || (g->penalties && g->seen == NULL) || g->items == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "generate: no memory for the rows of a step");
    return KL_OK;
}

static kl_status make_generation(kl_generation *g, const kl_request *requests, kl_error *err)
{
    g->requests = kl_calloc((size_t)g->n_requests, sizeof *g->requests);
    g->phases = kl_calloc((size_t)g->n_requests, sizeof *g->phases);
    if (g->requests == NULL || g->phases == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "generate: no memory for %lld requests",
                       (long long)g->n_requests);
    for (int64_t i = 0; i < g->n_requests; i++) KL_TRY(copy_request(g, &requests[i], i, err));
    return make_step_arrays(g, err);
}

kl_status kl_generation_new(kl_engine *e, const kl_request *requests, int64_t n_requests,
                            kl_generation **out, kl_error *err)
{
    *out = NULL;
    KL_TRY(kl_engine_check_loaded(e, err));
    for (int64_t i = 0; i < n_requests; i++) KL_TRY(check_request(e, &requests[i], i, err));
    kl_generation *g = kl_calloc(1, sizeof *g);
    if (g == NULL) return kl_fail(err, KL_ERR_MEMORY, "generate: no memory");
    g->e = e;
    g->n_requests = n_requests;
    g->words = (e->config.vocab_size + 31) / 32;
    const kl_status status = make_generation(g, requests, err);
    if (status == KL_OK)
        *out = g;
    else
        kl_generation_free(g);
    return status;
}

void kl_generation_end(kl_generation *g, int64_t i)
{
    kl_request_state *q = &g->requests[i];
    int64_t slot;
    kl_error ignored; /* ours is alive; the caller's may have been released meanwhile */
    if (q->seq != 0 && !q->r.in_place)
        (void)kl_seq_release(g->e, q->seq, &ignored);
    else if (q->seq != 0 && kl_cache_find(&g->e->cache, q->seq, true, &slot, &ignored) == KL_OK)
        kl_cache_unreserve(&g->e->cache, slot);
    q->seq = 0;
    g->phases[i].phase = KL_SCHED_DONE;
}

void kl_generation_free(kl_generation *g)
{
    if (g == NULL) return;
    for (int64_t i = 0; g->requests != NULL && g->phases != NULL && i < g->n_requests; i++) {
        kl_generation_end(g, i);
        kl_free(g->requests[i].ids);
        kl_free(g->requests[i].stop_ids);
        kl_free(g->requests[i].seen);
        kl_free(g->requests[i].logits);
    }
    if (g->logits != NULL)
        g->e->be->vt->free_host(g->e->be, g->logits, kl_generation_logits_bytes(g));
    void *const owned[] = {g->requests, g->phases, g->items,        g->queue,   g->feeds,
                           g->sampling, g->rows,   g->ids,          g->top_ids, g->seen,
                           g->logprobs, g->of_row, g->top_logprobs, g};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) kl_free(owned[i]);
}
