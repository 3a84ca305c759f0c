/*
 * kda_prefill_prepare.cuh -- groups of warps that prepare chunks: which one next, where it goes,
 * and how those who wait for it learn of it.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_PREPARE_H
#define KL_CUDA_KERNELS_KDA_PREFILL_PREPARE_H

#include "kda_prefill_octets.cuh"
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

/* What this thread wrote to device memory is there before the copy engine reads it. */
__device__ inline void fence_global_for_copies()
{
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

/* ---- a chunk ----------------------------------------------------------------------------- */

__device__ inline bool is_leader()
{
    return warp_id() % PREPARERS == PREPARERS - 1;
}

/* Sums of squares over a warp's channels. */
__device__ inline void sum_squares(const uint4 (&raw)[OCTETS], float (*to)[PREPARERS])
{
#pragma unroll
    for (int o = 0; o < OCTETS; o++) {
        float v[CHANNELS], sum = 0;
        unpack(raw[o], 1.0f, v);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) sum = fmaf(v[i], v[i], sum);
        sum = warp_sum<4>(sum);
        if (lane_id() % 4 == 0) to[OCTET * o + lane_id() / 4][warp_id() % PREPARERS] = sum;
    }
}

/* The factors that bring rows to unit length come from here; meanwhile() runs while they load. */
template <class F>
__device__ void find_squares(const kda_arguments &a, const item &c, const lane_columns &at,
                             prepare_memory &m, F meanwhile)
{
    uint4 k[OCTETS], q[OCTETS];
#pragma unroll
    for (int o = 0; o < OCTETS; o++) {
        k[o] = load_piece(a.k, c, at.qk, o);
        q[o] = load_piece(a.q, c, at.qk, o);
    }
    meanwhile();
    sum_squares(k, m.squares[0]);
    sum_squares(q, m.squares[1]);
}

/* Whether the chunk that lay in an item's slot has been copied by all tiles of its pair: a warp
 * asks, a lane for each tile, and learns of it later. */
struct room {
    const unsigned *taken = nullptr;
    unsigned seen;

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

/* A chunk that is written but not yet said to be. It is said when the group has begun the next:
 * by then the writes have arrived, and the release does not wait for them. */
struct announcement {
    unsigned *flag = nullptr;
    unsigned value;

    __device__ void say()
    {
        if (flag == nullptr) return;
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
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

__device__ inline void prepare_chunk(const kda_arguments &a, const kda_plan &p, const item &c,
                                     int group, prepare_memory &m, announcement &last)
{
    const lane_columns at = columns_of(c);
    kda_chunk &out = p.ring[c.slot];
    room space(p, c, is_leader());
    load_beta(a, c, m);
    load_bias(a, c, m);
    const auto say_last = [&] { last.say(); };
    if (a.normalize)
        find_squares(a, c, at, m, say_last);
    else
        say_last();
    space.wait(p, c);
    group_barrier(group);
    prepare_octets(a, c, at, m, out);
    group_barrier(group);
    add_parts(m);
    write_decays(m, out);
    group_barrier(group);
    invert(m, group);
    write_squares(m, out);
    fence_global_for_copies();
    last = {&p.ready[c.slot * KDA_FLAG], c.serial + 1};
}

/* ---- all chunks -------------------------------------------------------------------------- */

/* Tickets go through the serials, and for each of them through the pairs. */
__device__ inline item item_of(const kda_arguments &a, const kda_plan &p,
                               const kda_lanes_of_call &lanes, unsigned ticket)
{
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

    /* The item of ticket `next`, on its way to the L2. */
    __device__ void put(const kda_arguments &a, const kda_plan &p,
                        const kda_lanes_of_call &lanes, item &to) const
    {
        const item c = item_of(a, p, lanes, next);
        if (lane_id() == 0) to = c;
        prefetch_rows(a.k, c, c.hk);
        prefetch_rows(a.q, c, c.hk);
        prefetch_rows(a.g, c, c.h);
    }

    __device__ void take() { next = __shfl_sync(ALL_LANES, asked, 0); }
};

__device__ inline void prepare_chunks(const kda_arguments &a, const kda_plan &p,
                                      const kda_lanes_of_call &lanes, int group,
                                      prepare_memory &m)
{
    const bool first = threadIdx.x % GROUP == 0, leads = is_leader();
    announcement last;
    leader tickets;
    /* Of M's octets above the diagonal two are read: they stay zero. */
    for (int i = threadIdx.x % GROUP; i < KDA_TOKENS * KDA_TOKENS / 2; i += GROUP)
        reinterpret_cast<uint32_t *>(m.M)[i] = 0;
    if (leads) {
        tickets.ask(p, 2);
        tickets.take();
        tickets.put(a, p, lanes, m.items[0]);
        tickets.next++;
    }
    group_barrier(group);
    for (int n = 0; m.items[n % 2].tokens >= 0; n++) {
        const item &c = m.items[n % 2];
        if (leads) {
            tickets.ask(p, 1); /* needed after the chunk */
            tickets.put(a, p, lanes, m.items[(n + 1) % 2]);
        }
        if (c.tokens > 0) prepare_chunk(a, p, c, group, m, last);
        if (leads) tickets.take();
        group_barrier(group); /* and the chunk is written */
        if (!first) last.flag = nullptr;
    }
    if (first) last.say();
}

} // namespace kda

#endif
