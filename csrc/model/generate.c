/*
 * generate.c -- requests from their prompts to their last tokens; see engine.h.
 *
 * scheduler.c decides what a step holds; this file keeps the requests' sequences, draws and
 * endings. Events wait in a queue of one step, so that a caller may take them one at a time.
 */
#include "model/engine_struct.h"
#include "model/scheduler.h"

#include "base/memory.h"

#include <math.h>
#include <string.h>
#include <time.h>

typedef struct {
    kl_request r; /* its pointers lead into ids and stop_ids below */
    int32_t *ids; /* prompt, then new tokens: [n_prompt + max_new_tokens] */
    int32_t *stop_ids;
    int32_t *seen; /* bit set [words], or NULL without a repetition penalty */
    int64_t n_new;
    kl_seq seq;  /* 0: none */
    bool failed; /* not finite, and not reported yet */
} request;

struct kl_generation {
    kl_engine *e;
    int64_t n_requests, words;
    request *requests;
    kl_sched_request *phases;
    kl_sched_item *items;

    kl_event *queue; /* [n_items + 1] */
    int64_t queue_first, queue_count;
    kl_generation_stats stats;

    /* Arrays of a step, max_batch rows each. */
    kl_feed *feeds;
    kl_sampling *sampling;
    int32_t *rows, *ids, *top_ids, *seen;
    float *logprobs, *top_logprobs;
    int64_t *of_row; /* the request of a row */
    float *logits;   /* [max_batch, vocab], with a logits processor only; host memory of be */
    bool penalties;  /* some request has one */
    int top;         /* the most that a request asks for */
};

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- life ------------------------------------------------------------------------------ */

static kl_status check_request(const kl_engine *e, const kl_request *r, int64_t i,
                               kl_error *err)
{
    const int64_t vocab = e->config.vocab_size, context = e->plan.max_context;
    const int64_t most = kl_min_i64(vocab, KL_MAX_TOP);
    kl_error cause;
    if (r->n_prompt < 1)
        return kl_fail(err, KL_ERR_VALUE,
                       "generate: request %lld: the prompt must have a token or more, got none",
                       (long long)i);
    if (r->max_new_tokens < 0 || r->n_prompt > context ||
        r->max_new_tokens > context - r->n_prompt)
        return kl_fail(
            err, KL_ERR_VALUE,
            "generate: request %lld: %lld prompt tokens and max_new_tokens %lld must "
            "be at most %lld together (max_context)",
            (long long)i, (long long)r->n_prompt, (long long)r->max_new_tokens,
            (long long)context);
    if (kl_cache_pages_for(&e->config, r->n_prompt + r->max_new_tokens) > e->plan.n_pages)
        return kl_fail(err, KL_ERR_VALUE,
                       "generate: request %lld needs more than the cache's %lld pages",
                       (long long)i, (long long)e->plan.n_pages);
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

static void mark_seen(int32_t *seen, int32_t id)
{
    if (seen != NULL) seen[id / 32] = (int32_t)((uint32_t)seen[id / 32] | 1u << (id % 32));
}

static kl_status copy_request(kl_generation *g, const kl_request *r, int64_t i, kl_error *err)
{
    request *q = &g->requests[i];
    const size_t n_ids = (size_t)(r->n_prompt + r->max_new_tokens);
    q->r = *r;
    q->ids = kl_calloc(n_ids, sizeof *q->ids);
    q->stop_ids = kl_calloc((size_t)r->n_stop_ids, sizeof *q->stop_ids);
    const bool penalty = r->sampling.repetition_penalty != 1.0f;
    if (penalty) q->seen = kl_calloc((size_t)g->words, sizeof *q->seen);
    if (q->ids == NULL || q->stop_ids == NULL || (penalty && q->seen == NULL))
        return kl_fail(err, KL_ERR_MEMORY, "generate: no memory for request %lld",
                       (long long)i);
    memcpy(q->ids, r->prompt, (size_t)r->n_prompt * sizeof *q->ids);
    if (r->n_stop_ids > 0)
        memcpy(q->stop_ids, r->stop_ids, (size_t)r->n_stop_ids * sizeof *q->stop_ids);
    for (int64_t t = 0; t < r->n_prompt; t++) mark_seen(q->seen, q->ids[t]);

    g->phases[i] = (kl_sched_request){
        .phase = KL_SCHED_WAITING,
        .n_prompt = r->n_prompt,
        .pages = kl_cache_pages_for(&g->e->config, r->n_prompt + r->max_new_tokens)};
    g->penalties = g->penalties || penalty;
    if (r->top > g->top) g->top = r->top;
    g->stats.prompt_tokens += r->n_prompt;
    return KL_OK;
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

/* A request ends: its sequence goes back. */
static void end_request(kl_generation *g, int64_t i)
{
    kl_error ignored; /* the handle is ours and alive */
    if (g->requests[i].seq != 0) (void)kl_seq_release(g->e, g->requests[i].seq, &ignored);
    g->requests[i].seq = 0;
    g->phases[i].phase = KL_SCHED_DONE;
}

static size_t logits_bytes(const kl_generation *g)
{
    return (size_t)(g->e->plan.max_batch * g->e->config.vocab_size) * sizeof *g->logits;
}

void kl_generation_free(kl_generation *g)
{
    if (g == NULL) return;
    for (int64_t i = 0; g->requests != NULL && g->phases != NULL && i < g->n_requests; i++) {
        end_request(g, i);
        kl_free(g->requests[i].ids);
        kl_free(g->requests[i].stop_ids);
        kl_free(g->requests[i].seen);
    }
    if (g->logits != NULL) g->e->be->vt->free_host(g->e->be, g->logits, logits_bytes(g));
    void *const owned[] = {g->requests, g->phases, g->items,        g->queue,   g->feeds,
                           g->sampling, g->rows,   g->ids,          g->top_ids, g->seen,
                           g->logprobs, g->of_row, g->top_logprobs, g};
    for (size_t i = 0; i < sizeof owned / sizeof owned[0]; i++) kl_free(owned[i]);
}

/* ---- a step's ends --------------------------------------------------------------------- */

static kl_event *push_event(kl_generation *g, int64_t i, int32_t id, float logprob,
                            kl_finish finish)
{
    kl_event *event = &g->queue[g->queue_first + g->queue_count++];
    event->request = i;
    event->id = id;
    event->logprob = logprob;
    event->finish = finish;
    event->n_top = 0;
    return event;
}

static bool is_stop(const request *q, int32_t id)
{
    for (int64_t i = 0; i < q->r.n_stop_ids; i++)
        if (q->stop_ids[i] == id) return true;
    return false;
}

/* A drawn token: append it, report it, and end the request if it is the last. */
static void take_token(kl_generation *g, int64_t row)
{
    const int64_t i = g->of_row[row];
    request *q = &g->requests[i];
    const int32_t id = g->ids[row];
    if (id < 0) {
        q->failed = true;
        end_request(g, i);
        return;
    }
    q->ids[q->r.n_prompt + q->n_new++] = id;
    mark_seen(q->seen, id);
    g->stats.new_tokens++;
    const kl_finish finish = is_stop(q, id)                    ? KL_FINISH_STOP
                             : q->n_new == q->r.max_new_tokens ? KL_FINISH_LENGTH
                                                               : KL_RUNNING;
    kl_event *event = push_event(g, i, id, g->logprobs[row], finish);
    event->n_top = q->r.top;
    memcpy(event->top_ids, g->top_ids + row * g->top, (size_t)q->r.top * sizeof(int32_t));
    memcpy(event->top_logprobs, g->top_logprobs + row * g->top,
           (size_t)q->r.top * sizeof(float));
    if (finish != KL_RUNNING)
        end_request(g, i);
    else
        g->phases[i].phase = KL_SCHED_DECODE;
}

/* ---- a step ---------------------------------------------------------------------------- */

/* Requests in their order, as long as sequences and pages last. */
static kl_status admit(kl_generation *g, kl_error *err)
{
    kl_engine *const e = g->e;
    for (;;) {
        const int64_t i =
            kl_sched_admit(g->phases, g->n_requests, e->plan.max_batch - e->cache.n_alive,
                           kl_cache_available(&e->cache));
        if (i < 0) return KL_OK;
        request *q = &g->requests[i];
        KL_TRY(kl_seq_new(e, &q->seq, err));
        KL_TRY(kl_cache_reserve(&e->cache, q->seq, q->r.n_prompt + q->r.max_new_tokens, err));
        g->phases[i].phase = KL_SCHED_PROMPT;
    }
}

static kl_feed feed_of(const kl_generation *g, const kl_sched_item *item)
{
    const request *q = &g->requests[item->request];
    const bool decode = g->phases[item->request].phase == KL_SCHED_DECODE;
    const int64_t first = decode ? q->r.n_prompt + q->n_new - 1 : g->phases[item->request].fed;
    return (kl_feed){q->seq, q->ids + first, item->count};
}

/* The rows that draw: the last token of each item that samples. Returns their number. */
static int64_t make_rows(kl_generation *g, int64_t n_items)
{
    int64_t n_rows = 0, end = 0;
    for (int64_t k = 0; k < n_items; k++) {
        const kl_sched_item *item = &g->items[k];
        const request *q = &g->requests[item->request];
        g->feeds[k] = feed_of(g, item);
        end += item->count;
        if (!item->samples) continue;
        g->rows[n_rows] = (int32_t)(end - 1);
        g->of_row[n_rows] = item->request;
        g->sampling[n_rows] = q->r.sampling;
        g->sampling[n_rows].position += (uint64_t)q->n_new;
        if (g->penalties) {
            int32_t *seen = g->seen + n_rows * g->words;
            const size_t bytes = (size_t)g->words * sizeof *seen;
            if (q->seen != NULL)
                memcpy(seen, q->seen, bytes);
            else
                memset(seen, 0, bytes);
        }
        n_rows++;
    }
    return n_rows;
}

/* The step has run: prompts have moved on. */
static void advance_prompts(kl_generation *g, int64_t n_items)
{
    for (int64_t k = 0; k < n_items; k++) {
        kl_sched_request *r = &g->phases[g->items[k].request];
        if (r->phase != KL_SCHED_PROMPT) continue;
        r->fed += g->items[k].count;
        g->stats.prompt_done += g->items[k].count;
    }
}

/* Let the caller change the logits, then draw from them. */
static kl_status process_and_sample(kl_generation *g, const kl_step *step, int64_t n_rows,
                                    kl_logits_fn process, void *ctx, kl_error *err)
{
    const int64_t vocab = g->e->config.vocab_size;
    for (int64_t row = 0; row < n_rows; row++) {
        const int64_t i = g->of_row[row];
        const request *q = &g->requests[i];
        if (process(ctx, i, q->ids, q->r.n_prompt + q->n_new, g->logits + row * vocab) != 0)
            return kl_fail(err, KL_ERR_CANCELLED, "generate: the logits processor stopped");
    }
    return kl_engine_sample(g->e, g->logits, n_rows, step, err);
}

static kl_status run_items(kl_generation *g, int64_t n_items, kl_logits_fn process,
                           void *process_ctx, kl_poll_fn poll, void *poll_ctx, kl_error *err)
{
    const int64_t n_rows = make_rows(g, n_items);
    kl_step step = {.feeds = g->feeds,
                    .n_feeds = n_items,
                    .rows = g->rows,
                    .n_rows = n_rows,
                    .sampling = g->sampling,
                    .seen = g->seen,
                    .ids = g->ids,
                    .id_logprobs = g->logprobs,
                    .top = g->top,
                    .top_ids = g->top_ids,
                    .top_logprobs = g->top_logprobs,
                    .poll = poll,
                    .poll_ctx = poll_ctx};
    if (process == NULL || n_rows == 0) {
        KL_TRY(kl_engine_step(g->e, &step, err));
    } else {
        kl_step logits_only = {.feeds = g->feeds,
                               .n_feeds = n_items,
                               .rows = g->rows,
                               .n_rows = n_rows,
                               .logits = g->logits,
                               .poll = poll,
                               .poll_ctx = poll_ctx};
        KL_TRY(kl_engine_step(g->e, &logits_only, err));
        KL_TRY(process_and_sample(g, &step, n_rows, process, process_ctx, err));
    }
    advance_prompts(g, n_items);
    for (int64_t row = 0; row < n_rows; row++) take_token(g, row);
    return KL_OK;
}

/* A request of no tokens ends with an event that has no id. Returns whether one did. */
static bool end_empty(kl_generation *g)
{
    for (int64_t i = 0; i < g->n_requests && g->queue_count < g->e->plan.max_batch; i++) {
        if (g->phases[i].phase != KL_SCHED_WAITING || g->requests[i].r.max_new_tokens > 0)
            continue;
        push_event(g, i, -1, 0.0f, KL_FINISH_LENGTH);
        end_request(g, i);
    }
    return g->queue_count > 0;
}

/* Nothing runs: all have ended, or one waits for what other sequences hold. */
static kl_status check_waiting(const kl_generation *g, kl_error *err)
{
    const kl_cache *c = &g->e->cache;
    for (int64_t i = 0; i < g->n_requests; i++)
        if (g->phases[i].phase == KL_SCHED_WAITING)
            return kl_fail(err, KL_ERR_MEMORY,
                           "generate: request %lld needs a sequence and %lld pages, but other "
                           "sequences leave %lld and %lld",
                           (long long)i, (long long)g->phases[i].pages,
                           (long long)(c->n_slots - c->n_alive),
                           (long long)kl_cache_available(c));
    return KL_OK;
}

/* One step of whatever can run; *ran false when nothing is left. After a failure the requests
 * of the step have ended: their sequences are unusable. */
static kl_status run_one(kl_generation *g, kl_logits_fn process, void *process_ctx,
                         kl_poll_fn poll, void *poll_ctx, bool *ran, kl_error *err)
{
    const int64_t done_before = g->stats.prompt_done;
    *ran = true;
    if (end_empty(g)) return KL_OK;
    KL_TRY(admit(g, err));
    const int64_t n_items =
        kl_sched_step(g->phases, g->n_requests, g->e->plan.step_tokens, g->items);
    *ran = n_items > 0;
    if (n_items == 0) return check_waiting(g, err);

    const double start = now_s();
    const kl_status status = run_items(g, n_items, process, process_ctx, poll, poll_ctx, err);
    double *const total =
        g->stats.prompt_done > done_before ? &g->stats.prefill_s : &g->stats.decode_s;
    *total += now_s() - start;
    if (status != KL_OK)
        for (int64_t k = 0; k < n_items; k++) end_request(g, g->items[k].request);
    return status;
}

/* ---- the run --------------------------------------------------------------------------- */

static void drain(kl_generation *g, kl_event *events, int64_t max_events, int64_t *n_events)
{
    while (g->queue_count > 0 && *n_events < max_events) {
        events[(*n_events)++] = g->queue[g->queue_first++];
        g->queue_count--;
    }
    if (g->queue_count == 0) g->queue_first = 0;
}

/* Name a request whose logits were not finite, each once. */
static kl_status report_failure(kl_generation *g, kl_error *err)
{
    for (int64_t i = 0; i < g->n_requests; i++)
        if (g->requests[i].failed) {
            g->requests[i].failed = false;
            return kl_fail(err, KL_ERR_NUMERICAL,
                           "generate: request %lld: logits after %lld tokens must be finite",
                           (long long)i,
                           (long long)(g->requests[i].r.n_prompt + g->requests[i].n_new));
        }
    return KL_OK;
}

static bool has_failure(const kl_generation *g)
{
    for (int64_t i = 0; i < g->n_requests; i++)
        if (g->requests[i].failed) return true;
    return false;
}

/* In the backend's host memory: they cross twice at every step. */
static kl_status make_logits(kl_generation *g, kl_error *err)
{
    void *block;
    if (g->logits != NULL) return KL_OK;
    KL_TRY(g->e->be->vt->alloc_host(g->e->be, logits_bytes(g), &block, err));
    g->logits = block;
    return KL_OK;
}

kl_status kl_generation_run(kl_generation *g, int64_t max_steps, kl_event *events,
                            int64_t max_events, int64_t *n_events, kl_logits_fn process,
                            void *process_ctx, kl_poll_fn poll, void *poll_ctx, kl_error *err)
{
    *n_events = 0;
    if (process != NULL) KL_TRY(make_logits(g, err));
    bool ran = true;
    for (int64_t steps = 0; ran; steps++) {
        drain(g, events, max_events, n_events);
        if (*n_events == max_events || steps == max_steps) return KL_OK;
        /* Events go out before a failure does, or the caller would lose them. */
        if (has_failure(g)) return *n_events > 0 ? KL_OK : report_failure(g, err);
        const kl_status status = run_one(g, process, process_ctx, poll, poll_ctx, &ran, err);
        if (status != KL_OK) return !ran && *n_events > 0 ? KL_OK : status;
    }
    return KL_OK;
}

bool kl_generation_done(const kl_generation *g)
{
    for (int64_t i = 0; i < g->n_requests; i++)
        if (g->phases[i].phase != KL_SCHED_DONE || g->requests[i].failed) return false;
    return g->queue_count == 0;
}

kl_status kl_generation_finish(kl_generation *g, int64_t index, kl_error *err)
{
    if (index < 0 || index >= g->n_requests)
        return kl_fail(err, KL_ERR_VALUE, "generate: request must be in [0, %lld), got %lld",
                       (long long)g->n_requests, (long long)index);
    end_request(g, index);
    return KL_OK;
}

void kl_generation_get_stats(const kl_generation *g, kl_generation_stats *out)
{
    *out = g->stats;
}
