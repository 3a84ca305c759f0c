/*
 * kda_mixer_prefill.cuh -- kda_mixer of sequences of any length, behind kda_mixer.cu.
 */
#ifndef KL_CUDA_KERNELS_KDA_MIXER_PREFILL_H
#define KL_CUDA_KERNELS_KDA_MIXER_PREFILL_H

#include "../cuda_backend.h"

extern "C" {
#include "backend/kda_mixer.h"
}

/* Of the parts' shapes alone. */
size_t kda_mixer_prefill_workspace(kl_backend *be, const kl_kda_mixer_parts &p);

/* Convolution, recurrence and norm, with p.kda's workspace. */
kl_status kda_mixer_prefill(kl_backend *be, const kl_kda_mixer_parts &p, kl_error *err);

#endif
