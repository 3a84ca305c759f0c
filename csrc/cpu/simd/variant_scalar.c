/*
 * variant_scalar.c -- the CPU kernels for any machine, in plain C.
 */
#include "cpu/simd/vec_scalar.h"

#include "cpu/kernels.h"

#include "cpu/simd/kda.h"
#include "cpu/simd/logits.h"
#include "cpu/simd/mla.h"
#include "cpu/simd/product.h"
#include "cpu/simd/rows.h"

const kl_cpu_kernels kl_kernels_scalar = {
    .name = "scalar",
    .lanes = VL,
    .product = KL_PRODUCT_KERNELS,
    .kda = KL_KDA_KERNELS,
    .mla = KL_MLA_KERNELS,
    .rows = KL_ROWS_KERNELS,
    .logits = KL_LOGITS_KERNELS,
};
