/*
 * linear.c -- a linear map on the CPU. Formula and shapes: backend/ops.h.
 *
 * Blocks of KL_PRODUCT_ROWS tokens bound the workspace; each reads the weight anew, which
 * costs little next to that many multiply-adds for every byte.
 */
#include "cpu/product.h"

typedef struct {
    void *panels, *scratch;
} buffers;

static buffers lay_out(kl_arena *arena, const kl_cpu *cpu, const kl_linear *a)
{
    const int64_t T = a->x.shape[0], K = a->w.cols;
    const int64_t rows = T < KL_PRODUCT_ROWS ? T : KL_PRODUCT_ROWS;
    return (buffers){
        .panels = kl_arena_take(arena, kl_product_panel_bytes(rows, K)),
        .scratch = kl_arena_take(arena, kl_product_scratch_bytes(cpu, rows, K)),
    };
}

size_t kl_cpu_linear_workspace(kl_backend *be, const kl_linear *a)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    lay_out(&arena, (const kl_cpu *)be, a);
    return arena.used;
}

kl_status kl_cpu_linear(kl_backend *be, const kl_linear *a, kl_error *err)
{
    (void)err;
    const kl_cpu *cpu = (const kl_cpu *)be;
    kl_arena arena;
    kl_arena_init(&arena, a->ws.data, a->ws.bytes);
    const buffers b = lay_out(&arena, cpu, a);
    const int64_t T = a->x.shape[0];
    for (int64_t t = 0; t < T; t += KL_PRODUCT_ROWS) {
        const int64_t n = T - t < KL_PRODUCT_ROWS ? T - t : KL_PRODUCT_ROWS;
        const int64_t at = t * a->out.stride[0] * (int64_t)kl_dtype_bytes(a->out.dtype);
        kl_product p = {
            .x = kl_rows_of(&a->x, t, n),
            .w = a->w,
            .out = (char *)a->out.data + at,
            .out_dtype = a->out.dtype,
            .out_stride = a->out.stride[0],
            .panels = b.panels,
        };
        kl_products_run(cpu, &p, 1, b.scratch);
    }
    return KL_OK;
}

size_t kl_cpu_linear_pair_workspace(kl_backend *be, const kl_linear_pair *a)
{
    const size_t first = kl_cpu_linear_workspace(be, &a->first);
    const size_t second = kl_cpu_linear_workspace(be, &a->second);
    return first > second ? first : second;
}

kl_status kl_cpu_linear_pair(kl_backend *be, const kl_linear_pair *a, kl_error *err)
{
    kl_linear first = a->first, second = a->second;
    first.ws = second.ws = a->ws;
    KL_TRY(kl_cpu_linear(be, &first, err));
    return kl_cpu_linear(be, &second, err);
}
