/*
 * test_arena.c -- measuring and handing out take the same steps; nothing fits that does not.
 */
#include "test.h"

#include "base/arena.h"

#include <stdint.h>

static _Alignas(64) char block[4096];

static void measure_equals_layout(void)
{
    static const size_t sizes[] = {0, 1, 63, 64, 65, 1000, 7};
    kl_arena measure, layout;
    kl_arena_init(&measure, NULL, 0);
    kl_arena_init(&layout, block, sizeof block);
    size_t last_end = 0;
    for (int i = 0; i < 7; i++) {
        EXPECT(kl_arena_take(&measure, sizes[i]) == NULL);
        const char *piece = kl_arena_take(&layout, sizes[i]);
        EXPECT(piece != NULL && (uintptr_t)piece % 64 == 0);
        EXPECT((size_t)(piece - block) == last_end);
        EXPECT(layout.used >= last_end + sizes[i] && layout.used % 64 == 0);
        EXPECT(layout.used == measure.used);
        last_end = layout.used;
    }
    EXPECT(!measure.overflowed && !layout.overflowed);
    EXPECT(measure.used == 64 * 4 + 128 + 1024);
    kl_arena exact;
    kl_arena_init(&exact, block, measure.used);
    for (int i = 0; i < 7; i++) EXPECT(kl_arena_take(&exact, sizes[i]) != NULL);
    EXPECT(!exact.overflowed);
}

static void rewind_keeps_the_peak(void)
{
    kl_arena a;
    kl_arena_init(&a, block, sizeof block);
    const char *first = kl_arena_take(&a, 100);
    const size_t mark = a.used;
    const char *second = kl_arena_take(&a, 1000);
    kl_arena_rewind(&a, mark);
    EXPECT(a.used == mark && a.peak == mark + 1024);
    EXPECT(kl_arena_take(&a, 10) == second && second != first);
    kl_arena_rewind(&a, a.used + 64); /* not a mark of the past */
    EXPECT(a.used == mark + 64);
}

static void refuses_what_does_not_fit(void)
{
    kl_arena a;
    kl_arena_init(&a, block, 128);
    EXPECT(kl_arena_take(&a, 129) == NULL && a.overflowed && a.used == 0);
    EXPECT(kl_arena_take(&a, 128) == block);
    kl_arena_init(&a, block, 100); /* a last piece is padded too, and must fit so */
    EXPECT(kl_arena_take(&a, 100) == NULL && a.overflowed);
}

static void sizes_do_not_wrap(void)
{
    kl_arena a;
    kl_arena_init(&a, NULL, 0);
    EXPECT(kl_arena_take(&a, SIZE_MAX) == NULL && a.overflowed && a.used == 0);
    kl_arena_init(&a, NULL, 0);
    kl_arena_take(&a, SIZE_MAX / 2);
    EXPECT(!a.overflowed);
    kl_arena_take(&a, SIZE_MAX / 2);
    EXPECT(a.overflowed);
    kl_arena_init(&a, block, sizeof block);
    EXPECT(kl_arena_take(&a, SIZE_MAX - 10) == NULL && a.overflowed);
}

int main(void)
{
    RUN(measure_equals_layout);
    RUN(rewind_keeps_the_peak);
    RUN(refuses_what_does_not_fit);
    RUN(sizes_do_not_wrap);
    return test_failures != 0;
}
