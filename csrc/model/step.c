/*
 * step.c -- one step over some sequences: check everything, then change state, then compute.
 */
#include "model/engine_struct.h"

#include "base/memory.h"

#include <string.h>

/* ---- checks: nothing has changed yet --------------------------------------------------- */

kl_status kl_check_ids(const char *op, const int32_t *ids, int64_t n, int64_t vocab,
                       kl_error *err)
{
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            return kl_fail(err, KL_ERR_VALUE,
                           "%s: token id %d at position %lld must be in [0, %lld)", op, ids[i],
                           (long long)i, (long long)vocab);
    return KL_OK;
}

static kl_status check_feed(kl_engine *e, const kl_step *s, int64_t i, int64_t *total,
                            kl_error *err)
{
    const kl_feed *f = &s->feeds[i];
    KL_TRY(kl_cache_find(&e->cache, f->seq, false, &e->slots[i], err));
    for (int64_t j = 0; j < i; j++)
        if (e->slots[j] == e->slots[i])
            return kl_fail(
                err, KL_ERR_VALUE,
                "step: a sequence must be fed once, feeds %lld and %lld are the same",
                (long long)j, (long long)i);
    if (f->n_tokens < 1 || f->n_tokens > e->plan.step_tokens - *total)
        return kl_fail(
            err, KL_ERR_VALUE,
            "step: feeds must have 1 token or more and %lld together, got %lld after "
            "%lld",
            (long long)e->plan.step_tokens, (long long)f->n_tokens, (long long)*total);
    e->counts[i] = f->n_tokens;
    *total += f->n_tokens;
    return kl_check_ids("step", f->tokens, f->n_tokens, e->config.vocab_size, err);
}

static kl_status check_feeds(kl_engine *e, const kl_step *s, int64_t *total, kl_error *err)
{
    if (s->n_feeds < 1 || s->n_feeds > e->plan.max_batch)
        return kl_fail(err, KL_ERR_VALUE, "step: feeds must number 1 to %lld, got %lld",
                       (long long)e->plan.max_batch, (long long)s->n_feeds);
    *total = 0;
    for (int64_t i = 0; i < s->n_feeds; i++) KL_TRY(check_feed(e, s, i, total, err));
    return kl_cache_check_growth(&e->cache, e->slots, e->counts, s->n_feeds, err);
}

kl_status kl_check_sampling(const char *op, const kl_sampling *p, kl_error *err)
{
    const struct {
        const char *name, *range;
        double value, low, high;
        bool open; /* low itself is excluded */
    } fields[] = {
        {"temperature", "[0, 1e6]", (double)p->temperature, 0.0, 1e6, false},
        {"top_k", ">= 0", (double)p->top_k, 0.0, (double)INT32_MAX, false},
        {"top_p", "(0, 1]", (double)p->top_p, 0.0, 1.0, true},
        {"min_p", "[0, 1]", (double)p->min_p, 0.0, 1.0, false},
        {"repetition_penalty", "(0, 1e6]", (double)p->repetition_penalty, 0.0, 1e6, true},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        const double v = fields[i].value;
        /* A NaN fails both comparisons. */
        const bool enough = fields[i].open ? v > fields[i].low : v >= fields[i].low;
        if (!(enough && v <= fields[i].high))
            return kl_fail(err, KL_ERR_VALUE, "%s: %s must be %s%s, got %g", op, fields[i].name,
                           fields[i].range[0] == '>' ? "" : "in ", fields[i].range, v);
    }
    return KL_OK;
}

static kl_status check_sampling(const kl_engine *e, const kl_step *s, int64_t n_rows,
                                kl_error *err)
{
    if (n_rows < 1 || n_rows > e->plan.max_batch)
        return kl_fail(err, KL_ERR_VALUE,
                       "step: rows to sample must number 1 to %lld, got %lld",
                       (long long)e->plan.max_batch, (long long)n_rows);
    if (s->ids == NULL || s->id_logprobs == NULL)
        return kl_fail(err, KL_ERR_VALUE, "step: sampling needs ids and id_logprobs");
    for (int64_t i = 0; i < n_rows; i++)
        KL_TRY(kl_check_sampling("sampling", &s->sampling[i], err));
    return KL_OK;
}

static kl_status check_top(const kl_engine *e, const kl_step *s, kl_error *err)
{
    const int64_t most = kl_min_i64(e->config.vocab_size, KL_MAX_TOP);
    if (s->top < 0 || s->top > most)
        return kl_fail(err, KL_ERR_VALUE, "step: top must be in [0, %lld], got %d",
                       (long long)most, s->top);
    if (s->top > 0 && (s->top_ids == NULL || s->top_logprobs == NULL))
        return kl_fail(err, KL_ERR_VALUE, "step: top needs top_ids and top_logprobs");
    return KL_OK;
}

static kl_status check_targets(const kl_engine *e, const kl_step *s, kl_error *err)
{
    if (s->sampling != NULL)
        return kl_fail(err, KL_ERR_VALUE, "step: targets and sampling exclude each other");
    if (s->logprobs == NULL || s->greedy == NULL)
        return kl_fail(err, KL_ERR_VALUE, "step: targets need logprobs and greedy");
    for (int64_t i = 0; i < s->n_rows; i++)
        if (s->targets[i] < -1 || s->targets[i] >= e->config.vocab_size)
            return kl_fail(err, KL_ERR_VALUE,
                           "step: target %d of row %lld must be in [-1, %lld)", s->targets[i],
                           (long long)i, (long long)e->config.vocab_size);
    return KL_OK;
}

static kl_status check_rows(const kl_engine *e, const kl_step *s, int64_t total, kl_error *err)
{
    for (int64_t i = 0; i < s->n_captures; i++)
        if (s->captures[i].layer < 0 || s->captures[i].layer >= e->config.n_layers)
            return kl_fail(err, KL_ERR_VALUE, "step: layer must be in [0, %lld), got %lld",
                           (long long)e->config.n_layers, (long long)s->captures[i].layer);
    if (s->n_rows < 0 || s->n_rows > e->plan.step_tokens)
        return kl_fail(err, KL_ERR_VALUE, "step: rows must number at most %lld, got %lld",
                       (long long)e->plan.step_tokens, (long long)s->n_rows);
    for (int64_t i = 0; i < s->n_rows; i++)
        if (s->rows[i] < 0 || s->rows[i] >= total)
            return kl_fail(err, KL_ERR_VALUE, "step: rows[%lld] must be in [0, %lld), got %d",
                           (long long)i, (long long)total, s->rows[i]);
    if (s->n_rows == 0) return KL_OK;
    KL_TRY(check_top(e, s, err));
    if (s->targets != NULL) KL_TRY(check_targets(e, s, err));
    return s->sampling == NULL ? KL_OK : check_sampling(e, s, s->n_rows, err);
}

/* ---- the step's integers --------------------------------------------------------------- */

static kl_pass_shape shape_of(const kl_engine *e, const kl_step *s, int64_t total)
{
    kl_pass_shape shape = {.T = total,
                           .N = s->n_feeds,
                           .R = s->n_rows,
                           .decode = total == s->n_feeds,
                           .logits = s->logits != NULL,
                           .targets = s->targets != NULL,
                           .sampling = s->sampling != NULL,
                           .seen = s->sampling != NULL && s->seen != NULL,
                           .top = s->top};
    for (int64_t i = 0; i < s->n_feeds; i++) {
        const int64_t pages = e->cache.seqs[e->slots[i]].n_pages;
        if (pages > shape.B) shape.B = pages;
    }
    return shape;
}

/* After the cache has grown: the tables hold the new pages, lengths are still the old ones. */
static void fill_ints(kl_engine *e, const kl_step *s, const kl_pass_shape *shape)
{
    kl_pass_ints ints;
    kl_pass_layout_ints(&ints, shape, e->host_ints);
    int32_t *ids = ints.ids.data, *cu = ints.cu_seqlens.data, *slots = ints.slots.data;
    int32_t *lengths = ints.lengths.data, *table = ints.table.data;
    memset(table, 0, (size_t)kl_tensor_size(&ints.table) * sizeof *table);
    cu[0] = 0;
    for (int64_t i = 0; i < s->n_feeds; i++) {
        const kl_cache_seq *seq = &e->cache.seqs[e->slots[i]];
        const int64_t count = s->feeds[i].n_tokens;
        memcpy(ids + cu[i], s->feeds[i].tokens, (size_t)count * sizeof *ids);
        cu[i + 1] = cu[i] + (int32_t)count;
        slots[i] = (int32_t)e->slots[i];
        lengths[i] = (int32_t)(seq->length + count);
        memcpy(table + i * ints.table.shape[1], kl_cache_table(&e->cache, e->slots[i]),
               (size_t)seq->n_pages * sizeof *table);
    }
    if (s->n_rows == 0) return;
    const size_t bytes = (size_t)s->n_rows * sizeof(int32_t);
    memcpy(ints.rows.data, s->rows, bytes);
    if (s->targets != NULL) memcpy(ints.targets.data, s->targets, bytes);
}

/* ---- the step -------------------------------------------------------------------------- */

static kl_status run_step(kl_engine *e, const kl_step *s, int64_t total, kl_error *err)
{
    KL_TRY(kl_cache_grow(&e->cache, e->slots, e->counts, s->n_feeds, err));
    const kl_pass_shape shape = shape_of(e, s, total);
    fill_ints(e, s, &shape);
    kl_pass pass = kl_engine_pass(e);
    return kl_pass_run(&pass, &shape, s, e->host_ints, err);
}

/* Wait for the device even after a failure: the buffers of this step are the next one's. */
static kl_status finish(kl_engine *e, kl_status status, kl_error *err)
{
    kl_error late;
    const kl_status synced = e->be->vt->sync(e->be, status == KL_OK ? err : &late);
    return status == KL_OK ? synced : status;
}

kl_status kl_engine_step(kl_engine *e, const kl_step *step, kl_error *err)
{
    int64_t total;
    KL_TRY(kl_engine_check_loaded(e, err));
    KL_TRY(check_feeds(e, step, &total, err));
    KL_TRY(check_rows(e, step, total, err));

    const kl_status status = finish(e, run_step(e, step, total, err), err);
    for (int64_t i = 0; i < step->n_feeds; i++) {
        if (status == KL_OK)
            kl_cache_advance(&e->cache, e->slots[i], e->counts[i]);
        else
            e->cache.seqs[e->slots[i]].broken = true;
    }
    return status;
}

kl_status kl_engine_sample(kl_engine *e, const float *logits, int64_t n_rows,
                           const kl_step *step, kl_error *err)
{
    KL_TRY(check_top(e, step, err));
    KL_TRY(check_sampling(e, step, n_rows, err));
    const kl_pass_shape shape = {
        .R = n_rows, .sampling = true, .seen = step->seen != NULL, .top = step->top};
    kl_pass pass = kl_engine_pass(e);
    return finish(e, kl_pass_sample_logits(&pass, &shape, step, logits, err), err);
}
