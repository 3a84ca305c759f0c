/*
 * prompt.h -- a whole prompt of any length, cut into steps.
 *
 * Cuts are multiples of plan.step_tokens from the first new token. Where that is a multiple of
 * KL_PAGE_TOKENS and the sequence's length is too, the results have the bits of one uncut step.
 */
#ifndef KL_MODEL_PROMPT_H
#define KL_MODEL_PROMPT_H

#include "model/engine.h"

/* What is wanted of the n tokens; NULL for what is not. Memory is the caller's and grows with
 * what is asked for, never with n * vocab unless all logits are. */
typedef struct {
    kl_seq seq; /* 0: a fresh one, released at the end */
    const int32_t *ids;
    int64_t n; /* >= 1 */

    float *last_logits; /* [vocab], after the last token */
    float *logits;      /* [n, vocab]                    */

    const int32_t *targets; /* [n]; -1: none              */
    float *logprobs;        /* [n], NaN without a target  */
    uint8_t *greedy;        /* [n]                        */
    int top;
    int32_t *top_ids; /* [n, top] */
    float *top_logprobs;

    const int64_t *layers; /* [n_layers] residual streams */
    float *const *hidden;  /* [n_layers] of [n, hidden]   */
    int64_t n_layers;

    kl_progress_fn progress; /* tokens done */
    kl_poll_fn poll;
    void *ctx;
} kl_prompt;

/* Every argument is checked before a state changes. A sequence that a failed step leaves
 * broken stays the caller's to release, unless it was a fresh one. KL_ERR_NUMERICAL for a
 * log-probability that is not finite: then the sequence has read up to there. */
kl_status kl_engine_prompt(kl_engine *e, const kl_prompt *prompt, kl_error *err);

#endif
