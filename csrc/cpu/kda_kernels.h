/*
 * kda_kernels.h -- the kernels of simd/kda.h, as each instruction set fills them in.
 */
#ifndef KL_CPU_KDA_KERNELS_H
#define KL_CPU_KDA_KERNELS_H

#include "base/tensor.h"

typedef struct {
    void (*todo)(void);
} kl_kda_kernels;

#endif
