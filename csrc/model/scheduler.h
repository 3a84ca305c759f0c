/*
 * scheduler.h -- which requests run in the next step: a pure function of queues.
 *
 * Requests are admitted in their order (none overtakes), each when a sequence is free and the
 * cache can promise the pages of its longest outcome, so that an admitted request always ends.
 * A step feeds one token for each request that is generating and gives the rest of its tokens
 * to prompts.
 *
 * Prompts are cut only at multiples of `unit`, whatever else is in the step: where a prompt is
 * cut decides the order of its arithmetic, and results must not depend on the company.
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
} kl_sched_request;

/* `count` tokens of a request; `samples`: the last of them decides the next token. */
typedef struct {
    int64_t request, count;
    bool samples;
} kl_sched_item;

/* The cut of prompts: pieces of a page where a step holds one. */
int64_t kl_sched_unit(int64_t step_tokens);

/* The next request to admit with that many sequences and pages free, or -1. */
int64_t kl_sched_admit(const kl_sched_request *requests, int64_t n, int64_t free_seqs,
                       int64_t free_pages);

/* Fill the next step; items has room for every request that is not waiting or done. Returns
 * their number, 0 when nothing runs. */
int64_t kl_sched_step(const kl_sched_request *requests, int64_t n, int64_t step_tokens,
                      kl_sched_item *items);

#endif
