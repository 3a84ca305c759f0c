/*
 * moe_experts_step_inner.cu -- the first product of a single token's experts.
 *
 * Computes     inner_v = silu(w1_v h) * (w3_v h) for each expert v of the token, the shared one
 *              first. Which they are: given, or moe_route of the token's logits, which are there,
 *              or sums (device/router_sums.cuh); with these h lacks its division by the rms, and
 *              the products have it, and the second product is told the experts and weights
 * Shapes       h [D]; w1, w3 [E, I, D]; D and I multiples of 64
 * Layout       dense, 16-byte aligned rows; each routed matrix in the shared one's format
 * Precision    bf16 in and out; weights exact, int8 and int4 as whole numbers
 *              (device/digits.cuh), fp8 as float16 (device/scaled.cuh); f32 sums. With the bits of
 *              the other paths: int4 weights to bf16
 * Grid         blocks that stay, three a multiprocessor, take tiles of 8 rows of w1 and of w3
 *              in turn, the shared expert's before all others: these are on their way before h
 *              and the logits are there
 * Order        a warp's columns in rising order, then warps in order
 * Roofline     the weights of the experts chosen, once: 9 * 9.4 MB for the model in bf16, 28 us at
 *              3.0 TB/s
 * Measured     in a step (context 1024), from the end of the kernel before, with the router's
 *              logits and the choice in it: H200, bf16 24.7 us, 80 % of 4.3 TB/s (2026-11-23).
 *              H100, before the choice was told: int8 22.4, int4 17.1 (2026-11-22)
 */
#include "../device/digits.cuh"
#include "../device/moe_step.cuh"

namespace {

/* Blocks a multiprocessor, and steps on their way in each: without scales as many as three blocks
 * have shared memory for. With scales fewer, so that a block of the next kernel, which has its own
 * ring to fill, finds room as soon as one of these ends. */
constexpr int INNER_BLOCKS = 3;
template <kl_weight_format format>
constexpr int INNER_DEPTH = weight_codec<format>::GROUP > 0 ? 5 : RING_DEPTH;

/* Registers: room for another block beside these, but int4's digits take more than 64 a thread. */
template <kl_weight_format format, bool own>
constexpr int FITTING = INNER_BLOCKS + (own && format == KL_W_INT4 ? 0 : 1);

/* The last warp finds out which the experts are while the others bring h. */
constexpr int CHOOSER = STREAM_WARPS - 1, BRINGERS = CHOOSER * WARP;

/* Where an expert's gate and up begin. */
struct gated_expert {
    weight_row gate, up;
};

__device__ gated_expert expert_of(const moe_step_arguments &a, int64_t id)
{
    return {row_of(a.w1, id * a.w1.rows), row_of(a.w3, id * a.w3.rows)};
}

/* The token's choices, by one warp. */
__device__ void list_choices(const moe_step_arguments &a, chosen_experts &chosen,
                             gated_expert *experts)
{
    if (!chooses(a)) {
#pragma unroll 1
        for (int j = lane_id(); j < a.top_k; j += WARP)
            experts[a.n_shared + j] = expert_of(a, chosen.ids[j]);
        return;
    }
    lane_keys keys = keys_of(chosen);
    const int id = choose_numbers(keys, a.top_k, chosen.ids);
    if (lane_id() < a.top_k) experts[a.n_shared + lane_id()] = expert_of(a, id);
}

/* Ask the L2 for the experts that a token's residual names before the attention is added to it, which
 * are most of those that it will name: their bytes come while memory has nothing else to bring. No
 * result depends on it. By the first blocks, each an equal part of every matrix; a warp an expert. */
__device__ void ask_for_likely(const moe_step_arguments &a)
{
    if (a.sums == nullptr || warp_id() >= a.likely || static_cast<int>(blockIdx.x) >= a.askers) return;
    const int id = static_cast<int>(load_here(a.sums->likely + warp_id())) - 1;
    if (id < 0) return;
    const gated_expert e = expert_of(a, id);
    const unsigned all = static_cast<unsigned>(a.row_bytes) * a.expert_tiles * EACH;
    const unsigned each = (all / a.askers + 127) / 128 * 128, first = blockIdx.x * each;
    if (first >= all) return;
    const unsigned bytes = min(each, all - first);
    if (a.how == 0) {
        if (lane_id() < 2) prefetch_l2((lane_id() == 0 ? e.gate.data : e.up.data) + first, bytes);
        return;
    }
    for (unsigned at = lane_id() * 128; at < bytes; at += 32 * 128) {
        prefetch_line(e.gate.data + first + at);
        prefetch_line(e.up.data + first + at);
    }
}

/* A tile of the block: the g-th of expert v. */
struct tile_place {
    int v;
    unsigned g;

    /* On by so many tiles, from a place or the start; v is past the last expert after the end. */
    __device__ void advance(const moe_step_arguments &a, unsigned tiles)
    {
        for (g += tiles; v < a.n_shared + a.top_k; v++) {
            const unsigned n = v < a.n_shared ? a.shared_tiles : a.expert_tiles;
            if (g < n) return;
            g -= n;
        }
    }

    /* Rows r and r + 8 of the tile: row r of its gate and of its up. */
    __device__ void find(weight_row (&rows)[2], const moe_step_arguments &a,
                         const gated_expert *experts) const
    {
        const gated_expert e = experts[v];
        const int64_t row = g * EACH + lane_id() / STREAM_LANES;
        rows[0] = {e.gate.data + row * a.row_bytes, e.gate.scales + row * a.groups};
        rows[1] = {e.up.data + row * a.row_bytes, e.up.scales + row * a.groups};
    }
};

/* What the ring is to hold next: this warp's steps of the block's tiles. */
template <kl_weight_format format> struct inner_walk {
    const moe_step_arguments &a;
    const gated_expert *experts;
    int steps;    /* of this warp in a tile */
    int left = 0; /* of its steps; 0: the tile has not been entered */
    tile_place tile = {};
    ring_feed<format> feed;

    __device__ inner_walk(const moe_step_arguments &args, const gated_expert *list)
        : a(args), experts(list), steps(ring_steps(args.row_bytes))
    {
        tile.advance(a, blockIdx.x);
    }

    /* Whether the next step needs no choice. */
    __device__ bool is_shared() const { return steps > 0 && tile.v < a.n_shared; }

    /* The tile, unless there is none for this warp. */
    __device__ void enter()
    {
        if (steps == 0 || tile.v == a.n_shared + a.top_k) return;
        weight_row rows[2];
        tile.find(rows, a, experts);
        feed.start(rows[0], rows[1], a.row_bytes);
        left = steps;
    }

    template <class Ring> __device__ void put(Ring &ring)
    {
        if (left == 0) enter();
        if (left == 0) return ring.put_none();
        ring.put(feed);
        feed.advance();
        if (--left == 0) tile.advance(a, gridDim.x);
    }
};

/* How h lies in shared memory, and a warp's products of a tile with it: in lanes that are multiples
 * of 4 the sums of row lane / 4 of the gates and of the ups. BRINGERS threads ask for it after the
 * wait, and have it there later, before a barrier. */
template <kl_weight_format format, bool own> struct inner_row {
    using ring_type = least_ring<format, INNER_DEPTH<format>>;
    const shared_rows x;

    static __host__ __device__ int bytes_of(int D) { return shared_rows::pitch_of(D); }

    __device__ inner_row(unsigned char *shared, int D) : x{shared, bytes_of(D)} {}

    struct held {};

    /* Zeros behind it. */
    __device__ held ask(const moe_step_arguments &a) const
    {
#pragma unroll 1
        for (int u = threadIdx.x; u < x.pitch / 16; u += BRINGERS) {
            const bool inside = 8 * u < a.D;
            copy_async(x.unit(0, u), a.h + (inside ? 8 * u : 0), inside);
        }
        copy_commit();
        return {};
    }

    __device__ void keep(const moe_step_arguments &, held) const
    {
        copy_wait<0>();
    }

    template <class Walk>
    __device__ void multiply(float (&sums)[2], const bool (&odd)[2], ring_type &ring,
                             Walk &walk) const
    {
        float acc[1][4] = {};
        ring_x<format, 1> columns(x, 1);
        for (int n = walk.steps; n > 0; n--) {
            ring_multiply<format, 1>(acc, ring.template take<format>(odd), columns);
            columns.advance();
            walk.put(ring);
        }
        sums[0] = acc[0][0], sums[1] = acc[0][2];
    }
};

template <kl_weight_format format> struct inner_row<format, true> {
    using ring_type = typename numbers_of<format>::template ring<INNER_DEPTH<format>>;
    using row_type = typename numbers_of<format>::row;
    using raw_type = typename row_type::raw_type;
    const row_type x;

    static __host__ __device__ int bytes_of(int D) { return row_type::bytes_of(D); }

    __device__ inner_row(unsigned char *shared, int D) : x(shared, D) {}

    /* A thread's units from its at-th on; of a warp's all lanes have theirs inside, or none. */
    static constexpr int AHEAD = 2; /* the model's D at once */
    struct held {
        raw_type raw[AHEAD] = {};
    };

    __device__ static held load(const moe_step_arguments &a, int at)
    {
        held h;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int u = threadIdx.x + at + i * BRINGERS;
            if (8 * u < a.D) h.raw[i] = row_type::load(a.h, u);
        }
        return h;
    }

    __device__ void put(const held &h, int at) const
    {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int u = threadIdx.x + at + i * BRINGERS;
            if (u - lane_id() < x.units()) x.put(u, h.raw[i], u < x.units());
        }
    }

    __device__ held ask(const moe_step_arguments &a) const
    {
        return load(a, 0);
    }

    __device__ void keep(const moe_step_arguments &a, held h) const
    {
        const int first = threadIdx.x - lane_id();
#pragma unroll 1
        for (int at = 0; first + at < x.units(); at += AHEAD * BRINGERS) {
            if (at > 0) h = load(a, at);
            put(h, at);
        }
    }

    template <class Walk>
    __device__ void multiply(float (&sums)[2], const bool (&odd)[2], ring_type &ring,
                             Walk &walk) const
    {
        float acc[2] = {};
        typename numbers_of<format>::walk columns(x);
        for (int n = walk.steps; n > 0; n--) {
            columns.multiply(acc, ring.template take<format>(odd));
            columns.advance();
            walk.put(ring);
        }
        sums[0] = columns.total(acc[0]), sums[1] = columns.total(acc[1]);
    }
};

template <kl_weight_format format, bool own>
__device__ void multiply_tile(const moe_step_arguments &a, const tile_place &tile,
                              const inner_row<format, own> &h, float *sums,
                              typename inner_row<format, own>::ring_type &ring,
                              inner_walk<format> &walk)
{
    weight_row rows[2];
    tile.find(rows, a, walk.experts);
    const bool odd[2] = {ring_feed<format>::odd(rows[0]), ring_feed<format>::odd(rows[1])};
    float sum[2];
    h.multiply(sum, odd, ring, walk);
    if (lane_id() % STREAM_LANES == 0) {
        float *const to = sums + warp_id() * STREAM_ROWS + lane_id() / STREAM_LANES;
        to[0] = sum[0];
        to[EACH] = sum[1];
    }
}

template <kl_weight_format format, bool own>
__global__ __launch_bounds__(STREAM_THREADS, FITTING<format, own>) void moe_step_inner_kernel(
    __grid_constant__ const moe_step_arguments a)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float sums[2][STREAM_WARPS * STREAM_ROWS]; /* of this tile and the one before */
    __shared__ chosen_experts chosen;
    __shared__ gated_expert experts[MAX_STEP_EXPERTS];
    using ring_type = typename inner_row<format, own>::ring_type;
    inner_row<format, own> h(shared + ring_type::BYTES, a.D);
    ring_type ring(shared);
    inner_walk<format> walk(a, experts);
    if (threadIdx.x == 0 && a.n_shared > 0)
        experts[0] = {row_of(a.shared_w1, 0), row_of(a.shared_w3, 0)};
    __syncthreads();
    if (a.unsettled) wait_for_inputs();
    ask_for_likely(a);
    int put = 0;
#pragma unroll 1
    for (; put < INNER_DEPTH<format> && walk.is_shared(); put++) walk.put(ring);
    prefetch_choice(a);
    wait_for_inputs();
    if (!tells(a)) let_next_start(); /* not before: see load_choice() */
    const choice_input input = load_choice(a);
    typename inner_row<format, own>::held held = {};
    if (warp_id() != CHOOSER) held = h.ask(a);
    const float inverse = share_choice(a, input, chosen);
    __syncthreads();
    if (warp_id() == CHOOSER)
    {
        list_choices(a, chosen, experts);
#ifdef KL_GUESS_PRINT
        if (blockIdx.x == 0 && a.sums != nullptr && lane_id() == 0) { 
            int hits = 0, first = 0;
            for (int i = 0; i < a.top_k; i++) for (int j = 0; j < a.top_k; j++) {
                const bool same = static_cast<int>(a.sums->likely[i]) - 1 == chosen.ids[j];
                hits += same, first += same << i * 4 % 32;
            }
            printf("GUESS %d %08x\n", hits, first);
        }
#endif
    }
    else
        h.keep(a, held);
    __syncthreads();
#pragma unroll 1
    for (; put < INNER_DEPTH<format>; put++) walk.put(ring);
    if (tells(a) && warp_id() == CHOOSER) {
        tell(a, chosen);
        let_next_start();
    }

    int turn = 0;
    tile_place place = {};
    place.advance(a, blockIdx.x);
    for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, turn ^= 1) {
        multiply_tile(a, place, h, sums[turn], ring, walk);
        place.advance(a, gridDim.x);
        __syncthreads();
        const int row = threadIdx.x;
        if (row >= EACH) continue;
        const float gate = sum_of_warps<STREAM_ROWS>(sums[turn], row) * inverse;
        const float up = sum_of_warps<STREAM_ROWS>(sums[turn], row + EACH) * inverse;
        a.inner[int64_t{tile} * EACH + row] = from_float<bf16>(silu(gate) * up);
    }
}

template <kl_weight_format format, bool own> size_t inner_bytes(int64_t D)
{
    using row_type = inner_row<format, own>;
    return row_type::ring_type::BYTES +
           static_cast<size_t>(row_type::bytes_of(static_cast<int>(D)));
}

template <kl_weight_format format, bool own>
kl_status launch(const moe_step_arguments &a, cudaStream_t stream, kl_error *err)
{
    int multiprocessors;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    const unsigned most = static_cast<unsigned>(multiprocessors) * INNER_BLOCKS;
    return launch_step(moe_step_inner_kernel<format, own>, a.tiles < most ? a.tiles : most,
                       inner_bytes<format, own>(a.D), a, stream, err);
}

} // namespace

bool kl_cuda_moe_step_inner_takes(kl_weight_format format, int64_t D)
{
    return with_format(format, [&](auto f) {
        return inner_bytes<f.value, false>(D) <= RING_MOST_SHARED &&
               inner_bytes<f.value, IS_QUANTISED<f.value>>(D) <= RING_MOST_SHARED;
    });
}

kl_status kl_cuda_moe_step_inner(const moe_step_arguments &a, kl_weight_format format,
                                 bool apart, cudaStream_t stream, kl_error *err)
{
    return with_format(format, [&](auto f) {
        return apart ? launch<f.value, false>(a, stream, err)
                     : launch<f.value, IS_QUANTISED<f.value>>(a, stream, err);
    });
}
