/*
 * rows_kernels.h -- the kernels of simd/rows.h, as each instruction set fills them in.
 */
#ifndef KL_CPU_ROWS_KERNELS_H
#define KL_CPU_ROWS_KERNELS_H

#include "base/tensor.h"

typedef struct {
    void (*todo)(void);
} kl_rows_kernels;

#endif
