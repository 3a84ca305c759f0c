/*
 * act.h -- rows of activations: f32 or bf16 in memory, f32 in registers. Written in the words
 * of vec_*.h; included by the other files of this folder only.
 */
#ifndef KL_CPU_SIMD_ACT_H
#define KL_CPU_SIMD_ACT_H

#include "base/tensor.h"

/* Lanes of a vector at i that lie within n elements. */
static inline int v_left(int64_t i, int64_t n)
{
    if (n - i >= VL) return VL;
    return n > i ? (int)(n - i) : 0;
}

/* Elements i .. i + n - 1 of a row, 0 <= n <= VL. */
static inline vf v_load_act(const void *row, kl_dtype dtype, int64_t i, int n)
{
    if (dtype == KL_BF16) {
        const uint16_t *p = (const uint16_t *)row + i;
        return n == VL ? v_load_bf16(p) : v_load_bf16_n(p, n);
    }
    const float *p = (const float *)row + i;
    return n == VL ? v_load(p) : v_load_n(p, n);
}

static inline void v_store_act(void *row, kl_dtype dtype, int64_t i, vf a, int n)
{
    if (dtype == KL_BF16) {
        uint16_t *p = (uint16_t *)row + i;
        if (n == VL)
            v_store_bf16(p, a);
        else
            v_store_bf16_n(p, a, n);
        return;
    }
    float *p = (float *)row + i;
    if (n == VL)
        v_store(p, a);
    else
        v_store_n(p, a, n);
}

#endif
