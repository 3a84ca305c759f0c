/*
 * test_generation.c -- requests that join a generation while it runs: each gets the tokens it
 * gets alone, what befalls one befalls no other, and nothing of those that ended is kept.
 */
#include "test.h"

#include "base/memory.h"
#include "model/generation.h"
#include "model/prompt.h"
#include "tiny_model.h"

#include <math.h>

enum { VOCAB = 97, MAX_EVENTS = 16, LONGEST = 200, N_KINDS = 9, MOST = 24 };

static kl_engine *open_engine(kl_backend **be, int64_t max_batch, int64_t step_tokens)
{
    kl_engine_options o = tiny_options;
    o.max_batch = max_batch;
    o.step_tokens = step_tokens;
    return tiny_engine(be, &o);
}

/* ---- requests and what they give ------------------------------------------------------- */

static int32_t prompts[N_KINDS][LONGEST];
static kl_request kinds[N_KINDS];
static int32_t wanted[N_KINDS][MOST];

/* Greedy and drawn, short and over several steps, with penalties and with alternatives. */
static void make_kinds(void)
{
    static const int64_t lengths[N_KINDS] = {1, 150, 17, 64, 65, 3, LONGEST, 40, 5};
    for (int i = 0; i < N_KINDS; i++) {
        for (int64_t t = 0; t < lengths[i]; t++)
            prompts[i][t] = (int32_t)(kl_rng_uniform(40 + (uint64_t)i, (uint64_t)t) * 96);
        kinds[i] = (kl_request){.prompt = prompts[i],
                                .n_prompt = lengths[i],
                                .max_new_tokens = 2 + (5 * i) % (MOST - 2),
                                .sampling = {.temperature = i % 3 == 0 ? 0.0f : 0.8f,
                                             .top_p = 1.0f,
                                             .repetition_penalty = i % 4 == 2 ? 1.3f : 1.0f,
                                             .seed = 11 + (uint64_t)i},
                                .top = i % 5 == 3 ? 4 * i : 0};
    }
    kinds[8].max_new_tokens = 0;
}

/* The tokens of one request by itself. */
static void alone(kl_engine *e, const kl_request *r, int32_t *out)
{
    static kl_event events[MAX_EVENTS];
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    int64_t n, n_out = 0;
    EXPECT(kl_generation_new(e, r, 1, &g, &err) == KL_OK);
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 9, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n; k++)
            if (events[k].id >= 0) out[n_out++] = events[k].id;
    }
    EXPECT(n_out == r->max_new_tokens);
    kl_generation_free(g);
}

static void make_wanted(void)
{
    kl_backend *be;
    kl_engine *e = open_engine(&be, 1, 64);
    make_kinds();
    for (int i = 0; i < N_KINDS; i++) alone(e, &kinds[i], wanted[i]);
    tiny_engine_close(e, be);
}

/* ---- many of them, coming and going ---------------------------------------------------- */

enum { N_LIVES = 200 };

typedef struct {
    int kind;
    int64_t n_out, n_after;
    bool over, unwanted;
} life;

static void take_event(life *lives, const kl_event *event)
{
    life *l = &lives[event->request];
    EXPECT(!l->over && event->finish != KL_FINISH_ERROR);
    EXPECT(!l->unwanted || l->n_after++ == 0); /* drawn before it was ended */
    if (event->id >= 0)
        EXPECT(event->id == wanted[l->kind][l->n_out++] && event->n_top == kinds[l->kind].top);
    l->over = event->finish != KL_RUNNING;
    if (l->over) EXPECT(l->n_out == kinds[l->kind].max_new_tokens);
}

static void run_some(kl_generation *g, life *lives, int64_t steps, int64_t max_events)
{
    static kl_event events[MAX_EVENTS];
    kl_error err = {KL_OK, ""};
    int64_t n;
    EXPECT(kl_generation_run(g, steps, events, max_events, &n, NULL, NULL, NULL, NULL, &err) ==
           KL_OK);
    for (int64_t k = 0; k < n; k++) take_event(lives, &events[k]);
}

static int64_t draw(uint64_t *index, int64_t low, int64_t high)
{
    return low + (int64_t)(kl_rng_uniform(99, (*index)++) * (double)(high - low + 1));
}

/* Ended before it began, while it waits, while it runs or long after; all are fine. */
static void end_some(kl_generation *g, life *lives, int64_t n, uint64_t *index)
{
    kl_error err = {KL_OK, ""};
    if (n == 0 || draw(index, 0, 9) > 1) return;
    const int64_t i = n - 1 - draw(index, 0, n < 20 ? n - 1 : 20);
    lives[i].unwanted = lives[i].unwanted || !lives[i].over;
    EXPECT(kl_generation_finish(g, i, &err) == KL_OK);
}

static void requests_come_and_go(void)
{
    static life lives[N_LIVES];
    static const struct {
        int64_t max_batch, step_tokens;
    } ways[] = {{4, 64}, {3, 128}, {6, 256}};
    kl_error err = {KL_OK, ""};
    kl_generation_stats stats;
    for (int w = 0; w < 3 && test_failed_here == 0; w++) {
        kl_backend *be;
        kl_engine *e = open_engine(&be, ways[w].max_batch, ways[w].step_tokens);
        kl_generation *g;
        int64_t n = 0, id;
        uint64_t index = 0;
        memset(lives, 0, sizeof lives);
        EXPECT(kl_generation_new(e, NULL, 0, &g, &err) == KL_OK && kl_generation_done(g));
        while ((n < N_LIVES || !kl_generation_done(g)) && test_failed_here == 0) {
            for (int64_t more = draw(&index, 0, 5) - 2; more > 0 && n < N_LIVES; more--) {
                lives[n].kind = (int)draw(&index, 0, N_KINDS - 1);
                EXPECT(kl_generation_submit(g, &kinds[lives[n].kind], &id, &err) == KL_OK);
                EXPECT(id == n++);
            }
            run_some(g, lives, draw(&index, 1, 3), draw(&index, 1, MAX_EVENTS));
            end_some(g, lives, n, &index);
            EXPECT(g->n_running <= ways[w].max_batch && g->n_waiting <= N_LIVES);
        }
        for (int64_t i = 0; i < n; i++) EXPECT(lives[i].over || lives[i].unwanted);
        kl_generation_sweep(g);
        EXPECT(g->n_running == 0 && g->first == NULL && g->n_waiting == 0);
        kl_generation_get_stats(g, &stats);
        EXPECT(stats.running == 0 && stats.waiting == 0);
        EXPECT(kl_generation_finish(g, n, &err) == KL_ERR_VALUE);
        EXPECT_TEXT(err.message, "generate: request must be in [0, 200), got 200");
        kl_generation_free(g);
        tiny_engine_close(e, be);
    }
}

/* While a prompt of many steps is read, whoever generates gets a token in each of them, and a
 * short prompt that comes later is read at once. */
static void a_long_prompt_holds_up_nobody(void)
{
    static kl_event events[MAX_EVENTS];
    kl_backend *be;
    kl_engine *e = open_engine(&be, 4, 128);
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    int64_t id, n, tokens[3] = {0};
    kl_request first = kinds[0], second = kinds[6], third = kinds[5];
    first.max_new_tokens = 50;
    EXPECT(kl_generation_new(e, &first, 1, &g, &err) == KL_OK);
    EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
           KL_OK);
    EXPECT(n == 1);
    EXPECT(kl_generation_submit(g, &second, &id, &err) == KL_OK && id == 1);
    EXPECT(kl_generation_submit(g, &third, &id, &err) == KL_OK && id == 2);
    for (int step = 0; step < 3; step++) {
        EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n; k++) tokens[events[k].request]++;
        EXPECT(tokens[0] == step + 1 && tokens[2] == step + 1);
        EXPECT(tokens[1] == (step == 2)); /* 200 tokens: 64, 64 and 72 beside the others */
    }
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

/* ---- what befalls one ------------------------------------------------------------------ */

static kl_seq fed(kl_engine *e, const int32_t *tokens, int64_t n)
{
    kl_error err = {KL_OK, ""};
    kl_seq seq = 0;
    EXPECT(kl_seq_new(e, &seq, &err) == KL_OK);
    const kl_prompt p = {.seq = seq, .ids = tokens, .n = n};
    EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
    return seq;
}

enum { NAN_ID = 96, N_FATES = 7 };

/* In one generation: a prompt with a NaN, sequences that are fed or released under those that
 * continue them, on forks and in place, and others, who must not notice. */
static void failures_are_alone(void)
{
    static const char *const ends[N_FATES] = {
        "generate: request 0: the sequence it continues has changed since",
        "generate: request 1: the sequence it continues has changed since",
        "generate: request 2: logits after 17 tokens must be finite",
        NULL,
        "generate: request 4: the sequence it continues has changed since",
        NULL,
        NULL};
    static kl_event events[MAX_EVENTS];
    kl_backend *be;
    kl_engine *e = open_engine(&be, 5, 64);
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    int64_t id, n, n_out[N_FATES] = {0};
    bool over[N_FATES] = {false}, failed[N_FATES] = {false};
    int32_t bad[17];
    memcpy(bad, prompts[2], sizeof bad);
    bad[9] = NAN_ID;
    ((float *)e->weights.embedding.data)[NAN_ID * 24 + 5] = NAN;

    kl_seq a = fed(e, prompts[3], 10), b = fed(e, prompts[3], 20), c = fed(e, prompts[3], 30);
    kl_request r[N_FATES] = {kinds[7], kinds[7], kinds[2], kinds[4],
                             kinds[7], kinds[1], kinds[0]};
    r[0].seq = a;
    r[1].seq = b;
    r[0].in_place = r[1].in_place = true;
    r[2].prompt = bad;
    r[4].seq = c;
    EXPECT(kl_generation_new(e, r, 2, &g, &err) == KL_OK);
    EXPECT(kl_generation_submit(g, &r[0], &id, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "generate: request 2: request 0 continues the same sequence");
    for (int i = 2; i < N_FATES; i++)
        EXPECT(kl_generation_submit(g, &r[i], &id, &err) == KL_OK && id == i);

    for (int turn = 0; !kl_generation_done(g) && turn < 100; turn++) {
        EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = events[k].request;
            EXPECT(!over[i]);
            over[i] = events[k].finish != KL_RUNNING;
            failed[i] = events[k].finish == KL_FINISH_ERROR;
            if (events[k].finish == KL_FINISH_ERROR)
                EXPECT_TEXT(events[k].error.message, ends[i] == NULL ? "none" : ends[i]);
            else if (i == 3 || i == 5 || i == 6)
                EXPECT(events[k].id == wanted[i == 3 ? 4 : i == 5 ? 1 : 0][n_out[i]++]);
        }
        if (turn == 0) { /* 0 is fed and 1 released; 4 still waits for a sequence */
            const kl_prompt p = {.seq = a, .ids = prompts[0], .n = 1};
            EXPECT(kl_engine_prompt(e, &p, &err) == KL_OK);
            EXPECT(kl_seq_release(e, b, &err) == KL_OK);
            EXPECT(kl_seq_release(e, c, &err) == KL_OK);
        }
    }
    for (int i = 0; i < N_FATES; i++) EXPECT(over[i] && failed[i] == (ends[i] != NULL));
    EXPECT(n_out[3] == r[3].max_new_tokens && n_out[5] == r[5].max_new_tokens);
    EXPECT(kl_seq_release(e, a, &err) == KL_OK);
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

/* A sequence that is continued in place, is forked meanwhile, and needs a page more for that, when
 * none is left: this request ends, and the one beside it has its tokens. */
static void a_fork_harms_nobody_else(void)
{
    static kl_event events[MAX_EVENTS];
    kl_backend *be;
    kl_engine *e = open_engine(&be, 4, 64);
    kl_generation *g;
    kl_seq fork, other;
    kl_error err = {KL_OK, ""};
    int64_t n, n_out = 0, n_failed = 0;
    kl_request r[2] = {kinds[7], kinds[7]};
    const kl_seq a = fed(e, prompts[3], 10);
    r[0].seq = a;
    r[0].in_place = true;
    r[0].max_new_tokens = r[1].max_new_tokens = 256 - 10 - r[0].n_prompt;
    EXPECT(kl_generation_new(e, r, 2, &g, &err) == KL_OK);
    EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
           KL_OK);
    n_out += n - 1;
    EXPECT(kl_seq_fork(e, a, &fork, &err) == KL_OK && kl_seq_new(e, &other, &err) == KL_OK);
    EXPECT(kl_cache_reserve(&e->cache, fork, 256, &err) == KL_OK);
    EXPECT(kl_cache_reserve(&e->cache, other, KL_PAGE_TOKENS * kl_cache_available(&e->cache),
                            &err) == KL_OK);
    EXPECT(kl_cache_available(&e->cache) == 0);
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 9, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n; k++) {
            const bool failed = events[k].finish == KL_FINISH_ERROR;
            EXPECT(events[k].request == (failed ? 0 : 1));
            n_failed += failed;
            n_out += !failed;
            if (failed)
                EXPECT_TEXT(events[k].error.message,
                            "generate: request 0: the sequence it continues was forked since: "
                            "cache: needs 1 more pages, 0 are available");
        }
    }
    EXPECT(n_failed == 1 && n_out == r[1].max_new_tokens);
    EXPECT(kl_seq_release(e, fork, &err) == KL_OK && kl_seq_release(e, a, &err) == KL_OK);
    EXPECT(kl_seq_release(e, other, &err) == KL_OK);
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

typedef struct {
    int calls, stop_at;
} stopping;

/* A processor that knows who asked for it, and one that has had enough. */
static int process(void *ctx, int64_t request, const int32_t *ids, int64_t n_ids, float *logits)
{
    stopping *s = ctx;
    EXPECT(request != 1 && n_ids >= 3 && ids != NULL);
    for (int i = 0; i < VOCAB; i++) logits[i] = i == 42 ? 1.0f : -INFINITY;
    return ++s->calls == s->stop_at;
}

/* Only those that want the processor meet it; one that says stop ends the requests of the step,
 * and the others' next ones are as they would have been. */
static void processors_are_for_those_that_ask(void)
{
    static kl_event events[MAX_EVENTS];
    kl_backend *be;
    kl_engine *e = open_engine(&be, 2, 64);
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    int64_t n, errors = 0, n_out = 0;
    stopping s = {.stop_at = 3};
    kl_request r[3] = {kinds[5], kinds[2], kinds[4]};
    r[0].process = true;
    r[0].sampling = (kl_sampling){.top_p = 1.0f, .repetition_penalty = 1.0f};
    r[0].max_new_tokens = r[1].max_new_tokens = 10;
    EXPECT(kl_generation_new(e, r, 3, &g, &err) == KL_OK);
    kl_status status = KL_OK;
    for (int64_t turn = 0; status == KL_OK; turn++) {
        status = kl_generation_run(g, 1, events, MAX_EVENTS, &n, process, &s, NULL, NULL, &err);
        for (int64_t k = 0; k < n; k++)
            EXPECT(events[k].id == (events[k].request == 0 ? 42 : wanted[2][turn]));
    }
    EXPECT(status == KL_ERR_CANCELLED && s.calls == 3);
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, process, &s, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n; k++)
            if (events[k].finish == KL_FINISH_ERROR)
                errors += events[k].error.status == KL_ERR_CANCELLED && events[k].request < 2;
            else
                EXPECT(events[k].id == wanted[4][n_out++]);
    }
    EXPECT(errors == 2 && n_out == r[2].max_new_tokens && s.calls == 3);
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

/* Others hold what the first needs and nothing runs: it fails, and so on; no run hangs. */
static void nobody_waits_in_vain(void)
{
    static kl_event events[MAX_EVENTS];
    kl_backend *be;
    kl_engine *e = open_engine(&be, 2, 64);
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    kl_seq held[2];
    int64_t n, id, errors = 0, tokens = 0;
    for (int i = 0; i < 2; i++) EXPECT(kl_seq_new(e, &held[i], &err) == KL_OK);
    EXPECT(kl_generation_new(e, kinds, 2, &g, &err) == KL_OK);
    EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
           KL_OK);
    EXPECT(n == 1 && events[0].error.status == KL_ERR_MEMORY);
    EXPECT_TEXT(events[0].error.message,
                "generate: request 0 needs a sequence and 1 pages, but other sequences leave 0 "
                "and 8");
    EXPECT(kl_seq_release(e, held[0], &err) == KL_OK);
    EXPECT(kl_generation_submit(g, &kinds[2], &id, &err) == KL_OK); /* waits for request 1 */
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n; k++) {
            errors += events[k].finish == KL_FINISH_ERROR;
            tokens++;
        }
    }
    EXPECT(errors == 0 && tokens == kinds[1].max_new_tokens + kinds[2].max_new_tokens);
    EXPECT(kl_seq_release(e, held[1], &err) == KL_OK);
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

/* A request whose memory cannot be had is refused, and the others go on. */
static void every_submission_may_fail(void)
{
    static life lives[2];
    kl_backend *be;
    kl_engine *e = open_engine(&be, 2, 64);
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    int64_t id;
    bool failed = true;
    memset(lives, 0, sizeof lives);
    lives[0].kind = 1;
    lives[1].kind = 3; /* with alternatives: the first to want room for them */
    EXPECT(kl_generation_new(e, &kinds[1], 1, &g, &err) == KL_OK);
    for (int k = 1; failed; k++) {
        kl_fault_arm(k);
        failed = kl_generation_submit(g, &kinds[3], &id, &err) != KL_OK;
        kl_fault_arm(0);
        EXPECT(failed ? err.status == KL_ERR_MEMORY : k > 3 && id == 1);
    }
    while (!kl_generation_done(g)) run_some(g, lives, 1, MAX_EVENTS);
    EXPECT(lives[0].over && lives[1].over);
    kl_generation_free(g);
    tiny_engine_close(e, be);
}

/* Requests that end without a step, one after the other, hold up nobody: of no tokens, and of one
 * that is drawn from logits at hand. */
static void a_flood_holds_up_nobody(void)
{
    static kl_event events[MAX_EVENTS];
    static float logits[VOCAB];
    kl_backend *be;
    kl_engine *e = open_engine(&be, 3, 64);
    kl_error err = {KL_OK, ""};
    kl_request flood[2] = {kinds[8], kinds[8]};
    kl_seq a = fed(e, prompts[3], 10);
    flood[1] = (kl_request){.max_new_tokens = 1, .seq = a, .logits = logits};
    flood[1].sampling = kinds[0].sampling;
    for (int i = 0; i < 2; i++) {
        kl_generation *g;
        int64_t id, n, n_out = 0, turn = 0;
        EXPECT(kl_generation_new(e, &kinds[1], 1, &g, &err) == KL_OK);
        for (; n_out < kinds[1].max_new_tokens && turn < 100; turn++) {
            EXPECT(kl_generation_submit(g, &flood[i], &id, &err) == KL_OK);
            EXPECT(kl_generation_run(g, 1, events, MAX_EVENTS, &n, NULL, NULL, NULL, NULL,
                                     &err) == KL_OK);
            for (int64_t k = 0; k < n; k++)
                if (events[k].request == 0) EXPECT(events[k].id == wanted[1][n_out++]);
        }
        EXPECT(turn <= 2 * (kinds[1].max_new_tokens + 3));
        kl_generation_free(g);
    }
    EXPECT(kl_seq_release(e, a, &err) == KL_OK);
    tiny_engine_close(e, be);
}

/* One that is refused has no place among the prefixes either. */
static void refused_requests_leave_nothing(void)
{
    kl_backend *be;
    kl_engine *e = open_engine(&be, 2, 64);
    kl_generation *g;
    kl_error err = {KL_OK, ""};
    kl_request r = kinds[1];
    r.in_place = true; /* of no sequence */
    EXPECT(kl_engine_keep_prefixes(e, true, &err) == KL_OK);
    EXPECT(kl_generation_new(e, &r, 1, &g, &err) == KL_ERR_VALUE && g == NULL);
    EXPECT_TEXT(err.message, "sequence: must be one that is alive, got handle 0");
    EXPECT(e->prefix.root.child == NULL);
    tiny_engine_close(e, be);
}

int main(void)
{
    make_wanted();
    RUN(requests_come_and_go);
    RUN(a_long_prompt_holds_up_nobody);
    RUN(failures_are_alone);
    RUN(a_fork_harms_nobody_else);
    RUN(processors_are_for_those_that_ask);
    RUN(nobody_waits_in_vain);
    RUN(every_submission_may_fail);
    RUN(a_flood_holds_up_nobody);
    RUN(refused_requests_leave_nothing);
    return test_failures != 0;
}
