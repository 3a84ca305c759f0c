/*
 * kda_mixer.cu -- a KDA layer between its projections, in one kernel for a token step.
 *
 * Computes     q, k, v = silu(conv(qkv));  o = kda_decode(q, k, v, g, beta);
 *              out = o / sqrt(mean(o^2) + eps) * weight * sigmoid(z), as backend/ops.h has it
 * Shapes       qkv [N, H (2 K + V)]; g [N, H, K]; beta [N, H]; z, out [N, H, V]; state
 *              [S, H, V, K]; windows [S, C, 3]
 * Layout       the states and windows dense; of the others the first axis may be strided
 * Precision    f32 or bf16 in and out, f32 arithmetic and state; q, k, v and o are rounded to the
 *              activations' type where the operations store them
 * Grid         a block for each sequence and head. 128 threads each convolve q, k and v, others
 *              have the gates, while the state comes to shared memory; then a warp has 8 rows of
 *              it, a lane the same four channels of each
 * Order        that of short_conv.cu, kda_decode.cu and norm.cu: the same bits. Sums of 8 rows
 *              take the butterfly's steps together, each half of the lanes keeping half
 * Roofline     2 * 4 * N*H*V*K bytes of state: 4 MiB a sequence with H = 32, V = K = 128: 1.4 us on
 *              an H100 (3.0 TB/s)
 * Measured     H200, g and z from kernels of their own: N = 16 29.7 us (2.4 TB/s), 64 85.2 (3.3),
 *              128 157 (3.6) (2026-11-22)
 */
#include "../device/barrier.cuh"
#include "../device/kda_mixer.cuh"
#include "../product.h"

namespace {

constexpr int ROWS = 8, WARPS = 16, THREADS = WARPS * WARP;
constexpr int SIDE = MIXER_SIDE; /* threads that share a role */
constexpr int STATE_BYTES = SIDE * SIDE * 4;
static_assert(THREADS == 4 * SIDE && WARPS * ROWS == SIDE);

struct arguments {
    mixer_arguments mixer;
    const void *z;
    long long z_stride;
    bool unsettled; /* one of the weights; then none of the layer's is taken for written */
};

/* What the block knows of its head. Channels past K and rows past V are zero. */
struct head {
    float q[SIDE], k[SIDE], decay[SIDE], decay_low[SIDE]; /* the decay is the sum of both */
    float v[SIDE], o[SIDE], gate[SIDE], norm_weight[SIDE];
    float beta;
};

/* Whose head of whose token the block has, and what of it this thread: channel i of q, k or v (role
 * 0, 1, 2), or of what comes beside the convolution. */
struct place {
    unsigned n, h;
    int role, i;
    bool inside;

    __device__ explicit place(const kda_arguments &a)
    {
        const unsigned H = static_cast<unsigned>(a.H);
        n = blockIdx.x / H, h = blockIdx.x % H;
        role = threadIdx.x / SIDE, i = threadIdx.x % SIDE;
        inside = i < (role == 2 ? a.V : a.K);
    }
};

/* A channel of the decay is role 3's, one of z role 2's. */
template <class A> struct gate_channel {
    kda_channel channel;
    float value;

    __device__ void ask(const arguments &p, const place &at)
    {
        value = 0;
        if (at.role == 3 && at.inside) channel = kda_channel_of(p.mixer.kda, at.h, at.i);
    }

    __device__ void read(const arguments &p, const place &at)
    {
        if (!at.inside) return;
        const kda_arguments &a = p.mixer.kda;
        if (at.role == 3) value = kda_load(a.g, at.n, at.h * a.K + at.i);
        if (at.role == 2)
            value =
                to_float(static_cast<const A *>(p.z)[at.n * p.z_stride + at.h * a.V + at.i]);
    }

    __device__ void share_decay(const kda_arguments &a, int i, head &s) const
    {
        const float log_decay = kda_log_decay(a, channel, value), decay = expf(log_decay);
        s.decay[i] = decay;
        s.decay_low[i] = kda_decay_low(log_decay, decay);
    }

    __device__ void share(const arguments &p, const place &at, head &s) const
    {
        if (at.role == 3) {
            s.decay[at.i] = s.decay_low[at.i] = 0;
            if (at.inside) share_decay(p.mixer.kda, at.i, s);
        }
        if (at.role == 2) s.gate[at.i] = norm_gate<A>(value);
    }
};

/* Ask the L2 for what lies in a slot: nobody sees that who is still writing there. */
template <class A>
__device__ void ask_ahead(const mixer_arguments &a, const place &at, long long slot)
{
    const int K = a.kda.K, V = static_cast<int>(a.kda.V);
    const int first = warp_id() * ROWS, rows = min(ROWS, V - first);
    const float *state = a.kda.state + (slot * a.kda.H + at.h) * V * K;
    if (lane_id() == 0 && rows > 0) prefetch_l2(state + first * K, rows * K * 4);
    if (at.role < 3 && at.inside)
        prefetch_line(mixer_channel<A>(a, at.role, at.h, at.i).window(a, slot));
}

/* A warp's rows of the state. The copy engine brings them to shared memory, as they lie: the
 * registers would be too few while the head is prepared. */
struct held_rows {
    float *states;
    barrier *barriers;
    int K, V;

    __device__ float *own() const { return states + warp_id() * ROWS * K; }

    __device__ void prepare() const
    {
        if (lane_id() == 0) {
            barrier_init(barriers + warp_id(), WARP_ARRIVALS);
            barrier_init_done();
        }
        __syncwarp(); /* the others may wait for it before the block's first barrier */
    }

    /* Not while others are asked for. */
    __device__ void ask(const float *state) const
    {
        if (!ALL_SPEAK && lane_id() != 0) return;
        const int rows = min(ROWS, V - warp_id() * ROWS), bytes = rows > 0 ? rows * K * 4 : 0;
        copies_begin(barriers + warp_id(), bytes);
        if (bytes > 0) copy_bytes(own(), state, bytes, barriers + warp_id());
        copies_end(barriers + warp_id());
    }

    /* For the first or the second that were asked for. */
    __device__ void wait(uint32_t phase) const { barrier_wait(barriers + warp_id(), phase); }
};

template <class A> struct token {
    const arguments &p;
    const mixer_arguments &a;
    const place &at;
    mixer_channel<A> channel;
    gate_channel<A> gate;
    float beta;

    /* What never changes. */
    __device__ token(const arguments &p, const place &at)
        : p(p), a(p.mixer), at(at), channel(a, at.role, at.h, at.i)
    {
        if (at.role < 3 && at.inside) channel.read_taps(a);
        gate.ask(p, at);
        beta = 0;
    }

    __device__ float *state(long long slot) const
    {
        return a.kda.state + ((slot * a.kda.H + at.h) * a.kda.V + warp_id() * ROWS) * a.kda.K;
    }

    __device__ void read_slot(long long slot, const held_rows &held)
    {
        held.ask(state(slot));
        if (at.role < 3 && at.inside) channel.read_window(channel.window(a, slot));
    }

    /* All of it is on its way at once, where the guess was right; the slot. */
    __device__ long long read(long long guess, const held_rows &held)
    {
        const long long slot = mixer_slot(a, at.n);
        read_slot(guess, held);
        if (at.role < 3 && at.inside) channel.read_input(a, at.n);
        if (at.role == 3 && at.i == SIDE - 1) beta = kda_load(a.kda.beta, at.n, at.h);
        gate.read(p, at);
        if (slot != guess) {
            held.wait(0);
            __syncwarp(); /* nobody may still wait for what the next phase would undo */
            read_slot(slot, held);
        }
        return slot;
    }

    /* What the block needs, up to a barrier. */
    __device__ void share(head &s) const
    {
        if (at.role < 3)
            (at.role == 0   ? s.q
             : at.role == 1 ? s.k
                            : s.v)[at.i] = at.inside ? channel.output() : 0.0f;
        else if (at.i == SIDE - 1)
            s.beta = sigmoid(beta);
        gate.share(p, at, s);
    }

    /* The token on the warp's rows; o to the block, up to a barrier. */
    __device__ void recur(mixer_rows<ROWS> &rows, head &s) const
    {
        float q[4], k[4];
        mixer_unit(s.k, warp_sum(mixer_squares(s.k)), k);
        rows.multiply(s.decay, s.decay_low);
        rows.learn(k, s.v[warp_id() * ROWS + rows.row()], s.beta);
        mixer_unit(s.q, warp_sum(mixer_squares(s.q)), q);
        const float o = a.kda.scale * rows.dot(q);
        if (lane_id() % rows.LANES == 0)
            s.o[warp_id() * ROWS + rows.row()] = to_float(from_float<A>(o));
    }

    /* By the first warps. */
    __device__ void finish(const head &s) const
    {
        const int V = static_cast<int>(a.kda.V);
        const float factor = norm_factor<A>(mixer_sum_of_squares<A>(s.o, V), V, a.eps);
        const float out = gated(s.o[at.i], factor, s.norm_weight[at.i], s.gate[at.i]);
        if (at.i < V)
            static_cast<A *>(a.out)[(at.n * a.kda.H + at.h) * V + at.i] = from_float<A>(out);
    }
};

template <class A>
__global__ __launch_bounds__(THREADS,
                             2) void kda_mixer_kernel(__grid_constant__ const arguments p)
{
    extern __shared__ __align__(16) float states[];
    __shared__ __align__(16) head s;
    __shared__ barrier here[WARPS];
    const mixer_arguments &a = p.mixer;
    const held_rows held = {states, here, a.kda.K, static_cast<int>(a.kda.V)};
    const place at(a.kda);
    let_next_start();
    const long long guess = mixer_slot_guess(a, at.n);
    if (p.unsettled) wait_for_inputs();
    ask_ahead<A>(a, at, guess);
    held.prepare();
    if (at.role == 0) s.norm_weight[at.i] = at.i < held.V ? a.norm_weight[at.i] : 0.0f;
    token<A> own(p, at);

    wait_for_inputs();
    const long long slot = own.read(guess, held);
    if (at.role < 3 && at.inside) own.channel.write_window(own.channel.window(a, slot));
    own.share(s);
    __syncthreads();
    mixer_rows<ROWS> rows;
    const int below = held.V - warp_id() * ROWS;
    held.wait(slot != guess);
    rows.read(held.own(), below, held.K);
    own.recur(rows, s);
    rows.write(own.state(slot), below, held.K);
    __syncthreads();
    if (at.role == 0) own.finish(s);
}

/* ---- host -------------------------------------------------------------------------------- */

bool takes(const kl_kda_mixer *a, const kl_kda_mixer_parts &p)
{
    const int64_t V = a->state.shape[2], K = a->state.shape[3];
    return mixer_suits(a) && K % 4 == 0 && K <= SIDE && V <= SIDE &&
           a->qkv.shape[0] <= MAX_BLOCKS / a->state.shape[1] &&
           is_wide(p.norm.z, V, a->out.dtype == KL_BF16 ? 8 : 4);
}

arguments arguments_of(const kl_kda_mixer *a, const kl_kda_mixer_parts &p)
{
    return {
        .mixer = mixer_arguments_of(a, p),
        .z = p.norm.z.data,
        .z_stride = p.norm.z.stride[0],
        .unsettled = a->f_b.unsettled || a->g_b.unsettled,
    };
}

template <class A>
kl_status launch(kl_backend *be, const arguments &a, int64_t N, kl_error *err)
{
    const auto kernel = kda_mixer_kernel<A>;
    KL_TRY(kl_cuda_allow_shared(kernel, STATE_BYTES, err));
    return kl_cuda_launch(kernel, static_cast<unsigned>(N * a.mixer.kda.H), THREADS,
                          STATE_BYTES, kl_cuda_stream(be), err, a);
}

kl_status run(kl_backend *be, const kl_kda_mixer *a, const kl_kda_mixer_parts &p, kl_error *err)
{
    const arguments args = arguments_of(a, p);
    return with_float_type(a->out.dtype, [&](auto t) {
        return launch<decltype(t)>(be, args, a->qkv.shape[0], err);
    });
}

} // namespace

size_t kl_cuda_kda_mixer_workspace(kl_backend *be, const kl_kda_mixer *a)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    const size_t kda = a->single || a->guesses ? 0 : kl_cuda_kda_prefill_workspace(be, &p.kda);
    return kl_kda_mixer_bytes(a, kl_cuda_linear_pair_workspace(be, &p.gates), kda);
}

/* Not of bf16 weights: the layer's memory is busy with them to the end, and who looks for words is
 * in their way (cuda/notes/SPEED.md). */
static bool hears(const kl_kda_mixer *a)
{
    return a->qkv.shape[0] == 1 && a->f_b.format != KL_W_BF16 &&
           kl_cuda_kda_mixer_step_takes(a);
}

kl_status kl_cuda_arrivals(kl_backend *be, const kl_linear_pair *in, const kl_kda_mixer *mixer,
                           const kl_linear *last, kl_arrivals *out, kl_error *err)
{
    *out = {};
    if (!hears(mixer) || !kl_cuda_linear_pair_tells(be, in)) return KL_OK;
    out->mixer = true;
    return kl_cuda_linear_hears(be, last, &out->out, err);
}

kl_status kl_cuda_kda_mixer(kl_backend *be, const kl_kda_mixer *a, kl_error *err)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    if (a->qkv.shape[0] == 0) return KL_OK;
    if (a->arriving && !hears(a))
        return kl_fail(err, KL_ERR_VALUE,
                       "kda_mixer: inputs must not be arriving where arrivals() says so");
    if (a->guesses) return kl_cuda_kda_mixer_guesses(be, a, p, err);
    if (kl_cuda_kda_mixer_step_takes(a)) return kl_cuda_kda_mixer_step(be, a, p, err);
    KL_TRY(kl_cuda_linear_pair(be, &p.gates, err));
    if (takes(a, p)) return run(be, a, p, err);
    if (!a->single) return kl_cuda_kda_prompt(be, &p.conv, &p.kda, &p.norm, err);
    KL_TRY(kl_cuda_short_conv(be, &p.conv, err));
    KL_TRY(kl_cuda_kda_decode(be, &p.kda, err));
    return kl_cuda_gated_rms_norm(be, &p.norm, err);
}
