/*
 * mla.h -- written in the words of vec_*.h; included by variant_*.c only.
 */
#ifndef KL_CPU_SIMD_MLA_H
#define KL_CPU_SIMD_MLA_H

#include "cpu/mla_kernels.h"

#define KL_MLA_KERNELS                                                                        \
    {                                                                                          \
        NULL                                                                                   \
    }

#endif
