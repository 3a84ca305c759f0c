/*
 * kda_decode.cu -- Kimi Delta Attention, one token for each of N sequences.
 *
 * Computes     S <- S diag(a);  u = b (v - S k);  S <- S + u k^T;  o = scale S q, with a, b and
 *              the normalised q, k of backend/ops.h
 * Shapes       state [S, H, V, K]; q, k [N, Hk, K]; v, out [N, H, V]; g [N, H, K]; beta [N, H]
 * Layout       the state dense with K contiguous; of the others the first axis may be strided
 * Precision    f32 or bf16 in, f32 arithmetic and state, out as q
 * Grid         one block for each sequence, head and tile of state rows. The block prepares
 *              decay, k and q of its head once in shared memory; then a warp owns R rows at a
 *              time, a lane the same channels of each, in registers: the state crosses device
 *              memory once each way, R rows in flight, and rows never exchange anything.
 * Order        a lane sums its channels in rising order, then five butterfly steps: the same
 *              whatever N, H, V and the place in the batch
 * Roofline     bytes ~ 2 * 4 * N*H*V*K. With H = 32 and V = K = 128 that is 4 MiB a sequence
 *              at 0.9 flop/byte: memory-bound, 1.41 us on an H100 (3.0 TB/s)
 * Measured     not timed yet; right on an H100 (tests/ops/test_kda_on_cuda.py, 2026-11-22)
 */
#include "../device/math.cuh"
#include "../device/types.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int MAX_BLOCKS = 0x7fffffff; /* of the grid's x axis */
constexpr float NORM_EPS = 1e-6f;      /* ops.h, under `normalize` */

struct operand {
    const void *data;
    long long stride; /* elements between sequences */
    bool is_bf16;
};

struct arguments {
    float *state;
    operand q, k, v, g, beta;
    const int *slots;     /* or null: n -> n */
    const float *A_log;   /* or null */
    const float *dt_bias; /* or null */
    void *out;
    long long H, Hk, V, tiles;
    int K;
    kl_gate gate;
    float lower_bound, scale;
    bool normalize, beta_logits;
};

/* The head a block works on, in shared memory. */
struct head {
    float q[KL_KDA_MAX_K], k[KL_KDA_MAX_K], decay[KL_KDA_MAX_K];
    float q_factor, k_factor;
};

__device__ float load(const operand &x, long long n, long long i)
{
    const long long at = n * x.stride + i;
    return x.is_bf16 ? to_float(static_cast<const bf16 *>(x.data)[at])
                     : static_cast<const float *>(x.data)[at];
}

__device__ float decay_of(const arguments &a, long long h, int channel, float g)
{
    if (a.gate != KL_GATE_DIRECT) {
        const float rate = a.A_log == nullptr ? 1.0f : expf(a.A_log[h]);
        if (a.dt_bias != nullptr) g += a.dt_bias[h * a.K + channel];
        g = a.gate == KL_GATE_SOFTPLUS ? -rate * softplus(g)
                                       : a.lower_bound * sigmoid(rate * g);
    }
    return expf(g);
}

/* What brings a vector of K channels to unit length; called by one warp. */
__device__ float norm_factor(const float *x, int K)
{
    float sum = 0;
    for (int i = threadIdx.x % WARP; i < K; i += WARP) sum += x[i] * x[i];
    return 1 / sqrtf(warp_sum(sum) + NORM_EPS);
}

__device__ void prepare_head(const arguments &a, long long n, long long h, head &s)
{
    const long long hk = h / (a.H / a.Hk);
    const int warp = threadIdx.x / WARP;
    for (int i = threadIdx.x; i < a.K; i += THREADS) {
        s.q[i] = load(a.q, n, hk * a.K + i);
        s.k[i] = load(a.k, n, hk * a.K + i);
        s.decay[i] = decay_of(a, h, i, load(a.g, n, h * a.K + i));
    }
    __syncthreads();
    if (warp == 0) s.q_factor = a.normalize ? norm_factor(s.q, a.K) : 1.0f;
    if (warp == 1) s.k_factor = a.normalize ? norm_factor(s.k, a.K) : 1.0f;
    __syncthreads();
}

/* A lane's share of a vector of K channels: CHUNKS pieces of VEC neighbours, WARP * VEC apart.
 * Channels past K are zero and never stored. */
template <int VEC, int CHUNKS> struct share {
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

    __device__ void multiply(const share &y)
    {
        for (int c = 0; c < CHUNKS; c++)
            for (int j = 0; j < VEC; j++) x[c][j] *= y.x[c][j];
    }

    __device__ void add_scaled(const share &y, float factor)
    {
        for (int c = 0; c < CHUNKS; c++)
            for (int j = 0; j < VEC; j++) x[c][j] = fmaf(factor, y.x[c][j], x[c][j]);
    }

    /* The whole warp's dot product, in every lane. */
    __device__ float dot(const share &y) const
    {
        float sum = 0;
        for (int c = 0; c < CHUNKS; c++)
            for (int j = 0; j < VEC; j++) sum = fmaf(x[c][j], y.x[c][j], sum);
        return warp_sum(sum);
    }
};

__device__ void store_out(const arguments &a, long long at, float value)
{
    if (a.q.is_bf16)
        static_cast<bf16 *>(a.out)[at] = from_float<bf16>(value);
    else
        static_cast<float *>(a.out)[at] = value;
}

template <int VEC, int CHUNKS, int ROWS>
__global__
__launch_bounds__(THREADS) void kda_decode_kernel(__grid_constant__ const arguments a)
{
    using lane_share = share<VEC, CHUNKS>;
    __shared__ __align__(16) head s;
    const long long tile = blockIdx.x % a.tiles, unit = blockIdx.x / a.tiles;
    const long long n = unit / a.H, h = unit % a.H;
    const long long slot = a.slots == nullptr ? n : a.slots[n];
    const long long first = (tile * WARPS + threadIdx.x / WARP) * ROWS;
    float *state = a.state + (slot * a.H + h) * a.V * a.K;

    /* The rows are asked for first: they arrive while the head is prepared. */
    lane_share rows[ROWS];
    float v[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const bool inside = first + r < a.V;
        rows[r].read(state + (first + r) * a.K, inside ? a.K : 0);
        v[r] = inside ? load(a.v, n, h * a.V + first + r) : 0.0f;
    }
    prepare_head(a, n, h, s);

    lane_share q, k, decay;
    q.read(s.q, a.K), k.read(s.k, a.K), decay.read(s.decay, a.K);
    q.scale(s.q_factor), k.scale(s.k_factor);
    const float raw_beta = load(a.beta, n, h);
    const float beta = a.beta_logits ? sigmoid(raw_beta) : raw_beta;

    for (int r = 0; r < ROWS; r++) {
        rows[r].multiply(decay);
        const float u = beta * (v[r] - rows[r].dot(k));
        rows[r].add_scaled(k, u);
        const float o = a.scale * rows[r].dot(q);
        if (first + r >= a.V) continue; /* the same for the whole warp: the sums stay legal */
        rows[r].write(state + (first + r) * a.K, a.K);
        if (threadIdx.x % WARP == 0) store_out(a, (n * a.H + h) * a.V + first + r, o);
    }
}

operand operand_of(const kl_tensor &t)
{
    return {t.data, t.stride[0], t.dtype == KL_BF16};
}

template <int VEC, int CHUNKS, int ROWS>
kl_status launch(arguments &a, long long N, cudaStream_t stream, kl_error *err)
{
    constexpr long long rows = WARPS * ROWS; /* of a block */
    a.tiles = (a.V + rows - 1) / rows;
    if (N > MAX_BLOCKS / a.H || N * a.H > MAX_BLOCKS / a.tiles)
        return kl_fail(err, KL_ERR_VALUE,
                       "kda_decode: N * H * (V / %lld) must be <= %d, got N %lld", rows,
                       MAX_BLOCKS, N);
    const unsigned blocks = static_cast<unsigned>(N * a.H * a.tiles);
    kda_decode_kernel<VEC, CHUNKS, ROWS><<<blocks, THREADS, 0, stream>>>(a);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

} // namespace

kl_status kl_cuda_kda_decode(kl_backend *be, const kl_kda_decode *a, kl_error *err)
{
    const cudaStream_t stream = reinterpret_cast<kl_cuda_backend *>(be)->stream;
    const long long N = a->q.shape[0];
    arguments args = {
        .state = static_cast<float *>(a->state.data),
        .q = operand_of(a->q),
        .k = operand_of(a->k),
        .v = operand_of(a->v),
        .g = operand_of(a->g),
        .beta = operand_of(a->beta),
        .slots = static_cast<const int *>(a->slots.data),
        .A_log = static_cast<const float *>(a->A_log.data),
        .dt_bias = static_cast<const float *>(a->dt_bias.data),
        .out = a->out.data,
        .H = a->state.shape[1],
        .Hk = a->q.shape[1],
        .V = a->state.shape[2],
        .K = static_cast<int>(a->state.shape[3]),
        .gate = a->gate,
        .lower_bound = a->lower_bound,
        .scale = a->scale,
        .normalize = a->normalize,
        .beta_logits = a->beta_logits,
    };
    if (N == 0) return KL_OK;
    KL_TRY(kl_cuda_bind(be, err));
    /* Rows of the state start at multiples of K floats: four channels at a time need both. */
    const bool vector = args.K % 4 == 0 && reinterpret_cast<uintptr_t>(args.state) % 16 == 0;
    if (vector && args.K <= 128) return launch<4, 1, 8>(args, N, stream, err);
    if (vector) return launch<4, 2, 4>(args, N, stream, err);
    return launch<1, KL_KDA_MAX_K / WARP, 4>(args, N, stream, err);
}
