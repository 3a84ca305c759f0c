/*
 * test_scheduler.c -- the scheduler played against random loads: what it promises must hold in
 * every step, and every request must end.
 */
#include "test.h"

#include "base/memory.h"
#include "base/rng.h"
#include "model/scheduler.h"

#define MAX_REQUESTS 12
#define MAX_QUEUED   24

/* Requests wait in `queue`, run in the order of their admission, and are forgotten when they end,
 * as a generation does it. */
typedef struct {
    uint64_t seed, index;
    int64_t step_tokens, n_slots, n_pages; /* of the engine */
    int64_t slots, pages;                  /* free now      */
    kl_sched_request queue[MAX_QUEUED], running[MAX_REQUESTS];
    int64_t to_draw[MAX_QUEUED], left[MAX_REQUESTS]; /* tokens to draw */
    int64_t first, n_queue, n_running;
    bool decode_first;
    kl_sched_item items[MAX_REQUESTS];
} game;

static int64_t draw(game *g, int64_t low, int64_t high)
{
    return low + (int64_t)(kl_rng_uniform(g->seed, g->index++) * (double)(high - low + 1));
}

static void deal(game *g, uint64_t seed)
{
    *g = (game){.seed = seed};
    g->step_tokens = draw(g, 0, 1) ? draw(g, 1, 70) : 64 * draw(g, 1, 4);
    g->slots = g->n_slots = draw(g, 1, MAX_REQUESTS);
    g->pages = g->n_pages = draw(g, 8, 20);
}

/* Requests come at any time. */
static void join(game *g)
{
    if (g->n_queue == MAX_QUEUED || draw(g, 0, 3) != 0) return;
    g->queue[g->n_queue] = (kl_sched_request){.n_prompt = draw(g, 1, draw(g, 0, 1) ? 20 : 300),
                                              .pages = draw(g, 0, 8)};
    if (draw(g, 0, 2) == 0)
        g->queue[g->n_queue].cut = draw(g, 1, 5 * kl_sched_unit(g->step_tokens));
    if (g->queue[g->n_queue].cut >= g->queue[g->n_queue].n_prompt) g->queue[g->n_queue].cut = 0;
    g->to_draw[g->n_queue++] = draw(g, 1, 20);
}

/* Admit all that can be, in their order. */
static void admit_all(game *g)
{
    while (g->first < g->n_queue) {
        kl_sched_request *r = &g->queue[g->first];
        const bool fits = kl_sched_admits(r, g->slots, g->pages);
        EXPECT(fits == (g->slots > 0 && r->pages <= g->pages));
        if (!fits) return;
        g->running[g->n_running] = *r;
        g->running[g->n_running].phase = KL_SCHED_PROMPT;
        g->left[g->n_running++] = g->to_draw[g->first++];
        g->slots--;
        g->pages -= r->pages;
    }
}

static void play_item(game *g, const kl_sched_item *item)
{
    const int64_t unit = kl_sched_unit(g->step_tokens);
    kl_sched_request *r = &g->running[item->request];
    if (r->phase == KL_SCHED_PROMPT) {
        EXPECT(item->count >= 1 && r->fed + item->count <= r->n_prompt);
        EXPECT(r->cut <= r->fed || r->fed + item->count <= r->cut);
        r->fed += item->count;
        /* Where a prompt is cut must not depend on who else is in the step. */
        EXPECT(r->fed == r->n_prompt ||
               (r->fed < r->cut ? r->fed : r->fed - r->cut) % unit == 0);
        EXPECT(item->samples == (r->fed == r->n_prompt));
    } else {
        EXPECT(r->phase == KL_SCHED_DECODE);
        EXPECT(item->count == 1 && item->samples);
    }
    if (!item->samples) return;
    r->phase = KL_SCHED_DECODE;
    if (--g->left[item->request] > 0) return;
    r->phase = KL_SCHED_DONE;
    g->slots++;
    g->pages += r->pages;
}

/* Nobody is held up: a step feeds the oldest prompt and, if the one before did not, each request
 * that is generating, as far as it has tokens for those. */
static void check_fed(const game *g, int64_t n_items)
{
    int64_t decoding = 0, fed = 0, oldest = -1;
    bool oldest_fed = false;
    for (int64_t i = 0; i < g->n_running; i++) {
        decoding += g->running[i].phase == KL_SCHED_DECODE;
        if (g->running[i].phase == KL_SCHED_PROMPT && oldest < 0) oldest = i;
    }
    for (int64_t k = 0; k < n_items; k++) {
        fed += g->running[g->items[k].request].phase == KL_SCHED_DECODE;
        oldest_fed = oldest_fed || g->items[k].request == oldest;
    }
    if (g->decode_first || oldest < 0) EXPECT(fed == kl_min_i64(decoding, g->step_tokens));
    if (!g->decode_first || decoding == 0) EXPECT(oldest < 0 || oldest_fed);
}

static void sweep(game *g)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < g->n_running; i++) {
        if (g->running[i].phase == KL_SCHED_DONE) continue;
        g->running[kept] = g->running[i];
        g->left[kept++] = g->left[i];
    }
    g->n_running = kept;
}

static void play_step(game *g)
{
    const int64_t n_items =
        kl_sched_step(g->running, g->n_running, g->step_tokens, g->decode_first, g->items);
    int64_t total = 0;
    EXPECT(n_items <= g->n_running && (n_items > 0 || g->n_running == 0));
    for (int64_t k = 0; k < n_items; k++) {
        total += g->items[k].count;
        for (int64_t j = 0; j < k; j++) EXPECT(g->items[j].request != g->items[k].request);
    }
    EXPECT(total <= g->step_tokens);
    check_fed(g, n_items);
    g->decode_first = kl_sched_held_up(g->running, g->n_running, g->items, n_items);
    for (int64_t k = 0; k < n_items; k++) play_item(g, &g->items[k]);
    sweep(g);
}

static int64_t work_left(const game *g)
{
    int64_t work = 0;
    for (int64_t i = g->first; i < g->n_queue; i++)
        work += g->queue[i].n_prompt + g->to_draw[i];
    for (int64_t i = 0; i < g->n_running; i++)
        work += g->running[i].n_prompt - g->running[i].fed + g->left[i];
    return work;
}

static void random_loads_end(void)
{
    for (uint64_t seed = 0; seed < 2000 && test_failed_here == 0; seed++) {
        game g;
        deal(&g, seed);
        while ((g.n_queue < MAX_QUEUED || work_left(&g) > 0) && test_failed_here == 0) {
            join(&g);
            const int64_t before = work_left(&g);
            admit_all(&g);
            play_step(&g);
            EXPECT(before == 0 || work_left(&g) < before); /* no step is idle over work */
        }
        EXPECT(g.slots == g.n_slots && g.pages == g.n_pages && g.n_running == 0);
    }
}

/* What begins within a page and may be cut reads the rest of that page first. */
static void prompts_reach_a_border_first(void)
{
    EXPECT(kl_sched_lead(0, 1000) == 0 && kl_sched_lead(128, 1000) == 0);
    EXPECT(kl_sched_lead(7, 64) == 0); /* nobody cuts it */
    EXPECT(kl_sched_lead(7, 65) == 57 && kl_sched_lead(127, 65) == 1);
}

/* A step fills up: it leaves out work only where no piece of it fits. */
static void steps_are_full(void)
{
    const kl_sched_request requests[] = {
        {KL_SCHED_DECODE, 5, 5, 1, 0},  {KL_SCHED_PROMPT, 400, 64, 5, 0},
        {KL_SCHED_WAITING, 9, 0, 1, 0}, {KL_SCHED_DONE, 7, 7, 1, 0},
        {KL_SCHED_PROMPT, 30, 0, 1, 0},
    };
    kl_sched_item items[5];
    EXPECT(kl_sched_step(requests, 5, 256, false, items) == 3);
    EXPECT(items[0].request == 1 && items[0].count == 192 && !items[0].samples);
    EXPECT(items[1].request == 4 && items[1].count == 30 && items[1].samples);
    EXPECT(items[2].request == 0 && items[2].count == 1 && items[2].samples);
}

/* A short prompt does not wait for the long ones before it, nor the oldest for short ones. */
static void prompts_share_a_step(void)
{
    const kl_sched_request requests[] = {
        {KL_SCHED_PROMPT, 9000, 0, 5, 0},
        {KL_SCHED_PROMPT, 8000, 0, 5, 0},
        {KL_SCHED_PROMPT, 100, 0, 5, 0},
        {KL_SCHED_PROMPT, 20, 0, 5, 0},
    };
    kl_sched_item items[4];
    EXPECT(kl_sched_step(requests, 4, 1024, false, items) == 4);
    EXPECT(items[0].request == 0 && items[0].count == 768);
    EXPECT(items[1].request == 3 && items[1].count == 20 && items[1].samples);
    EXPECT(items[2].request == 2 && items[2].count == 100 && items[2].samples);
    EXPECT(items[3].request == 1 && items[3].count == 128 && !items[3].samples);
    EXPECT(kl_sched_step(requests + 2, 2, 1024, false, items) == 2);
    EXPECT(items[0].count == 100 && items[1].count == 20);
}

/* Decoding alone could fill every step of this size, and so could the prompt: they take turns. */
static void steps_without_room_for_both_alternate(void)
{
    const kl_sched_request requests[] = {
        {KL_SCHED_DECODE, 5, 5, 1, 0},
        {KL_SCHED_DECODE, 5, 5, 1, 0},
        {KL_SCHED_PROMPT, 9, 0, 1, 0},
    };
    kl_sched_item items[3];
    EXPECT(kl_sched_step(requests, 3, 2, false, items) == 1);
    EXPECT(items[0].request == 2 && items[0].count == 2);
    EXPECT(kl_sched_held_up(requests, 3, items, 1));
    EXPECT(kl_sched_step(requests, 3, 2, true, items) == 2);
    EXPECT(items[0].request == 0 && items[1].request == 1);
    EXPECT(!kl_sched_held_up(requests, 3, items, 2));
    EXPECT(kl_sched_step(requests, 3, 1, true, items) == 1);
    EXPECT(!kl_sched_held_up(requests, 3, items, 1)); /* or the prompt would starve */
}

/* All that are wanted where they fit, else equal shares, of which nobody takes more than it has. */
static void guesses_share_what_is_left(void)
{
    static const struct {
        int64_t wanted[4], most, counts[4];
    } cases[] = {
        {{15, 0, 0, 0}, 16, {13, 1, 1, 1}},  {{3, 0, 2, 1}, 32, {4, 1, 3, 2}},
        {{15, 15, 0, 15}, 16, {5, 5, 1, 5}}, {{1, 15, 15, 1}, 16, {2, 5, 5, 2}},
        {{9, 9, 9, 9}, 4, {1, 1, 1, 1}},     {{9, 9, 9, 9}, 2, {1, 1, 1, 1}},
        {{9, 9, 9, 9}, 6, {2, 2, 1, 1}},     {{0, 0, 0, 0}, 16, {1, 1, 1, 1}},
    };
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        kl_sched_item items[4];
        int64_t sum = 0;
        for (int64_t k = 0; k < 4; k++) items[k] = (kl_sched_item){k, 1, true};
        const int64_t added = kl_sched_add_guesses(cases[c].wanted, cases[c].most, items, 4);
        for (int k = 0; k < 4; k++) {
            EXPECT(items[k].count == cases[c].counts[k]);
            sum += items[k].count;
        }
        EXPECT(added == sum - 4 && (added == 0 || sum <= cases[c].most));
    }
}

int main(void)
{
    RUN(random_loads_end);
    RUN(prompts_reach_a_border_first);
    RUN(steps_are_full);
    RUN(prompts_share_a_step);
    RUN(steps_without_room_for_both_alternate);
    RUN(guesses_share_what_is_left);
    return test_failures != 0;
}
