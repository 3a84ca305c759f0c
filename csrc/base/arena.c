/*
 * arena.c -- see arena.h.
 */
#include "base/arena.h"

#include "base/memory.h"

#define ALIGNMENT 64u /* a cache line, and the widest vector */

void kl_arena_init(kl_arena *arena, void *base, size_t capacity)
{
    *arena = (kl_arena){.base = base, .capacity = capacity};
}

/* Whether `bytes`, rounded up to the alignment, fit behind what is used; *end is where they
 * would end. Measuring is bounded by the address space alone. */
static bool piece_fits(const kl_arena *arena, size_t bytes, size_t *end)
{
    size_t padded;
    if (!kl_add_size(bytes, ALIGNMENT - 1, &padded)) return false;
    if (!kl_add_size(arena->used, padded / ALIGNMENT * ALIGNMENT, end)) return false;
    return arena->base == NULL || *end <= arena->capacity;
}

void *kl_arena_take(kl_arena *arena, size_t bytes)
{
    size_t end;
    if (!piece_fits(arena, bytes, &end)) {
        arena->overflowed = true;
        return NULL;
    }
    char *piece = arena->base == NULL ? NULL : arena->base + arena->used;
    arena->used = end;
    if (end > arena->peak) arena->peak = end;
    return piece;
}

void kl_arena_rewind(kl_arena *arena, size_t mark)
{
    if (mark < arena->used) arena->used = mark;
}
