/*
 * route.cuh -- a warp chooses a token's experts, from up to 256 in one group, from registers: what
 * moe_route.cu shares with the kernels of a token's experts, which choose for themselves.
 *
 * What is chosen by are integers in the order of the floats. Each lane puts its own in order, so
 * that a choice is the largest of the lanes' best: what a choice waits for is all of its time.
 */
#ifndef KL_CUDA_DEVICE_ROUTE_H
#define KL_CUDA_DEVICE_ROUTE_H

#include "../cuda_backend.h"
#include "math.cuh"
#include "warp.cuh"

constexpr int LANE_EXPERTS = 8, FEW_EXPERTS = LANE_EXPERTS * WARP;
constexpr unsigned TAKEN = 0;       /* below the key of every float */
constexpr float SUM_FLOOR = 1e-20f; /* ops.h, under `renormalize` */

struct route_rule {
    const float *bias; /* [E], or null */
    int E, top_k;
    kl_score score;
    float scaling;
    bool renormalize;
};

/* Unsigned numbers in the order of the floats, NaN at the top with +infinity, zeros equal. */
__device__ inline unsigned key_of(float x)
{
    if (!(x == x)) x = INFINITY;
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* A lane's experts, e = number(i), each with what it is chosen by. Of equal ones the lowest number
 * comes first. */
struct lane_keys {
    unsigned key[LANE_EXPERTS], name[LANE_EXPERTS]; /* ~e */

    __device__ static int number(int i) { return i * WARP + lane_id(); }

    __device__ void set(int i, unsigned chosen_by)
    {
        key[i] = chosen_by, name[i] = ~static_cast<unsigned>(number(i));
    }

    /* No two are equal. */
    __device__ unsigned long long rank(int i) const
    {
        return static_cast<unsigned long long>(key[i]) << 32 | name[i];
    }

    __device__ void order(int i, int j)
    {
        const bool swap = rank(i) < rank(j);
        const unsigned k = key[i], n = name[i];
        key[i] = swap ? key[j] : k, name[i] = swap ? name[j] : n;
        key[j] = swap ? k : key[j], name[j] = swap ? n : name[j];
    }

    /* The best first: a network of 19 exchanges. */
    __device__ void sort()
    {
        static_assert(LANE_EXPERTS == 8);
        constexpr int PAIRS[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6},
                                      {3, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}, {2, 4}, {3, 5},
                                      {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
        for (int p = 0; p < 19; p++) order(PAIRS[p][0], PAIRS[p][1]);
    }

    __device__ void drop_first()
    {
#pragma unroll
        for (int i = 0; i + 1 < LANE_EXPERTS; i++) key[i] = key[i + 1], name[i] = name[i + 1];
        key[LANE_EXPERTS - 1] = TAKEN;
    }

    /* Of sorted keys: out of the choice with the warp's best, whose number its lane writes. The next
     * choice waits for a reduction and a vote alone, and where lanes' best are equal for two of
     * each. */
    __device__ void take_best(int *to)
    {
        const unsigned best = __reduce_max_sync(ALL_LANES, key[0]);
        unsigned whose = __ballot_sync(ALL_LANES, key[0] == best);
        if ((whose & (whose - 1)) != 0) {
            const unsigned first = __reduce_max_sync(ALL_LANES, key[0] == best ? name[0] : 0u);
            whose = __ballot_sync(ALL_LANES, key[0] == best && name[0] == first);
        }
        if (whose != 1u << lane_id()) return;
        *to = static_cast<int>(~name[0]);
        drop_first();
    }
};

/* The numbers of the top_k <= 32 best in order, to the warp's shared memory; lane j gets that of
 * choice j. Little code: it comes from memory for every call. */
__device__ inline int choose_numbers(lane_keys &keys, int top_k, int *numbers)
{
    keys.sort();
#pragma unroll 1
    for (int j = 0; j < top_k; j++) keys.take_best(numbers + j);
    __syncwarp();
    return lane_id() < top_k ? numbers[lane_id()] : 0;
}

/* The weight of choice j in lane j, which has its score; their sum is taken in that order. */
__device__ inline float weight_of(const route_rule &r, float score)
{
    float sum = 0;
#pragma unroll 1
    for (int j = 0; j < r.top_k; j++) sum += __shfl_sync(ALL_LANES, score, j);
    const float whole = r.renormalize ? sum + SUM_FLOOR : 1.0f;
    return score / whole * r.scaling;
}

/* The choices and their weights; lane j gets both of choice j. score_of(e), called by all lanes, is
 * the score of each lane's e. */
struct expert_choice {
    int id;
    float weight;
};

template <class Score>
__device__ expert_choice choose_experts(lane_keys &keys, const route_rule &r, Score score_of,
                                        int *numbers)
{
    const int mine = choose_numbers(keys, r.top_k, numbers);
    return {mine, weight_of(r, score_of(mine))};
}

#endif
