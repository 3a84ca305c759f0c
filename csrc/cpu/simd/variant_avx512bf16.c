/*
 * variant_avx512bf16.c -- the CPU kernels for AVX-512 with bfloat16 dot products.
 */
#define KL_VEC_BF16_DOT 1
#include "cpu/simd/vec_avx512.h"

#include "cpu/kernels.h"

#include "cpu/simd/kda.h"
#include "cpu/simd/logits.h"
#include "cpu/simd/mla.h"
#include "cpu/simd/product.h"
#include "cpu/simd/rows.h"

const kl_cpu_kernels kl_kernels_avx512bf16 = {
    .name = "avx512bf16",
    .lanes = VL,
    .product = KL_PRODUCT_KERNELS,
    .kda = KL_KDA_KERNELS,
    .mla = KL_MLA_KERNELS,
    .rows = KL_ROWS_KERNELS,
    .logits = KL_LOGITS_KERNELS,
};
