/*
 * memory.c -- see memory.h.
 *
 * Everything comes from malloc's family, so that kl_free() needs no size and the sanitizers see
 * each block. malloc takes large blocks from mmap: their pages are zero and cost nothing until
 * touched.
 */
#include "base/memory.h"

#include <stdlib.h>
#include <sys/mman.h>

#define ALIGNMENT 64
#define HUGE_PAGE ((size_t)2 << 20)
#define HUGE_FROM ((size_t)4 << 20) /* below, rounding to huge pages would waste too much */

#ifdef KL_FAULT_INJECTION
#    include <stdatomic.h>

/* The one mutable global of the core, in test builds alone: allocations happen far below
 * whatever a test could pass a context through. */
static atomic_int_least64_t fault_at, fault_seen;

void kl_fault_arm(int64_t k)
{
    atomic_store(&fault_seen, 0);
    atomic_store(&fault_at, k);
}

int64_t kl_fault_count(void)
{
    return atomic_load(&fault_seen);
}

static bool fault_due(void)
{
    return atomic_fetch_add(&fault_seen, 1) + 1 == atomic_load(&fault_at);
}
#else
static bool fault_due(void)
{
    return false;
}
#endif

void *kl_malloc(size_t bytes)
{
    return fault_due() ? NULL : malloc(bytes == 0 ? 1 : bytes);
}

void *kl_calloc(size_t count, size_t bytes)
{
    if (fault_due()) return NULL;
    return count == 0 || bytes == 0 ? calloc(1, 1) : calloc(count, bytes);
}

void *kl_realloc(void *ptr, size_t bytes)
{
    return fault_due() ? NULL : realloc(ptr, bytes == 0 ? 1 : bytes);
}

void *kl_aligned_alloc(size_t bytes)
{
    void *ptr = NULL;
    const bool huge = bytes >= HUGE_FROM;
    if (fault_due()) return NULL;
    if (posix_memalign(&ptr, huge ? HUGE_PAGE : ALIGNMENT, bytes == 0 ? 1 : bytes) != 0)
        return NULL;
    /* Weights and states are streamed once a token: with 4 KiB pages the walk of the page
     * tables is a good part of the time. A kernel without huge pages refuses; that is fine. */
    if (huge) (void)madvise(ptr, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    return ptr;
}

void kl_free(void *ptr)
{
    free(ptr);
}
