/*
 * score.c -- see score.h.
 *
 * A walk of the tree of what passes share. A node is a sequence that has read what a group of
 * passes begins with; each pass runs on a fork of the deepest node above it, and so does each node
 * below. Forks wait until no sequence or page is free, or until nodes are needed, and are then
 * read together, in steps as full as they go. What begins with nothing begins with what other calls
 * have read (prefix.h).
 */
#include "model/score.h"

#include "base/arena.h"
#include "base/memory.h"
#include "model/engine_struct.h"
#include "model/scheduler.h"
#include "model/score_tree.h"

#include <math.h>

/* A sequence that is to read tokens [fed, end) of passes [lo, hi): several passes share them. */
typedef struct {
    kl_seq seq;
    int64_t lo, hi, fed, end;
    kl_prefix_place place; /* of its contexts, where it begins with nothing else */
} job;

typedef struct {
    float *logprob;
    uint8_t *greedy;
    const kl_continuation *score;
} result;

typedef struct {
    kl_engine *e;
    const kl_scoring *p;
    kl_score_tree tree;
    int64_t before; /* tokens of p->seq */
    uint64_t done, total;

    job *jobs, *nodes; /* [max_batch]: what waits, and what the walk stands on */
    int64_t n_jobs, n_nodes;

    /* A step. */
    kl_feed *feeds;  /* [max_batch] */
    job **fed;       /* [max_batch], whose each is */
    int32_t *tokens; /* [step_tokens], as all below */
    int32_t *rows, *targets;
    float *logprobs;
    uint8_t *greedy;
    result *results;
    int64_t n_feeds, n_tokens, n_rows;
    void *block;
} scorer;

/* ---- memory ---------------------------------------------------------------------------- */

static void layout(scorer *r, kl_arena *a)
{
    const size_t N = (size_t)r->e->plan.max_batch, T = (size_t)r->e->plan.step_tokens;
    r->jobs = kl_arena_take(a, N * sizeof *r->jobs);
    r->nodes = kl_arena_take(a, N * sizeof *r->nodes);
    r->feeds = kl_arena_take(a, N * sizeof *r->feeds);
    r->fed = kl_arena_take(a, N * sizeof *r->fed);
    r->results = kl_arena_take(a, T * sizeof *r->results);
    r->tokens = kl_arena_take(a, T * sizeof *r->tokens);
    r->rows = kl_arena_take(a, T * sizeof *r->rows);
    r->targets = kl_arena_take(a, T * sizeof *r->targets);
    r->logprobs = kl_arena_take(a, T * sizeof *r->logprobs);
    r->greedy = kl_arena_take(a, T * sizeof *r->greedy);
}

static kl_status make_memory(scorer *r, kl_error *err)
{
    kl_arena a;
    kl_arena_init(&a, NULL, 0);
    layout(r, &a);
    const size_t bytes = a.used;
    r->block = kl_aligned_alloc(bytes);
    if (r->block == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "score: no memory for %zu bytes of a step", bytes);
    kl_arena_init(&a, r->block, bytes);
    layout(r, &a);
    return kl_score_tree_make(r->p->scores, r->p->n, r->e->plan.step_tokens,
                              !r->e->batch_invariant || r->before % KL_PAGE_TOKENS == 0,
                              &r->tree, err);
}

static void release(scorer *r, const job *j)
{
    kl_error ignored; /* it is alive, broken or not */
    kl_prefix_place place = j->place;
    (void)kl_seq_release(r->e, j->seq, &ignored);
    kl_prefix_leave(&r->e->prefix, &place);
}

static bool is_node(const job *j)
{
    return j->hi - j->lo > 1;
}

/* A node that waits is among the nodes already. */
static void drop_jobs(scorer *r)
{
    for (int64_t i = 0; i < r->n_jobs; i++)
        if (!is_node(&r->jobs[i])) release(r, &r->jobs[i]);
    r->n_jobs = 0;
}

static void free_memory(scorer *r)
{
    drop_jobs(r);
    while (r->n_nodes > 0) release(r, &r->nodes[--r->n_nodes]);
    kl_score_tree_free(&r->tree);
    kl_free(r->block);
}

/* ---- one step -------------------------------------------------------------------------- */

static int64_t texts_of(const scorer *r, const job *j)
{
    const kl_score_pass *passes = r->tree.passes;
    return passes[j->hi - 1].first + passes[j->hi - 1].count - passes[j->lo].first;
}

/* The first of the next `count` tokens that a continuation's ids follow. */
static int64_t first_scored(const job *j, const kl_continuation *s)
{
    return s->n_context - 1 > j->fed ? s->n_context - 1 : j->fed;
}

/* Results of the job's next `count` tokens; a node, which reads contexts alone, has none. */
static int64_t count_rows(const scorer *r, const job *j, int64_t count)
{
    const kl_score_pass *pass = &r->tree.passes[j->lo];
    const int64_t each = j->fed + count - first_scored(j, r->tree.sorted[pass->first]);
    return is_node(j) || each < 0 ? 0 : each * pass->count;
}

static void add_rows(scorer *r, const job *j, int64_t count)
{
    const kl_score_pass *pass = &r->tree.passes[j->lo];
    for (int64_t i = pass->first; !is_node(j) && i < pass->first + pass->count; i++) {
        const kl_continuation *s = r->tree.sorted[i];
        for (int64_t t = first_scored(j, s); t < j->fed + count; t++) {
            const int64_t k = t - (s->n_context - 1);
            r->rows[r->n_rows] = (int32_t)(r->n_tokens + t - j->fed);
            r->targets[r->n_rows] = s->ids[k];
            r->results[r->n_rows++] = (result){s->logprobs + k, s->greedy + k, s};
        }
    }
}

/* Where a job is cut next, or its end. One after a sequence has no place among prefixes. */
static int64_t next_cut(const scorer *r, const job *j)
{
    const int64_t lead = kl_engine_lead(r->e, r->before, j->end);
    if (j->fed < lead) return lead;
    const int64_t cut = kl_prefix_cut(&r->e->prefix, &j->place, j->fed);
    return cut > 0 ? cut : j->end;
}

/* Put as much of a job into the step as there is room for, to its next cut and cut at a page.
 * Whether the step had room for that. */
static bool add_to_step(scorer *r, job *j)
{
    const int64_t most = r->e->plan.step_tokens, room = most - r->n_tokens;
    const int64_t rest = next_cut(r, j) - j->fed, unit = kl_sched_unit(most);
    const int64_t count = rest <= room ? rest : room / unit * unit;
    if (rest == 0) return true;
    if (count == 0 || r->n_rows + count_rows(r, j, count) > most) return false;
    int32_t *tokens = r->tokens + r->n_tokens;
    kl_score_tokens(r->tree.sorted[r->tree.passes[j->lo].first], j->fed, count, tokens);
    add_rows(r, j, count);
    r->fed[r->n_feeds] = j;
    r->feeds[r->n_feeds++] = (kl_feed){j->seq, tokens, count};
    r->n_tokens += count;
    return count == rest;
}

static kl_status take_results(scorer *r, kl_error *err)
{
    for (int64_t i = 0; i < r->n_rows; i++) {
        const result *out = &r->results[i];
        *out->logprob = r->logprobs[i];
        *out->greedy = r->greedy[i];
        if (isfinite(r->logprobs[i])) continue;
        kl_prefix_clear(&r->e->prefix); /* whatever it came from, nobody goes on from it */
        return kl_fail(err, KL_ERR_NUMERICAL,
                       "score: log-probability of token %lld of continuation %lld must be "
                       "finite, got %g",
                       (long long)(out->logprob - out->score->logprobs),
                       (long long)(out->score - r->p->scores), (double)r->logprobs[i]);
    }
    for (int64_t i = 0; i < r->n_feeds; i++) {
        job *j = r->fed[i];
        j->fed += r->feeds[i].n_tokens;
        r->done += (uint64_t)(r->feeds[i].n_tokens * texts_of(r, j));
        KL_TRY(kl_prefix_keep(&r->e->prefix, &j->place, j->seq, j->fed, err));
    }
    if (r->p->progress != NULL) r->p->progress(r->p->ctx, r->done, r->total);
    return KL_OK;
}

static kl_status run_step(scorer *r, kl_error *err)
{
    const kl_step step = {.feeds = r->feeds,
                          .n_feeds = r->n_feeds,
                          .rows = r->rows,
                          .n_rows = r->n_rows,
                          .targets = r->n_rows > 0 ? r->targets : NULL,
                          .logprobs = r->logprobs,
                          .greedy = r->greedy,
                          .poll = r->p->poll,
                          .poll_ctx = r->p->ctx};
    KL_TRY(kl_engine_step(r->e, &step, err));
    return take_results(r, err);
}

/* Read what all waiting jobs have to, and give back the passes' sequences. */
static kl_status flush(scorer *r, kl_error *err)
{
    for (int64_t first = 0; first < r->n_jobs;) {
        r->n_feeds = r->n_tokens = r->n_rows = 0;
        for (int64_t i = first; i < r->n_jobs && add_to_step(r, &r->jobs[i]); i++) continue;
        if (r->n_feeds > 0) KL_TRY(run_step(r, err)); /* else a cache had read all of it */
        while (first < r->n_jobs && r->jobs[first].fed == r->jobs[first].end) first++;
    }
    drop_jobs(r);
    return KL_OK;
}

/* ---- the walk -------------------------------------------------------------------------- */

/* A sequence that has read what others have of a job's contexts, all of which begin alike as far
 * as it goes. */
static kl_status start(scorer *r, job *j, kl_error *err)
{
    kl_prefix *const prefix = &r->e->prefix;
    const kl_continuation *s = r->tree.sorted[r->tree.passes[j->lo].first];
    const int64_t n = is_node(j) ? j->end + 1 : s->n_context;
    KL_TRY(kl_prefix_enter(prefix, s->context, n, &j->place, err));
    const kl_status status = kl_prefix_start(prefix, &j->place, &j->seq, &j->fed, err);
    if (status != KL_OK) kl_prefix_leave(prefix, &j->place);
    return status;
}

/* A sequence that goes on from `base` and has the pages for its tokens. */
static kl_status take_sequence(scorer *r, kl_seq base, job *j, kl_error *err)
{
    KL_TRY(base == 0 ? start(r, j, err) : kl_seq_fork(r->e, base, &j->seq, err));
    const kl_status status = kl_cache_reserve(&r->e->cache, j->seq, r->before + j->end, err);
    if (status != KL_OK) release(r, j);
    return status;
}

/* Where there is no room, what waits is run, which gives it back. */
static kl_status add_job(scorer *r, kl_seq base, job j, kl_error *err)
{
    kl_error full;
    const int64_t depth = j.fed;
    const kl_status status = take_sequence(r, base, &j, &full);
    if (status != KL_OK) {
        if (status == KL_ERR_MEMORY) KL_TRY(flush(r, err));
        KL_TRY(take_sequence(r, base, &j, err));
    }
    r->done += (uint64_t)((j.fed - depth) * texts_of(r, &j));
    r->jobs[r->n_jobs++] = j;
    if (is_node(&j)) r->nodes[r->n_nodes++] = j;
    return KL_OK;
}

static kl_status add_passes(scorer *r, kl_seq base, int64_t depth, int64_t lo, int64_t hi,
                            kl_error *err)
{
    for (int64_t i = lo; i < hi; i++) {
        const job pass = {
            .lo = i, .hi = i + 1, .fed = depth, .end = r->tree.passes[i].n_tokens};
        KL_TRY(add_job(r, base, pass, err));
    }
    return KL_OK;
}

/* Put passes that share no more than `depth` with another into the queue, and as nodes the groups
 * that do, until these have half of the free sequences: the rest is for the passes below them. A
 * group for which there is no node reads what it shares once for each pass. */
static kl_status gather(scorer *r, kl_seq base, int64_t depth, int64_t *lo, int64_t hi,
                        kl_error *err)
{
    if (kl_cache_free_seqs(&r->e->cache) < 2 && r->n_jobs > 0) KL_TRY(flush(r, err));
    const int64_t most = kl_cache_free_seqs(&r->e->cache) / 2;
    int64_t n = 0;
    while (*lo < hi) {
        int64_t shared;
        const int64_t end = kl_score_tree_group(&r->tree, *lo, hi, depth, &shared);
        if (end - *lo == 1 || most == 0) {
            KL_TRY(add_passes(r, base, depth, *lo, end, err));
        } else {
            if (n++ == most) return KL_OK;
            const job node = {.lo = *lo, .hi = end, .fed = depth, .end = shared};
            KL_TRY(add_job(r, base, node, err));
        }
        *lo = end;
    }
    return KL_OK;
}

/* Passes [lo, hi), of which `base` has read the first `depth` tokens. It recurses less often than
 * there are sequences: each time a node holds one. */
static kl_status walk(scorer *r, kl_seq base, int64_t depth, int64_t lo, int64_t hi,
                      kl_error *err)
{
    const int64_t mine = r->n_nodes;
    while (lo < hi) {
        KL_TRY(gather(r, base, depth, &lo, hi, err));
        if (r->n_nodes > mine) KL_TRY(flush(r, err));
        while (r->n_nodes > mine) {
            const job node = r->nodes[r->n_nodes - 1];
            KL_TRY(walk(r, node.seq, node.end, node.lo, node.hi, err));
            release(r, &node);
            r->n_nodes--;
        }
    }
    return KL_OK;
}

/* ---- the call -------------------------------------------------------------------------- */

static kl_status check_score(const scorer *r, int64_t i, kl_error *err)
{
    const kl_continuation *s = &r->p->scores[i];
    const kl_plan *plan = &r->e->plan;
    const int64_t vocab = r->e->config.vocab_size;
    if (s->n_context < 1 || s->n < 1)
        return kl_fail(err, KL_ERR_VALUE,
                       "score: context and continuation %lld must have a token or more, got "
                       "%lld and %lld",
                       (long long)i, (long long)s->n_context, (long long)s->n);
    if (s->n_context + s->n - 1 > plan->max_context - r->before)
        return kl_fail(err, KL_ERR_VALUE,
                       "score: %lld tokens and %lld of continuation %lld after %lld must be at "
                       "most %lld (max_context) and one",
                       (long long)s->n_context, (long long)s->n, (long long)i,
                       (long long)r->before, (long long)plan->max_context);
    KL_TRY(kl_check_ids("score, context", s->context, s->n_context, vocab, err));
    return kl_check_ids("score, continuation", s->ids, s->n, vocab, err);
}

static kl_status check_scores(scorer *r, kl_error *err)
{
    KL_TRY(kl_engine_check_loaded(r->e, err));
    if (r->p->seq != 0) KL_TRY(kl_seq_length(r->e, r->p->seq, &r->before, err));
    for (int64_t i = 0; i < r->p->n; i++) {
        KL_TRY(check_score(r, i, err));
        r->total += (uint64_t)(r->p->scores[i].n_context + r->p->scores[i].n - 1);
    }
    return KL_OK;
}

kl_status kl_engine_score(kl_engine *e, const kl_scoring *scores, kl_error *err)
{
    scorer r = {.e = e, .p = scores};
    KL_TRY(check_scores(&r, err));
    kl_status status = make_memory(&r, err);
    if (status == KL_OK) status = walk(&r, scores->seq, 0, 0, r.tree.n_passes, err);
    if (status == KL_OK) status = flush(&r, err);
    free_memory(&r);
    return status;
}
