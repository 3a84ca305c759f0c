/*
 * test_recording.c -- token steps from recordings.
 */
#include "recorder.h"

enum { VOCAB = 97, MAX_EVENTS = 512, N_REQUESTS = 5 };

/* ---- whole generations ----------------------------------------------------------------- */

typedef struct {
    int64_t request;
    int32_t id, n_top;
    float logprob, top_logprobs[5];
} outcome;

/* Prompts of different lengths that end at different times; contexts grow past 64 and 128
 * tokens, where the page table doubles. */
static int64_t generate(kl_engine *e, outcome *out)
{
    static int32_t prompts[N_REQUESTS][80];
    static kl_event events[16];
    kl_request requests[N_REQUESTS];
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    int64_t n = 0, count = 0;
    for (int i = 0; i < N_REQUESTS; i++) {
        for (int t = 0; t < 80; t++)
            prompts[i][t] = (int32_t)(kl_rng_uniform(30 + (uint64_t)i, (uint64_t)t) * VOCAB);
        requests[i] = (kl_request){.prompt = prompts[i],
                                   .n_prompt = i == 0 ? 1 : 16 * i,
                                   .max_new_tokens = 30 + 20 * i,
                                   .sampling = {.temperature = i % 2 == 0 ? 0.0f : 0.9f,
                                                .top_p = 1.0f,
                                                .repetition_penalty = i == 3 ? 1.2f : 1.0f,
                                                .seed = 5 + (uint64_t)i},
                                   .top = i};
    }
    EXPECT(kl_generation_new(e, requests, N_REQUESTS, &g, &err) == KL_OK);
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 1000, events, 16, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n && count < MAX_EVENTS; k++) {
            outcome *o = &out[count++];
            memset(o, 0, sizeof *o);
            o->request = events[k].request;
            o->id = events[k].id;
            o->logprob = events[k].logprob;
            o->n_top = events[k].n_top;
            memcpy(o->top_logprobs, events[k].top_logprobs, (size_t)o->n_top * sizeof(float));
        }
    }
    EXPECT_TEXT(err.message, "");
    kl_generation_free(g);
    return count;
}

static void replayed_steps_have_the_bits_of_enqueued_ones(void)
{
    static outcome wanted[MAX_EVENTS], got[MAX_EVENTS];
    kl_backend *plain = tiny_backend(1), *be = open_recording(false);
    kl_engine *a = tiny_engine_on(plain, &tiny_options), *b = tiny_engine_on(be, &tiny_options);
    const int64_t n = generate(a, wanted);
    EXPECT(n == 30 + 50 + 70 + 90 + 110);
    for (int turn = 0; turn < 2; turn++) {
        memset(got, 0xff, sizeof got);
        const int made = n_made, enqueued = n_enqueued;
        EXPECT(generate(b, got) == n && memcmp(wanted, got, (size_t)n * sizeof *got) == 0);
        if (turn == 0) EXPECT(n_made >= 5 && n_made < 30 && n_replayed > 80);
        if (turn == 1) EXPECT(n_made - made <= 5 && n_enqueued - enqueued < enqueued);
    }
    EXPECT(n_freed == 0);
    kl_engine_free(b);
    EXPECT(n_freed == n_made);
    kl_engine_free(a);
    kl_backend_close(plain);
    kl_backend_close(be);
}

/* ---- single steps ---------------------------------------------------------------------- */

typedef struct {
    kl_seq seqs[4];
    kl_feed feeds[4];
    kl_sampling sampling[4];
    int32_t tokens[4], rows[4], ids[4], top_ids[4 * VOCAB];
    float logprobs[4], top_logprobs[4 * VOCAB], logits[4 * VOCAB];
} batch;

static void make_batch(kl_engine *e, batch *b)
{
    kl_error err = {KL_OK, ""};
    memset(b, 0, sizeof *b);
    for (int i = 0; i < 4; i++) {
        EXPECT(kl_seq_new(e, &b->seqs[i], &err) == KL_OK);
        b->tokens[i] = 3 + i;
        b->rows[i] = i;
        b->feeds[i] = (kl_feed){b->seqs[i], &b->tokens[i], 1};
        b->sampling[i] = (kl_sampling){.top_p = 1.0f, .repetition_penalty = 1.0f};
    }
}

static kl_step step_of(batch *b, int n, int top)
{
    return (kl_step){.feeds = b->feeds,
                     .n_feeds = n,
                     .rows = b->rows,
                     .n_rows = n,
                     .sampling = b->sampling,
                     .ids = b->ids,
                     .id_logprobs = b->logprobs,
                     .top = top,
                     .top_ids = b->top_ids,
                     .top_logprobs = b->top_logprobs};
}

/* 80 shapes, each enqueued, recorded and replayed: the oldest make room. */
static void the_table_has_an_end(void)
{
    batch b;
    kl_backend *be = open_recording(false);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    for (int n = 1; n <= 4; n++) {
        make_batch(e, &b);
        for (int top = 0; top < 20; top++)
            for (int turn = 0; turn < 3; turn++) {
                const kl_step s = step_of(&b, n, top);
                const int made = n_made, replayed = n_replayed;
                EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
                EXPECT(n_made - made == (turn == 1) && n_replayed - replayed == (turn > 0));
            }
        for (int i = 0; i < 4; i++) EXPECT(kl_seq_release(e, b.seqs[i], &err) == KL_OK);
    }
    EXPECT(n_made == 80 && n_made - n_freed == KL_MAX_RECORDINGS);
    kl_engine_free(e);
    EXPECT(n_made == n_freed);
    kl_backend_close(be);
}

/* A draw of greedy rows may have other kernels than one that reads how each row is drawn. */
static void rows_that_draw_have_a_shape_of_their_own(void)
{
    batch b;
    kl_backend *be = open_recording(false);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    make_batch(e, &b);
    for (int turn = 0; turn < 6; turn++) {
        const int made = n_made;
        const kl_step s = step_of(&b, 4, 0);
        b.sampling[2].temperature = turn % 2 == 0 ? 0.0f : 1.0f;
        EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
        EXPECT(n_made - made == (turn == 2 || turn == 3));
    }
    kl_engine_free(e);
    kl_backend_close(be);
}

/* Large results go to the caller's memory in between: such steps are never recorded. */
static void logits_and_captures_are_enqueued(void)
{
    static float stream[4 * 24];
    batch b;
    kl_backend *be = open_recording(false);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    const kl_capture capture = {1, stream};
    make_batch(e, &b);
    for (int turn = 0; turn < 4; turn++) {
        kl_step s = step_of(&b, 4, 0);
        s.logits = b.logits;
        EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
        s.logits = NULL;
        s.captures = &capture;
        s.n_captures = 1;
        EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    }
    EXPECT(n_made == 0 && n_replayed == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

static int stop(void *calls)
{
    ++*(int *)calls;
    return 1;
}

/* Whatever goes wrong breaks the step's sequences and nothing else. */
static void failures_leave_a_usable_engine(void)
{
    enum { BEGIN, CALL, END, STOP, N };
    batch b;
    int calls = 0;
    kl_backend *be = open_recording(false);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    make_batch(e, &b);
    for (int kind = 0; kind < N; kind++) {
        const kl_step ok = step_of(&b, 1 + kind, 0);
        kl_step s = ok;
        EXPECT(kl_engine_step(e, &ok, &err) == KL_OK); /* enqueued */
        fail_begin = kind == BEGIN;
        fail_call = kind == CALL ? 7 : 0;
        fail_end = kind == END;
        if (kind == STOP) s.poll = stop, s.poll_ctx = &calls;
        EXPECT(kl_engine_step(e, &s, &err) ==
               (kind == STOP ? KL_ERR_CANCELLED : KL_ERR_DEVICE));
        EXPECT(noting == NULL && n_replayed == 0 && calls == (kind == STOP));
        EXPECT(n_made == n_freed);
        fail_begin = fail_end = false;
        fail_call = 0;
        EXPECT(kl_engine_step(e, &ok, &err) == KL_ERR_VALUE); /* broken */
        for (int i = 0; i < 4; i++) EXPECT(kl_seq_release(e, b.seqs[i], &err) == KL_OK);
        make_batch(e, &b);
    }
    const kl_step s = step_of(&b, 4, 0);
    EXPECT(kl_engine_step(e, &s, &err) == KL_OK);
    EXPECT(n_made == n_freed + 1 && n_replayed == 1);
    kl_engine_free(e);
    EXPECT(n_freed == n_made);
    kl_backend_close(be);
}

int main(void)
{
    RUN(replayed_steps_have_the_bits_of_enqueued_ones);
    RUN(the_table_has_an_end);
    RUN(rows_that_draw_have_a_shape_of_their_own);
    RUN(logits_and_captures_are_enqueued);
    RUN(failures_leave_a_usable_engine);
    return test_failures != 0;
}
