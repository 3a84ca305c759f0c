/*
 * test_generate.c -- requests of a tiny random model to their last tokens, whatever shares their
 * steps; and that every allocation on the way from a checkpoint may fail without harm.
 */
#include "test.h"

#include "base/memory.h"
#include "model/engine_struct.h"
#include "tiny_model.h"

#include <math.h>

enum { MAX_EVENTS = 256 };

enum { N_REQUESTS = 7 };

typedef struct {
    int32_t prompts[N_REQUESTS][160], stops[2], out[N_REQUESTS][32];
    kl_request requests[N_REQUESTS];
    int64_t n_out[N_REQUESTS];
    kl_finish finish[N_REQUESTS];
} load;

static void make_load(load *l)
{
    static const int64_t lengths[N_REQUESTS] = {1, 130, 17, 64, 65, 3, 150};
    memset(l, 0, sizeof *l);
    for (int i = 0; i < N_REQUESTS; i++) {
        tiny_ids(l->prompts[i], lengths[i], 50 + (uint64_t)i);
        l->requests[i] =
            (kl_request){.prompt = l->prompts[i],
                         .n_prompt = lengths[i],
                         .max_new_tokens = 5 + 4 * i,
                         .sampling = {.temperature = i % 3 == 0 ? 0.0f : 0.8f,
                                      .top_p = 1.0f,
                                      .repetition_penalty = i % 2 == 0 ? 1.0f : 1.3f,
                                      .seed = 11 + (uint64_t)i},
                         .top = i};
    }
}

/* Run to the end, `per_call` events at a time. */
static kl_status run_load(kl_engine *e, load *l, int64_t per_call, kl_error *err)
{
    static kl_event events[MAX_EVENTS];
    kl_generation *g;
    int64_t n = 0;
    kl_status status = kl_generation_new(e, l->requests, N_REQUESTS, &g, err);
    if (status != KL_OK) return status;
    while (status == KL_OK && !kl_generation_done(g)) {
        status = kl_generation_run(g, 1000, events, per_call, &n, NULL, NULL, NULL, NULL, err);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = events[k].request;
            EXPECT(l->finish[i] == KL_RUNNING && l->n_out[i] < 32);
            if (events[k].finish == KL_FINISH_ERROR && status == KL_OK) {
                *err = events[k].error;
                status = err->status;
            }
            if (events[k].id >= 0) l->out[i][l->n_out[i]++] = events[k].id;
            l->finish[i] = events[k].finish;
            EXPECT(events[k].n_top == l->requests[i].top || events[k].id < 0);
        }
    }
    kl_generation_free(g);
    return status;
}

/* Which requests share a step, and how large steps are, must not change a token. */
static void schedules_do_not_change_tokens(void)
{
    static const struct {
        int64_t max_batch, step_tokens, n_pages, per_call;
    } ways[] = {{1, 64, 0, 1}, {2, 64, 0, 3}, {8, 512, 0, MAX_EVENTS}, {3, 128, 4, 2}};
    static load wanted, got;
    kl_backend *be = tiny_backend(1);
    make_load(&wanted);
    for (int i = 0; i < N_REQUESTS; i++) wanted.requests[i].top = 0;
    for (int k = 0; k < 4; k++) {
        kl_engine_options o = tiny_options;
        kl_error err = {KL_OK, ""};
        int64_t sequences, pages;
        kl_plan plan;
        o.max_batch = ways[k].max_batch;
        o.step_tokens = ways[k].step_tokens;
        EXPECT(kl_plan_make(be, &tiny_config, &o, &plan, &err) == KL_OK);
        if (ways[k].n_pages > 0) /* requests wait for one another's pages */
            o.cache_bytes =
                plan.state_bytes + (size_t)ways[k].n_pages * 64 * plan.page_bytes_per_token;
        kl_engine *e = tiny_engine_on(be, &o);
        load *l = k == 0 ? &wanted : &got;
        make_load(l);
        EXPECT(run_load(e, l, ways[k].per_call, &err) == KL_OK);
        EXPECT(memcmp(l->out, wanted.out, sizeof wanted.out) == 0);
        for (int i = 0; i < N_REQUESTS; i++) {
            EXPECT(l->n_out[i] == l->requests[i].max_new_tokens);
            EXPECT(l->finish[i] == KL_FINISH_LENGTH);
        }
        kl_engine_usage(e, &sequences, &pages);
        EXPECT(sequences == 0 && pages == 0);
        kl_engine_free(e);
    }
    kl_backend_close(be);
}

static void endings(void)
{
    static load first, l;
    kl_backend *be = tiny_backend(1);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    make_load(&first);
    EXPECT(run_load(e, &first, MAX_EVENTS, &err) == KL_OK);
    make_load(&l);
    l.stops[0] = first.out[4][2]; /* stop where it was drawn for the first time */
    int64_t at = 0;
    while (first.out[4][at] != l.stops[0]) at++;
    l.requests[4].stop_ids = l.stops;
    l.requests[4].n_stop_ids = 1;
    l.requests[2].max_new_tokens = 0;
    EXPECT(run_load(e, &l, 2, &err) == KL_OK);
    EXPECT(l.finish[4] == KL_FINISH_STOP && l.n_out[4] == at + 1);
    EXPECT(l.finish[2] == KL_FINISH_LENGTH && l.n_out[2] == 0);
    EXPECT(l.finish[6] == KL_FINISH_LENGTH && l.n_out[6] == first.n_out[6]);

    make_load(&l);
    l.requests[3].max_new_tokens = 193;
    EXPECT(run_load(e, &l, 2, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message,
                "generate: request 3: 64 prompt tokens and max_new_tokens 193 must "
                "be at most 256 together (max_context)");
    make_load(&l);
    l.requests[5].sampling.top_p = NAN;
    EXPECT(run_load(e, &l, 2, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "generate: request 5: sampling: top_p must be in (0, 1], got nan");
    make_load(&l);
    l.prompts[0][0] = -1;
    EXPECT(run_load(e, &l, 2, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message,
                "generate: request 0: prompt: token id -1 at position 0 must be in [0, 97)");
    kl_engine_free(e);
    kl_backend_close(be);
}

/* A request cut in two draws what it would have drawn in one: `position` counts its draws. */
static void draws_have_positions(void)
{
    static load whole, rest;
    enum { CUT = 7 };
    kl_backend *be = tiny_backend(1);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    make_load(&whole);
    make_load(&rest);
    for (int i = 0; i < N_REQUESTS; i++) {
        kl_request *a = &whole.requests[i];
        a->n_prompt = 5 + i;
        a->max_new_tokens = 2 * CUT;
        a->sampling.temperature = 3.0f;
    }
    EXPECT(run_load(e, &whole, MAX_EVENTS, &err) == KL_OK);
    for (int i = 0; i < N_REQUESTS; i++) {
        const kl_request *a = &whole.requests[i];
        kl_request *b = &rest.requests[i];
        *b = *a;
        b->prompt = rest.prompts[i];
        b->n_prompt = a->n_prompt + CUT;
        b->max_new_tokens = CUT;
        b->sampling.position = CUT;
        memcpy(rest.prompts[i], a->prompt, (size_t)a->n_prompt * sizeof(int32_t));
        memcpy(rest.prompts[i] + a->n_prompt, whole.out[i], CUT * sizeof(int32_t));
    }
    EXPECT(run_load(e, &rest, MAX_EVENTS, &err) == KL_OK);
    for (int i = 0; i < N_REQUESTS; i++)
        EXPECT(memcmp(rest.out[i], whole.out[i] + CUT, CUT * sizeof(int32_t)) == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* Under a penalty this large no token comes twice, from the prompt or from before; the request
 * beside it, without one, is not touched by it. */
static void penalties_remember_all_tokens(void)
{
    static load l, alone;
    kl_backend *be = tiny_backend(1);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    make_load(&l);
    for (int i = 0; i < N_REQUESTS; i++) {
        l.requests[i].n_prompt = 5;
        l.requests[i].max_new_tokens = 15;
        l.requests[i].sampling.temperature = 0.0f;
        l.requests[i].sampling.repetition_penalty = i % 2 == 0 ? 1e6f : 1.0f;
    }
    EXPECT(run_load(e, &l, MAX_EVENTS, &err) == KL_OK);
    int repeats = 0;
    for (int i = 0; i < N_REQUESTS; i++)
        for (int t = 0; t < 15; t++) {
            for (int p = 0; p < 5; p++) EXPECT(i % 2 == 1 || l.out[i][t] != l.prompts[i][p]);
            for (int before = 0; before < t; before++) {
                EXPECT(i % 2 == 1 || l.out[i][t] != l.out[i][before]);
                repeats += l.out[i][t] == l.out[i][before];
            }
        }
    EXPECT(repeats > 0); /* greedy does repeat itself where nothing forbids it */
    make_load(&alone);
    for (int i = 0; i < N_REQUESTS; i++) {
        alone.requests[i] = l.requests[i];
        alone.requests[i].prompt = alone.prompts[i];
        alone.requests[i].sampling.repetition_penalty = 1.0f;
    }
    EXPECT(run_load(e, &alone, MAX_EVENTS, &err) == KL_OK);
    for (int i = 1; i < N_REQUESTS; i += 2)
        EXPECT(memcmp(alone.out[i], l.out[i], sizeof l.out[i]) == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* One request meets a NaN: it is named, the others get the tokens they get without it. */
static void a_nan_ends_one_request(void)
{
    enum { BAD = 96 };
    static load clean, l;
    static kl_event events[MAX_EVENTS];
    kl_backend *be = tiny_backend(1);
    kl_engine *e = tiny_engine_on(be, &tiny_options);
    kl_error err = {KL_OK, ""};
    kl_generation *g;
    int64_t n, failures = 0, sequences, pages;
    make_load(&clean);
    for (int i = 0; i < N_REQUESTS; i++)
        for (int t = 0; t < 160; t++) clean.prompts[i][t] %= BAD;
    l = clean;
    for (int i = 0; i < N_REQUESTS; i++) l.requests[i].prompt = l.prompts[i];
    for (int i = 0; i < N_REQUESTS; i++) clean.requests[i].prompt = clean.prompts[i];
    EXPECT(run_load(e, &clean, MAX_EVENTS, &err) == KL_OK);
    for (int i = 0; i < N_REQUESTS; i++)
        for (int t = 0; t < clean.n_out[i]; t++)
            if (clean.out[i][t] == BAD) l.n_out[i] = -1000; /* would meet the NaN by itself */
    ((float *)e->weights.embedding.data)[BAD * 24 + 5] = NAN;
    l.prompts[1][77] = BAD;

    EXPECT(kl_generation_new(e, l.requests, N_REQUESTS, &g, &err) == KL_OK);
    while (!kl_generation_done(g)) {
        EXPECT(kl_generation_run(g, 1000, events, 3, &n, NULL, NULL, NULL, NULL, &err) ==
               KL_OK);
        for (int64_t k = 0; k < n; k++) {
            const int64_t i = events[k].request;
            EXPECT(i != 1 || events[k].finish == KL_FINISH_ERROR);
            if (events[k].finish == KL_FINISH_ERROR) {
                failures++;
                EXPECT(events[k].id == -1 && events[k].error.status == KL_ERR_NUMERICAL);
                if (i == 1)
                    EXPECT_TEXT(events[k].error.message,
                                "generate: request 1: logits after 130 tokens must be finite");
            } else if (l.n_out[i] >= 0) {
                l.out[i][l.n_out[i]++] = events[k].id;
            }
        }
    }
    EXPECT(failures >= 1);
    kl_generation_free(g);
    for (int i = 0; i < N_REQUESTS; i++)
        if (i != 1 && l.n_out[i] >= 0)
            EXPECT(memcmp(l.out[i], clean.out[i], sizeof l.out[i]) == 0);
    kl_engine_usage(e, &sequences, &pages);
    EXPECT(sequences == 0 && pages == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* Pages that others hold are not promised twice. */
static void generation_waits_for_nobody_in_vain(void)
{
    static load l;
    kl_engine_options o = tiny_options;
    kl_backend *be = tiny_backend(1);
    kl_error err = {KL_OK, ""};
    kl_seq held[4];
    o.max_batch = 4;
    kl_engine *e = tiny_engine_on(be, &o);
    for (int i = 0; i < 4; i++) EXPECT(kl_seq_new(e, &held[i], &err) == KL_OK);
    make_load(&l);
    EXPECT(run_load(e, &l, 2, &err) == KL_ERR_MEMORY);
    EXPECT_TEXT(err.message, "generate: request 0 needs a sequence and 1 pages, but other "
                             "sequences leave 0 and 16");
    EXPECT(kl_seq_release(e, held[2], &err) == KL_OK);
    make_load(&l);
    EXPECT(run_load(e, &l, 2, &err) == KL_OK);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* ---- failing allocations --------------------------------------------------------------- */

/* Load and generate in a format, everything that the core allocates on the way. */
static kl_status live(kl_backend *be, checkpoint *c, kl_weight_format format, kl_error *err)
{
    static load l;
    kl_engine_options o = tiny_options;
    kl_engine *e;
    int64_t sequences = 1, pages = 1;
    o.format = format;
    kl_status status = kl_engine_new(be, &tiny_config, &o, &e, err);
    if (status != KL_OK) return status;
    status = tiny_load(e, c, err);
    make_load(&l);
    for (int i = 0; i < N_REQUESTS; i++) l.requests[i].max_new_tokens = 2;
    if (status == KL_OK) status = run_load(e, &l, 2, err);
    kl_engine_usage(e, &sequences, &pages);
    EXPECT(sequences == 0 && pages == 0);
    kl_engine_free(e);
    return status;
}

static void every_allocation_may_fail(void)
{
    static checkpoint c;
    static const kl_weight_format formats[] = {KL_W_F32, KL_W_INT4};
    kl_backend *be = tiny_backend(1);
    kl_error err = {KL_OK, ""};
    tiny_checkpoint(&c, &tiny_config, true);
    for (int f = 0; f < 2; f++) {
        EXPECT(live(be, &c, formats[f], &err) == KL_OK); /* what a backend keeps is there now */
        kl_fault_arm(0);
        EXPECT(live(be, &c, formats[f], &err) == KL_OK);
        const int64_t n = kl_fault_count();
        EXPECT(n > 30);
        for (int64_t k = 1; k <= n; k++) {
            kl_fault_arm(k);
            EXPECT(live(be, &c, formats[f], &err) == KL_ERR_MEMORY);
            EXPECT(err.status == KL_ERR_MEMORY && err.message[0] != '\0');
        }
        kl_fault_arm(0);
        EXPECT(live(be, &c, formats[f], &err) == KL_OK);
    }
    fclose(c.file);
    kl_backend_close(be);
}

int main(void)
{
    RUN(schedules_do_not_change_tokens);
    RUN(endings);
    RUN(draws_have_positions);
    RUN(penalties_remember_all_tokens);
    RUN(a_nan_ends_one_request);
    RUN(generation_waits_for_nobody_in_vain);
    RUN(every_allocation_may_fail);
    return test_failures != 0;
}
