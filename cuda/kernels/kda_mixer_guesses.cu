/*
 * kda_mixer_guesses.cu -- a KDA layer between its projections, where tokens are guesses.
 *
 * Computes     as kda_mixer.cu, token after token of each sequence; the state and the window are
 *              written after the first one, or, when it is known what was drawn, after the last of
 *              the guesses that were right, which are then all that is read
 * Shapes       qkv [T, H (2 K + V)]; g [T, H, K]; beta [T, H]; z, out [T, H, V]; state
 *              [S, H, V, K]; windows [S, C, 3]; tokens, drawn [T]
 * Layout       the states and windows dense; of the others the first axis may be strided
 * Precision    f32 or bf16 in and out, f32 arithmetic and state, roundings as in kda_mixer.cu
 * Grid         a block for each sequence and head. A warp has 8 rows of the state from the first
 *              token to the last, a thread a channel's window. What is prepared of a token lies in
 *              shared memory, twice: a warp may prepare the next one while others still read
 * Order        kda_mixer.cu's: the same bits
 * Roofline     4 MiB a sequence with H = 32, V = K = 128, as a single token; then a chain of tokens
 * Measured     not timed yet
 */
#include "../device/kda_mixer.cuh"

namespace {

constexpr int ROWS = 8, WARPS = 16, THREADS = WARPS * WARP;
constexpr int SIDE = MIXER_SIDE; /* threads that share a role */
static_assert(THREADS == 4 * SIDE && WARPS * ROWS == SIDE);

struct arguments {
    mixer_arguments mixer;
    const void *z;
    const int *tokens, *drawn; /* or null */
    long long z_stride;
};

/* What the block knows of a token. Channels past K and rows past V are zero. Lanes read four
 * neighbours at once, of either of two. */
struct alignas(16) head {
    float q[SIDE], k[SIDE], decay[SIDE], decay_low[SIDE]; /* the decay is the sum of both */
    float v[SIDE], o[SIDE], gate[SIDE];
    float beta;
};

/* A thread's part of each token: a channel of q, k, v (role 0, 1, 2) or of the decay. */
template <class A> struct preparation {
    const arguments &p;
    const int role, i;
    const unsigned h;
    const bool inside;
    mixer_channel<A> channel;
    kda_channel gate;

    __device__ preparation(const arguments &p, unsigned h, long long slot)
        : p(p), role(threadIdx.x / SIDE), i(threadIdx.x % SIDE), h(h),
          inside(i < (role == 2 ? p.mixer.kda.V : p.mixer.kda.K)),
          channel(p.mixer, role % 3, h, i), gate{}
    {
        if (!inside) return;
        if (role == 3) {
            gate = kda_channel_of(p.mixer.kda, h, i);
        } else {
            channel.read_window(channel.window(p.mixer, slot));
            channel.read_taps(p.mixer);
        }
    }

    /* The convolution's output; the window moves. */
    __device__ float convolve(int t)
    {
        channel.read_input(p.mixer, t);
        const float x = channel.output();
#pragma unroll
        for (int j = 1; j < MIXER_PAST; j++) channel.past[j - 1] = channel.past[j];
        channel.past[MIXER_PAST - 1] = channel.input;
        return x;
    }

    __device__ void prepare_decay(int t, head &s) const
    {
        const kda_arguments &a = p.mixer.kda;
        if (i == SIDE - 1) s.beta = sigmoid(kda_load(a.beta, t, h));
        float decay = 0, low = 0;
        if (inside) {
            const float log_decay = kda_log_decay(a, gate, kda_load(a.g, t, h * a.K + i));
            decay = expf(log_decay);
            low = kda_decay_low(log_decay, decay);
        }
        s.decay[i] = decay, s.decay_low[i] = low;
    }

    __device__ void prepare(int t, head &s)
    {
        if (role == 3) return prepare_decay(t, s);
        const float x = inside ? convolve(t) : 0.0f;
        (role == 0 ? s.q : role == 1 ? s.k : s.v)[i] = x;
        if (role == 2 && inside)
            s.gate[i] = norm_gate<A>(
                to_float(static_cast<const A *>(p.z)[t * p.z_stride + h * p.mixer.kda.V + i]));
    }

    __device__ void write_window(long long slot) const
    {
        if (role == 3 || !inside) return;
        A *const to = channel.window(p.mixer, slot);
#pragma unroll
        for (int j = 0; j < MIXER_PAST; j++) to[j] = channel.past[j];
    }
};

/* The warp's rows read a token. */
__device__ inline void learn(mixer_rows<ROWS> &rows, const head &s)
{
    float k[4];
    mixer_unit(s.k, warp_sum(mixer_squares(s.k)), k);
    rows.multiply(s.decay, s.decay_low);
    rows.learn(k, s.v[warp_id() * ROWS + rows.row()], s.beta);
}

/* And answer; then the first warps write what the norm and the gate make of it. */
template <class A>
__device__ void answer(const mixer_rows<ROWS> &rows, const mixer_arguments &a, int t,
                       unsigned h, head &s)
{
    float q[4];
    const int i = threadIdx.x, V = static_cast<int>(a.kda.V);
    mixer_unit(s.q, warp_sum(mixer_squares(s.q)), q);
    const float o = a.kda.scale * rows.dot(q);
    if (lane_id() % rows.LANES == 0)
        s.o[warp_id() * ROWS + rows.row()] = to_float(from_float<A>(o));
    __syncthreads();
    if (warp_id() >= SIDE / WARP) return;
    const float factor = norm_factor<A>(mixer_sum_of_squares<A>(s.o, V), V, a.eps);
    if (i < V)
        static_cast<A *>(a.out)[(t * a.kda.H + h) * V + i] =
            from_float<A>(gated(s.o[i], factor, a.norm_weight[i], s.gate[i]));
}

/* Past the last of the guesses from token t on that are what was drawn before them. */
__device__ inline int end_of_right(const arguments &p, int t, int end)
{
    while (t < end && p.tokens[t] == p.drawn[t - 1]) t++;
    return t;
}

template <class A>
__global__ __launch_bounds__(THREADS) void guesses_kernel(__grid_constant__ const arguments p)
{
    __shared__ head heads[2];
    const mixer_arguments &a = p.mixer;
    const unsigned H = static_cast<unsigned>(a.kda.H), n = blockIdx.x / H, h = blockIdx.x % H;
    const int K = a.kda.K, first = warp_id() * ROWS;
    const int V = static_cast<int>(a.kda.V);
    let_next_start();
    wait_for_inputs();

    const int certain = a.kda.cu[n];
    const bool again = p.drawn != nullptr;
    const int begin = certain + (again ? 1 : 0);
    const int end = again ? end_of_right(p, begin, a.kda.cu[n + 1]) : a.kda.cu[n + 1];
    if (begin >= end) return;
    const int last = again ? end - 1 : certain; /* of those that the state keeps */
    const long long slot = mixer_slot(a, n);
    float *const state = a.kda.state + ((slot * H + h) * V + first) * K;
    preparation<A> prepared(p, h, slot);
    mixer_rows<ROWS> rows;
    rows.read(state, V - first, K);
    for (int t = begin; t < end; t++) {
        head &s = heads[t % 2];
        prepared.prepare(t, s);
        __syncthreads();
        learn(rows, s);
        if (t == last) {
            rows.write(state, V - first, K);
            prepared.write_window(slot);
        }
        if (!again) answer<A>(rows, a, t, h, s);
    }
}

/* The order of the norm is that of aligned rows. */
kl_status check(const kl_kda_mixer *a, const kl_kda_mixer_parts &p, kl_error *err)
{
    const int64_t V = a->state.shape[2], K = a->state.shape[3], N = a->cu_seqlens.shape[0] - 1;
    const int n = a->out.dtype == KL_BF16 ? 8 : 4;
    if (mixer_suits(a) && K % 4 == 0 && K <= SIDE && V <= SIDE && is_wide(p.norm.z, V, n) &&
        N <= MAX_BLOCKS / a->state.shape[1])
        return KL_OK;
    return kl_fail(err, KL_ERR_UNAVAILABLE,
                   "kda_mixer: guesses need K a multiple of 4 and V of 8, both up to %d, a "
                   "convolution of %d taps and aligned memory on CUDA, got K %lld, V %lld and "
                   "%lld taps",
                   SIDE, MIXER_WIDTH, (long long)K, (long long)V,
                   (long long)a->conv_weight.shape[1]);
}

} // namespace

kl_status kl_cuda_kda_mixer_guesses(kl_backend *be, const kl_kda_mixer *a,
                                    const kl_kda_mixer_parts &p, kl_error *err)
{
    KL_TRY(check(a, p, err));
    KL_TRY(kl_cuda_linear_pair(be, &p.gates, err));
    const arguments args = {
        .mixer = mixer_arguments_of(a, p),
        .z = p.norm.z.data,
        .tokens = static_cast<const int *>(a->tokens.data),
        .drawn = static_cast<const int *>(a->drawn.data),
        .z_stride = p.norm.z.stride[0],
    };
    const unsigned blocks =
        static_cast<unsigned>((a->cu_seqlens.shape[0] - 1) * a->state.shape[1]);
    return with_float_type(a->out.dtype, [&](auto t) {
        return kl_cuda_launch(guesses_kernel<decltype(t)>, blocks, THREADS, 0,
                              kl_cuda_stream(be), err, args);
    });
}
