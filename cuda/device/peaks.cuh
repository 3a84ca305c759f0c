/*
 * peaks.cuh -- the peaks of kl_linear (backend/ops.h): made of 16 lanes' outputs, and of a whole
 * row what a draw asks of all its logits.
 *
 * One order of sums wherever they are made and read, so that a row's log-probability does not
 * depend on which kernels its logits came through: neighbours first within a peak; then a thread's
 * peaks, PEAK_THREADS apart, beside the largest of its own so far; then the threads', beside the
 * largest of all.
 */
#ifndef KL_CUDA_DEVICE_PEAKS_H
#define KL_CUDA_DEVICE_PEAKS_H

#include "math.cuh"
#include "warp.cuh"

#include <math.h>
#include <stdint.h>

constexpr int PEAK = 16;           /* KL_PEAK_OUTPUTS: half a warp */
constexpr int PEAK_THREADS = 1024; /* of a block that reads a row's */
constexpr int PEAKS_AT_ONCE = 10;  /* loads in flight a thread: all of a row of 163,840 */
static_assert(PEAK_THREADS == WARP * WARP);

struct alignas(8) peak {
    float top, weights;
};

/* Of a row of n outputs. */
__device__ inline uint32_t peaks_of(uint32_t n)
{
    return (n + PEAK - 1) / PEAK;
}

/* NaN if one of them is. */
__device__ inline float max_or_nan(float x, float y)
{
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

/* Of PEAK neighbouring lanes, which have -inf past the end of a row; whole warps call it. */
__device__ inline peak peak_of(float y)
{
    float top = y;
#pragma unroll
    for (int d = 1; d < PEAK; d *= 2) top = max_or_nan(top, __shfl_xor_sync(ALL_LANES, top, d));
    float sum = expf(y - top);
#pragma unroll
    for (int d = 1; d < PEAK; d *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, d);
    return {top, isfinite(top) ? sum : 0.0f};
}

/* ---- of a row -------------------------------------------------------------------------- */

/* What a thread knows of its peaks, and then a warp: the largest, NaN if one is, and the first of
 * them that has it. */
struct peak_place {
    float top;
    uint32_t at;
};

__device__ inline peak_place first_of(peak_place x, peak_place y)
{
    const bool other = y.top > x.top || (y.top == x.top && y.at < x.at);
    return {max_or_nan(x.top, y.top), other ? y.at : x.at};
}

__device__ inline peak_place first_of_lanes(peak_place x)
{
#pragma unroll 1
    for (int d = 1; d < WARP; d *= 2)
        x = first_of(
            x, {__shfl_xor_sync(ALL_LANES, x.top, d), __shfl_xor_sync(ALL_LANES, x.at, d)});
    return x;
}

__device__ inline double sum_of_lanes(double x)
{
#pragma unroll 1
    for (int d = 1; d < WARP; d *= 2) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}

/* exp(x) for a weight in a sum of many. */
__device__ inline float exp_of(float x)
{
    return exp2_approx(1.4426950408889634f * x);
}

/* The peaks of a thread. */
struct peak_walk {
    peak_place first;
    float sum; /* of weights, beside first.top */

    __device__ void take(const peak (&p)[PEAKS_AT_ONCE], uint32_t at)
    {
        const float before = first.top;
#pragma unroll
        for (int j = 0; j < PEAKS_AT_ONCE; j++) first.top = max_or_nan(first.top, p[j].top);
        int earliest = 0;
#pragma unroll
        for (int j = PEAKS_AT_ONCE - 1; j >= 0; j--)
            if (p[j].top == first.top) earliest = j;
        if (first.top > before) first.at = at + earliest * PEAK_THREADS;
        const float shift = first.top == -INFINITY ? 0 : first.top;
        /* In words, so that no compiler rounds otherwise in another kernel. */
        const float own = __fmul_rn(p[0].weights, exp_of(p[0].top - shift));
        sum = fmaf(sum, exp_of(before - shift), own);
#pragma unroll
        for (int j = 1; j < PEAKS_AT_ONCE; j++)
            sum = fmaf(p[j].weights, exp_of(p[j].top - shift), sum);
    }
};

__device__ inline peak load_peak(const peak *at)
{
    const float2 v = *reinterpret_cast<const float2 *>(at);
    return {v.x, v.y};
}

__device__ inline peak_walk walk_peaks(const peak *peaks, uint32_t count)
{
    peak_walk walk = {{-INFINITY, 0}, 0};
#pragma unroll 1
    for (uint32_t start = 0; start < count; start += PEAKS_AT_ONCE * PEAK_THREADS) {
        const uint32_t at = start + threadIdx.x;
        peak p[PEAKS_AT_ONCE];
#pragma unroll
        for (int j = 0; j < PEAKS_AT_ONCE; j++) {
            p[j] = {-INFINITY, 0};
            if (at + j * PEAK_THREADS < count) p[j] = load_peak(peaks + at + j * PEAK_THREADS);
        }
        walk.take(p, at);
    }
    return walk;
}

struct peaks_shared {
    peak_place firsts[WARP]; /* one a warp of the block */
    double sums[WARP];
};

/* The largest logit of a row, the lowest id that has it, and log of the sum of all exponentials:
 * these two mean nothing where the first is not finite. */
struct row_top {
    float value;
    int id;
    double log_sum;
};

/* The same in every one of PEAK_THREADS threads. */
__device__ inline row_top find_top(const float *logits, const peak *peaks, uint32_t V,
                                   peaks_shared &s)
{
    const peak_walk walk = walk_peaks(peaks, peaks_of(V));
    peak_place first = first_of_lanes(walk.first);
    if (lane_id() == 0) s.firsts[warp_id()] = first;
    __syncthreads();
    first = first_of_lanes(s.firsts[lane_id()]);

    /* On its way while the sums are added. */
    const uint32_t i = first.at * PEAK + lane_id() % PEAK;
    const float z = i < V ? logits[i] : NAN;
    double sum =
        sum_of_lanes(static_cast<double>(walk.sum * exp_of(walk.first.top - first.top)));
    if (lane_id() == 0) s.sums[warp_id()] = sum;
    __syncthreads();
    sum = sum_of_lanes(s.sums[lane_id()]);
    const int place = __ffs(__ballot_sync(ALL_LANES, z == first.top)) - 1;
    return {first.top, static_cast<int>(first.at * PEAK) + place,
            static_cast<double>(first.top) +
                static_cast<double>(logf(static_cast<float>(sum)))};
}

#endif
