/*
 * logprobs.c -- log-probabilities of given tokens on the CPU. Formula, shapes: backend/ops.h.
 *
 * Logits exist for a block of tokens and VOCAB rows of the head only. A token's running
 * maximum, sum and best alternatives take in one such piece after another, always the same
 * pieces, so its bits do not depend on the batch. The alternatives are kept sorted in the
 * outputs themselves, as logits until the end.
 */
#include "cpu/product.h"

#include <math.h>

#define VOCAB 4096 /* 4 MiB of logits for a block of tokens */
#define SCAN  64   /* logits skipped at once where none enters the alternatives */

typedef struct {
    double sum; /* of exp(z - most) */
    float most, target;
    int32_t best; /* the argmax, -1 before the first */
} running;

typedef struct {
    const kl_cpu *cpu;
    const kl_token_logprobs *a;
    int64_t first, n; /* tokens of the block   */
    int64_t v, v_n;   /* rows of the head      */
    running *state;   /* [n]                   */
    float *logits;    /* [n, v_n]              */
    void *panels, *scratch;
} block;

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static block lay_out(kl_arena *arena, const kl_cpu *cpu, const kl_token_logprobs *a)
{
    const int64_t n = least(a->hidden.shape[0], KL_PRODUCT_ROWS), D = a->lm_head.cols;
    const int64_t pieces = least(a->lm_head.rows, VOCAB);
    block b = {.cpu = cpu, .a = a};
    b.state = kl_arena_take(arena, (size_t)n * sizeof *b.state);
    b.logits = kl_arena_take(arena, (size_t)(n * pieces) * sizeof *b.logits);
    b.panels = kl_arena_take(arena, kl_product_panel_bytes(n, D));
    b.scratch = kl_arena_take(arena, kl_product_scratch_bytes(cpu, n, D));
    return b;
}

size_t kl_cpu_token_logprobs_workspace(kl_backend *be, const kl_token_logprobs *a)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    lay_out(&arena, (const kl_cpu *)be, a);
    return arena.used;
}

/* ---- one token's row ------------------------------------------------------------------- */

static void take_sum(const kl_product_kernels *k, running *s, const float *z, int64_t n,
                     int64_t v)
{
    const float most = k->row_max(z, n);
    if (most > s->most || s->best < 0) {
        int64_t i = 0;
        while (i < n - 1 && z[i] != most) i++;
        s->best = (int32_t)(v + i);
    }
    if (most > s->most) {
        s->sum *= exp((double)s->most - most);
        s->most = most;
    }
    /* Before any finite logit the sum is 0, unless a NaN was met. */
    s->sum += k->row_sum_exp(z, n, s->most == -INFINITY ? 0.0f : s->most);
}

/* Insert one logit behind those not smaller: an earlier id stays ahead on a tie. */
static void insert(int32_t *ids, float *z, int64_t n, int32_t id, float logit)
{
    int64_t i = n - 1;
    for (; i > 0 && z[i - 1] < logit; i--) {
        ids[i] = ids[i - 1];
        z[i] = z[i - 1];
    }
    ids[i] = id;
    z[i] = logit;
}

static void take_top(const kl_product_kernels *k, int32_t *ids, float *top, int64_t n_top,
                     const float *z, int64_t n, int64_t v)
{
    for (int64_t begin = 0; begin < n; begin += SCAN) {
        const int64_t end = least(begin + SCAN, n);
        if (!(k->row_max(z + begin, end - begin) > top[n_top - 1])) continue;
        for (int64_t i = begin; i < end; i++)
            if (z[i] > top[n_top - 1]) insert(ids, top, n_top, (int32_t)(v + i), z[i]);
    }
}

static int64_t top_count(const kl_token_logprobs *a)
{
    return kl_tensor_absent(&a->top_ids) ? 0 : a->top_ids.shape[1];
}

static void take_piece(void *ctx, int64_t t, int worker)
{
    (void)worker;
    const block *b = ctx;
    const kl_token_logprobs *a = b->a;
    const kl_product_kernels *k = &b->cpu->kernels->product;
    const float *z = b->logits + t * b->v_n;
    const int64_t row = b->first + t, n_top = top_count(a);
    const int64_t target = ((const int32_t *)a->targets.data)[row] - b->v;
    if (target >= 0 && target < b->v_n) b->state[t].target = z[target];
    take_sum(k, b->state + t, z, b->v_n, b->v);
    if (n_top > 0)
        take_top(k, (int32_t *)a->top_ids.data + row * n_top,
                 (float *)a->top_logprobs.data + row * n_top, n_top, z, b->v_n, b->v);
}

/* ---- a block of tokens ----------------------------------------------------------------- */

static void begin_rows(const block *b)
{
    const int64_t n_top = top_count(b->a);
    for (int64_t t = 0; t < b->n; t++) {
        b->state[t] = (running){.most = -INFINITY, .target = NAN, .best = -1};
        for (int64_t i = 0; i < n_top; i++) {
            ((int32_t *)b->a->top_ids.data)[(b->first + t) * n_top + i] = -1;
            ((float *)b->a->top_logprobs.data)[(b->first + t) * n_top + i] = -INFINITY;
        }
    }
}

static void end_rows(const block *b)
{
    const int64_t n_top = top_count(b->a);
    for (int64_t t = 0; t < b->n; t++) {
        const int64_t row = b->first + t;
        const running *s = b->state + t;
        const double log_sum = (double)s->most + log(s->sum);
        const int32_t target = ((const int32_t *)b->a->targets.data)[row];
        ((float *)b->a->logprobs.data)[row] = (float)(s->target - log_sum);
        ((uint8_t *)b->a->greedy.data)[row] =
            target >= 0 && target == s->best && !isnan(s->sum);
        float *top = (float *)b->a->top_logprobs.data + row * n_top;
        for (int64_t i = 0; i < n_top; i++) top[i] = (float)(top[i] - log_sum);
    }
}

static void run_block(block *b)
{
    const kl_token_logprobs *a = b->a;
    kl_product p = {
        .x = kl_rows_of(&a->hidden, b->first, b->n),
        .w = a->lm_head,
        .out = b->logits,
        .out_dtype = KL_F32,
        .panels = b->panels,
    };
    kl_products_pack(b->cpu, &p, 1);
    begin_rows(b);
    for (b->v = 0; b->v < a->lm_head.rows; b->v += VOCAB) {
        b->v_n = least(a->lm_head.rows - b->v, VOCAB);
        p.w = kl_weight_slice(&a->lm_head, 0, b->v, b->v_n);
        p.out_stride = b->v_n;
        kl_products_compute(b->cpu, &p, 1, b->scratch);
        kl_pool_run(b->cpu->pool, b->n, take_piece, b);
    }
    end_rows(b);
}

kl_status kl_cpu_token_logprobs(kl_backend *be, const kl_token_logprobs *a, kl_error *err)
{
    (void)err;
    kl_arena arena;
    kl_arena_init(&arena, a->ws.data, a->ws.bytes);
    block b = lay_out(&arena, (const kl_cpu *)be, a);
    const int64_t T = a->hidden.shape[0];
    for (b.first = 0; b.first < T; b.first += KL_PRODUCT_ROWS) {
        b.n = least(T - b.first, KL_PRODUCT_ROWS);
        run_block(&b);
    }
    return KL_OK;
}
