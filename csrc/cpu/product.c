/*
 * product.c -- see product.h.
 *
 * Packed tasks hold PACKED_BYTES of dequantised weights, a third of a second-level cache of
 * 1 MiB, and stream the panels of x over them.
 */
#include "cpu/product.h"

#define DIRECT_ROWS   64   /* of x; up to there it pays to read a weight once a tile */
#define DIRECT_TILE   1536 /* results of a direct task at most */
#define PACKED_COLS   32   /* rows of w in a packed task at most */
#define PACKED_BYTES  ((int64_t)320 << 10)
#define TASKS         6                  /* for each thread, so that a late one costs little */
#define INLINE_FLOATS ((int64_t)1 << 15) /* of x: packing less costs less than a region */
#define MAX_TILE_X    6
#define PAIR          (2 * KL_TILE_W) /* a tile of w and one of up */

typedef struct {
    const kl_cpu *cpu;
    kl_product *p;
    int64_t n;
    char *scratch;
    size_t scratch_bytes; /* of one worker */
} batch;

/* ---- sizes ----------------------------------------------------------------------------- */

size_t kl_product_panel_bytes(int64_t n, int64_t K)
{
    return (size_t)n * (size_t)kl_panel_cols(K) * sizeof(float);
}

static int64_t packed_cols(int64_t K)
{
    const int64_t fit = PACKED_BYTES / (kl_panel_cols(K) * (int64_t)sizeof(float));
    const int64_t cols = fit < PACKED_COLS ? fit / PAIR * PAIR : PACKED_COLS;
    return cols < PAIR ? PAIR : cols;
}

static size_t packed_bytes(int64_t K)
{
    return kl_product_panel_bytes(packed_cols(K), K);
}

/* One worker's: packed weights and the lanes between blocks of columns. */
static size_t worker_bytes(int64_t n, int64_t K)
{
    if (n <= DIRECT_ROWS) return 0;
    return packed_bytes(K) + (size_t)kl_partial_floats(PACKED_COLS) * sizeof(float);
}

size_t kl_product_scratch_bytes(const kl_cpu *cpu, int64_t n, int64_t K)
{
    return (size_t)kl_pool_size(cpu->pool) * worker_bytes(n, K);
}

kl_rows kl_rows_of(const kl_tensor *t, int64_t first, int64_t n)
{
    const int64_t offset = first * t->stride[0] * (int64_t)kl_dtype_bytes(t->dtype);
    return (kl_rows){(const char *)t->data + offset, t->dtype, t->stride[0], NULL, n};
}

/* Whose panel or task number `i` of the batch is: the last product that does not begin after
 * it. Products without rows of x begin where the next one does, so they are never found. */
static const kl_product *find_product(const batch *b, int64_t i, bool panels)
{
    int64_t lo = 0, hi = b->n - 1;
    while (lo < hi) {
        const int64_t mid = (lo + hi + 1) / 2;
        if ((panels ? b->p[mid].first_panel : b->p[mid].first_task) <= i)
            lo = mid;
        else
            hi = mid - 1;
    }
    return b->p + lo;
}

/* ---- packing --------------------------------------------------------------------------- */

static bool uses_dot(const kl_cpu *cpu, const kl_product *p)
{
    return cpu->kernels->product.bf16_dot && p->x.dtype == KL_BF16 &&
           p->w.format == KL_W_BF16 && (p->up.data == NULL || p->up.format == KL_W_BF16);
}

static size_t panel_row_bytes(const kl_product *p, bool dot)
{
    return (size_t)kl_panel_cols(p->w.cols) * (dot ? sizeof(uint16_t) : sizeof(float));
}

static void pack_panel(const kl_cpu *cpu, const kl_product *p, int64_t panel)
{
    const kl_product_kernels *k = &cpu->kernels->product;
    const int64_t first = panel * k->tile_x, left = p->x.n - first;
    const bool dot = uses_dot(cpu, p);
    k->pack_x(&p->x, first, left < k->tile_x ? (int)left : k->tile_x, p->w.cols, dot,
              (char *)p->panels + (size_t)first * panel_row_bytes(p, dot));
}

static void pack_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const batch *b = ctx;
    const kl_product *p = find_product(b, task, true);
    pack_panel(b->cpu, p, task - p->first_panel);
}

void kl_products_pack(const kl_cpu *cpu, kl_product *p, int64_t n)
{
    const int tile_x = cpu->kernels->product.tile_x;
    int64_t panels = 0, floats = 0;
    for (int64_t i = 0; i < n; i++) {
        p[i].first_panel = panels;
        panels += (p[i].x.n + tile_x - 1) / tile_x;
        floats += p[i].x.n * p[i].w.cols;
    }
    batch b = {.cpu = cpu, .p = p, .n = n};
    if (floats > INLINE_FLOATS)
        kl_pool_run(cpu->pool, panels, pack_task, &b);
    else
        for (int64_t i = 0; i < panels; i++) pack_task(&b, i, 0);
}

/* ---- products -------------------------------------------------------------------------- */

static void store(const kl_product *p, const kl_product_kernels *k, const float *a,
                  const float *b, int64_t stride, int64_t t, int64_t rows, int64_t first,
                  int64_t cols)
{
    const int64_t at = t * p->out_stride + first;
    k->finish(a, b, stride, rows, cols,
              (char *)p->out + at * (int64_t)kl_dtype_bytes(p->out_dtype), p->out_dtype,
              p->out_stride);
}

static void compute_direct(const kl_cpu *cpu, const kl_product *p, int64_t first, int64_t cols)
{
    const kl_product_kernels *k = &cpu->kernels->product;
    const bool dot = uses_dot(cpu, p), gated = p->up.data != NULL;
    if (!gated && p->out_dtype == KL_F32) {
        k->direct(p->panels, p->x.n, &p->w, first, cols, dot, (float *)p->out + first,
                  p->out_stride);
        return;
    }
    float a[DIRECT_TILE], b[DIRECT_TILE];
    k->direct(p->panels, p->x.n, &p->w, first, cols, dot, a, cols);
    if (gated) k->direct(p->panels, p->x.n, &p->up, first, cols, dot, b, cols);
    store(p, k, a, gated ? b : NULL, cols, 0, p->x.n, first, cols);
}

/* With an `up`, its rows are packed behind those of w, so a task has half as many of each. */
static void compute_packed(const kl_cpu *cpu, const kl_product *p, int64_t first, int64_t cols,
                           char *scratch)
{
    const kl_product_kernels *k = &cpu->kernels->product;
    const bool dot = uses_dot(cpu, p), gated = p->up.data != NULL;
    const int64_t K = p->w.cols;
    char *up = scratch + packed_bytes(K) / 2;
    float *partial = (float *)(scratch + packed_bytes(K));
    k->pack_w(&p->w, first, cols, dot, scratch);
    if (gated) k->pack_w(&p->up, first, cols, dot, up);

    for (int64_t t = 0; t < p->x.n; t += k->tile_x) {
        const int R = p->x.n - t < k->tile_x ? (int)(p->x.n - t) : k->tile_x;
        const char *x = (const char *)p->panels + (size_t)t * panel_row_bytes(p, dot);
        float a[MAX_TILE_X * PACKED_COLS], b[MAX_TILE_X * PACKED_COLS];
        k->packed(x, R, scratch, cols, p->w.format, K, dot, partial, a, cols);
        if (gated) k->packed(x, R, up, cols, p->up.format, K, dot, partial, b, cols);
        store(p, k, a, gated ? b : NULL, cols, t, R, first, cols);
    }
}

static void compute_task(void *ctx, int64_t task, int worker)
{
    const batch *b = ctx;
    const kl_product *p = find_product(b, task, false);
    const int64_t first = (task - p->first_task) * p->task_rows;
    const int64_t left = p->w.rows - first, cols = left < p->task_rows ? left : p->task_rows;
    if (p->x.n <= DIRECT_ROWS)
        compute_direct(b->cpu, p, first, cols);
    else
        compute_packed(b->cpu, p, first, cols, b->scratch + (size_t)worker * b->scratch_bytes);
}

/* Rows of w in a task: few enough that every thread has some, many enough to be worth one. */
static int64_t choose_task_rows(const kl_product *p, int64_t share)
{
    int64_t most = p->x.n == 0 ? KL_TILE_W : DIRECT_TILE / p->x.n / KL_TILE_W * KL_TILE_W;
    if (p->x.n > DIRECT_ROWS) {
        most = packed_cols(p->w.cols);
        if (p->up.data != NULL) most = most / PAIR * KL_TILE_W;
    }
    const int64_t rows = (share + KL_TILE_W - 1) / KL_TILE_W * KL_TILE_W;
    return rows < KL_TILE_W ? KL_TILE_W : rows < most ? rows : most;
}

void kl_products_compute(const kl_cpu *cpu, kl_product *p, int64_t n, void *scratch)
{
    int64_t rows = 0, tasks = 0;
    batch b = {.cpu = cpu, .p = p, .n = n, .scratch = scratch};
    for (int64_t i = 0; i < n; i++) rows += p[i].w.rows;
    for (int64_t i = 0; i < n; i++) {
        const size_t bytes = worker_bytes(p[i].x.n, p[i].w.cols);
        if (bytes > b.scratch_bytes) b.scratch_bytes = bytes;
        p[i].task_rows = choose_task_rows(p + i, rows / (kl_pool_size(cpu->pool) * TASKS));
        p[i].first_task = tasks;
        if (p[i].x.n > 0) tasks += (p[i].w.rows + p[i].task_rows - 1) / p[i].task_rows;
    }
    kl_pool_run(cpu->pool, tasks, compute_task, &b);
}

void kl_products_run(const kl_cpu *cpu, kl_product *p, int64_t n, void *scratch)
{
    kl_products_pack(cpu, p, n);
    kl_products_compute(cpu, p, n, scratch);
}
