/*
 * image.c -- a sequence's memory as one run of bytes, between device and host; see engine.h.
 *
 * The image is walked as the spans it is made of; the part asked for of each is copied. So a
 * caller that keeps sequences in files needs no more memory than one piece.
 */
#include "model/engine_struct.h"

#include "base/memory.h"

typedef struct {
    kl_backend *be;
    uint64_t at;         /* where the next span begins in the image */
    uint64_t first, end; /* the part that is copied                 */
    void *out;           /* where its first byte goes, or           */
    const void *in;      /* comes from                              */
} walk;

/* Whether [at, at + bytes) lies outside of the part asked for. */
static bool outside(const walk *w, uint64_t bytes)
{
    return w->at >= w->end || w->at + bytes <= w->first;
}

static kl_status walk_span(walk *w, void *device, size_t bytes, kl_error *err)
{
    const uint64_t begin = w->at;
    const bool skip = outside(w, bytes);
    w->at += bytes;
    if (skip) return KL_OK;
    const uint64_t low = begin > w->first ? begin : w->first;
    const uint64_t high = w->at < w->end ? w->at : w->end;
    char *const p = (char *)device + (low - begin);
    if (w->out != NULL)
        return w->be->vt->copy_out(w->be, (char *)w->out + (low - w->first), p,
                                   (size_t)(high - low), err);
    return w->be->vt->copy_in(w->be, p, (const char *)w->in + (low - w->first),
                              (size_t)(high - low), err);
}

static kl_status walk_slot(walk *w, const kl_tensor *pool, int64_t slot, kl_error *err)
{
    size_t bytes;
    void *p = kl_cache_entry(pool, slot, &bytes);
    return walk_span(w, p, bytes, err);
}

/* The latents of a layer: full pages, and what is used of the last one. */
static kl_status walk_pages(walk *w, const kl_cache *c, const kl_tensor *pages, int64_t slot,
                            kl_error *err)
{
    const int64_t length = c->seqs[slot].length;
    const int32_t *table = kl_cache_table(c, slot);
    size_t bytes;
    kl_cache_entry(pages, 0, &bytes);
    const size_t row = bytes / KL_PAGE_TOKENS;
    if (outside(w, (uint64_t)length * row)) {
        w->at += (uint64_t)length * row;
        return KL_OK;
    }
    for (int64_t t = 0; t < length; t += KL_PAGE_TOKENS) {
        void *p = kl_cache_entry(pages, table[t / KL_PAGE_TOKENS], &bytes);
        const size_t rows = (size_t)kl_min_i64(length - t, KL_PAGE_TOKENS);
        KL_TRY(walk_span(w, p, rows * row, err));
    }
    return KL_OK;
}

static kl_status walk_image(const kl_cache *c, int64_t slot, walk *w, kl_error *err)
{
    for (int64_t i = 0; i < c->n_kda; i++) {
        KL_TRY(walk_slot(w, &c->states[i], slot, err));
        KL_TRY(walk_slot(w, &c->windows[i], slot, err));
    }
    for (int64_t i = 0; i < c->n_mla; i++) KL_TRY(walk_pages(w, c, &c->pages[i], slot, err));
    return KL_OK;
}

uint64_t kl_seq_image_bytes(const kl_engine *e, int64_t length)
{
    return kl_cache_seq_bytes(&e->config, e->cache.act) +
           (uint64_t)length * kl_cache_token_bytes(&e->config, e->cache.act, e->cache.latents);
}

static kl_status copy_image(kl_engine *e, int64_t slot, walk *w, kl_error *err)
{
    const uint64_t bytes = kl_seq_image_bytes(e, e->cache.seqs[slot].length);
    if (w->first > w->end || w->end > bytes)
        return kl_fail(err, KL_ERR_VALUE,
                       "sequence: bytes [%llu, %llu) must lie in its image of %llu",
                       (unsigned long long)w->first, (unsigned long long)w->end,
                       (unsigned long long)bytes);
    const kl_status status = walk_image(&e->cache, slot, w, err);
    kl_error late; /* the caller's memory is its own again even after a failure */
    const kl_status synced = e->be->vt->sync(e->be, status == KL_OK ? err : &late);
    return status == KL_OK ? synced : status;
}

kl_status kl_seq_read_image(kl_engine *e, kl_seq seq, uint64_t offset, void *out, size_t bytes,
                            kl_error *err)
{
    walk w = {.be = e->be, .first = offset, .end = offset + bytes, .out = out};
    int64_t slot;
    KL_TRY(kl_cache_find(&e->cache, seq, false, &slot, err));
    return copy_image(e, slot, &w, err);
}

kl_status kl_seq_write_image(kl_engine *e, kl_seq seq, uint64_t offset, const void *in,
                             size_t bytes, kl_error *err)
{
    walk w = {.be = e->be, .first = offset, .end = offset + bytes, .in = in};
    int64_t slot, pages, shared;
    KL_TRY(kl_cache_find(&e->cache, seq, false, &slot, err));
    KL_TRY(kl_seq_pages(e, seq, &pages, &shared, err));
    if (shared > 0)
        return kl_fail(err, KL_ERR_VALUE,
                       "sequence: %lld of its pages are shared, it cannot be written",
                       (long long)shared);
    return copy_image(e, slot, &w, err);
}
