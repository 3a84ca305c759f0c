/*
 * mla_kernels.h -- the kernels of simd/mla.h, as each instruction set fills them in.
 */
#ifndef KL_CPU_MLA_KERNELS_H
#define KL_CPU_MLA_KERNELS_H

#include "base/tensor.h"

typedef struct {
    void (*todo)(void);
} kl_mla_kernels;

#endif
