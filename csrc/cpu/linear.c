/*
 * linear.c -- a linear map on the CPU, with the norm before and the sum after it. Formula and
 * shapes: backend/ops.h.
 *
 * Blocks of KL_PRODUCT_ROWS tokens bound the workspace; each reads the weight anew, which
 * costs little next to that many multiply-adds for every byte.
 */
#include "backend/ends.h"
#include "cpu/product.h"

typedef struct {
    void *panels, *scratch;
    void *h, *y; /* the normalised x, and what goes to the residual; NULL: not wanted */
} buffers;

static int64_t block_rows(const kl_linear *a)
{
    return a->x.shape[0] < KL_PRODUCT_ROWS ? a->x.shape[0] : KL_PRODUCT_ROWS;
}

static buffers lay_out(kl_arena *arena, const kl_cpu *cpu, const kl_linear *a)
{
    const int64_t rows = block_rows(a), K = a->w.cols;
    const size_t act = kl_dtype_bytes(kl_linear_act(a));
    buffers b = {
        .panels = kl_arena_take(arena, kl_product_panel_bytes(rows, K)),
        .scratch = kl_arena_take(arena, kl_product_scratch_bytes(cpu, rows, K)),
    };
    if (!kl_tensor_absent(&a->norm_weight))
        b.h = kl_arena_take(arena, (size_t)(rows * K) * act);
    if (!kl_tensor_absent(&a->residual))
        b.y = kl_arena_take(arena, (size_t)(rows * a->w.rows) * act);
    return b;
}

size_t kl_cpu_linear_workspace(kl_backend *be, const kl_linear *a)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    lay_out(&arena, (const kl_cpu *)be, a);
    return arena.used;
}

/* Rows [t, t + n). */
static kl_status run_block(kl_backend *be, const kl_linear *a, const buffers *b, int64_t t,
                           int64_t n, kl_error *err)
{
    const kl_dtype act = kl_linear_act(a);
    kl_tensor x = kl_row_slice(&a->x, t, n), out;
    if (!kl_tensor_absent(&a->norm_weight)) {
        const kl_tensor h = kl_tensor_2d(b->h, act, n, a->w.cols);
        const kl_rms_norm norm = kl_norm_before(x, a->norm_weight, a->norm_eps, h);
        KL_TRY(kl_cpu_rms_norm(be, &norm, err));
        x = h;
    }
    const bool adds = !kl_tensor_absent(&a->residual);
    out = adds ? kl_tensor_2d(b->y, act, n, a->w.rows) : kl_row_slice(&a->out, t, n);
    kl_product p = {
        .x = kl_rows_of(&x, 0, n),
        .w = a->w,
        .out = out.data,
        .out_dtype = out.dtype,
        .out_stride = out.stride[0],
        .panels = b->panels,
    };
    kl_products_run((const kl_cpu *)be, &p, 1, b->scratch);
    if (!adds) return KL_OK;
    const kl_rms_norm sum = kl_sum_after(out, kl_row_slice(&a->residual, t, n));
    return kl_cpu_rms_norm(be, &sum, err);
}

kl_status kl_cpu_linear(kl_backend *be, const kl_linear *a, kl_error *err)
{
    if (a->ahead.sums != NULL)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "linear: ahead.sums must be NULL, the cpu backend leaves none");
    kl_arena arena;
    kl_arena_init(&arena, a->ws.data, a->ws.bytes);
    const buffers b = lay_out(&arena, (const kl_cpu *)be, a);
    const int64_t T = a->x.shape[0];
    for (int64_t t = 0; t < T; t += KL_PRODUCT_ROWS) {
        const int64_t left = T - t;
        KL_TRY(run_block(be, a, &b, t, left < KL_PRODUCT_ROWS ? left : KL_PRODUCT_ROWS, err));
    }
    if (!kl_tensor_absent(&a->peaks))
        kl_cpu_find_peaks((const kl_cpu *)be, &a->out, a->peaks.data);
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
