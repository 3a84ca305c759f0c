/*
 * test_engine.c -- steps of a tiny random model: what is refused and what is cancelled.
 */
#include "test.h"

#include "model/engine_struct.h"
#include "model/prompt.h"
#include "tiny_model.h"

#include <math.h>

enum { VOCAB = 97 };

/* The largest steps of a plan must fit its scratch memory to the byte. */
static void the_largest_steps_fit_the_plan(void)
{
    static float logits[64 * VOCAB], logprobs[64], top_logprobs[64 * VOCAB], id_logprobs[4];
    static int32_t ids[64], rows[64], targets[64], top_ids[64 * VOCAB], drawn[4], seen[16];
    static uint8_t greedy[64];
    static kl_sampling sampling[4];
    kl_backend *be = tiny_backend(1);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_seq seqs[4];
    kl_feed feeds[4];
    kl_error err = {KL_OK, ""};
    tiny_ids(ids, 64, 1);
    for (int i = 0; i < 64; i++) rows[i] = i, targets[i] = ids[(i + 1) % 64];
    for (int i = 0; i < 4; i++) {
        EXPECT(kl_seq_new(e, &seqs[i], &err) == KL_OK);
        feeds[i] = (kl_feed){seqs[i], ids + 16 * i, 16};
        sampling[i] = (kl_sampling){1.0f, 0, 1.0f, 0.0f, 1.1f, 1, 0};
    }
    kl_step s = {.feeds = feeds,
                 .n_feeds = 4,
                 .rows = rows,
                 .n_rows = 64,
                 .logits = logits,
                 .targets = targets,
                 .logprobs = logprobs,
                 .greedy = greedy,
                 .top = VOCAB,
                 .top_ids = top_ids,
                 .top_logprobs = top_logprobs};
    for (int turn = 0; turn < 3; turn++) EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    for (int i = 0; i < 4; i++) feeds[i].n_tokens = 1;
    s.targets = NULL;
    s.n_rows = 4;
    s.sampling = sampling;
    s.seen = seen;
    s.ids = drawn;
    s.id_logprobs = id_logprobs;
    EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    EXPECT(kl_engine_sample(e, logits, 4, &s, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    kl_engine_free(e);
    kl_backend_close(be);
}

static void expect_refused(kl_engine *e, const kl_step *s, const char *text)
{
    kl_error err = {KL_OK, ""};
    EXPECT(kl_engine_step(e, s, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, text);
}

/* A refused step changes nothing: the next right one gives the bits of a fresh start. */
static void wrong_steps_change_nothing(void)
{
    float first[VOCAB], again[VOCAB];
    int32_t ids[6] = {1, 2, 3, 4, 5, 6}, bad[3] = {4, 97, 5}, row = 5;
    kl_backend *be = tiny_backend(1);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_seq seq, other;
    kl_error err = {KL_OK, ""};
    EXPECT(kl_seq_new(e, &seq, &err) == KL_OK && kl_seq_new(e, &other, &err) == KL_OK);
    kl_feed feeds[2] = {{seq, ids, 6}, {seq, ids, 1}};
    kl_step s = {.feeds = feeds, .n_feeds = 1, .rows = &row, .n_rows = 1, .logits = first};
    EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    EXPECT(kl_seq_release(e, seq, &err) == KL_OK && kl_seq_new(e, &seq, &err) == KL_OK);

    feeds[0].seq = feeds[1].seq = seq;
    s.logits = again;
    s.n_feeds = 2;
    expect_refused(e, &s, "step: a sequence must be fed once, feeds 0 and 1 are the same");
    feeds[1] = (kl_feed){other, bad, 3};
    expect_refused(e, &s, "step: token id 97 at position 1 must be in [0, 97)");
    feeds[1].n_tokens = 59;
    expect_refused(e, &s,
                   "step: feeds must have 1 token or more and 64 together, got 59 after 6");
    feeds[1].seq = 999;
    expect_refused(e, &s, "sequence: must be one that is alive, got handle 999");
    s.n_feeds = 1;
    row = 6;
    expect_refused(e, &s, "step: rows[0] must be in [0, 6), got 6");
    row = 5;
    const kl_capture capture = {4, first};
    s.captures = &capture;
    s.n_captures = 1;
    expect_refused(e, &s, "step: layer must be in [0, 4), got 4");
    s.n_captures = 0;
    EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    EXPECT(memcmp(first, again, sizeof first) == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

typedef struct {
    int calls, stop_at;
} countdown;

static int stop_after(void *ctx)
{
    countdown *c = ctx;
    return ++c->calls == c->stop_at;
}

/* Cancelled at every place where it can be: the sequence is broken, the engine is not. */
static void cancelling_breaks_only_the_sequence(void)
{
    float wanted[VOCAB], got[VOCAB];
    int32_t ids[40], more = 3;
    kl_backend *be = tiny_backend(1);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    int64_t length, sequences, pages;
    tiny_ids(ids, 40, 5);
    kl_prompt p = {.ids = ids, .n = 40, .last_logits = wanted};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    p.last_logits = got;
    for (int stop_at = 1; stop_at < 20; stop_at++) {
        countdown c = {0, stop_at};
        kl_seq seq;
        EXPECT(kl_seq_new(e, &seq, &err) == KL_OK);
        const kl_feed feed = {seq, ids, 40}, next = {seq, &more, 1};
        kl_step s = {.feeds = &feed, .n_feeds = 1, .poll = stop_after, .poll_ctx = &c};
        const kl_status status = kl_engine_step(e, &s, &err);
        if (status == KL_OK) {
            EXPECT(stop_at == 9); /* four layers, polled twice each */
            EXPECT(kl_seq_release(e, seq, &err) == KL_OK);
            break;
        }
        EXPECT(status == KL_ERR_CANCELLED);
        s = (kl_step){.feeds = &next, .n_feeds = 1};
        EXPECT(kl_engine_step(e, &s, &err) == KL_ERR_VALUE);
        EXPECT(kl_seq_length(e, seq, &length, &err) == KL_ERR_VALUE);
        EXPECT(kl_seq_release(e, seq, &err) == KL_OK);
        EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
        EXPECT(memcmp(wanted, got, sizeof wanted) == 0);
    }
    kl_engine_usage(e, &sequences, &pages);
    EXPECT(sequences == 0 && pages == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

static char mark_log[64];

static kl_status log_mark(const char *what, kl_mark *mark)
{
    const size_t n = strlen(mark_log);
    if (n + 2 < sizeof mark_log) memcpy(mark_log + n, what + 2 * (mark != NULL), 2);
    return KL_OK;
}

static kl_status log_set(kl_backend *be, kl_mark *mark, kl_error *err)
{
    (void)err;
    return log_mark("s1s0", mark == (kl_mark *)be ? NULL : mark);
}

static kl_status log_wait(kl_backend *be, kl_mark *mark, kl_error *err)
{
    (void)err;
    return log_mark("w1w0", mark == (kl_mark *)be ? NULL : mark);
}

/* Before layer i is enqueued, layer i - 2 has run: a poll can end a long prompt in time. */
static void the_host_stays_near_a_long_prompt(void)
{
    enum { T = 600 };
    static int32_t ids[T];
    static kl_backend_vtbl table;
    kl_engine_options o = tiny_options;
    kl_backend *be = tiny_backend(1);
    kl_error err = {KL_OK, ""};
    float logits[VOCAB];
    o.max_context = o.step_tokens = T;
    kl_engine *e = tiny_engine_on(be, &o);
    table = *be->vt;
    table.set_mark = log_set;
    table.wait_mark = log_wait;
    be->vt = &table;
    e->marks[0] = (kl_mark *)&table; /* told from the other one, which is the backend itself */
    tiny_ids(ids, T, 8);
    kl_prompt p = {.ids = ids, .n = T, .last_logits = logits};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT_TEXT(mark_log, "s0w1s1w0s0w1s1w0");
    p.n = 511;
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK && strlen(mark_log) == 16);
    kl_engine_free(e);
    kl_backend_close(be);
}

static void captures_are_the_stream_after_a_layer(void)
{
    enum { T = 70, D = 24 };
    static float one[T * D], both[2][T * D], logprobs[T];
    static uint8_t greedy[T];
    int32_t ids[T], targets[T];
    const int64_t layers[] = {3, 0}, last[] = {3};
    float *const out[] = {both[0], both[1]}, *const single[] = {one};
    kl_backend *be = tiny_backend(1);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    tiny_ids(ids, T, 9);
    for (int i = 0; i < T; i++) targets[i] = i == 65 ? ids[0] : -1;
    memset(both, 0xff, sizeof both); /* NaN */
    kl_prompt p = {.ids = ids, .n = T, .layers = layers, .hidden = out, .n_layers = 2};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    p = (kl_prompt){.ids = ids,
                    .n = T,
                    .layers = last,
                    .hidden = single,
                    .n_layers = 1,
                    .targets = targets,
                    .logprobs = logprobs,
                    .greedy = greedy};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT(memcmp(one, both[0], sizeof one) == 0);
    EXPECT(memcmp(both[0], both[1], sizeof one) != 0);
    for (int i = 0; i < T * D; i++) EXPECT(isfinite(both[0][i]) && isfinite(both[1][i]));
    for (int i = 0; i < T; i++) EXPECT(i == 65 ? logprobs[i] < 0.0f : isnan(logprobs[i]));
    kl_engine_free(e);
    kl_backend_close(be);
}

int main(void)
{
    RUN(the_largest_steps_fit_the_plan);
    RUN(wrong_steps_change_nothing);
    RUN(cancelling_breaks_only_the_sequence);
    RUN(the_host_stays_near_a_long_prompt);
    RUN(captures_are_the_stream_after_a_layer);
    return test_failures != 0;
}
