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

int64_t kl_sched_admit(const kl_sched_request *requests, int64_t n, int64_t free_seqs,
                       int64_t free_pages)
{
    if (free_seqs == 0) return -1;
    for (int64_t i = 0; i < n; i++)
        if (requests[i].phase == KL_SCHED_WAITING)
            return requests[i].pages <= free_pages ? i : -1;
    return -1;
}

/* Tokens of the step that prompts may use: what decoding leaves, but always a whole unit (or
 * all the rest) of the first prompt, or a full step of decoding would hold it up for ever. */
static int64_t prompt_room(const kl_sched_request *requests, int64_t n, int64_t step_tokens)
{
    int64_t decoding = 0, first = 0;
    for (int64_t i = 0; i < n; i++) {
        const kl_sched_request *r = &requests[i];
        decoding += r->phase == KL_SCHED_DECODE;
        if (r->phase == KL_SCHED_PROMPT && first == 0)
            first = kl_min_i64(r->n_prompt - r->fed, kl_sched_unit(step_tokens));
    }
    const int64_t left = step_tokens - kl_min_i64(decoding, step_tokens);
    return left < first ? first : left;
}

int64_t kl_sched_step(const kl_sched_request *requests, int64_t n, int64_t step_tokens,
                      kl_sched_item *items)
{
    const int64_t unit = kl_sched_unit(step_tokens);
    int64_t room = prompt_room(requests, n, step_tokens), used = 0, n_items = 0;
    for (int64_t i = 0; i < n; i++) {
        const kl_sched_request *r = &requests[i];
        if (r->phase != KL_SCHED_PROMPT) continue;
        const int64_t rest = r->n_prompt - r->fed;
        const int64_t count = rest <= room ? rest : room / unit * unit;
        if (count == 0) continue;
        items[n_items++] = (kl_sched_item){i, count, count == rest};
        room -= count;
        used += count;
    }
    for (int64_t i = 0; i < n && used < step_tokens; i++) {
        if (requests[i].phase != KL_SCHED_DECODE) continue;
        items[n_items++] = (kl_sched_item){i, 1, true};
        used++;
    }
    return n_items;
}
