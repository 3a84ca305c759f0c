/*
 * variant_avx512.c -- the CPU kernels for AVX-512 (F, BW, DQ, VL).
 */
#include "cpu/simd/vec_avx512.h"

#include "cpu/kernels.h"

#include "cpu/simd/kda.h"
#include "cpu/simd/logits.h"
#include "cpu/simd/mla.h"
#include "cpu/simd/product.h"
#include "cpu/simd/rows.h"

const kl_cpu_kernels kl_kernels_avx512 = {
    .name = "avx512",
    .lanes = VL,
    .product = KL_PRODUCT_KERNELS,
    .kda = KL_KDA_KERNELS,
    .mla = KL_MLA_KERNELS,
    .rows = KL_ROWS_KERNELS,
    .logits = KL_LOGITS_KERNELS,
};
