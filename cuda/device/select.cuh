/*
 * select.cuh -- finding places in the falling order of a long row without sorting it.
 *
 * The order: larger value first, lower id on a tie, NaN last. It is the rising order of 64-bit
 * numbers, the value's bits inverted above, the id below, so no two entries are equal. A place
 * is found by its leading digits, 12 bits at a time: a pass over the row counts the entries of
 * each next digit, and their mass if they have one. What is left after two or three passes fits
 * a list, which is sorted.
 *
 * Masses are integers, and integers add up to the same in any order: which thread came first
 * can be seen in no result. A cluster of RANKS blocks shares a row, each with every RANKS-th
 * piece of it, in memory or, for many passes, in shared memory; all of them come to the same result.
 */
#ifndef KL_CUDA_DEVICE_SELECT_H
#define KL_CUDA_DEVICE_SELECT_H

#include "warp.cuh"

#include <cooperative_groups.h>
#include <stdint.h>

#ifdef KL_RACECHECK
constexpr int RANKS = 2; /* racecheck takes six times as long for eight */
#else
constexpr int RANKS = 8; /* the largest cluster that every device accepts */
#endif
constexpr int SELECT_THREADS = 1024;
constexpr int SELECT_WARPS = SELECT_THREADS / WARP;
constexpr int BATCH = 4; /* loads in flight a thread */
constexpr int DIGIT_BITS = 12, BINS = 1 << DIGIT_BITS, BINS_A_THREAD = BINS / SELECT_THREADS;
constexpr int LIST = SELECT_THREADS; /* an entry a thread; at least 256 + 2^4 */
constexpr uint64_t NO_ENTRY = ~0ull;

struct tally {
    uint64_t mass;
    uint32_t count;
};

/* Entries whose leading bits, all above `shift`, are `prefix`. */
struct place {
    uint64_t prefix;
    int shift;
    tally before, within;
};

struct find_result {
    uint64_t mass; /* of the entry and all before it */
    int id;
};

struct select_shared {
    /* Of each digit; low and high are the halves of a mass. */
    alignas(16) uint32_t low[BINS], high[BINS], count[BINS];
    uint64_t part[LIST], list[LIST];
    tally warps[SELECT_WARPS];
    uint64_t slots[SELECT_WARPS + 1];
    place crossing;
    find_result hit;
    uint32_t listed;
};

__device__ inline cooperative_groups::cluster_group cluster()
{
    return cooperative_groups::this_cluster();
}

template <class T> __device__ const T *shared_of(const T *mine, int rank)
{
    return cluster().map_shared_rank(mine, rank);
}

__device__ inline bool is_first_rank()
{
    return cluster().block_rank() == 0;
}

/* ---- the order -------------------------------------------------------------------------- */

__device__ inline uint64_t order_of(float value, uint32_t id)
{
    const uint32_t bits = __float_as_uint(value + 0.0f); /* one zero: -0 + 0 = +0 */
    uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    if (value != value) rising = 0;
    return static_cast<uint64_t>(~rising) << 32 | id;
}

__device__ inline int id_of(uint64_t order)
{
    return static_cast<int>(order & 0xffffffffu);
}

__device__ inline float value_of(uint64_t order)
{
    const uint32_t rising = ~static_cast<uint32_t>(order >> 32);
    return __uint_as_float(rising & 0x80000000u ? rising & 0x7fffffffu : ~rising);
}

/* ---- the cluster ------------------------------------------------------------------------ */

/* This block's part of a row: pieces of SELECT_THREADS values, `step` apart. */
struct row_part {
    const float *values;
    uint32_t step, n; /* n: values of the whole row, below 2^31 */
};

__device__ inline uint32_t first_of_part()
{
    return cluster().block_rank() * SELECT_THREADS;
}

__device__ inline row_part part_of(const float *row, int64_t n)
{
    return {row + first_of_part(), RANKS * SELECT_THREADS, static_cast<uint32_t>(n)};
}

/* Values of the largest part of a row of n. */
__host__ __device__ inline int64_t part_values(int64_t n)
{
    return (n + RANKS * SELECT_THREADS - 1) / (RANKS * SELECT_THREADS) * SELECT_THREADS;
}

/* f(i, row[i], true) for this block's part of the row; values are a thread's own, so that it
 * reads back what it copied itself. Whole warps call f together; past the end they do with
 * false. */
template <class F> __device__ void for_each(const row_part &part, F f)
{
    constexpr uint32_t pitch = RANKS * SELECT_THREADS;
    const float *at = part.values + threadIdx.x;
    for (uint32_t start = first_of_part(); start < part.n; start += BATCH * pitch) {
        float x[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const uint32_t i = start + j * pitch + threadIdx.x;
            x[j] = i < part.n ? *at : 0.0f;
            at += part.step;
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            const uint32_t i = start + j * pitch + threadIdx.x;
            f(i, x[j], i < part.n);
        }
    }
}

/* The part in shared memory, of part_values(n), from wait_for_part() on. All its loads are on their
 * way at once. */
__device__ inline row_part copy_part(const row_part &part, float *shared)
{
    const row_part copy = {shared, SELECT_THREADS, part.n};
    const float *from = part.values + threadIdx.x;
    float *to = shared + threadIdx.x;
    for (uint32_t i = first_of_part() + threadIdx.x; i < part.n;
         i += RANKS * SELECT_THREADS, from += part.step, to += copy.step)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                         static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                     "l"(from)
                     : "memory");
    return copy;
}

__device__ inline void wait_for_part()
{
    asm volatile("cp.async.wait_all;" ::: "memory");
}

/* Over all threads of the cluster, in one order; T has 4 or 8 bytes. */
template <class T, class Op> __device__ T cluster_reduce(T x, Op op, select_shared &s)
{
    T *slots = reinterpret_cast<T *>(s.slots);
#pragma unroll
    for (int d = WARP / 2; d > 0; d /= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, d));
    if (lane_id() == 0) slots[warp_id()] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < SELECT_WARPS; w++) x = op(x, slots[w]);
        slots[SELECT_WARPS] = x;
    }
    cluster().sync();
    x = *shared_of(&slots[SELECT_WARPS], 0);
    for (int r = 1; r < RANKS; r++) x = op(x, *shared_of(&slots[SELECT_WARPS], r));
    cluster().sync();
    return x;
}

/* ---- tallies ---------------------------------------------------------------------------- */

__device__ inline tally plus(tally a, tally b)
{
    return {a.mass + b.mass, a.count + b.count};
}

__device__ inline bool reaches(tally t, tally need)
{
    return t.count >= need.count || t.mass >= need.mass;
}

/* The sum over the threads of the block before this one. */
__device__ inline tally sum_before(tally x, select_shared &s)
{
    tally sum = x;
#pragma unroll
    for (int d = 1; d < WARP; d *= 2) {
        const tally up = {__shfl_up_sync(ALL_LANES, sum.mass, d),
                          __shfl_up_sync(ALL_LANES, sum.count, d)};
        if (lane_id() >= d) sum = plus(sum, up);
    }
    if (lane_id() == WARP - 1) s.warps[warp_id()] = sum;
    __syncthreads();
    tally before = {sum.mass - x.mass, sum.count - x.count};
    for (int w = 0; w < warp_id(); w++) before = plus(before, s.warps[w]);
    __syncthreads();
    return before;
}

/* Shared memory adds 32 bits at a time: the lower half tells when it wrapped. */
__device__ inline void add_to_bin(select_shared &s, uint32_t bin, tally t)
{
    atomicAdd(&s.count[bin], t.count);
    if (t.mass == 0) return;
    const uint32_t low = static_cast<uint32_t>(t.mass);
    const uint32_t old = atomicAdd(&s.low[bin], low);
    const uint32_t high = static_cast<uint32_t>(t.mass >> 32) + (old + low < old);
    if (high != 0) atomicAdd(&s.high[bin], high);
}

/* Called by whole warps. Where all of one has the same digit, as in a row of ties, they add
 * once: 32 additions to one address would wait for each other. */
__device__ inline void add_member(select_shared &s, bool member, uint32_t bin, uint64_t mass)
{
    const uint32_t members = __ballot_sync(ALL_LANES, member);
    if (members == 0) return;
    const int leader = __ffs(members) - 1;
    const uint32_t common = __shfl_sync(ALL_LANES, bin, leader);
    if (__all_sync(ALL_LANES, !member || bin == common)) {
        uint64_t sum = member ? mass : 0;
#pragma unroll
        for (int d = WARP / 2; d > 0; d /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, d);
        if (lane_id() == leader)
            add_to_bin(s, common, {sum, static_cast<uint32_t>(__popc(members))});
    } else if (member) {
        add_to_bin(s, bin, {mass, 1});
    }
}

/* ---- passes over the row ---------------------------------------------------------------- */

/* A Row has its `part`, order(i, value) and mass(order). */

template <class Row>
__device__ __noinline__ void count_digits(const Row &row, const place &p, select_shared &s)
{
    for (int b = threadIdx.x; b < BINS; b += SELECT_THREADS)
        s.low[b] = s.high[b] = s.count[b] = 0;
    __syncthreads();
    for_each(row.part, [&](uint32_t i, float value, bool inside) {
        const uint64_t order = inside ? row.order(i, value) : NO_ENTRY;
        const bool member = inside && (p.shift == 64 || order >> p.shift == p.prefix);
        const uint32_t digit = order >> (p.shift - DIGIT_BITS) & (BINS - 1);
        add_member(s, member, digit, member ? row.mass(order) : 0);
    });
    cluster().sync();
}

/* This thread's bins, BINS_A_THREAD neighbours, over the cluster. */
__device__ inline void read_bins(const select_shared &s, tally (&bins)[BINS_A_THREAD])
{
    static_assert(BINS_A_THREAD == 4, "a uint4 of each array");
    const int at = 4 * threadIdx.x;
#pragma unroll
    for (int b = 0; b < 4; b++) bins[b] = {0, 0};
#pragma unroll 2
    for (int r = 0; r < RANKS; r++) {
        const uint4 low = *reinterpret_cast<const uint4 *>(shared_of(&s.low[at], r));
        const uint4 high = *reinterpret_cast<const uint4 *>(shared_of(&s.high[at], r));
        const uint4 count = *reinterpret_cast<const uint4 *>(shared_of(&s.count[at], r));
        bins[0] = plus(bins[0], {static_cast<uint64_t>(high.x) << 32, count.x});
        bins[1] = plus(bins[1], {static_cast<uint64_t>(high.y) << 32, count.y});
        bins[2] = plus(bins[2], {static_cast<uint64_t>(high.z) << 32, count.z});
        bins[3] = plus(bins[3], {static_cast<uint64_t>(high.w) << 32, count.w});
        bins[0].mass += low.x, bins[1].mass += low.y;
        bins[2].mass += low.z, bins[3].mass += low.w;
    }
}

/* The digit in which the tally of all entries up to there first reaches `need`. */
__device__ __noinline__ inline place find_digit(const place &from, tally need, select_shared &s)
{
    const int first = threadIdx.x * BINS_A_THREAD;
    tally bins[BINS_A_THREAD], sum = {0, 0};
    read_bins(s, bins);
#pragma unroll
    for (int b = 0; b < BINS_A_THREAD; b++) sum = plus(sum, bins[b]);
    tally before = plus(from.before, sum_before(sum, s));
    bool passed = reaches(before, need);
#pragma unroll
    for (int b = 0; b < BINS_A_THREAD; b++) {
        const tally after = plus(before, bins[b]);
        if (!passed && reaches(after, need)) {
            const uint64_t prefix = from.shift == 64 ? 0 : from.prefix << DIGIT_BITS;
            s.crossing = {prefix | static_cast<uint32_t>(first + b), from.shift - DIGIT_BITS,
                          before, bins[b]};
            passed = true;
        }
        before = after;
    }
    cluster().sync(); /* the others may still be reading these bins */
    return s.crossing;
}

/* The place where `need` is reached, with so few entries that they fit the list; `from_start`:
 * together with all before it. The row as a whole must reach it. */
template <class Row>
__device__ place narrow(const Row &row, tally need, bool from_start, select_shared &s)
{
    place p = {0, 64, {0, 0}, {0, static_cast<uint32_t>(row.part.n)}};
    while (p.within.count + (from_start ? p.before.count : 0) > LIST) {
        count_digits(row, p, s);
        p = find_digit(p, need, s);
    }
    return p;
}

/* Sort an entry a thread: thread t gets entry t of the block. */
__device__ inline uint64_t sort_entries(uint64_t mine, select_shared &s)
{
    const int t = threadIdx.x;
    for (int run = 2; run <= LIST; run *= 2)
        for (int d = run / 2; d > 0; d /= 2) {
            uint64_t other;
            if (d < WARP) {
                other = __shfl_xor_sync(ALL_LANES, mine, d);
            } else {
                s.list[t] = mine;
                __syncthreads();
                other = s.list[t ^ d];
                __syncthreads();
            }
            const bool rising = (t & run) == 0, lower = (t & d) == 0;
            const bool take = rising == lower ? other < mine : other > mine;
            if (take) mine = other;
        }
    return mine;
}

/* The entries of a place in their order, one a thread, NO_ENTRY behind them. */
template <class Row>
__device__ __noinline__ uint64_t list_entries(const Row &row, const place &p, bool from_start,
                                              select_shared &s)
{
    if (threadIdx.x == 0) s.listed = 0;
    __syncthreads();
    for_each(row.part, [&](uint32_t i, float value, bool inside) {
        const uint64_t order = inside ? row.order(i, value) : NO_ENTRY;
        const uint64_t prefix = p.shift == 64 ? 0 : order >> p.shift;
        if (inside && (from_start ? prefix <= p.prefix : prefix == p.prefix))
            s.part[atomicAdd(&s.listed, 1u)] = order;
    });
    cluster().sync();
    uint64_t mine = NO_ENTRY;
    int begin = 0;
    for (int r = 0; r < RANKS; r++) {
        const int at = static_cast<int>(threadIdx.x) - begin;
        const int listed = static_cast<int>(*shared_of(&s.listed, r));
        if (at >= 0 && at < listed) mine = *shared_of(&s.part[at], r);
        begin += listed;
    }
    cluster().sync();
    return sort_entries(mine, s);
}

/* ---- what kernels ask for --------------------------------------------------------------- */

/* The first entry at which the tally of it and all before it reaches `need`, both at least 1.
 * The row as a whole must reach it. */
template <class Row> __device__ find_result find(const Row &row, tally need, select_shared &s)
{
    const place p = narrow(row, need, false, s);
    const uint64_t order = list_entries(row, p, false, s);
    tally here = {0, 0};
    if (order != NO_ENTRY) here = {row.mass(order), 1};
    const tally before = plus(p.before, sum_before(here, s)), after = plus(before, here);
    if (!reaches(before, need) && reaches(after, need)) s.hit = {after.mass, id_of(order)};
    __syncthreads();
    const find_result hit = s.hit;
    __syncthreads();
    return hit;
}

struct plain_row {
    row_part part;
    static __device__ uint64_t order(uint32_t i, float value) { return order_of(value, i); }
    static __device__ uint64_t mass(uint64_t) { return 0; }
};

/* The first `count` entries (at most 256), best first: thread t < count holds entry t. */
__device__ inline uint64_t find_best(const row_part &part, int count, select_shared &s)
{
    const plain_row row = {part};
    const tally need = {~0ull, static_cast<uint32_t>(count)};
    const place p = narrow(row, need, true, s);
    return list_entries(row, p, true, s);
}

#endif
