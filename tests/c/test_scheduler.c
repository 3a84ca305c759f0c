/*
 * test_scheduler.c -- the scheduler played against random loads: what it promises must hold in
 * every step, and every request must end.
 */
#include "test.h"

#include "base/rng.h"
#include "model/scheduler.h"

#define MAX_REQUESTS 12

typedef struct {
    uint64_t seed, index;
    int64_t n, step_tokens, n_slots, n_pages; /* of the engine */
    int64_t slots, pages;                     /* free now      */
    kl_sched_request requests[MAX_REQUESTS];
    int64_t left[MAX_REQUESTS]; /* tokens to draw */
    kl_sched_item items[MAX_REQUESTS];
} game;

static int64_t draw(game *g, int64_t low, int64_t high)
{
    return low + (int64_t)(kl_rng_uniform(g->seed, g->index++) * (double)(high - low + 1));
}

static void deal(game *g, uint64_t seed)
{
    *g = (game){.seed = seed};
    g->n = draw(g, 1, MAX_REQUESTS);
    g->step_tokens = draw(g, 0, 1) ? draw(g, 1, 70) : 64 * draw(g, 1, 4);
    g->slots = g->n_slots = draw(g, 1, 5);
    g->pages = g->n_pages = draw(g, 8, 20);
    for (int64_t i = 0; i < g->n; i++) {
        g->requests[i] =
            (kl_sched_request){.n_prompt = draw(g, 1, 300), .pages = draw(g, 0, 8)};
        g->left[i] = draw(g, 1, 20);
    }
}

/* Admit all that can be; each must be the first that waits. */
static void admit_all(game *g)
{
    for (;;) {
        const int64_t i = kl_sched_admit(g->requests, g->n, g->slots, g->pages);
        int64_t first = 0;
        while (first < g->n && g->requests[first].phase != KL_SCHED_WAITING) first++;
        if (i < 0) {
            EXPECT(first == g->n || g->slots == 0 || g->requests[first].pages > g->pages);
            return;
        }
        EXPECT(i == first);
        g->requests[i].phase = KL_SCHED_PROMPT;
        g->slots--;
        g->pages -= g->requests[i].pages;
        EXPECT(g->slots >= 0 && g->pages >= 0);
    }
}

static void end(game *g, int64_t i)
{
    g->requests[i].phase = KL_SCHED_DONE;
    g->slots++;
    g->pages += g->requests[i].pages;
}

static void play_item(game *g, const kl_sched_item *item)
{
    const int64_t unit = kl_sched_unit(g->step_tokens);
    kl_sched_request *r = &g->requests[item->request];
    if (r->phase == KL_SCHED_PROMPT) {
        EXPECT(item->count >= 1 && r->fed + item->count <= r->n_prompt);
        r->fed += item->count;
        /* Where a prompt is cut must not depend on who else is in the step. */
        EXPECT(r->fed == r->n_prompt || r->fed % unit == 0);
        EXPECT(item->samples == (r->fed == r->n_prompt));
    } else {
        EXPECT(r->phase == KL_SCHED_DECODE);
        EXPECT(item->count == 1 && item->samples);
    }
    if (!item->samples) return;
    r->phase = KL_SCHED_DECODE;
    if (--g->left[item->request] == 0) end(g, item->request);
}

static int64_t play_step(game *g)
{
    const int64_t n_items = kl_sched_step(g->requests, g->n, g->step_tokens, g->items);
    int64_t total = 0;
    EXPECT(n_items <= g->n_slots);
    for (int64_t k = 0; k < n_items; k++) {
        total += g->items[k].count;
        for (int64_t j = 0; j < k; j++) EXPECT(g->items[j].request != g->items[k].request);
    }
    EXPECT(total <= g->step_tokens);
    for (int64_t k = 0; k < n_items; k++) play_item(g, &g->items[k]);
    return n_items;
}

static int64_t work_left(const game *g)
{
    int64_t work = 0;
    for (int64_t i = 0; i < g->n; i++)
        work += g->requests[i].n_prompt - g->requests[i].fed + g->left[i];
    return work;
}

static void random_loads_end(void)
{
    for (uint64_t seed = 0; seed < 2000 && test_failed_here == 0; seed++) {
        game g;
        deal(&g, seed);
        while (work_left(&g) > 0 && test_failed_here == 0) {
            const int64_t before = work_left(&g);
            admit_all(&g);
            play_step(&g);
            EXPECT(work_left(&g) < before); /* no step is idle while there is work */
        }
        EXPECT(g.slots == g.n_slots && g.pages == g.n_pages);
        EXPECT(kl_sched_step(g.requests, g.n, g.step_tokens, g.items) == 0);
    }
}

/* A step fills up: it leaves out work only where no piece of it fits. */
static void steps_are_full(void)
{
    const kl_sched_request requests[] = {
        {KL_SCHED_DECODE, 5, 5, 1}, {KL_SCHED_PROMPT, 400, 64, 5}, {KL_SCHED_WAITING, 9, 0, 1},
        {KL_SCHED_DONE, 7, 7, 1},   {KL_SCHED_PROMPT, 30, 0, 1},
    };
    kl_sched_item items[5];
    EXPECT(kl_sched_step(requests, 5, 256, items) == 3);
    EXPECT(items[0].request == 1 && items[0].count == 192 && !items[0].samples);
    EXPECT(items[1].request == 4 && items[1].count == 30 && items[1].samples);
    EXPECT(items[2].request == 0 && items[2].count == 1 && items[2].samples);
}

/* Decoding alone could fill every step of this size; the prompt must get in all the same. */
static void decoding_does_not_starve_prompts(void)
{
    const kl_sched_request requests[] = {
        {KL_SCHED_DECODE, 5, 5, 1},
        {KL_SCHED_DECODE, 5, 5, 1},
        {KL_SCHED_PROMPT, 9, 0, 1},
    };
    kl_sched_item items[3];
    EXPECT(kl_sched_step(requests, 3, 2, items) == 1);
    EXPECT(items[0].request == 2 && items[0].count == 2);
}

int main(void)
{
    RUN(random_loads_end);
    RUN(steps_are_full);
    RUN(decoding_does_not_starve_prompts);
    return test_failures != 0;
}
