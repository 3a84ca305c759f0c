/*
 * route.c -- the choice of experts. Formulas: backend/ops.h.
 *
 * Computes     s = sigmoid(logits) or softmax;  ids = top_k of s + bias;  weights from s alone
 * Shapes       logits [T, E], bias [E], ids and weights [T, top_k]
 * Precision    f32
 * NaN          ranks above every number, so that it is chosen and its weight shows it
 * Tasks        runs of tokens
 * Roofline     E exponentials and compares a token, beside 2 D E flops for its logits
 */
#include "cpu/cpu_backend.h"
#include "cpu/rows.h"

#include "base/arena.h"

#include <math.h>

typedef struct {
    float *scores, *choice; /* [E] */
    float *totals;          /* [groups] */
    int32_t *best_groups;   /* [top_groups] */
    uint8_t *allowed;       /* [groups] */
} route_scratch;

typedef struct {
    const kl_moe_route *a;
    const kl_logits_kernels *kernels;
    size_t scratch_bytes;
    int64_t per_task;
} run;

static route_scratch take_scratch(kl_arena *arena, const kl_moe_route *a)
{
    const size_t E = (size_t)a->logits.shape[1], groups = (size_t)a->groups;
    route_scratch s;
    s.scores = kl_arena_take(arena, E * sizeof *s.scores);
    s.choice = kl_arena_take(arena, E * sizeof *s.choice);
    s.totals = kl_arena_take(arena, groups * sizeof *s.totals);
    s.best_groups = kl_arena_take(arena, (size_t)a->top_groups * sizeof *s.best_groups);
    s.allowed = kl_arena_take(arena, groups * sizeof *s.allowed);
    return s;
}

static size_t measure_scratch(const kl_moe_route *a)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    take_scratch(&arena, a);
    return arena.used;
}

size_t kl_cpu_moe_route_workspace(kl_backend *be, const kl_moe_route *a)
{
    return (size_t)kl_pool_size(((const kl_cpu *)be)->pool) * measure_scratch(a);
}

static float rank_of(float x)
{
    return x == x ? x : INFINITY;
}

/* Keep the `capacity` ids with the largest keys, best first. Ids come in rising order, so that
 * the lower one stays ahead on a tie. Returns how many there are now. */
static int64_t keep_best(const float *key, int32_t *best, int64_t size, int64_t capacity,
                         int64_t id)
{
    int64_t at = size;
    if (size == capacity) {
        if (!(key[id] > key[best[size - 1]])) return size;
        at = size - 1;
    }
    for (; at > 0 && key[id] > key[best[at - 1]]; at--) best[at] = best[at - 1];
    best[at] = (int32_t)id;
    return size < capacity ? size + 1 : size;
}

static void score_experts(const run *r, const float *logits, const route_scratch *s)
{
    const kl_moe_route *a = r->a;
    const int64_t E = a->logits.shape[1];
    const float *bias = a->bias.data;
    if (a->score == KL_SCORE_SIGMOID) {
        r->kernels->sigmoid(logits, E, s->scores);
    } else {
        const float top = r->kernels->max(logits, E);
        const float sum = (float)r->kernels->exp(logits, E, top, 1.0f, s->scores);
        for (int64_t e = 0; e < E; e++) s->scores[e] /= sum;
    }
    for (int64_t e = 0; e < E; e++)
        s->choice[e] = rank_of(bias == NULL ? s->scores[e] : s->scores[e] + bias[e]);
}

/* Mark the groups whose two best experts have the largest sums. */
static void allow_groups(const kl_moe_route *a, const route_scratch *s)
{
    const int64_t size = a->logits.shape[1] / a->groups;
    int64_t n = 0;
    for (int64_t g = 0; g < a->groups; g++) {
        float first = -INFINITY, second = -INFINITY;
        for (int64_t e = g * size; e < (g + 1) * size; e++) {
            const float c = s->choice[e];
            if (c > first)
                second = first, first = c;
            else if (c > second)
                second = c;
        }
        s->totals[g] = rank_of(first + second);
        s->allowed[g] = 0;
        n = keep_best(s->totals, s->best_groups, n, a->top_groups, g);
    }
    for (int64_t i = 0; i < n; i++) s->allowed[s->best_groups[i]] = 1;
}

static void choose_experts(const kl_moe_route *a, const route_scratch *s, int32_t *ids)
{
    const int64_t E = a->logits.shape[1], top_k = a->ids.shape[1], size = E / a->groups;
    int64_t n = 0;
    if (a->groups > 1) allow_groups(a, s);
    for (int64_t e = 0; e < E; e++)
        if (a->groups == 1 || s->allowed[e / size]) n = keep_best(s->choice, ids, n, top_k, e);
}

static void weigh_experts(const kl_moe_route *a, const float *scores, const int32_t *ids,
                          float *weights)
{
    const int64_t top_k = a->ids.shape[1];
    float sum = 0.0f;
    for (int64_t j = 0; j < top_k; j++) sum += scores[ids[j]];
    const float whole = a->renormalize ? sum + 1e-20f : 1.0f;
    for (int64_t j = 0; j < top_k; j++) weights[j] = scores[ids[j]] / whole * a->scaling;
}

static void route_task(void *ctx, int64_t task, int worker)
{
    const run *r = ctx;
    const kl_moe_route *a = r->a;
    const int64_t T = a->logits.shape[0], E = a->logits.shape[1], top_k = a->ids.shape[1];
    kl_arena arena;
    kl_arena_init(&arena, (char *)a->ws.data + (size_t)worker * r->scratch_bytes,
                  r->scratch_bytes);
    const route_scratch s = take_scratch(&arena, a);
    const int64_t first = task * r->per_task, end = first + r->per_task;
    for (int64_t t = first; t < end && t < T; t++) {
        int32_t *ids = (int32_t *)a->ids.data + t * top_k;
        score_experts(r, (const float *)a->logits.data + t * E, &s);
        choose_experts(a, &s, ids);
        weigh_experts(a, s.scores, ids, (float *)a->weights.data + t * top_k);
    }
}

kl_status kl_cpu_moe_route(kl_backend *be, const kl_moe_route *a, kl_error *err)
{
    (void)err;
    const kl_cpu *cpu = (const kl_cpu *)be;
    run r = {.a = a, .kernels = &cpu->kernels->logits, .scratch_bytes = measure_scratch(a)};
    r.per_task = kl_rows_per_task(4 * a->logits.shape[1]); /* an exponential is worth four */
    kl_pool_run(cpu->pool, (a->logits.shape[0] + r.per_task - 1) / r.per_task, route_task, &r);
    return KL_OK;
}
