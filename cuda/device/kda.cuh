/*
 * kda.cuh -- what the kernels of Kimi Delta Attention share: their arguments, the gate, and one
 * token on rows of the state (kda_decode's arithmetic, in its order).
 */
#ifndef KL_CUDA_DEVICE_KDA_H
#define KL_CUDA_DEVICE_KDA_H

#include "math.cuh"
#include "types.cuh"
#include "warp.cuh"

/* A block of the kernels that go token by token. */
constexpr int KDA_WARPS = 4;
constexpr int KDA_THREADS = KDA_WARPS * WARP;

constexpr float KDA_NORM_EPS = 1e-6f; /* ops.h, under `normalize` */

struct kda_operand {
    const void *data;
    long long stride; /* elements between tokens */
    bool is_bf16;

    __device__ int element() const { return is_bf16 ? 2 : 4; } /* bytes */
};

struct kda_arguments {
    float *state;
    kda_operand q, k, v, g, beta;
    const int *slots;     /* or null: n -> n */
    const int *cu;        /* cu_seqlens; null in decode */
    const float *A_log;   /* or null */
    const float *dt_bias; /* or null */
    void *out;
    float *checkpoints; /* or null */
    int checkpoint_every;
    long long H, Hk, V, tiles;
    int K;
    kl_gate gate;
    float lower_bound, scale;
    bool normalize, beta_logits;
};

/* The head a block works on, in shared memory. */
struct kda_head {
    float q[KL_KDA_MAX_K], k[KL_KDA_MAX_K];
    float decay[KL_KDA_MAX_K], decay_low[KL_KDA_MAX_K]; /* their sum is the decay */
    float q_factor, k_factor, beta;
};

__device__ inline float kda_load(const kda_operand &x, long long t, long long i)
{
    const long long at = t * x.stride + i;
    return x.is_bf16 ? to_float(static_cast<const bf16 *>(x.data)[at])
                     : static_cast<const float *>(x.data)[at];
}

/* What the gate of one channel holds for all tokens. */
struct kda_channel {
    float rate, bias;
};

__device__ inline kda_channel kda_channel_of(const kda_arguments &a, long long h, int channel)
{
    return {a.A_log == nullptr ? 1.0f : expf(a.A_log[h]),
            a.dt_bias == nullptr ? 0.0f : a.dt_bias[h * a.K + channel]};
}

__device__ inline float kda_log_decay(const kda_arguments &a, const kda_channel &c, float g)
{
    if (a.gate == KL_GATE_SOFTPLUS) return -c.rate * softplus(g + c.bias);
    if (a.gate == KL_GATE_BOUNDED) return a.lower_bound * sigmoid(c.rate * (g + c.bias));
    return g;
}

/* What exp(log_decay) rounds away where it is near 1: over thousands of tokens that adds up.
 * The difference from 1 is exact, and expm1 keeps the digits of a small argument. */
__device__ inline float kda_decay_low(float log_decay, float decay)
{
    return log_decay > -0.5f ? expm1f(log_decay) - (decay - 1) : 0.0f;
}

/* What brings a vector to unit length, from the sum of its squares. */
__device__ inline float kda_unit_factor(float squares)
{
    return reciprocal_root(squares + KDA_NORM_EPS);
}

/* The same of a vector of K channels, by one warp. */
__device__ inline float kda_norm_factor(const float *x, int K)
{
    float sum = 0;
    for (int i = threadIdx.x % WARP; i < K; i += WARP) sum += x[i] * x[i];
    return 1 / sqrtf(warp_sum(sum) + KDA_NORM_EPS);
}

/* Token t of head h, by the whole block; what `s` held may be overwritten at once. */
__device__ inline void kda_prepare(const kda_arguments &a, long long t, long long h,
                                   kda_head &s)
{
    const long long hk =
        static_cast<unsigned>(h) / (static_cast<unsigned>(a.H) / static_cast<unsigned>(a.Hk));
    const int warp = threadIdx.x / WARP;
    if (threadIdx.x == blockDim.x - 1) { /* here, on its way beside the others */
        const float beta = kda_load(a.beta, t, h);
        s.beta = a.beta_logits ? sigmoid(beta) : beta;
    }
    for (int i = threadIdx.x; i < a.K; i += blockDim.x) {
        s.q[i] = kda_load(a.q, t, hk * a.K + i);
        s.k[i] = kda_load(a.k, t, hk * a.K + i);
        const float log_decay =
            kda_log_decay(a, kda_channel_of(a, h, i), kda_load(a.g, t, h * a.K + i));
        s.decay[i] = expf(log_decay);
        s.decay_low[i] = kda_decay_low(log_decay, s.decay[i]);
    }
    __syncthreads();
    if (warp < 2) {
        const float factor = a.normalize ? kda_norm_factor(warp == 0 ? s.q : s.k, a.K) : 1.0f;
        (warp == 0 ? s.q_factor : s.k_factor) = factor;
    }
    __syncthreads();
}

/* A lane's share of a vector of K channels: CHUNKS pieces of VEC neighbours, WARP * VEC apart.
 * Channels past K are zero and never stored. */
template <int VEC, int CHUNKS> struct kda_share {
    float x[CHUNKS][VEC];

    static __device__ int channel(int chunk)
    {
        return (chunk * WARP + static_cast<int>(threadIdx.x) % WARP) * VEC;
    }

    __device__ void read(const float *from, int K)
    {
        for (int c = 0; c < CHUNKS; c++) {
            const int i = channel(c);
            if constexpr (VEC == 4) {
                const float4 f =
                    i < K ? *reinterpret_cast<const float4 *>(from + i) : float4{0, 0, 0, 0};
                x[c][0] = f.x, x[c][1] = f.y, x[c][2] = f.z, x[c][3] = f.w;
            } else
                x[c][0] = i < K ? from[i] : 0.0f;
        }
    }

    __device__ void write(float *to, int K) const
    {
        for (int c = 0; c < CHUNKS; c++) {
            const int i = channel(c);
            if (i >= K) continue;
            if constexpr (VEC == 4)
                *reinterpret_cast<float4 *>(to + i) =
                    float4{x[c][0], x[c][1], x[c][2], x[c][3]};
            else
                to[i] = x[c][0];
        }
    }

    __device__ void scale(float factor)
    {
        for (int c = 0; c < CHUNKS; c++)
            for (int j = 0; j < VEC; j++) x[c][j] *= factor;
    }

    __device__ void multiply(const kda_share &y, const kda_share &low)
    {
        for (int c = 0; c < CHUNKS; c++)
            for (int j = 0; j < VEC; j++)
                x[c][j] = fmaf(x[c][j], y.x[c][j], x[c][j] * low.x[c][j]);
    }

    __device__ void add_scaled(const kda_share &y, float factor)
    {
        for (int c = 0; c < CHUNKS; c++)
            for (int j = 0; j < VEC; j++) x[c][j] = fmaf(factor, y.x[c][j], x[c][j]);
    }

    /* The whole warp's dot product, in every lane. */
    __device__ float dot(const kda_share &y) const
    {
        float sum = 0;
        for (int c = 0; c < CHUNKS; c++)
            for (int j = 0; j < VEC; j++) sum = fmaf(x[c][j], y.x[c][j], sum);
        return warp_sum(sum);
    }
};

__device__ inline void kda_store_out(const kda_arguments &a, long long at, float value)
{
    if (a.q.is_bf16)
        static_cast<bf16 *>(a.out)[at] = from_float<bf16>(value);
    else
        static_cast<float *>(a.out)[at] = value;
}

/* Where the state of a sequence goes after its first `done` tokens of the call, or null. */
__device__ inline float *kda_checkpoint(const kda_arguments &a, long long n, long long h,
                                        int done)
{
    if (a.checkpoints == nullptr || done % a.checkpoint_every != 0) return nullptr;
    const long long row = a.cu[n] / a.checkpoint_every + done / a.checkpoint_every - 1;
    return a.checkpoints + (row * a.H + h) * a.V * a.K;
}

/* The rows of one sequence's state that a warp owns. */
struct kda_place {
    long long n, h, first;
    float *state;
};

template <int ROWS, int WARPS> __device__ kda_place kda_place_of(const kda_arguments &a)
{
    /* kda_grid() has bound the product of all of these. */
    const unsigned tiles = static_cast<unsigned>(a.tiles), H = static_cast<unsigned>(a.H);
    const unsigned tile = blockIdx.x % tiles, unit = blockIdx.x / tiles;
    const long long n = unit / H, h = unit % H;
    const long long slot = a.slots == nullptr ? n : a.slots[n];
    return {n, h, (static_cast<long long>(tile) * WARPS + threadIdx.x / WARP) * ROWS,
            a.state + (slot * a.H + h) * a.V * a.K};
}

/* A warp's rows of the state, one token at a time. */
template <int VEC, int CHUNKS, int ROWS> struct kda_rows {
    using lane_share = kda_share<VEC, CHUNKS>;
    lane_share rows[ROWS];

    __device__ void read(const kda_arguments &a, const float *state, long long first)
    {
        for (int r = 0; r < ROWS; r++)
            rows[r].read(state + (first + r) * a.K, first + r < a.V ? a.K : 0);
    }

    __device__ void write(const kda_arguments &a, float *state, long long first) const
    {
        for (int r = 0; r < ROWS; r++)
            if (first + r < a.V) rows[r].write(state + (first + r) * a.K, a.K);
    }

    __device__ static void read_v(const kda_arguments &a, long long t, long long h,
                                  long long first, float (&v)[ROWS])
    {
        for (int r = 0; r < ROWS; r++)
            v[r] = first + r < a.V ? kda_load(a.v, t, h * a.V + first + r) : 0.0f;
    }

    /* S <- S diag(a), with the decays that kda_prepare() has left in s. */
    __device__ void decay(const kda_arguments &a, const kda_head &s)
    {
        lane_share decay, low;
        decay.read(s.decay, a.K), low.read(s.decay_low, a.K);
        for (int r = 0; r < ROWS; r++) rows[r].multiply(decay, low);
    }

    /* The rest of token t of head h. */
    __device__ void write_and_answer(const kda_arguments &a, long long t, long long h,
                                     long long first, const kda_head &s, const float (&v)[ROWS])
    {
        lane_share q, k;
        q.read(s.q, a.K), k.read(s.k, a.K);
        q.scale(s.q_factor), k.scale(s.k_factor);
        for (int r = 0; r < ROWS; r++) {
            const float u = s.beta * (v[r] - rows[r].dot(k));
            rows[r].add_scaled(k, u);
            const float o = a.scale * rows[r].dot(q);
            /* The test is the same for the whole warp: the sums stay legal. */
            if (first + r < a.V && threadIdx.x % WARP == 0)
                kda_store_out(a, (t * a.H + h) * a.V + first + r, o);
        }
    }

    /* Token t of head h, which kda_prepare() has left in s. */
    __device__ void step(const kda_arguments &a, long long t, long long h, long long first,
                         const kda_head &s, const float (&v)[ROWS])
    {
        decay(a, s);
        write_and_answer(a, t, h, first, s, v);
    }
};

/* Host. */

inline kda_operand kda_operand_of(const kl_tensor &t)
{
    return {t.data, t.stride[0], t.dtype == KL_BF16};
}

inline kda_arguments kda_arguments_of(const kl_kda *a)
{
    /* An interval of more than T tokens has no rows, and need not fit an int. */
    const bool keeps = !kl_tensor_absent(&a->checkpoints) && a->checkpoints.shape[0] > 0;
    return {
        .state = static_cast<float *>(a->state.data),
        .q = kda_operand_of(a->q),
        .k = kda_operand_of(a->k),
        .v = kda_operand_of(a->v),
        .g = kda_operand_of(a->g),
        .beta = kda_operand_of(a->beta),
        .slots = static_cast<const int *>(a->slots.data),
        .cu = static_cast<const int *>(a->cu_seqlens.data),
        .A_log = static_cast<const float *>(a->A_log.data),
        .dt_bias = static_cast<const float *>(a->dt_bias.data),
        .out = a->out.data,
        .checkpoints = keeps ? static_cast<float *>(a->checkpoints.data) : nullptr,
        .checkpoint_every = keeps ? static_cast<int>(a->checkpoint_every) : 0,
        .H = a->state.shape[1],
        .Hk = a->q.shape[1],
        .V = a->state.shape[2],
        .tiles = 0,
        .K = static_cast<int>(a->state.shape[3]),
        .gate = a->gate,
        .lower_bound = a->lower_bound,
        .scale = a->scale,
        .normalize = a->normalize,
        .beta_logits = a->beta_logits,
    };
}

/* Blocks for N sequences, H heads and tiles of `rows` rows of the state, as a grid's x axis. */
inline kl_status kda_grid(const char *op, kda_arguments &a, long long N, long long rows,
                          unsigned *blocks, kl_error *err)
{
    a.tiles = (a.V + rows - 1) / rows;
    if (N > MAX_BLOCKS / a.H || N * a.H > MAX_BLOCKS / a.tiles)
        return kl_fail(err, KL_ERR_VALUE, "%s: N * H * (V / %lld) must be <= %lld, got N %lld",
                       op, rows, MAX_BLOCKS, N);
    *blocks = static_cast<unsigned>(N * a.H * a.tiles);
    return KL_OK;
}

/* How a warp's rows lie in its lanes. */
template <int vec, int chunks, int rows> struct kda_lanes {
    static constexpr int VEC = vec, CHUNKS = chunks, ROWS = rows;
};

/* Call f with the lanes for these arguments, as a type. Rows of the state and of checkpoints start
 * at multiples of K floats: four channels at a time need all three. */
template <class F> kl_status kda_with_lanes(const kda_arguments &a, F f)
{
    const bool vector = a.K % 4 == 0 && is_aligned(a.state, 0, sizeof(float), 16) &&
                        is_aligned(a.checkpoints, 0, sizeof(float), 16);
    if (vector && a.K <= 128) return f(kda_lanes<4, 1, 8>{});
    if (vector) return f(kda_lanes<4, 2, 4>{});
    return f(kda_lanes<1, KL_KDA_MAX_K / WARP, 4>{});
}

#endif
