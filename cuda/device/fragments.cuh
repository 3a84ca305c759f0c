/*
 * fragments.cuh -- a weight in shared memory, as it is stored, to operand A of wgmma.
 *
 * A step is STEP_K columns. A row of a step has step_bytes<format> bytes in the order of
 * swizzled(); a warp takes 16 rows, eight from bases[0] and eight from bases[1], so that the
 * factors of a gated product meet in one thread. A thread's rows are bases[h] + lane / 4.
 * Quantised numbers become bf16 in registers: the exact product q * scale, rounded once.
 */
#ifndef KL_CUDA_DEVICE_FRAGMENTS_H
#define KL_CUDA_DEVICE_FRAGMENTS_H

#include "warp.cuh"
#include "weight.cuh"
#include "wgmma.cuh"

constexpr int STEP_K = 64; /* columns of a step: 128 bytes of bf16, a group of each format */

template <kl_weight_format format>
constexpr int step_bytes = format == KL_W_BF16   ? 2 * STEP_K
                           : format == KL_W_INT4 ? STEP_K / 2
                                                 : STEP_K;

/* The scales of this thread's two rows: those of the next step are on their way while a step is
 * computed. Zero past the last group, where the columns of x are zero. */
template <kl_weight_format format> struct fragment_scales {
    static constexpr int EACH = STEP_K / weight_codec<format>::GROUP;
    const bf16 *rows[2];
    int groups;
    bf16 coming[2][EACH];
    float now[2][EACH];

    __device__ void fetch(int step)
    {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int group = step * EACH + i;
                coming[h][i] = group < groups ? rows[h][group] : from_float<bf16>(0);
            }
    }

    /* Of step `step`, which fetch() was called for. */
    __device__ void arrive(int step)
    {
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < EACH; i++) now[h][i] = to_float(coming[h][i]);
        fetch(step + 1);
    }
};

template <> struct fragment_scales<KL_W_BF16> {
    const bf16 *rows[2];
    int groups;
    __device__ void fetch(int) {}
    __device__ void arrive(int) {}
};

__device__ __forceinline__ uint32_t load_two_bytes(const uint8_t *from)
{
    return *reinterpret_cast<const uint16_t *>(from);
}

/* Two numbers of a byte each. */
template <kl_weight_format format>
__device__ uint32_t pair_of_bytes(uint32_t bytes, float scale)
{
    if constexpr (format == KL_W_INT8) {
        const uint32_t raised = bytes ^ 0x8080u;
        const float less = -(32768.0f + 128.0f) * scale;
        return pack_bf16(fmaf(raise_byte(raised, 0), scale, less),
                         fmaf(raise_byte(raised, 1), scale, less));
    } else {
        const float2 q = weight_codec<KL_W_FP8>::two(bytes);
        return pack_bf16(q.x * scale, q.y * scale);
    }
}

/* Operand A for columns [32 half, 32 half + 32) of a step, as two of 16 columns each. */
template <kl_weight_format format, int half>
__device__ __forceinline__ void load_fragments(uint32_t (&a)[2][4], const uint8_t *w,
                                               const int (&bases)[2],
                                               const fragment_scales<format> &scales)
{
    constexpr int BYTES = step_bytes<format>;
    const int lane = lane_id();
    if constexpr (format == KL_W_BF16) {
        const int row = (lane / 8 % 2 == 0 ? bases[0] : bases[1]) + lane % 8;
#pragma unroll
        for (int i = 0; i < 2; i++)
            ldmatrix(a[i], w + swizzled<BYTES>(row, 4 * half + 2 * i + lane / 16));
    } else if constexpr (format == KL_W_INT4) {
        /* A group: its low nibbles are the first 16 columns, its high ones the others. */
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint8_t *from = w + swizzled<BYTES>(bases[h] + lane / 4, half) + lane % 4 * 2;
            const __nv_bfloat162 scale = __float2bfloat162_rn(scales.now[h][half]);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t bytes = load_two_bytes(from + 8 * j);
                a[0][2 * j + h] =
                    weight_codec<KL_W_INT4>::pair(bytes & 0x0f0fu, 0x4140u, scale);
                a[1][2 * j + h] =
                    weight_codec<KL_W_INT4>::pair(bytes >> 4 & 0x0f0fu, 0x4140u, scale);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint8_t *from =
                    w + swizzled<BYTES>(bases[h] + lane / 4, 2 * half + i) + lane % 4 * 2;
#pragma unroll
                for (int j = 0; j < 2; j++)
                    a[i][2 * j + h] =
                        pair_of_bytes<format>(load_two_bytes(from + 8 * j), scales.now[h][0]);
            }
    }
}

#endif
