/*
 * special.h -- functions made of the words of vec_*.h alone; included by the other files of
 * this folder only. A NaN stays a NaN in all of them.
 */
#ifndef KL_CPU_SIMD_SPECIAL_H
#define KL_CPU_SIMD_SPECIAL_H

static inline vf v_neg(vf x)
{
    return v_sub(v_zero(), x);
}
static inline vf v_minus_abs(vf x)
{
    return v_min(x, v_neg(x));
}

/* 1 / (1 + e^-x), from an exponential that cannot overflow. */
static inline vf v_sigmoid(vf x)
{
    const vf one = v_set1(1.0f);
    const vf e = v_exp(v_minus_abs(x));
    return v_div(v_select_lt(x, v_zero(), e, one), v_add(one, e));
}

/* log(1 + x) for 0 <= x <= 1, relative error below 3e-7: 2 atanh(s) with s = x / (2 + x) <= 1/3,
 * whose series loses nothing for small x. */
static inline vf v_log1p_unit(vf x)
{
    const vf s = v_div(x, v_add(x, v_set1(2.0f)));
    const vf y = v_mul(s, s);
    vf p = v_set1(1.0f / 15.0f);
    p = v_fma(p, y, v_set1(1.0f / 13.0f));
    p = v_fma(p, y, v_set1(1.0f / 11.0f));
    p = v_fma(p, y, v_set1(1.0f / 9.0f));
    p = v_fma(p, y, v_set1(1.0f / 7.0f));
    p = v_fma(p, y, v_set1(1.0f / 5.0f));
    p = v_fma(p, y, v_set1(1.0f / 3.0f));
    const vf twice = v_add(s, s);
    return v_fma(v_mul(p, y), twice, twice);
}

/* e^x - 1 for |x| <= 0.35: Taylor, remainder below 1e-8 of x. */
static inline vf v_expm1_near(vf x)
{
    vf p = v_set1(1.0f / 5040.0f);
    p = v_fma(p, x, v_set1(1.0f / 720.0f));
    p = v_fma(p, x, v_set1(1.0f / 120.0f));
    p = v_fma(p, x, v_set1(1.0f / 24.0f));
    p = v_fma(p, x, v_set1(1.0f / 6.0f));
    p = v_fma(p, x, v_set1(0.5f));
    return v_fma(v_mul(p, x), x, x);
}

#endif
