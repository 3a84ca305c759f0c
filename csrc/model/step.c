/*
 * step.c -- one step over some sequences: check everything, then change state, then compute.
 */
#include "model/engine_struct.h"

#include "base/memory.h"
#include "model/plan.h"

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

static kl_status check_feed(kl_engine *e, const kl_step *s, bool follows, int64_t i,
                            int64_t *total, kl_error *err)
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
    if (follows) return KL_OK;
    return kl_check_ids("step", f->tokens, f->n_tokens, e->config.vocab_size, err);
}

static kl_status check_feeds(kl_engine *e, const kl_step *s, bool follows, int64_t *total,
                             kl_error *err)
{
    if (s->n_feeds < 1 || s->n_feeds > e->plan.max_batch)
        return kl_fail(err, KL_ERR_VALUE, "step: feeds must number 1 to %lld, got %lld",
                       (long long)e->plan.max_batch, (long long)s->n_feeds);
    *total = 0;
    for (int64_t i = 0; i < s->n_feeds; i++) KL_TRY(check_feed(e, s, follows, i, total, err));
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
    const int64_t most = s->taken == NULL ? e->plan.max_batch : kl_plan_guessing(&e->plan);
    if (n_rows < 1 || n_rows > most)
        return kl_fail(err, KL_ERR_VALUE,
                       "step: rows to sample must number 1 to %lld, got %lld", (long long)most,
                       (long long)n_rows);
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

/* A step of guesses draws after every token, in their order. */
static kl_status check_guesses(const kl_step *s, int64_t total, kl_error *err)
{
    bool all = s->sampling != NULL && s->n_rows == total;
    for (int64_t i = 0; all && i < total; i++) all = s->rows[i] == i;
    if (!all)
        return kl_fail(
            err, KL_ERR_VALUE,
            "step: guesses need sampling after each of the %lld tokens, in order, got "
            "%lld rows%s",
            (long long)total, (long long)s->n_rows,
            s->sampling == NULL ? " without sampling" : "");
    for (int64_t i = 0; i < s->n_feeds; i++)
        if (s->feeds[i].n_tokens > KL_MAX_GUESSES + 1)
            return kl_fail(err, KL_ERR_VALUE,
                           "step: feed %lld must have a token and at most %d guesses, got %lld "
                           "tokens",
                           (long long)i, KL_MAX_GUESSES, (long long)s->feeds[i].n_tokens);
    return KL_OK;
}

/* ---- the blocks of a step -------------------------------------------------------------- */

/* A token step's page table gets the width of the next power of two, so that steps of a growing
 * context keep their shape, and with it their recording, until it has doubled. */
static int64_t table_width(const kl_cache *c, int64_t pages, bool decode)
{
    int64_t width = 1;
    if (!decode) return pages;
    while (width < pages) width *= 2;
    return kl_min_i64(width, c->table_width);
}

static bool wants_all_rows(const kl_step *s, int64_t total)
{
    if (s->n_rows != total) return false;
    for (int64_t i = 0; i < total; i++)
        if (s->rows[i] != i) return false;
    return true;
}

static bool is_greedy(const kl_step *s, int64_t n_rows)
{
    for (int64_t i = 0; i < n_rows; i++)
        if (s->sampling[i].temperature > 0) return false;
    return true;
}

static kl_pass_shape shape_of(const kl_engine *e, const kl_step *s, int64_t total)
{
    const bool rows = s->n_rows > 0, targets = rows && s->targets != NULL,
               sampling = rows && s->sampling != NULL;
    kl_pass_shape shape = {.T = total,
                           .N = s->n_feeds,
                           .R = s->n_rows,
                           .decode = total == s->n_feeds && s->taken == NULL,
                           .verify = s->taken != NULL,
                           .all_rows = wants_all_rows(s, total),
                           .logits = rows && s->logits != NULL,
                           .targets = targets,
                           .sampling = sampling,
                           .seen = sampling && s->seen != NULL,
                           .greedy = sampling && is_greedy(s, s->n_rows),
                           .top = targets || sampling ? s->top : 0};
    int64_t pages = 0;
    for (int64_t i = 0; i < s->n_feeds; i++)
        if (e->cache.seqs[e->slots[i]].n_pages > pages)
            pages = e->cache.seqs[e->slots[i]].n_pages;
    shape.B = table_width(&e->cache, pages, shape.decode || shape.verify);
    return shape;
}

static void copy_to(const kl_tensor *t, const void *from)
{
    const size_t bytes = (size_t)kl_tensor_size(t) * kl_dtype_bytes(t->dtype);
    if (bytes > 0) memcpy(t->data, from, bytes);
}

static void copy_from(const kl_tensor *t, void *to)
{
    const size_t bytes = (size_t)kl_tensor_size(t) * kl_dtype_bytes(t->dtype);
    if (bytes > 0) memcpy(to, t->data, bytes);
}

/* After the cache has grown: the tables hold the new pages, lengths are still the old ones. */
static void fill_feeds(kl_engine *e, const kl_step *s, bool follows, const kl_pass_inputs *in)
{
    int32_t *ids = in->ids.data, *cu = in->cu_seqlens.data, *slots = in->slots.data;
    int32_t *lengths = in->lengths.data, *table = in->table.data;
    memset(table, 0, (size_t)kl_tensor_size(&in->table) * sizeof *table);
    cu[0] = 0;
    for (int64_t i = 0; i < s->n_feeds; i++) {
        const kl_cache_seq *seq = &e->cache.seqs[e->slots[i]];
        const int64_t count = s->feeds[i].n_tokens;
        if (!follows) memcpy(ids + cu[i], s->feeds[i].tokens, (size_t)count * sizeof *ids);
        cu[i + 1] = cu[i] + (int32_t)count;
        slots[i] = (int32_t)e->slots[i];
        lengths[i] = (int32_t)(seq->length + count);
        memcpy(table + i * in->table.shape[1], kl_cache_table(&e->cache, e->slots[i]),
               (size_t)seq->n_pages * sizeof *table);
    }
}

/* Lay out the host's blocks as the device's are, one behind the other, and fill the first. */
static void fill_inputs(kl_engine *e, const kl_pass *p, bool follows, void *host)
{
    const kl_step *const s = p->step;
    kl_pass_inputs in;
    kl_pass_layout_inputs(&in, &p->shape, e->config.vocab_size, host);
    if (p->shape.T > 0) {
        fill_feeds(e, s, follows, &in);
        copy_to(&in.rows, s->rows);
    }
    if (p->shape.targets) copy_to(&in.targets, s->targets);
    if (p->shape.sampling)
        memcpy(in.sampling, s->sampling, (size_t)p->shape.R * sizeof *in.sampling);
    if (p->shape.seen) copy_to(&in.seen, s->seen);
}

static void *host_outputs(void *host, size_t in_bytes)
{
    return (char *)host + in_bytes;
}

/* What has come back, to the caller's arrays. */
static void hand_over(const kl_step *s, const kl_pass_shape *shape, void *outputs)
{
    kl_pass_outputs out;
    kl_pass_layout_outputs(&out, shape, outputs);
    if (shape->sampling) {
        copy_from(&out.ids, s->ids);
        copy_from(&out.logprobs, s->id_logprobs);
    }
    if (shape->targets) {
        copy_from(&out.logprobs, s->logprobs);
        copy_from(&out.greedy, s->greedy);
    }
    if (shape->top > 0) {
        copy_from(&out.top_ids, s->top_ids);
        copy_from(&out.top_logprobs, s->top_logprobs);
    }
}

/* ---- the step -------------------------------------------------------------------------- */

static kl_status enqueue(kl_engine *e, kl_pass *p, int64_t total, bool follows, void *host,
                         kl_error *err)
{
    const kl_step *const s = p->step;
    KL_TRY(kl_cache_grow(&e->cache, e->slots, e->counts, s->n_feeds, err));
    const kl_pass_shape shape = shape_of(e, s, total);
    KL_TRY(kl_pass_start(p, &shape, err));
    fill_inputs(e, p, follows, host);
    KL_TRY(kl_pass_send(p, host, follows, err));
    KL_TRY(kl_recordings_compute(&e->recordings, p, err));
    return kl_pass_fetch(p, host_outputs(host, p->in_bytes), err);
}

/* Wait for the device even after a failure: the buffers of this step are the next one's. */
static kl_status finish(kl_engine *e, kl_status status, kl_error *err)
{
    kl_error late;
    const kl_status synced = e->be->vt->sync(e->be, status == KL_OK ? err : &late);
    return status == KL_OK ? synced : status;
}

/* Of each feed, the tokens up to the first that is not what was drawn before it: those that the
 * device has taken (kl_kda_mixer). */
static void count_taken(kl_engine *e, const kl_step *s)
{
    const int32_t *drawn = s->ids;
    for (int64_t i = 0; i < s->n_feeds; i++) {
        const kl_feed *f = &s->feeds[i];
        int64_t n = 1;
        while (n < f->n_tokens && f->tokens[n] == drawn[n - 1]) n++;
        s->taken[i] = e->counts[i] = n;
        drawn += f->n_tokens;
    }
}

/* After a step: its sequences are longer by what they have read, or broken. */
static void advance(kl_engine *e, const kl_step *s, bool ok)
{
    for (int64_t i = 0; i < s->n_feeds; i++) {
        if (ok)
            kl_cache_advance(&e->cache, e->slots[i], e->counts[i]);
        else
            e->cache.seqs[e->slots[i]].broken = true;
    }
}

kl_status kl_engine_step(kl_engine *e, const kl_step *step, kl_error *err)
{
    int64_t total;
    KL_TRY(kl_engine_check_loaded(e, err));
    KL_TRY(check_feeds(e, step, false, &total, err));
    KL_TRY(check_rows(e, step, total, err));
    if (step->taken != NULL) KL_TRY(check_guesses(step, total, err));

    kl_pass pass = kl_engine_pass(e);
    pass.step = step;
    const kl_status status = finish(e, enqueue(e, &pass, total, false, e->host, err), err);
    if (status == KL_OK) hand_over(step, &pass.shape, host_outputs(e->host, pass.in_bytes));
    if (status == KL_OK && step->taken != NULL) count_taken(e, step);
    advance(e, step, status == KL_OK);
    return status;
}

static kl_status run_sample(kl_engine *e, kl_pass *p, const float *logits, int64_t n_rows,
                            kl_error *err)
{
    const kl_pass_shape shape = {.R = n_rows,
                                 .sampling = true,
                                 .seen = p->step->seen != NULL,
                                 .greedy = is_greedy(p->step, n_rows),
                                 .top = p->step->top};
    KL_TRY(kl_pass_start(p, &shape, err));
    fill_inputs(e, p, false, e->host);
    KL_TRY(kl_pass_send(p, e->host, false, err));
    KL_TRY(kl_pass_sample_logits(p, logits, err));
    return kl_pass_fetch(p, host_outputs(e->host, p->in_bytes), err);
}

kl_status kl_engine_sample(kl_engine *e, const float *logits, int64_t n_rows,
                           const kl_step *step, kl_error *err)
{
    KL_TRY(check_top(e, step, err));
    KL_TRY(check_sampling(e, step, n_rows, err));
    kl_pass pass = kl_engine_pass(e);
    pass.step = step;
    const kl_status status = finish(e, run_sample(e, &pass, logits, n_rows, err), err);
    if (status == KL_OK) hand_over(step, &pass.shape, host_outputs(e->host, pass.in_bytes));
    return status;
}

/* ---- steps ahead ----------------------------------------------------------------------- */

static kl_status check_ahead(const kl_step *s, int64_t total, kl_error *err)
{
    if (total == s->n_feeds && s->n_rows == total && s->sampling != NULL && s->seen == NULL &&
        s->taken == NULL)
        return KL_OK;
    return kl_fail(
        err, KL_ERR_VALUE,
        "step: one ahead must feed a token to each of %lld sequences and sample after "
        "it, without guesses or ids seen, got %lld tokens and %lld rows%s%s%s",
        (long long)s->n_feeds, (long long)total, (long long)s->n_rows,
        s->sampling == NULL ? " without sampling" : "", s->taken == NULL ? "" : " with guesses",
        s->seen == NULL ? "" : " with ids seen");
}

/* Enqueued with everything it may still be read by: the mark is behind the copy of its outputs. */
static kl_status fly(kl_engine *e, kl_flight *f, const kl_step *s, int64_t total, bool follows,
                     kl_error *err)
{
    kl_pass pass = kl_engine_pass(e);
    pass.step = s;
    KL_TRY(enqueue(e, &pass, total, follows, f->host, err));
    KL_TRY(e->be->vt->set_mark(e->be, f->mark, err));
    f->shape = pass.shape;
    f->in_bytes = pass.in_bytes;
    return KL_OK;
}

kl_status kl_engine_launch(kl_engine *e, const kl_step *s, bool follows, kl_error *err)
{
    kl_flight *const f = &e->flights[(e->first_flight + e->n_flights) % 2];
    int64_t total;
    KL_TRY(kl_engine_check_loaded(e, err));
    KL_TRY(check_feeds(e, s, follows, &total, err));
    KL_TRY(check_rows(e, s, total, err));
    KL_TRY(check_ahead(s, total, err));
    KL_TRY(e->be->vt->wait_mark(e->be, f->mark, err)); /* of one that nobody waited for */

    kl_status status = fly(e, f, s, total, follows, err);
    if (status != KL_OK) status = finish(e, status, err);
    advance(e, s, status == KL_OK);
    if (status != KL_OK) return status;
    e->n_flights++;
    e->pass_of_flight = e->n_passes;
    return KL_OK;
}

bool kl_engine_can_follow(const kl_engine *e)
{
    return e->n_flights == 1 && e->pass_of_flight == e->n_passes;
}

kl_status kl_engine_land(kl_engine *e, const kl_step *s, kl_error *err)
{
    const kl_flight *const f = &e->flights[e->first_flight];
    e->first_flight = (e->first_flight + 1) % 2;
    e->n_flights--;
    KL_TRY(e->be->vt->wait_mark(e->be, f->mark, err));
    hand_over(s, &f->shape, host_outputs(f->host, f->in_bytes));
    return KL_OK;
}

void kl_engine_abandon(kl_engine *e)
{
    e->n_flights = 0;
}
