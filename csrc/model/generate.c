/*
 * generate.c -- requests from their prompts to their last tokens; see engine.h.
 *
 * scheduler.c decides what a step holds, generate_rows.c lays it out; this file keeps the
 * requests' sequences, draws and endings. Events wait in a queue of one step, so that a caller may
 * take them one at a time.
 */
#include "model/generation.h"

#include "base/memory.h"

#include <string.h>
#include <time.h>

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- events ---------------------------------------------------------------------------- */

static kl_event *push_event(kl_generation *g, const kl_request_state *q, int32_t id,
                            kl_finish finish)
{
    kl_event *event = &g->queue[g->queue_first + g->queue_count++];
    event->request = q->id;
    event->n_cached = q->n_cached;
    event->n_drafted = q->n_drafted;
    event->n_accepted = q->n_accepted;
    event->id = id;
    event->logprob = 0.0f;
    event->finish = finish;
    event->n_top = 0;
    return event;
}

void kl_generation_fail(kl_generation *g, kl_request_state *q, const kl_error *err)
{
    push_event(g, q, -1, KL_FINISH_ERROR)->error = *err;
    kl_request_end(g, q);
}

static void fail_numerical(kl_generation *g, kl_request_state *q)
{
    kl_error err;
    kl_error_set(&err, KL_ERR_NUMERICAL,
                 "generate: request %lld: logits after %lld tokens must be finite",
                 (long long)q->id, (long long)(q->r.n_prompt + q->n_new));
    kl_prefix_distrust(&g->e->prefix, &q->place);
    kl_generation_fail(g, q, &err);
}

static void report_token(kl_generation *g, const kl_request_state *q, int64_t row,
                         kl_finish finish)
{
    kl_event *event = push_event(g, q, g->ids[row], finish);
    event->logprob = g->logprobs[row];
    event->n_top = q->r.top;
    for (int i = 0; i < q->r.top; i++) {
        event->top_ids[i] = g->top_ids[row * g->top + i];
        event->top_logprobs[i] = g->top_logprobs[row * g->top + i];
    }
}

void kl_generation_take_token(kl_generation *g, int64_t row)
{
    kl_request_state *q = g->of_row[row];
    const int32_t id = g->ids[row];
    if (id < 0) {
        fail_numerical(g, q);
        return;
    }
    q->ids[q->r.n_prompt + q->n_new++] = id;
    kl_mark_seen(q->seen, id);
    g->stats.new_tokens++;
    const kl_finish finish = kl_request_stops_at(q, id)        ? KL_FINISH_STOP
                             : q->n_new == q->r.max_new_tokens ? KL_FINISH_LENGTH
                                                               : KL_RUNNING;
    report_token(g, q, row, finish);
    if (finish != KL_RUNNING)
        kl_request_end(g, q);
    else
        q->sched.phase = KL_SCHED_DECODE;
}

/* ---- admission ------------------------------------------------------------------------- */

/* Between two runs the caller may have fed or released the sequence of a waiting request. */
static kl_status fork_unchanged(kl_generation *g, const kl_request_state *q, kl_seq *out,
                                kl_error *err)
{
    int64_t length;
    if (kl_seq_length(g->e, q->r.seq, &length, err) == KL_OK && length == q->before)
        return kl_seq_fork(g->e, q->r.seq, out, err);
    return kl_fail(err, KL_ERR_VALUE,
                   "generate: request %lld: the sequence it continues has changed since",
                   (long long)q->id);
}

/* An empty sequence, or one that has read what others have of the prompt. */
static kl_status start_prompt(kl_generation *g, kl_request_state *q, kl_seq *out, kl_error *err)
{
    KL_TRY(kl_prefix_start(&g->e->prefix, &q->place, out, &q->n_cached, err));
    q->sched.fed = q->n_cached;
    g->stats.prompt_done += q->n_cached;
    return KL_OK;
}

/* A sequence for a request, with the pages it may come to need. */
static kl_status open_sequence(kl_generation *g, kl_request_state *q, kl_seq *seq,
                               kl_error *err)
{
    kl_error ignored;
    if (q->r.seq != 0)
        KL_TRY(fork_unchanged(g, q, seq, err));
    else
        KL_TRY(start_prompt(g, q, seq, err));
    const kl_status status = kl_cache_reserve(&g->e->cache, *seq, kl_request_longest(q), err);
    if (status != KL_OK) (void)kl_seq_release(g->e, *seq, &ignored);
    return status;
}

/* Out of the queue with a request that never ran. */
static void turn_away(kl_generation *g, const kl_error *err)
{
    kl_request_state *q = kl_generation_pop(g);
    kl_generation_fail(g, q, err);
    kl_request_free(q);
}

/* Whether a prompt that is being read will spare the first that waits a part of its own. */
static bool first_is_spared(const kl_generation *g)
{
    const kl_prefix_place *place = &g->first->place;
    for (int64_t i = 0; i < g->n_running; i++) {
        const kl_request_state *q = g->running[i];
        if (q->sched.phase == KL_SCHED_PROMPT &&
            kl_prefix_comes(&g->e->prefix, place, &q->place, q->sched.fed))
            return true;
    }
    return false;
}

bool kl_generation_first_fits(const kl_generation *g)
{
    const kl_cache *c = &g->e->cache;
    const int64_t places = g->e->plan.max_batch - g->n_running;
    kl_request_state *q = g->first;
    if (first_is_spared(g)) return false;
    if (q->r.seq == 0)
        q->sched.pages = kl_prefix_pages(&g->e->prefix, &q->place, kl_request_longest(q));
    return kl_sched_admits(&g->first->sched, kl_min_i64(kl_cache_free_seqs(c), places),
                           kl_cache_available(c));
}

/* Requests in their order, as long as sequences and pages last. One of no tokens ends here, with
 * an event that has no id. */
static void admit(kl_generation *g)
{
    while (g->first != NULL && g->queue_count < g->e->plan.max_batch) {
        kl_request_state *q = g->first;
        kl_error err;
        kl_seq seq;
        if (q->r.max_new_tokens == 0) {
            push_event(g, q, -1, KL_FINISH_LENGTH);
            kl_request_free(kl_generation_pop(g));
        } else if (!kl_generation_first_fits(g)) {
            return;
        } else if (open_sequence(g, q, &seq, &err) != KL_OK) {
            turn_away(g, &err);
        } else {
            kl_request_seat(g, kl_generation_pop(g), seq);
        }
    }
}

/* Nothing runs and nothing can be admitted: the first request waits for what others hold, who
 * may never give it back. */
static void turn_away_blocked(kl_generation *g)
{
    const kl_cache *c = &g->e->cache;
    kl_error err;
    kl_error_set(&err, KL_ERR_MEMORY,
                 "generate: request %lld needs a sequence and %lld pages, but other "
                 "sequences leave %lld and %lld",
                 (long long)g->first->id, (long long)g->first->sched.pages,
                 (long long)kl_cache_free_seqs(c), (long long)kl_cache_available(c));
    turn_away(g, &err);
}

/* ---- a step ---------------------------------------------------------------------------- */

/* Tokens that a running request's sequence must hold now: all but the last that was drawn. */
static int64_t held_by(const kl_request_state *q)
{
    return q->before + q->sched.fed - q->r.n_history + (q->n_new > 0 ? q->n_new - 1 : 0);
}

/* Whether a caller's sequence is what the request has made of it. A fork of it since costs a copy
 * of its last page, which was not promised. */
static kl_status check_in_place(kl_generation *g, const kl_request_state *q, kl_error *err)
{
    int64_t length;
    kl_error cause;
    if (kl_seq_length(g->e, q->seq, &length, &cause) != KL_OK || length != held_by(q))
        return kl_fail(err, KL_ERR_VALUE,
                       "generate: request %lld: the sequence it continues has changed since",
                       (long long)q->id);
    if (kl_cache_reserve(&g->e->cache, q->seq, kl_request_longest(q), &cause) == KL_OK)
        return KL_OK;
    return kl_fail(err, cause.status,
                   "generate: request %lld: the sequence it continues was forked since: %s",
                   (long long)q->id, cause.message);
}

/* A caller's sequence that was fed, released, broken or forked since would fail the whole step. */
static void end_changed(kl_generation *g)
{
    for (int64_t i = 0; i < g->n_running; i++) {
        kl_request_state *q = g->running[i];
        kl_error err;
        if (q->r.in_place && check_in_place(g, q, &err) != KL_OK)
            kl_generation_fail(g, q, &err);
    }
}

/* What a step has drawn; after guesses, as far as they were right. A request ends with the last
 * of its draws if at all: no guess is a stop token, or one more than it may have. */
static void take_draws(kl_generation *g, int64_t n_items)
{
    int64_t row = 0;
    for (int64_t k = 0; k < n_items; k++) {
        kl_request_state *q = g->running[g->items[k].request];
        const int64_t draws = kl_generation_draws(g, &g->items[k]);
        const int64_t taken = g->guessed ? g->taken[k] : draws;
        q->n_drafted += g->guessed ? draws - 1 : 0;
        for (int64_t i = 0; i < taken; i++) {
            q->n_accepted += i < taken - 1; /* had been guessed; the caller may stop at any */
            kl_generation_take_token(g, row + i);
        }
        row += draws;
    }
}

/* The step has run: prompts have moved on. */
static kl_status advance_prompts(kl_generation *g, int64_t n_items, kl_error *err)
{
    for (int64_t k = 0; k < n_items; k++) {
        kl_request_state *q = g->running[g->items[k].request];
        if (q->sched.phase != KL_SCHED_PROMPT) continue;
        q->sched.fed += g->items[k].count;
        g->stats.prompt_done += g->items[k].count;
        KL_TRY(kl_prefix_keep(&g->e->prefix, &q->place, q->seq, q->sched.fed, err));
    }
    return KL_OK;
}

/* Let the caller change the logits [n_rows, vocab], then draw from them. */
static kl_status process_and_sample(kl_generation *g, float *logits, int64_t n_rows,
                                    kl_logits_fn process, void *ctx, kl_error *err)
{
    const int64_t vocab = g->e->config.vocab_size;
    const kl_step step = kl_generation_sampling_step(g);
    for (int64_t row = 0; process != NULL && row < n_rows; row++) {
        const kl_request_state *q = g->of_row[row];
        if (!q->r.process) continue;
        if (process(ctx, q->id, q->ids, q->r.n_prompt + q->n_new, logits + row * vocab) != 0)
            return kl_fail(err, KL_ERR_CANCELLED, "generate: the logits processor stopped");
    }
    return kl_engine_sample(g->e, logits, n_rows, &step, err);
}

/* What ended a step ends those of its requests that have not ended in it; only the caller's own
 * wish to stop is told at once. */
static kl_status end_failed(kl_generation *g, int64_t n_items, const kl_error *err)
{
    for (int64_t k = 0; k < n_items; k++) {
        kl_request_state *q = g->running[g->items[k].request];
        if (q->sched.phase != KL_SCHED_DONE) kl_generation_fail(g, q, err);
    }
    return err->status == KL_ERR_CANCELLED ? KL_ERR_CANCELLED : KL_OK;
}

/* Requests that feed no prompt draw from the logits they brought. */
static kl_status draw_first(kl_generation *g, kl_logits_fn process, void *ctx, kl_error *err)
{
    for (int64_t i = 0; i < g->n_running; i++) {
        kl_request_state *q = g->running[i];
        if (q->sched.phase != KL_SCHED_PROMPT || q->sched.fed < q->sched.n_prompt) continue;
        kl_generation_make_row(g, q);
        if (process_and_sample(g, q->logits, 1, process, ctx, err) == KL_OK) {
            kl_generation_take_token(g, 0);
            continue;
        }
        g->items[0] = (kl_sched_item){i, 0, true};
        KL_TRY(end_failed(g, 1, err));
    }
    return KL_OK;
}

static kl_status run_items(kl_generation *g, int64_t n_items, kl_logits_fn process,
                           void *process_ctx, kl_poll_fn poll, void *poll_ctx, kl_error *err)
{
    const int64_t n_rows = kl_generation_make_rows(g, n_items);
    if (kl_generation_can_fly(g, n_items, n_rows))
        return kl_generation_fly(g, n_rows, poll, poll_ctx, err);
    kl_step step = kl_generation_sampling_step(g);
    step.feeds = g->feeds;
    step.n_feeds = n_items;
    step.rows = g->rows;
    step.n_rows = n_rows;
    step.poll = poll;
    step.poll_ctx = poll_ctx;
    if (process == NULL || !g->processed) {
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
    KL_TRY(advance_prompts(g, n_items, err));
    take_draws(g, n_items);
    return KL_OK;
}

/* Where a prompt is cut next, or 0. One that continues a sequence has no place among prefixes. */
static int64_t next_cut(const kl_generation *g, const kl_request_state *q)
{
    const int64_t start = q->r.n_history;
    const int64_t lead = start + kl_engine_lead(g->e, q->before, q->r.n_prompt - start);
    if (q->sched.fed < lead) return lead;
    return kl_prefix_cut(&g->e->prefix, &q->place, q->sched.fed);
}

/* Returns the number of items of the next step. */
static int64_t choose_items(kl_generation *g)
{
    for (int64_t i = 0; i < g->n_running; i++) {
        const kl_request_state *q = g->running[i];
        g->phases[i] = q->sched;
        g->phases[i].cut = next_cut(g, q);
    }
    const int64_t n_items = kl_sched_step(g->phases, g->n_running, g->e->plan.step_tokens,
                                          g->decode_first, g->items);
    g->decode_first = kl_sched_held_up(g->phases, g->n_running, g->items, n_items);
    return n_items;
}

/* The step of these items; where one is under way, that. */
static kl_status run_step(kl_generation *g, int64_t n_items, kl_logits_fn process,
                          void *process_ctx, kl_poll_fn poll, void *poll_ctx, kl_error *err)
{
    const int64_t done_before = g->stats.prompt_done;
    const double start = now_s();
    const kl_status status =
        g->n_flying > 0 ? kl_generation_fly_on(g, poll, poll_ctx, err)
                        : run_items(g, n_items, process, process_ctx, poll, poll_ctx, err);
    double *const total =
        g->stats.prompt_done > done_before ? &g->stats.prefill_s : &g->stats.decode_s;
    *total += now_s() - start;
    return status == KL_OK ? KL_OK : end_failed(g, n_items, err);
}

/* Events that need no step are told at once, but not twice in turn: those who submit one such
 * request after the other would hold up all that run. */
static bool tells_first(kl_generation *g)
{
    if (g->queue_count == 0 || g->step_due) return false;
    g->step_due = true;
    return true;
}

/* One step of whatever can run, or events of what cannot; *ran false when nothing is left. */
static kl_status run_one(kl_generation *g, kl_logits_fn process, void *process_ctx,
                         kl_poll_fn poll, void *poll_ctx, bool *ran, kl_error *err)
{
    *ran = true;
    kl_generation_sweep(g);
    if (g->n_flying > 0) {
        g->step_due = false;
        return run_step(g, 0, process, process_ctx, poll, poll_ctx, err);
    }
    admit(g);
    if (tells_first(g)) return KL_OK;
    end_changed(g);
    KL_TRY(draw_first(g, process, process_ctx, err));
    if (tells_first(g)) return KL_OK;
    g->step_due = false;
    const int64_t n_items = choose_items(g);
    kl_generation_guess(g, n_items, process != NULL);
    if (n_items > 0) return run_step(g, n_items, process, process_ctx, poll, poll_ctx, err);
    if (g->queue_count > 0) return KL_OK;
    *ran = g->first != NULL;
    if (*ran) turn_away_blocked(g);
    return KL_OK;
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
        const kl_status status = run_one(g, process, process_ctx, poll, poll_ctx, &ran, err);
        if (status != KL_OK) return status;
    }
    return KL_OK;
}

bool kl_generation_done(const kl_generation *g)
{
    for (int64_t i = 0; i < g->n_running; i++)
        if (g->running[i]->sched.phase != KL_SCHED_DONE) return false;
    return g->first == NULL && g->queue_count == 0;
}

void kl_generation_get_stats(const kl_generation *g, kl_generation_stats *out)
{
    *out = g->stats;
    out->running = out->waiting = 0;
    for (int64_t i = 0; i < g->n_running; i++)
        out->running += g->running[i]->sched.phase != KL_SCHED_DONE;
    out->waiting = g->n_waiting;
}
