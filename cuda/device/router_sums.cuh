/*
 * router_sums.cuh -- the router's work, done by the product that a layer of experts follows.
 *
 * The logits of a token are router h, h = norm(x), and x is a residual that the product before it
 * has just made. But for its rounding to bf16, h is weight * x / rms(x), so
 *     logits[e] = (sum_i router[e, i] weight[i] x[i]) / rms(x):
 * a sum over the rows of that product. Each of its blocks has some of them and adds their share to
 * the sums of all experts, one a thread; the experts' kernels begin with sums that are complete,
 * and no kernel stands between. Likewise the squares of x, for the rms. What the experts
 * multiply is stored too: weight * x rounded to bf16, as exact as the norm's rounding; their first
 * products are divided by the rms.
 *
 * Blocks add in any order, so they add whole numbers: a share p as round(p 2^32). Up to MOST_BLOCKS
 * shares of up to 2^22 fit in 64 bits, and the sum of so many is off by at most 2^-24 in all, times
 * 1 / rms <= 1 / sqrt(eps): 2e-5 for eps = 1e-5, where x is all zeros, 6e-8 for x of a usual size,
 * which is what float32 rounds. Squares come as two numbers: multiples of 2^-8 up to 2^45 a
 * block, and what is left of them in multiples of 2^-40. A share past these bounds, or one that is
 * infinite or NaN, raises the alarm: then 1 / rms is NaN, and so is all that follows.
 *
 * Behind the sums lies what the first of the experts' kernels makes of them for the second one: the
 * experts chosen, and their weights.
 */
#ifndef KL_CUDA_DEVICE_ROUTER_SUMS_H
#define KL_CUDA_DEVICE_ROUTER_SUMS_H

#include "math.cuh"
#include "types.cuh"
#include "warp.cuh"

#include <stdint.h>

constexpr int SUMMED_EXPERTS = 256; /* a thread each */
constexpr int SHARE_ROWS = 8;       /* of x in a share */
constexpr int64_t MOST_BLOCKS = 511;

constexpr float LEAST_EPS = 1e-6f; /* sums are off by at most 6e-5 of a logit */
constexpr float SHARE_UNIT = 0x1p-32f, MOST_SHARE = 0x1p22f;
constexpr float COARSE_UNIT = 0x1p-8f, FINE_UNIT = 0x1p-40f, MOST_SQUARES = 0x1p45f;

/* Blocks take turns at so many, whose sectors lie in different places of the L2: additions to one
 * sector come one after the other. Every reader reads all of them. */
constexpr int SUM_COPIES = 2;

struct router_sums {
    struct alignas(64) copy {
        unsigned long long logits[SUMMED_EXPERTS]; /* two's complement */
        ulonglong2 squares;                        /* the coarse and the fine sum */
    };
    copy copies[SUM_COPIES];              /* zeros before the first share, */
    alignas(64) unsigned long long alarm; /* as this */
    alignas(64) uint64_t told[WARP];      /* and these: see tell() */
};

/* weight * x [D], behind the sums. */
__host__ __device__ inline bf16 *row_of_sums(router_sums *sums)
{
    return reinterpret_cast<bf16 *>(sums + 1);
}

/* ---- adding ---------------------------------------------------------------------------- */

struct router_work {
    const float *router, *norm_weight; /* [E, D], [D] */
    router_sums *sums;                 /* or null: none is done */
    int E, D;
};

__device__ inline unsigned long long whole_number(float x)
{
    return static_cast<unsigned long long>(__float2ll_rn(x));
}

/* Of rows [first, first + SHARE_ROWS) of x, by blocks of SUMMED_EXPERTS threads or more: thread e
 * has the router's columns of expert e, which may come before x. */
struct router_share {
    float columns[2][SHARE_ROWS / 2];

    __device__ void load(const router_work &r, int first)
    {
        if (r.sums == nullptr || static_cast<int>(threadIdx.x) >= r.E) return;
        const float *const from =
            r.router + int64_t{static_cast<int>(threadIdx.x)} * r.D + first;
#pragma unroll
        for (int i = 0; i < 2; i++) load_floats<4>(from + 4 * i, columns[i]);
    }

    /* Lane l of every warp has row first + l % SHARE_ROWS of x, and the norm's weight of it. */
    __device__ void add(const router_work &r, int first, float x, float weight) const
    {
        const float weighted = x * weight;
        if (threadIdx.x < SHARE_ROWS)
            row_of_sums(r.sums)[first + threadIdx.x] = from_float<bf16>(weighted);
        float share = 0;
#pragma unroll
        for (int i = 0; i < SHARE_ROWS; i++)
            share = fmaf(columns[i / 4][i % 4], __shfl_sync(ALL_LANES, weighted, i), share);
        router_sums::copy &to = r.sums->copies[blockIdx.x % SUM_COPIES];
        if (static_cast<int>(threadIdx.x) < r.E) {
            atomicAdd(&to.logits[threadIdx.x], whole_number(share / SHARE_UNIT));
            if (!(fabsf(share) <= MOST_SHARE)) r.sums->alarm = 1;
        }
        if (warp_id() == SUMMED_EXPERTS / WARP - 1) add_squares(r.sums, to, x);
    }

    /* By one warp. */
    __device__ static void add_squares(router_sums *sums, router_sums::copy &to, float x)
    {
        const float squares = warp_sum<SHARE_ROWS>(x * x);
        if (lane_id() != 0) return;
        const float coarse = floorf(squares / COARSE_UNIT);
        const float left = squares - coarse * COARSE_UNIT;
        atomicAdd(&to.squares.x, whole_number(coarse));
        atomicAdd(&to.squares.y, whole_number(left / FINE_UNIT));
        if (!(squares <= MOST_SQUARES)) sums->alarm = 1;
    }
};

/* ---- reading ----------------------------------------------------------------------------- */

__device__ inline float number_of(unsigned long long whole)
{
    return __ll2float_rn(static_cast<long long>(whole));
}

/* Past the L1: see logit_reading. One warp of a block reads the squares: to one sector reads come one
 * after the other, and all blocks look there. */
__device__ inline float inverse_rms_of_sums(const router_sums &s, int D, float eps)
{
    ulonglong2 squares[SUM_COPIES];
    unsigned long long coarse = 0, fine = 0;
#pragma unroll
    for (int c = 0; c < SUM_COPIES; c++) squares[c] = __ldcg(&s.copies[c].squares);
    const unsigned long long alarm = __ldcg(&s.alarm);
#pragma unroll
    for (int c = 0; c < SUM_COPIES; c++) coarse += squares[c].x, fine += squares[c].y;
    const float all = number_of(coarse) * COARSE_UNIT + number_of(fine) * FINE_UNIT;
    const float mean = all * reciprocal(static_cast<float>(D));
    return alarm != 0 ? NAN : reciprocal_root(mean + eps);
}

/* An expert's, to be multiplied by 1 / rms. */
__device__ inline float logit_of_sums(const router_sums &s, int e)
{
    unsigned long long copies[SUM_COPIES], all = 0;
#pragma unroll
    for (int c = 0; c < SUM_COPIES; c++) copies[c] = __ldcg(&s.copies[c].logits[e]);
#pragma unroll
    for (int c = 0; c < SUM_COPIES; c++) all += copies[c];
    return number_of(all) * SHARE_UNIT;
}

#endif
