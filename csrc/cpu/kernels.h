/*
 * kernels.h -- the arithmetic of the CPU backend, one table for each instruction set.
 *
 * Every simd/variant_<name>.c compiles the same simd/<stem>.h files against another vec_*.h
 * and flags, and fills one kl_cpu_kernels. Choosing a table at run time is the only dispatch.
 * An operation's file (cpu/<stem>.c) cuts the work into tasks and calls these.
 */
#ifndef KL_CPU_KERNELS_H
#define KL_CPU_KERNELS_H

#include "base/error.h"
#include "cpu/kda_kernels.h"
#include "cpu/logits_kernels.h"
#include "cpu/mla_kernels.h"
#include "cpu/product_kernels.h"
#include "cpu/rows_kernels.h"

typedef struct {
    const char *name; /* "scalar", "avx2", "avx512", "avx512bf16" */
    int lanes;        /* floats of a vector */
    kl_product_kernels product;
    kl_kda_kernels kda;
    kl_mla_kernels mla;
    kl_rows_kernels rows;
    kl_logits_kernels logits;
} kl_cpu_kernels;

extern const kl_cpu_kernels kl_kernels_scalar;
#if defined(__x86_64__)
extern const kl_cpu_kernels kl_kernels_avx2, kl_kernels_avx512, kl_kernels_avx512bf16;
#endif

/* The table called `wanted`, or with NULL the widest that this CPU and its operating system
 * can run. One name is one table, so that a test can ask for each. */
kl_status kl_cpu_kernels_choose(const char *wanted, const kl_cpu_kernels **out, kl_error *err);

#endif
