/*
 * test_score.c -- many continuations at once against each in a pass of its own, to the bit; how
 * many tokens are read for them; and that nothing is left behind, whatever fails.
 */
#include "test.h"

#include "base/memory.h"
#include "model/engine_struct.h"
#include "model/prompt.h"
#include "model/score_tree.h"
#include "tiny_model.h"

#include <math.h>

enum { VOCAB = 97, MAX_N = 12, LONGEST = 220 };

typedef struct {
    uint64_t seed, index;
    int32_t contexts[MAX_N][LONGEST], ids[MAX_N][LONGEST];
    float logprobs[MAX_N][LONGEST];
    uint8_t greedy[MAX_N][LONGEST];
    kl_continuation rows[MAX_N];
    int64_t n;
} deal;

static int64_t tokens_read; /* by all steps since it was set */

static kl_status (*plain_embedding)(kl_backend *be, const kl_embedding *a, kl_error *err);

static kl_status counted_embedding(kl_backend *be, const kl_embedding *a, kl_error *err)
{
    tokens_read += a->ids.shape[0];
    return plain_embedding(be, a, err);
}

static kl_engine *open_engine(kl_backend **be, const kl_engine_options *options)
{
    static kl_backend_vtbl table;
    *be = tiny_backend(1);
    table = *(*be)->vt;
    plain_embedding = table.embedding;
    table.embedding = counted_embedding;
    (*be)->vt = &table;
    return tiny_engine_on(*be, options);
}

static void close_engine(kl_engine *e, kl_backend *be)
{
    kl_engine_free(e);
    kl_backend_close(be);
}

static int64_t draw(deal *d, int64_t low, int64_t high)
{
    return low + (int64_t)(kl_rng_uniform(d->seed, d->index++) * (double)(high - low + 1));
}

/* Contexts that begin as one before them, or are one, or are there twice; ids likewise. */
static void make_deal(deal *d, uint64_t seed, int64_t longest)
{
    *d = (deal){.seed = seed};
    d->n = draw(d, 1, MAX_N);
    for (int64_t i = 0; i < d->n; i++) {
        kl_continuation *s = &d->rows[i];
        const int64_t like = draw(d, 0, i), kept = draw(d, 0, longest / 2);
        *s = (kl_continuation){.context = d->contexts[i],
                               .n_context = draw(d, 1, longest / 2),
                               .ids = d->ids[i],
                               .n = draw(d, 0, 1) ? 1 : draw(d, 1, longest / 2 - 1),
                               .logprobs = d->logprobs[i],
                               .greedy = d->greedy[i]};
        for (int64_t t = 0; t < s->n_context; t++)
            d->contexts[i][t] =
                t < kept ? d->contexts[like][t] : (int32_t)draw(d, 0, VOCAB - 1);
        for (int64_t t = 0; t < s->n; t++)
            d->ids[i][t] = t + 1 < s->n ? d->ids[like][t] : (int32_t)draw(d, 0, VOCAB - 1);
        if (draw(d, 0, 2) > 0 || like == i) continue;
        s->context = d->rows[like].context; /* the very same */
        s->n_context = d->rows[like].n_context;
    }
}

static int64_t pass_tokens(const kl_continuation *s)
{
    return s->n_context + s->n - 1;
}

/* One row in a pass of its own after `base`. */
static void judge(kl_engine *e, kl_seq base, const kl_continuation *s)
{
    int32_t ids[2 * LONGEST], targets[2 * LONGEST];
    float logprobs[2 * LONGEST];
    uint8_t greedy[2 * LONGEST];
    const int64_t n = pass_tokens(s);
    kl_error err = {KL_OK, ""};
    kl_seq seq = 0;
    kl_score_tokens(s, 0, n, ids);
    for (int64_t t = 0; t < n; t++)
        targets[t] = t < s->n_context - 1 ? -1 : s->ids[t - s->n_context + 1];
    EXPECT(base == 0 || kl_seq_fork(e, base, &seq, &err) == KL_OK);
    const kl_prompt p = {.seq = seq,
                         .ids = ids,
                         .n = n,
                         .targets = targets,
                         .logprobs = logprobs,
                         .greedy = greedy};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    if (base != 0) EXPECT(kl_seq_release(e, seq, &err) == KL_OK);
    const int64_t first = s->n_context - 1;
    EXPECT(memcmp(logprobs + first, s->logprobs, (size_t)s->n * sizeof(float)) == 0);
    EXPECT(memcmp(greedy + first, s->greedy, (size_t)s->n) == 0);
}

typedef struct {
    uint64_t done, total;
    int64_t polls, stop_at; /* the poll that stops; 0: none */
} watch;

static void watch_progress(void *ctx, uint64_t done, uint64_t total)
{
    watch *w = ctx;
    EXPECT(done > w->done && done <= total);
    w->done = done;
    w->total = total;
}

static int watch_poll(void *ctx)
{
    watch *w = ctx;
    return ++w->polls == w->stop_at;
}

static kl_scoring scoring_of(const deal *d, kl_seq base, watch *w)
{
    return (kl_scoring){.seq = base,
                        .scores = d->rows,
                        .n = d->n,
                        .progress = watch_progress,
                        .poll = watch_poll,
                        .ctx = w};
}

static void expect_in_use(const kl_engine *e, int64_t sequences, int64_t pages)
{
    int64_t n, p;
    kl_engine_usage(e, &n, &p);
    EXPECT(n == sequences && p == pages);
}

static void score_and_judge(kl_engine *e, kl_seq base, uint64_t seed, int64_t longest)
{
    static deal d;
    watch w = {0};
    int64_t all = 0, sequences, pages;
    kl_error err = {KL_OK, ""};
    make_deal(&d, seed, longest);
    memset(d.logprobs, 0xff, sizeof d.logprobs); /* NaN */
    kl_engine_usage(e, &sequences, &pages);
    const kl_scoring scoring = scoring_of(&d, base, &w);
    tokens_read = 0;
    EXPECT(kl_engine_score(e, &scoring, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    for (int64_t i = 0; i < d.n; i++) all += pass_tokens(&d.rows[i]);
    EXPECT(tokens_read <= all && w.done == w.total && (int64_t)w.total == all);
    expect_in_use(e, sequences, pages);
    for (int64_t i = 0; i < d.n; i++) judge(e, base, &d.rows[i]);
}

/* ---- results --------------------------------------------------------------------------- */

static void each_is_what_it_is_alone(void)
{
    static const int64_t batches[] = {1, 2, 3, 5, 40};
    for (size_t i = 0; i < sizeof batches / sizeof batches[0]; i++) {
        kl_engine_options o = tiny_options;
        o.max_batch = batches[i];
        o.step_tokens = i % 2 == 0 ? 128 : 64;
        kl_backend *be;
        kl_engine *e = open_engine(&be, &o);
        for (uint64_t seed = 0; seed < 6; seed++) score_and_judge(e, 0, 10 * i + seed, LONGEST);
        close_engine(e, be);
    }
}

static void after_a_sequence_and_beside_others(void)
{
    int32_t ids[70];
    kl_backend *be;
    kl_engine *e = open_engine(&be, &tiny_options);
    kl_error err = {KL_OK, ""};
    kl_seq base, other;
    for (int i = 0; i < 70; i++) ids[i] = i;
    EXPECT(kl_seq_new(e, &base, &err) == KL_OK && kl_seq_new(e, &other, &err) == KL_OK);
    const kl_prompt p = {.seq = base, .ids = ids, .n = 70}; /* a few in its last page */
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    for (uint64_t seed = 0; seed < 2; seed++) score_and_judge(e, base, 100 + seed, 150);
    EXPECT(kl_seq_release(e, other, &err) == KL_OK);
    score_and_judge(e, base, 200, 150);
    close_engine(e, be);
}

static void few_pages_are_enough(void)
{
    kl_engine_options o = tiny_options;
    kl_backend *be;
    o.max_batch = 8;
    kl_engine *e = open_engine(&be, &o);
    const kl_plan plan = *kl_engine_plan(e);
    close_engine(e, be);
    o.cache_bytes = plan.state_bytes + 5 * KL_PAGE_TOKENS * plan.page_bytes_per_token;
    e = open_engine(&be, &o);
    EXPECT(kl_engine_plan(e)->n_pages < 8);
    for (uint64_t seed = 0; seed < 2; seed++) score_and_judge(e, 0, 300 + seed, LONGEST);
    close_engine(e, be);
}

/* ---- what is read ---------------------------------------------------------------------- */

static int64_t read_for(kl_engine *e, deal *d, int64_t n, int64_t n_context, int64_t length)
{
    watch w = {0};
    kl_error err = {KL_OK, ""};
    *d = (deal){.seed = 5, .n = n};
    for (int64_t i = 0; i < n; i++) {
        d->rows[i] = (kl_continuation){d->contexts[0], n_context,      d->ids[i],
                                       length,         d->logprobs[i], d->greedy[i]};
        for (int64_t t = 0; t < length; t++) d->ids[i][t] = (int32_t)draw(d, 0, VOCAB - 1);
    }
    for (int64_t t = 0; t < n_context; t++) d->contexts[0][t] = (int32_t)draw(d, 0, VOCAB - 1);
    const kl_scoring scoring = scoring_of(d, 0, &w);
    tokens_read = 0;
    EXPECT(kl_engine_score(e, &scoring, &err) == KL_OK);
    return tokens_read;
}

static void what_is_shared_is_read_once(void)
{
    static deal d;
    kl_backend *be;
    kl_engine *e = open_engine(&be, &tiny_options);
    EXPECT(read_for(e, &d, 4, 130, 1) == 130); /* all of it is the same */
    EXPECT(read_for(e, &d, 4, 130, 3) == 128 + 4 * (2 + 2));
    EXPECT(read_for(e, &d, 10, 130, 3) == 128 + 10 * (2 + 2)); /* more than sequences */
    EXPECT(read_for(e, &d, 4, 128, 3) == 64 + 4 * (64 + 2)); /* the last one is scored after */
    EXPECT(read_for(e, &d, 4, 40, 3) == 4 * 42);
    EXPECT(read_for(e, &d, 1, 130, 9) == 138);
    close_engine(e, be);
}

/* By comparing all pairs: a group shares what each two of it do. */
static void groups_are_of_those_that_begin_alike(void)
{
    static deal d;
    for (uint64_t seed = 0; seed < 40; seed++) {
        kl_score_tree t;
        kl_error err = {KL_OK, ""};
        make_deal(&d, 400 + seed, LONGEST);
        EXPECT(kl_score_tree_make(d.rows, d.n, 64, true, &t, &err) == KL_OK);
        int64_t shared, covered = 0;
        for (int64_t lo = 0; lo < t.n_passes; lo++) {
            const kl_score_pass *p = &t.passes[lo];
            const kl_continuation *a = t.sorted[p->first];
            EXPECT(p->first == covered && p->n_tokens == pass_tokens(a));
            covered += p->count;
            const int64_t end = kl_score_tree_group(&t, lo, t.n_passes, 0, &shared);
            for (int64_t k = lo + 1; k < end; k++) {
                const kl_continuation *b = t.sorted[t.passes[k].first];
                EXPECT(shared % KL_PAGE_TOKENS == 0 && shared > 0);
                EXPECT(shared < a->n_context && shared < b->n_context);
                EXPECT(memcmp(a->context, b->context, (size_t)shared * sizeof(int32_t)) == 0);
            }
        }
        EXPECT(covered == d.n);
        kl_score_tree_free(&t);
    }
}

/* ---- failures -------------------------------------------------------------------------- */

static void a_stop_leaves_nothing_behind(void)
{
    static deal d;
    kl_backend *be;
    kl_engine *e = open_engine(&be, &tiny_options);
    kl_error err = {KL_OK, ""};
    kl_status status = KL_ERR_CANCELLED;
    int64_t stops = 0, at = 1;
    make_deal(&d, 3, LONGEST);
    d.n = 9;
    for (; status == KL_ERR_CANCELLED; stops++, at += 1 + at / 4) {
        watch w = {.stop_at = at};
        const kl_scoring scoring = scoring_of(&d, 0, &w);
        status = kl_engine_score(e, &scoring, &err);
        expect_in_use(e, 0, 0);
    }
    EXPECT(status == KL_OK && stops > 8);
    for (int64_t i = 0; i < d.n; i++) judge(e, 0, &d.rows[i]);
    close_engine(e, be);
}

static void each_allocation_may_fail(void)
{
    static deal d;
    kl_backend *be;
    kl_engine *e = open_engine(&be, &tiny_options);
    kl_error err = {KL_OK, ""};
    kl_status status = KL_ERR_MEMORY;
    int64_t k = 0;
    make_deal(&d, 4, 60);
    while (status == KL_ERR_MEMORY) {
        watch w = {0};
        const kl_scoring scoring = scoring_of(&d, 0, &w);
        kl_fault_arm(++k);
        status = kl_engine_score(e, &scoring, &err);
        kl_fault_arm(0);
        expect_in_use(e, 0, 0);
    }
    EXPECT(status == KL_OK && k == 3);
    close_engine(e, be);
}

static void nan_names_the_continuation(void)
{
    static deal d;
    static float state[2 * 8 * 8], window[48 * 3];
    kl_backend *be;
    kl_engine *e = open_engine(&be, &tiny_options);
    kl_error err = {KL_OK, ""};
    kl_seq base, good;
    watch w = {0};
    for (size_t i = 0; i < sizeof state / sizeof *state; i++) state[i] = NAN;
    EXPECT(kl_seq_new(e, &base, &err) == KL_OK && kl_seq_new(e, &good, &err) == KL_OK);
    EXPECT(kl_seq_write_kda(e, base, 0, state, window, &err) == KL_OK);
    make_deal(&d, 6, 40);
    const kl_scoring scoring = scoring_of(&d, base, &w);
    EXPECT(kl_engine_score(e, &scoring, &err) == KL_ERR_NUMERICAL);
    EXPECT(strstr(err.message, "score: log-probability of token 0 of continuation") != NULL);
    expect_in_use(e, 2, 0);
    score_and_judge(e, good, 7, 40); /* on the slots that were poisoned */
    close_engine(e, be);
}

#define REFUSED(change, text)                                                                  \
    do {                                                                                       \
        kl_error err = {KL_OK, ""};                                                            \
        watch w = {0};                                                                         \
        make_deal(&d, 1, 40);                                                                  \
        change;                                                                                \
        const kl_scoring scoring = scoring_of(&d, 0, &w);                                      \
        EXPECT(kl_engine_score(e, &scoring, &err) == KL_ERR_VALUE);                            \
        EXPECT(strstr(err.message, text) != NULL);                                             \
        expect_in_use(e, 0, 0);                                                                \
    } while (0)

static void wrong_rows_are_named(void)
{
    static deal d;
    kl_backend *be;
    kl_engine *e = open_engine(&be, &tiny_options);
    REFUSED(d.rows[0].n = 0, "continuation 0 must have a token or more");
    REFUSED(d.rows[0].n_context = 0, "continuation 0 must have a token or more");
    REFUSED(d.ids[0][0] = VOCAB, "score, continuation: token id 97 at position 0");
    REFUSED(d.contexts[0][0] = -1, "score, context: token id -1 at position 0");
    REFUSED(d.rows[0].n_context = 300, "must be at most 256 (max_context)");
    close_engine(e, be);
}

int main(void)
{
    RUN(each_is_what_it_is_alone);
    RUN(after_a_sequence_and_beside_others);
    RUN(few_pages_are_enough);
    RUN(what_is_shared_is_read_once);
    RUN(groups_are_of_those_that_begin_alike);
    RUN(a_stop_leaves_nothing_behind);
    RUN(each_allocation_may_fail);
    RUN(nan_names_the_continuation);
    RUN(wrong_rows_are_named);
    return test_failures != 0;
}
