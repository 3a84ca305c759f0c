/*
 * barrier.cuh -- what a warp-specialised kernel of Hopper works with: barriers in shared memory
 * that count arrivals and bytes, tiles brought by the copy engine, registers handed over.
 *
 * A barrier has phases 0, 1, 0, ...; barrier_wait(b, phase) returns once that phase is complete.
 * Of a fresh barrier the phase before 0, parity 1, is complete.
 */
#ifndef KL_CUDA_DEVICE_BARRIER_H
#define KL_CUDA_DEVICE_BARRIER_H

#include "mma.cuh"

#include <cuda.h>

using barrier = uint64_t;

__device__ inline void barrier_init(barrier *b, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)),
                 "r"(arrivals)
                 : "memory");
}

/* After the inits, before the block's barrier: the copy engine may use them too. */
__device__ inline void barrier_init_done()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_arrive(barrier *b)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b))
                 : "memory");
}

/* All lanes have done what they do before; one of them says so, whichever: to ask for one's number
 * takes as long as a load. */
__device__ inline void warp_arrive(barrier *b)
{
    __syncwarp();
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
                 "}" ::"r"(shared_address(b))
                 : "memory");
}

/* Arrive once the copies that this thread has started with copy_async() are done. */
__device__ inline void barrier_arrive_after_copies(barrier *b)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b))
                 : "memory");
}

/* Arrive, and have the phase wait for so many bytes of the copy engine as well. */
__device__ inline void barrier_arrive_expecting(barrier *b, int bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)),
        "r"(bytes)
        : "memory");
}

__device__ inline void barrier_wait(barrier *b, uint32_t phase)
{
    uint32_t done;
    do {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}"
                     : "=r"(done)
                     : "r"(shared_address(b)), "r"(phase)
                     : "memory");
    } while (!done);
}

/* The box at (column, row) of a map's matrix to shared memory; zeros outside of the matrix. */
__device__ inline void copy_box(void *shared, const CUtensorMap *map, int column, int row,
                                barrier *b)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(b))
                 : "memory");
}

/* Memory as it lies to shared memory; addresses and bytes are multiples of 16. */
__device__ inline void copy_bytes(void *shared, const void *global, uint32_t bytes, barrier *b)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}

/* What this thread has written to shared memory, before what wgmma and the copy engine do there
 * from now on. */
__device__ inline void fence_async_proxy()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* All warps of a warpgroup: give back all registers past n, or wait until n are to be had. */
template <int n> __device__ void registers_down_to()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}

template <int n> __device__ void registers_up_to()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}

#endif
