/*
 * kda_prefill_norm.cuh -- the output of a head of two tiles with gated_rms_norm in it:
 *
 *     out = o / sqrt(mean(o^2) + eps) * weight * sigmoid(z), o rounded to bf16 before
 *
 * The output warps leave o in shared memory and go on: whoever made the chain wait for a gate or a
 * store would lengthen its step. Of the warpgroup that brings chunks one warp is enough for that,
 * and three finish outputs, each its own tokens.
 *
 * A token's squares lie in two blocks. Each adds up those of its tile and hands the sum to the
 * other, through the L2: a word holds a sum and the number of its chunk, so that a word is all
 * there is to wait for. A chunk is finished when the next one's sums have been handed over: its
 * own have been on their way for a step of the chain, and its gates, too. Who is behind never
 * waits, for the other block has written what it needs.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_NORM_H
#define KL_CUDA_KERNELS_KDA_PREFILL_NORM_H

#include "../device/gated_norm.cuh"
#include "kda_prefill_scan.cuh"

namespace kda {

static_assert(KDA_NORM_V == 2 * KDA_V_TILE);
static_assert(KDA_SUMS_KEPT >= 4);

constexpr int FINISHERS = PREPARERS - 1; /* warps */
constexpr int PIECES = KDA_V_TILE / 8;   /* of a token's outputs, 16 bytes each, a lane one */
constexpr int ABREAST = WARP / PIECES;   /* tokens of a warp at once: a run */
constexpr int RUNS = KDA_TOKENS / ABREAST, OWN_RUNS = (RUNS + FINISHERS - 1) / FINISHERS;

__device__ inline void write_word(uint64_t *p, uint64_t x)
{
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}

__device__ inline uint64_t read_word(const uint64_t *p)
{
    uint64_t x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
    return x;
}

/* ---- bringing ---------------------------------------------------------------------------- */

/* Gates of the chunk's outputs on their way to the L2, a token a lane. */
__device__ inline void prefetch_gates(const scanner &s, const kda_norm &norm, const walk &at)
{
    if (lane_id() < at.tokens_here())
        prefetch_line(norm.z + (at.token() + lane_id()) * norm.z_stride + at.h * KDA_NORM_V +
                      s.tile * KDA_V_TILE);
}

/* Chunk number `count` has come. */
__device__ inline void wait_until_here(scan_memory &m, unsigned count)
{
    barrier_wait(&m.full[count % STAGES], count / STAGES % 2);
}

/* bring_chunks() by one warp. Two chunks are under way: all but the last one have come when another
 * is asked for; that one as well where there is a gap behind it, for room must be told of before
 * what needs it is waited for. A flag is read while the chunk before it is under way. */
template <bool convolved>
__device__ inline void bring_all(const scanner &s, const kda_norm &norm, scan_memory &m)
{
    walk at(s);
    int slot = slot_of(s, at);
    unsigned count = 0, seen = 0, serial = 0; /* the last chunk's */
    while (at.valid) {
        const unsigned i = count % STAGES;
        const bool follows = count > 0 && at.serial == serial + 1;
        if (count > 1) wait_until_here(m, count - 2);
        if (count > 0 && !follows) wait_until_here(m, count - 1);
        publish(s, at.serial - follows);
        fetch_chunk(s, at, slot, seen, count, m);
        __syncwarp();
        fetch_values(s, at, m.stages[i], &m.full[i]);
        if (!convolved) prefetch_values(s, at);
        prefetch_gates(s, norm, at);
        serial = at.serial, count++;
        at.next(s);
        slot = slot_of(s, at);
        seen = read_flag(&s.p.ready[slot * KDA_FLAG]);
    }
}

/* ---- finishing --------------------------------------------------------------------------- */

/* Outputs of a chunk on their way, a lane's pieces of its tokens. */
struct unfinished {
    uint4 o[OWN_RUNS];
    float sum[OWN_RUNS]; /* of the tile's squares of their tokens */
    const bf16 *z;       /* the lane's piece of the first token   */
    bf16 *out;
    int tokens;
};

/* What else it needs, which the L2 has: the other tile's words, perhaps not there yet, and gates.
 * Asked for after the loop has closed: ptxas waits there for what is under way. */
struct asked {
    uint64_t sums[OWN_RUNS];
    uint4 z[OWN_RUNS];
};

struct finisher {
    const scanner &s;
    const kda_norm &norm;
    int w;
    float weight[8]; /* of the lane's columns */

    __device__ finisher(const scanner &s, const kda_norm &norm, int w) : s(s), norm(norm), w(w)
    {
        load_wide(norm.weight + s.tile * KDA_V_TILE + 8 * piece(), weight);
    }

    __device__ static int piece() { return lane_id() % PIECES; }

    /* The warp's runs and the lane's tokens in them. The last may not be there: its arithmetic is
     * done all the same, beside the others', for a branch would keep them one behind the other. */
    __device__ int run(int i) const { return i * FINISHERS + w; }
    __device__ bool has(int i) const { return run(i) < RUNS; }
    __device__ int token(int i) const { return run(i) * ABREAST + lane_id() / PIECES; }

    /* In a row of outputs or gates. */
    __device__ int column(const walk &at) const
    {
        return at.h * KDA_NORM_V + s.tile * KDA_V_TILE + 8 * piece();
    }

    __device__ uint64_t *word(int tile, unsigned count, int i) const
    {
        const unsigned place = (s.pair * 2 + tile) * KDA_SUMS_KEPT + count % KDA_SUMS_KEPT;
        return norm.sums + place * KDA_TOKENS + token(i);
    }

    /* Of chunk number `count`. */
    __device__ void ask(asked &x, const unfinished &u, unsigned count) const
    {
#pragma unroll
        for (int i = 0; i < OWN_RUNS; i++) {
            if (has(i)) x.sums[i] = read_word(word(1 - s.tile, count, i));
            if (token(i) < u.tokens)
                x.z[i] =
                    __ldcs(reinterpret_cast<const uint4 *>(u.z + token(i) * norm.z_stride));
        }
    }

    /* The tile's sums of squares, in gated_rms_norm's order: from those of 8 values up. */
    __device__ void add_squares(unfinished &u, unsigned count) const
    {
#pragma unroll
        for (int i = 0; i < OWN_RUNS; i++) {
            float x[8];
            unpack(u.o[i], x);
            u.sum[i] = sum_of_neighbours<PIECES>(sum_of_squares(x));
        }
#pragma unroll
        for (int i = 0; i < OWN_RUNS; i++)
            if (has(i) && piece() == 0)
                write_word(word(s.tile, count, i),
                           static_cast<uint64_t>(count + 1) << 32 | __float_as_uint(u.sum[i]));
    }

    /* Chunk number `count`, once the output warps have left it. */
    __device__ void begin(unfinished &u, scan_memory &m, const walk &at, unsigned count) const
    {
        barrier_wait(&m.has_output, count % 2);
#pragma unroll
        for (int i = 0; i < OWN_RUNS; i++)
            u.o[i] = has(i) ? *reinterpret_cast<const uint4 *>(&m.output[token(i)][8 * piece()])
                            : uint4{};
        warp_arrive(&m.took_output);
        add_squares(u, count);
        u.tokens = at.tokens_here();
        u.z = norm.z + at.token() * norm.z_stride + column(at);
        u.out = static_cast<bf16 *>(s.a.out) + at.token() * s.a.H * KDA_NORM_V + column(at);
    }

    __device__ void wait_for_sums(asked &x, unsigned count) const
    {
#pragma unroll
        for (int i = 0; i < OWN_RUNS; i++)
            while (has(i) && __any_sync(ALL_LANES, x.sums[i] >> 32 != count + 1))
                x.sums[i] = read_word(word(1 - s.tile, count, i));
    }

    __device__ void finish(const unfinished &u, asked &in, unsigned count) const
    {
        wait_for_sums(in, count);
#pragma unroll
        for (int i = 0; i < OWN_RUNS; i++) {
            const float sum = u.sum[i] + __uint_as_float(static_cast<uint32_t>(in.sums[i]));
            const float factor = norm_factor<bf16>(sum, KDA_NORM_V, norm.eps);
            float x[8], z[8];
            unpack(u.o[i], x), unpack(in.z[i], z);
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[j] = gated(x[j], factor, weight[j], norm_gate<bf16>(z[j]));
            const vec<bf16, 8> out = rounded<bf16>(x);
            if (token(i) < u.tokens)
                __stcs(reinterpret_cast<uint4 *>(u.out + token(i) * s.a.H * KDA_NORM_V),
                       *reinterpret_cast<const uint4 *>(&out));
        }
    }
};

/* All that the output warps leave. A word is written again KDA_SUMS_KEPT chunks later, by a warp
 * that has finished its tokens of the chunk before the last; the other block's had handed over that
 * one's sums, and so had finished two chunks before it: it has read the word. */
__device__ inline void finish_chunks(const scanner &s, const kda_norm &norm, int w,
                                     scan_memory &m)
{
    const finisher f(s, norm, w);
    unfinished before, now;
    asked in = {};
    unsigned count = 0;
    for (walk at(s); at.valid; at.next(s), count++) {
        if (count > 0) f.ask(in, before, count - 1);
        f.begin(now, m, at, count);
        if (count > 0) f.finish(before, in, count - 1);
        before = now;
    }
    if (count == 0) return;
    f.ask(in, before, count - 1);
    f.finish(before, in, count - 1);
}

/* What the warpgroup of bring_chunks() does with the norm. */
template <bool convolved>
__device__ inline void bring_and_finish(const scanner &s, const kda_norm &norm, int w,
                                        scan_memory &m)
{
    if (w < FINISHERS)
        finish_chunks(s, norm, w, m);
    else
        bring_all<convolved>(s, norm, m);
}

} // namespace kda

#endif
