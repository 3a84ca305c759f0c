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
 *              and has their first weights on the way
 * Order        the columns of an expert are cut in halves, of as many steps, and the steps of all
 *              experts' halves dealt out to the warps in turn; a warp adds up its first halves, its
 *              second halves, both; then warps in order
 * Roofline     the weights of the experts chosen, once: 9 * 4.7 MB for the model in bf16, 14 us at
 *              3.0 TB/s
 * Measured     in a step (context 1024), from the end of the kernel before: H200, bf16 10.6 us,
 *              93 % of 4.3 TB/s (2026-11-23). H100, before the choice was told: int8 10.4, int4
 *              9.3 (2026-11-22)
 */
#include "../device/halves.cuh"
#include "../device/moe_step.cuh"

namespace {

constexpr int64_t MAX_COLS = 1 << 20; /* products of sizes stay within an int */

/* Steps on their way: with so many, three blocks find room on a multiprocessor, so that the model's
 * 288 all do and none waits for another's end; without scales one also beside two of the inner
 * kernel. */
template <kl_weight_format format>
constexpr int OUT_DEPTH = weight_codec<format>::GROUP > 0 ? 5 : 6;

/* Steps in half of a row. */
__host__ __device__ inline int half_steps(const weight_view &w)
{
    return static_cast<int>((w.row_bytes + 2 * RING_STEP - 1) / (2 * RING_STEP));
}

__host__ __device__ inline int steps_of_shared(const moe_step_arguments &a)
{
    return a.n_shared > 0 ? half_steps(a.shared_w2) : 0;
}

__host__ __device__ inline int steps_of_halves(const moe_step_arguments &a)
{
    return steps_of_shared(a) + a.top_k * half_steps(a.w2);
}

/* A step of all experts, whose first halves come one behind the other; those of the second halves
 * lie in the other rows of the same products. */
struct alignas(16) out_step {
    const uint8_t *data; /* of the expert's first of the block's 8 rows */
    const bf16 *scales;
    int at;     /* bytes of a row before the step */
    int column; /* the expert's first, in the inner products */
    float weight;
};

__device__ inline out_step step_of(const moe_step_arguments &a, const chosen_experts &chosen,
                                   int s)
{
    const int shared = steps_of_shared(a), each = half_steps(a.w2);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * EACH;
    if (s < shared) {
        const weight_row first = row_of(a.shared_w2, row);
        return {first.data, first.scales, s * RING_STEP, 0, 1.0f};
    }
    const int j = (s - shared) / each, at = (s - shared - j * each) * RING_STEP;
    const weight_row first = row_of(a.w2, chosen.ids[j] * a.w2.rows + row);
    const int before = a.n_shared * static_cast<int>(a.shared_w2.cols);
    return {first.data, first.scales, at, before + j * static_cast<int>(a.w2.cols),
            chosen.weights[j]};
}

/* A lane's share of an expert's rows. */
struct half_rows {
    int skip,
        groups; /* bytes from the first row to this lane's, with its piece; groups to its row */
    int half, end; /* bytes of half a row; of a row, less those before the piece */
};

__device__ inline half_rows half_rows_of(const weight_view &w)
{
    const int r = lane_id() / STREAM_LANES, piece = lane_id() % STREAM_LANES * 16;
    const int row_bytes = static_cast<int>(w.row_bytes);
    return {r * row_bytes + piece, r * static_cast<int>(w.groups), half_steps(w) * RING_STEP,
            row_bytes - piece};
}

/* What the ring is to hold next. */
template <kl_weight_format format> struct out_walk {
    using feed_type = ring_feed<format>;
    static constexpr int DEPTH = OUT_DEPTH<format>;
    using ring_type = weight_ring<format, DEPTH>;

    const out_step *list;
    int steps, shared_steps;
    half_rows shared, routed;
    uint32_t odd =
        0; /* two bits a step, the oldest first: which halves the scales are, of words */

    __device__ out_walk(const moe_step_arguments &a, const out_step *steps_of_all)
        : list(steps_of_all), steps(steps_of_halves(a)), shared_steps(steps_of_shared(a)),
          shared(half_rows_of(a.shared_w2)), routed(half_rows_of(a.w2))
    {
    }

    __device__ void put(ring_type &ring, int s)
    {
        odd >>= 2;
        if (s >= steps) return ring.put_none();
        const out_step &step = list[s];
        const bool is_shared = s < shared_steps;
        const half_rows own = {
            is_shared ? shared.skip : routed.skip, is_shared ? shared.groups : routed.groups,
            is_shared ? shared.half : routed.half, is_shared ? shared.end : routed.end};
        weight_row rows[2] = {{step.data + (own.skip + step.at), nullptr}};
        rows[1].data = rows[0].data + own.half;
        if constexpr (feed_type::SCALED) {
            const int before = step.at + lane_id() % STREAM_LANES * 16;
            rows[0].scales = step.scales + (own.groups + feed_type::groups(before));
            rows[1].scales = rows[0].scales + feed_type::groups(own.half);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32_t second = is_odd(rows[i].scales);
                rows[i].scales -= second;
                odd |= second << (2 * (DEPTH - 1) + i);
            }
        }
        ring.template put<format>(rows, {step.at < own.end, step.at + own.half < own.end});
    }

    __device__ ring_pieces take(const ring_type &ring) const
    {
        return ring.template take<format>({(odd & 1) != 0, (odd & 2) != 0});
    }
};

/* The inner products on their way to two rows of x of from.units() times 16 bytes each: unit i
 * comes from their column from.column(i), or is zeros where that is -1. Columns are found out
 * before the products are there, for a thread's first units. */
template <class From> struct inner_copy {
    static constexpr int BATCH =
        5; /* with 256 threads all of the model's 9 times 1024 columns */
    From from;
    int first[BATCH];

    __device__ void prepare()
    {
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const int i = b * STREAM_THREADS + threadIdx.x;
            first[b] = i < 2 * from.units() ? from.column(i) : -1;
        }
    }

    __device__ void copy(const shared_rows &to, const bf16 *inner, int i, int column) const
    {
        const int units = from.units(), second = i >= units;
        copy_async(to.unit(second, i - second * units), inner + max(column, 0), column >= 0);
    }

    /* All on their way at once. */
    __device__ void start(const shared_rows &to, const bf16 *inner) const
    {
        const int all = 2 * from.units();
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (const int i = b * STREAM_THREADS + threadIdx.x; i < all)
                copy(to, inner, i, first[b]);
#pragma unroll 1
        for (int i = BATCH * STREAM_THREADS + threadIdx.x; i < all; i += STREAM_THREADS)
            copy(to, inner, i, from.column(i));
        copy_commit();
    }
};

/* The inner products as two rows of x: the experts' first halves and their second ones, each of
 * whole steps, UNITS times 16 bytes of x. */
template <int UNITS> struct halves_of_experts {
    const moe_step_arguments &a;
    const out_step *list;
    const int steps, shared_steps;

    __device__ int units() const { return steps * UNITS; }

    __device__ int column(int i) const
    {
        const int second = i >= units(), at = i - second * units();
        const int s = at / UNITS;
        const weight_view &w = s < shared_steps ? a.shared_w2 : a.w2;
        const int own = (list[s].at / RING_STEP + second * half_steps(w)) * UNITS + at % UNITS;
        return 8 * own < static_cast<int>(w.cols) ? list[s].column + 8 * own : -1;
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

/* This warp's share of the sum of row lane / 4, in the lanes that are multiples of 4. */
template <kl_weight_format format>
__device__ float multiply_experts(out_walk<format> &walk,
                                  typename out_walk<format>::ring_type &ring,
                                  const shared_rows &inner)
{
    float acc[2] = {};
    out_columns<format> columns(inner);
#pragma unroll 1
    for (int s = warp_id(); s < walk.steps; s += STREAM_WARPS) {
        columns.multiply(acc, walk.take(ring), walk.list[s].weight);
        columns.advance();
        walk.put(ring, s + walk.DEPTH * STREAM_WARPS);
    }
    return columns.total(acc[0]) + columns.total(acc[1]);
}

template <kl_weight_format format>
__global__ __launch_bounds__(STREAM_THREADS, 2 * RING_BLOCKS) void moe_step_out_kernel(
    __grid_constant__ const moe_step_arguments a)
{
    using walk_type = out_walk<format>;
    using ring_type = typename walk_type::ring_type;
    constexpr int UNITS = RING_STEP / 16 * weight_codec<format>::PIECE / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float sums[STREAM_WARPS * EACH];
    __shared__ chosen_experts chosen;
    const int steps = steps_of_halves(a);
    const int cols = steps * UNITS * 8;
    const shared_rows inner = {shared + ring_type::BYTES, shared_rows::pitch_of(cols)};
    out_step *const list =
        reinterpret_cast<out_step *>(inner.data + out_columns<format>::bytes_of(cols));
    out_columns<format>::clear(inner);
    walk_type walk(a, list);
    ring_type ring(shared);
    let_next_start();
    if (a.unsettled) wait_for_inputs(); /* scales come through the L1 */
    if (a.sums != nullptr)
        hear(a, chosen);
    else
        choose(a, chosen);
    __syncthreads();
    for (int s = threadIdx.x; s < steps; s += STREAM_THREADS) list[s] = step_of(a, chosen, s);
    __syncthreads();
#pragma unroll 1
    for (int d = 0; d < walk.DEPTH; d++) walk.put(ring, warp_id() + d * STREAM_WARPS);
    inner_copy<halves_of_experts<UNITS>> products = {{a, list, steps, walk.shared_steps}, {}};
    products.prepare();

    wait_for_inputs();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * EACH + threadIdx.x;
    const bool stores = threadIdx.x < EACH;
    const float before = stores && a.residual != nullptr ? a.residual[row] : 0;
    products.start(inner, a.inner);
    copy_wait<0>();
    __syncthreads();
    const float sum = multiply_experts(walk, ring, inner);
    if (lane_id() % STREAM_LANES == 0) sums[warp_id() * EACH + lane_id() / STREAM_LANES] = sum;
    __syncthreads();
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

template <kl_weight_format format> size_t out_bytes(int64_t steps)
{
    const int cols = static_cast<int>(steps) * STREAM_LANES * weight_codec<format>::PIECE;
    return out_walk<format>::ring_type::BYTES +
           static_cast<size_t>(out_columns<format>::bytes_of(cols)) +
           static_cast<size_t>(steps) * sizeof(out_step);
}

kl_status run_out(const moe_step_arguments &a, kl_weight_format format, cudaStream_t stream,
                  kl_error *err)
{
    return with_format(format, [&](auto f) {
        return launch_step(moe_step_out_kernel<f.value>,
                           static_cast<unsigned>(a.w2.rows / EACH),
                           out_bytes<f.value>(steps_of_halves(a)), a, stream, err);
    });
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
        widest > MAX_COLS || !same_formats(a))
        return false;
    const moe_step_arguments args = arguments_of({a, nullptr, nullptr, 0, {}, nullptr, false});
    const int64_t steps = steps_of_halves(args);
    return kl_cuda_moe_step_inner_takes(args, a->w1.format) &&
           kl_cuda_moe_step_apart_takes(args, a->w2.format) &&
           with_format(a->w2.format,
                       [&](auto f) { return out_bytes<f.value>(steps) <= RING_MOST_SHARED; });
}

kl_status kl_cuda_moe_step_run(const moe_step &s, cudaStream_t stream, kl_error *err)
{
    const moe_step_arguments args = arguments_of(s);
    KL_TRY(kl_cuda_moe_step_inner(args, s.experts, s.apart, stream, err));
    return s.apart ? kl_cuda_moe_step_apart(args, s.experts->w2.format, stream, err)
                   : run_out(args, s.experts->w2.format, stream, err);
}
