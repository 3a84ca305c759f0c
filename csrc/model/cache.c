/*
 * cache.c -- slots, pages and handles; see cache.h. Sizes and layout are cache_layout.c's.
 */
#include "model/cache.h"

#include "base/memory.h"

#include <string.h>

/* ---- references of pages --------------------------------------------------------------- */

static bool is_spare(const kl_cache *c, int32_t page)
{
    return c->refs[page] > 0 && c->refs[page] == c->snapshot_refs[page];
}

static void hold_page(kl_cache *c, int32_t page, bool snapshot)
{
    c->n_spare -= is_spare(c, page);
    c->refs[page]++;
    c->snapshot_refs[page] += snapshot;
    c->n_spare += is_spare(c, page);
}

static void drop_page(kl_cache *c, int32_t page, bool snapshot)
{
    c->n_spare -= is_spare(c, page);
    c->refs[page]--;
    c->snapshot_refs[page] -= snapshot;
    c->n_spare += is_spare(c, page);
    if (c->refs[page] == 0) c->free_pages[c->n_free++] = page;
}

static int32_t take_page(kl_cache *c, kl_cache_seq *s)
{
    const int32_t page = c->free_pages[--c->n_free];
    c->refs[page] = 1;
    if (s->reserved > 0) {
        s->reserved--;
        c->n_reserved--;
    }
    return page;
}

/* The last page of a sequence goes back, promised to it again: it was taken for tokens that it
 * will have after all, if not these. */
static void return_page(kl_cache *c, kl_cache_seq *s, const int32_t *table)
{
    drop_page(c, table[--s->n_pages], s->snapshot);
    s->reserved++;
    c->n_reserved++;
}

static int64_t spare_pages(const kl_cache *c, int64_t slot)
{
    const int32_t *table = kl_cache_table(c, slot);
    int64_t n = 0;
    for (int64_t p = 0; p < c->seqs[slot].n_pages; p++) n += is_spare(c, table[p]);
    return n;
}

/* ---- slots ----------------------------------------------------------------------------- */

static kl_seq handle_of(const kl_cache *c, int64_t slot)
{
    return (kl_seq)c->seqs[slot].generation << 32 | (kl_seq)(slot + 1);
}

static bool in_use(const kl_cache *c, int64_t slot)
{
    return (c->seqs[slot].generation & 1u) != 0;
}

bool kl_cache_is_alive(const kl_cache *c, kl_seq seq)
{
    const int64_t i = (int64_t)(seq & 0xffffffffu) - 1;
    return i >= 0 && i < c->n_slots && in_use(c, i) &&
           c->seqs[i].generation == (uint32_t)(seq >> 32);
}

kl_status kl_cache_find(const kl_cache *c, kl_seq seq, bool broken, int64_t *slot,
                        kl_error *err)
{
    if (!kl_cache_is_alive(c, seq))
        return kl_fail(err, KL_ERR_VALUE,
                       "sequence: must be one that is alive, got handle %llu",
                       (unsigned long long)seq);
    *slot = (int64_t)(seq & 0xffffffffu) - 1;
    if (c->seqs[*slot].broken && !broken)
        return kl_fail(err, KL_ERR_VALUE,
                       "sequence: a step over it was interrupted; it can only be released");
    return KL_OK;
}

static void leave_slot(kl_cache *c, int64_t slot)
{
    kl_cache_seq *s = &c->seqs[slot];
    const int32_t *table = kl_cache_table(c, slot);
    for (int64_t p = 0; p < s->n_pages; p++) drop_page(c, table[p], s->snapshot);
    kl_cache_unreserve(c, slot);
    *(s->snapshot ? &c->n_snapshots : &c->n_alive) -= 1;
    *s = (kl_cache_seq){.generation = s->generation + 1};
}

/* The snapshot used longest ago, but not `except`; where pages are wanted, of those that have one
 * to give. -1: none. */
static int64_t oldest_snapshot(const kl_cache *c, bool pages, int64_t except)
{
    int64_t oldest = -1;
    for (int64_t i = 0; i < c->n_slots; i++) {
        const kl_cache_seq *s = &c->seqs[i];
        if (!in_use(c, i) || !s->snapshot || i == except) continue;
        if (oldest >= 0 && s->last_use > c->seqs[oldest].last_use) continue;
        if (!pages || spare_pages(c, i) > 0) oldest = i;
    }
    return oldest;
}

/* Returns whether there was one to be given up. */
static bool evict(kl_cache *c, bool pages, int64_t except)
{
    const int64_t oldest = oldest_snapshot(c, pages, except);
    if (oldest < 0) return false;
    leave_slot(c, oldest);
    c->n_evicted++;
    return true;
}

/* Turn spare pages into free ones, until `n` are free and not promised; of those available. */
static void make_room(kl_cache *c, int64_t n)
{
    while (c->n_free - c->n_reserved < n && evict(c, true, -1)) continue;
}

/* A slot that nothing is in, if need be that of a snapshot other than `except`; -1: none. */
static int64_t free_slot(kl_cache *c, int64_t except)
{
    if (c->n_alive + c->n_snapshots == c->n_slots && !evict(c, false, except)) return -1;
    int64_t slot = 0;
    while (in_use(c, slot)) slot++;
    return slot;
}

static kl_status check_alive(const kl_cache *c, kl_error *err)
{
    if (c->n_alive < c->max_alive) return KL_OK;
    return kl_fail(err, KL_ERR_MEMORY,
                   "sequence: all %lld are in use (max_batch); release one or plan for more",
                   (long long)c->max_alive);
}

static void enter_slot(kl_cache *c, int64_t slot, bool snapshot, kl_seq *out)
{
    kl_cache_seq *s = &c->seqs[slot];
    *s = (kl_cache_seq){
        .generation = s->generation + 1, .snapshot = snapshot, .last_use = ++c->uses};
    *(snapshot ? &c->n_snapshots : &c->n_alive) += 1;
    *out = handle_of(c, slot);
}

/* ---- sequences ------------------------------------------------------------------------- */

static kl_status zero_slot(kl_cache *c, const kl_tensor *t, int64_t slot, kl_error *err)
{
    size_t bytes;
    void *p = kl_cache_entry(t, slot, &bytes);
    return bytes == 0 ? KL_OK : c->be->vt->zero(c->be, p, bytes, err);
}

static kl_status copy_slot(kl_cache *c, const kl_tensor *t, int64_t from, int64_t to,
                           kl_error *err)
{
    size_t bytes;
    const void *src = kl_cache_entry(t, from, &bytes);
    void *dst = kl_cache_entry(t, to, &bytes);
    return bytes == 0 ? KL_OK : c->be->vt->copy(c->be, dst, src, bytes, err);
}

kl_status kl_cache_new(kl_cache *c, kl_seq *out, kl_error *err)
{
    KL_TRY(check_alive(c, err));
    const int64_t slot = free_slot(c, -1);
    for (int64_t i = 0; i < c->n_kda; i++) {
        KL_TRY(zero_slot(c, &c->states[i], slot, err));
        KL_TRY(zero_slot(c, &c->windows[i], slot, err));
    }
    enter_slot(c, slot, false, out);
    return KL_OK;
}

static kl_status copy_into(kl_cache *c, int64_t from, int64_t to, bool snapshot, kl_seq *out,
                           kl_error *err)
{
    for (int64_t i = 0; i < c->n_kda; i++) {
        KL_TRY(copy_slot(c, &c->states[i], from, to, err));
        KL_TRY(copy_slot(c, &c->windows[i], from, to, err));
    }
    enter_slot(c, to, snapshot, out);
    const kl_cache_seq *s = &c->seqs[from];
    const int32_t *table = kl_cache_table(c, from);
    memcpy(c->tables + to * c->table_width, table, (size_t)s->n_pages * sizeof *table);
    for (int64_t p = 0; p < s->n_pages; p++) hold_page(c, table[p], snapshot);
    c->seqs[to].length = s->length;
    c->seqs[to].n_pages = s->n_pages;
    return KL_OK;
}

/* A snapshot comes alive in its own slot, under a new handle: there is no other slot. */
static void revive(kl_cache *c, int64_t slot, kl_seq *out)
{
    kl_cache_seq *s = &c->seqs[slot];
    const int32_t *table = kl_cache_table(c, slot);
    for (int64_t p = 0; p < s->n_pages; p++) {
        hold_page(c, table[p], false);
        drop_page(c, table[p], true);
    }
    s->snapshot = false;
    s->generation += 2;
    c->n_snapshots--;
    c->n_evicted++;
    c->n_alive++;
    *out = handle_of(c, slot);
}

kl_status kl_cache_fork(kl_cache *c, kl_seq seq, kl_seq *out, kl_error *err)
{
    int64_t from;
    KL_TRY(kl_cache_find(c, seq, false, &from, err));
    KL_TRY(check_alive(c, err));
    kl_cache_use(c, seq);
    const int64_t to = free_slot(c, from);
    if (to >= 0) return copy_into(c, from, to, false, out, err);
    revive(c, from, out);
    return KL_OK;
}

void kl_cache_use(kl_cache *c, kl_seq seq)
{
    if (kl_cache_is_alive(c, seq)) c->seqs[(seq & 0xffffffffu) - 1].last_use = ++c->uses;
}

bool kl_cache_snapshot_fits(const kl_cache *c, kl_seq *victim)
{
    *victim = 0;
    if (c->n_alive + c->n_snapshots < c->n_slots) return true;
    const int64_t oldest = oldest_snapshot(c, false, -1);
    if (oldest >= 0) *victim = handle_of(c, oldest);
    return oldest >= 0;
}

kl_status kl_cache_snapshot(kl_cache *c, kl_seq seq, kl_seq *out, kl_error *err)
{
    int64_t from;
    *out = 0;
    KL_TRY(kl_cache_find(c, seq, false, &from, err));
    if (c->seqs[from].length % KL_PAGE_TOKENS != 0)
        return kl_fail(err, KL_ERR_VALUE,
                       "snapshot: must be of whole pages of %d tokens, got %lld",
                       KL_PAGE_TOKENS, (long long)c->seqs[from].length);
    const int64_t to = free_slot(c, from);
    return to < 0 ? KL_OK : copy_into(c, from, to, true, out, err);
}

static kl_status check_room(const kl_cache *c, int64_t length, kl_error *err)
{
    const int64_t pages = kl_cache_pages_for(c->config, length);
    if (length > c->max_context)
        return kl_fail(
            err, KL_ERR_MEMORY,
            "sequence: it has %lld tokens, the model has room for %lld (max_context); "
            "load it with more",
            (long long)length, (long long)c->max_context);
    if (pages > kl_cache_available(c))
        return kl_fail(err, KL_ERR_MEMORY,
                       "sequence: its %lld tokens need %lld pages of %d, %lld of %lld are "
                       "available; release a sequence or plan for more cache",
                       (long long)length, (long long)pages, KL_PAGE_TOKENS,
                       (long long)kl_cache_available(c), (long long)c->n_pages);
    return KL_OK;
}

kl_status kl_cache_restore(kl_cache *c, int64_t length, kl_seq *out, kl_error *err)
{
    int64_t slot;
    KL_TRY(check_room(c, length, err));
    KL_TRY(kl_cache_new(c, out, err));
    KL_TRY(kl_cache_find(c, *out, false, &slot, err));
    kl_cache_seq *s = &c->seqs[slot];
    const int64_t pages = kl_cache_pages_for(c->config, length);
    make_room(c, pages);
    while (s->n_pages < pages)
        c->tables[slot * c->table_width + s->n_pages++] = take_page(c, s);
    s->length = length;
    return KL_OK;
}

kl_status kl_cache_release(kl_cache *c, kl_seq seq, kl_error *err)
{
    int64_t slot;
    KL_TRY(kl_cache_find(c, seq, true, &slot, err));
    leave_slot(c, slot);
    return KL_OK;
}

/* ---- pages ----------------------------------------------------------------------------- */

int64_t kl_cache_available(const kl_cache *c)
{
    return c->n_free + c->n_spare - c->n_reserved;
}

int64_t kl_cache_free_seqs(const kl_cache *c)
{
    return c->max_alive - c->n_alive;
}

void kl_cache_unreserve(kl_cache *c, int64_t slot)
{
    c->n_reserved -= c->seqs[slot].reserved;
    c->seqs[slot].reserved = 0;
}

int64_t kl_cache_fork_pages(const kl_cache *c, int64_t slot, int64_t tokens)
{
    if (c->n_mla == 0) return 0;
    return kl_cache_pages_for(c->config, tokens) - c->seqs[slot].length / KL_PAGE_TOKENS +
           spare_pages(c, slot);
}

/* The page that slot's next token goes to, when it is one that it has already; else -1. */
static int32_t partial_page(const kl_cache *c, int64_t slot)
{
    const kl_cache_seq *s = &c->seqs[slot];
    if (c->n_mla == 0 || s->length % KL_PAGE_TOKENS == 0) return -1;
    return kl_cache_table(c, slot)[s->n_pages - 1];
}

/* Whether slots[i] must copy its partial page when the feeds before it have done so: then each
 * of those that shared the page has dropped it. */
static bool needs_copy(const kl_cache *c, const int64_t *slots, int64_t i)
{
    const int32_t page = partial_page(c, slots[i]);
    if (page < 0) return false;
    int64_t before = 0;
    for (int64_t j = 0; j < i; j++) before += partial_page(c, slots[j]) == page;
    return (int64_t)c->refs[page] - before > 1;
}

/* Pages to take for growing to `tokens`. */
static int64_t growth(const kl_cache *c, int64_t slot, int64_t tokens)
{
    const kl_cache_seq *s = &c->seqs[slot];
    if (tokens <= s->length) return 0;
    return kl_cache_pages_for(c->config, tokens) - s->n_pages + needs_copy(c, &slot, 0);
}

kl_status kl_cache_reserve(kl_cache *c, kl_seq seq, int64_t tokens, kl_error *err)
{
    int64_t slot;
    KL_TRY(kl_cache_find(c, seq, false, &slot, err));
    kl_cache_seq *s = &c->seqs[slot];
    const int64_t more = growth(c, slot, tokens) - s->reserved;
    if (more <= 0) return KL_OK;
    if (more > kl_cache_available(c))
        return kl_fail(err, KL_ERR_MEMORY, "cache: needs %lld more pages, %lld are available",
                       (long long)more, (long long)kl_cache_available(c));
    make_room(c, more);
    s->reserved += more;
    c->n_reserved += more;
    return KL_OK;
}

/* Pages that such a step takes beside those that are promised to its sequences. */
static int64_t unreserved_growth(const kl_cache *c, const int64_t *slots, const int64_t *counts,
                                 int64_t n)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const kl_cache_seq *s = &c->seqs[slots[i]];
        const int64_t need = kl_cache_pages_for(c->config, s->length + counts[i]) - s->n_pages +
                             needs_copy(c, slots, i);
        sum += need - kl_min_i64(need, s->reserved);
    }
    return sum;
}

kl_status kl_cache_check_growth(const kl_cache *c, const int64_t *slots, const int64_t *counts,
                                int64_t n, kl_error *err)
{
    for (int64_t i = 0; i < n; i++) {
        const int64_t length = c->seqs[slots[i]].length;
        if (counts[i] > c->max_context - length)
            return kl_fail(err, KL_ERR_VALUE,
                           "sequence: %lld tokens and %lld more must be at most %lld "
                           "(max_context)",
                           (long long)length, (long long)counts[i], (long long)c->max_context);
    }
    const int64_t unreserved = unreserved_growth(c, slots, counts, n);
    if (unreserved > kl_cache_available(c))
        return kl_fail(err, KL_ERR_MEMORY,
                       "cache: the step needs %lld pages of %d tokens, %lld are available; "
                       "release a sequence or plan for more cache",
                       (long long)unreserved, KL_PAGE_TOKENS, (long long)kl_cache_available(c));
    return KL_OK;
}

static kl_status copy_page(kl_cache *c, int32_t from, int32_t to, kl_error *err)
{
    for (int64_t i = 0; i < c->n_mla; i++) KL_TRY(copy_slot(c, &c->pages[i], from, to, err));
    return KL_OK;
}

/* needs_copy() in the order of the feeds is the same as "shared now": those before it have
 * already dropped theirs. */
static kl_status grow_one(kl_cache *c, int64_t slot, int64_t count, kl_error *err)
{
    kl_cache_seq *s = &c->seqs[slot];
    int32_t *table = c->tables + slot * c->table_width;
    const int32_t page = partial_page(c, slot);
    const int64_t total = kl_cache_pages_for(c->config, s->length + count);
    if (page >= 0 && c->refs[page] > 1) {
        const int32_t own = take_page(c, s);
        table[s->n_pages - 1] = own;
        drop_page(c, page, false);
        KL_TRY(copy_page(c, page, own, err));
    }
    while (s->n_pages < total) table[s->n_pages++] = take_page(c, s);
    return KL_OK;
}

kl_status kl_cache_grow(kl_cache *c, const int64_t *slots, const int64_t *counts, int64_t n,
                        kl_error *err)
{
    make_room(c, unreserved_growth(c, slots, counts, n));
    for (int64_t i = 0; i < n; i++) KL_TRY(grow_one(c, slots[i], counts[i], err));
    return KL_OK;
}

void kl_cache_advance(kl_cache *c, int64_t slot, int64_t count)
{
    kl_cache_seq *s = &c->seqs[slot];
    s->length += count;
    while (s->n_pages > kl_cache_pages_for(c->config, s->length))
        return_page(c, s, kl_cache_table(c, slot));
}
