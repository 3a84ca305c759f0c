/*
 * mla_decode_fp8_softmax.cuh -- from the scores of a page of 8-bit latents, by the warpgroup that
 * makes them, to what the context's products take: probabilities times the scales of each group.
 */
#ifndef KL_CUDA_KERNELS_MLA_DECODE_FP8_SOFTMAX_H
#define KL_CUDA_KERNELS_MLA_DECODE_FP8_SOFTMAX_H

#include "../device/math.cuh"
#include "mla_decode_fp8_scores.cuh"

namespace {

constexpr int EACH = 8;                   /* heads of a thread's scores */
constexpr int WEIGHT_BYTES = HEADS * 128; /* a head's 64 tokens a row */

/* Of a page, for the context. */
struct page_weights {
    uint8_t x[GROUPS][WEIGHT_BYTES]; /* times their scales, in units of `units` */
    float keep[HEADS];               /* factors of the sums before */
    alignas(16) float units[GROUPS];
    uint8_t pad[1024 - (HEADS + GROUPS) * 4];
};

/* Of a thread's eight heads, number 2 j + e is this one. */
__device__ int head_of_thread(int i)
{
    return i / 2 * 8 + lane_id() % 4 * 2 + i % 2;
}

/* Probabilities are counted in so many parts of one, so that f16 has them in full down to 2^-29. */
constexpr float PARTS_LOG2 = 15, PART = 0x1p-15f;

/* Of a piece so far: the maximum of head_of_thread(r), which each warp knows; the bits of each
 * group's largest scale, in whose units the context is, none below 2^-100; and of each head the
 * thread's own part of the sum. */
struct softmax_state {
    float max = -INFINITY, sum[EACH];
    uint32_t largest[GROUPS];

    __device__ softmax_state()
    {
#pragma unroll
        for (int i = 0; i < EACH; i++) sum[i] = 0;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) largest[g] = __float_as_uint(0x1p-100f);
    }
};

/* Of a power of two. */
__device__ float inverse_of(uint32_t bits)
{
    return __uint_as_float((254u << 23) - bits);
}

__device__ uint32_t multiply_halves(uint32_t x, uint32_t y)
{
    const __half2 p =
        __hmul2(*reinterpret_cast<const __half2 *>(&x), *reinterpret_cast<const __half2 *>(&y));
    return *reinterpret_cast<const uint32_t *>(&p);
}

/* Over the eight lanes that have the same heads: lane r / 4 gets that of head number r / 4. */
template <class F> __device__ float over_rows(float (&x)[EACH], F f)
{
#pragma unroll
    for (int d = EACH / 2; d > 0; d /= 2) {
        const bool upper = (lane_id() / 4 & d) != 0;
#pragma unroll
        for (int i = 0; i < d; i++) {
            const float mine = upper ? x[i + d] : x[i], given = upper ? x[i] : x[i + d];
            x[i] = f(mine, __shfl_xor_sync(ALL_LANES, given, 4 * d));
        }
    }
    return x[0];
}

/* What this warp's tokens have to say to the others: of its maxima lane r / 4 tells that of head
 * number r / 4. */
__device__ __forceinline__ void tell_page(const score_sums &scores, const token_scales &scales,
                                          float (*tops)[WARPS], uint32_t (*largest)[GROUPS])
{
    float most[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = i / 2 * 4 + i % 2;
        most[i] = fmaxf(scores[at], scores[at + 2]);
    }
    const float top = over_rows(most, [](float x, float y) { return fmaxf(x, y); });
    tops[head_of_thread(lane_id() / 4)][warp_of_group()] = top;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const uint32_t mine =
            max(__float_as_uint(scales.x[0][g]), __float_as_uint(scales.x[1][g]));
        const uint32_t all = __reduce_max_sync(ALL_LANES, mine);
        if (lane_id() == g) largest[warp_of_group()][g] = all;
    }
}

/* Forgets tokens past `left`. */
__device__ __forceinline__ void cut_scores(score_sums &scores, int left)
{
#pragma unroll
    for (int second = 0; second < 2; second++) {
        if (warp_of_group() * 16 + token_of(lane_id() / 4, second) < left) continue;
#pragma unroll
        for (int i = 0; i < EACH; i++) scores[i / 2 * 4 + 2 * second + i % 2] = -INFINITY;
    }
}

/* Makes the probabilities; returns what the sums before of head_of_thread(r) are multiplied
 * by. */
__device__ __forceinline__ float softmax_page(const score_sums &scores,
                                              const float (*tops)[WARPS], softmax_state &state,
                                              uint32_t (&probabilities)[EACH])
{
    const int lane = lane_id();
    const float4 t = *reinterpret_cast<const float4 *>(tops[head_of_thread(lane / 4)]);
    const float top = fmaxf(fmaxf(fmaxf(t.x, t.y), fmaxf(t.z, t.w)), state.max);
    const float keep = exp2_approx(state.max - top);
    state.max = top;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = i / 2 * 4 + i % 2, from = 4 * i + lane % 4;
        const float most = __shfl_sync(ALL_LANES, top, from);
        const float before = __shfl_sync(ALL_LANES, keep, from);
        probabilities[i] = pack_half(exp2_approx(scores[at] - most + PARTS_LOG2),
                                     exp2_approx(scores[at + 2] - most + PARTS_LOG2));
        const float2 p = __half22float2(*reinterpret_cast<const __half2 *>(&probabilities[i]));
        state.sum[i] = fmaf(state.sum[i], before, p.x + p.y);
    }
    return keep;
}

/* Of the thread's tokens what probabilities are multiplied by, for each group. */
__device__ __forceinline__ void weigh_groups(const token_scales &scales,
                                             const uint32_t (*largest)[GROUPS],
                                             softmax_state &state, uint32_t (&factors)[GROUPS])
{
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const uint4 x = *reinterpret_cast<const uint4 *>(largest[w]);
        state.largest[0] = max(state.largest[0], x.x);
        state.largest[1] = max(state.largest[1], x.y);
        state.largest[2] = max(state.largest[2], x.z);
        state.largest[3] = max(state.largest[3], x.w);
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const float inverse = inverse_of(state.largest[g]);
        factors[g] = pack_half(scales.x[0][g] * inverse, scales.x[1][g] * inverse);
    }
}

__device__ __forceinline__ void store_weights(const uint32_t (&probabilities)[EACH],
                                              const uint32_t (&factors)[GROUPS], float keep,
                                              const softmax_state &state, page_weights &to)
{
    const int r = lane_id() / 4, place = warp_of_group() * 16 + 2 * r;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        uint8_t *at = to.x[0] + swizzled<128>(head_of_thread(i), place / 8) + place % 8 * 2;
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            *reinterpret_cast<uint32_t *>(at + g * WEIGHT_BYTES) =
                multiply_halves(probabilities[i], factors[g]);
    }
    if (warp_of_group() != 0) return;
    to.keep[head_of_thread(r)] = keep;
    if (lane_id() == 0)
        *reinterpret_cast<uint4 *>(to.units) = {state.largest[0], state.largest[1],
                                                state.largest[2], state.largest[3]};
}

} // namespace

#endif
