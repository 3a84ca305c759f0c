/*
 * mlp.c -- the dense feed-forward layer on the CPU. Formula and shapes: backend/ops.h.
 *
 * Gate and up run as one product, so their f32 results never leave a task; only the inner
 * product is stored, for KL_PRODUCT_ROWS tokens at a time.
 */
#include "cpu/product.h"

typedef struct {
    void *inner, *panels, *scratch;
} buffers;

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static buffers lay_out(kl_arena *arena, const kl_cpu *cpu, const kl_mlp *a)
{
    const int64_t T = a->x.shape[0], D = a->w1.cols, inner = a->w1.rows;
    const int64_t rows = T < KL_PRODUCT_ROWS ? T : KL_PRODUCT_ROWS;
    const size_t up = kl_product_scratch_bytes(cpu, rows, D);
    const size_t down = kl_product_scratch_bytes(cpu, rows, inner);
    return (buffers){
        .inner = kl_arena_take(arena, (size_t)(rows * inner) * kl_dtype_bytes(a->x.dtype)),
        .panels = kl_arena_take(arena, kl_product_panel_bytes(rows, larger(D, inner))),
        .scratch = kl_arena_take(arena, up > down ? up : down),
    };
}

size_t kl_cpu_mlp_workspace(kl_backend *be, const kl_mlp *a)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    lay_out(&arena, (const kl_cpu *)be, a);
    return arena.used;
}

/* Rows [t, t + n). */
static void run_block(const kl_cpu *cpu, const kl_mlp *a, const buffers *b, int64_t t,
                      int64_t n)
{
    const int64_t D = a->w1.cols, inner = a->w1.rows;
    const kl_dtype act = a->x.dtype;
    kl_product gate_up = {
        .x = kl_rows_of(&a->x, t, n),
        .w = a->w1,
        .up = a->w3,
        .out = b->inner,
        .out_dtype = act,
        .out_stride = inner,
        .panels = b->panels,
    };
    kl_products_run(cpu, &gate_up, 1, b->scratch);
    kl_product down = {
        .x = {b->inner, act, inner, NULL, n},
        .w = a->w2,
        .out = (char *)a->out.data + (size_t)(t * D) * kl_dtype_bytes(act),
        .out_dtype = act,
        .out_stride = D,
        .panels = b->panels,
    };
    kl_products_run(cpu, &down, 1, b->scratch);
}

kl_status kl_cpu_mlp(kl_backend *be, const kl_mlp *a, kl_error *err)
{
    (void)err;
    const kl_cpu *cpu = (const kl_cpu *)be;
    kl_arena arena;
    kl_arena_init(&arena, a->ws.data, a->ws.bytes);
    const buffers b = lay_out(&arena, cpu, a);
    const int64_t T = a->x.shape[0];
    for (int64_t t = 0; t < T; t += KL_PRODUCT_ROWS)
        run_block(cpu, a, &b, t, T - t < KL_PRODUCT_ROWS ? T - t : KL_PRODUCT_ROWS);
    return KL_OK;
}
