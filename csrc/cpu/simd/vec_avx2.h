/*
 * vec_avx2.h -- the vector vocabulary of vec_scalar.h for AVX2 with FMA.
 */
#ifndef KL_CPU_VEC_H
#define KL_CPU_VEC_H

#include "base/bf16.h"

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define VL 8
typedef __m256 vf;

static inline __m256i v_mask(int n)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
}

static inline vf v_zero(void)
{
    return _mm256_setzero_ps();
}
static inline vf v_set1(float x)
{
    return _mm256_set1_ps(x);
}
static inline vf v_set1_bf16(const uint16_t *p)
{
    return v_set1(kl_bf16_to_f32(*p));
}
static inline vf v_load(const float *p)
{
    return _mm256_loadu_ps(p);
}
static inline vf v_load_n(const float *p, int n)
{
    return _mm256_maskload_ps(p, v_mask(n));
}
static inline void v_store(float *p, vf a)
{
    _mm256_storeu_ps(p, a);
}
static inline void v_store_n(float *p, vf a, int n)
{
    _mm256_maskstore_ps(p, v_mask(n), a);
}

static inline vf v_load_bf16(const uint16_t *p)
{
    const __m128i h = _mm_loadu_si128((const __m128i *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline vf v_load_bf16_n(const uint16_t *p, int n)
{
    uint16_t lanes[8] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return v_load_bf16(lanes);
}
static inline void v_store_bf16(uint16_t *p, vf a)
{
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    const __m128i lo = _mm256_castsi256_si128(h), hi = _mm256_extracti128_si256(h, 1);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(lo, hi));
}
static inline void v_store_bf16_n(uint16_t *p, vf a, int n)
{
    uint16_t lanes[8];
    v_store_bf16(lanes, a);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
static inline vf v_load_i8(const int8_t *p)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
/* (q + 8) scale - 8 scale in one rounding of a result that needs none. */
static inline void v_load_i4(const uint8_t *p, vf scale, vf *w)
{
    const __m256i low = _mm256_set1_epi32(15);
    const vf offset = _mm256_mul_ps(_mm256_set1_ps(-8.0f), scale);
    for (int i = 0; i < 2; i++) {
        const __m128i eight = _mm_loadl_epi64((const __m128i *)(p + 8 * i));
        const __m256i bytes = _mm256_cvtepu8_epi32(eight);
        const vf q_low = _mm256_cvtepi32_ps(_mm256_and_si256(bytes, low));
        const vf q_high = _mm256_cvtepi32_ps(_mm256_srli_epi32(bytes, 4));
        w[i] = _mm256_fmadd_ps(q_low, scale, offset);
        w[i + 2] = _mm256_fmadd_ps(q_high, scale, offset);
    }
}

static inline vf v_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}
static inline vf v_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}
static inline vf v_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}
static inline vf v_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}
static inline vf v_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}
static inline vf v_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}
static inline vf v_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}
static inline vf v_sqrt(vf a)
{
    return _mm256_sqrt_ps(a);
}
static inline vf v_select_lt(vf a, vf b, vf yes, vf no)
{
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

static inline void v_transpose(vf *rows)
{
    vf pair[8], quad[8]; /* lane groups of 2, then 4 rows; the halves are crossed last */
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            quad[i + 2 * j] = _mm256_shuffle_ps(pair[i + j], pair[i + 2 + j], 0x44);
            quad[i + 2 * j + 1] = _mm256_shuffle_ps(pair[i + j], pair[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x20);
        rows[4 + i] = _mm256_permute2f128_ps(quad[i], quad[4 + i], 0x31);
    }
}

static inline float v_sum(vf a)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline void v_sum4(vf a, vf b, vf c, vf d, float *out)
{
    const vf ab =
        _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    const vf cd =
        _mm256_add_ps(_mm256_permute2f128_ps(c, d, 0x20), _mm256_permute2f128_ps(c, d, 0x31));
    const vf acbd =
        _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    const vf s = _mm256_add_ps(acbd, _mm256_movehdup_ps(acbd)); /* a . c . | b . d . */
    const __m128 ac = _mm256_castps256_ps128(s), bd = _mm256_extractf128_ps(s, 1);
    _mm_storeu_ps(out, _mm_blend_ps(ac, _mm_moveldup_ps(bd), 0xa));
}
static inline float v_hmax(vf a)
{
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* e^x = 2^n e^r with n = round(x / ln 2): Taylor in r, |r| <= ln(2)/2, remainder below 1e-8.
 * 2^n is applied in two factors, for n = 128 is no exponent of a float. */
static inline vf v_exp(vf x)
{
    const vf low = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LT_OQ);
    const vf high = _mm256_cmp_ps(x, _mm256_set1_ps(88.7228394f), _CMP_GT_OQ);
    const vf n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), 8);
    vf r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    vf p = _mm256_set1_ps(1.0f / 5040.0f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    const __m256i e = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(e, 1), bias = _mm256_set1_epi32(127);
    const __m256i rest = _mm256_sub_epi32(e, half);
    p = _mm256_mul_ps(p,
                      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    p = _mm256_mul_ps(p,
                      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
    p = _mm256_blendv_ps(p, _mm256_set1_ps(__builtin_inff()), high);
    return _mm256_blendv_ps(p, _mm256_setzero_ps(), low);
}

#endif
