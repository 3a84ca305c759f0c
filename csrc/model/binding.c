/*
 * binding.c -- see binding.h.
 */
#include "model/binding.h"

#include "base/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const kl_source **by_name; /* [n_sources], sorted */
    int64_t n_sources;
    bool counting;     /* first walk: count the parts */
    kl_bindings *out;  /* grows by a binding a part   */
    int64_t n_missing; /* names that were not found; the first ones are listed */
    char missing[256];
} binder;

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
        b->out->n++;
        return KL_OK;
    }
    const kl_source *source = find_source(b, part->name);
    if (source == NULL) source = find_source(b, part->alias);
    if (source == NULL && !part->optional)
        note_missing(b, part->name);
    else if (source != NULL)
        KL_TRY(check_source(part, source, err));
    b->out->n_used += source != NULL;
    b->out->bindings[b->out->n++] = (kl_binding){*part, source};
    return KL_OK;
}

static kl_status visit_parts(kl_engine *e, binder *b, kl_error *err)
{
    const kl_weight_visitor visitor = {.part = bind_part, .ctx = b};
    b->out->n = 0;
    return kl_weights_visit(&e->weights, &e->config, e->format, &visitor, err);
}

static int compare_places(const void *a, const void *b)
{
    const kl_source *x = ((const kl_binding *)a)->source, *y = ((const kl_binding *)b)->source;
    if (x == NULL || y == NULL) return (x != NULL) - (y != NULL);
    if (x->file != y->file) return x->file < y->file ? -1 : 1;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

static kl_status bind_all(kl_engine *e, binder *b, const kl_source *sources, kl_error *err)
{
    kl_bindings *out = b->out;
    b->by_name = kl_calloc((size_t)b->n_sources, sizeof *b->by_name);
    b->counting = true;
    KL_TRY(visit_parts(e, b, err));
    out->bindings = kl_calloc((size_t)out->n, sizeof *out->bindings);
    if (b->by_name == NULL || out->bindings == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "weights: no memory for a table of %lld tensors",
                       (long long)out->n);
    KL_TRY(sort_names(b, sources, err));
    b->counting = false;
    KL_TRY(visit_parts(e, b, err));
    if (b->n_missing > 0)
        return kl_fail(err, KL_ERR_WEIGHTS, "weights: %lld tensors are missing: %s%s",
                       (long long)b->n_missing, b->missing, b->n_missing > 3 ? ", ..." : "");
    qsort(out->bindings, (size_t)out->n, sizeof *out->bindings, compare_places);
    return KL_OK;
}

kl_status kl_bindings_make(kl_engine *e, const kl_source *sources, int64_t n_sources,
                           kl_bindings *out, kl_error *err)
{
    binder b = {.n_sources = n_sources, .out = out};
    *out = (kl_bindings){NULL};
    const kl_status status = bind_all(e, &b, sources, err);
    kl_free(b.by_name);
    if (status != KL_OK) kl_bindings_free(out);
    return status;
}

void kl_bindings_free(kl_bindings *b)
{
    kl_free(b->bindings);
    *b = (kl_bindings){NULL};
}
