/*
 * cache.c -- slots, pages and handles; see cache.h.
 */
#include "model/cache.h"

#include "base/memory.h"

#include <string.h>

/* ---- sizes and layout ------------------------------------------------------------------ */

static int64_t conv_channels(const kl_config *c)
{
    return 3 * c->kda_heads * c->kda_head_dim;
}

/* Dimensions of a kind of layer that the model lacks are not checked, so not multiplied. */
size_t kl_cache_token_bytes(const kl_config *c, kl_dtype act)
{
    const int64_t n_mla = kl_config_count(c, KL_MIXER_MLA);
    if (n_mla == 0) return 0;
    return (size_t)(n_mla * (c->kv_rank + c->rope_dim)) * kl_dtype_bytes(act);
}

size_t kl_cache_seq_bytes(const kl_config *c, kl_dtype act)
{
    const int64_t n_kda = kl_config_count(c, KL_MIXER_KDA);
    if (n_kda == 0) return 0;
    const int64_t state = c->kda_heads * c->kda_head_dim * c->kda_head_dim;
    const int64_t window = conv_channels(c) * (c->conv_width - 1);
    return (size_t)n_kda *
           ((size_t)state * sizeof(float) + (size_t)window * kl_dtype_bytes(act));
}

int64_t kl_cache_pages_for(const kl_config *c, int64_t tokens)
{
    if (kl_config_count(c, KL_MIXER_MLA) == 0) return 0;
    return (tokens + KL_PAGE_TOKENS - 1) / KL_PAGE_TOKENS;
}

static size_t tensor_bytes(const kl_tensor *t)
{
    return (size_t)kl_tensor_size(t) * kl_dtype_bytes(t->dtype);
}

static void take(kl_arena *arena, kl_tensor *t, kl_tensor *out)
{
    t->data = kl_arena_take(arena, tensor_bytes(t));
    if (out != NULL) *out = *t;
}

kl_status kl_cache_layout(kl_cache *out, const kl_config *config, kl_dtype act,
                          const kl_cache_shape *shape, kl_arena *arena, size_t *state_bytes,
                          size_t *page_bytes, kl_error *err)
{
    const int64_t K = config->kda_head_dim, S = shape->n_slots;
    const int64_t n_kda = kl_config_count(config, KL_MIXER_KDA);
    const int64_t n_mla = kl_config_count(config, KL_MIXER_MLA);
    const size_t start = arena->used;
    for (int64_t i = 0; i < n_kda; i++) {
        kl_tensor state = kl_tensor_4d(NULL, KL_F32, S, config->kda_heads, K, K);
        kl_tensor window =
            kl_tensor_3d(NULL, act, S, conv_channels(config), config->conv_width - 1);
        take(arena, &state, out == NULL ? NULL : &out->states[i]);
        take(arena, &window, out == NULL ? NULL : &out->windows[i]);
    }
    const size_t middle = arena->used;
    for (int64_t i = 0; i < n_mla; i++) {
        kl_tensor pages = kl_tensor_3d(NULL, act, shape->n_pages, KL_PAGE_TOKENS,
                                       config->kv_rank + config->rope_dim);
        take(arena, &pages, out == NULL ? NULL : &out->pages[i]);
    }
    *state_bytes = middle - start;
    *page_bytes = arena->used - middle;
    if (arena->overflowed)
        return kl_fail(err, KL_ERR_MEMORY, "cache: %lld slots and %lld pages do not fit",
                       (long long)S, (long long)shape->n_pages);
    return KL_OK;
}

/* One host block, laid out by an arena that is run twice. */
static void layout_host(kl_cache *c, kl_arena *a)
{
    c->states = kl_arena_take(a, (size_t)c->n_kda * sizeof *c->states);
    c->windows = kl_arena_take(a, (size_t)c->n_kda * sizeof *c->windows);
    c->pages = kl_arena_take(a, (size_t)c->n_mla * sizeof *c->pages);
    c->seqs = kl_arena_take(a, (size_t)c->n_slots * sizeof *c->seqs);
    c->tables = kl_arena_take(a, (size_t)(c->n_slots * c->table_width) * sizeof *c->tables);
    c->refs = kl_arena_take(a, (size_t)c->n_pages * sizeof *c->refs);
    c->free_pages = kl_arena_take(a, (size_t)c->n_pages * sizeof *c->free_pages);
}

kl_status kl_cache_init(kl_cache *c, kl_backend *be, const kl_config *config, kl_dtype act,
                        const kl_cache_shape *shape, kl_arena *arena, kl_error *err)
{
    *c = (kl_cache){.be = be,
                    .config = config,
                    .act = act,
                    .n_slots = shape->n_slots,
                    .n_pages = shape->n_pages,
                    .max_context = shape->max_context,
                    .table_width = kl_cache_pages_for(config, shape->max_context),
                    .n_kda = kl_config_count(config, KL_MIXER_KDA),
                    .n_mla = kl_config_count(config, KL_MIXER_MLA)};
    kl_arena host;
    kl_arena_init(&host, NULL, 0);
    layout_host(c, &host);
    const size_t bytes = host.used;
    c->host = kl_aligned_alloc(bytes);
    if (c->host == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "cache: no memory for %zu bytes of page tables",
                       bytes);
    kl_arena_init(&host, c->host, bytes);
    layout_host(c, &host);
    memset(c->seqs, 0, (size_t)c->n_slots * sizeof *c->seqs);
    memset(c->refs, 0, (size_t)c->n_pages * sizeof *c->refs);

    c->n_free = c->n_pages;
    for (int64_t i = 0; i < c->n_pages; i++)
        c->free_pages[i] = (int32_t)(c->n_pages - 1 - i); /* page 0 is taken first */
    size_t state_bytes, page_bytes;
    return kl_cache_layout(c, config, act, shape, arena, &state_bytes, &page_bytes, err);
}

void kl_cache_free(kl_cache *c)
{
    kl_free(c->host);
    *c = (kl_cache){0};
}

/* ---- handles --------------------------------------------------------------------------- */

static kl_seq handle_of(const kl_cache *c, int64_t slot)
{
    return (kl_seq)c->seqs[slot].generation << 32 | (kl_seq)(slot + 1);
}

kl_status kl_cache_find(const kl_cache *c, kl_seq seq, bool broken, int64_t *slot,
                        kl_error *err)
{
    const int64_t i = (int64_t)(seq & 0xffffffffu) - 1;
    if (i < 0 || i >= c->n_slots || (c->seqs[i].generation & 1u) == 0 ||
        c->seqs[i].generation != (uint32_t)(seq >> 32))
        return kl_fail(err, KL_ERR_VALUE,
                       "sequence: must be one that is alive, got handle %llu",
                       (unsigned long long)seq);
    if (c->seqs[i].broken && !broken)
        return kl_fail(err, KL_ERR_VALUE,
                       "sequence: a step over it was interrupted; it can only be released");
    *slot = i;
    return KL_OK;
}

static kl_status find_free_slot(const kl_cache *c, int64_t *slot, kl_error *err)
{
    for (*slot = 0; *slot < c->n_slots; (*slot)++)
        if ((c->seqs[*slot].generation & 1u) == 0) return KL_OK;
    return kl_fail(err, KL_ERR_MEMORY,
                   "sequence: all %lld are in use (max_batch); release one or plan for more",
                   (long long)c->n_slots);
}

static void make_alive(kl_cache *c, int64_t slot, kl_seq *out)
{
    kl_cache_seq *s = &c->seqs[slot];
    *s = (kl_cache_seq){.generation = s->generation + 1};
    c->n_alive++;
    *out = handle_of(c, slot);
}

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
    int64_t slot;
    KL_TRY(find_free_slot(c, &slot, err));
    for (int64_t i = 0; i < c->n_kda; i++) {
        KL_TRY(zero_slot(c, &c->states[i], slot, err));
        KL_TRY(zero_slot(c, &c->windows[i], slot, err));
    }
    make_alive(c, slot, out);
    return KL_OK;
}

kl_status kl_cache_fork(kl_cache *c, kl_seq seq, kl_seq *out, kl_error *err)
{
    int64_t from, to;
    KL_TRY(kl_cache_find(c, seq, false, &from, err));
    KL_TRY(find_free_slot(c, &to, err));
    for (int64_t i = 0; i < c->n_kda; i++) {
        KL_TRY(copy_slot(c, &c->states[i], from, to, err));
        KL_TRY(copy_slot(c, &c->windows[i], from, to, err));
    }
    make_alive(c, to, out);
    const kl_cache_seq *s = &c->seqs[from];
    const int32_t *table = kl_cache_table(c, from);
    memcpy(c->tables + to * c->table_width, table, (size_t)s->n_pages * sizeof *table);
    for (int64_t p = 0; p < s->n_pages; p++) c->refs[table[p]]++;
    c->seqs[to].length = s->length;
    c->seqs[to].n_pages = s->n_pages;
    return KL_OK;
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
    while (s->n_pages < pages)
        c->tables[slot * c->table_width + s->n_pages++] = take_page(c, s);
    s->length = length;
    return KL_OK;
}

static void drop_page(kl_cache *c, int32_t page)
{
    if (--c->refs[page] == 0) c->free_pages[c->n_free++] = page;
}

kl_status kl_cache_release(kl_cache *c, kl_seq seq, kl_error *err)
{
    int64_t slot;
    KL_TRY(kl_cache_find(c, seq, true, &slot, err));
    kl_cache_seq *s = &c->seqs[slot];
    const int32_t *table = kl_cache_table(c, slot);
    for (int64_t p = 0; p < s->n_pages; p++) drop_page(c, table[p]);
    kl_cache_unreserve(c, slot);
    c->n_alive--;
    *s = (kl_cache_seq){.generation = s->generation + 1};
    return KL_OK;
}

/* ---- pages ----------------------------------------------------------------------------- */

int64_t kl_cache_available(const kl_cache *c)
{
    return c->n_free - c->n_reserved;
}

void kl_cache_unreserve(kl_cache *c, int64_t slot)
{
    c->n_reserved -= c->seqs[slot].reserved;
    c->seqs[slot].reserved = 0;
}

int64_t kl_cache_fork_pages(const kl_cache *c, int64_t slot, int64_t tokens)
{
    if (c->n_mla == 0) return 0;
    return kl_cache_pages_for(c->config, tokens) - c->seqs[slot].length / KL_PAGE_TOKENS;
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
    s->reserved += more;
    c->n_reserved += more;
    return KL_OK;
}

kl_status kl_cache_check_growth(const kl_cache *c, const int64_t *slots, const int64_t *counts,
                                int64_t n, kl_error *err)
{
    int64_t unreserved = 0;
    for (int64_t i = 0; i < n; i++) {
        const kl_cache_seq *s = &c->seqs[slots[i]];
        if (counts[i] > c->max_context - s->length)
            return kl_fail(err, KL_ERR_VALUE,
                           "sequence: %lld tokens and %lld more must be at most %lld "
                           "(max_context)",
                           (long long)s->length, (long long)counts[i],
                           (long long)c->max_context);
        const int64_t need = kl_cache_pages_for(c->config, s->length + counts[i]) - s->n_pages +
                             needs_copy(c, slots, i);
        unreserved += need - kl_min_i64(need, s->reserved);
    }
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
        drop_page(c, page);
        KL_TRY(copy_page(c, page, own, err));
    }
    while (s->n_pages < total) table[s->n_pages++] = take_page(c, s);
    return KL_OK;
}

kl_status kl_cache_grow(kl_cache *c, const int64_t *slots, const int64_t *counts, int64_t n,
                        kl_error *err)
{
    for (int64_t i = 0; i < n; i++) KL_TRY(grow_one(c, slots[i], counts[i], err));
    return KL_OK;
}

void kl_cache_advance(kl_cache *c, int64_t slot, int64_t count)
{
    c->seqs[slot].length += count;
}
