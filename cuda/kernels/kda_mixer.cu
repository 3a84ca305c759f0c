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
 * Measured     H200, in a step (bf16, context 1024, N = 1): 8.3 us after its gates' products, which
 *              take 1.9 and 2.7; with them, alone and cold, N = 16 29.7 us (2.4 TB/s), 64 85.2
 *              (3.3), 128 157 (3.6) (2026-11-22)
 */
#include "../device/barrier.cuh"
#include "../device/kda_mixer.cuh"

namespace {

constexpr int ROWS = 8, WARPS = 16, THREADS = WARPS * WARP;
constexpr int SIDE = MIXER_SIDE; /* threads that share a role */
constexpr int STATE_BYTES = SIDE * SIDE * 4;
static_assert(THREADS == 4 * SIDE && WARPS * ROWS == SIDE);

struct arguments {
    mixer_arguments mixer;
    const void *z;
    long long z_stride;
};

/* What the block knows of its head. Channels past K and rows past V are zero. */
struct head {
    float q[SIDE], k[SIDE], decay[SIDE], decay_low[SIDE]; /* the decay is the sum of both */
    float v[SIDE], o[SIDE], gate[SIDE];
    float beta;
};

/* Ask for what the block will read but for its inputs. */
template <class A> __device__ void ask_ahead(const mixer_arguments &a, unsigned n, unsigned h)
{
    const long long slot = mixer_slot_guess(a, n);
    const int K = a.kda.K, V = static_cast<int>(a.kda.V);
    const int first = warp_id() * ROWS, rows = min(ROWS, V - first);
    const float *state = a.kda.state + (slot * a.kda.H + h) * V * K;
    if (lane_id() == 0 && rows > 0) prefetch_l2(state + first * K, rows * K * 4);
    const int role = threadIdx.x / SIDE, i = threadIdx.x % SIDE;
    if (role == 3) {
        if (a.kda.dt_bias != nullptr && i < K) prefetch_line(a.kda.dt_bias + h * K + i);
    } else if (i < (role == 2 ? V : K)) {
        const mixer_channel<A> channel(a, role, h, i);
        prefetch_line(a.taps + channel.c * MIXER_WIDTH);
        prefetch_line(channel.window(a, slot));
    }
}

/* The convolution's output for one channel; its window moves. */
template <class A>
__device__ float convolve(const mixer_arguments &a, unsigned n, long long slot,
                          mixer_channel<A> channel)
{
    channel.read_window(a, slot);
    channel.read_input(a, n);
    channel.read_taps(a);
    channel.write_window(a, slot);
    return channel.output();
}

template <class A>
__device__ void prepare(const arguments &p, unsigned n, unsigned h, long long slot, head &s)
{
    const mixer_arguments &a = p.mixer;
    const int role = threadIdx.x / SIDE, i = threadIdx.x % SIDE;
    const bool inside = i < (role == 2 ? a.kda.V : a.kda.K);
    if (role < 3) {
        const float x = inside ? convolve<A>(a, n, slot, {a, role, h, i}) : 0.0f;
        (role == 0 ? s.q : role == 1 ? s.k : s.v)[i] = x;
        if (role == 2 && inside)
            s.gate[i] = sigmoid(
                to_float(static_cast<const A *>(p.z)[n * p.z_stride + h * a.kda.V + i]));
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
__device__ inline void ask_rows(float *held, const float *state, int rows, int K, barrier *here)
{
    if (lane_id() != 0) return;
    const int bytes = rows > 0 ? min(rows, ROWS) * K * 4 : 0;
    barrier_init(here, 1);
    barrier_init_done();
    barrier_arrive_expecting(here, bytes);
    if (bytes > 0) copy_bytes(held, state, bytes, here);
}

/* One token on the warp's rows; o of rows.row(). */
__device__ inline float step(mixer_rows<ROWS> &rows, const mixer_arguments &a, const head &s)
{
    float q[4], k[4];
    mixer_unit(s.k, warp_sum(mixer_squares(s.k)), k);
    rows.multiply(s.decay, s.decay_low);
    rows.learn(k, s.v[warp_id() * ROWS + rows.row()], s.beta);
    mixer_unit(s.q, warp_sum(mixer_squares(s.q)), q);
    return a.kda.scale * rows.dot(q);
}

template <class A>
__global__ __launch_bounds__(THREADS,
                             2) void kda_mixer_kernel(__grid_constant__ const arguments p)
{
    extern __shared__ __align__(16) float states[];
    __shared__ __align__(16) head s;
    __shared__ barrier here[WARPS];
    const mixer_arguments &a = p.mixer;
    const unsigned H = static_cast<unsigned>(a.kda.H), n = blockIdx.x / H, h = blockIdx.x % H;
    const int K = a.kda.K, V = static_cast<int>(a.kda.V);
    const int first = warp_id() * ROWS;
    let_next_start();
    ask_ahead<A>(a, n, h);
    wait_for_inputs();

    const long long slot = mixer_slot(a, n);
    float *const state = a.kda.state + ((slot * H + h) * V + first) * K;
    float *const held = states + first * K;
    ask_rows(held, state, V - first, K, &here[warp_id()]);
    prepare<A>(p, n, h, slot, s);
    __syncthreads();
    mixer_rows<ROWS> rows;
    barrier_wait(&here[warp_id()], 0);
    rows.read(held, V - first, K);
    const float o = step(rows, a, s);
    if (lane_id() % rows.LANES == 0) s.o[first + rows.row()] = to_float(from_float<A>(o));
    rows.write(state, V - first, K);
    __syncthreads();
    const int i = threadIdx.x;
    if (warp_id() >= SIDE / WARP) return;
    const float inverse = inverse_rms(mixer_sum_of_squares<A>(s.o, V), V, a.eps);
    if (i < V)
        static_cast<A *>(a.out)[(n * a.kda.H + h) * V + i] =
            from_float<A>(s.o[i] * inverse * a.norm_weight[i] * s.gate[i]);
}

bool takes(const kl_kda_mixer *a, const kl_kda_mixer_parts &p)
{
    const int64_t V = a->state.shape[2], K = a->state.shape[3];
    return mixer_suits(a) && K % 4 == 0 && K <= SIDE && V <= SIDE &&
           a->qkv.shape[0] <= MAX_BLOCKS / a->state.shape[1] &&
           is_wide(p.norm.z, V, a->out.dtype == KL_BF16 ? 8 : 4);
}

kl_status run(kl_backend *be, const kl_kda_mixer *a, const kl_kda_mixer_parts &p, kl_error *err)
{
    const arguments args = {
        .mixer = mixer_arguments_of(a, p),
        .z = p.norm.z.data,
        .z_stride = p.norm.z.stride[0],
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
    const size_t kda = a->single || a->guesses ? 0 : kl_cuda_kda_prefill_workspace(be, &p.kda);
    return kl_kda_mixer_bytes(a, kl_cuda_linear_pair_workspace(be, &p.gates), kda);
}

kl_status kl_cuda_kda_mixer(kl_backend *be, const kl_kda_mixer *a, kl_error *err)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    if (a->qkv.shape[0] == 0) return KL_OK;
    if (a->guesses) return kl_cuda_kda_mixer_guesses(be, a, p, err);
    KL_TRY(kl_cuda_linear_pair(be, &p.gates, err));
    if (takes(a, p)) return run(be, a, p, err);
    KL_TRY(kl_cuda_short_conv(be, &p.conv, err));
    KL_TRY(a->single ? kl_cuda_kda_decode(be, &p.kda, err)
                     : kl_cuda_kda_prefill(be, &p.kda, err));
    return kl_cuda_gated_rms_norm(be, &p.norm, err);
}
