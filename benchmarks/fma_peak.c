/*
 * fma_peak.c -- multiply-adds on registers alone: the arithmetic that one core can do at most,
 * which a kernel bound by the FMA units is measured against.
 *
 * Compiled by bench_kda.py for the machine it runs on (-O3 -march=native). 24 independent
 * vectors, so that the units never wait for a result.
 */
#include <stdint.h>
#if defined(__AVX512BF16__)
#    include <immintrin.h>
#endif

#if defined(__AVX512F__)
#    define LANES 16
#elif defined(__AVX__)
#    define LANES 8
#else
#    define LANES 4
#endif
#define VECTORS (LANES == 16 ? 24 : 12) /* of 32 or 16 registers */

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));

/* Returns the flops done, two a multiply-add. */
double fma_peak(int64_t rounds, float *out)
{
    vec acc[VECTORS], a = {0}, b = {0};
    a += 0.999f;
    b += 0.001f;
    for (int i = 0; i < VECTORS; i++) acc[i] = b * (float)i;
    for (int64_t n = 0; n < rounds; n++) {
#pragma GCC unroll 24
        for (int i = 0; i < VECTORS; i++) acc[i] = acc[i] * a + b;
    }
    vec sum = acc[0];
    for (int i = 1; i < VECTORS; i++) sum += acc[i];
    *out = sum[0];
    return 2.0 * (double)rounds * VECTORS * LANES;
}

/* The same for pairs of bfloat16 added to a float; 0 where the CPU has no instruction for it. */
double bf16_peak(int64_t rounds, float *out)
{
    *out = 0.0f;
#if defined(__AVX512BF16__)
    __m512 acc[VECTORS];
    __m512i pairs = _mm512_set1_epi16(0x3f7f);
    for (int i = 0; i < VECTORS; i++) acc[i] = _mm512_set1_ps((float)i);
    for (int64_t n = 0; n < rounds; n++) {
#    pragma GCC unroll 24
        for (int i = 0; i < VECTORS; i++)
            acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)pairs, (__m512bh)pairs);
    }
    __m512 sum = acc[0];
    for (int i = 1; i < VECTORS; i++) sum = _mm512_add_ps(sum, acc[i]);
    *out = _mm512_cvtss_f32(sum);
    return 4.0 * (double)rounds * VECTORS * LANES;
#else
    return 0.0 * (double)rounds;
#endif
}
