/*
 * mla_prefill.c -- latent attention for runs of new tokens, in the plain form.
 *
 * Computes     k = [W_UK c | k_pe],  v = W_UV c,  o = softmax(scale q k^T) v, causal
 * Shapes       q [T, H, nope+rope], pages [P, 64, rank+rope], out [T, H, V]
 * Layout       the 64 queries of a tile are the lanes of its scores [keys, queries]
 * Precision    f32 arithmetic, rounded once to act
 * Order        tiles are a sequence's new tokens cut at positions that are multiples of 64;
 *              a query goes through the pages of its context in order with a running maximum,
 *              so its bits follow from its position and context. Tiles of few tokens take the
 *              absorbed form: a decode step and a prefill of one token are one function
 * Tasks        head x group of tiles; a group shares the expansion of each page, which costs
 *              as much as the attention of about six tiles
 * Roofline     2 H (nope + rope + V) flops a query and key: compute-bound
 */
#include "cpu/mla.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define LANES          KL_PAGE_TOKENS
#define GROUP_TILES    32 /* an expansion adds a fifth to their work; 2.6 MB a worker */
#define FEWEST_TILES   4  /* smaller groups expand more than they attend */
#define TRANSPOSE_ROWS 16 /* a cache line of results */

/* New tokens of one sequence within one page. */
typedef struct {
    int32_t seq, token, count, position;
} tile;

typedef struct {
    int32_t first, count; /* tiles */
} tile_group;

/* A tile while it goes through the pages. */
typedef struct {
    float *query;     /* [nope+rope, 64], scaled */
    float *out;       /* [64, V] */
    float *max, *sum; /* [64] */
} tile_state;

typedef struct {
    float *weights; /* [rank, nope+V], a head's w_kv_b transposed */
    float *rows;    /* [TRANSPOSE_ROWS, rank], rows of w_kv_b on their way there */
    float *page;    /* [64, width] */
    float *keys;    /* [64, nope+rope+V], keys and values */
    float *scores;  /* [64, 64] */
    float *keep;    /* [64] */
    tile_state tiles[GROUP_TILES];
} worker_scratch;

typedef struct {
    kl_mla_view v;
    kl_mla_row *rows;
    tile *tiles;
    tile_group *groups;
    kl_mla_absorbed absorbed;
    char *scratch;
    size_t scratch_bytes;
    int64_t group_tiles; /* states that scratch has room for */
    int64_t n_rows, n_tiles, n_groups;
} run;

/* ---- workspace --------------------------------------------------------------------------- */

static worker_scratch take_scratch(kl_arena *arena, const kl_mla_view *v, int64_t n_tiles)
{
    const int64_t K = v->nope + v->rope;
    worker_scratch s;
    s.weights = kl_mla_floats(arena, v->rank * (v->nope + v->V));
    s.rows = kl_mla_floats(arena, TRANSPOSE_ROWS * v->rank);
    s.page = kl_mla_floats(arena, KL_PAGE_TOKENS * v->width);
    s.keys = kl_mla_floats(arena, KL_PAGE_TOKENS * (K + v->V));
    s.scores = kl_mla_floats(arena, KL_PAGE_TOKENS * LANES);
    s.keep = kl_mla_floats(arena, LANES);
    for (int64_t i = 0; i < n_tiles; i++) {
        s.tiles[i].query = kl_mla_floats(arena, K * LANES);
        s.tiles[i].out = kl_mla_floats(arena, LANES * v->V);
        s.tiles[i].max = kl_mla_floats(arena, LANES);
        s.tiles[i].sum = kl_mla_floats(arena, LANES);
    }
    return s;
}

static void layout(kl_arena *arena, run *r)
{
    const int64_t T = r->v.a->q.shape[0], N = r->v.a->lengths.shape[0];
    /* A sequence has a first and a last tile that may be small. */
    const int64_t max_rows = kl_mla_min(T, 2 * N * KL_MLA_FEW_TOKENS);
    const int64_t max_tiles =
        kl_mla_min(T / (KL_MLA_FEW_TOKENS + 1), T / KL_PAGE_TOKENS + 2 * N);
    r->rows = kl_mla_take(arena, max_rows, sizeof *r->rows);
    r->tiles = kl_mla_take(arena, max_tiles, sizeof *r->tiles);
    r->groups = kl_mla_take(arena, max_tiles, sizeof *r->groups);
    r->group_tiles = kl_mla_min(max_tiles, GROUP_TILES);

    kl_arena measure;
    kl_arena_init(&measure, NULL, 0);
    take_scratch(&measure, &r->v, r->group_tiles);
    r->scratch_bytes = measure.used;

    /* The two forms run one after the other, in the same memory. */
    const size_t mark = arena->used;
    kl_mla_absorbed_layout(arena, &r->v, max_rows, &r->absorbed);
    kl_arena_rewind(arena, mark);
    r->scratch = kl_mla_take(arena, kl_pool_size(r->v.pool), r->scratch_bytes);
}

size_t kl_cpu_mla_prefill_workspace(kl_backend *be, const kl_mla_prefill *a)
{
    run r = {.v = kl_mla_view_of(be, a)};
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    layout(&arena, &r);
    return arena.peak;
}

/* ---- planning ---------------------------------------------------------------------------- */

static void cut_tiles(run *r)
{
    const kl_mla *a = r->v.a;
    const int32_t *cu = a->cu_seqlens.data, *lengths = a->lengths.data;
    for (int32_t n = 0; n < (int32_t)a->lengths.shape[0]; n++) {
        int32_t token = cu[n], position = lengths[n] - (cu[n + 1] - cu[n]);
        while (token < cu[n + 1]) {
            const int32_t room = KL_PAGE_TOKENS - position % KL_PAGE_TOKENS;
            const int32_t count = (int32_t)kl_mla_min(room, cu[n + 1] - token);
            if (count > KL_MLA_FEW_TOKENS)
                r->tiles[r->n_tiles++] = (tile){n, token, count, position};
            else
                for (int32_t i = 0; i < count; i++)
                    r->rows[r->n_rows++] = (kl_mla_row){token + i, n, position + i + 1, 0};
            token += count, position += count;
        }
    }
}

static void group_tiles(run *r, int64_t largest)
{
    r->n_groups = 0;
    for (int64_t i = 0; i < r->n_tiles; i++) {
        tile_group *last = r->n_groups > 0 ? &r->groups[r->n_groups - 1] : NULL;
        if (last != NULL && last->count < largest &&
            r->tiles[last->first].seq == r->tiles[i].seq)
            last->count++;
        else
            r->groups[r->n_groups++] = (tile_group){(int32_t)i, 1};
    }
}

/* Large groups, unless too few of them would leave threads idle. */
static void plan(run *r)
{
    const int64_t threads = kl_pool_size(r->v.pool);
    int64_t largest = r->group_tiles;
    cut_tiles(r);
    group_tiles(r, largest);
    while (r->n_groups * r->v.H < threads && largest > FEWEST_TILES) {
        largest = (largest + 1) / 2;
        group_tiles(r, largest);
    }
}

/* ---- one group of tiles ------------------------------------------------------------------ */

/* w_kv_b[h] [nope+V, rank] -> [rank, nope+V] in f32. */
static void load_weights(const kl_mla_view *v, int64_t h, const worker_scratch *s)
{
    const int64_t rows = v->nope + v->V, rank = v->rank;
    for (int64_t o = 0; o < rows; o += TRANSPOSE_ROWS) {
        const int64_t n = kl_mla_min(rows - o, TRANSPOSE_ROWS);
        v->kernels->mla.widen(kl_mla_weight(v, h, o), v->a->w_kv_b.dtype, n * rank, 1.0f,
                              s->rows);
        for (int64_t k = 0; k < rank; k++)
            for (int64_t i = 0; i < n; i++)
                s->weights[k * rows + o + i] = s->rows[i * rank + k];
    }
}

/* Queries become the lanes: [count, nope+rope] -> [nope+rope, 64]; `row` is scratch. */
static void load_tile(const kl_mla_view *v, const tile *t, int64_t h, float *row,
                      const tile_state *s)
{
    const int64_t K = v->nope + v->rope;
    for (int64_t i = 0; i < t->count; i++) {
        v->kernels->mla.widen(kl_mla_query(v, t->token + i, h, 0), v->a->q.dtype, K,
                              v->a->scale, row);
        for (int64_t k = 0; k < K; k++) s->query[k * LANES + i] = row[k];
        s->max[i] = -FLT_MAX;
        s->sum[i] = 0.0f;
    }
    memset(s->out, 0, (size_t)(t->count * v->V) * sizeof *s->out);
}

/* Keys and values of the first `count` tokens of a page, one row [k_nope | k_pe | v] each. */
static void expand_page(const kl_mla_view *v, int64_t seq, int64_t page, int64_t count,
                        const worker_scratch *s)
{
    const kl_mla_kernels *kernels = &v->kernels->mla;
    const int64_t both = v->nope + v->V, stride = both + v->rope;
    const float *c = kl_mla_load_page(v, seq, page, count, s->page);
    const kl_mla_left left = {c, v->width, 1};
    kernels->product(left, count, s->weights, KL_F32, both, v->nope, v->rank, NULL, s->keys,
                     stride);
    kernels->product(left, count, s->weights + v->nope, KL_F32, both, v->V, v->rank, NULL,
                     s->keys + v->nope + v->rope, stride);
    for (int64_t j = 0; j < count; j++)
        memcpy(s->keys + j * stride + v->nope, c + j * v->width + v->rank,
               (size_t)v->rope * sizeof *c);
}

/* The tile's own page: query i sees the first `first` + i + 1 keys. What it does not see is
 * left out of the sum, not multiplied by zero, for it may be infinite. */
static void attend_own_page(const kl_mla_view *v, const tile *t, const worker_scratch *s,
                            const tile_state *state)
{
    const kl_mla_kernels *kernels = &v->kernels->mla;
    const int64_t K = v->nope + v->rope, stride = K + v->V;
    const int64_t first = t->position % KL_PAGE_TOKENS, J = first + t->count;
    for (int64_t i = 0; i < t->count; i++)
        for (int64_t j = first + i + 1; j < J; j++) s->scores[j * LANES + i] = -INFINITY;
    kernels->softmax(s->scores, LANES, J, t->count, state->max, state->sum, s->keep);
    for (int64_t i = 0; i < t->count; i++)
        kernels->product((kl_mla_left){s->scores + i, 0, LANES}, 1, s->keys + K, KL_F32, stride,
                         v->V, first + i + 1, s->keep + i, state->out + i * v->V, v->V);
}

/* One page of the context of a tile. */
static void attend_page(const kl_mla_view *v, const tile *t, int64_t page,
                        const worker_scratch *s, const tile_state *state)
{
    const kl_mla_kernels *kernels = &v->kernels->mla;
    const int64_t K = v->nope + v->rope, stride = K + v->V;
    const bool own = t->position / KL_PAGE_TOKENS == page;
    const int64_t J = own ? t->position % KL_PAGE_TOKENS + t->count : KL_PAGE_TOKENS;
    kernels->product((kl_mla_left){s->keys, stride, 1}, J, state->query, KL_F32, LANES,
                     t->count, K, NULL, s->scores, LANES);
    if (own) {
        attend_own_page(v, t, s, state);
        return;
    }
    kernels->softmax(s->scores, LANES, J, t->count, state->max, state->sum, s->keep);
    kernels->product((kl_mla_left){s->scores, 1, LANES}, t->count, s->keys + K, KL_F32, stride,
                     v->V, J, s->keep, state->out, v->V);
}

static void store_tile(const kl_mla_view *v, const tile *t, int64_t h, const tile_state *s)
{
    for (int64_t i = 0; i < t->count; i++)
        v->kernels->mla.narrow(s->out + i * v->V, v->V, 1.0f / s->sum[i],
                               kl_mla_out(v, t->token + i, h), v->a->out.dtype);
}

/* Late groups first: they have the longest contexts, and would else end the call alone. */
static void group_task(void *ctx, int64_t task, int worker)
{
    const run *r = ctx;
    const kl_mla_view *v = &r->v;
    const tile_group group = r->groups[r->n_groups - 1 - task / v->H];
    const tile *tiles = r->tiles + group.first, *last = tiles + group.count - 1;
    const int64_t h = task % v->H, end = (int64_t)last->position + last->count;
    kl_arena arena;
    kl_arena_init(&arena, r->scratch + (size_t)worker * r->scratch_bytes, r->scratch_bytes);
    const worker_scratch s = take_scratch(&arena, v, r->group_tiles);

    load_weights(v, h, &s);
    for (int64_t i = 0; i < group.count; i++) load_tile(v, &tiles[i], h, s.keys, &s.tiles[i]);
    for (int64_t page = 0; page * KL_PAGE_TOKENS < end; page++) {
        const int64_t count = kl_mla_min(end - page * KL_PAGE_TOKENS, KL_PAGE_TOKENS);
        expand_page(v, last->seq, page, count, &s);
        for (int64_t i = 0; i < group.count; i++)
            if (tiles[i].position / KL_PAGE_TOKENS >= page)
                attend_page(v, &tiles[i], page, &s, &s.tiles[i]);
    }
    for (int64_t i = 0; i < group.count; i++) store_tile(v, &tiles[i], h, &s.tiles[i]);
}

kl_status kl_cpu_mla_prefill(kl_backend *be, const kl_mla_prefill *a, kl_error *err)
{
    (void)err;
    run r = {.v = kl_mla_view_of(be, a)};
    kl_arena arena;
    kl_arena_init(&arena, a->ws.data, a->ws.bytes);
    layout(&arena, &r);
    plan(&r);
    kl_pool_run(r.v.pool, r.n_groups * r.v.H, group_task, &r);
    kl_mla_absorbed_run(&r.v, &r.absorbed, r.rows, r.n_rows);
    return KL_OK;
}
