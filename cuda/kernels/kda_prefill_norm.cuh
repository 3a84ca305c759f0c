/*
 * kda_prefill_norm.cuh -- the output of a head of two tiles with gated_rms_norm in it:
 *
 *     out = o / sqrt(mean(o^2) + eps) * weight * sigmoid(z), o rounded to bf16 before
 *
 * The output warps leave o in shared memory and go on: if they waited for a gate or a word, so
 * would the chain. A warpgroup of its own finishes outputs, each warp its own tokens.
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

constexpr int PIECES = KDA_V_TILE / 8;     /* of a token's outputs, 16 bytes each, a lane one */
constexpr int ABREAST = GROUP / PIECES;    /* tokens at once */
constexpr int RUNS = KDA_TOKENS / ABREAST; /* of a lane      */

struct alignas(16) norm_memory {
    float weight[KDA_V_TILE]; /* of the tile's columns */
};

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

/* Outputs of a chunk on their way, a lane's pieces of its tokens. */
struct unfinished {
    uint4 o[RUNS];
    float sum[RUNS]; /* of the tile's squares of their tokens */
    int row, column; /* of the lane's first piece, in the call's outputs */
    int left;        /* tokens of the chunk from that row on             */
};

/* What else it needs, which the L2 has: the other tile's words, perhaps not there yet, and gates.
 * Asked for after the loop has closed: ptxas waits there for what is under way. */
struct asked {
    uint64_t sums[RUNS];
    uint4 z[RUNS];
};

struct finisher {
    const scanner &s;
    const kda_norm &norm;
    norm_memory &own;

    /* All pieces of a token are the warp's: its sums need no barrier between warps. The lane's
     * first token; the next lies ABREAST further. */
    __device__ static int piece() { return threadIdx.x % PIECES; }
    __device__ static int token() { return threadIdx.x % GROUP / PIECES; }

    __device__ uint64_t *word(int tile, unsigned count) const
    {
        const unsigned place = (s.pair * 2 + tile) * KDA_SUMS_KEPT + count % KDA_SUMS_KEPT;
        return norm.sums + place * KDA_TOKENS + token();
    }

    /* Of chunk number `count`. */
    __device__ void ask(asked &x, const unfinished &u, unsigned count) const
    {
        const uint64_t *sums = word(1 - s.tile, count);
        const bf16 *z = norm.z + u.row * norm.z_stride + u.column;
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            x.sums[i] = read_word(sums + i * ABREAST);
            if (i * ABREAST < u.left)
                x.z[i] =
                    __ldcs(reinterpret_cast<const uint4 *>(z + i * ABREAST * norm.z_stride));
        }
    }

    /* The tile's sums of squares, in gated_rms_norm's order: from those of 8 values up. */
    __device__ void add_squares(unfinished &u, unsigned count) const
    {
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            float x[8];
            unpack(u.o[i], x);
            u.sum[i] = sum_of_neighbours<PIECES>(sum_of_squares(x));
        }
        uint64_t *to = word(s.tile, count);
        if (piece() > 0) return;
#pragma unroll
        for (int i = 0; i < RUNS; i++)
            write_word(to + i * ABREAST,
                       static_cast<uint64_t>(count + 1) << 32 | __float_as_uint(u.sum[i]));
    }

    /* Chunk number `count`, from its first token on, once the output warps have left it. */
    __device__ void begin(unfinished &u, scan_memory &m, const walk &at, int first,
                          unsigned count) const
    {
        barrier_wait(&m.has_output, count % 2);
#pragma unroll
        for (int i = 0; i < RUNS; i++)
            u.o[i] =
                *reinterpret_cast<const uint4 *>(&m.output[token() + i * ABREAST][8 * piece()]);
        warp_arrive(&m.took_output);
        add_squares(u, count);
        u.row = first + token();
        u.column = at.h * KDA_NORM_V + s.tile * KDA_V_TILE + 8 * piece();
        u.left = at.tokens_here() - token();
    }

    /* By all lanes: else ptxas takes the warp for parted, and keeps its count in registers. */
    __device__ void wait_for_sums(asked &x, unsigned count) const
    {
#pragma unroll
        for (int i = 0; i < RUNS; i++)
            while (__any_sync(ALL_LANES, x.sums[i] >> 32 != count + 1))
                x.sums[i] = read_word(word(1 - s.tile, count) + i * ABREAST);
    }

    __device__ void finish(const unfinished &u, asked &in, unsigned count) const
    {
        wait_for_sums(in, count);
        const long long stride = s.a.H * KDA_NORM_V;
        bf16 *to = static_cast<bf16 *>(s.a.out) + u.row * stride + u.column;
        float weight[8];
        load_wide(&own.weight[8 * piece()], weight);
        vec<bf16, 8> out[RUNS];
#pragma unroll
        for (int i = 0; i < RUNS; i++) {
            const float sum = u.sum[i] + __uint_as_float(static_cast<uint32_t>(in.sums[i]));
            const float factor = norm_factor<bf16>(sum, KDA_NORM_V, norm.eps);
            float x[8], z[8];
            unpack(u.o[i], x), unpack(in.z[i], z);
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[j] = gated(x[j], factor, weight[j], norm_gate<bf16>(z[j]));
            out[i] = rounded<bf16>(x);
        }
#pragma unroll
        for (int i = 0; i < RUNS; i++)
            if (i * ABREAST < u.left)
                __stcs(reinterpret_cast<uint4 *>(to + i * ABREAST * stride),
                       *reinterpret_cast<const uint4 *>(&out[i]));
    }
};

/* The first token of a chunk, given that of the chunk before. */
__device__ inline int first_token(const scanner &s, const walk &at, int before)
{
    if (!at.valid) return 0;
    return at.chunk > 0 ? before + KDA_TOKENS : static_cast<int>(at.token(s));
}

/* All that the output warps leave. A word is written again KDA_SUMS_KEPT chunks later, by a warp
 * that has finished its tokens of the chunk before the last; the other block's had handed over that
 * one's sums, and so had finished two chunks before it: it has read the word. */
__device__ inline void finish_chunks(const scanner &s, const kda_norm &norm, scan_memory &m,
                                     norm_memory &own)
{
    static_assert(KDA_SUMS_KEPT >= 4);
    const finisher f{s, norm, own};
    const int i = threadIdx.x % GROUP;
    if (i < KDA_V_TILE) own.weight[i] = norm.weight[s.tile * KDA_V_TILE + i];
    group_barrier(warp_id() / PREPARERS);
    unfinished before, now;
    asked in = {};
    unsigned count = 0;
    walk at(s);
    /* Found before `in` is asked for: who waits for a token would wait for that as well. */
    for (int first = first_token(s, at, 0); at.valid;
         first = first_token(s, at, first), count++) {
        if (count > 0) f.ask(in, before, count - 1);
        f.begin(now, m, at, first, count);
        if (count > 0) f.finish(before, in, count - 1);
        before = now;
        at.next(s);
    }
    if (count == 0) return;
    f.ask(in, before, count - 1);
    f.finish(before, in, count - 1);
}

} // namespace kda

#endif
