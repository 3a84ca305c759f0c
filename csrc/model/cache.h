/*
 * cache.h -- what a model remembers of its sequences, behind one handle for each.
 *
 * Two unlike memories: a KDA layer keeps a state and a conv window of fixed size in the
 * sequence's slot; an MLA layer keeps a latent row for every token in pages of KL_PAGE_TOKENS,
 * which sequences may share. One page table serves all MLA layers: page p of a sequence is page
 * p of each layer's pool.
 *
 *   slots   a new sequence's states and windows are zeroed, whatever its slot held before
 *   pages   counted references; a partial page that is shared is copied before it is written;
 *           rows past a sequence's length are never read, so they need no clearing
 *   handles slot and generation, so that a handle of a released sequence is recognised
 *
 * Snapshots are copies that are kept in what nobody needs now: in the slots beyond max_alive and
 * in those that living sequences leave. Where one of these wants a slot or a page, snapshots go,
 * the one used longest ago first; whoever holds its handle sees that it is stale. So a snapshot
 * never stands in the way: to the counts of what is free it is not there.
 */
#ifndef KL_MODEL_CACHE_H
#define KL_MODEL_CACHE_H

#include "base/arena.h"
#include "model/engine.h"

typedef struct {
    uint32_t generation; /* odd while alive */
    bool broken;         /* a step failed halfway: only release takes it */
    bool snapshot;       /* released at once where its slot or pages are wanted */
    int64_t length;      /* tokens */
    int64_t n_pages;     /* of its row of the page table */
    int64_t reserved;    /* pages promised to it and not taken yet */
    uint64_t last_use;   /* of a snapshot */
} kl_cache_seq;

typedef struct {
    kl_backend *be;
    const kl_config *config;
    kl_dtype act;
    kl_latents latents;
    int64_t n_slots, n_pages, max_context, table_width /* pages of max_context */;
    int64_t max_alive; /* sequences that are not snapshots, at most */

    kl_tensor *states;  /* [n_kda] of [S, H, V, K] f32      */
    kl_tensor *windows; /* [n_kda] of [S, C, W-1] act       */
    kl_tensor *pages;   /* [n_mla] of [P, 64, rank+rope] act, or 8-bit */
    int64_t n_kda, n_mla;

    kl_cache_seq *seqs;      /* [n_slots] */
    int32_t *tables;         /* [n_slots, table_width] */
    uint32_t *refs;          /* [n_pages] */
    uint32_t *snapshot_refs; /* [n_pages], those of snapshots among them */
    int32_t *free_pages;     /* a stack of n_free */
    int64_t n_free, n_reserved, n_alive;
    int64_t n_snapshots, n_spare /* pages that snapshots alone hold */;
    uint64_t uses, n_evicted; /* of snapshots */
    void *host;               /* one block behind the arrays above */
} kl_cache;

typedef struct {
    int64_t n_slots, n_pages, max_context;
    int64_t n_extra; /* slots that snapshots alone use */
    kl_latents latents;
} kl_cache_shape;

/* Bytes a token takes in the pages of all MLA layers, and a sequence in all KDA layers. */
size_t kl_cache_token_bytes(const kl_config *config, kl_dtype act, kl_latents latents);
size_t kl_cache_seq_bytes(const kl_config *config, kl_dtype act);
/* Pages that hold `tokens` tokens; none for a model without MLA layers. */
int64_t kl_cache_pages_for(const kl_config *config, int64_t tokens);

/* Lay out the device memory; measure with an arena without memory. out NULL only measures. */
kl_status kl_cache_layout(kl_cache *out, const kl_config *config, kl_dtype act,
                          const kl_cache_shape *shape, kl_arena *arena, size_t *state_bytes,
                          size_t *page_bytes, kl_error *err);
/* Host bookkeeping, then the layout in `arena`. */
kl_status kl_cache_init(kl_cache *c, kl_backend *be, const kl_config *config, kl_dtype act,
                        const kl_cache_shape *shape, kl_arena *arena, kl_error *err);
void kl_cache_free(kl_cache *c); /* the bookkeeping; zeroed memory is fine */

kl_status kl_cache_new(kl_cache *c, kl_seq *out, kl_error *err);
kl_status kl_cache_fork(kl_cache *c, kl_seq seq, kl_seq *out, kl_error *err);
kl_status kl_cache_release(kl_cache *c, kl_seq seq, kl_error *err);

/* A snapshot of a sequence at the end of a page; *out 0 where living sequences need every slot.
 * It can be forked like any other, which counts as a use, and released. */
kl_status kl_cache_snapshot(kl_cache *c, kl_seq seq, kl_seq *out, kl_error *err);
/* Whether one more snapshot would find a slot, and which other would go for it; 0: none. */
bool kl_cache_snapshot_fits(const kl_cache *c, kl_seq *victim);
/* Of a snapshot: it was of use, and goes after those that were not since. */
void kl_cache_use(kl_cache *c, kl_seq seq);
/* Whether a handle is that of a sequence or snapshot that is there still. */
bool kl_cache_is_alive(const kl_cache *c, kl_seq seq);

/* The sequence of a handle; its index is its slot. A broken one is refused unless `broken`. */
kl_status kl_cache_find(const kl_cache *c, kl_seq seq, bool broken, int64_t *slot,
                        kl_error *err);

/* A sequence of `length` tokens whose memory the caller is about to write. */
kl_status kl_cache_restore(kl_cache *c, int64_t length, kl_seq *out, kl_error *err);

/* Promise pages for a sequence to grow to `tokens`, with a copy of its last page where that is
 * shared now: nobody else can take them. unreserve() gives back what was not taken. */
kl_status kl_cache_reserve(kl_cache *c, kl_seq seq, int64_t tokens, kl_error *err);
void kl_cache_unreserve(kl_cache *c, int64_t slot);
/* Pages that a fork of a sequence takes to grow to `tokens`: full ones stay shared. Of a
 * snapshot, with those of its own that can be had no longer while the fork lives. */
int64_t kl_cache_fork_pages(const kl_cache *c, int64_t slot, int64_t tokens);
/* Pages that are neither taken by living sequences nor promised. */
int64_t kl_cache_available(const kl_cache *c);
/* Sequences that can be made beside those alive. */
int64_t kl_cache_free_seqs(const kl_cache *c);

/* Before a step: check that slots[i] may grow by counts[i] tokens, all of them together; then
 * take the pages, copying a shared partial page. Lengths are advanced by kl_cache_advance(), by
 * fewer tokens where guesses were wrong: pages for these are promised to the sequence again. */
kl_status kl_cache_check_growth(const kl_cache *c, const int64_t *slots, const int64_t *counts,
                                int64_t n, kl_error *err);
kl_status kl_cache_grow(kl_cache *c, const int64_t *slots, const int64_t *counts, int64_t n,
                        kl_error *err);
void kl_cache_advance(kl_cache *c, int64_t slot, int64_t count);

/* Entry `index` of a tensor whose first axis counts slots or pages. */
static inline void *kl_cache_entry(const kl_tensor *t, int64_t index, size_t *bytes)
{
    *bytes = (size_t)t->stride[0] * kl_dtype_bytes(t->dtype);
    return (char *)t->data + (size_t)index * *bytes;
}

static inline const int32_t *kl_cache_table(const kl_cache *c, int64_t slot)
{
    return c->tables + slot * c->table_width;
}

#endif
