/*
 * generation.h -- what a generation holds; for the files that implement it.
 */
#ifndef KL_MODEL_GENERATION_H
#define KL_MODEL_GENERATION_H

#include "model/draft.h"
#include "model/engine_struct.h"
#include "model/scheduler.h"

typedef struct kl_request_state {
    struct kl_request_state *next; /* behind this one in the queue */
    int64_t id;
    kl_request r; /* its pointers lead into ids and stop_ids below */
    kl_sched_request sched;
    int32_t *ids; /* prompt, then new tokens, then guesses: [n_prompt + max_new_tokens] */
    int32_t *stop_ids;
    int32_t *seen; /* bit set [words], or NULL without a repetition penalty */
    int64_t n_new;
    float *logits;  /* what the first draw is from, where nothing is fed before it; or NULL */
    int64_t before; /* tokens of the sequence that is continued */
    kl_seq seq;     /* 0: none */
    kl_prefix_place place;
    int64_t n_cached; /* tokens of the prompt that others had read */
    kl_draft draft;   /* of ids, where r.guesses > 0 */
    int64_t n_drafted, n_accepted;
} kl_request_state;

struct kl_generation {
    kl_engine *e;
    int64_t next_id, words;
    int64_t max_rows; /* that a step may draw from: kl_plan_draws() */

    kl_request_state *first, *last; /* the queue: those that wait for a sequence */
    int64_t n_waiting;
    /* Those that have one, in the order of their admission: [max_batch], for each of them holds
     * another sequence. One that ends in a step stays, DONE, until the step is over. */
    kl_request_state **running;
    int64_t n_running;

    kl_sched_request *phases; /* [max_batch], of running, for the scheduler */
    kl_sched_item *items;
    bool decode_first; /* see kl_sched_step() */
    bool step_due;     /* what was told last came from no step */

    /* [2 * max_batch + max_rows]: of admissions, of draws before a step, of a step. */
    kl_event *queue;
    int64_t queue_first, queue_count;
    kl_generation_stats stats;

    /* Arrays of a step: of max_batch feeds, and of max_rows draws. */
    kl_feed *feeds;
    int64_t *guesses, *taken; /* of a feed's tokens: those that may be guesses; right ones */
    kl_sampling *sampling;
    int32_t *rows, *ids;
    float *logprobs;
    kl_request_state **of_row; /* the request of a row; NULL: it is over, and the step is not */
    float *logits;             /* [max_batch, vocab], for a processor; host memory of be */

    /* Taken when a request first asks for them: [max_rows, words] and [max_rows, max_top]. */
    int32_t *seen, *top_ids;
    float *top_logprobs;
    int max_top;

    /* What the rows of this step need. */
    int top;
    bool penalties, processed;
    bool guessed; /* some tokens of this step are guesses */

    int64_t n_flying; /* rows of the step under way (generate_ahead.c); 0: none is */
};

/* The first that waits leaves the queue. */
kl_request_state *kl_generation_pop(kl_generation *g);

/* A request with its sequence, and the pages promised to that, runs from now on. */
void kl_request_seat(kl_generation *g, kl_request_state *q, kl_seq seq);

/* A request ends: its sequence goes back, or what was promised to the caller's. It is DONE, and
 * its memory goes with the next kl_generation_sweep(), or now where it was never running. */
void kl_request_end(kl_generation *g, kl_request_state *q);
void kl_request_free(kl_request_state *q);
void kl_generation_sweep(kl_generation *g);

/* Guess what the items of the next step may be followed by, and give them the step's room. Guesses
 * cost a prompt beside them its place, and a processor is not asked about what may not come: a step
 * with either has none. */
void kl_generation_guess(kl_generation *g, int64_t n_items, bool processed);
/* Draws of an item: after its last token, or after a certain one and each guess. */
int64_t kl_generation_draws(const kl_generation *g, const kl_sched_item *item);
/* The feeds and rows of a step from its items; returns the number of rows. */
int64_t kl_generation_make_rows(kl_generation *g, int64_t n_items);
/* The only row of a draw without a step. */
void kl_generation_make_row(kl_generation *g, kl_request_state *q);
/* Where the draws of a step go, and how they are made. */
kl_step kl_generation_sampling_step(const kl_generation *g);
/* A drawn token: append it, report it, and end the request if it is the last. */
void kl_generation_take_token(kl_generation *g, int64_t row);
/* A request ends by what befell it. */
void kl_generation_fail(kl_generation *g, kl_request_state *q, const kl_error *err);
/* Whether the first that waits can be admitted now. */
bool kl_generation_first_fits(const kl_generation *g);

/* Whether the step that is laid out, of n_items feeds and n_rows draws, can run with the next one
 * behind it. */
bool kl_generation_can_fly(kl_generation *g, int64_t n_items, int64_t n_rows);
/* Run it so: the next one is under way when its tokens are taken. */
kl_status kl_generation_fly(kl_generation *g, int64_t n_rows, kl_poll_fn poll, void *poll_ctx,
                            kl_error *err);
/* Take the tokens of the step under way, with the next one behind it where that may be. If it
 * fails, those that were in it have ended. */
kl_status kl_generation_fly_on(kl_generation *g, kl_poll_fn poll, void *poll_ctx,
                               kl_error *err);
/* A request's memory goes. */
void kl_generation_forget(kl_generation *g, const kl_request_state *q);
/* Where all whose step is under way are over, nobody waits for it. */
void kl_generation_settle(kl_generation *g);

/* Whether a token ends a request. */
bool kl_request_stops_at(const kl_request_state *q, int32_t id);

static inline void kl_mark_seen(int32_t *seen, int32_t id)
{
    if (seen != NULL) seen[id / 32] = (int32_t)((uint32_t)seen[id / 32] | 1u << (id % 32));
}

/* Tokens that a request's sequence may come to hold. */
static inline int64_t kl_request_longest(const kl_request_state *q)
{
    return q->before + q->r.n_prompt - q->r.n_history + q->r.max_new_tokens;
}

static inline size_t kl_generation_logits_bytes(const kl_generation *g)
{
    return (size_t)(g->e->plan.max_batch * g->e->config.vocab_size) * sizeof *g->logits;
}

#endif
