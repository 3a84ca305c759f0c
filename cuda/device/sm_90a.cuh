/*
 * sm_90a.cuh -- which of the two targets is being compiled: sm_90a, whose instructions devices of
 * compute capability 9.0 have and no others, or the PTX of compute_90, which later ones run too.
 *
 * A kernel with wgmma (wgmma.cuh) or setmaxnreg (barrier.cuh) is for sm_90a alone: it begins with
 *
 *     if constexpr (!SM_90A) return stop_here();
 *
 * and its launcher's caller asks kl_cuda_has_sm_90a() before it takes that way.
 */
#ifndef KL_CUDA_DEVICE_SM_90A_H
#define KL_CUDA_DEVICE_SM_90A_H

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool SM_90A = true;
#else
constexpr bool SM_90A = false;
#endif

/* An error of the launch, where otherwise nothing would be written and nobody told. */
__device__ inline void stop_here()
{
    __trap();
}

#endif
