/*
 * draft.h -- guesses of a text's next tokens, from the text itself.
 *
 * Where the last tokens have stood before, those that followed them there may follow again: in a
 * document that is quoted, code that is edited, a list that goes on. Of the places where the last
 * two tokens have stood, the most recent ones are compared, and the one that most tokens before
 * them have in common with the end counts, the most recent among equals. It tells half as many
 * tokens as it has in common: of prose, code and quotations, and wherever a guess costs a tenth to
 * a third of a step, that came within 2 % of the best of ten rules (the others: a fixed number, as
 * many as in common, twice as many as were right before), and it has no memory of its own.
 *
 * A guess costs as much at a million tokens as at a hundred: places of equal pairs form a chain,
 * the most recent first, as in the compression of files (RFC 1951, section 4).
 */
#ifndef KL_MODEL_DRAFT_H
#define KL_MODEL_DRAFT_H

#include "base/error.h"

#include <stdint.h>

typedef struct {
    int32_t
        *first; /* [mask + 1]: the last place where a pair of this hash ends, plus 1; 0: none */
    int32_t *next; /* [capacity]: of the pair that ends here, the one before it */
    int64_t n;     /* tokens whose pairs are known */
    uint32_t mask;
} kl_draft;

/* For a text that may grow to `capacity` tokens. Zeroed memory can be freed. */
kl_status kl_draft_init(kl_draft *d, int64_t capacity, kl_error *err);
void kl_draft_free(kl_draft *d);

/* Guess up to `most` tokens after ids[n - 1] and store them behind it. The text may have grown
 * since the last call, but not changed. Returns how many. */
int64_t kl_draft_guess(kl_draft *d, int32_t *ids, int64_t n, int64_t most);

#endif
