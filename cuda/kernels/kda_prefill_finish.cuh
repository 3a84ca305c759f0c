/*
 * kda_prefill_finish.cuh -- the gated norm behind the output, for heads of two tiles:
 *
 *     out = o / sqrt(mean(o^2) + eps) * weight * sigmoid(z)
 *
 * Three warps of the block that owns a tile take o from the output warps by way of shared memory.
 * A token's squares lie in two blocks. Eight lanes, each with eight values of it, hand their sums
 * to the same lanes of the other tile's block, through device memory: a word holds a sum and the
 * number of its chunk, so that a word is all there is to wait for. A chunk is finished when the
 * next one's sums have been handed over: by then the other block's have come, mostly.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_FINISH_H
#define KL_CUDA_KERNELS_KDA_PREFILL_FINISH_H

#include "kda_prefill_scan.cuh"

namespace kda {

constexpr int FINISHERS = PREPARERS - 1;
constexpr int FINISHED = 8; /* values of a lane */
constexpr int TOKEN_LANES = KDA_V_TILE / FINISHED;
constexpr int TOKENS_AT_ONCE = WARP / TOKEN_LANES;
constexpr int PASSES = KDA_TOKENS / TOKENS_AT_ONCE;
constexpr int OWN_PASSES = (PASSES + FINISHERS - 1) / FINISHERS;

static_assert(KDA_FINISHED_V == 2 * KDA_V_TILE);
static_assert(KDA_SUMS == KDA_TOKENS * TOKEN_LANES);

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

/* A chunk whose sums have been handed over. A warp's pass i is its i-th four tokens. */
struct unfinished {
    float sum[OWN_PASSES];
    long long token; /* the chunk's first */
    int tokens, h;
    unsigned count; /* of chunks before it */
};

struct finisher {
    const scanner &s;
    scan_memory &m;
    int w; /* of the finishing warps */

    __device__ int column() const { return lane_id() % TOKEN_LANES * FINISHED; }

    /* In the chunk. */
    __device__ int token(int i) const
    {
        return (w + i * FINISHERS) * TOKENS_AT_ONCE + lane_id() / TOKEN_LANES;
    }

    __device__ bool has(int i) const { return w + i * FINISHERS < PASSES; }

    /* The lane's word in what a tile hands over. */
    __device__ uint64_t *word(int tile, unsigned count, int i) const
    {
        const unsigned place = (s.pair * 2 + tile) * KDA_SUMS_KEPT + count % KDA_SUMS_KEPT;
        return s.p.sums + place * KDA_SUMS + token(i) * TOKEN_LANES + lane_id() % TOKEN_LANES;
    }

    __device__ void read_output(unsigned count, int i, float (&x)[FINISHED]) const
    {
        load_wide(&m.outputs[count % OUTPUTS][token(i)][column()], x);
    }

    /* To the bit those of gated_rms_norm. */
    __device__ void hand_over_sums(unfinished &u) const
    {
#pragma unroll
        for (int i = 0; i < OWN_PASSES; i++) {
            if (!has(i)) break;
            float x[FINISHED], sum = 0;
            read_output(u.count, i, x);
#pragma unroll
            for (int j = 0; j < FINISHED; j++) sum = fmaf(x[j], x[j], sum);
            u.sum[i] = sum;
            write_word(word(s.tile, u.count, i),
                       static_cast<uint64_t>(u.count + 1) << 32 | __float_as_uint(sum));
        }
    }

    /* Of all 128 values of a token, in each of its lanes. */
    __device__ float whole_sum(const unfinished &u, int i, uint64_t other) const
    {
        while (other >> 32 != u.count + 1) {
            __nanosleep(40);
            other = read_word(word(1 - s.tile, u.count, i));
        }
        __syncwarp();
        return warp_sum<TOKEN_LANES>(u.sum[i] + __uint_as_float(static_cast<uint32_t>(other)));
    }

    __device__ void read_gates(const unfinished &u, uint4 (&z)[OWN_PASSES]) const
    {
#pragma unroll
        for (int i = 0; i < OWN_PASSES; i++) {
            z[i] = uint4{0, 0, 0, 0};
            if (has(i) && token(i) < u.tokens)
                z[i] = __ldcs(reinterpret_cast<const uint4 *>(
                    s.f.z + (u.token + token(i)) * s.f.z_stride + u.h * KDA_FINISHED_V +
                    s.tile * KDA_V_TILE + column()));
        }
    }

    __device__ void finish(const unfinished &u, const uint4 (&gates)[OWN_PASSES],
                           const float (&weight)[FINISHED]) const
    {
        uint64_t other[OWN_PASSES];
#pragma unroll
        for (int i = 0; i < OWN_PASSES; i++)
            if (has(i)) other[i] = read_word(word(1 - s.tile, u.count, i));
#pragma unroll
        for (int i = 0; i < OWN_PASSES; i++) {
            if (!has(i)) break;
            const float inverse =
                inverse_rms(whole_sum(u, i, other[i]), KDA_FINISHED_V, s.f.eps);
            float x[FINISHED], z[FINISHED];
            read_output(u.count, i, x);
            unpack(gates[i], 1.0f, z);
#pragma unroll
            for (int j = 0; j < FINISHED; j++)
                x[j] = x[j] * inverse * weight[j] * sigmoid(z[j]);
            if (token(i) < u.tokens)
                store_wide(static_cast<bf16 *>(s.a.out) +
                               ((u.token + token(i)) * s.a.H + u.h) * KDA_FINISHED_V +
                               s.tile * KDA_V_TILE + column(),
                           x);
        }
        warp_arrive(&m.took_output[u.count % OUTPUTS]);
    }
};

/* A word is overwritten KDA_SUMS_KEPT chunks later, by who has read the other block's words of
 * two chunks before that; and whoever wrote those had read the word. */
__device__ inline void run_finish(const scanner &s, int w, scan_memory &m)
{
    const finisher f{s, m, w};
    unfinished before = {};
    float weight[FINISHED];
    uint4 gates[OWN_PASSES]; /* asked for before the wait for the next chunk */
    unsigned count = 0;
#pragma unroll
    for (int j = 0; j < FINISHED; j++)
        weight[j] = s.f.weight[s.tile * KDA_V_TILE + f.column() + j];
    for (walk at(s); at.valid; at.next(s), count++) {
        unfinished now = {
            .token = at.token(s), .tokens = at.tokens_here(), .h = at.h, .count = count};
        f.read_gates(before, gates);
        barrier_wait(&m.has_output[count % OUTPUTS], count / OUTPUTS % 2);
        f.hand_over_sums(now);
        if (count > 0) f.finish(before, gates, weight);
        before = now;
    }
    if (count == 0) return;
    f.read_gates(before, gates);
    f.finish(before, gates, weight);
}

} // namespace kda

#endif
