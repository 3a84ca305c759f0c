/*
 * vec_scalar.h -- the vector vocabulary with one lane, in plain C.
 *
 * The three vec_*.h files define the same names; a kernel in simd/<stem>.h is written once in
 * these words and compiled once for each instruction set by simd/variant_<name>.c.
 *
 *   vf, VL                      a vector of VL floats
 *   v_load_n, v_store_n         the first n lanes (0 <= n <= VL), the rest reads as 0
 *   *_bf16                      memory holds bfloat16 (stores round to nearest even)
 *   v_fma(a, b, c)              a * b + c, one rounding
 *   v_sum, v_hmax               over the lanes, by a fixed tree
 *   v_transpose(rows)           rows[i] lane j <-> rows[j] lane i, of VL vectors
 *   v_select_lt(a, b, y, n)     a < b ? y : n; a NaN selects n
 *   v_sum4                      four v_sum() at once, bit for bit
 *   v_load_i4                   a group of int4 (base/weight.h) times its scale, in order
 *   v_dot_bf16                  in builds with KL_VEC_BF16_DOT only: acc + pairs of products
 *   v_exp                       e^x to 2 ulp; 0 below -87.3, inf above 88.7, NaN stays NaN
 */
#ifndef KL_CPU_VEC_H
#define KL_CPU_VEC_H

#include "base/bf16.h"

#include <math.h>
#include <stdint.h>

#define VL 1
typedef float vf;

static inline vf v_zero(void)
{
    return 0.0f;
}
static inline vf v_set1(float x)
{
    return x;
}
static inline vf v_set1_bf16(const uint16_t *p) { return kl_bf16_to_f32(*p); }
static inline vf v_load(const float *p)
{
    return *p;
}
static inline vf v_load_n(const float *p, int n)
{
    return n > 0 ? *p : 0.0f;
}
static inline void v_store(float *p, vf a)
{
    *p = a;
}
static inline void v_store_n(float *p, vf a, int n)
{
    if (n > 0) *p = a;
}
static inline vf v_load_bf16(const uint16_t *p)
{
    return kl_bf16_to_f32(*p);
}
static inline vf v_load_bf16_n(const uint16_t *p, int n)
{
    return n > 0 ? kl_bf16_to_f32(*p) : 0.0f;
}
static inline void v_store_bf16(uint16_t *p, vf a)
{
    *p = kl_f32_to_bf16(a);
}
static inline void v_store_bf16_n(uint16_t *p, vf a, int n)
{
    if (n > 0) *p = kl_f32_to_bf16(a);
}
static inline vf v_load_i8(const int8_t *p)
{
    return (float)*p;
}
static inline void v_load_i4(const uint8_t *p, vf scale, vf *w)
{
    for (int i = 0; i < 16; i++) {
        w[i] = (float)((p[i] & 15) - 8) * scale;
        w[i + 16] = (float)((p[i] >> 4) - 8) * scale;
    }
}
static inline vf v_add(vf a, vf b)
{
    return a + b;
}
static inline vf v_sub(vf a, vf b)
{
    return a - b;
}
static inline vf v_mul(vf a, vf b)
{
    return a * b;
}
static inline vf v_div(vf a, vf b)
{
    return a / b;
}
static inline vf v_fma(vf a, vf b, vf c)
{
    return fmaf(a, b, c);
}
static inline vf v_max(vf a, vf b)
{
    return a > b ? a : b;
}
static inline vf v_min(vf a, vf b)
{
    return a < b ? a : b;
}
static inline vf v_sqrt(vf a)
{
    return sqrtf(a);
}
static inline vf v_select_lt(vf a, vf b, vf yes, vf no)
{
    return a < b ? yes : no;
}
static inline void v_transpose(vf *rows)
{
    (void)rows; /* one by one */
}
static inline float v_sum(vf a)
{
    return a;
}
static inline float v_hmax(vf a)
{
    return a;
}
static inline void v_sum4(vf a, vf b, vf c, vf d, float *out)
{
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}
static inline vf v_exp(vf x)
{
    return x < -87.3f ? 0.0f : expf(x);
}

#endif
