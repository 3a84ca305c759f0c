/*
 * short_conv.cuh -- the convolution, with what kda_prefill needs of its results.
 */
#ifndef KL_CUDA_KERNELS_SHORT_CONV_H
#define KL_CUDA_KERNELS_SHORT_CONV_H

#include "../cuda_backend.h"

constexpr int KDA_UNIT_CHANNELS = 128;

/* The factors that bring each head's results to unit length, of the first `heads` heads of 128
 * channels: [T, heads]. */
struct short_conv_units {
    float *factors;
    int64_t heads;
};

/* Whether a thread takes 16 bytes of channels, which units need. */
bool short_conv_is_wide(const kl_short_conv *a);

/* units: for bf16; or {}. */
kl_status short_conv_with_units(kl_backend *be, const kl_short_conv *a,
                                const short_conv_units &units, kl_error *err);

#endif
