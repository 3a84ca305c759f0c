/*
 * kda_mixer.cu -- a KDA layer between its projections, in one kernel for a token step.
 *
 * Computes     q, k, v = silu(conv(qkv));  o = kda_decode(q, k, v, g, beta);
 *              out = o / sqrt(mean(o^2) + eps) * weight * sigmoid(z), as backend/ops.h has it
 * Shapes       qkv [N, H (2 K + V)]; g [N, H, K]; beta [N, H]; z, out [N, H, V]; state
 *              [S, H, V, K]; windows [S, C, 3]
 * Layout       the states and windows dense; of the others the first axis may be strided
 * Precision    f32 or bf16 in and out, f32 arithmetic and state; q, k, v and o are rounded to the
 *              activations' type where the three operations store them
 * Grid         a block for each sequence and head. 128 threads each convolve q, k and v and make
 *              the decays, while the state comes to shared memory; then a warp has 8 rows of it, a
 *              lane the same four channels of each. Before its inputs are there a block asks the
 *              L2 for its state
 * Order        that of short_conv.cu, kda_decode.cu and norm.cu: the same bits. Sums of 8 rows take
 *              the butterfly's steps together, each half of the lanes keeping half of the rows
 * Roofline     2 * 4 * N*H*V*K bytes of state: 4 MiB a sequence with H = 32, V = K = 128: 1.41 us
 *              on an H100 (3.0 TB/s)
 * Measured     H100, in a model (int8, context 1024, N = 1): 7.8 us, 18 % of the roofline
 *              (2026-11-22)
 */
#include "../device/barrier.cuh"
#include "../device/kda.cuh"
#include "../device/launch.cuh"
#include "../device/math.cuh"
#include "../device/wide.cuh"

extern "C" {
#include "backend/kda_mixer.h"
}

namespace {

constexpr int ROWS = 8, WARPS = 16, THREADS = WARPS * WARP;
constexpr int SIDE = 128; /* threads that share a role, and the most of K and of V */
constexpr int STATE_BYTES = SIDE * SIDE * 4;
constexpr int WIDTH = 4, PAST = WIDTH - 1;
static_assert(THREADS == 4 * SIDE && WARPS * ROWS == SIDE);

struct arguments {
    kda_arguments kda; /* but for q, k and v */
    const void *qkv, *z;
    const float *taps, *norm_weight;
    void *windows, *out;
    long long qkv_stride, z_stride, slots; /* slots: of the pool */
    float eps;
};

/* What the block knows of its head. Channels past K and rows past V are zero. */
struct head {
    float q[SIDE], k[SIDE], decay[SIDE], decay_low[SIDE]; /* the decay is the sum of both */
    float v[SIDE], o[SIDE], gate[SIDE];
    float beta;
};

/* Channel i of q, k or v (role 0, 1, 2) among all channels. */
__device__ long long channel_of(const kda_arguments &a, int role, unsigned h, int i)
{
    return role == 2 ? 2 * a.H * a.K + h * a.V + i : (role * a.H + h) * a.K + i;
}

/* Ask for what the block will read but for its inputs. The slot may be about to be written, so
 * it is read past the L1 and only believed where it leads into the pool. */
template <class A> __device__ void ask_ahead(const arguments &a, unsigned n, unsigned h)
{
    const long long slot = a.kda.slots == nullptr ? n : __ldcg(a.kda.slots + n);
    if (slot < 0 || slot >= a.slots) return;
    const int K = a.kda.K, V = static_cast<int>(a.kda.V);
    const int first = warp_id() * ROWS, rows = min(ROWS, V - first);
    const float *state = a.kda.state + (slot * a.kda.H + h) * V * K;
    if (lane_id() == 0 && rows > 0) prefetch_l2(state + first * K, rows * K * 4);
    const int role = threadIdx.x / SIDE, i = threadIdx.x % SIDE;
    if (role == 3) {
        if (a.kda.dt_bias != nullptr && i < K) prefetch_line(a.kda.dt_bias + h * K + i);
    } else if (i < (role == 2 ? V : K)) {
        const long long c = channel_of(a.kda, role, h, i), C = a.kda.H * (2 * K + V);
        prefetch_line(a.taps + c * WIDTH);
        prefetch_line(static_cast<const A *>(a.windows) + (slot * C + c) * PAST);
    }
}

/* The convolution's output for one channel; its window moves. */
template <class A>
__device__ float convolve(const arguments &a, unsigned n, long long slot, long long c)
{
    const long long C = a.kda.H * (2 * a.kda.K + a.kda.V);
    A *const window = static_cast<A *>(a.windows) + (slot * C + c) * PAST;
    const A input = static_cast<const A *>(a.qkv)[n * a.qkv_stride + c];
    const A past[PAST] = {window[0], window[1], window[2]};
    float taps[WIDTH];
    load_floats<WIDTH>(a.taps + c * WIDTH, taps);
    float y = 0;
#pragma unroll
    for (int j = 0; j < PAST; j++) y = fmaf(taps[j], to_float(past[j]), y);
    y = fmaf(taps[PAST], to_float(input), y);
    window[0] = past[1], window[1] = past[2], window[2] = input;
    return to_float(from_float<A>(silu(y)));
}

template <class A>
__device__ void prepare(const arguments &a, unsigned n, unsigned h, long long slot, head &s)
{
    const int role = threadIdx.x / SIDE, i = threadIdx.x % SIDE;
    const bool inside = i < (role == 2 ? a.kda.V : a.kda.K);
    if (role < 3) {
        const float x = inside ? convolve<A>(a, n, slot, channel_of(a.kda, role, h, i)) : 0.0f;
        (role == 0 ? s.q : role == 1 ? s.k : s.v)[i] = x;
        if (role == 2 && inside)
            s.gate[i] = sigmoid(
                to_float(static_cast<const A *>(a.z)[n * a.z_stride + h * a.kda.V + i]));
        return;
    }
    if (i == SIDE - 1) s.beta = sigmoid(kda_load(a.kda.beta, n, h));
    float decay = 0, low = 0;
    if (inside) {
        const float log_decay = kda_log_decay(a.kda, kda_channel_of(a.kda, h, i),
                                              kda_load(a.kda.g, n, h * a.kda.K + i));
        decay = expf(log_decay);
        low = kda_decay_low(log_decay, decay);
    }
    s.decay[i] = decay, s.decay_low[i] = low;
}

/* A warp's rows of the state. The copy engine brings them to shared memory, as they lie: the
 * registers would be too few while the head is prepared. */
struct state_rows {
    float x[ROWS][4];

    static __device__ void ask(float *held, const float *state, int rows, int K, barrier *here)
    {
        if (lane_id() != 0) return;
        const int bytes = rows > 0 ? min(rows, ROWS) * K * 4 : 0;
        barrier_init(here, 1);
        barrier_init_done();
        barrier_arrive_expecting(here, bytes);
        if (bytes > 0) copy_bytes(held, state, bytes, here);
    }

    /* After a barrier of the block. Rows past V and channels past K are zeros. */
    __device__ void take(const float *held, int rows, int K, barrier *here)
    {
        const int at = lane_id() * 4;
        barrier_wait(here, 0);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            x[r][0] = x[r][1] = x[r][2] = x[r][3] = 0;
            if (r < rows && at < K) load_floats<4>(held + r * K + at, x[r]);
        }
    }

    __device__ void write(float *state, int rows, int K) const
    {
        const int at = lane_id() * 4;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < rows && at < K) store_floats<4>(state + r * K + at, x[r]);
    }

    __device__ void multiply(const head &s)
    {
        float decay[4], low[4];
        load_floats<4>(s.decay + lane_id() * 4, decay);
        load_floats<4>(s.decay_low + lane_id() * 4, low);
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

    /* The dot product of row lane / 4 with y, in the order of a butterfly over the lanes: where
     * half of them keep one half of the rows, a step costs half of the one before. */
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
        return warp_sum<WARP / ROWS>(sum[0]);
    }
};

/* This lane's channels of q or k, brought to unit length as kda_norm_factor() has it. */
__device__ void unit(const float (&from)[SIDE], float (&to)[4])
{
    float sum = 0;
#pragma unroll
    for (int i = 0; i < SIDE; i += WARP) sum += from[i + lane_id()] * from[i + lane_id()];
    const float factor = 1 / sqrtf(warp_sum(sum) + KDA_NORM_EPS);
    load_floats<4>(from + lane_id() * 4, to);
#pragma unroll
    for (int j = 0; j < 4; j++) to[j] *= factor;
}

/* One token on the warp's rows; o of row lane / 4. */
__device__ float step(state_rows &rows, const arguments &a, const head &s)
{
    float k[4], q[4];
    unit(s.k, k);
    rows.multiply(s);
    const float u = s.beta * (s.v[warp_id() * ROWS + lane_id() / 4] - rows.dot(k));
#pragma unroll
    for (int r = 0; r < ROWS; r++) rows.add(k, __shfl_sync(ALL_LANES, u, r * 4), r);
    unit(s.q, q);
    return a.kda.scale * rows.dot(q);
}

/* norm.cu's sum of squares of a row of activations, in every lane. */
template <class A> __device__ float sum_of_squares(const float *o, int V)
{
    constexpr int VEC = 16 / sizeof(A), LANES = sizeof(A) == 2 ? WARP / 2 : WARP;
    const int at = lane_id() % LANES * VEC;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < VEC; j++)
        if (at < V) sum = fmaf(o[at + j], o[at + j], sum);
    return warp_sum<LANES>(sum);
}

template <class A>
__global__ __launch_bounds__(THREADS,
                             2) void kda_mixer_kernel(__grid_constant__ const arguments a)
{
    extern __shared__ __align__(16) float states[];
    __shared__ __align__(16) head s;
    __shared__ barrier here[WARPS];
    const unsigned H = static_cast<unsigned>(a.kda.H), n = blockIdx.x / H, h = blockIdx.x % H;
    const int K = a.kda.K, V = static_cast<int>(a.kda.V);
    const int first = warp_id() * ROWS;
    let_next_start();
    ask_ahead<A>(a, n, h);
    wait_for_inputs();

    const long long slot = a.kda.slots == nullptr ? n : a.kda.slots[n];
    float *const state = a.kda.state + ((slot * H + h) * V + first) * K;
    float *const held = states + first * K;
    state_rows::ask(held, state, V - first, K, &here[warp_id()]);
    prepare<A>(a, n, h, slot, s);
    __syncthreads();
    state_rows rows;
    rows.take(held, V - first, K, &here[warp_id()]);
    const float o = step(rows, a, s);
    if (lane_id() % 4 == 0) s.o[first + lane_id() / 4] = to_float(from_float<A>(o));
    rows.write(state, V - first, K);
    __syncthreads();
    const int i = threadIdx.x;
    if (warp_id() >= SIDE / WARP) return;
    const float inverse = inverse_rms(sum_of_squares<A>(s.o, V), V, a.eps);
    if (i < V)
        static_cast<A *>(a.out)[(n * a.kda.H + h) * V + i] =
            from_float<A>(s.o[i] * inverse * a.norm_weight[i] * s.gate[i]);
}

/* Whether the kernel takes the call, in the order of norm.cu for aligned rows. */
bool takes(const kl_kda_mixer *a, const kl_kda_mixer_parts &p)
{
    const int64_t V = a->state.shape[2], K = a->state.shape[3];
    const int n = a->out.dtype == KL_BF16 ? 8 : 4;
    return a->single && K % 4 == 0 && K <= SIDE && V <= SIDE &&
           a->conv_weight.shape[1] == WIDTH &&
           a->qkv.shape[0] <= MAX_BLOCKS / a->state.shape[1] &&
           is_aligned(a->state.data, 0, 4, 16) && is_aligned(a->conv_weight.data, 0, 4, 16) &&
           is_wide(p.norm.z, V, n) && is_wide(a->out, V, n) && is_wide(a->norm_weight, V, n);
}

kl_status run(kl_backend *be, const kl_kda_mixer *a, const kl_kda_mixer_parts &p, kl_error *err)
{
    const arguments args = {
        .kda = kda_arguments_of(&p.kda),
        .qkv = a->qkv.data,
        .z = p.norm.z.data,
        .taps = static_cast<const float *>(a->conv_weight.data),
        .norm_weight = static_cast<const float *>(a->norm_weight.data),
        .windows = a->conv_state.data,
        .out = a->out.data,
        .qkv_stride = a->qkv.stride[0],
        .z_stride = p.norm.z.stride[0],
        .slots = a->state.shape[0],
        .eps = a->eps,
    };
    const unsigned blocks = static_cast<unsigned>(a->qkv.shape[0] * a->state.shape[1]);
    return with_float_type(a->out.dtype, [&](auto t) {
        const auto kernel = kda_mixer_kernel<decltype(t)>;
        KL_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         STATE_BYTES),
                    err);
        return kl_cuda_launch(kernel, blocks, THREADS, STATE_BYTES, kl_cuda_stream(be), err,
                              args);
    });
}

} // namespace

size_t kl_cuda_kda_mixer_workspace(kl_backend *be, const kl_kda_mixer *a)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    const size_t kda = a->single ? 0 : kl_cuda_kda_prefill_workspace(be, &p.kda);
    return kl_kda_mixer_bytes(a, kl_cuda_linear_pair_workspace(be, &p.gates), kda);
}

kl_status kl_cuda_kda_mixer(kl_backend *be, const kl_kda_mixer *a, kl_error *err)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    if (a->qkv.shape[0] == 0) return KL_OK;
    KL_TRY(kl_cuda_linear_pair(be, &p.gates, err));
    if (takes(a, p)) return run(be, a, p, err);
    KL_TRY(kl_cuda_short_conv(be, &p.conv, err));
    KL_TRY(a->single ? kl_cuda_kda_decode(be, &p.kda, err)
                     : kl_cuda_kda_prefill(be, &p.kda, err));
    return kl_cuda_gated_rms_norm(be, &p.norm, err);
}
