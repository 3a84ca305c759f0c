/*
 * loader.c -- fill an engine's weights, from a checkpoint or at random.
 *
 * Binding comes first: every tensor of the weight table is looked up by name and compared with
 * its shape, before a byte is read. Then tensors are read in the order of the files, block by
 * block through one staging buffer, converted and stored by the backend.
 */
#include "model/engine_struct.h"

#include "base/memory.h"
#include "base/rng.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Holds at least one row of the widest matrix that a checked config allows (2^20 f32). */
#define STAGING_BYTES ((size_t)8 << 20)

typedef struct {
    kl_part part;            /* its names are gone */
    const kl_source *source; /* NULL: an optional tensor that is absent, zeros */
} binding;

typedef struct {
    const kl_source **by_name; /* [n_sources], sorted */
    int64_t n_sources;
    bool counting;     /* first walk: count the parts */
    binding *bindings; /* [n_bindings] */
    int64_t n_bindings, n_used;
    int64_t n_missing; /* names that were not found; the first ones are listed */
    char missing[256];
} binder;

/* ---- binding --------------------------------------------------------------------------- */

static int compare_names(const void *a, const void *b)
{
    return strcmp((*(const kl_source *const *)a)->name, (*(const kl_source *const *)b)->name);
}

static kl_status sort_names(binder *b, const kl_source *sources, kl_error *err)
{
    for (int64_t i = 0; i < b->n_sources; i++) b->by_name[i] = &sources[i];
    qsort(b->by_name, (size_t)b->n_sources, sizeof *b->by_name, compare_names);
    for (int64_t i = 1; i < b->n_sources; i++)
        if (strcmp(b->by_name[i - 1]->name, b->by_name[i]->name) == 0)
            return kl_fail(err, KL_ERR_WEIGHTS, "weights: tensor %s is there twice",
                           b->by_name[i]->name);
    return KL_OK;
}

static const kl_source *find_source(const binder *b, const char *name)
{
    if (name == NULL) return NULL;
    const kl_source key = {.name = name}, *wanted = &key;
    const kl_source **found =
        bsearch(&wanted, b->by_name, (size_t)b->n_sources, sizeof *b->by_name, compare_names);
    return found == NULL ? NULL : *found;
}

/* Elements of a source; -1 where a dimension is negative or the product wraps. */
static int64_t source_size(const kl_source *s)
{
    int64_t n = 1;
    for (int i = 0; i < s->ndim; i++)
        if (s->shape[i] < 0 || __builtin_mul_overflow(n, s->shape[i], &n)) return -1;
    return n;
}

static bool shape_fits(const kl_part *p, const kl_source *s)
{
    const int64_t rows = p->rows, cols = p->dest->cols, *shape = s->shape;
    switch (p->rule) {
    case KL_SHAPE_EXACT:
        if (p->vector) return s->ndim == 1 && shape[0] == cols;
        return s->ndim == 2 && shape[0] == rows && shape[1] == cols;
    case KL_SHAPE_CONV:
        if (s->ndim == 3) return shape[0] == rows && shape[1] == 1 && shape[2] == cols;
        return s->ndim == 2 && shape[0] == rows && shape[1] == cols;
    case KL_SHAPE_COUNT:
        return source_size(s) == rows * cols;
    case KL_SHAPE_AT_LEAST:
        return source_size(s) >= rows * cols;
    }
    return false;
}

static void describe_shape(const int64_t *shape, int ndim, char *text, size_t size)
{
    size_t used = (size_t)snprintf(text, size, "[");
    for (int i = 0; i < ndim && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, i == 0 ? "%lld" : ", %lld",
                                 (long long)shape[i]);
    if (used < size) snprintf(text + used, size - used, "]");
}

static kl_status check_source(const kl_part *p, const kl_source *s, kl_error *err)
{
    char found[112], wanted[64];
    const int64_t size = s->ndim >= 0 && s->ndim <= KL_MAX_NDIM ? source_size(s) : -1;
    if (s->dtype != KL_F32 && s->dtype != KL_BF16)
        return kl_fail(err, KL_ERR_WEIGHTS, "weights: %s must be F32 or BF16, got %s", s->name,
                       kl_dtype_name(s->dtype));
    if (size < 0 || !shape_fits(p, s)) {
        const int64_t matrix[] = {p->rows, p->dest->cols};
        describe_shape(p->vector ? matrix + 1 : matrix, p->vector ? 1 : 2, wanted,
                       sizeof wanted);
        describe_shape(s->shape, size < 0 ? 0 : s->ndim, found, sizeof found);
        return kl_fail(err, KL_ERR_WEIGHTS, "weights: %s must have shape %s, got %s", s->name,
                       wanted, found);
    }
    uint64_t bytes, end;
    if (__builtin_mul_overflow((uint64_t)size, (uint64_t)kl_dtype_bytes(s->dtype), &bytes) ||
        bytes != s->bytes || __builtin_add_overflow(s->offset, s->bytes, &end) ||
        end > INT64_MAX)
        return kl_fail(err, KL_ERR_WEIGHTS,
                       "weights: %s must lie in the bytes of its shape, got %llu bytes at %llu",
                       s->name, (unsigned long long)s->bytes, (unsigned long long)s->offset);
    return KL_OK;
}

/* Note a missing name; the walk goes on, so that the message can list the first few. */
static void note_missing(binder *b, const char *name)
{
    const size_t used = strlen(b->missing);
    if (b->n_missing++ < 3)
        snprintf(b->missing + used, sizeof b->missing - used, "%s%s", used == 0 ? "" : ", ",
                 name);
}

static kl_status bind_part(void *ctx, const kl_part *part, kl_error *err)
{
    binder *b = ctx;
    if (b->counting) {
        b->n_bindings++;
        return KL_OK;
    }
    const kl_source *source = find_source(b, part->name);
    if (source == NULL) source = find_source(b, part->alias);
    if (source == NULL && !part->optional)
        note_missing(b, part->name);
    else if (source != NULL)
        KL_TRY(check_source(part, source, err));
    b->n_used += source != NULL;
    b->bindings[b->n_bindings++] = (binding){*part, source};
    return KL_OK;
}

static kl_status visit_parts(kl_engine *e, binder *b, kl_error *err)
{
    const kl_weight_visitor visitor = {.part = bind_part, .ctx = b};
    b->n_bindings = 0;
    return kl_weights_visit(&e->weights, &e->config, e->format, &visitor, err);
}

static int compare_places(const void *a, const void *b)
{
    const kl_source *x = ((const binding *)a)->source, *y = ((const binding *)b)->source;
    if (x == NULL || y == NULL) return (x != NULL) - (y != NULL);
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

/* All of the model's tensors, in the order of the files. */
static kl_status bind_all(kl_engine *e, binder *b, const kl_source *sources, kl_error *err)
{
    b->by_name = kl_calloc((size_t)b->n_sources, sizeof *b->by_name);
    b->counting = true;
    KL_TRY(visit_parts(e, b, err));
    b->bindings = kl_calloc((size_t)b->n_bindings, sizeof *b->bindings);
    if (b->by_name == NULL || b->bindings == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "weights: no memory for a table of %lld tensors",
                       (long long)b->n_bindings);
    KL_TRY(sort_names(b, sources, err));
    b->counting = false;
    KL_TRY(visit_parts(e, b, err));
    if (b->n_missing > 0)
        return kl_fail(err, KL_ERR_WEIGHTS, "weights: %lld tensors are missing: %s%s",
                       (long long)b->n_missing, b->missing, b->n_missing > 3 ? ", ..." : "");
    qsort(b->bindings, (size_t)b->n_bindings, sizeof *b->bindings, compare_places);
    return KL_OK;
}

/* ---- reading --------------------------------------------------------------------------- */

typedef struct {
    kl_engine *e;
    void *host, *device; /* STAGING_BYTES each */
    const int *fds;
    uint64_t done, total;
    kl_progress_fn progress;
    kl_poll_fn poll;
    void *ctx;
} reader;

static kl_status read_all(int fd, void *dst, size_t bytes, uint64_t offset, const char *name,
                          kl_error *err)
{
    char *p = dst;
    while (bytes > 0) {
        const ssize_t n = pread(fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            return kl_fail(err, KL_ERR_IO, "weights: reading %s: %s", name, strerror(errno));
        if (n == 0)
            return kl_fail(err, KL_ERR_IO,
                           "weights: the file ends within %s, %zu bytes are missing (has it "
                           "changed?)",
                           name, bytes);
        p += n;
        offset += (uint64_t)n;
        bytes -= (size_t)n;
    }
    return KL_OK;
}

/* Rows [first, first + n) of a part, which lie in the host's staging buffer as `dtype`. */
static kl_status store_rows(reader *r, const kl_part *part, kl_dtype dtype, int64_t first,
                            int64_t n, kl_error *err)
{
    kl_backend *be = r->e->be;
    const int64_t cols = part->dest->cols;
    const size_t bytes = (size_t)(n * cols) * kl_dtype_bytes(dtype);
    const kl_weight out = kl_weight_slice(part->dest, part->index, part->row + first, n);
    const bool as_is = (dtype == KL_F32 && out.format == KL_W_F32) ||
                       (dtype == KL_BF16 && out.format == KL_W_BF16);
    if (as_is) {
        KL_TRY(be->vt->copy_in(be, out.data, r->host, bytes, err));
    } else {
        KL_TRY(be->vt->copy_in(be, r->device, r->host, bytes, err));
        kl_pack_weight pack = {.src = kl_tensor_2d(r->device, dtype, n, cols), .out = out};
        KL_TRY(kl_run_pack_weight(be, &pack, err));
    }
    return be->vt->sync(be, err); /* the buffer is read into again */
}

static kl_status zero_part(reader *r, const kl_part *part, kl_error *err)
{
    memset(r->host, 0, (size_t)(part->rows * part->dest->cols) * sizeof(float));
    return store_rows(r, part, KL_F32, 0, part->rows, err);
}

static kl_status read_part(reader *r, const binding *b, kl_error *err)
{
    const kl_part *part = &b->part;
    const kl_source *s = b->source;
    if (s == NULL) return zero_part(r, part, err);
    const size_t row = (size_t)part->dest->cols * kl_dtype_bytes(s->dtype);
    const int64_t block = (int64_t)(STAGING_BYTES / row);
    for (int64_t first = 0; first < part->rows; first += block) {
        const int64_t n = kl_min_i64(part->rows - first, block);
        const size_t bytes = (size_t)n * row;
        if (r->poll != NULL && r->poll(r->ctx) != 0)
            return kl_fail(err, KL_ERR_CANCELLED, "weights: the caller asked to stop");
        KL_TRY(read_all(r->fds[s->file], r->host, bytes, s->offset + (uint64_t)first * row,
                        s->name, err));
        KL_TRY(store_rows(r, part, s->dtype, first, n, err));
        r->done += bytes;
        if (r->progress != NULL) r->progress(r->ctx, r->done, r->total);
    }
    return KL_OK;
}

static kl_status open_staging(reader *r, kl_error *err)
{
    KL_TRY(r->e->be->vt->alloc(r->e->be, STAGING_BYTES, &r->device, err));
    r->host = kl_aligned_alloc(STAGING_BYTES);
    if (r->host == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "weights: no memory for a staging buffer");
    return KL_OK;
}

static void close_staging(reader *r)
{
    kl_free(r->host);
    if (r->device != NULL) r->e->be->vt->free(r->e->be, r->device, STAGING_BYTES);
}

static kl_status read_bindings(reader *r, const binder *b, kl_error *err)
{
    for (int64_t i = 0; i < b->n_bindings; i++) {
        const kl_part *p = &b->bindings[i].part;
        if (b->bindings[i].source != NULL)
            r->total += (uint64_t)(p->rows * p->dest->cols) *
                        kl_dtype_bytes(b->bindings[i].source->dtype);
    }
    KL_TRY(open_staging(r, err));
    for (int64_t i = 0; i < b->n_bindings; i++) KL_TRY(read_part(r, &b->bindings[i], err));
    return KL_OK;
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
    binder b = {.n_sources = n_sources};
    reader r = {.e = e, .fds = fds, .progress = progress, .poll = poll, .ctx = ctx};
    KL_TRY(check_files(sources, n_sources, n_fds, err));
    kl_status status = bind_all(e, &b, sources, err);
    if (status == KL_OK) {
        e->loaded = false;
        status = read_bindings(&r, &b, err);
        e->loaded = status == KL_OK;
        *n_unused = n_sources - b.n_used;
    }
    close_staging(&r);
    kl_free(b.by_name);
    kl_free(b.bindings);
    return status;
}

/* ---- random weights -------------------------------------------------------------------- */

/* Values drawn at a time: part of what a seed means, so not tied to the staging buffer. */
#define RANDOM_BLOCK (INT64_C(1) << 20)

typedef struct {
    reader *r;
    uint64_t seed, n_parts;
} randomizer;

static kl_status fill_rows(reader *r, const kl_part *part, int64_t first, int64_t n,
                           uint64_t seed, kl_error *err)
{
    const int64_t cols = part->dest->cols;
    kl_fill_normal fill = {.out = kl_tensor_2d(r->device, KL_F32, n, cols),
                           .seed = seed,
                           .mean = part->mean,
                           .std = part->std};
    KL_TRY(kl_run_fill_normal(r->e->be, &fill, err));
    kl_pack_weight pack = {
        .src = fill.out, .out = kl_weight_slice(part->dest, part->index, part->row + first, n)};
    return kl_run_pack_weight(r->e->be, &pack, err);
}

static kl_status randomize_part(void *ctx, const kl_part *part, kl_error *err)
{
    randomizer *z = ctx;
    const int64_t block = RANDOM_BLOCK / part->dest->cols;
    const uint64_t number = z->n_parts++;
    for (int64_t first = 0; first < part->rows; first += block) {
        const int64_t n = kl_min_i64(part->rows - first, block);
        uint32_t bits[4];
        kl_philox(z->seed, number << 32 | (uint64_t)(first / block), bits);
        KL_TRY(fill_rows(z->r, part, first, n, (uint64_t)bits[1] << 32 | bits[0], err));
    }
    return KL_OK;
}

kl_status kl_engine_randomize(kl_engine *e, uint64_t seed, kl_error *err)
{
    reader r = {.e = e};
    randomizer z = {.r = &r, .seed = seed};
    const kl_weight_visitor visitor = {.part = randomize_part, .ctx = &z};
    e->loaded = false;
    kl_status status = open_staging(&r, err);
    if (status == KL_OK)
        status = kl_weights_visit(&e->weights, &e->config, e->format, &visitor, err);
    if (status == KL_OK) status = e->be->vt->sync(e->be, err);
    e->loaded = status == KL_OK;
    close_staging(&r);
    return status;
}
