/*
 * score.h -- log-probabilities of many continuations; what their contexts share is read once.
 */
#ifndef KL_MODEL_SCORE_H
#define KL_MODEL_SCORE_H

#include "model/engine.h"

typedef struct {
    const int32_t *context; /* several may point to the same one */
    int64_t n_context;      /* >= 1 */
    const int32_t *ids;     /* the continuation */
    int64_t n;              /* >= 1 */
    float *logprobs;        /* [n], of each id after all before it */
    uint8_t *greedy;        /* [n], whether it was the likeliest   */
} kl_continuation;

typedef struct {
    kl_seq seq; /* what all of them go on from, and which stays as it is; 0: nothing */
    const kl_continuation *scores;
    int64_t n;
    kl_progress_fn progress; /* tokens of contexts and continuations done, shared or not */
    kl_poll_fn poll;
    void *ctx;
} kl_scoring;

/* Every result has the bits of its own pass over context and continuation, as far as the backend
 * promises them for pieces and company. KL_ERR_NUMERICAL names the first that is not finite.
 * Takes sequences and pages as they are free, and gives all back whatever happens. */
kl_status kl_engine_score(kl_engine *e, const kl_scoring *scores, kl_error *err);

#endif
