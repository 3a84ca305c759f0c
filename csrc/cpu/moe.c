/*
 * moe.c -- a layer of experts on the CPU. Formula and shapes: backend/ops.h.
 *
 * The (token, slot) pairs of a block of tokens are sorted by expert, so that a weight is read
 * once for all its tokens; rows are gathered while they are packed. The experts' results wait
 * in f32, in sorted order, until each token adds its own in the order of its slots.
 *
 * Sorted pairs go in waves, which bounds the inner products kept at a time; a token's bits
 * depend neither on blocks nor on waves. A decode step is one wave: two parallel regions.
 *
 * Measured: one core of a Zen 5 beside others at work, 8 of 64 experts and a shared one, D =
 * 2304, I = 1024, bf16: T = 1 31 GB/s of a plain read's 39; T = 512 325 GFLOP/s of 464 that
 * registers allow (2026-11-22).
 */
#include "backend/moe.h"
#include "cpu/product.h"

#define BLOCK_TOKENS  512 /* sixteen rows an expert, with 8 of 256 chosen */
#define WAVE_PAIRS    1024
#define INLINE_FLOATS ((int64_t)1 << 16) /* to combine: fewer cost less than a region */

typedef struct {
    const kl_cpu *cpu;
    const kl_moe_experts *a;
    int64_t first, n; /* tokens of the block */

    int32_t *tokens; /* [pairs] the token, from the block's start, of each sorted pair */
    int32_t *places; /* [n, top_k] where each pair was sorted to                       */
    int64_t *starts; /* [E + 1] first sorted pair of each expert                       */
    kl_product *products;
    char *panels, *inner;
    float *y, *shared_y; /* [pairs, D], [n, D] */
    void *scratch;
} block;

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t largest(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Scratch for routed products of at most `pairs` rows and shared ones of n. */
static size_t scratch_bytes(const kl_cpu *cpu, const kl_moe_experts *a, int64_t pairs,
                            int64_t n)
{
    size_t most = 0;
    const int64_t rows = largest(pairs, n), I = a->w1.rows;
    const int64_t cols[] = {a->w1.cols, I, kl_moe_has_shared(a) ? a->shared_w1.rows : I};
    for (int i = 0; i < 3; i++) {
        const size_t bytes = kl_product_scratch_bytes(cpu, rows, cols[i]);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static block lay_out(kl_arena *arena, const kl_cpu *cpu, const kl_moe_experts *a)
{
    const int64_t n = least(a->x.shape[0], BLOCK_TOKENS), pairs = n * a->ids.shape[1];
    const int64_t D = a->w1.cols, I = a->w1.rows, E = a->w1.count;
    const int64_t wave = least(pairs, WAVE_PAIRS),
                  I2 = kl_moe_has_shared(a) ? a->shared_w1.rows : 0;
    const size_t act = kl_dtype_bytes(a->x.dtype);
    block b = {.cpu = cpu, .a = a};
    b.tokens = kl_arena_take(arena, (size_t)pairs * sizeof *b.tokens);
    b.places = kl_arena_take(arena, (size_t)pairs * sizeof *b.places);
    b.starts = kl_arena_take(arena, (size_t)(E + 1) * sizeof *b.starts);
    b.products = kl_arena_take(arena, (size_t)(least(E, wave) + 1) * sizeof *b.products);
    b.panels = kl_arena_take(arena, kl_product_panel_bytes(wave, largest(D, I)) +
                                        kl_product_panel_bytes(n, largest(D, I2)));
    b.inner = kl_arena_take(arena, (size_t)(wave * I + n * I2) * act);
    b.y = kl_arena_take(arena, (size_t)(pairs * D) * sizeof *b.y);
    b.shared_y = kl_arena_take(arena, I2 == 0 ? 0 : (size_t)(n * D) * sizeof *b.shared_y);
    b.scratch = kl_arena_take(arena, scratch_bytes(cpu, a, wave, n));
    return b;
}

size_t kl_cpu_moe_experts_workspace(kl_backend *be, const kl_moe_experts *a)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    lay_out(&arena, (const kl_cpu *)be, a);
    return arena.used;
}

/* ---- sorting --------------------------------------------------------------------------- */

/* A stable counting sort by expert. */
static void sort_pairs(block *b)
{
    const int64_t top_k = b->a->ids.shape[1], E = b->a->w1.count, pairs = b->n * top_k;
    const int32_t *ids = (const int32_t *)b->a->ids.data + b->first * top_k;
    for (int64_t e = 0; e <= E; e++) b->starts[e] = 0;
    for (int64_t i = 0; i < pairs; i++) b->starts[ids[i] + 1]++;
    for (int64_t e = 0; e < E; e++) b->starts[e + 1] += b->starts[e];
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t place = b->starts[ids[i]]++;
        b->places[i] = (int32_t)place;
        b->tokens[place] = (int32_t)(i / top_k);
    }
    for (int64_t e = E; e > 0; e--) b->starts[e] = b->starts[e - 1];
    b->starts[0] = 0;
}

/* ---- products -------------------------------------------------------------------------- */

/* Where the next product of a wave keeps its panels and its inner rows. */
typedef struct {
    char *panels, *inner;
    int64_t n; /* products so far */
} cursor;

/* Add one expert's product: x -> inner, or with `down` inner -> y. */
static void plan_expert(const block *b, cursor *at, bool down, kl_rows x, kl_weight w1,
                        kl_weight w3, kl_weight w2, float *y)
{
    const kl_dtype act = b->a->x.dtype;
    kl_product *p = b->products + at->n++;
    if (down)
        *p = (kl_product){.x = {at->inner, act, w2.cols, NULL, x.n},
                          .w = w2,
                          .out = y,
                          .out_dtype = KL_F32,
                          .out_stride = w2.rows};
    else
        *p = (kl_product){.x = x,
                          .w = w1,
                          .up = w3,
                          .out = at->inner,
                          .out_dtype = act,
                          .out_stride = w1.rows};
    p->panels = at->panels;
    at->panels += kl_product_panel_bytes(x.n, p->w.cols);
    at->inner += (size_t)(x.n * w1.rows) * kl_dtype_bytes(act);
}

static kl_rows rows_of_block(const block *b, const int32_t *index, int64_t n)
{
    kl_rows rows = kl_rows_of(&b->a->x, b->first, n);
    rows.index = index;
    return rows;
}

/* One half of a wave: the pairs [begin, end), and in the first wave the shared expert. */
static void run_half(const block *b, int64_t begin, int64_t end, bool down)
{
    const kl_moe_experts *a = b->a;
    cursor at = {b->panels, b->inner, 0};
    for (int64_t e = 0; e < a->w1.count; e++) {
        const int64_t from = largest(begin, b->starts[e]), to = least(end, b->starts[e + 1]);
        if (from >= to) continue;
        plan_expert(b, &at, down, rows_of_block(b, b->tokens + from, to - from),
                    kl_weight_slice(&a->w1, e, 0, a->w1.rows),
                    kl_weight_slice(&a->w3, e, 0, a->w3.rows),
                    kl_weight_slice(&a->w2, e, 0, a->w2.rows), b->y + from * a->w2.rows);
    }
    if (begin == 0 && kl_moe_has_shared(a))
        plan_expert(b, &at, down, rows_of_block(b, NULL, b->n), a->shared_w1, a->shared_w3,
                    a->shared_w2, b->shared_y);
    kl_products_run(b->cpu, b->products, at.n, b->scratch);
}

/* ---- combining ------------------------------------------------------------------------- */

static void combine_token(void *ctx, int64_t t, int worker)
{
    (void)worker;
    const block *b = ctx;
    const kl_moe_experts *a = b->a;
    const int64_t D = a->w2.rows, top_k = a->ids.shape[1], row = b->first + t;
    b->cpu->kernels->product.combine(
        b->y, b->places + t * top_k, (const float *)a->weights.data + row * top_k, top_k,
        kl_moe_has_shared(a) ? b->shared_y + t * D : NULL, D,
        (char *)a->out.data + (size_t)(row * D) * kl_dtype_bytes(a->out.dtype), a->out.dtype);
}

static void run_block(block *b)
{
    const int64_t top_k = b->a->ids.shape[1], pairs = b->n * top_k;
    sort_pairs(b);
    for (int64_t begin = 0; begin < pairs; begin += WAVE_PAIRS) {
        const int64_t end = least(begin + WAVE_PAIRS, pairs);
        run_half(b, begin, end, false);
        run_half(b, begin, end, true);
    }
    if (pairs * b->a->w2.rows > INLINE_FLOATS)
        kl_pool_run(b->cpu->pool, b->n, combine_token, b);
    else
        for (int64_t t = 0; t < b->n; t++) combine_token(b, t, 0);
}

kl_status kl_cpu_moe_experts(kl_backend *be, const kl_moe_experts *a, kl_error *err)
{
    (void)err;
    kl_arena arena;
    kl_arena_init(&arena, a->ws.data, a->ws.bytes);
    block b = lay_out(&arena, (const kl_cpu *)be, a);
    const int64_t T = a->x.shape[0];
    for (b.first = 0; b.first < T; b.first += BLOCK_TOKENS) {
        b.n = least(T - b.first, BLOCK_TOKENS);
        run_block(&b);
    }
    return KL_OK;
}

/* ---- with its router ------------------------------------------------------------------- */

static size_t largest_bytes(size_t a, size_t b)
{
    return a > b ? a : b;
}

size_t kl_cpu_moe_workspace(kl_backend *be, const kl_moe *a)
{
    const kl_moe_parts p = kl_moe_parts_of(a, NULL);
    const size_t router = kl_cpu_linear_workspace(be, &p.router);
    const size_t route = kl_cpu_moe_route_workspace(be, &p.route);
    return p.bytes + largest_bytes(largest_bytes(router, route),
                                   kl_cpu_moe_experts_workspace(be, &p.experts));
}

kl_status kl_cpu_moe(kl_backend *be, const kl_moe *a, kl_error *err)
{
    if (a->sums != NULL)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "moe: sums must be NULL, the cpu backend reads none");
    kl_moe_parts p = kl_moe_parts_of(a, a->ws.data);
    p.router.ws = (kl_workspace){(char *)a->ws.data + p.bytes, a->ws.bytes - p.bytes};
    p.route.ws = p.experts.ws = p.router.ws;
    if (!kl_tensor_absent(&a->norm_weight)) KL_TRY(kl_cpu_rms_norm(be, &p.norm, err));
    KL_TRY(kl_cpu_linear(be, &p.router, err));
    KL_TRY(kl_cpu_moe_route(be, &p.route, err));
    KL_TRY(kl_cpu_moe_experts(be, &p.experts, err));
    return kl_tensor_absent(&a->residual) ? KL_OK : kl_cpu_rms_norm(be, &p.add, err);
}
