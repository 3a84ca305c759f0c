/*
 * vec_avx512.h -- the vector vocabulary of vec_scalar.h for AVX-512 (F, BW, DQ, VL).
 */
#ifndef KL_CPU_VEC_H
#define KL_CPU_VEC_H

#include "base/bf16.h"

#include <immintrin.h>
#include <stdint.h>

#define VL 16
typedef __m512 vf;

static inline __mmask16 v_mask(int n)
{
    return (__mmask16)((1u << n) - 1u);
}

static inline vf v_zero(void)
{
    return _mm512_setzero_ps();
}
static inline vf v_set1(float x)
{
    return _mm512_set1_ps(x);
}
static inline vf v_set1_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi16((short)*p), 16));
}
static inline vf v_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
static inline vf v_load_n(const float *p, int n)
{
    return _mm512_maskz_loadu_ps(v_mask(n), p);
}
static inline void v_store(float *p, vf a)
{
    _mm512_storeu_ps(p, a);
}
static inline void v_store_n(float *p, vf a, int n)
{
    _mm512_mask_storeu_ps(p, v_mask(n), a);
}

static inline vf v_widen_bf16(__m256i h)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static inline vf v_load_bf16(const uint16_t *p)
{
    return v_widen_bf16(_mm256_loadu_si256((const __m256i *)p));
}
static inline vf v_load_bf16_n(const uint16_t *p, int n)
{
    return v_widen_bf16(_mm256_maskz_loadu_epi16(v_mask(n), p));
}
static inline __m256i v_narrow_bf16(vf a)
{
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16));
}
static inline void v_store_bf16(uint16_t *p, vf a)
{
    _mm256_storeu_si256((__m256i *)p, v_narrow_bf16(a));
}
static inline void v_store_bf16_n(uint16_t *p, vf a, int n)
{
    _mm256_mask_storeu_epi16(p, v_mask(n), v_narrow_bf16(a));
}
static inline vf v_load_i8(const int8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
/* A permutation looks the 32 values up in a table of the 16 there are, scaled beforehand; it
 * reads the low four bits of an index only. */
static inline void v_load_i4(const uint8_t *p, vf scale, vf *w)
{
    const vf q = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const vf table = _mm512_mul_ps(q, scale);
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    w[0] = _mm512_permutexvar_ps(bytes, table);
    w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
}

#if defined(KL_VEC_BF16_DOT)
/* acc[i] + a[2i+1] b[2i+1] + a[2i] b[2i] over 2 VL bfloat16 values; subnormals count as 0. */
typedef __m512i vh;
static inline vh v_load_h(const uint16_t *p)
{
    return _mm512_loadu_si512(p);
}
static inline vh v_load_h_n(const uint16_t *p, int n)
{
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1ull), p);
}
static inline void v_store_h(uint16_t *p, vh a)
{
    _mm512_storeu_si512(p, a);
}
static inline vf v_dot_bf16(vf acc, vh a, vh b)
{
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
#endif

static inline vf v_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
static inline vf v_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}
static inline vf v_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
static inline vf v_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}
static inline vf v_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}
static inline vf v_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
static inline vf v_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}
static inline vf v_sqrt(vf a)
{
    return _mm512_sqrt_ps(a);
}
static inline vf v_select_lt(vf a, vf b, vf yes, vf no)
{
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
}

static inline void v_transpose(vf *rows)
{
    vf pair[16], quad[16]; /* lane groups of 2, then 4 rows; the quarters are crossed last */
    for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
        pair[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            quad[i + 2 * j] = _mm512_shuffle_ps(pair[i + j], pair[i + 2 + j], 0x44);
            quad[i + 2 * j + 1] = _mm512_shuffle_ps(pair[i + j], pair[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        const vf a = _mm512_shuffle_f32x4(quad[i], quad[4 + i], 0x88);
        const vf b = _mm512_shuffle_f32x4(quad[i], quad[4 + i], 0xdd);
        const vf c = _mm512_shuffle_f32x4(quad[8 + i], quad[12 + i], 0x88);
        const vf d = _mm512_shuffle_f32x4(quad[8 + i], quad[12 + i], 0xdd);
        rows[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        rows[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
        rows[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
        rows[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

static inline float v_sum(vf a)
{
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline void v_sum4(vf a, vf b, vf c, vf d, float *out)
{
    const vf ab =
        _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const vf cd =
        _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    vf s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88),
                         _mm512_shuffle_f32x4(ab, cd, 0xdd)); /* one input a 128-bit lane */
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x0e));
    s = _mm512_add_ps(s, _mm512_movehdup_ps(s));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s)));
}
static inline float v_hmax(vf a)
{
    return _mm512_reduce_max_ps(a);
}

/* e^x = 2^n e^r with n = round(x / ln 2): Taylor in r, |r| <= ln(2)/2, remainder below 1e-8. */
static inline vf v_exp(vf x)
{
    const __mmask16 low = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_LT_OQ);
    const vf n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    vf r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    vf p = _mm512_set1_ps(1.0f / 5040.0f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    const vf over = _mm512_set1_ps(88.7228394f); /* above it 2^n e^r is infinite */
    const __mmask16 high = _mm512_cmp_ps_mask(x, over, _CMP_GT_OQ);
    p = _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), high, _mm512_set1_ps(__builtin_inff()));
    return _mm512_mask_mov_ps(p, low, _mm512_setzero_ps());
}

#endif
