/*
 * score_tree.c -- see score_tree.h.
 */
#include "model/score_tree.h"

#include "backend/ops.h"
#include "base/arena.h"
#include "base/memory.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK 64 /* tokens that are compared at a time: contexts share many */

/* How many of n tokens are the same from the beginning. */
static int64_t common(const int32_t *a, const int32_t *b, int64_t n)
{
    int64_t i = 0;
    if (a == b) return n;
    while (i + BLOCK <= n && memcmp(a + i, b + i, BLOCK * sizeof *a) == 0) i += BLOCK;
    while (i < n && a[i] == b[i]) i++;
    return i;
}

/* By the tokens, then by how many there are. */
static int order_of(const int32_t *a, int64_t n_a, const int32_t *b, int64_t n_b)
{
    const int64_t n = kl_min_i64(n_a, n_b), same = common(a, b, n);
    if (same < n) return a[same] < b[same] ? -1 : 1;
    return n_a == n_b ? 0 : n_a < n_b ? -1 : 1;
}

/* What a pass feeds is the context and all of the continuation but its last id. */
static int compare(const void *left, const void *right)
{
    const kl_continuation *a = *(const kl_continuation *const *)left,
                          *b = *(const kl_continuation *const *)right;
    int order = order_of(a->context, a->n_context, b->context, b->n_context);
    if (order == 0) order = order_of(a->ids, a->n - 1, b->ids, b->n - 1);
    return order != 0 ? order : a < b ? -1 : a > b;
}

static bool same_pass(const kl_continuation *a, const kl_continuation *b)
{
    return order_of(a->context, a->n_context, b->context, b->n_context) == 0 &&
           order_of(a->ids, a->n - 1, b->ids, b->n - 1) == 0;
}

/* The token whose successor is scored first is fed by each pass itself. */
static int64_t shared_tokens(const kl_continuation *a, const kl_continuation *b)
{
    const int64_t n = kl_min_i64(a->n_context, b->n_context);
    const int64_t same = kl_min_i64(common(a->context, b->context, n), n - 1);
    return same / KL_PAGE_TOKENS * KL_PAGE_TOKENS;
}

static void group_passes(kl_score_tree *t, int64_t n, int64_t max_rows, bool share)
{
    for (int64_t i = 0; i < n; i++) {
        const kl_continuation *s = t->sorted[i];
        kl_score_pass *last = t->n_passes == 0 ? NULL : &t->passes[t->n_passes - 1];
        if (last != NULL && same_pass(t->sorted[i - 1], s) &&
            (last->count + 1) * s->n <= max_rows) {
            last->count++;
            continue;
        }
        if (last != NULL && share) last->shared = shared_tokens(t->sorted[i - 1], s);
        t->passes[t->n_passes++] = (kl_score_pass){i, 1, s->n_context + s->n - 1, 0};
    }
}

kl_status kl_score_tree_make(const kl_continuation *scores, int64_t n, int64_t max_rows,
                             bool share, kl_score_tree *out, kl_error *err)
{
    *out = (kl_score_tree){0};
    out->block = kl_calloc((size_t)n, sizeof *out->sorted + sizeof *out->passes);
    if (out->block == NULL)
        return kl_fail(err, KL_ERR_MEMORY, "score: no memory to sort %lld continuations",
                       (long long)n);
    out->passes = out->block;
    out->sorted = (const kl_continuation **)(void *)(out->passes + n);
    for (int64_t i = 0; i < n; i++) out->sorted[i] = &scores[i];
    qsort(out->sorted, (size_t)n, sizeof *out->sorted, compare);
    group_passes(out, n, max_rows, share);
    return KL_OK;
}

void kl_score_tree_free(kl_score_tree *t)
{
    kl_free(t->block);
    *t = (kl_score_tree){0};
}

int64_t kl_score_tree_group(const kl_score_tree *t, int64_t lo, int64_t hi, int64_t depth,
                            int64_t *shared)
{
    int64_t end = lo + 1;
    *shared = t->passes[lo].n_tokens;
    for (; end < hi && t->passes[end - 1].shared > depth; end++)
        *shared = kl_min_i64(*shared, t->passes[end - 1].shared);
    return end;
}

void kl_score_tokens(const kl_continuation *s, int64_t first, int64_t n, int32_t *out)
{
    int64_t of_context = s->n_context - first;
    if (of_context < 0) of_context = 0;
    if (of_context > n) of_context = n;
    if (of_context > 0) memcpy(out, s->context + first, (size_t)of_context * sizeof *out);
    if (of_context == n) return;
    const int64_t from = first + of_context - s->n_context;
    memcpy(out + of_context, s->ids + from, (size_t)(n - of_context) * sizeof *out);
}
