/*
 * generation.c -- a generation's requests: checked, copied, queued, ended; see engine.h.
 */
#include "model/generation.h"

#include "base/memory.h"
#include "model/plan.h"

#include <string.h>

/* Tokens of the sequence that a request continues. */
static kl_status length_before(const kl_engine *e, const kl_request *r, int64_t *out,
                               kl_error *err)
{
    *out = 0;
    return r->seq == 0 && !r->in_place ? KL_OK : kl_seq_length(e, r->seq, out, err);
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
    if (r->guesses < 0 || r->guesses > KL_MAX_GUESSES)
        return kl_fail(err, KL_ERR_VALUE,
                       "generate: request %lld: guesses must be in [0, %d], got %lld",
                       (long long)i, KL_MAX_GUESSES, (long long)r->guesses);
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

/* ---- a request's memory ---------------------------------------------------------------- */

static kl_status copy_arrays(kl_request_state *q, const kl_request *r, int64_t words,
                             int64_t vocab, kl_error *err)
{
    const size_t n_ids = (size_t)(r->n_prompt + r->max_new_tokens);
    const size_t logits_bytes = (size_t)vocab * sizeof *q->logits;
    const bool penalty = r->sampling.repetition_penalty != 1.0f;
    q->ids = kl_calloc(n_ids, sizeof *q->ids);
    q->stop_ids = kl_calloc((size_t)r->n_stop_ids, sizeof *q->stop_ids);
    if (penalty) q->seen = kl_calloc((size_t)words, sizeof *q->seen);
    if (draws_first(r)) q->logits = kl_malloc(logits_bytes);
    if (q->ids == NULL || q->stop_ids == NULL || (penalty && q->seen == NULL) ||
        (draws_first(r) && q->logits == NULL))
        return kl_fail(err, KL_ERR_MEMORY, "generate: no memory for request %lld",
                       (long long)q->id);
    if (r->n_prompt > 0) memcpy(q->ids, r->prompt, (size_t)r->n_prompt * sizeof *q->ids);
    if (q->logits != NULL) memcpy(q->logits, r->logits, logits_bytes);
    if (r->n_stop_ids > 0)
        memcpy(q->stop_ids, r->stop_ids, (size_t)r->n_stop_ids * sizeof *q->stop_ids);
    for (int64_t t = 0; t < r->n_prompt; t++) kl_mark_seen(q->seen, q->ids[t]);
    return r->guesses == 0 ? KL_OK : kl_draft_init(&q->draft, (int64_t)n_ids, err);
}

void kl_request_free(kl_request_state *q)
{
    if (q == NULL) return;
    kl_free(q->ids);
    kl_free(q->stop_ids);
    kl_free(q->seen);
    kl_free(q->logits);
    kl_draft_free(&q->draft);
    kl_free(q);
}

/* What it may fail with comes before it has a place among the prefixes. */
static kl_status fill_request(kl_generation *g, kl_request_state *q, const kl_request *r,
                              kl_error *err)
{
    q->id = g->next_id;
    q->r = *r;
    KL_TRY(copy_arrays(q, r, g->words, g->e->config.vocab_size, err));
    KL_TRY(length_before(g->e, r, &q->before, err));
    q->sched = (kl_sched_request){.phase = KL_SCHED_WAITING,
                                  .n_prompt = r->n_prompt,
                                  .fed = r->n_history,
                                  .pages = pages_of(g->e, r, kl_request_longest(q))};
    if (r->seq != 0 || r->max_new_tokens == 0) return KL_OK;
    return kl_prefix_enter(&g->e->prefix, q->ids, r->n_prompt, &q->place, err);
}

static kl_status new_request(kl_generation *g, const kl_request *r, kl_request_state **out,
                             kl_error *err)
{
    kl_request_state *q = kl_calloc(1, sizeof *q);
    if (q == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "generate: no memory for request %lld",
                       (long long)g->next_id);
    const kl_status status = fill_request(g, q, r, err);
    if (status == KL_OK)
        *out = q;
    else
        kl_request_free(q);
    return status;
}

/* ---- in and out ------------------------------------------------------------------------ */

/* A request in place has its sequence already: its pages are promised at once. */
static kl_status seat_in_place(kl_generation *g, kl_request_state *q, kl_error *err)
{
    kl_generation_sweep(g);
    for (int64_t i = 0; i < g->n_running; i++)
        if (g->running[i]->seq == q->r.seq)
            return kl_fail(err, KL_ERR_VALUE,
                           "generate: request %lld: request %lld continues the same sequence",
                           (long long)q->id, (long long)g->running[i]->id);
    if (g->n_running == g->e->plan.max_batch) /* sequences were released under requests */
        return kl_fail(err, KL_ERR_MEMORY, "generate: request %lld: %lld requests are running",
                       (long long)q->id, (long long)g->n_running);
    KL_TRY(kl_cache_reserve(&g->e->cache, q->r.seq, kl_request_longest(q), err));
    kl_request_seat(g, q, q->r.seq);
    return KL_OK;
}

void kl_request_seat(kl_generation *g, kl_request_state *q, kl_seq seq)
{
    q->seq = seq;
    q->sched.phase = KL_SCHED_PROMPT;
    g->running[g->n_running++] = q;
}

static void push_waiting(kl_generation *g, kl_request_state *q)
{
    if (g->first == NULL)
        g->first = q;
    else
        g->last->next = q;
    g->last = q;
    g->n_waiting++;
}

kl_request_state *kl_generation_pop(kl_generation *g)
{
    kl_request_state *q = g->first;
    g->first = q->next;
    g->n_waiting--;
    return q;
}

/* An array of steps that a request is the first to need. */
static kl_status take_rows(const kl_generation *g, int32_t **array, size_t per_row,
                           kl_error *err)
{
    int32_t *const larger = kl_calloc((size_t)g->max_rows * per_row, sizeof *larger);
    if (larger == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "generate: no memory for the rows of a step");
    kl_free(*array);
    *array = larger;
    return KL_OK;
}

static kl_status make_room(kl_generation *g, const kl_request *r, kl_error *err)
{
    if (r->sampling.repetition_penalty != 1.0f && g->seen == NULL)
        KL_TRY(take_rows(g, &g->seen, (size_t)g->words, err));
    if (r->top <= g->max_top) return KL_OK;
    KL_TRY(take_rows(g, &g->top_ids, (size_t)r->top, err));
    float *const larger = kl_calloc((size_t)(g->max_rows * r->top), sizeof *larger);
    if (larger == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "generate: no memory for the rows of a step");
    kl_free(g->top_logprobs);
    g->top_logprobs = larger;
    g->max_top = r->top;
    return KL_OK;
}

kl_status kl_generation_submit(kl_generation *g, const kl_request *r, int64_t *id,
                               kl_error *err)
{
    kl_request_state *q;
    KL_TRY(check_request(g->e, r, g->next_id, err));
    KL_TRY(make_room(g, r, err));
    KL_TRY(new_request(g, r, &q, err));
    if (r->in_place && r->max_new_tokens > 0) {
        const kl_status status = seat_in_place(g, q, err);
        if (status != KL_OK) kl_request_free(q);
        KL_TRY(status);
    } else {
        push_waiting(g, q);
    }
    g->stats.prompt_tokens += r->n_prompt - r->n_history;
    *id = g->next_id++;
    return KL_OK;
}

void kl_request_end(kl_generation *g, kl_request_state *q)
{
    int64_t slot;
    kl_error ignored; /* ours is alive; the caller's may have been released meanwhile */
    if (q->seq != 0 && !q->r.in_place)
        (void)kl_seq_release(g->e, q->seq, &ignored);
    else if (q->seq != 0 && kl_cache_find(&g->e->cache, q->seq, true, &slot, &ignored) == KL_OK)
        kl_cache_unreserve(&g->e->cache, slot);
    q->seq = 0;
    kl_prefix_leave(&g->e->prefix, &q->place);
    q->sched.phase = KL_SCHED_DONE;
}

void kl_generation_sweep(kl_generation *g)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < g->n_running; i++)
        if (g->running[i]->sched.phase == KL_SCHED_DONE) {
            kl_generation_forget(g, g->running[i]);
            kl_request_free(g->running[i]);
        } else {
            g->running[kept++] = g->running[i];
        }
    g->n_running = kept;
    kl_generation_settle(g);
}

/* A request leaves the queue from anywhere. */
static void drop_waiting(kl_generation *g, int64_t id)
{
    kl_request_state *before = NULL, *q = g->first;
    while (q != NULL && q->id != id) {
        before = q;
        q = q->next;
    }
    if (q == NULL) return;
    if (before == NULL)
        g->first = q->next;
    else
        before->next = q->next;
    if (g->last == q) g->last = before;
    g->n_waiting--;
    kl_request_end(g, q);
    kl_request_free(q);
}

kl_status kl_generation_finish(kl_generation *g, int64_t id, kl_error *err)
{
    if (id < 0 || id >= g->next_id)
        return kl_fail(err, KL_ERR_VALUE, "generate: request must be in [0, %lld), got %lld",
                       (long long)g->next_id, (long long)id);
    for (int64_t i = 0; i < g->n_running; i++)
        if (g->running[i]->id == id) kl_request_end(g, g->running[i]);
    kl_generation_sweep(g);
    drop_waiting(g, id);
    return KL_OK;
}

/* ---- life ------------------------------------------------------------------------------ */

static kl_status make_step_arrays(kl_generation *g, kl_error *err)
{
    const size_t n = (size_t)g->e->plan.max_batch, rows = (size_t)g->max_rows;
    g->running = kl_calloc(n, sizeof *g->running);
    g->phases = kl_calloc(n, sizeof *g->phases);
    g->items = kl_calloc(n, sizeof *g->items);
    g->queue = kl_calloc(2 * n + rows, sizeof *g->queue);
    g->feeds = kl_calloc(n, sizeof *g->feeds);
    g->guesses = kl_calloc(n, sizeof *g->guesses);
    g->taken = kl_calloc(n, sizeof *g->taken);
    g->sampling = kl_calloc(rows, sizeof *g->sampling);
    g->rows = kl_calloc(rows, sizeof *g->rows);
    g->ids = kl_calloc(rows, sizeof *g->ids);
    g->logprobs = kl_calloc(rows, sizeof *g->logprobs);
    g->of_row = kl_calloc(rows, sizeof *g->of_row);
    if (g->running == NULL || g->phases == NULL || g->items == NULL || g->queue == NULL ||
        g->feeds == NULL || g->guesses == NULL || g->taken == NULL || g->sampling == NULL ||
        g->rows == NULL || g->ids == NULL || g->logprobs == NULL || g->of_row == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "generate: no memory for the rows of a step");
    return KL_OK;
}

static kl_status make_generation(kl_generation *g, const kl_request *requests, int64_t n,
                                 kl_error *err)
{
    int64_t id;
    KL_TRY(make_step_arrays(g, err));
    for (int64_t i = 0; i < n; i++) KL_TRY(kl_generation_submit(g, &requests[i], &id, err));
    return KL_OK;
}

kl_status kl_generation_new(kl_engine *e, const kl_request *requests, int64_t n_requests,
                            kl_generation **out, kl_error *err)
{
    *out = NULL;
    KL_TRY(kl_engine_check_loaded(e, err));
    kl_generation *g = kl_calloc(1, sizeof *g);
    if (g == NULL) return kl_fail(err, KL_ERR_MEMORY, "generate: no memory");
    g->e = e;
    g->words = (e->config.vocab_size + 31) / 32;
    g->max_rows = kl_plan_draws(&e->plan);
    const kl_status status = make_generation(g, requests, n_requests, err);
    if (status == KL_OK)
        *out = g;
    else
        kl_generation_free(g);
    return status;
}

void kl_generation_free(kl_generation *g)
{
    if (g == NULL) return;
    for (int64_t i = 0; i < g->n_running; i++) kl_request_end(g, g->running[i]);
    kl_generation_sweep(g);
    while (g->first != NULL) drop_waiting(g, g->first->id);
    if (g->logits != NULL)
        g->e->be->vt->free_host(g->e->be, g->logits, kl_generation_logits_bytes(g));
    void *const owned[] = {g->running,  g->phases,  g->items,        g->queue,
                           g->feeds,    g->guesses, g->taken,        g->sampling,
                           g->rows,     g->ids,     g->top_ids,      g->seen,
                           g->logprobs, g->of_row,  g->top_logprobs, g};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) kl_free(owned[i]);
}
