/*
 * memory.h -- every allocation of the C core, and arithmetic on sizes that cannot wrap.
 *
 * Built with -DKL_FAULT_INJECTION, kl_fault_arm(k) makes the k-th allocation from now on fail
 * (k >= 1; 0 disarms), so that a test can fail each one in turn.
 */
#ifndef KL_BASE_MEMORY_H
#define KL_BASE_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *kl_malloc(size_t bytes);                /* NULL on failure; bytes 0 gives a block too */
void *kl_calloc(size_t count, size_t bytes);  /* checks the product                          */
void *kl_realloc(void *ptr, size_t bytes);
void *kl_aligned_alloc(size_t bytes);         /* 64-byte aligned; large blocks may be lazy    */
void kl_free(void *ptr);                      /* any of the above; NULL is fine               */

#ifdef KL_FAULT_INJECTION
void kl_fault_arm(int64_t k);
int64_t kl_fault_count(void); /* allocations since the last kl_fault_arm() */
#endif

static inline bool kl_mul_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_mul_overflow(a, b, out);
}

static inline bool kl_add_size(size_t a, size_t b, size_t *out)
{
    return !__builtin_add_overflow(a, b, out);
}

static inline int64_t kl_min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline size_t kl_align_up(size_t bytes, size_t to)
{
    return (bytes + to - 1) / to * to;
}

#endif
