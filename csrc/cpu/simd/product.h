/*
 * product.h -- written in the words of vec_*.h; included by variant_*.c only.
 */
#ifndef KL_CPU_SIMD_PRODUCT_H
#define KL_CPU_SIMD_PRODUCT_H

#include "cpu/product_kernels.h"

#define KL_PRODUCT_KERNELS                                                                        \
    {                                                                                          \
        NULL                                                                                   \
    }

#endif
