/*
 * generate_ahead.c -- token steps of a generation that run while the host looks at those before.
 *
 * What a step draws, the next one feeds: the device needs nobody for that. So the next step is
 * enqueued before the tokens of the one under way are known, and the host is never what the device
 * waits for. A request that a token ends has then been fed this token as well: its sequence is its
 * own and goes, its row of the step that is ahead is passed over, and the next step is made anew,
 * with those that are left or have come.
 *
 * Nothing is ahead where a step depends on more than its inputs and the draws before it: beside
 * prompts, guesses, penalties and processors. Nor where a sequence stays the caller's, which must
 * not have read what ends a request, nor where somebody who waits would be admitted.
 */
#include "model/generation.h"

/* Whether the token that a request waits for cannot be its last by number. */
static bool goes_on(const kl_request_state *q)
{
    return q->n_new + 1 < q->r.max_new_tokens;
}

static bool anybody_waits(kl_generation *g)
{
    return g->first != NULL && (g->first->r.max_new_tokens == 0 || kl_generation_first_fits(g));
}

/* Whether the step behind the one of these rows is theirs again, if no token ends a request. */
static bool next_is_theirs(kl_generation *g, int64_t n_rows)
{
    if (g->n_running != n_rows || anybody_waits(g)) return false;
    for (int64_t row = 0; row < n_rows; row++)
        if (g->of_row[row] == NULL || !goes_on(g->of_row[row])) return false;
    return true;
}

bool kl_generation_can_fly(kl_generation *g, int64_t n_items, int64_t n_rows)
{
    const kl_engine *e = g->e;
    if (e->flight_bytes == 0 || e->n_flights > 0 || n_rows != n_items) return false;
    if (g->guessed || g->penalties || g->processed) return false;
    for (int64_t row = 0; row < n_rows; row++) {
        const kl_request_state *q = g->of_row[row];
        if (q->sched.phase != KL_SCHED_DECODE || q->r.in_place || q->r.guesses > 0)
            return false;
    }
    return next_is_theirs(g, n_rows);
}

static kl_status launch(kl_generation *g, int64_t n_rows, bool follows, kl_poll_fn poll,
                        void *poll_ctx, kl_error *err)
{
    for (int64_t row = 0; follows && row < n_rows; row++) {
        g->feeds[row].tokens = NULL;
        g->sampling[row].position++;
    }
    kl_step step = kl_generation_sampling_step(g);
    step.feeds = g->feeds;
    step.rows = g->rows;
    step.n_feeds = step.n_rows = n_rows;
    step.poll = poll;
    step.poll_ctx = poll_ctx;
    return kl_engine_launch(g->e, &step, follows, err);
}

static bool is_live(const kl_request_state *q)
{
    return q != NULL && q->sched.phase != KL_SCHED_DONE;
}

static void take_rows(kl_generation *g, int64_t n_rows)
{
    for (int64_t row = 0; row < n_rows; row++)
        if (is_live(g->of_row[row])) kl_generation_take_token(g, row);
}

static void fail_rows(kl_generation *g, int64_t n_rows, const kl_error *err)
{
    for (int64_t row = 0; row < n_rows; row++)
        if (is_live(g->of_row[row])) kl_generation_fail(g, g->of_row[row], err);
}

static void ground(kl_generation *g)
{
    if (g->n_flying > 0) kl_engine_abandon(g->e);
    g->n_flying = 0;
}

/* The next one is enqueued, then the one before is waited for: also where that went wrong, for it
 * has done nothing to the one before. */
kl_status kl_generation_fly_on(kl_generation *g, kl_poll_fn poll, void *poll_ctx, kl_error *err)
{
    const int64_t n_rows = g->n_flying;
    const kl_step step = kl_generation_sampling_step(g);
    kl_error late;
    kl_status status = KL_OK;
    const bool more = kl_engine_can_follow(g->e) && next_is_theirs(g, n_rows);
    if (more) status = launch(g, n_rows, true, poll, poll_ctx, err);
    if (!more || status != KL_OK) g->n_flying = 0;
    const kl_status landed = kl_engine_land(g->e, &step, status == KL_OK ? err : &late);
    if (landed == KL_OK) take_rows(g, n_rows);
    if (status == KL_OK) status = landed;
    if (status != KL_OK) fail_rows(g, n_rows, err);
    kl_generation_settle(g);
    return status;
}

kl_status kl_generation_fly(kl_generation *g, int64_t n_rows, kl_poll_fn poll, void *poll_ctx,
                            kl_error *err)
{
    KL_TRY(launch(g, n_rows, false, poll, poll_ctx, err));
    g->n_flying = n_rows;
    return kl_generation_fly_on(g, poll, poll_ctx, err);
}

void kl_generation_forget(kl_generation *g, const kl_request_state *q)
{
    for (int64_t row = 0; row < g->n_flying; row++)
        if (g->of_row[row] == q) g->of_row[row] = NULL;
}

void kl_generation_settle(kl_generation *g)
{
    for (int64_t row = 0; row < g->n_flying; row++)
        if (is_live(g->of_row[row])) return;
    ground(g);
}
