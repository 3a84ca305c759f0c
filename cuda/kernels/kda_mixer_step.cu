/*
 * kda_mixer_step.cu -- kda_mixer for a few single tokens, gate projections and all.
 *
 * Computes     g = f_low f_b^T;  z = g_low g_b^T;  q, k, v = silu(conv(qkv));
 *              o = kda_decode(q, k, v, g, beta);
 *              out = o / sqrt(mean(o^2) + eps) * weight * sigmoid(z), as backend/ops.h has it
 * Shapes       those of ops.h with N <= 8 and K = V = R = R' = 128
 * Layout       states, windows and weights dense; of the others the first axis may be strided
 * Precision    bf16 in and out; bf16 or quantised f_b and g_b as in linear_few.cu; f32 arithmetic
 *              and state; q, k, v, z and o are rounded to bf16 where the operations store them
 * Grid         a cluster of 4 blocks for each sequence and head: a block has 32 rows of the state,
 *              a warp 4. Each block makes q, k and the decays of the whole head for itself. Before
 *              the inputs are there it brings its weights to shared memory and asks the L2 for its
 *              state; at the end the blocks send each other o, which the norm needs whole
 * Order        that of linear_few.cu, short_conv.cu, kda_decode.cu and norm.cu: the same bits
 * Roofline     2 * 4 * N*H*V*K bytes of state and 2 * 2 * H*V*R of weights in bf16: 6 MiB with
 *              N = 1, H = 32: 2.1 us on an H100 (3.0 TB/s)
 * Measured     not timed yet
 */
#include "../device/cluster.cuh"
#include "../device/kda_mixer.cuh"
#include "../device/weight.cuh"

namespace {

constexpr int PARTS = 4, WARPS = 8, THREADS = WARPS * WARP;
constexpr int SIDE = MIXER_SIDE, OWN = SIDE / PARTS, ROWS = OWN / WARPS;
constexpr int BLOCKS =
    4; /* of 64 registers a thread: the next kernel's blocks fit beside one */
constexpr int64_t MOST_TOKENS = 8; /* past them reading f_b for every token costs more */
constexpr int TILE = 16;           /* rows of a weight in an mma */
static_assert(WARPS * TILE == SIDE && THREADS == 2 * SIDE);

struct arguments {
    mixer_arguments mixer;
    const bf16 *f_low, *g_low;
    long long f_stride, g_stride;
    weight_view f_b, g_b;
    bool unsettled; /* one of the weights; then none of the layer's is taken for written */
};

/* What a lane copies to shared memory for itself: pieces of 16 bytes, which need no barrier. */
struct lane_pieces {
    uint4 *own;

    __device__ void copy(int i, const void *from) const
    {
        copy_async(own + i * THREADS, from, true);
    }

    __device__ uint4 operator[](int i) const { return own[i * THREADS]; }
};

struct block_shared {
    float q[SIDE], k[SIDE], decay[SIDE], low[SIDE]; /* of the head; decays are sums of two */
    float z[4][OWN];                                /* parts of the sums of the own rows */
    float o[SIDE];                                  /* from all blocks */
    barrier arrived;                                /* when they are there */
};

/* Which rows of which head. */
struct place {
    unsigned n, h, part;
    int first; /* the warp's first row of V */

    __device__ explicit place(const mixer_arguments &a)
    {
        const unsigned H = static_cast<unsigned>(a.kda.H), unit = blockIdx.x / PARTS;
        n = unit / H, h = unit % H, part = blockIdx.x % PARTS;
        first = static_cast<int>(part) * OWN + warp_id() * ROWS;
    }

    __device__ float *state(const mixer_arguments &a, long long slot) const
    {
        return a.kda.state + ((slot * a.kda.H + h) * SIDE + first) * SIDE;
    }
};

/* ---- gate projections -------------------------------------------------------------------- */

/* A lane's pieces of 16 rows of a weight in a step of its columns, as linear_few.cu's warps share
 * them out: lane 4 r + c has piece c of rows r and r + 8. */
template <kl_weight_format format> struct gate_step {
    using codec = weight_codec<format>;
    static constexpr int PIECE = codec::PIECE, COLUMNS = 4 * PIECE, STEPS = SIDE / COLUMNS;
    static constexpr bool WHOLE = codec::GROUP == COLUMNS; /* scaled as a sum */
    float scale[2];

    static __device__ int column(int step) { return step * COLUMNS + lane_id() % 4 * PIECE; }

    /* To two pieces from `first` on. */
    __device__ void ask(const weight_view &w, long long tile_row, int step,
                        const lane_pieces &pieces, int first)
    {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const weight_row row = row_of(w, tile_row + lane_id() / 4 + 8 * i);
            pieces.copy(first + i, row.data + column(step) / PIECE * 16);
            scale[i] = scale_at<format>(row, column(step));
        }
    }

    static __device__ void split(uint4 from, float scale, uint32_t (&to)[PIECE / 2])
    {
        if constexpr (WHOLE)
            codec::unscaled(from, to);
        else
            codec::pairs(from, scale, to);
    }

    /* The products of rows r and r + 8 with x, which stands in all columns of the mma: each lane
     * has both. */
    __device__ void multiply(const lane_pieces &pieces, int first, const uint4 *x,
                             float (&sum)[2]) const
    {
        uint32_t top[PIECE / 2], bottom[PIECE / 2];
        float acc[4] = {};
        split(pieces[first], scale[0], top);
        split(pieces[first + 1], scale[1], bottom);
#pragma unroll
        for (int i = 0; i < PIECE / 4; i++) {
            const uint4 v = x[i / 2];
            mma_bf16(acc, {top[2 * i], bottom[2 * i], top[2 * i + 1], bottom[2 * i + 1]},
                     {i % 2 == 0 ? v.x : v.z, i % 2 == 0 ? v.y : v.w});
        }
#pragma unroll
        for (int i = 0; i < 2; i++) sum[i] = WHOLE ? scale[i] * acc[2 * i] : acc[2 * i];
    }
};

/* The warp's share of both: 16 channels of g, and one step of 16 of the block's rows of z. */
template <kl_weight_format format> struct gates {
    using step = gate_step<format>;
    static constexpr int STEPS = step::STEPS;
    static constexpr int Z = 2 * STEPS, LOW = Z + 2, PIECES = LOW + 1; /* f has the first */
    static constexpr int LOW_PIECES = SIDE / 8; /* of a row of f_low, as many lanes have */
    static_assert(2 * LOW_PIECES == WARP);
    step f[STEPS], z;

    static __device__ int z_row() { return warp_id() / 4 * TILE; }
    static __device__ int z_step() { return warp_id() % 4; }
    static __device__ bool has_z() { return z_step() < STEPS; }

    /* The channel of g that this lane gets. */
    static __device__ int channel()
    {
        return warp_id() * TILE + lane_id() / 4 + lane_id() % 2 * 8;
    }

    __device__ void ask(const arguments &a, const place &at, const lane_pieces &pieces)
    {
        const long long head = static_cast<long long>(at.h) * SIDE;
#pragma unroll
        for (int i = 0; i < STEPS; i++)
            f[i].ask(a.f_b, head + warp_id() * TILE, i, pieces, 2 * i);
        if (has_z()) z.ask(a.g_b, head + at.part * OWN + z_row(), z_step(), pieces, Z);
        copy_commit();
    }

    /* Each warp for itself: f_low to its first lanes' pieces, g_low to the others'. */
    static __device__ void ask_inputs(const arguments &a, unsigned n, const lane_pieces &pieces)
    {
        const int i = lane_id() % LOW_PIECES * 8;
        pieces.copy(LOW, lane_id() < LOW_PIECES ? a.f_low + n * a.f_stride + i
                                                : a.g_low + n * a.g_stride + i);
        copy_commit();
    }

    static __device__ const uint4 *low(const lane_pieces &pieces, int first, int step_index)
    {
        return pieces.own + LOW * THREADS - lane_id() + first + step::column(step_index) / 8;
    }

    /* g of channel(). */
    __device__ float g(const lane_pieces &pieces) const
    {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            float part[2];
            f[i].multiply(pieces, 2 * i, low(pieces, 0, i), part);
            sum += lane_id() % 2 == 0 ? part[0] : part[1];
        }
        return sum;
    }

    __device__ void share_z(const lane_pieces &pieces, block_shared &s) const
    {
        if (!has_z()) return;
        float part[2];
        z.multiply(pieces, Z, low(pieces, LOW_PIECES, z_step()), part);
        if (lane_id() % 4 < 2)
            s.z[z_step()][z_row() + lane_id() / 4 + lane_id() % 2 * 8] =
                lane_id() % 2 == 0 ? part[0] : part[1];
    }

    /* After a barrier: sigmoid of z of one of the block's rows. */
    static __device__ float gate(const block_shared &s, int row)
    {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < STEPS; i++) sum += s.z[i][row];
        return sigmoid(to_float(from_float<bf16>(sum)));
    }
};

/* ---- a token of a head ------------------------------------------------------------------- */

/* Blocks may send to others once these have come to cluster_wait(). */
__device__ inline void open_exchange(block_shared &s)
{
    if (threadIdx.x == 0) {
        barrier_init(&s.arrived, 1);
        barrier_init_done();
        barrier_arrive_expecting(&s.arrived, SIDE * sizeof(float));
    }
    cluster_arrive();
}

/* A load that stays where it is written, before the slot is looked at: the compiler would rather
 * have it where its value is used. */
__device__ inline bf16 load_here(const bf16 *from)
{
    unsigned short x;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(x) : "l"(from) : "memory");
    return __ushort_as_bfloat16(x);
}

/* What a thread knows: a channel of q (the first half of the block) or of k, the channel of v
 * that is row() of its warp's rows of the state, and a channel's decay. */
template <kl_weight_format format> struct token {
    using rows = mixer_rows<ROWS>;
    const mixer_arguments &a;
    place at;
    int row; /* of V */
    lane_pieces weights, state;
    gates<format> gate;
    mixer_channel<bf16> qk, v;
    kda_channel decay;
    float norm_weight, beta; /* beta first as a logit */

    /* For its row, which other lanes have too. */
    static __device__ bool speaks() { return lane_id() % rows::LANES == 0; }

    __device__ token(const mixer_arguments &arguments, uint4 *pieces)
        : a(arguments), at(a), row(at.first + rows::row()), weights{pieces + threadIdx.x},
          state{weights.own + gates<format>::PIECES * THREADS},
          qk(a, threadIdx.x / SIDE, at.h, threadIdx.x % SIDE), v(a, 2, at.h, row)
    {
    }

    /* Before the inputs are there: what never changes, and the L2's part of what does. */
    __device__ void ask_ahead(const arguments &p, long long slot)
    {
        gate.ask(p, at, weights);
        qk.read_taps(a), v.read_taps(a);
        decay = kda_channel_of(a.kda, at.h, gates<format>::channel());
        norm_weight = a.norm_weight[row];
        if (lane_id() == 0) prefetch_l2(at.state(a, slot), ROWS * SIDE * sizeof(float));
        if (lane_id() == 0) prefetch_line(v.window(a, slot));
        prefetch_line(qk.window(a, slot));
    }

    /* The windows to registers, the rows of the state to pieces. */
    __device__ void read_slot(long long slot)
    {
        const float *const from = at.state(a, slot) + lane_id() * 4;
#pragma unroll
        for (int r = 0; r < ROWS; r++) state.copy(r, from + r * SIDE);
        copy_commit();
#pragma unroll
        for (int j = 0; j < MIXER_PAST; j++) {
            qk.past[j] = load_here(qk.window(a, slot) + j);
            v.past[j] = load_here(v.window(a, slot) + j);
        }
    }

    /* All of it is on its way at once, where the guess was right; the slot. */
    __device__ long long read(const arguments &p, long long guess)
    {
        const long long slot = mixer_slot(a, at.n);
        gate.ask_inputs(p, at.n, weights);
        qk.read_input(a, at.n), v.read_input(a, at.n);
        beta = kda_load(a.kda.beta, at.n, at.h);
        read_slot(guess);
        if (slot != guess) {
            copy_wait<0>();
            read_slot(slot);
        }
        return slot;
    }

    __device__ void share_decay(float g, block_shared &s) const
    {
        const float log_decay = kda_log_decay(a.kda, decay, g), factor = expf(log_decay);
        if (lane_id() % 4 >= 2) return; /* lanes that have what another has */
        s.decay[gates<format>::channel()] = factor;
        s.low[gates<format>::channel()] = kda_decay_low(log_decay, factor);
    }

    /* What the whole block needs; v of this thread's row. */
    __device__ float share(long long slot, block_shared &s)
    {
        (threadIdx.x < SIDE ? s.q : s.k)[threadIdx.x % SIDE] = qk.output();
        const float value = v.output();
        beta = sigmoid(beta);
        copy_wait<1>(); /* weights and the gates' inputs */
        __syncwarp();
        if (speaks()) v.write_window(a, slot);
        share_decay(gate.g(weights), s);
        gate.share_z(weights, s);
        return value;
    }

    /* The recurrence, after a barrier: o of this thread's row, to all blocks of the head. */
    __device__ float recur(float value, long long slot, block_shared &s)
    {
        rows held;
        float q[4], k[4];
        float squares[2] = {mixer_squares(s.q), mixer_squares(s.k)};
#pragma unroll
        for (int d = WARP / 2; d > 0; d /= 2) /* two butterflies at once */
#pragma unroll
            for (float &sum : squares) sum += __shfl_xor_sync(ALL_LANES, sum, d);
        mixer_unit(s.q, squares[0], q), mixer_unit(s.k, squares[1], k);
        copy_wait<0>();
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            load_floats<4>(reinterpret_cast<const float *>(state.own + r * THREADS), held.x[r]);
        held.multiply(s.decay, s.low);
        held.learn(k, value, beta);
        const float o = to_float(from_float<bf16>(a.kda.scale * held.dot(q)));
        const unsigned rank = lane_id() % rows::LANES;
        cluster_wait();
        if (rank < PARTS) store_in(rank, &s.o[row], o, &s.arrived);
        held.write(at.state(a, slot), ROWS, SIDE);
        return o;
    }

    /* What has come from the others depends on all that they read of the windows, so that these
     * may be written. */
    __device__ void finish(float o, long long slot, block_shared &s) const
    {
        const float sigmoid_z = gates<format>::gate(s, row - static_cast<int>(at.part) * OWN);
        barrier_wait_for_cluster(&s.arrived, 0);
        const float inverse = inverse_rms(mixer_sum_of_squares<bf16>(s.o, SIDE), SIDE, a.eps);
        if (speaks())
            static_cast<bf16 *>(a.out)[(at.n * a.kda.H + at.h) * SIDE + row] =
                from_float<bf16>(o * inverse * norm_weight * sigmoid_z);
        if (at.part == 0) qk.write_window(a, slot);
    }
};

template <kl_weight_format format>
__global__ __cluster_dims__(PARTS, 1, 1)
    __launch_bounds__(THREADS,
                      BLOCKS) void kda_mixer_step_kernel(__grid_constant__ const arguments p)
{
    extern __shared__ __align__(16) uint4 pieces[];
    __shared__ __align__(16) block_shared s;
    token<format> own(p.mixer, pieces);
    let_next_start();
    open_exchange(s);
    const long long guess = mixer_slot_guess(p.mixer, own.at.n);
    if (p.unsettled) wait_for_inputs();
    own.ask_ahead(p, guess);
    wait_for_inputs();
    const long long slot = own.read(p, guess);
    const float value = own.share(slot, s);
    __syncthreads();
    const float o = own.recur(value, slot, s);
    own.finish(o, slot, s);
}

template <kl_weight_format format>
kl_status launch(kl_backend *be, const arguments &a, int64_t N, kl_error *err)
{
    constexpr int BYTES = (gates<format>::PIECES + ROWS) * THREADS * sizeof(uint4);
    const auto kernel = kda_mixer_step_kernel<format>;
    const unsigned blocks = static_cast<unsigned>(N * a.mixer.kda.H * PARTS);
    KL_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES), err);
    return kl_cuda_launch(kernel, blocks, THREADS, BYTES, kl_cuda_stream(be), err, a);
}

arguments arguments_of(const kl_kda_mixer *a, const kl_kda_mixer_parts &p)
{
    return {
        .mixer = mixer_arguments_of(a, p),
        .f_low = static_cast<const bf16 *>(a->f_low.data),
        .g_low = static_cast<const bf16 *>(a->g_low.data),
        .f_stride = a->f_low.stride[0],
        .g_stride = a->g_low.stride[0],
        .f_b = weight_view_of(a->f_b),
        .g_b = weight_view_of(a->g_b),
        .unsettled = a->f_b.unsettled || a->g_b.unsettled,
    };
}

bool is_gate(const kl_tensor &low, const kl_weight &w)
{
    return w.cols == SIDE && w.format != KL_W_F32 && has_pieces(weight_view_of(w)) &&
           is_wide(low, SIDE, 8);
}

} // namespace

bool kl_cuda_kda_mixer_step_takes(kl_backend *be, const kl_kda_mixer *a)
{
    const bool invariant = reinterpret_cast<kl_cuda_backend *>(be)->batch_invariant;
    return !invariant && mixer_suits(a) && a->out.dtype == KL_BF16 &&
           a->qkv.shape[0] <= MOST_TOKENS && a->state.shape[2] == SIDE &&
           a->state.shape[3] == SIDE && a->f_b.format == a->g_b.format &&
           is_gate(a->f_low, a->f_b) && is_gate(a->g_low, a->g_b) &&
           a->state.shape[1] <= MAX_BLOCKS / (MOST_TOKENS * PARTS);
}

kl_status kl_cuda_kda_mixer_step(kl_backend *be, const kl_kda_mixer *a,
                                 const kl_kda_mixer_parts &p, kl_error *err)
{
    const arguments args = arguments_of(a, p);
    const int64_t N = a->qkv.shape[0];
    switch (a->f_b.format) {
    case KL_W_INT8:
        return launch<KL_W_INT8>(be, args, N, err);
    case KL_W_INT4:
        return launch<KL_W_INT4>(be, args, N, err);
    case KL_W_FP8:
        return launch<KL_W_FP8>(be, args, N, err);
    default:
        return launch<KL_W_BF16>(be, args, N, err);
    }
}
