/*
 * rng.h -- counter-based random numbers: number i of a seed, without state, the same on every
 * device and whatever the order they are asked for.
 *
 * Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), key =
 * seed, counter = index.
 */
#ifndef KL_BASE_RNG_H
#define KL_BASE_RNG_H

#include <stdint.h>

/* Compiled for the device too where this is CUDA, so that the constants stand here alone. */
#ifdef __CUDACC__
#    define KL_RNG_INLINE static inline __host__ __device__
#else
#    define KL_RNG_INLINE static inline
#endif

KL_RNG_INLINE void kl_philox(uint64_t seed, uint64_t index, uint32_t out[4])
{
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* A double in [0, 1) with 53 random bits. */
KL_RNG_INLINE double kl_rng_uniform(uint64_t seed, uint64_t index)
{
    uint32_t r[4];
    kl_philox(seed, index, r);
    return (double)(((uint64_t)r[0] << 32 | r[1]) >> 11) * 0x1p-53;
}

#endif
