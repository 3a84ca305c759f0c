/*
 * latents.h -- what a token leaves in a page of 8-bit latents, in a little more than half the
 * bytes of bf16.
 *
 * A row has three parts, each padded to a multiple of 16 bytes:
 *
 *     codes    one byte for each of the `rank` channels: an e4m3 number q (no infinities, at most
 *              448 either way)
 *     rope     the other channels as bf16: all heads take their scores from them, unweighted
 *     scales   f32, one for each 128 codes: a channel is q * scale
 *
 * A scale is the smallest power of two, not below 2^-100, with max|c| <= 448 scale, and q is c /
 * scale rounded to nearest, ties to even. So q * scale is exactly a bf16, and every kernel sees
 * the same latents. A group that is not finite, or whose largest is beyond 448 * 128, has a scale
 * of NaN, and so reads as NaN.
 */
#ifndef KL_BASE_LATENTS_H
#define KL_BASE_LATENTS_H

#include "base/tensor.h"

#include <stdint.h>
#include <string.h>

/* Compiled for the device too where this is CUDA, so that the format stands here alone. */
#ifdef __CUDACC__
#    define KL_LATENTS_INLINE static inline __host__ __device__
#    define KL_LATENTS_CONST  static constexpr __host__ __device__
#else
#    define KL_LATENTS_INLINE static inline
#    define KL_LATENTS_CONST  static inline
#endif

#define KL_LATENTS_GROUP 128
#define KL_LATENTS_ALIGN 16 /* of a row, and so of all pages */

/* How a model keeps latents. */
typedef enum { KL_LATENTS_ACT, KL_LATENTS_FP8, KL_N_LATENTS } kl_latents;

typedef struct {
    int64_t rank, rope;         /* channels                 */
    int64_t rope_at, scales_at; /* bytes of a row before    */
    int64_t row_bytes;
} kl_latents_row;

/* Whether pages hold 8-bit rows; else rows of act. */
static inline bool kl_latents_are_packed(const kl_tensor *pages)
{
    return pages->dtype == KL_U8;
}

/* Wraps on absurd shapes, which no tensor has. */
KL_LATENTS_CONST kl_latents_row kl_latents_row_of(int64_t rank, int64_t rope)
{
    const int64_t groups = (rank + KL_LATENTS_GROUP - 1) / KL_LATENTS_GROUP;
    kl_latents_row row = {rank, rope, 0, 0, 0};
    row.rope_at = (rank + 15) / 16 * 16;
    row.scales_at = row.rope_at + (2 * rope + 15) / 16 * 16;
    row.row_bytes = row.scales_at + (4 * groups + 15) / 16 * 16;
    return row;
}

KL_LATENTS_INLINE uint32_t kl_latents_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

KL_LATENTS_INLINE float kl_latents_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* The scale of a group whose largest magnitude is `most` (NaN where one is). */
KL_LATENTS_INLINE float kl_latents_scale(float most)
{
    const uint32_t bits = kl_latents_bits(most);
    int exponent = (int)(bits >> 23) - 127 - 8; /* 448 = 1.75 * 2^8 */
    if ((bits & 0x7fffffu) > 0x600000u) exponent++;
    if (!(most <= 448 * 128.0f)) return kl_latents_float(0x7fc00000u);
    if (exponent < -100) exponent = -100;
    return kl_latents_float((uint32_t)(exponent + 127) << 23);
}

/* The code of x, |x| <= 448: below 2^-6 a multiple of 2^-9, else four bits of the fraction. What
 * a NaN gets means nothing, for its scale is one too. */
KL_LATENTS_INLINE uint8_t kl_latents_code(float x)
{
    const uint32_t bits = kl_latents_bits(x), size = bits & 0x7fffffffu;
    const uint32_t sign = bits >> 24 & 0x80u;
    if (size < 0x3c800000u) { /* 2^14 has steps of 2^-9 */
        const float raised = kl_latents_float(size) + 0x1p14f;
        return (uint8_t)(sign | (kl_latents_bits(raised) & 0x7fu));
    }
    const uint32_t rounded = size + 0x7ffffu + (size >> 20 & 1u);
    return (uint8_t)(sign | (((rounded >> 20) - (120u << 3)) & 0x7fu));
}

KL_LATENTS_INLINE float kl_latents_value(uint8_t code)
{
    const uint32_t size = code & 0x7fu, sign = (uint32_t)(code & 0x80u) << 24;
    const float normal = kl_latents_float((size << 20) + (120u << 23));
    const float small = (float)(int)size * 0x1p-9f;
    return kl_latents_float(kl_latents_bits(size < 8 ? small : normal) | sign);
}

#endif
