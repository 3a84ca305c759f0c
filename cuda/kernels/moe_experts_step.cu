/*
 * moe_experts_step.cu -- the experts of a single token: a decode step of one sequence.
 *
 * Computes     y = sum_v weight_v (w2_v inner_v) over the experts v of the token, the shared one
 *              first, whose weight is 1;  out = y, or residual += y. The inner products:
 *              moe_experts_step_inner.cu. Ids and weights: given, or moe_route of the logits, or
 *              with a router's sums what that kernel tells (device/moe_step.cuh)
 * Shapes       inner [I', top_k * I]; w2 [E, D, I]; out, residual [D]; D and I multiples of 64
 * Layout       dense, 16-byte aligned rows; each routed matrix in the shared one's format
 * Precision    bf16 in and out, the residual f32; weights exact (device/halves.cuh); f32 sums, y
 *              rounded to bf16
 * Grid         a block for each 8 rows, which goes through all experts, so that no results of
 *              single experts cross memory. It knows them before the inner products are there,
 *              and has their first weights on the way: a warp of its own asks the copy engine
 * Order        the columns of an expert are cut in halves, of as many steps, and the steps of all
 *              experts' halves dealt out to the warps in turn; a warp adds up its first halves, its
 *              second halves, both; then warps in order
 * Roofline     the weights of the experts chosen, once: 9 * 4.7 MB for the model in bf16, 14 us at
 *              3.0 TB/s
 * Measured     in a step (context 1024), from the end of the kernel before: H200, bf16 10.6 us,
 *              93 % of 4.3 TB/s (2026-11-23). H100, before the choice was told: int8 10.4, int4
 *              9.3 (2026-11-22). All with copies by each lane
 */
#include "../device/halves.cuh"
#include "../device/moe_step.cuh"
#include "../device/turn_ring.cuh"

#include <algorithm>
#include <bit>

#include <limits.h>

namespace {

constexpr int64_t MAX_COLS = 1 << 20; /* products of sizes stay within an int */

/* Slots of 8 steps, one of each warp, on their way: as many as three blocks on a multiprocessor
 * have shared memory for, so that the model's 288 all find room and none waits for another's
 * end. */
template <kl_weight_format format>
using out_ring = turn_ring<(weight_codec<format>::GROUP > 0 ? 6 : 7)>;

/* Behind the warps that multiply, one knows the experts first and brings their weights. */
constexpr int OUT_THREADS = STREAM_THREADS + WARP;

/* Barriers of a block: what experts are chosen by is there; they are known; and of those that
 * multiply: the inner products are there, or the sums. */
constexpr int KEYS_BARRIER = 1, CHOSEN_BARRIER = 2, SUMS_BARRIER = 3;

/* ---- steps and boxes --------------------------------------------------------------------- */

/* The weights of the token's choices, or the shared expert's; zeros where there is none. */
struct out_stack {
    box_map map;
    const unsigned char *scales;
    int half;        /* bytes of half a row, in whole steps */
    int scale_bytes; /* of 8 rows, */
    int row, second; /* of one; from a first half's to the second half's */
    int cols;
};

/* A block's shared memory, in bytes: the ring, the inner products, the scales of all experts, the
 * list of boxes.
 *
 * Weights come in boxes of 8 rows and 2^log steps of one expert: as many as divide the halves of
 * all, 8 at most. Steps s to s + 2^log - 1 are a box of first halves and one of second halves, and a
 * slot has eight steps': the boxes of first halves, then the others. */
struct out_layout {
    int steps; /* of first halves, of all experts one behind the other; those of the second halves
                  lie in the other rows of the same products */
    int log, width, box, of_slot;  /* width: of a box's row; of_slot: boxes, of each half */
    int pitch;                     /* of a row of inner products */
    int scales, room, list, bytes; /* room: of an expert's scales, and zeros behind them */
};

struct out_plan {
    out_stack of[2]; /* the choices', the shared expert's */
    out_layout in;
    int n_shared, visits;

    __device__ const out_stack &stack_of(int v) const { return of[v < n_shared]; }
};

/* What those that multiply know of the boxes at a place of a slot. */
template <bool scaled> struct out_box {
    float weight;
};

template <> struct alignas(16) out_box<true> {
    float weight;
    int scale, row, second; /* bytes before the first row's scale; on to the next row's, and to
                               the second half's */
};

template <kl_weight_format format> using box_of = out_box<(weight_codec<format>::GROUP > 0)>;

template <kl_weight_format format>
constexpr int STEP_COLS = weight_codec<format>::PIECE *STREAM_LANES;

constexpr int SCALE = sizeof(bf16);

/* ---- the inner products ------------------------------------------------------------------ */

/* On their way to two rows of x, the experts' first halves and their second ones, each of whole
 * steps, UNITS times 16 bytes of x, zeros behind an expert's columns. Those that multiply bring
 * them, and find out which before they are there, for a thread's first units. */
template <int UNITS> struct inner_copy {
    static constexpr int BATCH =
        5; /* with 256 threads all of the model's 9 times 1024 columns */
    const out_plan &plan;
    const bf16 *inner;
    const int units; /* of a row */
    int first[BATCH];

    __device__ inner_copy(const out_plan &of, const bf16 *products)
        : plan(of), inner(products), units(of.in.steps * UNITS)
    {
#pragma unroll
        for (int b = 0; b < BATCH; b++) first[b] = column(b * STREAM_THREADS + threadIdx.x);
    }

    /* Where unit i of both rows comes from, or -1. */
    __device__ int column(int i) const
    {
        const out_stack &routed = plan.of[0], &shared = plan.of[1];
        const int second = i >= units, at = i - second * units;
        const int whole = shared.half / RING_STEP * UNITS; /* the shared expert's */
        const int each = routed.half / RING_STEP * UNITS;
        const bool is_shared = at < whole;
        const int j = is_shared ? 0 : static_cast<unsigned>(at - whole) / each;
        const int own = is_shared ? at + second * whole : at - whole + (second - j) * each;
        const int before = is_shared ? 0 : shared.cols + j * routed.cols;
        const bool inside = 8 * own < (is_shared ? shared.cols : routed.cols);
        return i < 2 * units && inside ? before + 8 * own : -1;
    }

    __device__ void copy(const shared_rows &to, int i, int column) const
    {
        const int second = i >= units;
        copy_async(to.unit(second, i - second * units), inner + max(column, 0), column >= 0);
    }

    /* All on their way at once. */
    __device__ void start(const shared_rows &to) const
    {
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (const int i = b * STREAM_THREADS + threadIdx.x; i < 2 * units)
                copy(to, i, first[b]);
#pragma unroll 1
        for (int i = BATCH * STREAM_THREADS + threadIdx.x; i < 2 * units; i += STREAM_THREADS)
            copy(to, i, column(i));
        copy_commit();
    }
};

/* How a step meets the inner products, two rows of x in shared memory: acc += weight times the sums
 * of the first half and of the second. */
template <kl_weight_format format, bool halves = ring_feed<format>::SCALED>
struct out_columns : ring_x<format, 1> {
    static __host__ __device__ int bytes_of(int cols)
    {
        return 2 * shared_rows::pitch_of(cols);
    }

    static __device__ void clear(const shared_rows &) {}

    __device__ explicit out_columns(const shared_rows &x) : ring_x<format, 1>(x, 2) {}

    __device__ void multiply(float (&acc)[2], const ring_pieces &p, float weight) const
    {
        float part[1][4] = {};
        ring_multiply<format, 1>(part, p, *this);
        acc[0] = fmaf(weight, part[0][0], acc[0]); /* rows 0 to 7 by row 0 of x */
        acc[1] = fmaf(weight, part[0][3], acc[1]);
    }

    static __device__ float total(float acc) { return acc; }
};

template <kl_weight_format format> struct out_columns<format, true> : ring_halves<format> {
    __device__ explicit out_columns(const shared_rows &x) : ring_halves<format>(x) {}

    __device__ void multiply(float (&acc)[2], ring_pieces p, float weight) const
    {
        p.scale[0] *= weight;
        p.scale[1] *= weight;
        ring_halves<format>::multiply(acc, p);
    }
};

/* ---- bringing the weights ---------------------------------------------------------------- */

/* What the warp that brings asks for: two boxes after the other, and with an expert's first ones
 * its scales. */
template <kl_weight_format format> struct out_walk {
    static constexpr bool SCALED = weight_codec<format>::GROUP > 0;
    using ring_type = out_ring<format>;

    const out_plan &plan;
    const ring_type &ring;
    const int *ids;
    const int tiles; /* of 8 rows, of an expert */
    ring_place<ring_type> place;
    int in_slot = 0;             /* boxes of each half before the next */
    int v = 0;                   /* the expert behind that of: */
    const box_map *map;          /* the next boxes' map, */
    int row;                     /* and where in it they are: */
    unsigned column, half;       /* bytes before the first half's; from there to the second's */
    int left = 0;                /* bytes of the half from there on */
    const unsigned char *scales; /* of its 8 rows */

    __device__ out_walk(const out_plan &of, const ring_type &to, const int *chosen,
                        int64_t rows)
        : plan(of), ring(to), ids(chosen), tiles(static_cast<int>(rows) / EACH)
    {
    }

    /* Behind the last expert none, but the slot knows of them all the same. */
    __device__ void put()
    {
        barrier *const full = ring.bars.full + place.slot;
        unsigned char *const to =
            ring.slots + place.slot * ring_type::SLOT + in_slot * plan.in.box;
        if (in_slot == 0) barrier_wait(ring.bars.empty + place.slot, place.phase ^ 1);
        const int scale_bytes = left == 0 && v < plan.visits ? start() : 0;
        warp_copies_begin(full, left > 0 ? 2 * plan.in.box + scale_bytes : 0);
        if (left > 0) {
            warp_copy_box(to, map, column / 4, row, full);
            warp_copy_box(to + TURN_BOX, map, (column + half) / 4, row, full);
            if (SCALED && scale_bytes > 0)
                warp_copy_bytes(ring.scales + (v - 1) * ring.room_bytes, scales, scale_bytes,
                                full);
            column += plan.in.width;
            left -= plan.in.width;
        }
        copies_end(full);
        if (++in_slot == plan.in.of_slot) {
            in_slot = 0;
            place.advance();
        }
    }

    __device__ int start()
    {
        const out_stack &stack = plan.stack_of(v);
        const int before = v < plan.n_shared ? 0 : ids[v - plan.n_shared] * tiles;
        const int tile = before + static_cast<int>(blockIdx.x);
        map = &stack.map;
        column = 0;
        row = tile * EACH;
        half = left = stack.half;
        if constexpr (SCALED) scales = stack.scales + int64_t{tile} * stack.scale_bytes;
        v++;
        return SCALED ? stack.scale_bytes : 0;
    }
};

/* By the warp that brings. One loop, so that its code is there when the choice is. */
template <kl_weight_format format>
__device__ void bring(const moe_step_arguments &a, const out_plan &plan,
                      const choice_keys &keys, chosen_experts &chosen,
                      const out_ring<format> &ring)
{
    if (lane_id() == 0) {
        ring.init(plan.in.of_slot);
        barrier_init_done();
        prefetch_map(&plan.of[0].map);
        if (plan.n_shared > 0) prefetch_map(&plan.of[1].map);
    }
    if (a.sums != nullptr) {
        hear(a, chosen);
    } else {
        barrier_of_threads<KEYS_BARRIER, OUT_THREADS>();
        choose(a, keys, chosen);
    }
    __syncwarp();
    barrier_of_threads<CHOSEN_BARRIER, OUT_THREADS>();
    out_walk<format> walk(plan, ring, chosen.ids, a.w2.rows);
    const int slots = (plan.in.steps + STREAM_WARPS - 1) / STREAM_WARPS;
#pragma unroll 1
    for (int n = slots * plan.in.of_slot; n > 0; n--) walk.put();
    wait_for_inputs(); /* as all threads do */
}

/* ---- multiplying ------------------------------------------------------------------------- */

/* The list of boxes, once the choice is known, by a thread for each expert; a barrier follows. */
template <kl_weight_format format>
__device__ void list_boxes(const out_plan &plan, const float *weights,
                           const out_ring<format> &ring, box_of<format> *list)
{
    using feed = ring_feed<format>;
    const int v = threadIdx.x, j = v - plan.n_shared;
    if (v >= plan.visits) return;
    const out_stack &stack = plan.stack_of(v);
    const int before = j < 0 ? 0 : plan.of[1].half + j * stack.half;
    const int room = v * ring.room_bytes;
    box_of<format> box = {};
    box.weight = j < 0 ? 1.0f : weights[j];
    if constexpr (feed::SCALED)
        box.scale = room, box.row = stack.row, box.second = stack.second;
    auto *to = list + (before / RING_STEP >> plan.in.log);
#pragma unroll 1
    for (int left = stack.half; left > 0; left -= plan.in.width) {
        *to++ = box;
        if constexpr (feed::SCALED) box.scale += feed::groups(plan.in.width) * SCALE;
    }
    /* Steps may go on behind the last row, all zeros there: any number will do as a scale. */
    if constexpr (feed::SCALED)
        *reinterpret_cast<uint4 *>(ring.scales + room + stack.scale_bytes) = {};
}

/* The ring as one of the warps that multiply has it. */
template <kl_weight_format format> struct out_reader {
    using feed = ring_feed<format>;
    using ring_type = out_ring<format>;

    const box_of<format> *next;    /* of this warp's next step, */
    int to_next;                   /* and how many on the one after it is */
    const unsigned char *scales;   /* this lane's, if a box's were the first, and its row */
    const unsigned char *own;      /* this lane's pieces of the slot, */
    barrier *full;                 /* its barrier, STAGES behind that the empty one, */
    int slots = ring_type::STAGES; /* and how many there are from it to the last */
    uint32_t phase = 0;

    __device__ out_reader(const ring_type &ring, const box_of<format> *list,
                          const out_layout &in)
        : to_next(in.of_slot), scales(ring.scales), full(ring.bars.full)
    {
        const int box = warp_id() >> in.log;
        const int at =
            (warp_id() - (box << in.log)) * RING_STEP + lane_id() % STREAM_LANES * 16;
        next = list + box;
        own = ring.slots + box * in.box + lane_id() / STREAM_LANES * in.width + at;
        if constexpr (feed::SCALED) scales += feed::groups(at) * SCALE;
    }

    /* The warp's next step, once it is there. */
    __device__ ring_pieces take(float &weight)
    {
        const auto box = *next;
        barrier_wait(full, phase);
        const auto *const piece = reinterpret_cast<const uint4 *>(own);
        ring_pieces p = {{piece[0], piece[TURN_BOX / 16]}, {1, 1}};
        if constexpr (feed::SCALED) {
            const unsigned char *const scale =
                scales + (box.scale + lane_id() / STREAM_LANES * box.row);
            p.scale[0] = scale_at(scale);
            p.scale[1] = scale_at(scale + box.second);
        }
        warp_arrive(full + ring_type::STAGES);
        advance();
        weight = box.weight;
        return p;
    }

    __device__ void advance()
    {
        next += to_next;
        own += ring_type::SLOT, full++;
        if (--slots > 0) return;
        own -= ring_type::BYTES, full -= ring_type::STAGES, phase ^= 1;
        slots = ring_type::STAGES;
    }
};

/* This warp's share of the sum of row lane / 4, in the lanes that are multiples of 4. In the last
 * slot it may have no step: nobody waits for that to be read. */
template <kl_weight_format format>
__device__ float multiply_experts(out_reader<format> &own, int steps, const shared_rows &inner)
{
    float acc[2] = {};
    out_columns<format> columns(inner);
#pragma unroll 1
    for (int s = warp_id(); s < steps; s += STREAM_WARPS) {
        float weight;
        const ring_pieces pieces = own.take(weight);
        columns.multiply(acc, pieces, weight);
        columns.advance();
    }
    return columns.total(acc[0]) + columns.total(acc[1]);
}

template <kl_weight_format format>
__global__ __launch_bounds__(OUT_THREADS, 4) void moe_step_out_kernel(
    __grid_constant__ const moe_step_arguments a, __grid_constant__ const out_plan plan)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float sums[STREAM_WARPS * EACH];
    __shared__ chosen_experts chosen;
    __shared__ typename out_ring<format>::barriers bars;
    const shared_rows inner = {shared + out_ring<format>::BYTES, plan.in.pitch};
    auto &keys = *reinterpret_cast<choice_keys *>(inner.data);
    auto *const list = reinterpret_cast<box_of<format> *>(shared + plan.in.list);
    const out_ring<format> ring = {shared, shared + plan.in.scales, bars, plan.in.room,
                                   plan.visits};
    let_next_start();
    if (a.unsettled) wait_for_inputs();
    if (warp_id() == STREAM_WARPS) {
        bring<format>(a, plan, keys, chosen, ring);
        return;
    }
    if (a.sums == nullptr) {
        share_keys(a, keys);
        barrier_of_threads<KEYS_BARRIER, OUT_THREADS>();
    }
    const inner_copy<STEP_COLS<format> / 8> products(plan, a.inner);
    barrier_of_threads<CHOSEN_BARRIER, OUT_THREADS>();
    list_boxes<format>(plan, chosen.weights, ring, list);
    out_columns<format>::clear(inner);

    wait_for_inputs();
    const unsigned row = blockIdx.x * EACH + threadIdx.x;
    const bool stores = threadIdx.x < EACH;
    const float before = stores && a.residual != nullptr ? a.residual[row] : 0;
    products.start(inner);
    copy_wait<0>();
    barrier_of_threads<SUMS_BARRIER, STREAM_THREADS>();
    out_reader<format> own(ring, list, plan.in);
    const float sum = multiply_experts<format>(own, plan.in.steps, inner);
    if (lane_id() % STREAM_LANES == 0) sums[warp_id() * EACH + lane_id() / STREAM_LANES] = sum;
    barrier_of_threads<SUMS_BARRIER, STREAM_THREADS>();
    if (!stores) return;
    const bf16 y = from_float<bf16>(sum_of_warps<EACH>(sums, threadIdx.x));
    if (a.residual != nullptr)
        a.residual[row] = before + to_float(y);
    else
        a.out[row] = y;
}

/* ---- host ------------------------------------------------------------------------------ */

moe_step_arguments arguments_of(const moe_step &s)
{
    const kl_moe_experts *a = s.experts;
    const int n_shared = kl_moe_has_shared(a) ? 1 : 0;
    const int64_t top_k = a->ids.shape[1], shared_rows = n_shared * a->shared_w1.rows;
    return {
        .h = s.sums == nullptr ? static_cast<const bf16 *>(a->x.data) : row_of_sums(s.sums),
        .rule = s.rule,
        .sums = s.sums,
        .logits = s.logits,
        .ids = static_cast<const int *>(a->ids.data),
        .weights = static_cast<const float *>(a->weights.data),
        .w1 = weight_view_of(a->w1),
        .w3 = weight_view_of(a->w3),
        .w2 = weight_view_of(a->w2),
        .shared_w1 = weight_view_of(a->shared_w1),
        .shared_w3 = weight_view_of(a->shared_w3),
        .shared_w2 = weight_view_of(a->shared_w2),
        .inner = static_cast<bf16 *>(a->ws.data),
        .out = static_cast<bf16 *>(a->out.data),
        .residual = s.residual,
        .norm_eps = s.norm_eps,
        .D = static_cast<int>(a->x.shape[1]),
        .n_shared = n_shared,
        .top_k = static_cast<int>(top_k),
        .row_bytes = static_cast<int>(weight_view_of(a->w1).row_bytes),
        .groups = static_cast<int>(weight_view_of(a->w1).groups),
        .shared_tiles = static_cast<unsigned>(shared_rows / EACH),
        .expert_tiles = static_cast<unsigned>(a->w1.rows / EACH),
        .tiles = static_cast<unsigned>((shared_rows + top_k * a->w1.rows) / EACH),
        .unsettled = a->w2.unsettled || a->shared_w1.unsettled || a->shared_w3.unsettled ||
                     a->shared_w2.unsettled,
    };
}

/* Steps in half of a row. */
int half_steps(const weight_view &w)
{
    return static_cast<int>((w.row_bytes + 2 * RING_STEP - 1) / (2 * RING_STEP));
}

template <kl_weight_format format> out_layout layout_of(const moe_step_arguments &a)
{
    constexpr int PAD = 16; /* as many scales as the halves' steps may go on behind a row */
    constexpr int KEYS = sizeof(choice_keys); /* they lie where x is later */
    const int shared = a.n_shared > 0 ? half_steps(a.shared_w2) : 0, each = half_steps(a.w2);
    out_layout in = {};
    in.steps = shared + a.top_k * each;
    in.log = std::countr_zero(static_cast<unsigned>(shared | each | STREAM_WARPS));
    in.width = RING_STEP << in.log;
    in.box = TURN_ROWS * in.width;
    in.of_slot = STREAM_WARPS >> in.log;
    const int cols = in.steps * STEP_COLS<format>;
    in.pitch = shared_rows::pitch_of(cols);
    in.scales = out_ring<format>::BYTES + std::max(out_columns<format>::bytes_of(cols), KEYS);
    if constexpr (weight_codec<format>::GROUP > 0)
        in.room = turn_scale_bytes(static_cast<int>(
                      std::max(a.w2.groups, a.n_shared > 0 ? a.shared_w2.groups : 0))) +
                  PAD;
    in.list = in.scales + (a.n_shared + a.top_k) * in.room;
    in.bytes = in.list + (in.steps >> in.log) * static_cast<int>(sizeof(box_of<format>));
    return in;
}

template <kl_weight_format format>
kl_status stack_of(const kl_weight &weight, const out_layout &in, out_stack *stack,
                   kl_error *err)
{
    const weight_view w = weight_view_of(weight);
    stack->scales = reinterpret_cast<const unsigned char *>(w.scales);
    stack->half = half_steps(w) * RING_STEP;
    stack->cols = static_cast<int>(w.cols);
    if constexpr (weight_codec<format>::GROUP > 0) {
        stack->row = static_cast<int>(w.groups) * SCALE;
        stack->scale_bytes = turn_scale_bytes(static_cast<int>(w.groups));
        stack->second = ring_feed<format>::groups(stack->half) * SCALE;
    }
    return map_turns(weight, &stack->map, err, in.width);
}

template <kl_weight_format format>
kl_status run_out(const moe_step_arguments &a, const kl_moe_experts *experts,
                  cudaStream_t stream, kl_error *err)
{
    const auto kernel = moe_step_out_kernel<format>;
    out_plan plan = {};
    plan.in = layout_of<format>(a);
    plan.n_shared = a.n_shared;
    plan.visits = a.n_shared + a.top_k;
    KL_TRY(stack_of<format>(experts->w2, plan.in, plan.of, err));
    if (a.n_shared > 0) KL_TRY(stack_of<format>(experts->shared_w2, plan.in, plan.of + 1, err));
    KL_TRY(kl_cuda_allow_shared(kernel, RING_MOST_SHARED, err));
    return kl_cuda_launch(kernel, static_cast<unsigned>(a.w2.rows / EACH), OUT_THREADS,
                          static_cast<size_t>(plan.in.bytes), stream, err, a, plan);
}

bool same_formats(const kl_moe_experts *a)
{
    return !kl_moe_has_shared(a) ||
           (a->shared_w1.format == a->w1.format && a->shared_w2.format == a->w2.format);
}

} // namespace

/* Of calls that the tensor cores' paths take. */
bool kl_cuda_moe_step_takes(const kl_moe_experts *a)
{
    const int64_t experts = a->ids.shape[1] + kl_moe_has_shared(a);
    const int64_t widest = a->w1.rows > a->shared_w1.rows ? a->w1.rows : a->shared_w1.rows;
    if (a->x.shape[0] != 1 || experts > MAX_STEP_EXPERTS || a->w1.cols > MAX_COLS ||
        widest > MAX_COLS || a->w1.count * a->w1.rows > INT_MAX || !same_formats(a))
        return false;
    const moe_step_arguments args = arguments_of({a, nullptr, nullptr, 0, {}, nullptr, false});
    return turns_take(args.w2) && turns_take(args.shared_w2) &&
           kl_cuda_moe_step_inner_takes(args, a->w1.format) &&
           kl_cuda_moe_step_apart_takes(args, a->w2.format) &&
           with_format(a->w2.format, [&](auto f) {
               return layout_of<f.value>(args).bytes <= static_cast<int>(RING_MOST_SHARED);
           });
}

kl_status kl_cuda_moe_step_run(const moe_step &s, cudaStream_t stream, kl_error *err)
{
    const moe_step_arguments args = arguments_of(s);
    KL_TRY(kl_cuda_moe_step_inner(args, s.experts, s.apart, stream, err));
    if (s.apart) return kl_cuda_moe_step_apart(args, s.experts->w2.format, stream, err);
    return with_format(s.experts->w2.format,
                       [&](auto f) { return run_out<f.value>(args, s.experts, stream, err); });
}
