/*
 * generate.c -- requests from their prompts to their last tokens; see engine.h.
 *
 * scheduler.c decides what a step holds; this file keeps the requests' sequences, draws and
 * endings. Events wait in a queue of one step, so that a caller may take them one at a time.
 */
#include "model/generation.h"

#include "base/memory.h"

#include <math.h>
#include <string.h>
#include <time.h>

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
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

static bool is_stop(const kl_request_state *q, int32_t id)
{
    for (int64_t i = 0; i < q->r.n_stop_ids; i++)
        if (q->stop_ids[i] == id) return true;
    return false;
}

/* A drawn token: append it, report it, and end the request if it is the last. */
static void take_token(kl_generation *g, int64_t row)
{
    const int64_t i = g->of_row[row];
    kl_request_state *q = &g->requests[i];
    const int32_t id = g->ids[row];
    if (id < 0) {
        q->failed = true;
        kl_generation_end(g, i);
        return;
    }
    q->ids[q->r.n_prompt + q->n_new++] = id;
    kl_mark_seen(q->seen, id);
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
        kl_generation_end(g, i);
    else
        g->phases[i].phase = KL_SCHED_DECODE;
}

/* ---- a step ---------------------------------------------------------------------------- */

/* Between two runs the caller may have fed or released the sequence of a waiting request. */
static kl_status fork_unchanged(kl_generation *g, int64_t i, kl_error *err)
{
    kl_request_state *q = &g->requests[i];
    int64_t length;
    if (kl_seq_length(g->e, q->r.seq, &length, err) == KL_OK && length == q->before)
        return kl_seq_fork(g->e, q->r.seq, &q->seq, err);
    kl_generation_end(g, i);
    return kl_fail(err, KL_ERR_VALUE,
                   "generate: request %lld: the sequence it continues has changed since",
                   (long long)i);
}

/* Requests in their order, as long as sequences and pages last. */
static kl_status admit(kl_generation *g, kl_error *err)
{
    kl_engine *const e = g->e;
    for (;;) {
        const int64_t i =
            kl_sched_admit(g->phases, g->n_requests, kl_cache_free_seqs(&e->cache),
                           kl_cache_available(&e->cache));
        if (i < 0) return KL_OK;
        kl_request_state *q = &g->requests[i];
        if (q->r.seq != 0)
            KL_TRY(fork_unchanged(g, i, err));
        else
            KL_TRY(kl_seq_new(e, &q->seq, err));
        KL_TRY(kl_cache_reserve(&e->cache, q->seq, kl_request_longest(q), err));
        g->phases[i].phase = KL_SCHED_PROMPT;
    }
}

static kl_feed feed_of(const kl_generation *g, const kl_sched_item *item)
{
    const kl_request_state *q = &g->requests[item->request];
    const bool decode = g->phases[item->request].phase == KL_SCHED_DECODE;
    const int64_t first = decode ? q->r.n_prompt + q->n_new - 1 : g->phases[item->request].fed;
    return (kl_feed){q->seq, q->ids + first, item->count};
}

/* How row `row` draws, for a request. */
static void fill_row(kl_generation *g, int64_t row, int64_t i)
{
    const kl_request_state *q = &g->requests[i];
    g->of_row[row] = i;
    g->sampling[row] = q->r.sampling;
    g->sampling[row].position += (uint64_t)q->n_new;
    if (!g->penalties) return;
    int32_t *seen = g->seen + row * g->words;
    const size_t bytes = (size_t)g->words * sizeof *seen;
    if (q->seen != NULL)
        memcpy(seen, q->seen, bytes);
    else
        memset(seen, 0, bytes);
}

/* The rows that draw: the last token of each item that samples. Returns their number. */
static int64_t make_rows(kl_generation *g, int64_t n_items)
{
    int64_t n_rows = 0, end = 0;
    for (int64_t k = 0; k < n_items; k++) {
        const kl_sched_item *item = &g->items[k];
        g->feeds[k] = feed_of(g, item);
        end += item->count;
        if (!item->samples) continue;
        g->rows[n_rows] = (int32_t)(end - 1);
        fill_row(g, n_rows++, item->request);
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

static kl_step sampling_step(const kl_generation *g)
{
    return (kl_step){.sampling = g->sampling,
                     .seen = g->seen,
                     .ids = g->ids,
                     .id_logprobs = g->logprobs,
                     .top = g->top,
                     .top_ids = g->top_ids,
                     .top_logprobs = g->top_logprobs};
}

/* Let the caller change the logits [n_rows, vocab], then draw from them. */
static kl_status process_and_sample(kl_generation *g, float *logits, int64_t n_rows,
                                    kl_logits_fn process, void *ctx, kl_error *err)
{
    const int64_t vocab = g->e->config.vocab_size;
    const kl_step step = sampling_step(g);
    for (int64_t row = 0; process != NULL && row < n_rows; row++) {
        const int64_t i = g->of_row[row];
        const kl_request_state *q = &g->requests[i];
        if (process(ctx, i, q->ids, q->r.n_prompt + q->n_new, logits + row * vocab) != 0)
            return kl_fail(err, KL_ERR_CANCELLED, "generate: the logits processor stopped");
    }
    return kl_engine_sample(g->e, logits, n_rows, &step, err);
}

/* Requests that feed no prompt draw from the logits they brought. *drew: one did. */
static kl_status draw_first(kl_generation *g, kl_logits_fn process, void *ctx, bool *drew,
                            kl_error *err)
{
    *drew = false;
    for (int64_t i = 0; i < g->n_requests; i++) {
        const kl_sched_request *p = &g->phases[i];
        if (p->phase != KL_SCHED_PROMPT || p->fed < p->n_prompt) continue;
        fill_row(g, 0, i);
        const kl_status status =
            process_and_sample(g, g->requests[i].logits, 1, process, ctx, err);
        if (status != KL_OK) kl_generation_end(g, i);
        KL_TRY(status);
        take_token(g, 0);
        *drew = true;
    }
    return KL_OK;
}

static kl_status run_items(kl_generation *g, int64_t n_items, kl_logits_fn process,
                           void *process_ctx, kl_poll_fn poll, void *poll_ctx, kl_error *err)
{
    const int64_t n_rows = make_rows(g, n_items);
    kl_step step = sampling_step(g);
    step.feeds = g->feeds;
    step.n_feeds = n_items;
    step.rows = g->rows;
    step.n_rows = n_rows;
    step.poll = poll;
    step.poll_ctx = poll_ctx;
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
        KL_TRY(process_and_sample(g, g->logits, n_rows, process, process_ctx, err));
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
        kl_generation_end(g, i);
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
                           (long long)kl_cache_free_seqs(c), (long long)kl_cache_available(c));
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
    bool drew;
    KL_TRY(draw_first(g, process, process_ctx, &drew, err));
    if (drew) return KL_OK;
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
        for (int64_t k = 0; k < n_items; k++) kl_generation_end(g, g->items[k].request);
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
    KL_TRY(g->e->be->vt->alloc_host(g->e->be, kl_generation_logits_bytes(g), &block, err));
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
    kl_generation_end(g, index);
    return KL_OK;
}

void kl_generation_get_stats(const kl_generation *g, kl_generation_stats *out)
{
    *out = g->stats;
}
