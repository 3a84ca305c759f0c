/*
 * cluster.cuh -- blocks of a cluster that write into each other's shared memory and count what
 * has arrived, without a barrier of the whole cluster at the end.
 */
#ifndef KL_CUDA_DEVICE_CLUSTER_H
#define KL_CUDA_DEVICE_CLUSTER_H

#include "barrier.cuh"

/* All threads of the cluster: arrive, later wait. Afterwards all its blocks have begun, and the
 * barriers are there that were made before, with barrier_init_done(). */
__device__ inline void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ inline void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/* Address of the same place in the shared memory of another block of the cluster. */
__device__ inline uint32_t address_in(const void *own, unsigned rank)
{
    uint32_t at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at)
                 : "r"(shared_address(own)), "r"(rank));
    return at;
}

/* x to `to` of another block, or this one; 4 bytes for the phase of that block's barrier b. */
__device__ inline void store_in(unsigned rank, float *to, float x, barrier *b)
{
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
            address_in(to, rank)),
        "r"(__float_as_uint(x)), "r"(address_in(b, rank))
        : "memory");
}

/* barrier_wait() for what other blocks have stored. */
__device__ inline void barrier_wait_for_cluster(barrier *b, uint32_t phase)
{
    uint32_t done;
    do {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}"
                     : "=r"(done)
                     : "r"(shared_address(b)), "r"(phase)
                     : "memory");
    } while (!done);
}

#endif
