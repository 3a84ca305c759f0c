/*
 * rows.h -- written in the words of vec_*.h; included by variant_*.c only.
 */
#ifndef KL_CPU_SIMD_ROWS_H
#define KL_CPU_SIMD_ROWS_H

#include "cpu/rows_kernels.h"

#define KL_ROWS_KERNELS                                                                        \
    {                                                                                          \
        NULL                                                                                   \
    }

#endif
