/*
 * kda_prefill_norm.cuh -- the output of a head of two tiles with gated_rms_norm in it:
 *
 *     out = o / sqrt(mean(o^2) + eps) * weight * sigmoid(z), o rounded to bf16 before
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

/* Shared memory of the output warps. Squares of two chunks: a barrier lies between a warp's reading
 * of one's and any warp's writing of the next but one's. */
struct alignas(16) norm_memory {
    float squares[2][KDA_TOKENS][SCANNERS]; /* each warp's sum of a token's */
    float weight[KDA_V_TILE];
};

__device__ inline void write_word(uint64_t *p, uint64_t x)
{
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
}

/* Outputs of a chunk on their way. A warp has 16 columns, a lane 8 of them of two tokens. */
struct unfinished {
    uint4 o[2];
    float sum;     /* of the tile's squares of token lane_id()          */
    const bf16 *z; /* the lane's columns of the chunk's first token     */
    bf16 *out;
    int tokens;
};

/* What else it needs, which the L2 has: asked for a little ahead. In registers any earlier, it
 * would be moved to others, and so waited for, before the next products. */
struct asked {
    uint64_t sum; /* the other tile's, perhaps not there yet */
    uint4 z[2];
};

struct finisher {
    const scanner &s;
    const kda_norm &norm;
    norm_memory &m;
    output_tile &output;
    int w;

    /* Of the tile; in the chunk. */
    __device__ int column() const { return w * ROWS + lane_id() % 2 * 8; }
    __device__ int token(int i) const { return i * (KDA_TOKENS / 2) + lane_id() / 2; }

    /* A token a lane. */
    __device__ uint64_t *word(int tile, unsigned count) const
    {
        const unsigned place = (s.pair * 2 + tile) * KDA_SUMS_KEPT + count % KDA_SUMS_KEPT;
        return norm.sums + place * KDA_TOKENS + lane_id();
    }

    /* Of chunk number `count`. */
    __device__ asked ask(const unfinished &u, unsigned count) const
    {
        asked x = {load_here(word(1 - s.tile, count)), {}};
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (token(i) < u.tokens)
                x.z[i] =
                    __ldcs(reinterpret_cast<const uint4 *>(u.z + token(i) * norm.z_stride));
        return x;
    }

    /* The tile's sums of squares, in gated_rms_norm's order: from those of 8 values up. */
    __device__ void add_squares(unfinished &u, unsigned count) const
    {
        float sums[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x[8];
            unpack(u.o[i], x);
            sums[i] = sum_of_squares(x);
        }
        const int i = lane_id() % 2;
        const float other = __shfl_xor_sync(ALL_LANES, i == 0 ? sums[1] : sums[0], 1);
        float(&parts)[KDA_TOKENS][SCANNERS] = m.squares[count % 2];
        parts[token(i)][w] = (i == 0 ? sums[0] : sums[1]) + other;
        group_barrier(warp_id() / PREPARERS);
        float x[SCANNERS];
        load_floats(parts[lane_id()], x);
        u.sum = (x[0] + x[1]) + (x[2] + x[3]);
    }

    /* Chunk number `count`, from its first token on, rounded and transposed by way of shared
     * memory. */
    __device__ void begin(unfinished &u, const token_sums &out, const walk &at, int first,
                          unsigned count)
    {
        put_output(out, output, w * ROWS);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++)
            u.o[i] = *reinterpret_cast<const uint4 *>(&output[token(i)][column()]);
        add_squares(u, count);
        if (w == 0)
            write_word(word(s.tile, count),
                       static_cast<uint64_t>(count + 1) << 32 | __float_as_uint(u.sum));
        const int own = at.h * KDA_NORM_V + s.tile * KDA_V_TILE + column();
        u.tokens = at.tokens_here();
        u.z = norm.z + first * norm.z_stride + own;
        u.out = static_cast<bf16 *>(s.a.out) + first * s.a.H * KDA_NORM_V + own;
    }

    __device__ void finish(const unfinished &u, asked in, unsigned count) const
    {
        /* By all lanes: else ptxas takes the warp for parted, and keeps its count in registers. */
        while (__any_sync(ALL_LANES, in.sum >> 32 != count + 1))
            in.sum = load_here(word(1 - s.tile, count));
        const float sum = u.sum + __uint_as_float(static_cast<uint32_t>(in.sum));
        const float factor = norm_factor<bf16>(sum, KDA_NORM_V, norm.eps);
        float weight[8];
        load_wide(&m.weight[column()], weight);
        vec<bf16, 8> out[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float its = __shfl_sync(ALL_LANES, factor, token(i));
            float x[8], z[8];
            unpack(u.o[i], x), unpack(in.z[i], z);
#pragma unroll
            for (int j = 0; j < 8; j++)
                x[j] = gated(x[j], its, weight[j], norm_gate<bf16>(z[j]));
            out[i] = rounded<bf16>(x);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (token(i) < u.tokens)
                __stcs(reinterpret_cast<uint4 *>(u.out + token(i) * s.a.H * KDA_NORM_V),
                       *reinterpret_cast<const uint4 *>(&out[i]));
    }
};

/* run_output() with the norm. A word is written again KDA_SUMS_KEPT chunks later, by a block that
 * has finished the chunk before the last; the other had handed over that one's sums, and so had
 * finished two chunks before it: its warps have read the word. */
__device__ inline void run_normed_output(const scanner &s, const kda_norm &norm, int w,
                                         scan_memory &m, norm_memory &own)
{
    static_assert(KDA_SUMS_KEPT >= 4);
    finisher f{s, norm, own, m.output, w};
    const descriptors d(m.stages[0].chunk);
    unfinished before, now;
    const int i = threadIdx.x % GROUP;
    if (i < KDA_V_TILE) own.weight[i] = norm.weight[s.tile * KDA_V_TILE + i];
    unsigned count = 0;
    for (walk at(s); at.valid; at.next(s)) {
        int first = static_cast<int>(at.token(s)); /* reading it each time is a wait */
        /* As in run_chain(), a loop of its own. */
        for (;; at.step(), first += KDA_TOKENS) {
            const unsigned i = count % STAGES;
            token_sums out = {};
            barrier_wait(&m.full[i], count / STAGES % 2);
            make_output(out, d, i, w, count, m);
            warp_arrive(&m.empty[i]);
            asked in = {};
            if (count > 0) in = f.ask(before, count - 1);
            f.begin(now, out, at, first, count);
            if (count > 0) f.finish(before, in, count - 1);
            before = now;
            count++;
            if (at.is_last()) break;
        }
    }
    if (count > 0) f.finish(before, f.ask(before, count - 1), count - 1);
}

} // namespace kda

#endif
