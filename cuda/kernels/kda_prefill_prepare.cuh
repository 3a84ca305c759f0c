/*
 * kda_prefill_prepare.cuh -- groups of warps that prepare chunks: which one next, where it goes,
 * and how those who wait for it learn of it.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_PREPARE_H
#define KL_CUDA_KERNELS_KDA_PREFILL_PREPARE_H

#include "../device/barrier.cuh"
#include "kda_prefill_convolve.cuh"
#include "kda_prefill_squares.cuh"

namespace kda {

/* ---- flags between blocks ---------------------------------------------------------------- */

/* Reads go past the L1; one that is to order what follows is an acquire, which empties the L1,
 * so polls are not. */
__device__ inline unsigned read_flag(const unsigned *p)
{
    unsigned x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ inline unsigned read_acquire(const unsigned *p)
{
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ inline void write_flag(unsigned *p, unsigned x)
{
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

__device__ inline void write_release(unsigned *p, unsigned x)
{
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

/* What this thread has seen of device memory comes before what the copy engine does there. */
__device__ inline void fence_global_for_copies()
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

/* From shared to device memory by the copy engine; addresses and bytes are multiples of 16. The
 * thread waits with wait_for_copies_out(). */
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

/* ---- a chunk ----------------------------------------------------------------------------- */

__device__ inline bool is_leader()
{
    return warp_id() % PREPARERS == PREPARERS - 1;
}

/* Whether the chunk that lay in an item's slot has been copied by all tiles of its pair: a warp
 * asks, a lane for each tile, and learns of it later. */
struct room {
    const unsigned *taken = nullptr;
    unsigned seen;

    room() = default;

    __device__ room(const kda_plan &p, const item &c, bool asks)
    {
        if (!asks || lane_id() >= p.tiles) return;
        taken = &p.taken[(c.pair * p.tiles + lane_id()) * KDA_FLAG];
        seen = read_flag(taken);
    }

    __device__ void wait(const kda_plan &p, const item &c)
    {
        if (taken == nullptr) return;
        for (; static_cast<int>(seen + p.slots - c.serial) <= 0; seen = read_flag(taken))
            __nanosleep(200);
    }
};

/* A chunk on its way from shared memory to its slot, by the thread that sent it. */
struct delivery {
    unsigned *flag = nullptr;
    unsigned value;

    __device__ void send(const kda_plan &p, const item &c, prepare_memory &m)
    {
        copy_bytes_out(&p.ring[c.slot], &m.chunk, sizeof m.chunk);
        flag = &p.ready[c.slot * KDA_FLAG], value = c.serial + 1;
    }

    /* The next chunk may take its place. */
    __device__ void wait_until_read() const
    {
        if (flag != nullptr) wait_for_copies_out<true>();
    }

    /* To those who wait for the chunk. The group has begun the next: the copy has ended. */
    __device__ void announce()
    {
        if (flag == nullptr) return;
        wait_for_copies_out<false>();
        write_release(flag, value);
        flag = nullptr;
    }
};

/* The rows of a chunk on their way to the L2, by a warp, a row a lane. */
__device__ inline void prefetch_rows(const kda_operand &x, const item &c, int head)
{
    const int element = x.is_bf16 ? 2 : 4, row = lane_id();
    if (row >= c.tokens) return;
    const char *from = static_cast<const char *>(x.data) +
                       ((c.token + row) * x.stride + head * KDA_K) * element;
    prefetch_line(from), prefetch_line(from + 128);
    if (!x.is_bf16) prefetch_line(from + 256), prefetch_line(from + 384);
}

/* The chunk has been copied to its slot: another one may take its place. */
__device__ inline void have_chunk(delivery &last, int group)
{
    last.wait_until_read();
    group_barrier(group);
    last.announce();
}

/* All octets, and a barrier. Rows stay raw but where a chunk has extremes: it is begun again.
 * Returns whether they are. */
__device__ inline bool prepare_rows(const kda_arguments &a, const head_gate &gate,
                                    const octet_reader &from, raw_octet &first, int group,
                                    prepare_memory &m)
{
    for (bool is_raw = true;; is_raw = false) {
        prepare_octets(a, gate, from, first, is_raw, m);
        group_barrier(group);
        if (!is_raw || !a.normalize || !has_extremes(m)) return is_raw;
        from.read(first, 0);
    }
}

/* From a chunk's tokens in device memory to the sums of its octets; returns what prepare_rows()
 * does. */
__device__ inline bool prepare_tokens(const kda_arguments &a, no_convolver &, const item &c,
                                      int group, prepare_memory &m, delivery &last)
{
    const octet_reader from(a, c);
    const head_gate gate = gate_of(a, c.h);
    raw_octet first;
    from.read(first, 0);
    load_beta(a, c, m);
    load_bias(a, gate, c, m);
    have_chunk(last, group);
    return prepare_rows(a, gate, from, first, group, m);
}

/* The same with the convolution before: of k and q again, where a chunk is begun again. */
__device__ inline bool prepare_tokens(const kda_arguments &a, convolver &lane, const item &c,
                                      int group, prepare_memory &m, delivery &last)
{
    const kept_reader from(a, c, m);
    const head_gate gate = gate_of(a, c.h);
    load_beta(a, c, m);
    load_bias(a, gate, c, m);
    for (bool is_raw = true;; is_raw = false) {
        raw_octet first;
        lane.run(is_raw ? OF_V : OF_K, [&] { have_chunk(last, group); });
        last.flag = nullptr; /* as it is, but compilers would keep it */
        from.read(first, 0);
        prepare_octets(a, gate, from, first, is_raw, m);
        group_barrier(group);
        if (!is_raw || !a.normalize || !has_extremes(m)) return is_raw;
        lane.ask(OF_K); /* here: registers would be kept for it, were it in front of run() */
    }
}

/* All but the inverse. `last` is of the thread that sends. */
template <class Lane>
__device__ void prepare_products(const kda_arguments &a, Lane &lane, const item &c, int group,
                                 prepare_memory &m, delivery &last)
{
    const bool is_raw = prepare_tokens(a, lane, c, group, m, last);
    add_parts(m, find_factors(a, is_raw, m));
    group_barrier(group);
}

/* Up to the last barrier, which the caller has. */
__device__ inline room finish_chunk(const kda_plan &p, const item &c, int group,
                                    prepare_memory &m)
{
    const int warp = warp_id() % PREPARERS;
    const room space(p, c, is_leader());
    if (warp == 0) {
        invert_diagonal(m);
        join_blocks(m);
    } else if (warp == 1)
        write_decays(m);
    group_barrier(group);
    write_inverse(m);
    fence_async_proxy();
    return space;
}

/* ---- all chunks -------------------------------------------------------------------------- */

/* Tickets go through the serials, and for each of them through the pairs. `begun` is the sequence
 * of the call that begins with the chunk, or -1. */
__device__ inline item item_of(const kda_arguments &a, const kda_plan &p,
                               const kda_lanes_of_call &lanes, unsigned ticket, int &begun)
{
    begun = -1;
    const unsigned pair = ticket % p.pairs, serial = ticket / p.pairs;
    const int round = serial / lanes.longest, at = serial % lanes.longest;
    const int l = pair / p.groups, h = round * p.groups + pair % p.groups;
    item c = {.pair = static_cast<int>(pair), .serial = serial};
    if (round >= p.rounds) c.tokens = -1;
    const kda_lane first = lanes.lane[l], end = lanes.lane[l + 1];
    const int number = first.number + at;
    if (h >= a.H || number >= end.number) return c;
    const int n = first.sequence + last_begun(end.sequence - first.sequence, [&](int i) {
                      return kda_first_number(p.cu, first.sequence + i) <= number;
                  });
    const int before = (number - kda_first_number(p.cu, n)) * KDA_TOKENS;
    const int left = kda_chunked_tokens(p, n) - before;
    if (before == 0) begun = n;
    c.token = p.cu[n] + before;
    c.tokens = min(max(left, 0), KDA_TOKENS);
    c.h = h, c.hk = h / static_cast<int>(a.H / a.Hk);
    c.slot = c.pair * p.slots + static_cast<int>(serial % p.slots);
    return c;
}

/* The last warp of a group takes the tickets: another one has more of the inverse. */
struct leader {
    unsigned next = 0, asked = 0; /* tickets; that of the first lane counts */

    __device__ void ask(const kda_plan &p, unsigned n)
    {
        if (lane_id() == 0) asked = atomicAdd(p.ticket, n);
    }

    /* The item of the next ticket, and the slot that its convolution begins with, or -1. */
    template <class Rows>
    __device__ void put(const kda_arguments &a, const kda_plan &p,
                        const kda_lanes_of_call &lanes, item &to, int &window)
    {
        int n;
        const item c = item_of(a, p, lanes, next++, n);
        if (lane_id() == 0) to = c;
        if constexpr (Rows::IS_THERE)
            if (lane_id() == 0) window = n < 0 || a.slots == nullptr ? n : a.slots[n];
    }

    /* An item on its way to the L2. */
    __device__ static void prefetch(const kda_arguments &a, const kda_no_convolution &,
                                    const item &c)
    {
        prefetch_rows(a.k, c, c.hk);
        prefetch_rows(a.q, c, c.hk);
        prefetch_rows(a.g, c, c.h);
    }

    __device__ static void prefetch(const kda_arguments &a, const kda_convolution &rows,
                                    const item &c)
    {
        for (int part = OF_K; part >= 0; part--) /* v is asked for by all warps */
            prefetch_rows(rows.x, c, part * static_cast<int>(a.H) + c.h);
        prefetch_rows(a.g, c, c.h);
    }

    __device__ void take() { next = __shfl_sync(ALL_LANES, asked, 0); }
};

/* windows: of the group's items. */
template <class Rows>
__device__ void prepare_chunks(const kda_arguments &a, const kda_plan &p, const Rows &rows,
                               const kda_lanes_of_call &lanes, int group, prepare_memory &m,
                               int (&windows)[ITEMS])
{
    const bool leads = is_leader();
    delivery last;
    leader tickets;
    /* M's octets above the diagonal stay zero. */
    for (int i = threadIdx.x % GROUP; i < KDA_TOKENS * KDA_TOKENS / 2; i += GROUP)
        reinterpret_cast<uint32_t *>(m.chunk.M)[i] = 0;
    if (leads) {
        tickets.ask(p, 2);
        tickets.take();
        tickets.put<Rows>(a, p, lanes, m.items[0], windows[0]);
        tickets.put<Rows>(a, p, lanes, m.items[1], windows[1]);
    }
    group_barrier(group);
    auto lane = convolver_of(rows, a, m);
    lane.ask_first(0, windows[0]);
    for (int n = 0, next = 1; m.items[n].tokens >= 0; n = next, next = (next + 1) % ITEMS) {
        const item &c = m.items[n];
        const bool sends = leads && c.tokens > 0;
        room space;
        if (leads) tickets.ask(p, 1);
        if (c.tokens > 0) prepare_products(a, lane, c, group, m, last);
        lane.ask_first(next, windows[next]); /* comes beside the inverse */
        if (leads) {                         /* while others invert */
            tickets.prefetch(a, rows, m.items[next]);
            tickets.take();
            const int later = (next + 1) % ITEMS;
            tickets.put<Rows>(a, p, lanes, m.items[later], windows[later]);
        }
        if (c.tokens > 0) space = finish_chunk(p, c, group, m);
        group_barrier(group);
        if (!sends) continue;
        space.wait(p, c);
        __syncwarp();
        if (lane_id() == 0) last.send(p, c, m);
    }
    last.announce();
}

} // namespace kda

#endif
