/*
 * bf16.h -- bfloat16 as the upper half of a float32; rounding to nearest, ties to even.
 */
#ifndef KL_BASE_BF16_H
#define KL_BASE_BF16_H

#include <stdint.h>
#include <string.h>

static inline float kl_bf16_to_f32(uint16_t b)
{
    const uint32_t bits = (uint32_t)b << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline uint16_t kl_f32_to_bf16(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u); /* NaN */
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

#endif
