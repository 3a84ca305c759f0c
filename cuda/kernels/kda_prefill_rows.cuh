/*
 * kda_prefill_rows.cuh -- a chain warp's 16 rows of the state in registers, and where in device
 * memory they begin and end.
 */
#ifndef KL_CUDA_KERNELS_KDA_PREFILL_ROWS_H
#define KL_CUDA_KERNELS_KDA_PREFILL_ROWS_H

#include "../device/mma.cuh"
#include "kda_prefill_walk.cuh"

namespace kda {

constexpr int ROWS = 16; /* of the state, a warp's */

/* ---- in registers ------------------------------------------------------------------------ */

/* A lane's channels of a chunk's decays. */
using lane_decays = float[KDA_K / 4];

__device__ inline void load_decays(lane_decays &d, const kda_chunk &c)
{
#pragma unroll
    for (int i = 0; i < KDA_K / 4; i += 4) {
        const float4 x = *reinterpret_cast<const float4 *>(&c.decay[lane_id() % 4][i]);
        d[i] = x.x, d[i + 1] = x.y, d[i + 2] = x.z, d[i + 3] = x.w;
    }
}

/* A warp's 16 rows of the state: values 4 t .. 4 t + 3 belong to channels 8 t .. 8 t + 7. */
struct warp_state {
    float S[KDA_K / 2];

    __device__ static float *at(float *state, int tile, int half)
    {
        return state + (lane_id() / 4 + 8 * half) * KDA_K + 8 * tile + 2 * (lane_id() % 4);
    }

    __device__ void read(float *state)
    {
#pragma unroll
        for (int t = 0; t < KDA_K / 8; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 x = *reinterpret_cast<const float2 *>(at(state, t, half));
                S[4 * t + 2 * half] = x.x, S[4 * t + 2 * half + 1] = x.y;
            }
    }

    __device__ void write(float *state) const
    {
#pragma unroll
        for (int t = 0; t < KDA_K / 8; t++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<float2 *>(at(state, t, half)) =
                    float2{S[4 * t + 2 * half], S[4 * t + 2 * half + 1]};
    }

    /* Rows of the unit matrix. */
    __device__ void set_unit(int first)
    {
        const int row = first + lane_id() / 4, channel = 2 * (lane_id() % 4);
#pragma unroll
        for (int i = 0; i < KDA_K / 2; i++)
            S[i] = row + i % 4 / 2 * 8 == channel + i / 4 * 8 + i % 2 ? 1.0f : 0.0f;
    }

    /* S <- S diag(E_last), given E - 1. Of a strong decay that loses digits, but no more than
     * the state before it has. */
    __device__ void decay(const lane_decays &d)
    {
#pragma unroll
        for (int t = 0; t < KDA_K / 8; t++) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float &x = S[4 * t + j];
                x = fmaf(x, d[2 * t + j % 2], x);
            }
        }
    }
};

/* Accumulators of two neighbouring tiles as a left operand, 16 deep. */
__device__ inline void to_left(uint32_t (&a)[4], const float *c)
{
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = pack_bf16(c[2 * i], c[2 * i + 1]);
}

/* What that rounds away. */
__device__ inline void to_left_low(uint32_t (&low)[4], const uint32_t (&a)[4], const float *c)
{
#pragma unroll
    for (int i = 0; i < 4; i++)
        low[i] = pack_bf16(c[2 * i] - low_half(a[i]), c[2 * i + 1] - high_half(a[i]));
}

/* ---- in device memory --------------------------------------------------------------------- */

/* Which rows a chain takes through the chunks: value rows with their output, value rows for a
 * segment's C, unit rows for its M. */
enum chain_rows { OF_OUTPUT, OF_VALUES, OF_UNITS };

/* A warp's first row; the last tile may be half of one, or none at all: warps compute for
 * nothing, then. */
__device__ inline int first_row(const scanner &s, int w)
{
    return s.tile * KDA_V_TILE + w * ROWS;
}

__device__ inline bool owns_rows(const scanner &s, int w, chain_rows rows = OF_OUTPUT)
{
    return first_row(s, w) < (rows == OF_UNITS ? KDA_K : s.a.V);
}

/* A warp's rows of a head's state in the call's slot of a sequence, and of a summary. */
__device__ inline float *slot_rows(const scanner &s, const walk &at, int w)
{
    return kda_slot(s.a, at.sequence, at.h) + first_row(s, w) * KDA_K;
}

__device__ inline float *summary_rows(const scanner &s, const walk &at, int w, chain_rows rows)
{
    const long long first = first_row(s, w) + (rows == OF_UNITS ? s.a.V : 0);
    return kda_summary(s.a, s.p, at.n, at.h) + first * KDA_K;
}

template <chain_rows rows>
__device__ inline void begin_rows(warp_state &state, const scanner &s, const walk &at, int w)
{
    if (rows == OF_UNITS)
        state.set_unit(first_row(s, w));
    else if (rows == OF_VALUES && s.p.cu[at.n] > s.a.cu[at.sequence])
        state = {};
    else
        state.read(rows == OF_OUTPUT && s.p.segments > 1 ? summary_rows(s, at, w, rows)
                                                         : slot_rows(s, at, w));
}

template <chain_rows rows>
__device__ inline void end_rows(const warp_state &state, const scanner &s, const walk &at,
                                int w)
{
    if (rows != OF_OUTPUT)
        state.write(summary_rows(s, at, w, rows));
    else if (s.p.cu[at.n + 1] == s.a.cu[at.sequence + 1])
        state.write(slot_rows(s, at, w));
}

/* Where the state goes after the chunk as well, or null. */
__device__ inline float *checkpoint_rows(const scanner &s, const walk &at, int w)
{
    if (s.a.checkpoints == nullptr) return nullptr;
    const int before = s.p.cu[at.n] - s.a.cu[at.sequence];
    float *head = kda_checkpoint(s.a, at.sequence, at.h, before + at.done());
    return head == nullptr ? nullptr : head + first_row(s, w) * KDA_K;
}

/* Where the call asks for the state after this chunk. */
__device__ inline void keep_rows(const warp_state &state, const scanner &s, const walk &at,
                                 int w)
{
    float *kept = checkpoint_rows(s, at, w);
    if (kept != nullptr) state.write(kept);
}

} // namespace kda

#endif
