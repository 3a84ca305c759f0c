/*
 * prefix.h -- prompts that were read before, or are being read now, are not read again.
 *
 * A radix tree over the token ids of prompts, in blocks of KL_PAGE_TOKENS: an edge holds the ids
 * themselves, and a prompt goes down it only where every one of them agrees. A node may have a
 * snapshot (cache.h) of a sequence that has read exactly the ids up to it. A prompt begins with
 * a fork of the deepest snapshot on its way. Nodes are at multiples of a page because prompts
 * may be cut there without a change of their bits (scheduler.h).
 *
 * A prompt's place in the tree is taken when it is queued, so prompts know of each other before
 * the first one runs. Snapshots are taken where a prompt passes a node that
 *
 *   is the end of a prompt under way, its last whole block before its last token: what a
 *       conversation rereads in its next turn, what equal prompts share, and what a prompt shares
 *       with one that it begins
 *   has two continuations: a document under several questions, a system message
 *   is the early border of a long prompt with which none shares that part yet: an eighth of what
 *       it has to read before its end. The questions on a document come one at a time; without
 *       it the second of them would read the whole document again, only to learn where it ends
 *
 * A prompt waits where one that is being read will pass a node common to both, and forks there.
 *
 * Snapshots go when the cache wants their room. Nodes that lead nowhere any more go with them:
 * the tree holds ids of prompts under way and of those that end in a snapshot, no others.
 */
#ifndef KL_MODEL_PREFIX_H
#define KL_MODEL_PREFIX_H

#include "model/cache.h"

typedef struct kl_prefix_node kl_prefix_node;
struct kl_prefix_node {
    kl_prefix_node *parent, *child, *next; /* the first child; the next of the parent's */
    int32_t *ids;                          /* [depth - parent's depth] */
    int64_t depth;                         /* tokens from the root */
    kl_seq snapshot;                       /* 0, or maybe gone: ask the cache */
    int64_t n_ends; /* places that end here or have their early border here */
};

typedef struct {
    kl_cache *cache;
    bool on;
    kl_prefix_node root;
    uint64_t n_evicted; /* the cache's count when the tree was last looked through */
    int64_t hits, cached_tokens;
} kl_prefix;

/* Where a prompt goes through the tree; zeroed: nowhere, and all calls are fine with that. */
typedef struct {
    kl_prefix_node *end, *early;
} kl_prefix_place;

void kl_prefix_init(kl_prefix *p, kl_cache *cache); /* off */
/* Give up all snapshots. Places stay valid, prompts under way leave none from then on if it is
 * switched off. */
void kl_prefix_clear(kl_prefix *p);
void kl_prefix_free(kl_prefix *p); /* when no place is left; zeroed memory is fine */

/* The place of a prompt that is queued; nowhere while it is off. leave() when it has ended. */
kl_status kl_prefix_enter(kl_prefix *p, const int32_t *ids, int64_t n, kl_prefix_place *out,
                          kl_error *err);
void kl_prefix_leave(kl_prefix *p, kl_prefix_place *place);

/* The prompt's logits were not finite: nobody begins with what it has read. */
void kl_prefix_distrust(kl_prefix *p, const kl_prefix_place *place);

/* Whether a prompt should wait for another, of which `fed` tokens were read: it will pass a
 * node that spares the first more than any snapshot does now. */
bool kl_prefix_comes(const kl_prefix *p, const kl_prefix_place *place,
                     const kl_prefix_place *other, int64_t fed);
/* Pages that must be available for a prompt's sequence to grow to `tokens`. */
int64_t kl_prefix_pages(const kl_prefix *p, const kl_prefix_place *place, int64_t tokens);
/* A sequence that has read the longest prefix there is; its length, 0 for an empty one. */
kl_status kl_prefix_start(kl_prefix *p, kl_prefix_place *place, kl_seq *out, int64_t *n_cached,
                          kl_error *err);

/* How far a prompt may be read beyond `fed` tokens before keep() should see it; 0: to its end. */
int64_t kl_prefix_cut(const kl_prefix *p, const kl_prefix_place *place, int64_t fed);
/* Take a snapshot of a prompt's sequence if `fed` tokens of it are a border without one. */
kl_status kl_prefix_keep(kl_prefix *p, const kl_prefix_place *place, kl_seq seq, int64_t fed,
                         kl_error *err);

#endif
