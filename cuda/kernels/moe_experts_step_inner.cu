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
 *              and the logits are there. A ninth warp makes the choice, and brings the weights
 *              (device/turn_ring.cuh)
 * Order        a warp's columns in rising order, then warps in order
 * Roofline     the weights of the experts chosen, once: 9 * 9.4 MB for the model in bf16, 28 us at
 *              3.0 TB/s
 * Measured     in a step (context 1024), from the end of the kernel before, with the router's
 *              logits and the choice in it: H200, bf16 22.7 us, 87 % of 4.3 TB/s (2026-11-23)
 */
#include "../device/digits.cuh"
#include "../device/moe_step.cuh"
#include "../device/turn_ring.cuh"

namespace {

/* Blocks a multiprocessor, and turns on their way in each: without scales as many as three blocks
 * have shared memory for. With scales fewer, so that a block of the next kernel, which has its own
 * ring to fill, finds room as soon as one of these ends. */
constexpr int INNER_BLOCKS = 3;
template <kl_weight_format format>
constexpr int INNER_DEPTH = weight_codec<format>::GROUP > 0 ? 6 : RING_DEPTH;

/* Registers: room for another block beside these where that costs no more than a few words. */
template <kl_weight_format format, bool own>
constexpr int FITTING = INNER_BLOCKS + (own && format == KL_W_INT4        ? 0
                                        : weight_codec<format>::GROUP > 0 ? 1
                                                                          : 2);

/* Behind the warps that bring h and multiply, one chooses the experts and brings their weights. */
constexpr int INNER_THREADS = STREAM_THREADS + WARP;

/* Of those that multiply, whole warps: h is there, or the sums of a tile. */
constexpr int SUMS_BARRIER = 1;

/* What h is to be multiplied by is there; what experts are chosen by. Not bar.arrive: stores before
 * it need not be there for those who pass their bar.sync. */
struct choice_barriers {
    barrier inverse, keys;
};

/* Both matrices of the shared expert, and the stacks of the others. */
struct inner_maps {
    box_map shared[2], routed[2];
};

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

    __device__ bool is_inside(const moe_step_arguments &a) const
    {
        return v < a.n_shared + a.top_k;
    }
};

template <kl_weight_format format> using inner_ring = turn_ring<INNER_DEPTH<format>>;
template <kl_weight_format format> using inner_reader = turn_reader<INNER_DEPTH<format>>;

/* What the warp that brings asks for: the block's tiles, turn by turn. */
template <kl_weight_format format> struct inner_walk {
    const moe_step_arguments &a;
    const inner_maps &maps;
    warp_choice choice;
    tile_place tile = {}; /* the next one to be begun */
    bool shared = false;  /* of the one that is under way: whether it is the shared expert's, */
    int row = 0;          /* its first row in the stack, */
    int at = 0, left = 0; /* bytes of a row before its next turn, turns from there on */
    turn_feed<INNER_DEPTH<format>> feed;

    __device__ inner_walk(const moe_step_arguments &args, const inner_maps &maps_of,
                          shared_choice &chosen, const inner_ring<format> &ring)
        : a(args), maps(maps_of), choice(chosen), feed(ring)
    {
        tile.advance(a, blockIdx.x);
    }

    __device__ bool has_next() const { return left > 0 || tile.is_inside(a); }

    /* Choices that have to be made for the next turn. */
    __device__ int needed() const
    {
        return left == 0 && tile.is_inside(a) ? tile.v - a.n_shared + 1 : 0;
    }

    __device__ void put()
    {
        if (left == 0) start();
        const box_map *const of = shared ? maps.shared : maps.routed;
        turn_rows rows[2] = {{of, at, row, nullptr, 0}, {of + 1, at, row, nullptr, 0}};
        if (at == 0 && weight_codec<format>::GROUP > 0) {
            const int64_t before = int64_t{row} * a.groups;
            rows[0].scales = (shared ? a.shared_w1 : a.w1).scales + before;
            rows[1].scales = (shared ? a.shared_w3 : a.w3).scales + before;
            rows[0].scale_bytes = rows[1].scale_bytes = turn_scale_bytes(a.groups);
        }
        feed.put(rows);
        at += RING_TURN;
        left--;
    }

    __device__ void start()
    {
        shared = tile.v < a.n_shared;
        const int expert = shared ? 0 : choice.from.ids[tile.v - a.n_shared];
        row = expert * static_cast<int>(a.w1.rows) + static_cast<int>(tile.g) * EACH;
        at = 0;
        left = turns_of(a.row_bytes);
        tile.advance(a, gridDim.x);
    }
};

/* How h lies in shared memory, and a warp's products of a tile with it: in lanes that are multiples
 * of 4 the sums of row lane / 4 of the gates and of the ups. STREAM_THREADS threads ask for it
 * after the wait, and have it there later, before a barrier. */
template <kl_weight_format format, bool own> struct inner_row {
    const shared_rows x;

    static __host__ __device__ int bytes_of(int D) { return shared_rows::pitch_of(D); }

    __device__ inner_row(unsigned char *shared, int D) : x{shared, bytes_of(D)} {}

    struct held {};

    /* Zeros behind it. */
    __device__ held ask(const moe_step_arguments &a) const
    {
#pragma unroll 1
        for (int u = threadIdx.x; u < x.pitch / 16; u += STREAM_THREADS) {
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

    __device__ void multiply(float (&sums)[2], inner_reader<format> &ring) const
    {
        float acc[1][4] = {};
        ring_x<format, 1> columns(x, 1);
        for (int n = ring.steps; n > 0; n--) {
            ring_multiply<format, 1>(acc, ring.template take<format>(), columns);
            columns.advance();
        }
        sums[0] = acc[0][0], sums[1] = acc[0][2];
    }
};

template <kl_weight_format format> struct inner_row<format, true> {
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
            const int u = threadIdx.x + at + i * STREAM_THREADS;
            if (8 * u < a.D) h.raw[i] = row_type::load(a.h, u);
        }
        return h;
    }

    __device__ void put(const held &h, int at) const
    {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int u = threadIdx.x + at + i * STREAM_THREADS;
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
        for (int at = 0; first + at < x.units(); at += AHEAD * STREAM_THREADS) {
            if (at > 0) h = load(a, at);
            put(h, at);
        }
    }

    __device__ void multiply(float (&sums)[2], inner_reader<format> &ring) const
    {
        float acc[2] = {};
        typename numbers_of<format>::walk columns(x);
        for (int n = ring.steps; n > 0; n--) {
            columns.multiply(acc, ring.template take<format>());
            columns.advance();
        }
        sums[0] = columns.total(acc[0]), sums[1] = columns.total(acc[1]);
    }
};

template <kl_weight_format format> int rooms_of(const moe_step_arguments &a)
{
    return inner_ring<format>::rooms_of(turns_of(a.row_bytes));
}

/* A block's shared memory: the ring, h, the scales. */
template <kl_weight_format format, bool own> struct inner_layout {
    static constexpr int H = inner_ring<format>::BYTES;

    static __host__ __device__ int scales(int D)
    {
        return H + (inner_row<format, own>::bytes_of(D) + 15) / 16 * 16;
    }

    static size_t bytes(const moe_step_arguments &a)
    {
        return static_cast<size_t>(scales(a.D) +
                                   rooms_of<format>(a) * 2 * turn_scale_bytes(a.groups));
    }
};

/* By the warps that multiply: this warp's sums of the next tile. */
template <kl_weight_format format, bool own>
__device__ void multiply_tile(const moe_step_arguments &a, const inner_row<format, own> &h,
                              float *sums, inner_reader<format> &ring)
{
    float sum[2];
    ring.template start<format>(a.row_bytes, a.groups);
    h.multiply(sum, ring);
    ring.end();
    if (lane_id() % STREAM_LANES == 0) {
        float *const to = sums + warp_id() * STREAM_ROWS + lane_id() / STREAM_LANES;
        to[0] = sum[0];
        to[EACH] = sum[1];
    }
}

/* By the warp that brings: the shared expert's turns as far as the ring goes, the choice, all
 * others. One loop, so that its code is there when the choice is. */
template <kl_weight_format format>
__device__ void bring(const moe_step_arguments &a, const inner_maps &maps,
                      shared_choice &chosen, choice_barriers &there,
                      const inner_ring<format> &ring)
{
    inner_walk<format> walk(a, maps, chosen, ring);
    bool waited = false;
    prefetch_choice(a);
    if (lane_id() < 2) prefetch_map(maps.routed + lane_id());
#pragma unroll 1
    for (int put = 0; !waited || walk.has_next(); put++) {
        const bool waits =
            !waited && (put == INNER_DEPTH<format> || walk.needed() > 0 || !walk.has_next());
        if (waits) {
            wait_for_inputs();
            share_inverse(a, chosen);
            warp_arrive(&there.inverse);
            if (!tells(a)) let_next_start(); /* not before: see logit_reading */
            barrier_wait(&there.keys, 0);
            walk.choice.begin(a);
            waited = true;
        }
        walk.choice.make(waits && tells(a) ? a.top_k : walk.needed());
        if (waits && tells(a)) {
            tell(a, chosen);
            let_next_start();
        }
        if (walk.has_next()) walk.put();
    }
}

template <kl_weight_format format, bool own>
__global__ __launch_bounds__(INNER_THREADS, FITTING<format, own>) void moe_step_inner_kernel(
    __grid_constant__ const moe_step_arguments a, __grid_constant__ const inner_maps maps,
    int rooms)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float sums[2][STREAM_WARPS * STREAM_ROWS]; /* of this tile and the one before */
    __shared__ shared_choice chosen;
    __shared__ typename inner_ring<format>::barriers bars;
    __shared__ choice_barriers there;
    using layout = inner_layout<format, own>;
    inner_row<format, own> h(shared + layout::H, a.D);
    const inner_ring<format> ring = {shared, shared + layout::scales(a.D), bars,
                                     2 * turn_scale_bytes(a.groups), rooms};
    if (threadIdx.x == STREAM_THREADS) {
        ring.init();
        barrier_init(&there.inverse, WARP_ARRIVALS);
        barrier_init(&there.keys, STREAM_WARPS * WARP_ARRIVALS);
        barrier_init_done();
    }
    if (a.unsettled) wait_for_inputs();
    __syncthreads();
    if (warp_id() == STREAM_WARPS) {
        bring<format>(a, maps, chosen, there, ring);
        return;
    }
    wait_for_inputs();
    const logit_reading logit(a);
    const auto held = h.ask(a);
    barrier_wait(&there.inverse, 0);
    logit.share(a, chosen);
    warp_arrive(&there.keys);
    h.keep(a, held);
    barrier_of_threads<SUMS_BARRIER, STREAM_THREADS>();
    const float inverse = chosen.inverse;

    inner_reader<format> own_steps(ring);
    int turn = 0;
    for (unsigned tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, turn ^= 1) {
        multiply_tile<format, own>(a, h, sums[turn], own_steps);
        barrier_of_threads<SUMS_BARRIER, STREAM_THREADS>();
        const int row = threadIdx.x;
        if (row >= EACH) continue;
        const float gate = sum_of_warps<STREAM_ROWS>(sums[turn], row) * inverse;
        const float up = sum_of_warps<STREAM_ROWS>(sums[turn], row + EACH) * inverse;
        a.inner[int64_t{tile} * EACH + row] = from_float<bf16>(silu(gate) * up);
    }
}

kl_status map_experts(const kl_moe_experts *e, inner_maps *maps, kl_error *err)
{
    KL_TRY(map_turns(e->w1, maps->routed, err));
    KL_TRY(map_turns(e->w3, maps->routed + 1, err));
    if (!kl_moe_has_shared(e)) return KL_OK;
    KL_TRY(map_turns(e->shared_w1, maps->shared, err));
    return map_turns(e->shared_w3, maps->shared + 1, err);
}

template <kl_weight_format format, bool own>
kl_status launch(const moe_step_arguments &a, const inner_maps &maps, cudaStream_t stream,
                 kl_error *err)
{
    int multiprocessors;
    const auto kernel = moe_step_inner_kernel<format, own>;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    KL_TRY(kl_cuda_allow_shared(kernel, RING_MOST_SHARED, err));
    const unsigned most = static_cast<unsigned>(multiprocessors) * INNER_BLOCKS;
    return kl_cuda_launch(kernel, a.tiles < most ? a.tiles : most, INNER_THREADS,
                          inner_layout<format, own>::bytes(a), stream, err, a, maps,
                          rooms_of<format>(a));
}

} // namespace

bool kl_cuda_moe_step_inner_takes(const moe_step_arguments &a, kl_weight_format format)
{
    return turns_take(a.w1) && turns_take(a.w3) && turns_take(a.shared_w1) &&
           turns_take(a.shared_w3) && with_format(format, [&](auto f) {
               return inner_layout<f.value, false>::bytes(a) <= RING_MOST_SHARED &&
                      inner_layout<f.value, IS_QUANTISED<f.value>>::bytes(a) <=
                          RING_MOST_SHARED;
           });
}

kl_status kl_cuda_moe_step_inner(const moe_step_arguments &a, const kl_moe_experts *experts,
                                 bool apart, cudaStream_t stream, kl_error *err)
{
    inner_maps maps = {};
    KL_TRY(map_experts(experts, &maps, err));
    return with_format(experts->w1.format, [&](auto f) {
        return apart ? launch<f.value, false>(a, maps, stream, err)
                     : launch<f.value, IS_QUANTISED<f.value>>(a, maps, stream, err);
    });
}
