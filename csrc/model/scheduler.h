/*
 * scheduler.h -- which requests run in the next step: a pure function of queues.
 *
 * Requests are admitted in their order (none overtakes), each when a sequence is free and the
 * cache can promise the pages of its longest outcome, so that an admitted request always ends.
 * A step feeds one token for each request that is generating and gives the rest of its tokens
 * to prompts. Nobody waits for ever:
 *
 *   generating  every request gets a token in each step, save where a step is too small for all
 *               of them and a piece of a prompt: then prompts get one step of two, and those
 *               generating the other, the oldest first
 *   prompts     the oldest gets three quarters of what prompts have in a step, or all of it if
 *               the others need less; those go shortest first, so that a question does not wait
 *               for the book that was fed before it
 *
 * Prompts are cut only at multiples of `unit`, whatever else is in the step: where a prompt is
 * cut decides the order of its arithmetic, and results must not depend on the company. These are
 * no borders of pages where a prompt goes on from the middle of one: kl_sched_lead().
 */
#ifndef KL_MODEL_SCHEDULER_H
#define KL_MODEL_SCHEDULER_H

#include <stdbool.h>
#include <stdint.h>

typedef enum {
    KL_SCHED_WAITING, /* no sequence yet          */
    KL_SCHED_PROMPT,  /* has tokens to be fed yet */
    KL_SCHED_DECODE,  /* one token to be fed      */
    KL_SCHED_DONE,
} kl_sched_phase;

typedef struct {
    kl_sched_phase phase;
    int64_t n_prompt, fed; /* fed: tokens of the prompt that were fed */
    int64_t pages;         /* of its longest outcome                  */
    int64_t cut;           /* where its prompt is cut next; 0: anywhere         */
} kl_sched_request;

/* `count` tokens of a request; `samples`: the last of them decides the next token, and of those
 * with guesses each. */
typedef struct {
    int64_t request, count;
    bool samples;
} kl_sched_item;

/* The cut of prompts: pieces of a page where a step holds one. */
int64_t kl_sched_unit(int64_t step_tokens);

/* What a prompt of n tokens has read by itself first where it goes on at position `before`: the
 * rest of that page, for only from its border on no cut shows. 0: nothing, at a border, or where
 * nobody cuts it. */
int64_t kl_sched_lead(int64_t before, int64_t n);

/* Whether the first request that waits can be admitted with that many sequences and pages. */
bool kl_sched_admits(const kl_sched_request *first, int64_t free_seqs, int64_t free_pages);

/* Fill the next step from requests in the order of their admission; items has room for each that
 * is not waiting or done. decode_first: the step before held up one that is generating. Returns
 * the number of items, 0 when nothing runs. */
int64_t kl_sched_step(const kl_sched_request *requests, int64_t n, int64_t step_tokens,
                      bool decode_first, kl_sched_item *items);

/* Add guesses of next tokens to the items of a step that feeds no prompt, as long as it has `most`
 * tokens at most: item k would take guesses[k], and gets them or its share of the room. Returns
 * their number. */
int64_t kl_sched_add_guesses(const int64_t *guesses, int64_t most, kl_sched_item *items,
                             int64_t n_items);

/* Whether such a step feeds a prompt and leaves out a request that is generating. */
bool kl_sched_held_up(const kl_sched_request *requests, int64_t n, const kl_sched_item *items,
                      int64_t n_items);

#endif
