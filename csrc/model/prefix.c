/*
 * prefix.c -- see prefix.h.
 */
#include "model/prefix.h"

#include "base/memory.h"

#include <string.h>

/* From here on a prompt gets an early border. Less is read again in a step or two. */
#define LONG_PROMPT 1024

/* ---- the tree -------------------------------------------------------------------------- */

static size_t edge_bytes(int64_t tokens)
{
    return (size_t)tokens * sizeof(int32_t);
}

/* `node` and those after it among its parent's. */
static kl_prefix_node **link_to(kl_prefix_node *node)
{
    kl_prefix_node **link = &node->parent->child;
    while (*link != node) link = &(*link)->next;
    return link;
}

static void free_node(kl_prefix_node *node)
{
    kl_free(node->ids);
    kl_free(node);
}

/* A node with an edge of these ids, linked to nothing yet. */
static kl_status make_node(kl_prefix_node *parent, const int32_t *ids, int64_t depth,
                           kl_prefix_node **out, kl_error *err)
{
    const int64_t n = depth - parent->depth;
    kl_prefix_node *node = kl_calloc(1, sizeof *node);
    int32_t *copy = kl_calloc((size_t)n, sizeof *copy);
    if (node == NULL || copy == NULL) {
        kl_free(node);
        kl_free(copy);
        return kl_fail(err, KL_ERR_MEMORY, "prefix cache: no memory for %lld tokens",
                       (long long)n);
    }
    memcpy(copy, ids, edge_bytes(n));
    *node = (kl_prefix_node){.parent = parent, .ids = copy, .depth = depth};
    *out = node;
    return KL_OK;
}

static kl_prefix_node *child_of(const kl_prefix_node *node, const int32_t *block)
{
    kl_prefix_node *child = node->child;
    while (child != NULL && memcmp(child->ids, block, edge_bytes(KL_PAGE_TOKENS)) != 0)
        child = child->next;
    return child;
}

/* How far `ids`, whose first block is the edge's, follow it, at most to depth `most`. */
static int64_t follow(const kl_prefix_node *node, const int32_t *ids, int64_t most)
{
    const int64_t begin = node->parent->depth, end = kl_min_i64(node->depth, most);
    int64_t at = begin + KL_PAGE_TOKENS;
    while (at < end &&
           memcmp(node->ids + (at - begin), ids + at, edge_bytes(KL_PAGE_TOKENS)) == 0)
        at += KL_PAGE_TOKENS;
    return at;
}

/* Put a node into the edge that leads to `lower`, at `depth`. `lower` stays who it is. */
static kl_status split(kl_prefix_node *lower, int64_t depth, kl_prefix_node **out,
                       kl_error *err)
{
    kl_prefix_node *const parent = lower->parent, *upper;
    const int64_t n = depth - parent->depth;
    KL_TRY(make_node(parent, lower->ids, depth, &upper, err));
    *link_to(lower) = upper;
    upper->next = lower->next;
    upper->child = lower;
    lower->next = NULL;
    lower->parent = upper;
    memmove(lower->ids, lower->ids + n, edge_bytes(lower->depth - depth));
    *out = upper;
    return KL_OK;
}

/* The node of the first `depth` ids, made where there is none. */
static kl_status reach(kl_prefix_node *root, const int32_t *ids, int64_t depth,
                       kl_prefix_node **out, kl_error *err)
{
    kl_prefix_node *node = root;
    while (node->depth < depth) {
        kl_prefix_node *next = child_of(node, ids + node->depth);
        if (next == NULL) {
            KL_TRY(make_node(node, ids + node->depth, depth, &next, err));
            next->next = node->child;
            node->child = next;
        }
        const int64_t common = follow(next, ids, depth);
        if (common < next->depth) KL_TRY(split(next, common, &next, err));
        node = next;
    }
    *out = node;
    return KL_OK;
}

/* ---- what is not needed any more ------------------------------------------------------- */

static bool has_snapshot(const kl_prefix *p, const kl_prefix_node *node)
{
    return kl_cache_is_alive(p->cache, node->snapshot);
}

/* Take a node out of the tree if it leads nowhere. Returns whether it did. One that is no border
 * any more but leads somewhere stays: there are never more than blocks on the way. */
static bool tidy(const kl_prefix *p, kl_prefix_node *node)
{
    if (node->parent == NULL || node->child != NULL || node->n_ends > 0 ||
        has_snapshot(p, node))
        return false;
    *link_to(node) = node->next;
    free_node(node);
    return true;
}

static void tidy_up(const kl_prefix *p, kl_prefix_node *node)
{
    for (kl_prefix_node *parent = node->parent; tidy(p, node); parent = node->parent)
        node = parent;
}

static kl_prefix_node *first_leaf(kl_prefix_node *node)
{
    while (node->child != NULL) node = node->child;
    return node;
}

/* Children before their parents; the root is the last. */
static kl_prefix_node *next_node(kl_prefix_node *node)
{
    return node->next != NULL ? first_leaf(node->next) : node->parent;
}

/* Snapshots have gone: so do the nodes that were kept for them. */
static void look_through(kl_prefix *p)
{
    if (p->n_evicted == p->cache->n_evicted) return;
    p->n_evicted = p->cache->n_evicted;
    for (kl_prefix_node *node = first_leaf(&p->root), *next; node != &p->root; node = next) {
        next = next_node(node);
        (void)tidy(p, node);
    }
}

/* ---- life ------------------------------------------------------------------------------ */

void kl_prefix_init(kl_prefix *p, kl_cache *cache)
{
    *p = (kl_prefix){.cache = cache};
}

static void drop_snapshot(const kl_prefix *p, kl_prefix_node *node)
{
    kl_error ignored; /* it is alive */
    if (has_snapshot(p, node)) (void)kl_cache_release(p->cache, node->snapshot, &ignored);
    node->snapshot = 0;
}

void kl_prefix_clear(kl_prefix *p)
{
    for (kl_prefix_node *node = first_leaf(&p->root), *next; node != &p->root; node = next) {
        next = next_node(node);
        drop_snapshot(p, node);
        (void)tidy(p, node);
    }
}

void kl_prefix_free(kl_prefix *p)
{
    for (kl_prefix_node *node = first_leaf(&p->root), *next; node != &p->root; node = next) {
        next = next_node(node);
        free_node(node);
    }
    *p = (kl_prefix){0};
}

/* ---- places ---------------------------------------------------------------------------- */

kl_status kl_prefix_enter(kl_prefix *p, const int32_t *ids, int64_t n, kl_prefix_place *out,
                          kl_error *err)
{
    *out = (kl_prefix_place){0};
    if (!p->on || n <= KL_PAGE_TOKENS) return KL_OK;
    look_through(p);
    KL_TRY(reach(&p->root, ids, (n - 1) / KL_PAGE_TOKENS * KL_PAGE_TOKENS, &out->end, err));
    out->end->n_ends++;
    return KL_OK;
}

static void leave(const kl_prefix *p, kl_prefix_node *node)
{
    if (node == NULL) return;
    node->n_ends--;
    tidy_up(p, node);
}

void kl_prefix_leave(kl_prefix *p, kl_prefix_place *place)
{
    leave(p, place->early);
    leave(p, place->end);
    *place = (kl_prefix_place){0};
    look_through(p);
}

void kl_prefix_distrust(kl_prefix *p, const kl_prefix_place *place)
{
    for (kl_prefix_node *node = place->end; node != NULL; node = node->parent)
        drop_snapshot(p, node);
}

/* The deepest node on the way to a place that has a snapshot, or NULL. */
static const kl_prefix_node *longest(const kl_prefix *p, const kl_prefix_place *place)
{
    const kl_prefix_node *node = place->end;
    while (node != NULL && !has_snapshot(p, node)) node = node->parent;
    return node;
}

static int64_t depth_of(const kl_prefix_node *node)
{
    return node == NULL ? 0 : node->depth;
}

static bool branches(const kl_prefix_node *node)
{
    return node->child != NULL && node->child->next != NULL;
}

/* Whether a prompt that passes should leave a snapshot. */
static bool is_border(const kl_prefix *p, const kl_prefix_node *node)
{
    return node->depth > 0 && (node->n_ends > 0 || branches(node)) && !has_snapshot(p, node);
}

/* Whether there is room for its snapshot. What others begin with too does not go for what only
 * this prompt has read so far: hundreds of questions must not push out their document. */
static bool has_room(const kl_prefix *p, const kl_prefix_node *node)
{
    kl_seq victim;
    if (!kl_cache_snapshot_fits(p->cache, &victim)) return false;
    for (const kl_prefix_node *above = node->parent; above != NULL; above = above->parent)
        if (victim != 0 && above->snapshot == victim) return !branches(above);
    return true;
}

/* For the same reason it is used whenever one of those that begin with it gets further. */
static void use_shared(kl_prefix *p, const kl_prefix_node *node)
{
    for (const kl_prefix_node *above = node->parent; above != NULL; above = above->parent)
        if (branches(above)) kl_cache_use(p->cache, above->snapshot);
}

bool kl_prefix_comes(const kl_prefix *p, const kl_prefix_place *place,
                     const kl_prefix_place *other, int64_t fed)
{
    const kl_prefix_node *a = place->end, *b = other->end;
    if (!p->on || a == NULL || b == NULL) return false;
    while (a != b)
        if (a->depth > b->depth)
            a = a->parent;
        else
            b = b->parent;
    return a->depth > fed && a->depth > depth_of(longest(p, place));
}

int64_t kl_prefix_pages(const kl_prefix *p, const kl_prefix_place *place, int64_t tokens)
{
    const kl_prefix_node *from = longest(p, place);
    if (from == NULL) return kl_cache_pages_for(p->cache->config, tokens);
    return kl_cache_fork_pages(p->cache, (int64_t)(from->snapshot & 0xffffffffu) - 1, tokens);
}

/* The early border of a prompt that has everything beyond `cached` to itself. */
static kl_status mark_early(kl_prefix *p, kl_prefix_place *place, int64_t cached, kl_error *err)
{
    kl_prefix_node *node = place->end;
    const int64_t rest = depth_of(node) - cached;
    const int64_t depth = (cached + rest - rest / 8) / KL_PAGE_TOKENS * KL_PAGE_TOKENS;
    if (rest < LONG_PROMPT || place->early != NULL) return KL_OK;
    for (const kl_prefix_node *above = node->parent; above->depth > cached;
         above = above->parent)
        if (is_border(p, above)) return KL_OK;
    while (node->parent->depth >= depth) node = node->parent;
    if (node->depth > depth) KL_TRY(split(node, depth, &node, err));
    node->n_ends++;
    place->early = node;
    return KL_OK;
}

kl_status kl_prefix_start(kl_prefix *p, kl_prefix_place *place, kl_seq *out, int64_t *n_cached,
                          kl_error *err)
{
    const kl_prefix_node *from = longest(p, place);
    *n_cached = depth_of(from);
    if (p->on) KL_TRY(mark_early(p, place, *n_cached, err));
    if (from == NULL) return kl_cache_new(p->cache, out, err);
    KL_TRY(kl_cache_fork(p->cache, from->snapshot, out, err));
    p->hits++;
    p->cached_tokens += *n_cached;
    return KL_OK;
}

int64_t kl_prefix_cut(const kl_prefix *p, const kl_prefix_place *place, int64_t fed)
{
    const kl_prefix_node *first = NULL;
    for (const kl_prefix_node *node = place->end; node != NULL && node->depth > fed;
         node = node->parent)
        if (is_border(p, node)) first = node;
    return p->on && first != NULL && has_room(p, first) ? first->depth : 0;
}

kl_status kl_prefix_keep(kl_prefix *p, const kl_prefix_place *place, kl_seq seq, int64_t fed,
                         kl_error *err)
{
    kl_prefix_node *node = place->end;
    while (node != NULL && node->depth > fed) node = node->parent;
    if (!p->on || node == NULL || node->depth != fed || !is_border(p, node)) return KL_OK;
    use_shared(p, node);
    if (!has_room(p, node)) return KL_OK;
    return kl_cache_snapshot(p->cache, seq, &node->snapshot, err);
}
