/*
 * ops_mla.c -- mla_prefill and mla_decode.
 *
 * mla_prefill takes latents as dense rows: they are laid out in pages of this call's own, the
 * past of each sequence first, and then attended to like any paged context. Of 8-bit pages
 * mla_decode has to be told the channels that are not codes: a row's bytes do not say.
 */
#include "python/call.h"

#include <string.h>

/* Widths that are only known from differences must come out positive. */
static int check_widths(const kl_call *c, const kl_tensor *q, int64_t latent,
                        const kl_tensor *w, int64_t *V)
{
    const int64_t rank = w->shape[2], rope = latent - rank;
    const int64_t nope = q->shape[2] - rope;
    *V = w->shape[1] - nope;
    if (rope >= 0 && nope > 0 && *V > 0) return 0;
    PyErr_Format(PyExc_ValueError,
                 "%s: q [T, H, nope+rope], latent [T, rank+rope] and w_kv_b [H, nope+V, rank] "
                 "must fit, got last axes %lld, %lld and w_kv_b [%lld, %lld, %lld]",
                 c->op, (long long)q->shape[2], (long long)latent, (long long)w->shape[0],
                 (long long)w->shape[1], (long long)w->shape[2]);
    return -1;
}

/* ---- pages of this call ---------------------------------------------------------------- */

/* The past of each sequence: rows [length, rank+rope], or absent. */
typedef struct {
    kl_tensor *rows; /* [N]                            */
    int32_t *cu;     /* [N+1] their lengths, summed up */
    int64_t N;
} past_rows;

static int take_past_of(kl_call *c, PyObject *o, kl_dtype dtype, int64_t width, kl_tensor *out)
{
    if (o == Py_None) return 0;
    if (kl_arg(c, "past", o, KL_SET(dtype), 2, KL_ROWS, out) < 0) return -1;
    if (out->shape[1] == width) return 0;
    PyErr_Format(PyExc_ValueError, "%s: past must have %lld columns, got %lld", c->op,
                 (long long)width, (long long)out->shape[1]);
    return -1;
}

/* past: None, an array where there is one sequence, or a list with an array or None each. */
static int take_past(kl_call *c, PyObject *past, const kl_tensor *latent, past_rows *out)
{
    const bool list = PyList_Check(past) || PyTuple_Check(past);
    const Py_ssize_t n = list ? PySequence_Size(past) : 1;
    out->rows = kl_call_malloc(c, (size_t)(out->N + 1) * sizeof *out->rows);
    if (out->rows == NULL) return -1;
    memset(out->rows, 0, (size_t)(out->N + 1) * sizeof *out->rows);
    if (past == Py_None) return 0;
    if (n != out->N) {
        PyErr_Format(PyExc_ValueError, "%s: past must hold %lld sequences, got %zd", c->op,
                     (long long)out->N, n);
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *one = list ? PySequence_GetItem(past, i) : Py_NewRef(past);
        const int failed = one == NULL || take_past_of(c, one, latent->dtype, latent->shape[1],
                                                       &out->rows[i]) < 0;
        Py_XDECREF(one); /* the call holds its own reference */
        if (failed) return -1;
    }
    return 0;
}

static int sum_up(kl_call *c, int64_t T, past_rows *past)
{
    int64_t total = 0;
    past->cu = kl_call_malloc(c, (size_t)(past->N + 1) * sizeof *past->cu);
    if (past->cu == NULL) return -1;
    for (int64_t n = 0; n <= past->N; n++) {
        past->cu[n] = (int32_t)total;
        total += n < past->N ? past->rows[n].shape[0] : 0;
        if (total + T < INT32_MAX - KL_PAGE_TOKENS) continue;
        PyErr_Format(PyExc_ValueError, "%s: contexts must have less than 2^31 tokens together",
                     c->op);
        return -1;
    }
    return 0;
}

/* Pages of the longest context. Boundaries on a GPU are not read, for that would wait: without
 * cu any sequence may have all T new tokens. */
static int64_t widest(const past_rows *past, const int32_t *cu, int64_t T)
{
    int64_t most = 1;
    for (int64_t n = 0; n < past->N; n++) {
        const int64_t count = cu == NULL ? T : cu[n + 1] - cu[n];
        const int64_t length = past->rows[n].shape[0] + count;
        most = length > most ? length : most;
    }
    return (most + KL_PAGE_TOKENS - 1) / KL_PAGE_TOKENS;
}

static int device_ints(kl_call *c, int64_t rows, int64_t cols, kl_tensor *out)
{
    void *data;
    const size_t count = (size_t)(rows * cols);
    if (kl_call_alloc(c, (count == 0 ? 1 : count) * sizeof(int32_t), &data) < 0) return -1;
    *out = kl_tensor_2d(data, KL_I32, rows, cols);
    return 0;
}

/* Sets lengths and block_table. cu: as in widest(). */
static int lay_pages(kl_call *c, PyObject *given, const past_rows *past, const int32_t *cu,
                     kl_mla *a)
{
    const int64_t N = past->N, B = widest(past, cu, a->q.shape[0]);
    kl_tensor lengths;
    if (device_ints(c, N, 1, &lengths) < 0 || device_ints(c, N, B, &a->block_table) < 0)
        return -1;
    a->lengths = kl_tensor_1d(lengths.data, KL_I32, N);
    kl_mla_lay_out lay = {
        .cu_seqlens = a->cu_seqlens, .lengths = a->lengths, .block_table = a->block_table};
    if (given != Py_None) {
        lay.cu_past = kl_tensor_1d(past->cu, KL_I32, N + 1);
        if (kl_call_send(c, &lay.cu_past.data, (size_t)(N + 1) * sizeof *past->cu) < 0)
            return -1;
    }
    return kl_call_mla_lay_out(c, &lay);
}

/* Write each sequence's past into its pages. */
static int append_pasts(kl_call *c, const kl_mla *a, const past_rows *past)
{
    const int64_t B = a->block_table.shape[1];
    const size_t bytes = (size_t)(2 * past->N + 1) * sizeof(int32_t);
    int32_t *bounds = kl_call_malloc(c, bytes); /* 0 and the length, for each sequence */
    if (bounds == NULL) return -1;
    for (int64_t n = 0; n < past->N; n++) {
        bounds[2 * n] = 0;
        bounds[2 * n + 1] = (int32_t)past->rows[n].shape[0];
    }
    void *there = bounds;
    if (kl_call_send(c, &there, bytes) < 0) return -1;
    for (int64_t n = 0; n < past->N; n++) {
        int32_t *cu = (int32_t *)there + 2 * n;
        kl_mla_append append = {
            .raw = past->rows[n],
            .pages = a->pages,
            .block_table = kl_tensor_2d((int32_t *)a->block_table.data + n * B, KL_I32, 1, B),
            .lengths = kl_tensor_1d(&cu[1], KL_I32, 1),
            .cu_seqlens = kl_tensor_1d(cu, KL_I32, 2),
            .rank = a->w_kv_b.shape[2],
        };
        if (past->rows[n].shape[0] != 0 && kl_call_mla_append(c, &append) < 0) return -1;
    }
    return 0;
}

/* Pages of this call's, of rows for `latent`. */
static int alloc_pages(kl_call *c, const kl_tensor *latent, kl_latents latents, int64_t count,
                       kl_mla *a)
{
    const int64_t width = latent->shape[1], rank = a->w_kv_b.shape[2];
    const bool packed = latents == KL_LATENTS_FP8;
    const int64_t row = packed ? kl_latents_row_of(rank, width - rank).row_bytes : width;
    a->pages = kl_tensor_3d(NULL, packed ? KL_U8 : latent->dtype, count, KL_PAGE_TOKENS, row);
    return kl_call_alloc(c, (size_t)kl_tensor_size(&a->pages) * kl_dtype_bytes(a->pages.dtype),
                         &a->pages.data);
}

static int fill_pages(kl_call *c, PyObject *past, const kl_tensor *latent, kl_latents latents,
                      const int32_t *cu, kl_mla *a)
{
    past_rows rows = {.N = a->cu_seqlens.shape[0] - 1};
    const int64_t T = latent->shape[0];
    if (take_past(c, past, latent, &rows) < 0 || sum_up(c, T, &rows) < 0) return -1;
    if (lay_pages(c, past, &rows, cu, a) < 0) return -1;
    const int64_t P = (rows.cu[rows.N] + T) / KL_PAGE_TOKENS + rows.N;
    if (alloc_pages(c, latent, latents, P > 0 ? P : 1, a) < 0) return -1;
    if (past != Py_None && append_pasts(c, a, &rows) < 0) return -1;
    kl_mla_append append = {.raw = *latent,
                            .pages = a->pages,
                            .block_table = a->block_table,
                            .lengths = a->lengths,
                            .cu_seqlens = a->cu_seqlens,
                            .rank = a->w_kv_b.shape[2]};
    return T == 0 ? 0 : kl_call_mla_append(c, &append);
}

/* ---- the two functions ----------------------------------------------------------------- */

static PyObject *run_mla_prefill(kl_call *c, PyObject *const *args)
{
    kl_mla_prefill a = {.unsettled = true};
    kl_tensor latent;
    const int32_t *cu;
    int64_t V;
    int o, latents;
    if (KL_NEEDS(c, mla_prefill) < 0 || KL_NEEDS(c, mla_append) < 0 ||
        kl_arg(c, "q", args[1], KL_FLOATS, 3, KL_ROWS, &a.q) < 0 ||
        kl_arg(c, "latent", args[2], KL_SET(a.q.dtype), 2, KL_ROWS, &latent) < 0 ||
        kl_arg_weight_3d(c, "w_kv_b", args[3], &a.w_kv_b) < 0 ||
        check_widths(c, &a.q, latent.shape[1], &a.w_kv_b, &V) < 0 ||
        kl_arg_cu_seqlens(c, args[4], a.q.shape[0], &a.cu_seqlens, &cu) < 0 ||
        kl_arg_scale(c, args[6], a.q.shape[2], &a.scale) < 0 ||
        kl_parse_choice(c->op, "kv_cache_dtype", args[7], kl_latents_names, KL_N_LATENTS,
                        &latents) < 0)
        return NULL;
    if (latent.shape[0] != a.q.shape[0]) {
        PyErr_Format(PyExc_ValueError, "%s: latent must have %lld rows, got %lld", c->op,
                     (long long)a.q.shape[0], (long long)latent.shape[0]);
        return NULL;
    }
    const int64_t shape[3] = {a.q.shape[0], a.q.shape[1], V};
    if (kl_out(c, "out", args[8], a.q.dtype, 3, shape, NULL, &a.out, &o) < 0 ||
        fill_pages(c, args[5], &latent, (kl_latents)latents, cu, &a) < 0)
        return NULL;
    return kl_call_mla_prefill(c, &a) < 0 ? NULL : kl_out_take(c, o);
}

PyObject *kl_py_mla_prefill(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "mla_prefill", args, nargs, 10, true, run_mla_prefill);
}

/* Every entry that a context reads must name a page. Not looked at on a GPU. */
static int check_table(const kl_call *c, const kl_mla *a)
{
    const int32_t *table = a->block_table.data, *lengths = a->lengths.data;
    const int64_t N = a->lengths.shape[0], B = a->block_table.shape[1], P = a->pages.shape[0];
    if (!c->dev->is_cpu) return 0;
    if (a->block_table.shape[0] != N) {
        PyErr_Format(PyExc_ValueError, "%s: block_table must have %lld rows, got %lld", c->op,
                     (long long)N, (long long)a->block_table.shape[0]);
        return -1;
    }
    for (int64_t n = 0; n < N; n++)
        for (int64_t b = 0; b * KL_PAGE_TOKENS < lengths[n]; b++)
            if (table[n * B + b] < 0 || table[n * B + b] >= P) {
                PyErr_Format(PyExc_ValueError,
                             "%s: block_table[%lld, %lld] must lie in [0, %lld), got %d", c->op,
                             (long long)n, (long long)b, (long long)P, table[n * B + b]);
                return -1;
            }
    return 0;
}

/* Channels of a latent. */
static int width_of_pages(const kl_call *c, const kl_mla *a, PyObject *rope, int64_t *out)
{
    const bool packed = kl_latents_are_packed(&a->pages);
    int64_t channels;
    *out = a->pages.shape[2];
    if (packed == (rope != Py_None)) {
        if (!packed) return 0;
        if (kl_parse_int(c->op, "rope", rope, 0, INT32_MAX, &channels) < 0) return -1;
        *out = a->w_kv_b.shape[2] + channels;
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: rope must %sbe given with pages of %s", c->op,
                 packed ? "" : "not ", kl_dtype_name(a->pages.dtype));
    return -1;
}

static PyObject *run_mla_decode(kl_call *c, PyObject *const *args)
{
    kl_mla_decode a = {.unsettled = true};
    int64_t V, width;
    int o;
    if (KL_NEEDS(c, mla_decode) < 0 ||
        kl_arg(c, "q", args[1], KL_FLOATS, 3, KL_ROWS, &a.q) < 0 ||
        kl_arg(c, "pages", args[2], KL_SET(a.q.dtype) | KL_SET(KL_U8), 3, KL_DENSE, &a.pages) <
            0 ||
        kl_arg_weight_3d(c, "w_kv_b", args[5], &a.w_kv_b) < 0 ||
        width_of_pages(c, &a, args[7], &width) < 0 ||
        check_widths(c, &a.q, width, &a.w_kv_b, &V) < 0 ||
        kl_arg_ids(c, "block_table", args[3], 2, INT64_MIN, INT64_MAX, &a.block_table) < 0)
        return NULL;
    const int64_t room = a.block_table.shape[1] * KL_PAGE_TOKENS;
    if (kl_arg_ids(c, "lengths", args[4], 1, 1, room < INT32_MAX ? room : INT32_MAX,
                   &a.lengths) < 0 ||
        check_table(c, &a) < 0 || kl_arg_scale(c, args[6], a.q.shape[2], &a.scale) < 0)
        return NULL;
    const int64_t shape[3] = {a.q.shape[0], a.q.shape[1], V};
    if (kl_out(c, "out", args[8], a.q.dtype, 3, shape, NULL, &a.out, &o) < 0) return NULL;
    return kl_call_mla_decode(c, &a) < 0 ? NULL : kl_out_take(c, o);
}

PyObject *kl_py_mla_decode(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return kl_call_python(module, "mla_decode", args, nargs, 10, true, run_mla_decode);
}
