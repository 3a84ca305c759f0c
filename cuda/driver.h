/*
 * driver.h -- functions of the CUDA driver by name: nothing of ours is linked to libcuda.
 */
#ifndef KL_CUDA_DRIVER_H
#define KL_CUDA_DRIVER_H

#include <cuda.h>
#include <cuda_runtime.h>

/* Null where there is no driver, or none that has it. */
template <class F> F kl_cuda_driver_function(const char *name)
{
    cudaDriverEntryPointQueryResult found;
    void *function = nullptr;
    const cudaError_t e = cudaGetDriverEntryPointByVersion(name, &function, CUDART_VERSION,
                                                           cudaEnableDefault, &found);
    return e == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<F>(function)
               : nullptr;
}

#endif
