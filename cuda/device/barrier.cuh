/*
 * barrier.cuh -- what a warp-specialised kernel of Hopper works with: barriers in shared memory
 * that count arrivals and bytes, tiles brought by the copy engine, registers handed over.
 *
 * A barrier has phases 0, 1, 0, ...; barrier_wait(b, phase) returns once that phase is complete.
 * Of a fresh barrier the phase before 0, parity 1, is complete.
 *
 * One lane speaks for its warp: once the others have done what it says, it arrives, and it asks the
 * copy engine. A build for racecheck (KL_RACECHECK, ../README.md) differs here, and in the size of
 * select.cuh's clusters: all lanes arrive, WARP_ARRIVALS of a warp, and copy themselves before they
 * do.
 */
#ifndef KL_CUDA_DEVICE_BARRIER_H
#define KL_CUDA_DEVICE_BARRIER_H

#include "../box_map.h"
#include "mma.cuh"
#include "warp.cuh"

using barrier = uint64_t;

#ifdef KL_RACECHECK
constexpr bool ALL_SPEAK = true;
#else
constexpr bool ALL_SPEAK = false;
#endif
constexpr int WARP_ARRIVALS = ALL_SPEAK ? WARP : 1;

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
#ifdef KL_RACECHECK
    barrier_arrive(b);
#else
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
                 "}" ::"r"(shared_address(b))
                 : "memory");
#endif
}

/* Arrive once the copies that this thread has started with copy_async() are done. */
__device__ inline void barrier_arrive_after_copies(barrier *b)
{
#ifdef KL_RACECHECK
    asm volatile("cp.async.wait_all;" ::: "memory");
    barrier_arrive(b);
#else
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(b))
                 : "memory");
#endif
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

/* A barrier of so many of the block's threads, whole warps; 0 is __syncthreads()'s. */
template <int id, int threads> __device__ void barrier_of_threads()
{
    asm volatile("bar.sync %0, %1;" ::"n"(id), "n"(threads) : "memory");
}

/* What this thread has written to shared memory, before what wgmma and the copy engine do there
 * from now on. */
__device__ inline void fence_async_proxy()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- copies, which one lane asks for, between copies_begin() and copies_end() --------------- */

#ifndef KL_RACECHECK

/* Arrive, and have the phase wait for so many bytes of the copy engine. */
__device__ inline void copies_begin(barrier *b, int bytes)
{
    barrier_arrive_expecting(b, bytes);
}

__device__ inline void copies_end(barrier *) {}

/* Ask for the map, before its first box is. */
__device__ inline void prefetch_map(const box_map *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* The box at (column, row) of a map's matrix to shared memory, zeros outside of the matrix. By a
 * lane alone or, for `lanes`, by those who speak. */
template <int lanes = 1>
__device__ void copy_box(void *shared, const box_map *map, int column, int row, barrier *b)
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

/* The same three by a whole warp, for which one lane asks: the addresses are then known to be the
 * same in all, and take no loop over lanes. */
__device__ inline void warp_copies_begin(barrier *b, int bytes)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n"
                 "}" ::"r"(shared_address(b)),
                 "r"(bytes)
                 : "memory");
}

__device__ inline void warp_copy_box(void *shared, const box_map *map, int column, int row,
                                     barrier *b)
{
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];\n"
        "}" ::"r"(shared_address(shared)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(b))
        : "memory");
}

__device__ inline void warp_copy_bytes(void *shared, const void *global, uint32_t bytes,
                                       barrier *b)
{
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "elect.sync _|p, 0xffffffff;\n"
                 "@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];\n"
                 "}" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}

/* The same to device memory; the thread waits with wait_for_copies_out(). */
__device__ inline void copy_bytes_out(void *global, const void *shared, uint32_t bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
                 "cp.async.bulk.commit_group;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
}

/* Until all of the thread's have been read from shared memory, or are done. */
template <bool only_read> __device__ void wait_for_copies_out()
{
    if constexpr (only_read)
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    else
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#else /* all lanes call these, and each copies a share */

__device__ inline void copies_begin(barrier *, int) {}

__device__ inline void copies_end(barrier *b)
{
    fence_async_proxy();
    barrier_arrive(b);
}

__device__ inline void prefetch_map(const box_map *) {}

template <int lanes = 1>
__device__ void copy_box(void *shared, const box_map *map, int column, int row, barrier *)
{
    const int each = map->box_bytes / 16;
    for (int i = lane_id() % lanes; i < map->box_rows * each; i += lanes) {
        const int r = i / each, piece = i % each, swap = map->swizzled ? i / 8 % each : 0;
        const int64_t byte = int64_t{column} * map->element_bytes + piece * 16;
        uint4 x = {};
        if (row + r < map->rows && byte < map->row_bytes)
            x = __ldcg(reinterpret_cast<const uint4 *>(static_cast<const char *>(map->data) +
                                                       (row + r) * map->row_bytes + byte));
        static_cast<uint4 *>(shared)[r * each + (piece ^ swap)] = x;
    }
}

__device__ inline void copy_bytes(void *shared, const void *global, uint32_t bytes, barrier *)
{
    for (uint32_t i = lane_id(); i < bytes / 16; i += WARP)
        static_cast<uint4 *>(shared)[i] = __ldcg(static_cast<const uint4 *>(global) + i);
}

__device__ inline void warp_copies_begin(barrier *, int) {}

__device__ inline void warp_copy_box(void *shared, const box_map *map, int column, int row,
                                     barrier *b)
{
    copy_box<WARP>(shared, map, column, row, b);
}

__device__ inline void warp_copy_bytes(void *shared, const void *global, uint32_t bytes,
                                       barrier *b)
{
    copy_bytes(shared, global, bytes, b);
}

__device__ inline void copy_bytes_out(void *global, const void *shared, uint32_t bytes)
{
    for (uint32_t i = lane_id(); i < bytes / 16; i += WARP)
        __stcg(static_cast<uint4 *>(global) + i, static_cast<const uint4 *>(shared)[i]);
}

template <bool only_read> __device__ void wait_for_copies_out()
{
    __syncwarp();
}

#endif

/* A slot of a ring of S::STAGES, and the phase of its barriers. */
template <class S> struct ring_place {
    int slot = 0;
    uint32_t phase = 0;

    __device__ void advance()
    {
        if (++slot == S::STAGES) slot = 0, phase ^= 1;
    }
};

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
