/*
 * arena.h -- a bump allocator over one block that somebody else owns.
 *
 * Used twice with one code path: with base NULL it only measures (used ends as the bytes
 * needed), with memory it hands out 64-byte aligned pieces. A function that lays out a step's
 * buffers is run once in each way, so the plan and the layout cannot disagree.
 */
#ifndef KL_BASE_ARENA_H
#define KL_BASE_ARENA_H

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    char *base; /* NULL: measure */
    size_t capacity, used, peak;
    bool overflowed; /* a piece did not fit, or a size wrapped */
} kl_arena;

void kl_arena_init(kl_arena *arena, void *base, size_t capacity);

/* NULL when measuring and when it does not fit (then overflowed is set). */
void *kl_arena_take(kl_arena *arena, size_t bytes);

/* Give back all taken since `mark` (an earlier value of used). */
void kl_arena_rewind(kl_arena *arena, size_t mark);

#endif
