/*
 * scheduler.c -- see scheduler.h.
 */
#include "model/scheduler.h"

#include "backend/ops.h"
#include "base/memory.h"

int64_t kl_sched_unit(int64_t step_tokens)
{
    return kl_min_i64(step_tokens, KL_PAGE_TOKENS);
}

int64_t kl_sched_lead(int64_t before, int64_t n)
{
    const int64_t past = before % KL_PAGE_TOKENS;
    return past > 0 && n > KL_PAGE_TOKENS ? KL_PAGE_TOKENS - past : 0;
}

bool kl_sched_admits(const kl_sched_request *first, int64_t free_seqs, int64_t free_pages)
{
    return free_seqs > 0 && first->pages <= free_pages;
}

/* ---- prompts --------------------------------------------------------------------------- */

typedef struct {
    const kl_sched_request *requests;
    int64_t n, unit, room; /* room: tokens that prompts may still take */
    kl_sched_item *items;
    int64_t n_items;
} filling;

static int64_t rest_of(const filling *f, int64_t i)
{
    const kl_sched_request *r = &f->requests[i];
    return r->phase == KL_SCHED_PROMPT ? r->n_prompt - r->fed : 0;
}

/* As much of a prompt as `room` holds: all to its end or its cut, or whole units. */
static void take_prompt(filling *f, int64_t i, int64_t room)
{
    const kl_sched_request *r = &f->requests[i];
    const int64_t rest = r->cut > r->fed ? r->cut - r->fed : rest_of(f, i);
    const int64_t count = rest <= room ? rest : room / f->unit * f->unit;
    if (count == 0) return;
    f->items[f->n_items++] = (kl_sched_item){i, count, r->fed + count == r->n_prompt};
    f->room -= count;
}

/* The prompt behind prompt `last` in the order of what is left, the older first among equals;
 * last -1: the first in that order. Returns -1 behind the end. */
static int64_t next_shortest(const filling *f, int64_t oldest, int64_t last)
{
    int64_t best = -1;
    for (int64_t i = oldest + 1; i < f->n; i++) {
        const int64_t rest = rest_of(f, i), before = last < 0 ? 0 : rest_of(f, last);
        if (rest < before || rest == 0 || (rest == before && i <= last)) continue;
        if (best < 0 || rest < rest_of(f, best)) best = i;
    }
    return best;
}

static void take_prompts(filling *f)
{
    int64_t oldest = 0, others = 0;
    while (oldest < f->n && rest_of(f, oldest) == 0) oldest++;
    if (oldest == f->n) return;
    for (int64_t i = oldest + 1; i < f->n; i++) others += rest_of(f, i);
    const int64_t most = f->room - kl_min_i64(f->room / 4, others);
    take_prompt(f, oldest, most < f->unit ? f->room : most);
    for (int64_t i = next_shortest(f, oldest, -1); i >= 0 && f->room > 0;
         i = next_shortest(f, oldest, i))
        take_prompt(f, i, f->room);
}

/* ---- a step ---------------------------------------------------------------------------- */

/* Tokens of the step that prompts may use: what decoding leaves, but a whole unit (or all the
 * rest) of the oldest prompt, or a full step of decoding would hold it up for ever; and that not
 * twice in turn, or prompts would hold up decoding. */
static int64_t prompt_room(const filling *f, int64_t step_tokens, bool decode_first)
{
    int64_t decoding = 0, first = 0;
    for (int64_t i = 0; i < f->n; i++) {
        decoding += f->requests[i].phase == KL_SCHED_DECODE;
        if (first == 0) first = kl_min_i64(rest_of(f, i), f->unit);
    }
    const int64_t left = step_tokens - kl_min_i64(decoding, step_tokens);
    return left < first && !(decode_first && decoding > 0) ? first : left;
}

int64_t kl_sched_step(const kl_sched_request *requests, int64_t n, int64_t step_tokens,
                      bool decode_first, kl_sched_item *items)
{
    filling f = {
        .requests = requests, .n = n, .unit = kl_sched_unit(step_tokens), .items = items};
    f.room = prompt_room(&f, step_tokens, decode_first);
    int64_t left = step_tokens - f.room;
    take_prompts(&f);
    left += f.room;
    for (int64_t i = 0; i < n && left > 0; i++) {
        if (requests[i].phase != KL_SCHED_DECODE) continue;
        items[f.n_items++] = (kl_sched_item){i, 1, true};
        left--;
    }
    return f.n_items;
}

int64_t kl_sched_add_guesses(const int64_t *guesses, int64_t most, kl_sched_item *items,
                             int64_t n_items)
{
    int64_t guessing = 0, sum = 0;
    if (most <= n_items) return 0;
    for (int64_t k = 0; k < n_items; k++) guessing += guesses[k] > 0;
    for (int64_t k = 0; k < n_items; k++) {
        if (guesses[k] == 0) continue;
        const int64_t room = most - n_items - sum;
        const int64_t count = kl_min_i64(guesses[k], (room + guessing - 1) / guessing);
        items[k].count += count;
        sum += count;
        guessing--;
    }
    return sum;
}

bool kl_sched_held_up(const kl_sched_request *requests, int64_t n, const kl_sched_item *items,
                      int64_t n_items)
{
    int64_t prompts = 0, decoding = 0;
    for (int64_t k = 0; k < n_items; k++)
        prompts += requests[items[k].request].phase == KL_SCHED_PROMPT;
    for (int64_t i = 0; i < n; i++) decoding += requests[i].phase == KL_SCHED_DECODE;
    return prompts > 0 && n_items - prompts < decoding;
}
