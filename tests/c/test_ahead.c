/*
 * test_ahead.c -- steps of a generation that run while the host looks at those before: the tokens
 * are those of steps one by one, whoever ends, comes or calls in between.
 */
#include "recorder.h"

#include "model/generation.h"
#include "model/prompt.h"

#include <math.h>

enum { VOCAB = 97, MAX_EVENTS = 64, N_KINDS = 6, MOST = 160, N_LIVES = 40 };

/* ---- requests and what they give ------------------------------------------------------- */

typedef struct {
    int64_t n;
    int32_t ids[MOST];
    float logprobs[MOST], last_top[MOST];
    kl_finish end;
    kl_status status;
} story;

static int32_t prompts[N_KINDS][80];
static kl_request kinds[N_KINDS];
static story wanted[N_KINDS];

/* Greedy and drawn, with alternatives or not; contexts grow past 64 and 128 tokens, where the page
 * table doubles. */
static void make_kinds(void)
{
    for (int i = 0; i < N_KINDS; i++) {
        for (int t = 0; t < 80; t++)
            prompts[i][t] = (int32_t)(kl_rng_uniform(50 + (uint64_t)i, (uint64_t)t) * 96);
        kinds[i] = (kl_request){.prompt = prompts[i],
                                .n_prompt = i == 0 ? 1 : 15 * i,
                                .max_new_tokens = 1 + i * i * 6,
                                .sampling = {.temperature = i % 3 == 0 ? 0.0f : 0.9f,
                                             .top_p = 1.0f,
                                             .repetition_penalty = 1.0f,
                                             .seed = 5 + (uint64_t)i},
                                .top = i % 3 == 2 ? 2 * i : 0};
    }
}

static void take_event(story *s, const kl_event *event)
{
    EXPECT(s->end == KL_RUNNING && s->n < MOST);
    s->end = event->finish;
    if (event->finish == KL_FINISH_ERROR) s->status = event->error.status;
    if (event->id < 0) return;
    s->ids[s->n] = event->id;
    s->last_top[s->n] = event->n_top > 0 ? event->top_logprobs[event->n_top - 1] : 0.0f;
    s->logprobs[s->n++] = event->logprob;
}

static kl_status run(kl_generation *g, story *stories, int64_t steps, kl_poll_fn poll,
                     void *ctx)
{
    static kl_event events[MAX_EVENTS];
    kl_error err = {KL_OK, ""};
    int64_t n;
    const kl_status status =
        kl_generation_run(g, steps, events, MAX_EVENTS, &n, NULL, NULL, poll, ctx, &err);
    for (int64_t k = 0; k < n; k++) take_event(&stories[events[k].request], &events[k]);
    return status;
}

static void run_to_end(kl_generation *g, story *stories)
{
    while (!kl_generation_done(g) && test_failed_here == 0)
        EXPECT(run(g, stories, 16, NULL, NULL) == KL_OK);
}

static bool begins_like(const story *got, const story *whole, int64_t n)
{
    const size_t bytes = (size_t)n * sizeof(float);
    return n <= whole->n && got->n == n && memcmp(got->ids, whole->ids, bytes) == 0 &&
           memcmp(got->logprobs, whole->logprobs, bytes) == 0 &&
           memcmp(got->last_top, whole->last_top, bytes) == 0;
}

static kl_generation *begin(kl_engine *e, const kl_request *requests, int64_t n)
{
    kl_generation *g = NULL;
    kl_error err = {KL_OK, ""};
    EXPECT(kl_generation_new(e, requests, n, &g, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    return g;
}

/* Each by itself, on a backend that does at once what it is asked for. */
static void make_wanted(void)
{
    kl_backend *be = tiny_backend(1);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    make_kinds();
    for (int i = 0; i < N_KINDS; i++) {
        kl_generation *g = begin(e, &kinds[i], 1);
        run_to_end(g, &wanted[i]);
        EXPECT(wanted[i].end == KL_FINISH_LENGTH && wanted[i].n == kinds[i].max_new_tokens);
        kl_generation_free(g);
    }
    EXPECT(e->flight_bytes == 0);
    tiny_engine_close(e, be);
}

/* ---- one request ----------------------------------------------------------------------- */

/* All steps but the first of each shape and the last are enqueued behind another. */
static void the_device_never_waits(void)
{
    static story got;
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    memset(&got, 0, sizeof got);
    kl_generation *g = begin(e, &kinds[5], 1);
    run_to_end(g, &got);
    EXPECT(begins_like(&got, &wanted[5], kinds[5].max_new_tokens));
    EXPECT(got.end == KL_FINISH_LENGTH && e->n_flights == 0);
    EXPECT(n_overlapped >= kinds[5].max_new_tokens - 8 && n_overlapped < n_replayed);
    EXPECT(e->n_passes == 2 + (uint64_t)kinds[5].max_new_tokens - 1); /* none for nothing */
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

/* At each of its tokens, for the host can know none of these ends before it sees the token. */
static void a_stop_token_ends_it(void)
{
    static story got;
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    const story *whole = &wanted[4];
    for (int64_t k = 0; k < 20; k++) {
        int64_t first = 0;
        while (whole->ids[first] != whole->ids[k]) first++;
        kl_request r = kinds[4];
        r.stop_ids = &whole->ids[k];
        r.n_stop_ids = 1;
        memset(&got, 0, sizeof got);
        kl_generation *g = begin(e, &r, 1);
        run_to_end(g, &got);
        EXPECT(begins_like(&got, whole, first + 1) && got.end == KL_FINISH_STOP);
        EXPECT(e->n_flights == 0);
        kl_generation_free(g);
    }
    EXPECT(n_overlapped > 20);
    tiny_engine_close(e, be);
}

/* A sequence that stays the caller's has read all tokens but the last, and goes on as it would
 * have. */
static void a_callers_sequence_reads_no_more(void)
{
    static story got[2];
    kl_backend *bes[2] = {tiny_backend(1), open_recording(true)};
    kl_error err = {KL_OK, ""};
    for (int i = 0; i < 2; i++) {
        kl_engine *e = tiny_engine_on(bes[i], &tiny_options);
        kl_seq seq;
        int64_t length;
        kl_request r = kinds[4];
        EXPECT(kl_seq_new(e, &seq, &err) == KL_OK);
        r.seq = seq;
        r.in_place = true;
        r.stop_ids = &wanted[4].ids[9];
        r.n_stop_ids = 1;
        memset(&got[i], 0, sizeof got[i]);
        for (int turn = 0; turn < 2; turn++) {
            kl_generation *g = begin(e, &r, 1);
            run_to_end(g, &got[i]);
            EXPECT(kl_seq_length(e, seq, &length, &err) == KL_OK);
            EXPECT(length == (turn + 1) * r.n_prompt + got[i].n - turn - 1);
            got[i].end = KL_RUNNING;
            kl_generation_free(g);
        }
        EXPECT(kl_seq_release(e, seq, &err) == KL_OK);
        tiny_engine_close(e, bes[i]);
    }
    EXPECT(got[0].n > 10 && begins_like(&got[1], &got[0], got[0].n) && n_overlapped == 0);
}

/* ---- many ------------------------------------------------------------------------------ */

static int64_t draw(uint64_t *index, int64_t low, int64_t high)
{
    return low + (int64_t)(kl_rng_uniform(77, (*index)++) * (double)(high - low + 1));
}

/* At most a step late. */
static void those_who_come_are_let_in(void)
{
    static story got[2];
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    int64_t id;
    memset(got, 0, sizeof got);
    kl_generation *g = begin(e, &kinds[5], 1);
    EXPECT(run(g, got, 9, NULL, NULL) == KL_OK && e->n_flights == 1);
    EXPECT(kl_generation_submit(g, &kinds[3], &id, &err) == KL_OK);
    EXPECT(run(g, got, 2, NULL, NULL) == KL_OK && got[1].n == 1);
    run_to_end(g, got);
    EXPECT(begins_like(&got[0], &wanted[5], kinds[5].max_new_tokens));
    EXPECT(begins_like(&got[1], &wanted[3], kinds[3].max_new_tokens));
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

/* Requests join, end by length, by a stop token and by the caller, wait for a place; meanwhile
 * others use the same memory. */
static void requests_come_and_go(void)
{
    static story stories[N_LIVES], other;
    static int kind[N_LIVES];
    static bool unwanted[N_LIVES];
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_generation *g = begin(e, NULL, 0);
    kl_error err = {KL_OK, ""};
    uint64_t index = 0;
    int64_t n = 0, id;
    memset(stories, 0, sizeof stories);
    while ((n < N_LIVES || !kl_generation_done(g)) && test_failed_here == 0) {
        for (int64_t more = draw(&index, 0, 4) - 2; more > 0 && n < N_LIVES; more--, n++) {
            kind[n] = (int)draw(&index, 0, N_KINDS - 1);
            kl_request r = kinds[kind[n]];
            r.stop_ids = &wanted[kind[n]].ids[r.max_new_tokens / 2];
            r.n_stop_ids = n % 3 == 0;
            EXPECT(kl_generation_submit(g, &r, &id, &err) == KL_OK && id == n);
        }
        EXPECT(run(g, stories, draw(&index, 1, 9), NULL, NULL) == KL_OK);
        if (n > 0 && draw(&index, 0, 5) == 0) {
            const int64_t i = draw(&index, 0, n - 1);
            unwanted[i] = unwanted[i] || stories[i].end == KL_RUNNING;
            EXPECT(kl_generation_finish(g, i, &err) == KL_OK);
        }
        if (e->cache.n_alive < 4 && draw(&index, 0, 3) == 0) {
            const int k = (int)draw(&index, 0, 3);
            kl_generation *h = begin(e, &kinds[k], 1);
            memset(&other, 0, sizeof other);
            run_to_end(h, &other);
            EXPECT(begins_like(&other, &wanted[k], kinds[k].max_new_tokens));
            kl_generation_free(h);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        EXPECT(begins_like(&stories[i], &wanted[kind[i]], stories[i].n));
        EXPECT(stories[i].end != KL_FINISH_ERROR && (unwanted[i] || stories[i].end != 0));
        if (stories[i].end == KL_FINISH_LENGTH)
            EXPECT(stories[i].n == kinds[kind[i]].max_new_tokens);
    }
    EXPECT(n_overlapped > 100);
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

/* Two generations in turns, and prompts between their steps: each has its tokens. */
static void others_use_the_engine(void)
{
    static story got[2];
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    kl_generation *g[2];
    memset(got, 0, sizeof got);
    for (int i = 0; i < 2; i++) g[i] = begin(e, &kinds[4 + i], 1);
    for (int turn = 0; !kl_generation_done(g[0]) || !kl_generation_done(g[1]); turn++) {
        for (int i = 0; i < 2; i++) EXPECT(run(g[i], &got[i], 1 + turn % 3, NULL, NULL) == 0);
        if (turn % 4 != 0) continue;
        const kl_prompt p = {.ids = prompts[turn % N_KINDS], .n = 1 + turn % 7};
        EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    }
    for (int i = 0; i < 2; i++) {
        EXPECT(begins_like(&got[i], &wanted[4 + i], kinds[4 + i].max_new_tokens));
        kl_generation_free(g[i]);
    }
    EXPECT(n_overlapped > 30);
    tiny_engine_close(e, be);
}

/* Left in the middle, with a step under way: what comes after has the same memory. */
static void a_generation_can_be_left(void)
{
    static story got;
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    for (int i = 0; i < 12; i++) {
        memset(&got, 0, sizeof got);
        kl_generation *g = begin(e, &kinds[3 + i % 3], 1);
        EXPECT(run(g, &got, 3 + i, NULL, NULL) == KL_OK && e->n_flights == 1);
        EXPECT(got.n >= 2 + i && begins_like(&got, &wanted[3 + i % 3], got.n));
        kl_generation_free(g);
        EXPECT(e->n_flights == 0);
    }
    tiny_engine_close(e, be);
}

/* And then another one runs ahead at once, in the same host memory. */
static void a_left_step_harms_nobody(void)
{
    static story got[2];
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    memset(got, 0, sizeof got);
    kl_generation *first = begin(e, &kinds[3], 1), *second = begin(e, &kinds[5], 1);
    EXPECT(run(second, &got[1], 2, NULL, NULL) == KL_OK && e->n_flights == 0);
    EXPECT(run(first, &got[0], 8, NULL, NULL) == KL_OK && e->n_flights == 1);
    kl_generation_free(first);
    run_to_end(second, &got[1]);
    EXPECT(begins_like(&got[1], &wanted[5], kinds[5].max_new_tokens));
    kl_generation_free(second);
    tiny_engine_close(e, be);
}

/* ---- what goes wrong ------------------------------------------------------------------- */

/* Its host blocks are those of the largest step ahead, to the byte: no other is let in. */
static void only_token_steps_fly(void)
{
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_pass_inputs in;
    kl_pass_outputs out;
    const kl_pass_shape largest = {.T = 4, .N = 4, .B = 4, .R = 4, .sampling = true, .top = 97};
    EXPECT(e->flight_bytes == kl_pass_layout_inputs(&in, &largest, VOCAB, NULL) +
                                  kl_pass_layout_outputs(&out, &largest, NULL));

    int32_t ids[2], seen[2 * 4] = {0}, tokens[2] = {1, 2}, rows[2] = {0, 1};
    float logprobs[2];
    kl_sampling greedy[2] = {{.top_p = 1.0f, .repetition_penalty = 1.0f}};
    kl_error err = {KL_OK, ""};
    kl_feed feed = {0, tokens, 1};
    greedy[1] = greedy[0];
    EXPECT(kl_seq_new(e, &feed.seq, &err) == KL_OK);
    kl_step s = {.feeds = &feed,
                 .rows = rows,
                 .n_feeds = 1,
                 .n_rows = 1,
                 .sampling = greedy,
                 .seen = seen,
                 .ids = ids,
                 .id_logprobs = logprobs};
    EXPECT(kl_engine_launch(e, &s, false, &err) == KL_ERR_VALUE);
    EXPECT(strstr(err.message, "got 1 tokens and 1 rows with ids seen") != NULL);
    s.seen = NULL;
    s.n_rows = feed.n_tokens = 2;
    EXPECT(kl_engine_launch(e, &s, false, &err) == KL_ERR_VALUE);
    EXPECT(strstr(err.message, "got 2 tokens and 2 rows") != NULL && e->n_flights == 0);
    s.n_rows = feed.n_tokens = 1;
    EXPECT(kl_engine_launch(e, &s, false, &err) == KL_OK && e->n_flights == 1);
    EXPECT(kl_engine_land(e, &s, &err) == KL_OK);
    EXPECT(kl_seq_release(e, feed.seq, &err) == KL_OK);
    tiny_engine_close(e, be);
}

/* The place of a token that one kind draws and no other has. */
static int64_t own_token(int k)
{
    for (int64_t at = 2; at < wanted[k].n - 2; at++) {
        bool own = true;
        for (int i = 0; i < N_KINDS; i++) {
            for (int64_t t = 0; t < kinds[i].n_prompt; t++)
                own = own && prompts[i][t] != wanted[k].ids[at];
            for (int64_t t = 0; t < wanted[i].n; t++)
                own = own && ((i == k && t == at) || wanted[i].ids[t] != wanted[k].ids[at]);
        }
        if (own) return at;
    }
    return -1;
}

/* Its logits are not finite, and the step that is ahead feeds what is no token. */
static void what_cannot_be_drawn_is_fed(void)
{
    static story got[2];
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    int k = N_KINDS - 1;
    while (k >= 0 && own_token(k) < 0) k--;
    EXPECT(k > 1);
    const int64_t at = own_token(k);
    const kl_request r[2] = {kinds[k], kinds[k == 3 ? 4 : 3]};
    ((float *)e->weights.embedding.data)[wanted[k].ids[at] * 24 + 5] = NAN;
    memset(got, 0, sizeof got);
    kl_generation *g = begin(e, r, 2);
    run_to_end(g, got);
    EXPECT(begins_like(&got[0], &wanted[k], at + 1) && got[0].end == KL_FINISH_ERROR);
    EXPECT(got[0].status == KL_ERR_NUMERICAL);
    EXPECT(begins_like(&got[1], &wanted[k == 3 ? 4 : 3], r[1].max_new_tokens));
    EXPECT(n_overlapped > 10);
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

static int stop_at(void *left)
{
    return --*(int *)left == 0;
}

/* Of a step that fails or is stopped, all end that are in it; those who wait go on. The one under
 * way before it has its tokens. */
static void a_failed_step_ends_its_requests(void)
{
    static story got[6];
    kl_backend *be = open_recording(true);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    for (int kind = 0; kind < 8; kind++) {
        const kl_request r[6] = {kinds[5], kinds[4], kinds[5], kinds[4], kinds[3], kinds[2]};
        int left = 70 + kind;
        int64_t failed = 0;
        kl_status status = KL_OK;
        memset(got, 0, sizeof got);
        kl_generation *g = begin(e, r, 6);
        fail_replay = kind % 2 == 0 ? 3 + kind : 0;
        while (!kl_generation_done(g) && test_failed_here == 0) {
            const kl_status s = run(g, got, 5, kind % 2 == 1 ? stop_at : NULL, &left);
            if (s != KL_OK) status = s;
        }
        EXPECT(status == (kind % 2 == 1 ? KL_ERR_CANCELLED : KL_OK));
        for (int i = 0; i < 6; i++) {
            const int k = (int)((r[i].n_prompt) / 15);
            const kl_status why = kind % 2 == 1 ? KL_ERR_CANCELLED : KL_ERR_DEVICE;
            failed += got[i].end == KL_FINISH_ERROR;
            EXPECT(begins_like(&got[i], &wanted[k], got[i].n) && got[i].end != KL_RUNNING);
            if (got[i].end == KL_FINISH_ERROR) EXPECT(got[i].status == why);
        }
        EXPECT(failed > 0 && failed <= 4 && e->n_flights == 0);
        kl_generation_free(g);
    }
    tiny_engine_close(e, be);
}

int main(void)
{
    make_wanted();
    RUN(the_device_never_waits);
    RUN(a_stop_token_ends_it);
    RUN(a_callers_sequence_reads_no_more);
    RUN(those_who_come_are_let_in);
    RUN(requests_come_and_go);
    RUN(others_use_the_engine);
    RUN(a_generation_can_be_left);
    RUN(a_left_step_harms_nobody);
    RUN(only_token_steps_fly);
    RUN(what_cannot_be_drawn_is_fed);
    RUN(a_failed_step_ends_its_requests);
    return test_failures != 0;
}
