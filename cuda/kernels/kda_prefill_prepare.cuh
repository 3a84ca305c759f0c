/*
 * kda_prefill_prepare.cuh -- groups of warps that prepare chunks: which one next, where it goes,
 * and how those who wait for it learn of it.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_PREPARE_H
#define KL_CUDA_KERNELS_KDA_PREFILL_PREPARE_H

#include "../device/barrier.cuh"
#include "../device/load_here.cuh"
#include "kda_prefill_convolve.cuh"
#include "kda_prefill_squares.cuh"

namespace kda {

/* ---- flags between blocks ---------------------------------------------------------------- */

/* One that is to order what follows; it empties the L1, so polls are load_here(). */
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

/* ---- a chunk ----------------------------------------------------------------------------- */

/* What each of a group's warps does once the sums are there. */
enum duty { INVERTS, FADES, LOOKS_AHEAD, LEADS };

/* Until the chunk that lay in an item's slot has been copied by all tiles of its pair: by a warp, a
 * lane for each tile. */
__device__ inline void wait_for_room(const kda_plan &p, const item &c)
{
    if (lane_id() >= p.tiles) return;
    const unsigned *taken = &p.taken[(c.pair * p.tiles + lane_id()) * KDA_FLAG];
    while (static_cast<int>(load_here(taken) + p.slots - c.serial) <= 0) __nanosleep(200);
}

/* A chunk on its way from shared memory to its slot, by who sent it. */
struct delivery {
    bool is_on_its_way = false;

    __device__ void send(const kda_plan &p, const item &c, prepare_memory &m)
    {
        copy_bytes_out(&p.ring[c.slot], &m.chunk, sizeof m.chunk);
        is_on_its_way = true;
    }

    /* The next chunk may take its place. */
    __device__ void wait_until_read() const
    {
        if (is_on_its_way) wait_for_copies_out<true>();
    }

    /* To those who wait for the chunk, of item c. The group has begun the next: the copy has
     * ended. */
    __device__ void announce(const kda_plan &p, const item &c)
    {
        if (!is_on_its_way) return;
        wait_for_copies_out<false>();
        if (!ALL_SPEAK || lane_id() == 0)
            write_release(&p.ready[c.slot * KDA_FLAG], c.serial + 1);
        is_on_its_way = false;
    }
};

/* The group's items go round. All that a thread keeps of one is its address in shared memory. */
struct place {
    unsigned first, at;

    __device__ explicit place(const prepare_memory &m)
        : first(shared_address(m.items)), at(first)
    {
    }

    __device__ void next() { at = after(1).at; }

    __device__ place after(int n) const
    {
        constexpr unsigned end = ITEMS * sizeof(item);
        place to = *this;
        to.at += n * sizeof(item);
        if (to.at - first >= end) to.at -= end;
        return to;
    }

    __device__ item &operator*() const
    {
        return *static_cast<item *>(__cvta_shared_to_generic(at));
    }

    __device__ item *operator->() const { return &**this; }
};

/* The rows of a chunk on their way to the L2, by a warp, a row a lane. */
__device__ inline void prefetch_rows(const kda_operand &x, const item &c, int head)
{
    const int element = x.element(), row = lane_id();
    if (row >= c.tokens) return;
    const char *from = static_cast<const char *>(x.data) +
                       ((c.token + row) * x.stride + head * KDA_K) * element;
    prefetch_line(from), prefetch_line(from + 128);
    if (!x.is_bf16) prefetch_line(from + 256), prefetch_line(from + 384);
}

__device__ inline void prefetch_beta(const kda_operand &x, const item &c)
{
    if (lane_id() < c.tokens)
        prefetch_line(static_cast<const char *>(x.data) +
                      ((c.token + lane_id()) * x.stride + c.h) * x.element());
}

/* A chunk on its way to the L2, by a warp. */
__device__ inline void prefetch_chunk(const kda_arguments &a, const kda_no_convolution &,
                                      const item &c)
{
    prefetch_rows(a.k, c, c.hk);
    prefetch_rows(a.q, c, c.hk);
    prefetch_rows(a.g, c, c.h);
    prefetch_beta(a.beta, c);
}

__device__ inline void prefetch_chunk(const kda_arguments &a, const kda_convolution &rows,
                                      const item &c)
{
    for (int part = OF_V; part >= 0; part--)
        prefetch_rows(rows.x, c, part * static_cast<int>(a.H) + c.h);
    prefetch_rows(a.g, c, c.h);
    prefetch_beta(a.beta, c);
}

/* The chunk before that of c has been copied to its slot: this one may take its place. `then` is
 * what the leader does once it has said so. */
template <class F>
__device__ void have_chunk(const kda_plan &p, const place &c, int group, int warp,
                           delivery &last, F then)
{
    if (warp == LEADS) {
        last.wait_until_read();
        group_barrier(group);
        last.announce(p, *c.after(ITEMS - 1));
        then();
    } else
        group_barrier(group);
}

/* All octets of a chunk as it is given, once it may take its place; returns its gate. */
template <bool gates_are_bf16, kl_gate kind, class F>
__device__ head_gate<kind> prepare_raw(const kda_arguments &a, const item &c, int warp,
                                       prepare_memory &m, F have_chunk)
{
    const raw_scalars own(a, c);
    const octet_reader<gates_are_bf16> from(a, c);
    raw_octet first;
    from.read(first, 0);
    const head_gate<kind> gate = own.put<kind>(a, c, warp, m);
    have_chunk();
    prepare_octets<true>(a, c, gate, from, first, m);
    return gate;
}

/* From a chunk's tokens in device memory to the sums of its octets, and a barrier. Rows stay raw
 * but where a chunk has extremes: it is begun again. Returns whether they are. `then`: see
 * have_chunk(). */
template <kl_gate kind, class F>
__device__ bool prepare_tokens(const kda_arguments &a, const kda_plan &p,
                               const kda_no_convolution &, const place &at, int group, int warp,
                               prepare_memory &m, delivery &last, F then)
{
    const item &c = *at;
    const auto have = [&] { have_chunk(p, at, group, warp, last, then); };
    const head_gate<kind> gate = a.g.is_bf16 ? prepare_raw<true, kind>(a, c, warp, m, have)
                                             : prepare_raw<false, kind>(a, c, warp, m, have);
    group_barrier(group);
    if (!a.normalize || !has_extremes(m)) return true;
    const octet_reader<false> from(a, c);
    raw_octet first;
    from.read(first, 0);
    prepare_octets<false>(a, c, gate, from, first, m);
    group_barrier(group);
    return false;
}

/* All parts of a chunk's rows, once it may take its place. */
template <bool whole, kl_gate kind, class F>
__device__ head_gate<kind> convolve_chunk(const kda_arguments &a, const kda_convolution &rows,
                                          const item &c, int warp, prepare_memory &m,
                                          F have_chunk)
{
    const raw_scalars own(a, c);
    convolver<whole> lane(rows, a, c, m);
    lane.ask(OF_V);
    const head_gate<kind> gate = own.put<kind>(a, c, warp, m);
    lane.run(OF_V, have_chunk);
    return gate;
}

/* The same with the convolution before: of k and q again, where a chunk is begun again. */
template <kl_gate kind, class F>
__device__ bool prepare_tokens(const kda_arguments &a, const kda_plan &p,
                               const kda_convolution &rows, const place &at, int group,
                               int warp, prepare_memory &m, delivery &last, F then)
{
    const item &c = *at;
    const kept_reader from(a, c, m);
    const auto have = [&] { have_chunk(p, at, group, warp, last, then); };
    const head_gate<kind> gate = is_whole(c)
                                     ? convolve_chunk<true, kind>(a, rows, c, warp, m, have)
                                     : convolve_chunk<false, kind>(a, rows, c, warp, m, have);
    raw_octet first;
    from.read(first, 0);
    prepare_octets<true>(a, c, gate, from, first, m);
    group_barrier(group);
    if (!a.normalize || !has_extremes(m)) return true;
    convolver<false> again(rows, a, c, m);
    again.ask(OF_K);
    again.run(OF_K, [] {});
    from.read(first, 0);
    prepare_octets<false>(a, c, gate, from, first, m);
    group_barrier(group);
    return false;
}

/* ---- all chunks -------------------------------------------------------------------------- */

/* Tickets go through the serials, and for each of them through the pairs. */
__device__ inline item item_of(const kda_arguments &a, const kda_plan &p,
                               const kda_lanes_of_call &lanes, unsigned ticket)
{
    const unsigned pair = ticket % p.pairs, serial = ticket / p.pairs;
    const int round = serial / lanes.longest, at = serial % lanes.longest;
    const int l = pair / p.groups, h = round * p.groups + pair % p.groups;
    item c = {.pair = static_cast<int>(pair), .serial = serial, .window = -1};
    if (round >= p.rounds) c.tokens = -1;
    const kda_lane first = lanes.lane[l], end = lanes.lane[l + 1];
    const int number = first.number + at;
    if (h >= a.H || number >= end.number) return c;
    const int n = first.sequence + last_begun(end.sequence - first.sequence, [&](int i) {
                      return kda_first_number(p.cu, first.sequence + i) <= number;
                  });
    const int before = (number - kda_first_number(p.cu, n)) * KDA_TOKENS;
    const int left = kda_chunked_tokens(p, n) - before;
    if (before == 0) c.window = a.slots == nullptr ? n : a.slots[n];
    c.token = p.cu[n] + before;
    c.tokens = min(max(left, 0), KDA_TOKENS);
    c.h = h, c.hk = h / static_cast<int>(a.H / a.Hk);
    c.slot = c.pair * p.slots + static_cast<int>(serial % p.slots);
    return c;
}

/* The last warp of a group takes the tickets: the first has the inverse. */
struct leader {
    unsigned asked = 0; /* a ticket; that of the first lane counts */

    /* An addition would be shared out among lanes, and so be waited for here; one that goes round at
     * a number which no ticket reaches is not. */
    __device__ void ask(const kda_plan &p)
    {
        constexpr unsigned MOST = 1u << 31;
        if (made_here(lane_id()) == 0)
            asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;"
                         : "=r"(asked)
                         : "l"(p.ticket), "r"(MOST)
                         : "memory");
    }

    /* The item of the ticket that has been asked for. */
    __device__ void put(const kda_arguments &a, const kda_plan &p,
                        const kda_lanes_of_call &lanes, item &to) const
    {
        const item c = item_of(a, p, lanes, __shfl_sync(ALL_LANES, asked, 0));
        if (lane_id() == 0) to = c;
    }
};

/* A chunk, up to its way to its slot. Each warp goes through one piece of code between the octets
 * and X, with the barrier behind the sums in it: behind a jump the next instructions are late. */
template <kl_gate kind, class Rows>
__device__ void prepare_chunk(const kda_arguments &a, const kda_plan &p, const Rows &rows,
                              const kda_lanes_of_call &lanes, const place &c, int group,
                              int warp, prepare_memory &m, delivery &last, leader &tickets)
{
    const bool is_raw =
        prepare_tokens<kind>(a, p, rows, c, group, warp, m, last, [&] { tickets.ask(p); });
    const float factor = find_factors(a, is_raw, m);
    if (warp == INVERTS) {
        add_parts<INVERTS>(m, factor);
        group_barrier(group);
        invert_diagonal(m);
        join_blocks(m);
    } else if (warp == FADES) {
        add_parts<FADES>(m, factor);
        group_barrier(group);
        write_decays(m);
    } else if (warp == LOOKS_AHEAD) {
        add_parts<LOOKS_AHEAD>(m, factor);
        group_barrier(group);
        prefetch_chunk(a, rows, *c.after(1));
        wait_for_room(p, *c);
    } else {
        add_parts<LEADS>(m, factor);
        group_barrier(group);
        tickets.put(a, p, lanes, *c.after(ITEMS - 1));
    }
    group_barrier(group);
    write_inverse(m);
    fence_async_proxy();
}

/* There is no chunk of this ticket. */
template <class Rows>
__device__ void pass_over(const kda_arguments &a, const kda_plan &p, const Rows &rows,
                          const kda_lanes_of_call &lanes, const place &c, int warp,
                          delivery &last, leader &tickets)
{
    if (warp == LEADS) tickets.ask(p);
    last.announce(p, *c.after(ITEMS - 1)); /* whose place the next but one takes */
    if (warp == LOOKS_AHEAD) prefetch_chunk(a, rows, *c.after(1));
    if (warp == LEADS) tickets.put(a, p, lanes, *c.after(ITEMS - 1));
}

/* `warp`, the group's, is known to be the same for all lanes: where it decides, there is nothing to
 * part and to join again. */
template <kl_gate kind, class Rows>
__device__ void prepare_chunks(const kda_arguments &a, const kda_plan &p, const Rows &rows,
                               const kda_lanes_of_call &lanes, int group, int warp,
                               prepare_memory &m)
{
    delivery last;
    leader tickets;
    /* M's octets above the diagonal stay zero. */
    for (int i = threadIdx.x % GROUP; i < KDA_TOKENS * KDA_TOKENS / 2; i += GROUP)
        reinterpret_cast<uint32_t *>(m.chunk.M)[i] = 0;
    if (warp == LEADS)
        for (int i = 0; i < ITEMS - 1; i++)
            tickets.ask(p), tickets.put(a, p, lanes, m.items[i]);
    group_barrier(group);
    place c(m);
    for (;;) {
        for (; c->tokens > 0; c.next()) { /* tickets without a chunk lie behind this loop */
            prepare_chunk<kind>(a, p, rows, lanes, c, group, warp, m, last, tickets);
            if (warp == LEADS) {
                group_barrier(group);
                if (ALL_SPEAK || lane_id() == 0) last.send(p, *c, m);
            } else
                group_barrier(group);
            if (ALL_SPEAK) __syncwarp(); /* all have read c, whose place one lane fills */
        }
        if (c->tokens < 0) break;
        pass_over(a, p, rows, lanes, c, warp, last, tickets);
        group_barrier(group);
        if (ALL_SPEAK) __syncwarp();
        c.next();
    }
    last.announce(p, *c.after(ITEMS - 1));
}

} // namespace kda

#endif
