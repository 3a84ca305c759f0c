/*
 * peaks.h -- the peaks of logits (kl_linear of backend/ops.h) where a kernel of their own makes
 * them, and the draw that needs nothing else.
 */
#ifndef KL_CUDA_PEAKS_H
#define KL_CUDA_PEAKS_H

#include "cuda_backend.h"

/* Of outputs [T, O] f32, rows strided: peaks [T, kl_peaks_of(O), 2]. */
kl_status kl_cuda_find_peaks(kl_backend *be, const kl_tensor *outputs, float *peaks,
                             kl_error *err);

/* kl_sample of rows with `peaks` that are greedy, without seen and alternatives. */
kl_status kl_cuda_sample_greedy(kl_backend *be, const kl_sample *a, kl_error *err);

#endif
