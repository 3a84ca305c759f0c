/*
 * loader.c -- fill an engine's weights from a checkpoint.
 *
 * Binding comes first: every tensor of the weight table is looked up by name and compared with
 * its shape, before a byte is read. Then the tensors are cut into pieces of whole rows, in the
 * order of the files. Threads read pieces ahead, into a ring of buffers that the device can
 * read; the calling thread alone speaks to the device, and for each piece in turn enqueues a
 * copy, or where the format is another one, the conversion straight out of the buffer. So a
 * model is never there twice, whatever it is stored as. Where the device is the host, pieces
 * that need no conversion are read to where they belong.
 */
#include "model/binding.h"

#include "base/memory.h"
#include "base/read_ahead.h"
#include "base/threads.h"

/* A piece holds at least one row of the widest matrix that a checked config allows (2^20 f32).
 * An expert's matrix of the 48B model, 4.7 MB, is one, and takes the bus (50 GB/s at best) many
 * times as long as its launch takes the host. */
#define PIECE_BYTES ((size_t)8 << 20)

/* A thread reads some 4 GB/s of memory-backed storage; eight brought 98 GB to an H200 in 3.1 s.
 * Each has a buffer to read into and one that waits to be used. */
#define READERS 8
#define BUFFERS 16

/* Pieces enqueued and not known to have ended: enough that the device always has one to go on
 * with, few enough that the readers keep their buffers. */
#define IN_FLIGHT 4
_Static_assert(IN_FLIGHT < BUFFERS, "a piece that is waited for must have a buffer");

#define WAIT_MS 20 /* between looks at whether the caller wants to stop */

/* Rows [first, first + n) of a part. */
typedef struct {
    const kl_binding *binding;
    int64_t first, n;
} piece;

typedef struct {
    kl_engine *e;
    piece *pieces;         /* [n_pieces] */
    kl_file_range *ranges; /* [n_pieces], where each comes from and goes to */
    int64_t n_pieces, window;
    size_t piece_bytes; /* the largest of them */
    char *buffers;      /* the host's, window * piece_bytes */
    kl_mark *marks[IN_FLIGHT];
    kl_read_ahead *reads;
    int64_t released; /* pieces that the device has done with */
    uint64_t done, total;
    kl_progress_fn progress;
    kl_poll_fn poll;
    void *ctx;
} loader;

/* ---- pieces ---------------------------------------------------------------------------- */

static size_t row_bytes(const kl_binding *b)
{
    return (size_t)b->part.dest->cols * kl_dtype_bytes(b->source->dtype);
}

static int64_t rows_a_piece(const kl_binding *b)
{
    return kl_min_i64(b->part.rows, (int64_t)(PIECE_BYTES / row_bytes(b)));
}

static kl_weight weight_of(const piece *p)
{
    const kl_part *part = &p->binding->part;
    return kl_weight_slice(part->dest, part->index, part->row + p->first, p->n);
}

/* Whether the file has the bytes that are stored. */
static bool is_stored_as_is(const kl_binding *b)
{
    const kl_weight_format format = b->part.dest->format;
    return b->source->dtype == KL_F32 ? format == KL_W_F32 : format == KL_W_BF16;
}

/* A backend whose host memory is its device memory computes where the threads read to. */
static bool is_host(const kl_backend *be)
{
    return be->vt->alloc_host == be->vt->alloc;
}

static void measure(loader *l, const kl_bindings *b)
{
    for (int64_t i = 0; i < b->n; i++) {
        const kl_binding *one = &b->bindings[i];
        if (one->source == NULL) continue;
        const int64_t rows = rows_a_piece(one);
        const size_t bytes = (size_t)rows * row_bytes(one);
        l->n_pieces += (one->part.rows + rows - 1) / rows;
        l->total += (uint64_t)one->part.rows * row_bytes(one);
        if (bytes > l->piece_bytes) l->piece_bytes = bytes;
    }
    l->piece_bytes = kl_align_up(l->piece_bytes, 4096);
    l->window = kl_min_i64(l->n_pieces, BUFFERS);
}

static void cut(loader *l, const kl_binding *b, const int *fds, int64_t *at)
{
    const kl_source *s = b->source;
    const bool direct = is_host(l->e->be) && is_stored_as_is(b);
    const int64_t rows = rows_a_piece(b);
    for (int64_t first = 0; first < b->part.rows; first += rows, ++*at) {
        const piece p = {b, first, kl_min_i64(b->part.rows - first, rows)};
        char *buffer = l->buffers + (size_t)(*at % l->window) * l->piece_bytes;
        l->pieces[*at] = p;
        l->ranges[*at] = (kl_file_range){.name = s->name,
                                         .fd = fds[s->file],
                                         .offset = s->offset + (uint64_t)first * row_bytes(b),
                                         .bytes = (size_t)p.n * row_bytes(b),
                                         .to = direct ? weight_of(&p).data : buffer};
    }
}

/* ---- the device ------------------------------------------------------------------------ */

static kl_status zero_absent(kl_engine *e, const kl_bindings *b, kl_error *err)
{
    for (int64_t i = 0; i < b->n; i++) {
        const kl_part *p = &b->bindings[i].part;
        if (b->bindings[i].source != NULL) continue;
        const kl_weight w = kl_weight_slice(p->dest, p->index, p->row, p->rows);
        KL_TRY(e->be->vt->zero(e->be, w.data, kl_weight_data_bytes(&w), err));
        if (w.scales != NULL)
            KL_TRY(e->be->vt->zero(e->be, w.scales, kl_weight_scale_bytes(&w), err));
    }
    return KL_OK;
}

static kl_status store(loader *l, int64_t i, kl_error *err)
{
    kl_backend *be = l->e->be;
    const piece *p = &l->pieces[i];
    const kl_file_range *range = &l->ranges[i];
    const kl_weight out = weight_of(p);
    if (range->to == out.data) return KL_OK;
    if (is_stored_as_is(p->binding))
        return be->vt->copy_in(be, out.data, range->to, range->bytes, err);
    const kl_pack_weight pack = {
        .src = kl_tensor_2d(range->to, p->binding->source->dtype, p->n, out.cols), .out = out};
    return kl_run_pack_weight(be, &pack, err);
}

/* Wait until the device has done with the oldest piece, and have its buffer read into again. */
static kl_status release_oldest(loader *l, kl_error *err)
{
    kl_backend *be = l->e->be;
    KL_TRY(be->vt->wait_mark(be, l->marks[l->released % IN_FLIGHT], err));
    kl_read_ahead_release(l->reads, ++l->released);
    return KL_OK;
}

static kl_status wait_for(loader *l, int64_t i, kl_error *err)
{
    for (bool ready = false; !ready;) {
        if (l->poll != NULL && l->poll(l->ctx) != 0)
            return kl_fail(err, KL_ERR_CANCELLED, "weights: the caller asked to stop");
        KL_TRY(kl_read_ahead_wait(l->reads, i, WAIT_MS, &ready, err));
    }
    return KL_OK;
}

static kl_status store_all(loader *l, kl_error *err)
{
    kl_backend *be = l->e->be;
    for (int64_t i = 0; i < l->n_pieces; i++) {
        if (i - l->released == IN_FLIGHT) KL_TRY(release_oldest(l, err));
        KL_TRY(wait_for(l, i, err));
        KL_TRY(store(l, i, err));
        KL_TRY(be->vt->set_mark(be, l->marks[i % IN_FLIGHT], err));
        l->done += l->ranges[i].bytes;
        if (l->progress != NULL) l->progress(l->ctx, l->done, l->total);
    }
    return KL_OK;
}

/* ---- life ------------------------------------------------------------------------------ */

/* On the host as many threads as the backend has: the caller chose them. */
static kl_status count_threads(const loader *l, int *out, kl_error *err)
{
    kl_backend *be = l->e->be;
    kl_backend_info info = {.threads = kl_available_cpus()};
    if (is_host(be)) KL_TRY(be->vt->info(be, &info, err));
    *out = (int)kl_min_i64(kl_min_i64(info.threads, READERS), l->window);
    return KL_OK;
}

static kl_status open_loader(loader *l, const kl_bindings *b, const int *fds, kl_error *err)
{
    kl_backend *be = l->e->be;
    int64_t at = 0;
    int threads;
    measure(l, b);
    KL_TRY(count_threads(l, &threads, err));
    l->pieces = kl_calloc((size_t)l->n_pieces, sizeof *l->pieces);
    l->ranges = kl_calloc((size_t)l->n_pieces, sizeof *l->ranges);
    if (l->pieces == NULL || l->ranges == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "weights: no memory for a list of %lld pieces",
                       (long long)l->n_pieces);
    KL_TRY(
        be->vt->alloc_host(be, (size_t)l->window * l->piece_bytes, (void **)&l->buffers, err));
    for (int i = 0; i < IN_FLIGHT; i++) KL_TRY(be->vt->new_mark(be, &l->marks[i], err));
    for (int64_t i = 0; i < b->n; i++)
        if (b->bindings[i].source != NULL) cut(l, &b->bindings[i], fds, &at);
    return kl_read_ahead_new(l->ranges, l->n_pieces, l->window, threads, &l->reads, err);
}

static void close_loader(loader *l)
{
    kl_backend *be = l->e->be;
    kl_read_ahead_free(l->reads);
    for (int i = 0; i < IN_FLIGHT; i++)
        if (l->marks[i] != NULL) be->vt->free_mark(be, l->marks[i]);
    if (l->buffers != NULL)
        be->vt->free_host(be, l->buffers, (size_t)l->window * l->piece_bytes);
    kl_free(l->pieces);
    kl_free(l->ranges);
}

static kl_status load(loader *l, const kl_bindings *b, const int *fds, kl_error *err)
{
    kl_backend *be = l->e->be;
    kl_error ignored;
    kl_engine_unload(l->e);
    kl_status status = open_loader(l, b, fds, err);
    if (status == KL_OK) status = zero_absent(l->e, b, err);
    if (status == KL_OK) status = store_all(l, err);
    /* Also after a failure: the device still reads the buffers. */
    const kl_status ended = be->vt->sync(be, status == KL_OK ? err : &ignored);
    close_loader(l);
    if (status == KL_OK) status = ended;
    l->e->loaded = status == KL_OK;
    return status;
}

static kl_status check_files(const kl_source *sources, int64_t n, int n_fds, kl_error *err)
{
    for (int64_t i = 0; i < n; i++)
        if (sources[i].file < 0 || sources[i].file >= n_fds)
            return kl_fail(err, KL_ERR_VALUE, "weights: file of %s must be in [0, %d), got %d",
                           sources[i].name, n_fds, sources[i].file);
    return KL_OK;
}

kl_status kl_engine_load(kl_engine *e, const int *fds, int n_fds, const kl_source *sources,
                         int64_t n_sources, int64_t *n_unused, kl_progress_fn progress,
                         kl_poll_fn poll, void *ctx, kl_error *err)
{
    kl_bindings bindings;
    loader l = {.e = e, .progress = progress, .poll = poll, .ctx = ctx};
    KL_TRY(check_files(sources, n_sources, n_fds, err));
    KL_TRY(kl_bindings_make(e, sources, n_sources, &bindings, err));
    *n_unused = n_sources - bindings.n_used;
    const kl_status status = load(&l, &bindings, fds, err);
    kl_bindings_free(&bindings);
    return status;
}
