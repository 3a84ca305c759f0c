/*
 * variant_avx2.c -- the CPU kernels for AVX2 with FMA.
 */
#include "cpu/simd/vec_avx2.h"

#include "cpu/kernels.h"

#include "cpu/simd/kda.h"
#include "cpu/simd/logits.h"
#include "cpu/simd/mla.h"
#include "cpu/simd/product.h"
#include "cpu/simd/rows.h"

const kl_cpu_kernels kl_kernels_avx2 = {
    .name = "avx2",
    .lanes = VL,
    .product = KL_PRODUCT_KERNELS,
    .kda = KL_KDA_KERNELS,
    .mla = KL_MLA_KERNELS,
    .rows = KL_ROWS_KERNELS,
    .logits = KL_LOGITS_KERNELS,
};
