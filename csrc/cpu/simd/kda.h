/*
 * kda.h -- written in the words of vec_*.h; included by variant_*.c only.
 */
#ifndef KL_CPU_SIMD_KDA_H
#define KL_CPU_SIMD_KDA_H

#include "cpu/kda_kernels.h"

#define KL_KDA_KERNELS                                                                        \
    {                                                                                          \
        NULL                                                                                   \
    }

#endif
