/*
 * score_tree.h -- which continuations begin alike: a pure function of their tokens.
 *
 * Sorted by their tokens, texts that begin alike are neighbours, and how many tokens two of them
 * share is the least of what the neighbours between them share. Only contexts are shared, none
 * of whose tokens is scored, and only up to a multiple of KL_PAGE_TOKENS, where a cut does not
 * show in the bits if they begin at a page's border.
 */
#ifndef KL_MODEL_SCORE_TREE_H
#define KL_MODEL_SCORE_TREE_H

#include "model/score.h"

/* Continuations whose passes are over the very same tokens: only their last ids differ. */
typedef struct {
    int64_t first, count; /* of the sorted ones */
    int64_t n_tokens;     /* of a pass */
    int64_t shared;       /* of them with the next one's, none with the last's */
} kl_score_pass;

typedef struct {
    const kl_continuation **sorted; /* [n] */
    kl_score_pass *passes;          /* [n_passes] */
    int64_t n_passes;
    void *block;
} kl_score_tree;

/* max_rows: results of a pass that several continuations have together. share: whether passes
 * share anything. */
kl_status kl_score_tree_make(const kl_continuation *scores, int64_t n, int64_t max_rows,
                             bool share, kl_score_tree *out, kl_error *err);
void kl_score_tree_free(kl_score_tree *t); /* zeroed is fine */

/* The end of the passes from `lo` on, before `hi`, each of which shares more than `depth` tokens
 * with the one before it; *shared: what all of these share. */
int64_t kl_score_tree_group(const kl_score_tree *t, int64_t lo, int64_t hi, int64_t depth,
                            int64_t *shared);

/* Tokens [first, first + n) of a pass. */
void kl_score_tokens(const kl_continuation *s, int64_t first, int64_t n, int32_t *out);

#endif
