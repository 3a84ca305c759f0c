/*
 * kda_mixer_step.cu -- a KDA layer between its projections, for a token or a few: with the gates'
 * products, and all sides 128.
 *
 * Computes     q, k, v = silu(conv(qkv)); g = f_low f_b^T; z = g_low g_b^T;
 *              o = kda_decode(q, k, v, g, beta); out = o / sqrt(mean(o^2) + eps) * weight *
 *              sigmoid(z), as backend/ops.h has it
 * Shapes       qkv [N, 3 H 128]; f_low, g_low [N, 128]; beta [N, H]; out [N, H, 128]; state
 *              [S, H, 128, 128]; windows [S, 3 H 128, 3]; N <= 4
 * Layout       the states, windows and weights dense; of the others the first axis may be strided
 * Precision    bf16 in and out, f32 arithmetic and state; q, k, v, z and o are rounded to bf16
 *              where the operations store them; weights as in linear_step.cu
 * Grid         a block for each head and sequence. 128 threads each convolve q, k and v; a warp makes
 *              16 channels of g or of z from rows of weights in its registers; then it has 8 rows
 *              of the state there, a lane the same four channels of each. A single token's inputs
 *              may be arriving (device/arriving.cuh) where weights are not bf16: then the gates are done and the state is
 *              there before q, k and v are
 * Order        that of linear_step.cu, short_conv.cu, kda_decode.cu and norm.cu: the same bits
 * Roofline     4 MiB of state and 2 MiB of weights in bf16 with H = 32: 2.1 us on an H100 (3.0
 *              TB/s)
 * Measured     in a step (context 1024), from the end of the kernel before: H200, bf16 5.6 us
 *              (2026-11-23); H100, int8 4.4, int4 6.7 (2026-11-22)
 *
 * Each instruction runs once, and waits for its code to come from far: what is fixed is a constant
 * here, and the dot products with k and with q are one piece of code. Little shared memory, so that
 * a block finds room beside those of the kernel before.
 */
#include "../device/barrier.cuh"
#include "../device/kda_mixer.cuh"
#include "../device/stream.cuh"

namespace {

constexpr int ROWS = 8, WARPS = 16, THREADS = WARPS * WARP;
constexpr int SIDE = MIXER_SIDE; /* threads that share a role */
static_assert(THREADS == 4 * SIDE && WARPS * ROWS == SIDE);

/* Registers, as threads of which a multiprocessor would hold two blocks: 56, what two blocks of the
 * in-projection leave (linear_step_turns.cuh). */
constexpr int BOUND = THREADS + 2 * WARP;

constexpr int LOW_PIECES = SIDE / 8; /* of 16 bytes: f_low, and then g_low, are as many */

/* Of those that have no channel to convolve: who asks for f_low and g_low, and for beta. */
constexpr int LOW_WARP = WARPS - 1, BETA_WARP = WARPS - 2;
static_assert(2 * LOW_PIECES == WARP);

struct arguments {
    mixer_arguments mixer;
    const bf16 *f_low, *g_low, *beta;
    long long f_stride, g_stride, beta_stride;
    weight_view f_b, g_b;
    bool unsettled; /* one of the weights; then none of the layer's is taken for written */
};

/* What the block knows of its head. */
struct head {
    float qkv[3][SIDE];                  /* q and k of unit length */
    float raw[2][SIDE];                  /* q and k before that */
    float decay[SIDE], decay_low[SIDE];  /* the decay is the sum of both */
    float gate[SIDE], norm_weight[SIDE]; /* gate: of z */
    uint4 low[2][LOW_PIECES];            /* f_low, g_low */
    float beta;
    barrier low_here;

    __device__ float *o() { return raw[0]; } /* where nobody reads q any more */
};

/* Which head the block has, and what of it this thread: channel i of q, k or v (role 0, 1, 2), or
 * what comes beside the convolution (3). Heads of a pool, with 64 KB each, are fewer than 2^32. */
struct place {
    unsigned n, H;
    int role, i;

    __device__ explicit place(const kda_arguments &a)
        : n(blockIdx.y), H(static_cast<unsigned>(a.H)), role(threadIdx.x / SIDE),
          i(threadIdx.x % SIDE)
    {
    }

    /* Asked for wherever it is needed: as a number that is held, it ends in local memory. */
    static __device__ unsigned h()
    {
        unsigned x;
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
        return x;
    }

    /* Of qkv. */
    __device__ unsigned column() const { return (role * H + h()) * SIDE + i; }

    /* The warp's rows. */
    __device__ float *state(const mixer_arguments &a, unsigned slot) const
    {
        return a.kda.state + (long long){slot * H + h()} * (SIDE * SIDE) +
               warp_id() * ROWS * SIDE;
    }

    __device__ bf16 *window(const mixer_arguments &a, unsigned slot) const
    {
        bf16 *const first = static_cast<bf16 *>(a.windows) + (long long){column()} * MIXER_PAST;
        return first + (long long){slot * H} * (3 * SIDE * MIXER_PAST);
    }
};

/* ---- gates ------------------------------------------------------------------------------- */

/* What a lane has of rows r and r + 8 for a step of columns, as an mma takes it. */
template <kl_weight_format format> struct gate_step {
    using F = stream_format<format, 1>;
    uint4 raw[2];
    float scale[2];

    __device__ void load(const weight_row (&rows)[2], int column)
    {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            raw[e] = load_once(rows[e].data + column / F::PIECE * 16);
            scale[e] = scale_at<format>(rows[e], column);
        }
    }

    /* For the product with four columns each of x, piece by piece. */
    __device__ void unpack(uint32_t (&to)[F::PIECE / 4][4]) const
    {
        uint32_t top[1][F::PIECE / 2], bottom[1][F::PIECE / 2];
        F::split(raw[0], scale[0], top);
        F::split(raw[1], scale[1], bottom);
#pragma unroll
        for (int i = 0; i < F::PIECE / 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                to[i][j] = (j % 2 == 0 ? top : bottom)[0][2 * i + j / 2];
    }

    __device__ float scaled(float sum, int e) const
    {
        if constexpr (F::WHOLE) return __fmul_rn(F::codec::ONE * scale[e], sum);
        return sum;
    }
};

/* Word by word they come to the registers where the mma wants them: to move them there after the wait
 * takes 40 instructions. */
template <> struct gate_step<KL_W_BF16> {
    uint32_t words[2][4];

    __device__ void load(const weight_row (&rows)[2], int column)
    {
#pragma unroll
        for (int i = 0; i < 8; i++)
            words[i / 4][i % 4] = reinterpret_cast<const uint32_t *>(
                rows[i % 2].data)[column / 2 + i / 4 * 2 + i % 4 / 2];
    }

    __device__ void unpack(uint32_t (&to)[2][4]) const
    {
#pragma unroll
        for (int i = 0; i < 8; i++) to[i / 4][i % 4] = words[i / 4][i % 4];
    }

    static __device__ float scaled(float sum, int)
    {
        return sum;
    }
};

/* Products of g_low and f_low with 16 rows of g_b (the first half of the warps) and of f_b, in
 * linear_step.cu's order: its warps' steps of the columns in turn. */
template <kl_weight_format format> struct head_gates {
    using F = stream_format<format, 1>;
    static constexpr int STEPS = SIDE / F::STEP;
    gate_step<format> steps[STEPS];
    kda_channel channel;

    static __device__ bool is_decay() { return warp_id() >= WARPS / 2; }

    static __device__ int first() { return warp_id() % (WARPS / 2) * STREAM_ROWS; }

    /* Of the head: which this lane is given. */
    static __device__ int own()
    {
        return first() + lane_id() / STREAM_LANES + lane_id() % 2 * 8;
    }

    static __device__ int column(int step)
    {
        return step * F::STEP + lane_id() % STREAM_LANES * F::PIECE;
    }

    __device__ head_gates(const arguments &p, unsigned h)
        : channel(kda_channel_of(p.mixer.kda, h, own()))
    {
        const weight_view &w = is_decay() ? p.f_b : p.g_b;
        const int64_t row = static_cast<int64_t>(h) * SIDE + first() + lane_id() / STREAM_LANES;
        const weight_row rows[2] = {row_of(w, row), row_of(w, row + 8)};
        /* At once: the words come through an L1 that holds a part of them. */
        if (format == KL_W_BF16 && lane_id() == 0)
            prefetch_l2(rows[0].data, STREAM_ROWS * SIDE * sizeof(bf16));
#pragma unroll
        for (int i = 0; i < STEPS; i++) steps[i].load(rows, column(i));
    }

    /* Of both rows with x, which stands in all columns of the mma: each lane has both. A step is
     * another warp's there: rounded before it is added. */
    __device__ void sums_of(const uint4 *x, float (&sum)[2]) const
    {
        sum[0] = sum[1] = 0;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            uint32_t w[F::PIECE / 4][4];
            float acc[4] = {};
            steps[s].unpack(w);
#pragma unroll
            for (int i = 0; i < F::PIECE / 4; i++) {
                const uint4 v = x[column(s) / 8 + i / 2];
                mma_bf16(acc, w[i], {i % 2 == 0 ? v.x : v.z, i % 2 == 0 ? v.y : v.w});
            }
#pragma unroll
            for (int e = 0; e < 2; e++) sum[e] += steps[s].scaled(acc[2 * e], e);
        }
    }

    /* This lane's channel: two of four have one, the others' are the same. */
    __device__ float multiply(const head &s) const
    {
        float both[2];
        sums_of(s.low[is_decay() ? 0 : 1], both);
        return lane_id() % 2 == 0 ? both[0] : both[1];
    }

    __device__ void share_decay(const kda_arguments &a, float g, head &s) const
    {
        const float log_decay = kda_log_decay(a, channel, g), decay = expf(log_decay);
        s.decay[own()] = decay;
        s.decay_low[own()] = kda_decay_low(log_decay, decay);
    }

    __device__ void share(const arguments &p, float x, head &s) const
    {
        if (lane_id() % STREAM_LANES >= 2) return;
        if (is_decay())
            share_decay(p.mixer.kda, x, s);
        else
            s.gate[own()] = norm_gate<bf16>(to_float(from_float<bf16>(x)));
    }
};

/* ---- a token of a head ------------------------------------------------------------------- */

/* Ask the L2 for what lies in a slot: nobody sees that who is still writing there. */
__device__ inline void ask_ahead(const mixer_arguments &a, const place &at, unsigned slot)
{
    if (lane_id() == 0) prefetch_l2(at.state(a, slot), ROWS * SIDE * 4);
    if (at.role < 3) prefetch_line(at.window(a, slot));
}

/* What a thread reads of the token: a channel of q, k or v, 16 bytes of f_low and g_low, or beta. */
struct token {
    const bf16 *input;
    bf16 *window;
    mixer_channel<bf16> channel;

    /* What is known before the inputs are there: also where they are. */
    __device__ token(const arguments &p, const place &at, unsigned guess)
        : window(at.window(p.mixer, guess)), channel(at.column())
    {
        const mixer_arguments &a = p.mixer;
        const int lane = lane_id();
        if (at.role < 3) {
            input = static_cast<const bf16 *>(a.qkv) + at.n * a.qkv_stride + at.column();
            channel.read_taps(a);
        } else if (warp_id() == BETA_WARP) {
            input = p.beta + at.n * p.beta_stride + at.h();
        } else if (lane < LOW_PIECES) {
            input = p.f_low + at.n * p.f_stride + lane * 8;
        } else {
            input = p.g_low + at.n * p.g_stride + (lane - LOW_PIECES) * 8;
        }
    }

    __device__ void ask(head &s)
    {
        if (warp_id() != LOW_WARP) {
            channel.input = load_here(input);
        } else {
            copy_async(&s.low[0][0] + lane_id(), input, true);
            barrier_arrive_after_copies(&s.low_here);
        }
    }

    /* f_low and g_low as they arrive, */
    __device__ void receive_low(head &s) const
    {
        if (warp_id() != LOW_WARP) return;
        (&s.low[0][0])[lane_id()] = await(reinterpret_cast<const uint4 *>(input));
        barrier_arrive(&s.low_here);
    }

    /* and the others. */
    __device__ void receive()
    {
        if (warp_id() != LOW_WARP) channel.input = await(input);
    }

    /* The window, on its way at once where the slot that was guessed is right; the slot. */
    __device__ unsigned read(const mixer_arguments &a, const place &at, unsigned slot)
    {
#pragma unroll 1
        for (;;) {
            if (at.role < 3) channel.read_window(window);
            const unsigned there =
                a.kda.slots == nullptr ? at.n : load_here(a.kda.slots + at.n);
            if (slot == there) return slot;
            slot = there;
            window = at.window(a, slot);
        }
    }

    /* q, k and v, the first two of unit length; beta. By all threads of the block. */
    __device__ void convolve(const place &at, head &s) const
    {
        float x = 0;
        if (at.role == 3) {
            if (warp_id() == BETA_WARP) s.beta = sigmoid(to_float(channel.input));
        } else {
            x = channel.output();
            channel.write_window(window);
            if (at.role < 2) s.raw[at.role][at.i] = x;
        }
        __syncthreads();
        if (at.role == 3) return;
        if (at.role < 2) x *= mixer_unit_factor(warp_sum(mixer_squares(s.raw[at.role])));
        s.qkv[at.role][at.i] = x;
    }
};

/* What a block needs of its head before its rows read the token, up to a barrier; where they lie. */
template <class Gates>
__device__ float *prepare(const arguments &p, const place &at, unsigned guess, token &own,
                          const Gates &gates, mixer_rows<ROWS> &rows, head &s)
{
    wait_for_inputs();
    own.ask(s);
    const unsigned slot = own.read(p.mixer, at, guess);
    own.convolve(at, s);
    barrier_wait(&s.low_here, 0);
    const float x = gates.multiply(s);
    float *const state = at.state(p.mixer, slot);
    rows.read_whole(state); /* no earlier: there are too few registers */
    gates.share(p, x, s);
    return state;
}

/* The same as inputs arrive: f_low and g_low are of the first tiles of their product, v of the last
 * ones. Until these come the gates are done and the state is there. */
template <class Gates>
__device__ float *prepare_early(const arguments &p, const place &at, unsigned guess, token &own,
                                const Gates &gates, mixer_rows<ROWS> &rows, head &s)
{
    float *const state = at.state(p.mixer, own.read(p.mixer, at, guess));
    own.receive_low(s);
    barrier_wait(&s.low_here, 0);
    gates.share(p, gates.multiply(s), s);
    rows.read_whole(state);
    own.receive();
    own.convolve(at, s);
    return state;
}

/* The warp's rows read the token and are written; o to the block. The dot products with k and with q
 * are one piece of code. */
__device__ inline void recur(mixer_rows<ROWS> &rows, float *state, float scale, head &s)
{
    const int own = warp_id() * ROWS + rows.row();
    rows.multiply(s.decay, s.decay_low);
#pragma unroll 1
    for (int role = 1;; role--) {
        float x[4];
        load_floats<4>(s.qkv[role] + lane_id() * 4, x);
        const float sum = rows.dot(x);
        if (role == 0) {
            if (lane_id() % rows.LANES == 0)
                s.o()[own] = to_float(from_float<bf16>(scale * sum));
            return;
        }
        rows.add_outer(x, s.beta * (s.qkv[2][own] - sum));
        rows.write(state, ROWS, SIDE);
    }
}

/* By the first warps. */
__device__ inline void finish(const mixer_arguments &a, const place &at, head &s)
{
    const float *const o = s.o();
    const float factor = norm_factor<bf16>(mixer_sum_of_squares<bf16>(o, SIDE), SIDE, a.eps);
    const float out = gated(o[at.i], factor, s.norm_weight[at.i], s.gate[at.i]);
    const long long to = (long long){at.n * at.H + at.h()} * SIDE + at.i;
    store_arriving(static_cast<bf16 *>(a.out) + to, out);
}

template <kl_weight_format format, bool arriving>
__global__ __launch_bounds__(BOUND,
                             2) void kda_mixer_step_kernel(__grid_constant__ const arguments p)
{
    __shared__ __align__(16) head s;
    const mixer_arguments &a = p.mixer;
    const place at(a.kda);
    let_next_start();
    const unsigned guess = static_cast<unsigned>(mixer_slot_guess(a, at.n));
    if (p.unsettled) wait_for_inputs();
    ask_ahead(a, at, guess);
    token own(p, at, guess);
    const head_gates<format> gates(p, at.h());
    if (at.role == 0) s.norm_weight[at.i] = a.norm_weight[at.i];
    if (threadIdx.x == 0) {
        barrier_init(&s.low_here, WARP);
        barrier_init_done();
    }
    __syncthreads();

    mixer_rows<ROWS> rows;
    float *const state = arriving ? prepare_early(p, at, guess, own, gates, rows, s)
                                  : prepare(p, at, guess, own, gates, rows, s);
    __syncthreads();
    recur(rows, state, a.kda.scale, s);
    __syncthreads();
    if (at.role == 0) finish(a, at, s);
    if constexpr (arriving) wait_for_inputs();
}

/* ---- host -------------------------------------------------------------------------------- */

bool takes_gate(const kl_tensor &low, const kl_weight &w)
{
    return w.cols == SIDE && w.format != KL_W_F32 && has_pieces(weight_view_of(w)) &&
           is_wide(low, SIDE, 8);
}

template <kl_weight_format format>
kl_status launch(kl_backend *be, const arguments &a, int64_t N, bool arriving, kl_error *err)
{
    const dim3 blocks(static_cast<unsigned>(a.mixer.kda.H), static_cast<unsigned>(N));
    auto kernel = kda_mixer_step_kernel<format, false>;
    if constexpr (format != KL_W_BF16)
        if (arriving) kernel = kda_mixer_step_kernel<format, true>;
    return kl_cuda_launch(kernel, blocks, THREADS, 0, kl_cuda_stream(be), err, a);
}

} // namespace

bool kl_cuda_kda_mixer_step_takes(const kl_kda_mixer *a)
{
    constexpr int64_t TOKENS = 4; /* past them reading f_b for every token costs more */
    return mixer_suits(a) && a->single && a->out.dtype == KL_BF16 && a->beta.dtype == KL_BF16 &&
           a->qkv.shape[0] <= TOKENS && a->state.shape[1] <= MAX_BLOCKS / (3 * SIDE) &&
           a->state.shape[2] == SIDE && a->state.shape[3] == SIDE &&
           a->f_b.format == a->g_b.format && takes_gate(a->f_low, a->f_b) &&
           takes_gate(a->g_low, a->g_b);
}

kl_status kl_cuda_kda_mixer_step(kl_backend *be, const kl_kda_mixer *a,
                                 const kl_kda_mixer_parts &p, kl_error *err)
{
    const arguments args = {
        .mixer = mixer_arguments_of(a, p),
        .f_low = static_cast<const bf16 *>(a->f_low.data),
        .g_low = static_cast<const bf16 *>(a->g_low.data),
        .beta = static_cast<const bf16 *>(a->beta.data),
        .f_stride = a->f_low.stride[0],
        .g_stride = a->g_low.stride[0],
        .beta_stride = a->beta.stride[0],
        .f_b = weight_view_of(a->f_b),
        .g_b = weight_view_of(a->g_b),
        .unsettled = a->f_b.unsettled || a->g_b.unsettled,
    };
    const int64_t N = a->qkv.shape[0];
    switch (a->f_b.format) {
    case KL_W_INT8:
        return launch<KL_W_INT8>(be, args, N, a->arriving, err);
    case KL_W_INT4:
        return launch<KL_W_INT4>(be, args, N, a->arriving, err);
    case KL_W_FP8:
        return launch<KL_W_FP8>(be, args, N, a->arriving, err);
    default:
        return launch<KL_W_BF16>(be, args, N, a->arriving, err);
    }
}
