/*
 * mla_decode.c -- latent attention for single tokens, in the absorbed form.
 *
 * Computes     q' = [W_UK^T q_nope | q_pe];  ctx = softmax(scale q' [c | k_pe]^T) c;
 *              o = W_UV ctx
 * Shapes       q [N, H, nope+rope], pages [P, 64, rank+rope], out [N, H, V]
 * Precision    f32 arithmetic, rounded once to act
 * Order        a context is cut into parts whose size follows from its length alone; pages of
 *              a part in order with a running maximum, then the parts in order. So a result
 *              depends neither on the threads nor on the other rows
 * Tasks        head x 12 rows to absorb and to finish; part x 32 heads to attend: the latents
 *              are widened once for a group of heads
 * Roofline     2 H (2 rank + rope) flops for 2 (rank + rope) bytes of bf16 latents: 60 flop/B
 *              at H = 32, compute-bound on a CPU
 */
#include "backend/mla.h"
#include "cpu/mla.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define ROWS_PER_TASK  16  /* rows that share a head's weights while they are in the cache */
#define HEADS_PER_TASK 32  /* a page of scores and the queries of a group fit the L2 */
#define HEADS_ALIGN    16  /* so that no vector of heads is cut */
#define PART_PAGES     4   /* merging a part costs rank, attending 64 rank a page */
#define PARTS_PER_ROW  32  /* bounds the results to merge: longer contexts have longer parts */
#define PARTS_AT_ONCE  128 /* bounds the workspace; rows beyond it wait for the next wave */

typedef struct {
    const kl_mla_view *v;
    const kl_mla_absorbed *ws;
    const kl_mla_row *rows; /* of this wave */
    int64_t n_rows, n_parts, row_blocks;
    int64_t head_groups, group_heads;
} wave;

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t part_pages(int64_t length)
{
    const int64_t pages = divide_up(length, KL_PAGE_TOKENS);
    const int64_t share = divide_up(pages, PARTS_PER_ROW);
    return share > PART_PAGES ? share : PART_PAGES;
}

static int64_t count_parts(int64_t length)
{
    return divide_up(divide_up(length, KL_PAGE_TOKENS), part_pages(length));
}

/* ---- scratch of a worker --------------------------------------------------------------- */

typedef struct {
    float *query; /* [ROWS_PER_TASK, nope] */
} absorb_scratch;

typedef struct {
    float *page;             /* [64, width] */
    float *query;            /* [width, HEADS_PER_TASK] */
    float *scores;           /* [64, HEADS_PER_TASK] */
    float *max, *sum, *keep; /* [HEADS_PER_TASK] */
} attend_scratch;

typedef struct {
    float *context; /* [ROWS_PER_TASK, rank] */
    float *panels;  /* the same, packed */
    float *out;     /* [ROWS_PER_TASK, V] */
} finish_scratch;

static absorb_scratch take_absorb(kl_arena *arena, const kl_mla_view *v)
{
    return (absorb_scratch){.query = kl_mla_floats(arena, ROWS_PER_TASK * v->nope)};
}

static attend_scratch take_attend(kl_arena *arena, const kl_mla_view *v)
{
    attend_scratch s;
    s.page = kl_mla_floats(arena, KL_PAGE_TOKENS * v->width);
    s.query = kl_mla_floats(arena, v->width * HEADS_PER_TASK);
    s.scores = kl_mla_floats(arena, KL_PAGE_TOKENS * HEADS_PER_TASK);
    s.max = kl_mla_floats(arena, HEADS_PER_TASK);
    s.sum = kl_mla_floats(arena, HEADS_PER_TASK);
    s.keep = kl_mla_floats(arena, HEADS_PER_TASK);
    return s;
}

static finish_scratch take_finish(kl_arena *arena, const kl_mla_view *v)
{
    finish_scratch s;
    s.context = kl_mla_floats(arena, ROWS_PER_TASK * v->rank);
    s.panels = kl_mla_floats(arena, ROWS_PER_TASK * kl_panel_cols(v->rank));
    s.out = kl_mla_floats(arena, ROWS_PER_TASK * v->V);
    return s;
}

static kl_arena worker_arena(const wave *w, int worker)
{
    kl_arena arena;
    const size_t bytes = w->ws->scratch_bytes;
    kl_arena_init(&arena, w->ws->scratch + (size_t)worker * bytes, bytes);
    return arena;
}

void kl_mla_absorbed_layout(kl_arena *arena, const kl_mla_view *v, int64_t rows,
                            kl_mla_absorbed *out)
{
    const int64_t pages = v->a->block_table.shape[1];
    const int64_t parts = kl_mla_min(divide_up(pages, PART_PAGES), PARTS_PER_ROW);
    out->max_rows = kl_mla_min(rows, PARTS_AT_ONCE);
    out->max_parts = kl_mla_min(rows * parts, PARTS_AT_ONCE);
    out->query = kl_mla_floats(arena, out->max_rows * v->H * v->width);
    out->part_row = kl_mla_take(arena, out->max_parts, sizeof *out->part_row);
    out->max = kl_mla_floats(arena, out->max_parts * v->H);
    out->sum = kl_mla_floats(arena, out->max_parts * v->H);
    out->context = kl_mla_floats(arena, out->max_parts * v->H * v->rank);

    kl_arena measure;
    kl_arena_init(&measure, NULL, 0);
    take_absorb(&measure, v);
    kl_arena_rewind(&measure, 0);
    take_attend(&measure, v);
    kl_arena_rewind(&measure, 0);
    take_finish(&measure, v);
    out->scratch_bytes = measure.peak;
    out->scratch = kl_mla_take(arena, kl_pool_size(v->pool), out->scratch_bytes);
}

/* ---- q' -------------------------------------------------------------------------------- */

static void absorb_task(void *ctx, int64_t task, int worker)
{
    const wave *w = ctx;
    const kl_mla_view *v = w->v;
    const kl_mla_kernels *kernels = &v->kernels->mla;
    kl_arena arena = worker_arena(w, worker);
    const absorb_scratch s = take_absorb(&arena, v);
    const int64_t h = task / w->row_blocks, first = task % w->row_blocks * ROWS_PER_TASK;
    const int64_t n = kl_mla_min(w->n_rows - first, ROWS_PER_TASK);
    const int64_t stride = v->H * v->width;
    float *to = w->ws->query + first * stride + h * v->width;

    for (int64_t i = 0; i < n; i++) {
        const int64_t token = w->rows[first + i].token;
        kernels->widen(kl_mla_query(v, token, h, 0), v->a->q.dtype, v->nope, v->a->scale,
                       s.query + i * v->nope);
        kernels->widen(kl_mla_query(v, token, h, v->nope), v->a->q.dtype, v->rope, v->a->scale,
                       to + i * stride + v->rank);
    }
    kernels->product((kl_mla_left){s.query, v->nope, 1}, n, kl_mla_weight(v, h, 0),
                     v->a->w_kv_b.dtype, v->rank, v->rank, v->nope, NULL, to, stride);
}

/* ---- one part of a context -------------------------------------------------------------- */

/* Heads become the lanes: [heads, width] -> [width, lanes], zeros past the last head. */
static void transpose_queries(const float *from, int64_t heads, int64_t width, int64_t lanes,
                              float *to)
{
    memset(to, 0, (size_t)(width * lanes) * sizeof *to);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t k = 0; k < width; k++) to[k * lanes + h] = from[h * width + k];
}

static void attend_pages(const kl_mla_view *v, const attend_scratch *s, const kl_mla_row *row,
                         int64_t first_page, int64_t heads, int64_t lanes, float *context)
{
    const kl_mla_kernels *kernels = &v->kernels->mla;
    const int64_t pages = divide_up(row->length, KL_PAGE_TOKENS);
    const int64_t end = kl_mla_min(first_page + part_pages(row->length), pages);
    for (int64_t page = first_page; page < end; page++) {
        const int64_t J = kl_mla_min(row->length - page * KL_PAGE_TOKENS, KL_PAGE_TOKENS);
        const float *c = kl_mla_load_page(v, row->seq, page, J, s->page);
        kernels->product((kl_mla_left){c, v->width, 1}, J, s->query, KL_F32, lanes, lanes,
                         v->width, NULL, s->scores, lanes);
        kernels->softmax(s->scores, lanes, J, lanes, s->max, s->sum, s->keep);
        kernels->product((kl_mla_left){s->scores, 1, lanes}, heads, c, KL_F32, v->width,
                         v->rank, J, s->keep, context, v->rank);
    }
}

static void attend_task(void *ctx, int64_t task, int worker)
{
    const wave *w = ctx;
    const kl_mla_view *v = w->v;
    kl_arena arena = worker_arena(w, worker);
    const attend_scratch s = take_attend(&arena, v);
    const int64_t part = task / w->head_groups, h = task % w->head_groups * w->group_heads;
    const int64_t heads = kl_mla_min(v->H - h, w->group_heads);
    const int64_t lanes = divide_up(heads, HEADS_ALIGN) * HEADS_ALIGN;
    const int64_t index = w->ws->part_row[part];
    const kl_mla_row *row = &w->rows[index];
    const size_t bytes = (size_t)heads * sizeof(float);

    transpose_queries(w->ws->query + (index * v->H + h) * v->width, heads, v->width, lanes,
                      s.query);
    float *context = w->ws->context + (part * v->H + h) * v->rank;
    memset(context, 0, bytes * (size_t)v->rank);
    for (int64_t i = 0; i < lanes; i++) s.max[i] = -FLT_MAX, s.sum[i] = 0.0f;
    attend_pages(v, &s, row, (part - row->first_part) * part_pages(row->length), heads, lanes,
                 context);
    memcpy(w->ws->max + part * v->H + h, s.max, bytes);
    memcpy(w->ws->sum + part * v->H + h, s.sum, bytes);
}

/* ---- merging the parts ------------------------------------------------------------------- */

/* ctx of one row and head: the parts' contexts, each brought to the common maximum. A row
 * that sees nothing has no parts and yields zeros. */
static void merge_parts(const wave *w, const kl_mla_row *row, int64_t h, float *context)
{
    const kl_mla_view *v = w->v;
    const int64_t parts = count_parts(row->length), H = v->H;
    const float *max = w->ws->max + row->first_part * H + h;
    const float *sum = w->ws->sum + row->first_part * H + h;
    float weights[PARTS_PER_ROW], top = -FLT_MAX, total = 0.0f;
    for (int64_t p = 0; p < parts; p++) top = fmaxf(top, max[p * H]);
    for (int64_t p = 0; p < parts; p++) {
        weights[p] = expf(max[p * H] - top);
        total += weights[p] * sum[p * H];
    }
    for (int64_t p = 0; p < parts; p++) weights[p] /= total;
    v->kernels->mla.product((kl_mla_left){weights, 0, 1}, 1,
                            w->ws->context + (row->first_part * H + h) * v->rank, KL_F32,
                            H * v->rank, v->rank, parts, NULL, context, v->rank);
}

/* out [n, V] = context [n, rank] W_UV^T. */
static void apply_values(const kl_mla_view *v, int64_t h, int64_t n, const finish_scratch *s)
{
    const kl_product_kernels *kernels = &v->kernels->product;
    const kl_tensor *w = &v->a->w_kv_b;
    const kl_rows rows = {.data = s->context, .dtype = KL_F32, .stride = v->rank, .n = n};
    const kl_weight values = {.format = w->dtype == KL_F32 ? KL_W_F32 : KL_W_BF16,
                              .count = 1,
                              .rows = v->H * (v->nope + v->V),
                              .cols = v->rank,
                              .data = w->data};
    for (int64_t i = 0; i < n; i += kernels->tile_x) {
        const int R = (int)kl_mla_min(n - i, kernels->tile_x);
        kernels->pack_x(&rows, i, R, v->rank, false, s->panels + i * kl_panel_cols(v->rank));
    }
    kernels->direct(s->panels, n, &values, h * (v->nope + v->V) + v->nope, v->V, false, s->out,
                    v->V);
}

static void finish_task(void *ctx, int64_t task, int worker)
{
    const wave *w = ctx;
    const kl_mla_view *v = w->v;
    kl_arena arena = worker_arena(w, worker);
    const finish_scratch s = take_finish(&arena, v);
    const int64_t h = task / w->row_blocks, first = task % w->row_blocks * ROWS_PER_TASK;
    const int64_t n = kl_mla_min(w->n_rows - first, ROWS_PER_TASK);

    for (int64_t i = 0; i < n; i++)
        merge_parts(w, &w->rows[first + i], h, s.context + i * v->rank);
    apply_values(v, h, n, &s);
    for (int64_t i = 0; i < n; i++)
        v->kernels->mla.narrow(s.out + i * v->V, v->V, 1.0f,
                               kl_mla_out(v, w->rows[first + i].token, h), v->a->out.dtype);
}

/* ---- the whole --------------------------------------------------------------------------- */

/* Number the parts of as many rows as fit the workspace. */
static void fill_wave(wave *w, kl_mla_row *rows, int64_t n_rows)
{
    w->rows = rows;
    w->n_rows = w->n_parts = 0;
    while (w->n_rows < kl_mla_min(n_rows, w->ws->max_rows)) {
        kl_mla_row *row = &rows[w->n_rows];
        const int64_t parts = count_parts(row->length);
        if (w->n_parts + parts > w->ws->max_parts) break;
        row->first_part = (int32_t)w->n_parts;
        for (int64_t p = 0; p < parts; p++) w->ws->part_row[w->n_parts++] = (int32_t)w->n_rows;
        w->n_rows++;
    }
    w->row_blocks = divide_up(w->n_rows, ROWS_PER_TASK);
}

void kl_mla_absorbed_run(const kl_mla_view *v, const kl_mla_absorbed *ws, kl_mla_row *rows,
                         int64_t n_rows)
{
    wave w = {.v = v, .ws = ws};
    for (int64_t done = 0; done < n_rows; done += w.n_rows) {
        fill_wave(&w, rows + done, n_rows - done);
        const bool few =
            w.n_parts * divide_up(v->H, HEADS_PER_TASK) < 2 * kl_pool_size(v->pool);
        w.group_heads = few ? HEADS_ALIGN : HEADS_PER_TASK;
        w.head_groups = divide_up(v->H, w.group_heads);
        kl_pool_run(v->pool, v->H * w.row_blocks, absorb_task, &w);
        kl_pool_run(v->pool, w.n_parts * w.head_groups, attend_task, &w);
        kl_pool_run(v->pool, v->H * w.row_blocks, finish_task, &w);
    }
}

static kl_mla_row *layout(kl_arena *arena, const kl_mla_view *v, kl_mla_absorbed *ws)
{
    const int64_t N = v->a->q.shape[0];
    kl_mla_row *rows = kl_mla_take(arena, N, sizeof *rows);
    kl_mla_absorbed_layout(arena, v, N, ws);
    return rows;
}

size_t kl_cpu_mla_decode_workspace(kl_backend *be, const kl_mla_decode *a)
{
    const kl_mla_view v = kl_mla_view_of(be, a);
    kl_mla_absorbed ws;
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    layout(&arena, &v, &ws);
    return arena.used;
}

kl_status kl_cpu_mla_decode(kl_backend *be, const kl_mla_decode *a, kl_error *err)
{
    if (!kl_tensor_absent(&a->raw)) {
        const kl_mla_append append = kl_mla_append_of(a);
        KL_TRY(kl_cpu_mla_append(be, &append, err));
    }
    const kl_mla_view v = kl_mla_view_of(be, a);
    const int32_t *lengths = a->lengths.data;
    kl_mla_absorbed ws;
    kl_arena arena;
    kl_arena_init(&arena, a->ws.data, a->ws.bytes);
    kl_mla_row *rows = layout(&arena, &v, &ws);
    for (int64_t n = 0; n < a->q.shape[0]; n++)
        rows[n] = (kl_mla_row){.token = (int32_t)n, .seq = (int32_t)n, .length = lengths[n]};
    kl_mla_absorbed_run(&v, &ws, rows, a->q.shape[0]);
    return KL_OK;
}
