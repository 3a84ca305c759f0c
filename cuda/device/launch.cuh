/*
 * launch.cuh -- kernels that start while the one before them in the stream still runs
 * (programmatic dependent launch): what a kernel costs beside its work, its launch and the
 * filling of the multiprocessors, falls into the time of its neighbour.
 *
 * A kernel launched this way may be on the device before the kernels ahead of it have ended.
 * Until wait_for_inputs() it must not touch memory that they may write, nor write what they may
 * read, and every thread calls it, also those with nothing to do: only so does the end of a
 * kernel mean that all before it have ended too. What it waits for is complete and visible
 * afterwards, but for loads that promise the data never changes (ld.global.nc, __ldg): the
 * compiler may move those ahead of the wait. prefetch_l2() may come before: it changes nothing
 * that a program can see, whoever is still writing there. Two exceptions, each argued where it is
 * made (moe_step.cuh, arriving.cuh): what was complete before the kernel ahead let this one start
 * may be read past the L1; and a word that itself says that it is there may be looked for, if the
 * block that writes it waits for nothing behind it.
 *
 * Such a word comes: this kernel's blocks start only when every block of the kernel ahead has
 * called let_next_start(), so these are on the device, whatever room is left, and what they look
 * for themselves comes likewise. A kernel that looks for its inputs instead of waiting writes
 * nothing that the kernels ahead of it may still read; and all its threads call wait_for_inputs()
 * before they end, for its end still has to mean that those have ended too.
 *
 * Kernels of others in the stream need not know of this: one that never calls
 * let_next_start() does so by ending, and one launched plainly starts after the end.
 */
#ifndef KL_CUDA_DEVICE_LAUNCH_H
#define KL_CUDA_DEVICE_LAUNCH_H

#include "../cuda_backend.h"

#include <stdint.h>

/* Once every block has called this or ended, the next kernel's blocks may take what room there
 * is. As early as possible, for the wait of the next kernel is for this one's end all the same,
 * unless a later kernel relies on what this one has waited for, or its ring would take this one's
 * room. */
__device__ inline void let_next_start()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ inline void wait_for_inputs()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* Ask for memory to come to the L2; address and bytes are multiples of 16. */
__device__ inline void prefetch_l2(const void *from, uint32_t bytes)
{
    if (bytes == 0) return;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes)
                 : "memory");
}

/* The same for the line of memory at any address. */
__device__ inline void prefetch_line(const void *at)
{
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at) : "memory");
}

/* Host: let a kernel have the most shared memory that any launch of it takes, whatever this one
 * does: a recorded graph checks its kernels by the last word said about each. */
template <class K> kl_status kl_cuda_allow_shared(K kernel, size_t most, kl_error *err)
{
    KL_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(most)),
                err);
    return KL_OK;
}

/* Host: kernel<<<blocks, threads, shared, stream>>>(arguments...), started early. split: how many
 * hundredths of what can be shared memory are to be that, and not L1.
 *
 * That changes only while a multiprocessor has nothing to do. Left to each kernel's own needs, it
 * would keep the next kernel's blocks out until the last of this one's had left; so all ask for the
 * largest shared memory, but those that read the same rows again and again through the L1: on an
 * H200 8 tokens' experts take a third longer with the smallest one. */
template <class... Parameters, class... Arguments>
kl_status kl_cuda_launch_split(unsigned split, void (*kernel)(Parameters...), dim3 blocks,
                               unsigned threads, size_t shared, cudaStream_t stream,
                               kl_error *err, const Arguments &...arguments)
{
    cudaLaunchAttribute wanted[2] = {};
    wanted[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    wanted[0].val.programmaticStreamSerializationAllowed = 1;
    wanted[1].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
    wanted[1].val.sharedMemCarveout = split;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = wanted;
    config.numAttrs = 2;
    (void)cudaLaunchKernelEx(&config, kernel, arguments...);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

template <class... Parameters, class... Arguments>
kl_status kl_cuda_launch(void (*kernel)(Parameters...), dim3 blocks, unsigned threads,
                         size_t shared, cudaStream_t stream, kl_error *err,
                         const Arguments &...arguments)
{
    return kl_cuda_launch_split(100, kernel, blocks, threads, shared, stream, err,
                                arguments...);
}

/* For a kernel with a few KB of shared memory. */
template <class... Parameters, class... Arguments>
kl_status kl_cuda_launch_with_l1(void (*kernel)(Parameters...), dim3 blocks, unsigned threads,
                                 cudaStream_t stream, kl_error *err,
                                 const Arguments &...arguments)
{
    return kl_cuda_launch_split(10, kernel, blocks, threads, 0, stream, err, arguments...);
}

#endif
