/*
 * test_state.c -- sequences that a caller keeps: images, drafts, and requests that continue one.
 */
#include "test.h"

#include "base/memory.h"
#include "model/engine_struct.h"
#include "model/prompt.h"
#include "tiny_model.h"

#include <math.h>

enum { VOCAB = 97, LENGTH = 150, MAX_EVENTS = 64 };

static int32_t ids[LENGTH];

static kl_engine *open_engine(kl_backend **be, int64_t max_batch)
{
    kl_engine_options o = tiny_options;
    o.max_batch = max_batch;
    for (int i = 0; i < LENGTH; i++) ids[i] = (int32_t)(kl_rng_uniform(3, (uint64_t)i) * VOCAB);
    return tiny_engine(be, &o);
}

static void close_engine(kl_engine *e, kl_backend *be, int64_t still_alive)
{
    int64_t sequences, pages;
    kl_engine_usage(e, &sequences, &pages);
    EXPECT(sequences == still_alive);
    kl_engine_free(e);
    kl_backend_close(be);
}

static void feed(kl_engine *e, kl_seq seq, int64_t n, float *logits)
{
    kl_error err = {KL_OK, ""};
    const kl_prompt p = {.seq = seq, .ids = ids, .n = n, .last_logits = logits};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
}

static kl_seq fed(kl_engine *e, int64_t n, float *logits)
{
    kl_error err;
    kl_seq seq = 0;
    EXPECT(kl_seq_new(e, &seq, &err) == KL_OK);
    feed(e, seq, n, logits);
    return seq;
}

/* In parts of any size, into pages that held NaN: the copy goes on as the original does. */
static void images_are_whole(void)
{
    static const size_t parts[] = {1, 7, 1000, 100000};
    kl_backend *be;
    kl_engine *e = open_engine(&be, 3);
    kl_error err = {KL_OK, ""};
    float want[VOCAB], got[VOCAB];
    kl_seq a = fed(e, LENGTH - 1, want), b;
    const uint64_t bytes = kl_seq_image_bytes(e, LENGTH - 1);
    unsigned char *image = kl_malloc(bytes), *again = kl_malloc(bytes);
    for (size_t k = 0; k < 4; k++) {
        const size_t part = parts[k];
        for (uint64_t at = 0; at < bytes; at += part)
            EXPECT(kl_seq_read_image(e, a, at, image + at,
                                     (size_t)(bytes - at < part ? bytes - at : part),
                                     &err) == KL_OK);
        EXPECT(kl_seq_restore(e, LENGTH - 1, &b, &err) == KL_OK);
        for (uint64_t at = 0; at < bytes; at += part)
            EXPECT(kl_seq_write_image(e, b, at, image + at,
                                      (size_t)(bytes - at < part ? bytes - at : part),
                                      &err) == KL_OK);
        EXPECT(kl_seq_read_image(e, b, 0, again, bytes, &err) == KL_OK);
        EXPECT(memcmp(image, again, bytes) == 0);
        kl_seq c = 0;
        EXPECT(kl_seq_fork(e, a, &c, &err) == KL_OK);
        feed(e, c, 20, want);
        feed(e, b, 20, got);
        EXPECT(memcmp(want, got, sizeof want) == 0 && isfinite(got[5]));
        EXPECT(kl_seq_release(e, b, &err) == KL_OK && kl_seq_release(e, c, &err) == KL_OK);
    }
    EXPECT(kl_seq_read_image(e, a, bytes - 1, image, 2, &err) == KL_ERR_VALUE);
    EXPECT(kl_seq_read_image(e, a, UINT64_MAX, image, 2, &err) == KL_ERR_VALUE);
    EXPECT(kl_seq_fork(e, a, &b, &err) == KL_OK);
    EXPECT(kl_seq_write_image(e, b, 0, image, 1, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "sequence: 3 of its pages are shared, it cannot be written");
    kl_free(image);
    kl_free(again);
    close_engine(e, be, 2);
}

/* A copy where there is room for it and what it will grow by, else the sequence itself. */
static void drafts_need_room(void)
{
    kl_backend *be;
    kl_engine *e = open_engine(&be, 2);
    kl_error err = {KL_OK, ""};
    kl_seq a = fed(e, 10, NULL), draft = 0, other = 0;
    EXPECT(kl_seq_draft(e, a, 20, &draft, &err) == KL_OK && draft != a);
    EXPECT(kl_seq_draft(e, a, 20, &other, &err) == KL_OK && other == a); /* no slot */
    EXPECT(kl_seq_release(e, draft, &err) == KL_OK);
    EXPECT(kl_seq_draft(e, a, 1000, &draft, &err) == KL_OK && draft == a);
    EXPECT(kl_cache_reserve(&e->cache, a, 256, &err) == KL_OK); /* 3 of 7 pages */
    EXPECT(kl_seq_draft(e, a, 246, &draft, &err) == KL_OK && draft != a);
    EXPECT(kl_seq_release(e, draft, &err) == KL_OK);
    e->cache.n_reserved += 1; /* somebody else's */
    EXPECT(kl_seq_draft(e, a, 246, &draft, &err) == KL_OK && draft == a);
    EXPECT(kl_seq_draft(e, draft + 2, 1, &draft, &err) == KL_ERR_VALUE);
    close_engine(e, be, 1);
}

/* ---- requests -------------------------------------------------------------------------- */

static kl_status run(kl_engine *e, const kl_request *r, int64_t n, int32_t *out, kl_error *err)
{
    static kl_event events[MAX_EVENTS];
    int64_t n_out = 0, n_events;
    kl_generation *g;
    KL_TRY(kl_generation_new(e, r, n, &g, err));
    kl_status status = KL_OK;
    while (status == KL_OK && !kl_generation_done(g)) {
        status =
            kl_generation_run(g, 2, events, MAX_EVENTS, &n_events, NULL, NULL, NULL, NULL, err);
        for (int64_t k = 0; k < n_events; k++) {
            if (events[k].request == 0 && events[k].id >= 0) out[n_out++] = events[k].id;
            if (events[k].finish != KL_FINISH_ERROR) continue;
            *err = events[k].error;
            status = err->status;
        }
    }
    kl_generation_free(g);
    return status;
}

static void requests_continue_sequences(void)
{
    kl_backend *be;
    kl_engine *e = open_engine(&be, 2);
    kl_error err = {KL_OK, ""};
    float logits[VOCAB];
    int32_t want[8], got[8];
    int64_t length;
    kl_request r = {
        .prompt = ids,
        .n_prompt = 64 + 30,
        .max_new_tokens = 8,
        .sampling = {
            .temperature = 0.8f, .top_p = 1.0f, .repetition_penalty = 1.3f, .seed = 5}};
    EXPECT(run(e, &r, 1, want, &err) == KL_OK);

    kl_seq a = fed(e, 64, NULL);
    r.seq = a;
    r.n_history = 64;
    EXPECT(run(e, &r, 1, got, &err) == KL_OK && memcmp(want, got, sizeof want) == 0);
    EXPECT(kl_seq_length(e, a, &length, &err) == KL_OK && length == 64);

    kl_seq b = fed(e, 94, logits); /* no sequence is free now */
    EXPECT(run(e, &r, 1, got, &err) == KL_ERR_MEMORY);
    r.seq = b;
    r.n_history = 94;
    r.in_place = true;
    EXPECT(run(e, &r, 1, got, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message,
                "generate: request 0: the prompt must have a token or more, got none");
    r.logits = logits;
    EXPECT(run(e, &r, 1, got, &err) == KL_OK && memcmp(want, got, sizeof want) == 0);
    EXPECT(kl_seq_length(e, b, &length, &err) == KL_OK && length == 94 + 7);
    EXPECT(e->cache.n_reserved == 0);
    close_engine(e, be, 2);
}

/* Ended early, a request in place keeps no promise that its sequence does not need. */
static void promises_are_given_back(void)
{
    kl_backend *be;
    kl_engine *e = open_engine(&be, 1);
    kl_error err = {KL_OK, ""};
    kl_event events[MAX_EVENTS];
    int64_t n;
    kl_generation *g;
    const kl_request r = {.prompt = ids,
                          .n_prompt = 1,
                          .max_new_tokens = 200,
                          .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f},
                          .seq = fed(e, 10, NULL),
                          .in_place = true};
    for (int by_free = 0; by_free < 2; by_free++) {
        EXPECT(kl_generation_new(e, &r, 1, &g, &err) == KL_OK);
        EXPECT(e->cache.n_reserved > 0);
        EXPECT(kl_generation_run(g, 3, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        if (by_free == 0) EXPECT(kl_generation_finish(g, 0, &err) == KL_OK);
        if (by_free == 0) EXPECT(e->cache.n_reserved == 0);
        kl_generation_free(g);
        EXPECT(e->cache.n_reserved == 0 && e->cache.n_alive == 1);
    }
    close_engine(e, be, 1);
}

static void requests_on_sequences_are_checked(void)
{
    kl_backend *be;
    kl_engine *e = open_engine(&be, 3);
    kl_error err = {KL_OK, ""};
    kl_event events[MAX_EVENTS];
    int32_t out[8];
    int64_t n;
    kl_generation *g;
    kl_seq a = fed(e, 100, NULL);
    const kl_request good = {.prompt = ids,
                             .n_prompt = 20,
                             .max_new_tokens = 4,
                             .sampling = {.top_p = 1.0f, .repetition_penalty = 1.0f},
                             .seq = a};
    kl_request r = good;
    r.n_history = 99;
    r.n_prompt = 110;
    EXPECT(run(e, &r, 1, out, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "generate: request 0: the history must be 0 or the sequence's 100 "
                             "tokens, got 99 of 110");
    r = good;
    r.max_new_tokens = 137;
    EXPECT(run(e, &r, 1, out, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "generate: request 0: 120 prompt tokens and max_new_tokens 137 "
                             "must be at most 256 together (max_context)");
    r = good;
    r.seq = a + 5;
    EXPECT(run(e, &r, 1, out, &err) == KL_ERR_VALUE);

    /* Fed between two runs: a waiting request would go on from something else. */
    const kl_request both[] = {good, good, good};
    EXPECT(kl_generation_new(e, both, 3, &g, &err) == KL_OK);
    EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
           KL_OK);
    feed(e, a, 1, NULL);
    int ended[3] = {0};
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n; k++) {
            if (events[k].finish != KL_RUNNING)
                ended[events[k].request] = (int)events[k].finish;
            if (events[k].finish == KL_FINISH_ERROR)
                EXPECT_TEXT(events[k].error.message,
                            "generate: request 2: the sequence it continues has changed since");
        }
    }
    EXPECT(ended[0] == KL_FINISH_LENGTH && ended[1] == KL_FINISH_LENGTH);
    EXPECT(ended[2] == KL_FINISH_ERROR);
    kl_generation_free(g);
    close_engine(e, be, 1);
}

int main(void)
{
    RUN(images_are_whole);
    RUN(drafts_need_room);
    RUN(requests_continue_sequences);
    RUN(promises_are_given_back);
    RUN(requests_on_sequences_are_checked);
    return test_failures != 0;
}
