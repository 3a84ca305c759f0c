/*
 * route.cuh -- a warp chooses a token's experts, from up to 256 in one group, from registers: what
 * moe_route.cu shares with the kernels of a token's experts, which choose for themselves.
 *
 * What is chosen by are integers in the order of the floats.
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

/* What a lane's experts, e = number(i), are chosen by. Of equal ones the lowest number comes first. */
struct lane_keys {
    unsigned key[LANE_EXPERTS];

    __device__ static int number(int i) { return i * WARP + lane_id(); }

    /* Out of the choice with the warp's best: its number, in all lanes. */
    __device__ int take_best()
    {
        unsigned most[LANE_EXPERTS];
        int at[LANE_EXPERTS];
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) most[i] = key[i], at[i] = i;
#pragma unroll
        for (int d = 1; d < LANE_EXPERTS; d *= 2)
#pragma unroll
            for (int i = 0; i < LANE_EXPERTS; i += 2 * d)
                if (most[i + d] > most[i]) most[i] = most[i + d], at[i] = at[i + d];
        const unsigned best = __reduce_max_sync(ALL_LANES, most[0]);
        const int own = most[0] == best ? number(at[0]) : FEW_EXPERTS;
        const int first = __reduce_min_sync(ALL_LANES, own);
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++)
            if (number(i) == first) key[i] = TAKEN;
        return first;
    }
};

/* The numbers of the top_k <= 32 best in order: lane j gets that of choice j. Little code: it comes from
 * memory for every call. */
__device__ inline int choose_numbers(lane_keys &keys, int top_k)
{
    int mine = 0;
#pragma unroll 1
    for (int j = 0; j < top_k; j++) {
        const int best = keys.take_best();
        if (lane_id() == j) mine = best;
    }
    return mine;
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
__device__ expert_choice choose_experts(lane_keys &keys, const route_rule &r, Score score_of)
{
    const int mine = choose_numbers(keys, r.top_k);
    return {mine, weight_of(r, score_of(mine))};
}

#endif
