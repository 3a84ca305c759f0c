/*
 * prompt.c -- see prompt.h.
 */
#include "model/prompt.h"

#include "base/memory.h"
#include "model/engine_struct.h"

#include <math.h>
#include <string.h>

/* Room for what a step of at most T tokens wants, in one host block. */
typedef struct {
    void *block;
    int32_t *rows, *targets; /* [T]      */
    float *logprobs;         /* [T]      */
    uint8_t *greedy;         /* [T]      */
    int32_t *top_ids;        /* [T, top] */
    float *top_logprobs;
    kl_capture *captures; /* [n_layers] */
} buffers;

static void layout(buffers *b, const kl_prompt *p, int64_t T, kl_arena *a)
{
    const size_t n = (size_t)T, top = (size_t)p->top;
    b->rows = kl_arena_take(a, n * sizeof *b->rows);
    b->targets = kl_arena_take(a, n * sizeof *b->targets);
    b->logprobs = kl_arena_take(a, n * sizeof *b->logprobs);
    b->greedy = kl_arena_take(a, n * sizeof *b->greedy);
    b->top_ids = kl_arena_take(a, n * top * sizeof *b->top_ids);
    b->top_logprobs = kl_arena_take(a, n * top * sizeof *b->top_logprobs);
    b->captures = kl_arena_take(a, (size_t)p->n_layers * sizeof *b->captures);
}

static kl_status make_buffers(buffers *b, const kl_prompt *p, int64_t T, kl_error *err)
{
    kl_arena a;
    kl_arena_init(&a, NULL, 0);
    layout(b, p, T, &a);
    const size_t bytes = a.used;
    b->block = kl_aligned_alloc(bytes);
    if (b->block == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "prompt: no memory for %zu bytes of results", bytes);
    kl_arena_init(&a, b->block, bytes);
    layout(b, p, T, &a);
    return KL_OK;
}

/* The rows of tokens [first, first + n) that anything is wanted of. A token without a target
 * costs no product with the head, unless alternatives are wanted of every token. */
static int64_t choose_rows(const kl_prompt *p, buffers *b, int64_t first, int64_t n)
{
    int64_t n_rows = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t t = first + i;
        const bool last = p->last_logits != NULL && t == p->n - 1;
        const bool scored = p->targets != NULL && (p->targets[t] >= 0 || p->top > 0);
        if (p->logits == NULL && !last && !scored) continue;
        b->rows[n_rows] = (int32_t)i;
        b->targets[n_rows++] = p->targets == NULL ? -1 : p->targets[t];
    }
    return n_rows;
}

/* Put the log-probabilities of the step's rows where their tokens are; those of targets must be
 * finite, which they are when all logits are. */
static kl_status scatter(const kl_prompt *p, const buffers *b, int64_t first, int64_t n,
                         int64_t n_rows, kl_error *err)
{
    for (int64_t i = first; i < first + n; i++) {
        p->logprobs[i] = NAN;
        p->greedy[i] = 0;
    }
    for (int64_t r = 0; r < n_rows; r++) {
        const int64_t t = first + b->rows[r];
        p->logprobs[t] = b->logprobs[r];
        p->greedy[t] = b->greedy[r];
        if (b->targets[r] >= 0 && !isfinite(b->logprobs[r]))
            return kl_fail(err, KL_ERR_NUMERICAL,
                           "prompt: log-probability after token %lld must be finite, got %g",
                           (long long)t, (double)b->logprobs[r]);
        if (p->top == 0) continue;
        memcpy(p->top_ids + t * p->top, b->top_ids + r * p->top,
               (size_t)p->top * sizeof *p->top_ids);
        memcpy(p->top_logprobs + t * p->top, b->top_logprobs + r * p->top,
               (size_t)p->top * sizeof *p->top_logprobs);
    }
    return KL_OK;
}

static kl_status run_piece(kl_engine *e, const kl_prompt *p, buffers *b, kl_seq seq,
                           int64_t first, int64_t n, kl_error *err)
{
    const kl_config *c = kl_engine_config(e);
    const kl_feed feed = {seq, p->ids + first, n};
    for (int64_t i = 0; i < p->n_layers; i++)
        b->captures[i] = (kl_capture){p->layers[i], p->hidden[i] + first * c->hidden_size};

    kl_step s = {.feeds = &feed,
                 .n_feeds = 1,
                 .captures = b->captures,
                 .n_captures = p->n_layers,
                 .rows = b->rows,
                 .n_rows = choose_rows(p, b, first, n),
                 .poll = p->poll,
                 .poll_ctx = p->ctx};
    if (p->logits != NULL)
        s.logits = p->logits + first * c->vocab_size;
    else if (first + n == p->n)
        s.logits = p->last_logits;
    if (p->targets != NULL && s.n_rows > 0) {
        s.targets = b->targets;
        s.logprobs = b->logprobs;
        s.greedy = b->greedy;
        s.top = p->top;
        s.top_ids = b->top_ids;
        s.top_logprobs = b->top_logprobs;
    }
    KL_TRY(kl_engine_step(e, &s, err));
    return p->targets == NULL ? KL_OK : scatter(p, b, first, n, s.n_rows, err);
}

static kl_status run_pieces(kl_engine *e, const kl_prompt *p, buffers *b, kl_seq seq,
                            kl_error *err)
{
    const int64_t step = kl_engine_plan(e)->step_tokens;
    int64_t before, n;
    KL_TRY(kl_seq_length(e, seq, &before, err));
    const int64_t lead = kl_engine_lead(e, before, p->n);
    for (int64_t first = 0; first < p->n; first += n) {
        n = kl_min_i64(first < lead ? lead - first : p->n - first, step);
        KL_TRY(run_piece(e, p, b, seq, first, n, err));
        if (p->progress != NULL) p->progress(p->ctx, (uint64_t)(first + n), (uint64_t)p->n);
    }
    return KL_OK;
}

/* What later steps would refuse, before the first one runs. */
static kl_status check_prompt(const kl_engine *e, const kl_prompt *p, kl_error *err)
{
    const kl_config *c = kl_engine_config(e);
    int64_t length = 0, slot;
    KL_TRY(kl_engine_check_loaded(e, err));
    if (p->n < 1)
        return kl_fail(err, KL_ERR_VALUE, "prompt: must have a token or more, got none");
    if (p->seq != 0) {
        KL_TRY(kl_cache_find(&e->cache, p->seq, false, &slot, err));
        length = e->cache.seqs[slot].length;
        KL_TRY(kl_cache_check_growth(&e->cache, &slot, &p->n, 1, err));
    }
    if (p->n > e->plan.max_context - length)
        return kl_fail(err, KL_ERR_VALUE,
                       "prompt: %lld tokens must be at most %lld (max_context)",
                       (long long)p->n, (long long)e->plan.max_context);
    for (int64_t i = 0; i < p->n_layers; i++)
        if (p->layers[i] < 0 || p->layers[i] >= c->n_layers)
            return kl_fail(err, KL_ERR_VALUE, "prompt: layer must be in [0, %lld), got %lld",
                           (long long)c->n_layers, (long long)p->layers[i]);
    if (p->targets != NULL && (p->top < 0 || p->top > KL_MAX_TOP || p->top > c->vocab_size))
        return kl_fail(err, KL_ERR_VALUE, "prompt: top must be in [0, %lld], got %d",
                       (long long)kl_min_i64(c->vocab_size, KL_MAX_TOP), p->top);
    for (int64_t i = 0; p->targets != NULL && i < p->n; i++)
        if (p->targets[i] < -1 || p->targets[i] >= c->vocab_size)
            return kl_fail(err, KL_ERR_VALUE,
                           "prompt: target %d at position %lld must be in [-1, %lld)",
                           p->targets[i], (long long)i, (long long)c->vocab_size);
    return kl_check_ids("prompt", p->ids, p->n, c->vocab_size, err);
}

kl_status kl_engine_prompt(kl_engine *e, const kl_prompt *p, kl_error *err)
{
    const int64_t step = kl_engine_plan(e)->step_tokens;
    buffers b = {0};
    kl_seq seq = p->seq;
    KL_TRY(check_prompt(e, p, err));
    kl_status status = make_buffers(&b, p, kl_min_i64(p->n, step), err);
    if (status == KL_OK && seq == 0) status = kl_seq_new(e, &seq, err);
    if (status == KL_OK) status = run_pieces(e, p, &b, seq, err);
    if (p->seq == 0 && seq != 0) {
        kl_error ignored; /* the sequence is alive, so releasing it cannot fail */
        (void)kl_seq_release(e, seq, &ignored);
    }
    kl_free(b.block);
    return status;
}
