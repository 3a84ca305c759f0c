/*
 * cache_layout.c -- how large the cache's memories are, and where they lie; see cache.h.
 */
#include "model/cache.h"

#include "base/memory.h"

#include <string.h>

/* ---- sizes ----------------------------------------------------------------------------- */

static int64_t conv_channels(const kl_config *c)
{
    return 3 * c->kda_heads * c->kda_head_dim;
}

static kl_tensor pages_of(const kl_config *c, kl_dtype act, kl_latents latents, int64_t n)
{
    if (latents == KL_LATENTS_FP8)
        return kl_tensor_3d(NULL, KL_U8, n, KL_PAGE_TOKENS,
                            kl_latents_row_of(c->kv_rank, c->rope_dim).row_bytes);
    return kl_tensor_3d(NULL, act, n, KL_PAGE_TOKENS, c->kv_rank + c->rope_dim);
}

/* Dimensions of a kind of layer that the model lacks are not checked, so not multiplied. */
size_t kl_cache_token_bytes(const kl_config *c, kl_dtype act, kl_latents latents)
{
    const int64_t n_mla = kl_config_count(c, KL_MIXER_MLA);
    if (n_mla == 0) return 0;
    const kl_tensor page = pages_of(c, act, latents, 1);
    return (size_t)(n_mla * page.shape[2]) * kl_dtype_bytes(page.dtype);
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

/* ---- layout ---------------------------------------------------------------------------- */

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
    const int64_t K = config->kda_head_dim, S = shape->n_slots + shape->n_extra;
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
        kl_tensor pages = pages_of(config, act, shape->latents, shape->n_pages);
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
    c->snapshot_refs = kl_arena_take(a, (size_t)c->n_pages * sizeof *c->snapshot_refs);
    c->free_pages = kl_arena_take(a, (size_t)c->n_pages * sizeof *c->free_pages);
}

kl_status kl_cache_init(kl_cache *c, kl_backend *be, const kl_config *config, kl_dtype act,
                        const kl_cache_shape *shape, kl_arena *arena, kl_error *err)
{
    *c = (kl_cache){.be = be,
                    .config = config,
                    .act = act,
                    .latents = shape->latents,
                    .n_slots = shape->n_slots + shape->n_extra,
                    .max_alive = shape->n_slots,
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
    memset(c->snapshot_refs, 0, (size_t)c->n_pages * sizeof *c->snapshot_refs);

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
