/*
 * kda_mixer.cuh -- what the kernels of kda_mixer for single tokens share: their arguments, a
 * channel's convolution, a warp's rows of the state, in the order of short_conv.cu,
 * kda_decode.cu and norm.cu.
 */
#ifndef KL_CUDA_DEVICE_KDA_MIXER_H
#define KL_CUDA_DEVICE_KDA_MIXER_H

#include "arriving.cuh"
#include "gated_norm.cuh"
#include "kda.cuh"
#include "launch.cuh"

extern "C" {
#include "backend/kda_mixer.h"
}

constexpr int MIXER_SIDE = 128; /* the most of K and of V */
constexpr int MIXER_WIDTH = 4, MIXER_PAST = MIXER_WIDTH - 1;

struct mixer_arguments {
    kda_arguments kda; /* but for q, k and v */
    const void *qkv;
    const float *taps, *norm_weight;
    void *windows, *out;
    long long qkv_stride, slots; /* slots: of the pool */
    float eps;
};

/* Where sequence n has its state, as far as can be told before the inputs are there: the number
 * may be about to be written, so it is read past the L1 and only believed where it leads into the
 * pool. */
__device__ inline long long mixer_slot_guess(const mixer_arguments &a, unsigned n)
{
    const long long slot = a.kda.slots == nullptr ? n : __ldcg(a.kda.slots + n);
    return slot < 0 || slot >= a.slots ? 0 : slot;
}

__device__ inline long long mixer_slot(const mixer_arguments &a, unsigned n)
{
    return a.kda.slots == nullptr ? n : a.kda.slots[n];
}

/* One channel of the convolution. */
template <class A> struct mixer_channel {
    long long c;
    float taps[MIXER_WIDTH];
    A past[MIXER_PAST], input;

    __device__ explicit mixer_channel(long long c) : c(c) {}

    /* Channel i of q, k or v (role 0, 1, 2) of head h. */
    __device__ mixer_channel(const mixer_arguments &a, int role, unsigned h, int i)
        : c(role == 2 ? 2 * a.kda.H * a.kda.K + h * a.kda.V + i
                      : (role * a.kda.H + h) * a.kda.K + i)
    {
    }

    __device__ A *window(const mixer_arguments &a, long long slot) const
    {
        const long long C = a.kda.H * (2 * a.kda.K + a.kda.V);
        return static_cast<A *>(a.windows) + (slot * C + c) * MIXER_PAST;
    }

    __device__ void read_taps(const mixer_arguments &a)
    {
        load_floats<MIXER_WIDTH>(a.taps + c * MIXER_WIDTH, taps);
    }

    __device__ void read_input(const mixer_arguments &a, unsigned n)
    {
        input = load_here(static_cast<const A *>(a.qkv) + n * a.qkv_stride + c);
    }

    __device__ void read_window(const A *from)
    {
#pragma unroll
        for (int j = 0; j < MIXER_PAST; j++) past[j] = load_here(from + j);
    }

    /* The window moves. */
    __device__ void write_window(A *to) const
    {
#pragma unroll
        for (int j = 1; j < MIXER_PAST; j++) to[j - 1] = past[j];
        to[MIXER_PAST - 1] = input;
    }

    __device__ float output() const
    {
        float y = 0;
#pragma unroll
        for (int j = 0; j < MIXER_PAST; j++) y = fmaf(taps[j], to_float(past[j]), y);
        y = fmaf(taps[MIXER_PAST], to_float(input), y);
        return to_float(from_float<A>(silu_for<A>(y)));
    }
};

/* A warp's rows of the state; a lane has the same four channels of each. */
template <int ROWS> struct mixer_rows {
    static constexpr int LANES = WARP / ROWS; /* that share a row's dot product */
    float x[ROWS][4];

    /* The row whose dot product this lane gets. */
    static __device__ int row() { return lane_id() / LANES; }

    /* Rows past `rows` and channels past K are zeros. */
    __device__ void read(const float *from, int rows, int K)
    {
        const int at = lane_id() * 4;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            x[r][0] = x[r][1] = x[r][2] = x[r][3] = 0;
            if (r < rows && at < K) load_floats<4>(from + r * K + at, x[r]);
        }
    }

    /* All of them, whole, past the L1. */
    __device__ void read_whole(const float *from)
    {
        const float4 *const own = reinterpret_cast<const float4 *>(from) + lane_id();
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 f = __ldcg(own + r * (MIXER_SIDE / 4));
            x[r][0] = f.x, x[r][1] = f.y, x[r][2] = f.z, x[r][3] = f.w;
        }
    }

    __device__ void write(float *to, int rows, int K) const
    {
        const int at = lane_id() * 4;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < rows && at < K) store_floats<4>(to + r * K + at, x[r]);
    }

    /* By decays that are sums of two. */
    __device__ void multiply(const float *decays, const float *lows)
    {
        float decay[4], low[4];
        load_floats<4>(decays + lane_id() * 4, decay);
        load_floats<4>(lows + lane_id() * 4, low);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < 4; j++) x[r][j] = fmaf(x[r][j], decay[j], x[r][j] * low[j]);
    }

    __device__ void add(const float (&y)[4], float factor, int r)
    {
#pragma unroll
        for (int j = 0; j < 4; j++) x[r][j] = fmaf(factor, y[j], x[r][j]);
    }

    /* The dot product of row() with y, in the order of a butterfly over the lanes: where half of
     * them keep one half of the rows, a step costs half of the one before. */
    __device__ float dot(const float (&y)[4]) const
    {
        float sum[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            sum[r] = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) sum[r] = fmaf(x[r][j], y[j], sum[r]);
        }
#pragma unroll
        for (int d = WARP / 2, half = ROWS / 2; half > 0; d /= 2, half /= 2)
#pragma unroll
            for (int r = 0; r < half; r++) {
                const bool upper = (lane_id() & d) != 0;
                const float kept = upper ? sum[r + half] : sum[r];
                const float sent = upper ? sum[r] : sum[r + half];
                sum[r] = kept + __shfl_xor_sync(ALL_LANES, sent, d);
            }
        return warp_sum<LANES>(sum[0]);
    }

    /* S += u k^T, where u is that of row(). */
    __device__ void add_outer(const float (&k)[4], float u)
    {
#pragma unroll
        for (int r = 0; r < ROWS; r++) add(k, __shfl_sync(ALL_LANES, u, r * LANES), r);
    }

    /* The delta rule, where v is that of row(). */
    __device__ void learn(const float (&k)[4], float v, float beta)
    {
        add_outer(k, beta * (v - dot(k)));
    }
};

/* The warp's part of kda_norm_factor() before its butterfly, and this lane's four channels of q
 * or k, brought to unit length with the sum after it. */
__device__ inline float mixer_squares(const float (&x)[MIXER_SIDE])
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < MIXER_SIDE; i += WARP) sum += x[i + lane_id()] * x[i + lane_id()];
    return sum;
}

__device__ inline float mixer_unit_factor(float sum)
{
    return 1 / sqrtf(sum + KDA_NORM_EPS);
}

__device__ inline void mixer_unit(const float (&from)[MIXER_SIDE], float sum, float (&to)[4])
{
    const float factor = mixer_unit_factor(sum);
    load_floats<4>(from + lane_id() * 4, to);
#pragma unroll
    for (int j = 0; j < 4; j++) to[j] *= factor;
}

/* gated_norm.cuh's sum of squares of a row of activations, in every lane. */
template <class A> __device__ float mixer_sum_of_squares(const float *o, int V)
{
    constexpr int VEC = 16 / sizeof(A), LANES = sizeof(A) == 2 ? WARP / 2 : WARP;
    const int at = lane_id() % LANES * VEC;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < VEC; j++)
        if (at < V) sum = fmaf(o[at + j], o[at + j], sum);
    return sum_of_neighbours<LANES>(sum);
}

/* ---- host ------------------------------------------------------------------------------ */

inline mixer_arguments mixer_arguments_of(const kl_kda_mixer *a, const kl_kda_mixer_parts &p)
{
    return {
        .kda = kda_arguments_of(&p.kda),
        .qkv = a->qkv.data,
        .taps = static_cast<const float *>(a->conv_weight.data),
        .norm_weight = static_cast<const float *>(a->norm_weight.data),
        .windows = a->conv_state.data,
        .out = a->out.data,
        .qkv_stride = a->qkv.stride[0],
        .slots = a->state.shape[0],
        .eps = a->eps,
    };
}

/* What all kernels need of a call, so that their order is that of the operations on aligned
 * rows. */
inline bool mixer_suits(const kl_kda_mixer *a)
{
    const int64_t V = a->state.shape[2];
    const int n = a->out.dtype == KL_BF16 ? 8 : 4;
    return (a->single || a->guesses) && a->conv_weight.shape[1] == MIXER_WIDTH &&
           is_aligned(a->state.data, 0, 4, 16) && is_aligned(a->conv_weight.data, 0, 4, 16) &&
           is_wide(a->out, V, n) && is_wide(a->norm_weight, V, n);
}

/* kda_mixer_step.cu: whether it has a kernel for these tokens, gates and all; it. */
bool kl_cuda_kda_mixer_step_takes(const kl_kda_mixer *a);
kl_status kl_cuda_kda_mixer_step(kl_backend *be, const kl_kda_mixer *a,
                                 const kl_kda_mixer_parts &p, kl_error *err);

/* kda_mixer_guesses.cu: where tokens are guesses. */
kl_status kl_cuda_kda_mixer_guesses(kl_backend *be, const kl_kda_mixer *a,
                                    const kl_kda_mixer_parts &p, kl_error *err);

#endif
