/*
 * generate_rows.c -- a step of a generation laid out: what each request feeds, its guesses of next
 * tokens, and how the draws after them are made.
 */
#include "model/generation.h"

#include "base/memory.h"
#include "model/plan.h"

#include <string.h>

/* ---- rows ------------------------------------------------------------------------------ */

static kl_feed feed_of(const kl_request_state *q, int64_t count)
{
    const bool decode = q->sched.phase == KL_SCHED_DECODE;
    const int64_t first = decode ? q->r.n_prompt + q->n_new - 1 : q->sched.fed;
    return (kl_feed){q->seq, q->ids + first, count};
}

static void clear_rows(kl_generation *g)
{
    g->top = 0;
    g->penalties = g->processed = false;
}

/* How row `row` draws, for a request, after `ahead` guesses. */
static void fill_row(kl_generation *g, int64_t row, kl_request_state *q, int64_t ahead)
{
    g->of_row[row] = q;
    g->sampling[row] = q->r.sampling;
    g->sampling[row].position += (uint64_t)(q->n_new + ahead);
    g->penalties = g->penalties || q->seen != NULL;
    g->processed = g->processed || q->r.process;
    if (q->r.top > g->top) g->top = q->r.top;
}

/* Guesses add nothing: they are tokens of the text. */
static void fill_seen(kl_generation *g, int64_t n_rows)
{
    const size_t bytes = (size_t)g->words * sizeof *g->seen;
    for (int64_t row = 0; g->penalties && row < n_rows; row++) {
        int32_t *seen = g->seen + row * g->words;
        const kl_request_state *q = g->of_row[row];
        if (q->seen != NULL)
            memcpy(seen, q->seen, bytes);
        else
            memset(seen, 0, bytes);
    }
}

int64_t kl_generation_draws(const kl_generation *g, const kl_sched_item *item)
{
    const bool decode = g->running[item->request]->sched.phase == KL_SCHED_DECODE;
    return decode ? item->count : item->samples;
}

int64_t kl_generation_make_rows(kl_generation *g, int64_t n_items)
{
    int64_t n_rows = 0, end = 0;
    clear_rows(g);
    for (int64_t k = 0; k < n_items; k++) {
        const kl_sched_item *item = &g->items[k];
        kl_request_state *q = g->running[item->request];
        const int64_t draws = kl_generation_draws(g, item);
        g->feeds[k] = feed_of(q, item->count);
        end += item->count;
        for (int64_t i = 0; i < draws; i++, n_rows++) {
            g->rows[n_rows] = (int32_t)(end - draws + i);
            fill_row(g, n_rows, q, i);
        }
    }
    fill_seen(g, n_rows);
    return n_rows;
}

void kl_generation_make_row(kl_generation *g, kl_request_state *q)
{
    g->guessed = false;
    clear_rows(g);
    fill_row(g, 0, q, 0);
    fill_seen(g, 1);
}

kl_step kl_generation_sampling_step(const kl_generation *g)
{
    return (kl_step){.sampling = g->sampling,
                     .seen = g->penalties ? g->seen : NULL,
                     .taken = g->guessed ? g->taken : NULL,
                     .ids = g->ids,
                     .id_logprobs = g->logprobs,
                     .top = g->top,
                     .top_ids = g->top_ids,
                     .top_logprobs = g->top_logprobs};
}

/* ---- guesses --------------------------------------------------------------------------- */

bool kl_request_stops_at(const kl_request_state *q, int32_t id)
{
    for (int64_t i = 0; i < q->r.n_stop_ids; i++)
        if (q->stop_ids[i] == id) return true;
    return false;
}

/* Guesses of the tokens after the last one of a request, behind it in its ids: no stop token, for
 * what follows that is not drawn, and one less than it may still have. */
static int64_t guess(kl_request_state *q)
{
    const int64_t n = q->r.n_prompt + q->n_new;
    const int64_t most = kl_min_i64(q->r.guesses, q->r.max_new_tokens - q->n_new - 1);
    const int64_t found = q->r.guesses == 0 ? 0 : kl_draft_guess(&q->draft, q->ids, n, most);
    for (int64_t i = 0; i < found; i++)
        if (kl_request_stops_at(q, q->ids[n + i])) return i;
    return found;
}

void kl_generation_guess(kl_generation *g, int64_t n_items, bool processed)
{
    g->guessed = false;
    for (int64_t k = 0; k < n_items; k++) {
        const kl_request_state *q = g->running[g->items[k].request];
        if (q->sched.phase != KL_SCHED_DECODE || (processed && q->r.process)) return;
    }
    for (int64_t k = 0; k < n_items; k++)
        g->guesses[k] = guess(g->running[g->items[k].request]);
    const int64_t most = kl_plan_guessing(&g->e->plan);
    g->guessed = kl_sched_add_guesses(g->guesses, most, g->items, n_items) > 0;
}
