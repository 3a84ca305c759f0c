/*
 * mlp.c -- the dense feed-forward layer on the CPU, with the norm before and the sum after it.
 * Formula and shapes: backend/ops.h.
 *
 * Gate and up run as one product, so their f32 results never leave a task; only the inner
 * product is stored, for KL_PRODUCT_ROWS tokens at a time.
 */
#include "backend/ends.h"
#include "cpu/product.h"

typedef struct {
    void *inner, *panels, *scratch;
    void *h, *y; /* the normalised x, and what goes to the residual; NULL: not wanted */
} buffers;

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static buffers lay_out(kl_arena *arena, const kl_cpu *cpu, const kl_mlp *a)
{
    const int64_t T = a->x.shape[0], D = a->w1.cols, inner = a->w1.rows;
    const int64_t rows = T < KL_PRODUCT_ROWS ? T : KL_PRODUCT_ROWS;
    const size_t act = kl_dtype_bytes(kl_mlp_act(a));
    const size_t up = kl_product_scratch_bytes(cpu, rows, D);
    const size_t down = kl_product_scratch_bytes(cpu, rows, inner);
    buffers b = {
        .inner = kl_arena_take(arena, (size_t)(rows * inner) * act),
        .panels = kl_arena_take(arena, kl_product_panel_bytes(rows, larger(D, inner))),
        .scratch = kl_arena_take(arena, up > down ? up : down),
    };
    if (!kl_tensor_absent(&a->norm_weight))
        b.h = kl_arena_take(arena, (size_t)(rows * D) * act);
    if (!kl_tensor_absent(&a->residual)) b.y = kl_arena_take(arena, (size_t)(rows * D) * act);
    return b;
}

size_t kl_cpu_mlp_workspace(kl_backend *be, const kl_mlp *a)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    lay_out(&arena, (const kl_cpu *)be, a);
    return arena.used;
}

/* out = mlp(h), `n` rows of either. */
static void run_products(const kl_cpu *cpu, const kl_mlp *a, const buffers *b, kl_tensor h,
                         kl_tensor out)
{
    const int64_t n = h.shape[0], inner = a->w1.rows;
    kl_product gate_up = {
        .x = kl_rows_of(&h, 0, n),
        .w = a->w1,
        .up = a->w3,
        .out = b->inner,
        .out_dtype = h.dtype,
        .out_stride = inner,
        .panels = b->panels,
    };
    kl_products_run(cpu, &gate_up, 1, b->scratch);
    kl_product down = {
        .x = {b->inner, h.dtype, inner, NULL, n},
        .w = a->w2,
        .out = out.data,
        .out_dtype = h.dtype,
        .out_stride = out.shape[1],
        .panels = b->panels,
    };
    kl_products_run(cpu, &down, 1, b->scratch);
}

/* Rows [t, t + n). */
static kl_status run_block(kl_backend *be, const kl_mlp *a, const buffers *b, int64_t t,
                           int64_t n, kl_error *err)
{
    const kl_dtype act = kl_mlp_act(a);
    kl_tensor x = kl_row_slice(&a->x, t, n);
    if (!kl_tensor_absent(&a->norm_weight)) {
        const kl_tensor h = kl_tensor_2d(b->h, act, n, a->w1.cols);
        const kl_rms_norm norm = kl_norm_before(x, a->norm_weight, a->norm_eps, h);
        KL_TRY(kl_cpu_rms_norm(be, &norm, err));
        x = h;
    }
    const bool adds = !kl_tensor_absent(&a->residual);
    const kl_tensor out =
        adds ? kl_tensor_2d(b->y, act, n, a->w2.rows) : kl_row_slice(&a->out, t, n);
    run_products((const kl_cpu *)be, a, b, x, out);
    if (!adds) return KL_OK;
    const kl_rms_norm sum = kl_sum_after(out, kl_row_slice(&a->residual, t, n));
    return kl_cpu_rms_norm(be, &sum, err);
}

kl_status kl_cpu_mlp(kl_backend *be, const kl_mlp *a, kl_error *err)
{
    kl_arena arena;
    kl_arena_init(&arena, a->ws.data, a->ws.bytes);
    const buffers b = lay_out(&arena, (const kl_cpu *)be, a);
    const int64_t T = a->x.shape[0];
    for (int64_t t = 0; t < T; t += KL_PRODUCT_ROWS) {
        const int64_t left = T - t;
        KL_TRY(run_block(be, a, &b, t, left < KL_PRODUCT_ROWS ? left : KL_PRODUCT_ROWS, err));
    }
    return KL_OK;
}
