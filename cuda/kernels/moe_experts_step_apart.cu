/*
 * moe_experts_step_apart.cu -- the second product of a single token's experts with the bits that
 * many tokens have: what a batch-invariant backend takes in place of moe_experts_step.cu's.
 *
 * Computes     y = sum_j weight_j (w2_j inner_j) + w2_shared inner_shared;  out = y, or
 *              residual += y
 * Shapes       inner [I', top_k * I]; w2 [E, D, I]; out, residual [D]; D and I multiples of 64
 * Layout       dense, 16-byte aligned rows; each routed matrix in the shared one's format
 * Precision    bf16 in and out, the residual f32; int4 weights to bf16, the others exact; f32 sums,
 *              y rounded to bf16
 * Grid         a block for each 8 rows, which goes through the experts two by two: rows of one are
 *              the upper half of an mma's, rows of the other the lower. It knows the experts before
 *              the inner products are there, and has their first weights on the way
 * Order        that of moe_experts_few.cu: an expert's columns by warps that take turns, then
 *              warps in order; then experts in the order of the choice, the shared one last
 * Roofline     the weights of the experts chosen, once: 9 * 4.7 MB for the model in bf16, 14 us at
 *              3.0 TB/s
 * Measured     H200, in a step (bf16, context 1024), from the end of the kernel before: 12.3
 *              us; a token 2.094 ms, with moe_experts_step.cu and all else of the default mode
 *              1.923 (2026-11-23)
 */
#include "../device/moe_step.cuh"

namespace {

constexpr int ROW_FLOATS = STREAM_WARPS * EACH; /* of an expert's sums: [warp][row] */

/* Steps on their way: with so many, three blocks find room on a multiprocessor, so that the model's
 * 288 all do and none waits for another's end. */
template <kl_weight_format format>
using apart_ring = weight_ring<format, (weight_codec<format>::GROUP > 0 ? 5 : 6)>;

/* An expert as a block visits it. */
struct visit {
    weight_row first; /* of the block's 8 */
    float weight;
};

__host__ __device__ inline int visits_of(const moe_step_arguments &a)
{
    return a.n_shared + a.top_k;
}

__host__ __device__ inline const weight_view &down_of(const moe_step_arguments &a, int v)
{
    return v < a.n_shared ? a.shared_w2 : a.w2;
}

__host__ __device__ inline int turns_of(const weight_view &w)
{
    return static_cast<int>((w.row_bytes + RING_TURN - 1) / RING_TURN);
}

/* Pairs of visits, 2 p and 2 p + 1, and the turns of the warps through them: all but the first
 * have as many as a routed expert. */
struct pair_list {
    int pairs, first, each;

    __host__ __device__ explicit pair_list(const moe_step_arguments &a)
        : pairs((visits_of(a) + 1) / 2), first(turns_of(down_of(a, 0))), each(turns_of(a.w2))
    {
        if (visits_of(a) > 1 && each > first) first = each;
    }

    __host__ __device__ int turns(int p) const { return p == 0 ? first : each; }
    __host__ __device__ int all() const { return first + (pairs - 1) * each; }
    __device__ int pair_of(int turn) const
    {
        return turn < first ? 0 : 1 + (turn - first) / each;
    }
    __device__ int start(int p) const { return p == 0 ? 0 : first + (p - 1) * each; }
};

/* By all threads; a barrier follows. */
__device__ void list_visits(const moe_step_arguments &a, const chosen_experts &chosen,
                            visit *visits)
{
    const int64_t row = static_cast<int64_t>(blockIdx.x) * EACH;
    for (int v = threadIdx.x; v < visits_of(a); v += STREAM_THREADS) {
        const int j = v - a.n_shared;
        if (j < 0)
            visits[v] = {row_of(a.shared_w2, row), 1.0f};
        else
            visits[v] = {row_of(a.w2, chosen.ids[j] * a.w2.rows + row), chosen.weights[j]};
    }
}

/* Where this lane's first piece of a visit lies. */
template <kl_weight_format format>
__device__ weight_row piece_of(const moe_step_arguments &a, const visit *visits, int v)
{
    using feed = ring_feed<format>;
    const weight_view &w = down_of(a, v);
    const int r = lane_id() / STREAM_LANES;
    weight_row row = visits[v].first;
    row.data += r * w.row_bytes + ring_skip();
    if constexpr (feed::SCALED) row.scales += r * w.groups + feed::groups(ring_skip());
    return row;
}

/* What the ring is to hold next: a turn of both visits of a pair; zeros where one has none. */
template <kl_weight_format format> struct pair_walk {
    using feed = ring_feed<format>;
    const moe_step_arguments &a;
    const visit *visits;
    pair_list list;
    int pair = 0, left = 0; /* of its turns; 0: the pair has not been entered */
    weight_row row[2];
    int bytes[2]; /* of the rows, from there on */

    __device__ pair_walk(const moe_step_arguments &args, const visit *known)
        : a(args), visits(known), list(args)
    {
    }

    __device__ void enter()
    {
        const int n = visits_of(a);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int v = 2 * pair + i, known = v < n ? v : 0;
            row[i] = piece_of<format>(a, visits, known);
            if constexpr (feed::SCALED) row[i].scales -= is_odd(row[i].scales);
            const int all = v < n ? static_cast<int>(down_of(a, v).row_bytes) : 0;
            bytes[i] = all - ring_skip();
        }
        left = list.turns(pair);
    }

    __device__ void put(apart_ring<format> &ring)
    {
        if (pair == list.pairs) return ring.put_none();
        if (left == 0) enter();
        ring.template put<format>(row, {bytes[0] > 0, bytes[1] > 0});
#pragma unroll
        for (int i = 0; i < 2; i++) {
            row[i].data += RING_TURN;
            if constexpr (feed::SCALED) row[i].scales += feed::groups(RING_TURN);
            bytes[i] -= RING_TURN;
        }
        if (--left == 0) pair++;
    }
};

/* The inner products as two rows of x: those of each pair's first visits and of their second ones,
 * in whole turns, UNITS times 16 bytes of x. */
template <int UNITS> struct rows_of_pairs {
    const moe_step_arguments &a;
    const pair_list &list;

    __device__ int units() const { return list.all() * UNITS; }

    __device__ int column(int i) const
    {
        const int second = i >= units(), at = i - second * units();
        const int pair = list.pair_of(at / UNITS), v = 2 * pair + second;
        if (v >= visits_of(a)) return -1;
        const int column = 8 * (at - list.start(pair) * UNITS), j = v - a.n_shared;
        const int cols = static_cast<int>(down_of(a, v).cols);
        const int before = a.n_shared * static_cast<int>(a.shared_w2.cols);
        return column < cols ? (j < 0 ? 0 : before + j * cols) + column : -1;
    }
};

/* sums: [visit][warp][row] of this warp. */
template <kl_weight_format format>
__device__ void multiply_experts(float *sums, pair_walk<format> &walk, apart_ring<format> &ring,
                                 const shared_rows &inner)
{
    const moe_step_arguments &a = walk.a;
    const int last = visits_of(a) - 1;
    ring_x<format, 1> columns(inner, 2);
#pragma unroll 1
    for (int p = 0; p < walk.list.pairs; p++) {
        bool odd[2] = {};
        if constexpr (ring_feed<format>::SCALED)
#pragma unroll
            for (int i = 0; i < 2; i++)
                odd[i] = is_odd(piece_of<format>(a, walk.visits, min(2 * p + i, last)).scales);
        float acc[1][4] = {};
#pragma unroll 1
        for (int n = walk.list.turns(p); n > 0; n--) {
            ring_multiply<format, 1>(acc, ring.template take<format>(odd), columns);
            columns.advance();
            walk.put(ring);
        }
        if (lane_id() % STREAM_LANES != 0) continue;
        float *const own = sums + 2 * p * ROW_FLOATS + warp_id() * EACH + lane_id() / 4;
        own[0] = acc[0][0];                            /* rows 0 to 7 by row 0 of x */
        if (2 * p < last) own[ROW_FLOATS] = acc[0][3]; /* rows 8 to 15 by row 1 */
    }
}

/* The sum over the warps of each visit, in place of the first warp's; a barrier follows. */
__device__ void add_warps(float *sums, int visits)
{
    for (int i = threadIdx.x; i < visits * EACH; i += STREAM_THREADS) {
        float *const own = sums + i / EACH * ROW_FLOATS;
        own[i % EACH] = sum_of_warps<EACH>(own, i % EACH);
    }
}

__device__ float add_experts(const moe_step_arguments &a, const visit *visits,
                             const float *sums, int row)
{
    float y = 0;
#pragma unroll 1
    for (int v = a.n_shared; v < visits_of(a); v++)
        y = fmaf(visits[v].weight, sums[v * ROW_FLOATS + row], y);
    return a.n_shared > 0 ? y + sums[row] : y;
}

template <kl_weight_format format>
__global__ __launch_bounds__(STREAM_THREADS, 2 * RING_BLOCKS) void moe_step_apart_kernel(
    __grid_constant__ const moe_step_arguments a)
{
    constexpr int UNITS = RING_TURN / 16 * weight_codec<format>::PIECE / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ chosen_experts chosen;
    __shared__ visit visits[MAX_STEP_EXPERTS];
    const pair_list list(a);
    const shared_rows inner = {shared + apart_ring<format>::BYTES,
                               shared_rows::pitch_of(int64_t{list.all()} * UNITS * 8)};
    float *const sums = reinterpret_cast<float *>(inner.data + 2 * inner.pitch);
    apart_ring<format> ring(shared);
    let_next_start();
    if (a.unsettled) wait_for_inputs(); /* scales come through the L1 */
    choose(a, chosen);
    __syncthreads();
    list_visits(a, chosen, visits);
    __syncthreads();
    pair_walk<format> walk(a, visits);
#pragma unroll 1
    for (int d = 0; d < apart_ring<format>::STEPS; d++) walk.put(ring);
    inner_copy<rows_of_pairs<UNITS>> products = {{a, list}, {}};
    products.prepare();

    wait_for_inputs();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * EACH + threadIdx.x;
    const bool stores = threadIdx.x < EACH;
    const float before = stores && a.residual != nullptr ? a.residual[row] : 0;
    products.start(inner, a.inner);
    copy_wait<0>();
    __syncthreads();
    multiply_experts(sums, walk, ring, inner);
    __syncthreads();
    add_warps(sums, visits_of(a));
    __syncthreads();
    if (!stores) return;
    const bf16 y = from_float<bf16>(add_experts(a, visits, sums, threadIdx.x));
    if (a.residual != nullptr)
        a.residual[row] = before + to_float(y);
    else
        a.out[row] = y;
}

/* ---- host ------------------------------------------------------------------------------ */

template <kl_weight_format format> size_t apart_bytes(const moe_step_arguments &a)
{
    const int64_t cols =
        int64_t{pair_list(a).all()} * (RING_TURN / 16) * weight_codec<format>::PIECE;
    return apart_ring<format>::BYTES + 2 * static_cast<size_t>(shared_rows::pitch_of(cols)) +
           static_cast<size_t>(visits_of(a)) * ROW_FLOATS * sizeof(float);
}

} // namespace

bool kl_cuda_moe_step_apart_takes(const moe_step_arguments &a, kl_weight_format format)
{
    return with_format(format,
                       [&](auto f) { return apart_bytes<f.value>(a) <= RING_MOST_SHARED; });
}

kl_status kl_cuda_moe_step_apart(const moe_step_arguments &a, kl_weight_format format,
                                 cudaStream_t stream, kl_error *err)
{
    return with_format(format, [&](auto f) {
        return launch_step(moe_step_apart_kernel<f.value>,
                           static_cast<unsigned>(a.w2.rows / EACH), apart_bytes<f.value>(a), a,
                           stream, err);
    });
}
