/*
 * draft.c -- see draft.h.
 */
#include "model/draft.h"

#include "base/memory.h"

#define MOST_PLACES 32 /* that are compared: a common pair has thousands */
#define MOST_TOKENS 32 /* in common: more make a place no better */
#define LEAST_HEADS 1024
#define MOST_HEADS  (INT64_C(1) << 20)

kl_status kl_draft_init(kl_draft *d, int64_t capacity, kl_error *err)
{
    int64_t heads = LEAST_HEADS;
    while (heads < capacity && heads < MOST_HEADS) heads *= 2;
    *d = (kl_draft){.mask = (uint32_t)(heads - 1)};
    d->first = kl_calloc((size_t)heads, sizeof *d->first);
    d->next = kl_calloc((size_t)capacity, sizeof *d->next);
    if (d->first != NULL && d->next != NULL) return KL_OK;
    kl_draft_free(d);
    return kl_fail(err, KL_ERR_MEMORY, "draft: no memory for the places of %lld tokens",
                   (long long)capacity);
}

void kl_draft_free(kl_draft *d)
{
    kl_free(d->first);
    kl_free(d->next);
    *d = (kl_draft){0};
}

/* The chain of the pair that ends at `place` (Knuth's multiplicative hash). */
static int32_t *chain_of(const kl_draft *d, const int32_t *ids, int64_t place)
{
    const uint64_t pair = (uint64_t)(uint32_t)ids[place - 1] << 32 | (uint32_t)ids[place];
    return &d->first[(uint32_t)((pair * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & d->mask];
}

static void note_pairs(kl_draft *d, const int32_t *ids, int64_t n)
{
    for (int64_t place = d->n > 1 ? d->n : 1; place < n; place++) {
        int32_t *const chain = chain_of(d, ids, place);
        d->next[place] = *chain;
        *chain = (int32_t)(place + 1);
    }
    d->n = n;
}

/* Tokens up to `place` that are those up to the end. */
static int64_t in_common(const int32_t *ids, int64_t place, int64_t end)
{
    int64_t m = 0;
    while (m < MOST_TOKENS && m <= place && ids[place - m] == ids[end - m]) m++;
    return m;
}

int64_t kl_draft_guess(kl_draft *d, int32_t *ids, int64_t n, int64_t most)
{
    int64_t best = -1, longest = 1;
    if (n < 2 || most < 1) return 0;
    note_pairs(d, ids, n - 1); /* the pair at the end is what is looked for */
    int64_t place = *chain_of(d, ids, n - 1) - 1;
    for (int i = 0; i < MOST_PLACES && place >= 0; i++) {
        const int64_t m = in_common(ids, place, n - 1);
        if (m > longest) longest = m, best = place;
        place = d->next[place] - 1;
    }
    if (best < 0) return 0;
    const int64_t count = kl_min_i64(most, (longest + 1) / 2);
    /* What follows may lead into the guess itself: then the text goes round. */
    for (int64_t i = 0; i < count; i++) ids[n + i] = ids[best + 1 + i];
    return count;
}
