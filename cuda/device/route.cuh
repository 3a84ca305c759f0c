/*
 * route.cuh -- a warp chooses a token's experts, from up to 256 in one group, from registers: what
 * moe_route.cu shares with the kernels of a token's experts, which choose for themselves.
 *
 * What is chosen by are integers in the order of the floats. A choice is two reductions of the
 * warp: the largest of all, and the lowest number that has it.
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

/* A lane's experts, e = number(i). */
struct lane_keys {
    unsigned key[LANE_EXPERTS];

    __device__ static int number(int i) { return i * WARP + lane_id(); }

    /* Out of the choice with the warp's best; its number. */
    __device__ int take_best()
    {
        static_assert(LANE_EXPERTS == 8);
        const unsigned best =
            __reduce_max_sync(ALL_LANES, max(max(max(key[0], key[1]), max(key[2], key[3])),
                                             max(max(key[4], key[5]), max(key[6], key[7]))));
        unsigned lowest = ~0u;
#pragma unroll
        for (int i = LANE_EXPERTS - 1; i >= 0; i--)
            if (key[i] == best) lowest = static_cast<unsigned>(number(i));
        const int e = static_cast<int>(__reduce_min_sync(ALL_LANES, lowest));
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++)
            if (e == number(i)) key[i] = TAKEN;
        return e;
    }
};

/* The top_k <= 32 best in order: lane j gets the number of choice j. Little code: it comes from
 * memory for every call. */
__device__ inline int choose_numbers(lane_keys &keys, int top_k)
{
    int mine = 0;
#pragma unroll 1
    for (int j = 0; j < top_k; j++) {
        const int e = keys.take_best();
        if (j == lane_id()) mine = e;
    }
    return mine;
}

/* And their weights, whose sum is taken in that order. score_of(e), called by all lanes, is the
 * score of each lane's e. */
template <class Score>
__device__ void choose_experts(lane_keys &keys, const route_rule &r, Score score_of, int *ids,
                               float *weights)
{
    const int mine = choose_numbers(keys, r.top_k);
    const float score = score_of(mine);
    float sum = 0;
#pragma unroll 1
    for (int j = 0; j < r.top_k; j++) sum += __shfl_sync(ALL_LANES, score, j);
    const float whole = r.renormalize ? sum + SUM_FLOOR : 1.0f;
    if (lane_id() >= r.top_k) return;
    ids[lane_id()] = mine;
    weights[lane_id()] = score / whole * r.scaling;
}

#endif
