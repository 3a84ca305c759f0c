/*
 * generation.h -- what a generation holds; for the files that implement it.
 */
#ifndef KL_MODEL_GENERATION_H
#define KL_MODEL_GENERATION_H

#include "model/engine_struct.h"
#include "model/scheduler.h"

typedef struct {
    kl_request r; /* its pointers lead into ids and stop_ids below */
    int32_t *ids; /* prompt, then new tokens: [n_prompt + max_new_tokens] */
    int32_t *stop_ids;
    int32_t *seen; /* bit set [words], or NULL without a repetition penalty */
    int64_t n_new;
    float *logits;  /* what the first draw is from, where nothing is fed before it; or NULL */
    int64_t before; /* tokens of the sequence that is continued */
    kl_seq seq;     /* 0: none */
    bool failed;    /* not finite, and not reported yet */
} kl_request_state;

struct kl_generation {
    kl_engine *e;
    int64_t n_requests, words;
    kl_request_state *requests;
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

/* A request ends: its sequence goes back, or what was promised to the caller's. */
void kl_generation_end(kl_generation *g, int64_t request);

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
