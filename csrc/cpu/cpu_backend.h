/*
 * cpu_backend.h -- the CPU backend's own struct, its table and its operations.
 */
#ifndef KL_CPU_BACKEND_H
#define KL_CPU_BACKEND_H

#include "backend/backend.h"
#include "base/threads.h"
#include "cpu/kernels.h"

typedef struct {
    kl_backend base;
    kl_pool *pool;
    const kl_cpu_kernels *kernels;
} kl_cpu;

extern const kl_backend_vtbl kl_cpu_vtbl;

/* The peaks of kl_linear, of all rows or of one. */
void kl_cpu_find_peaks(const kl_cpu *cpu, const kl_tensor *logits, float *peaks);
void kl_cpu_row_peaks(const kl_logits_kernels *kernels, const float *z, int64_t n,
                      float *peaks);

#define KL_DECLARE(op)                                                                         \
    kl_status kl_cpu_##op(kl_backend *be, const kl_##op *a, kl_error *err);                    \
    size_t kl_cpu_##op##_workspace(kl_backend *be, const kl_##op *a);
KL_OPS(KL_DECLARE)
#undef KL_DECLARE

/* What the products read: all but fp8, for which processors have no arithmetic. */
#define KL_CPU_FORMATS (1u << KL_W_F32 | 1u << KL_W_BF16 | 1u << KL_W_INT8 | 1u << KL_W_INT4)

/* For an operation that works in its operands alone; in its file, without a semicolon. */
#define KL_CPU_NO_WORKSPACE(op)                                                                \
    size_t kl_cpu_##op##_workspace(kl_backend *be, const kl_##op *a)                           \
    {                                                                                          \
        (void)be, (void)a;                                                                     \
        return 0;                                                                              \
    }

#endif
