/*
 * moe_experts_step.cu -- moe_experts for a single token: a decode step of one sequence.
 *
 * Computes     inner_v = silu(w1_v x) * (w3_v x) for each expert v of the token, the shared one
 *              first;  out = sum_v weight_v (w2_v inner_v), the shared one's weight being 1
 * Shapes       x, out [D]; w1, w3 [E, I, D]; w2 [E, D, I]; D and I multiples of 64
 * Layout       dense, 16-byte aligned rows; each routed matrix in the shared one's format
 * Precision    bf16 in and out; int4 weights to bf16, the others exact; f32 sums, inner products
 *              rounded to bf16
 * Grid         inner: a block for each expert and 8 rows of w1 and of w3. out: a block for each
 *              16 rows, which goes through all experts, so that no results of single experts
 *              cross memory. Both stream weights into the fragments of the tensor cores; before
 *              the experts are known they ask for the shared one's
 * Order        out: a warp takes every ninth expert, its columns in rising order; then warps
 * Roofline     the weights of the experts chosen, once: 9 * 14.2 MB for the model in bf16, 42 us
 *              at 3.0 TB/s
 * Measured     not timed yet; with out's columns cut into a run for each warp, H100, in a CUDA
 *              graph: bf16 53.6 us, int8 32.6 us (2026-11-22)
 */
#include "../device/math.cuh"
#include "../device/moe.cuh"
#include "../device/stream.cuh"

namespace {

constexpr int64_t MAX_COLS = 1 << 28; /* of a matrix: an int counts them */
constexpr int EACH = STREAM_ROWS / 2;

/* Experts are numbered as they are visited: the shared one, if any, then the token's choices. */
struct step_arguments {
    const bf16 *x;
    const int *ids;       /* [top_k] */
    const float *weights; /* [top_k] */
    weight_view w1, w3, w2, shared_w1, shared_w3, shared_w2;
    bf16 *inner; /* [shared I', then top_k times I] */
    bf16 *out;
    int n_shared, top_k; /* n_shared: 0 or 1 */
    int64_t groups;      /* blocks for an expert, in the inner kernel */
    int64_t ahead;       /* bytes of a row asked for before the inputs are there */
};

__device__ bool is_shared(const step_arguments &a, int v)
{
    return v < a.n_shared;
}

/* First row of the stack that belongs to the expert, of matrices with so many rows. */
__device__ int64_t first_row_of(const step_arguments &a, int v, int64_t rows)
{
    return is_shared(a, v) ? 0 : a.ids[v - a.n_shared] * rows;
}

__device__ int64_t inner_of(const step_arguments &a, int v)
{
    return is_shared(a, v) ? 0 : a.n_shared * a.shared_w1.rows + (v - a.n_shared) * a.w1.rows;
}

/* ---- inner ----------------------------------------------------------------------------- */

/* What block `block` multiplies: rows row .. row + 7 of expert v's w1 and w3, if it has them. */
struct inner_tile {
    int v;
    int64_t row;
    const weight_view &gate, &up;

    __device__ inner_tile(const step_arguments &a, int64_t block)
        : v(static_cast<int>(block / a.groups)), row(block % a.groups * EACH),
          gate(is_shared(a, v) ? a.shared_w1 : a.w1), up(is_shared(a, v) ? a.shared_w3 : a.w3)
    {
    }

    __device__ bool exists() const { return row < gate.rows; }

    /* Row i of the fragments: half of one matrix, half of the other. */
    __device__ weight_row at(const step_arguments &a, int i) const
    {
        return row_of(i < EACH ? gate : up, first_row_of(a, v, gate.rows) + row + i % EACH);
    }

    /* By the block; the experts are known unless it is the shared one. */
    __device__ void prefetch(const step_arguments &a, int64_t bytes) const
    {
        if (exists() && threadIdx.x < STREAM_ROWS)
            stream_prefetch(at(a, threadIdx.x), gate.row_bytes, bytes);
    }
};

template <kl_weight_format format>
__global__
__launch_bounds__(STREAM_THREADS,
                  2) void moe_step_inner_kernel(__grid_constant__ const step_arguments a)
{
    __shared__ float shared[STREAM_FLOATS<1>];
    const inner_tile tile(a, blockIdx.x);
    if (is_shared(a, tile.v)) tile.prefetch(a, a.ahead);
    wait_for_inputs();
    if (!tile.exists()) return;

    const int r = lane_id() / STREAM_LANES;
    const stream_place<format, 1> at = {{tile.at(a, r), tile.at(a, r + EACH)},
                                        {r == 0 ? a.x : nullptr},
                                        static_cast<int>(tile.gate.cols)};
    float acc[1][4];
    stream_multiply<STREAM_WARPS, stream_format<format, 1>::DEPTH>(acc, at, warp_id(), [&] {
        const int64_t later = blockIdx.x + STREAM_AT_ONCE;
        if (later < gridDim.x) inner_tile(a, later).prefetch(a, STREAM_LATER_BYTES);
    });
    /* Not before: blocks of the next kernel that took the room of those that end first would lie
     * two on one multiprocessor and none on another. */
    let_next_start();
    stream_share<1>(shared, acc);
    __syncthreads();
    const int i = threadIdx.x;
    if (i < EACH)
        a.inner[inner_of(a, tile.v) + tile.row + i] = from_float<bf16>(
            silu(stream_sum<1>(shared, 0, i)) * stream_sum<1>(shared, 0, i + EACH));
}

/* ---- out ------------------------------------------------------------------------------- */

/* A warp for each expert of the model, which has 9 a token; two such blocks fit. */
constexpr int OUT_WARPS = 9, OUT_THREADS = OUT_WARPS * WARP;
template <kl_weight_format format>
constexpr int OUT_DEPTH = format == KL_W_INT4 ? 2 : stream_format<format, 1>::DEPTH * 2 / 3;

/* The products of expert v with rows row, row + 8 of the lane, weighted and added; in the first
 * column of the fragments. */
template <kl_weight_format format>
__device__ void add_expert(float (&sum)[2], const step_arguments &a, int v, int64_t row)
{
    const weight_view &w = is_shared(a, v) ? a.shared_w2 : a.w2;
    const float weight = is_shared(a, v) ? 1.0f : a.weights[v - a.n_shared];
    const int r = lane_id() / STREAM_LANES;
    const int64_t tile = first_row_of(a, v, w.rows) + row, first = tile + r;
    if (lane_id() < STREAM_ROWS)
        stream_prefetch(row_of(w, tile + lane_id()), w.row_bytes, w.row_bytes);
    const stream_place<format, 1> at = {{row_of(w, first), row_of(w, first + 8)},
                                        {r == 0 ? a.inner + inner_of(a, v) : nullptr},
                                        static_cast<int>(w.cols)};
    float acc[1][4];
    stream_multiply<1, OUT_DEPTH<format>>(acc, at, 0, [] {});
    sum[0] = fmaf(weight, acc[0][0], sum[0]);
    sum[1] = fmaf(weight, acc[0][2], sum[1]);
}

template <kl_weight_format format>
__global__
__launch_bounds__(OUT_THREADS,
                  2) void moe_step_out_kernel(__grid_constant__ const step_arguments a)
{
    __shared__ float shared[OUT_WARPS][STREAM_ROWS];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * STREAM_ROWS;
    let_next_start();
    if (a.n_shared > 0 && threadIdx.x < STREAM_ROWS)
        stream_prefetch(row_of(a.shared_w2, row + threadIdx.x), a.shared_w2.row_bytes, a.ahead);
    wait_for_inputs();
    float sum[2] = {0, 0};
#pragma unroll 1
    for (int v = warp_id(); v < a.n_shared + a.top_k; v += OUT_WARPS)
        add_expert<format>(sum, a, v, row);
    if (lane_id() % STREAM_LANES == 0)
        for (int i = 0; i < 2; i++)
            shared[warp_id()][lane_id() / STREAM_LANES + 8 * i] = sum[i];
    __syncthreads();
    if (threadIdx.x >= STREAM_ROWS) return;
    float all = 0;
    for (int w = 0; w < OUT_WARPS; w++) all += shared[w][threadIdx.x];
    a.out[row + threadIdx.x] = from_float<bf16>(all);
}

/* ---- host ------------------------------------------------------------------------------ */

bool has_shared(const kl_moe_experts *a)
{
    return a->shared_w1.data != nullptr;
}

step_arguments arguments_of(const kl_moe_experts *a)
{
    return {
        .x = static_cast<const bf16 *>(a->x.data),
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
        .n_shared = has_shared(a) ? 1 : 0,
        .top_k = static_cast<int>(a->ids.shape[1]),
        .groups = 0,
        .ahead = 0,
    };
}

kl_status run_inner(step_arguments a, kl_weight_format format, cudaStream_t stream,
                    kl_error *err)
{
    const int64_t rows = a.w1.rows > a.shared_w1.rows ? a.w1.rows : a.shared_w1.rows;
    a.groups = rows / EACH;
    a.ahead = stream_ahead(a.groups);
    const int64_t blocks = a.groups * (a.n_shared + a.top_k);
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE, "moe_experts: top_k * I must be <= %lld, got %lld",
                       MAX_BLOCKS * EACH, static_cast<long long>(blocks * EACH));
    return with_format(format, [&](auto f) {
        return kl_cuda_launch(moe_step_inner_kernel<f.value>, static_cast<unsigned>(blocks),
                              STREAM_THREADS, 0, stream, err, a);
    });
}

kl_status run_out(step_arguments a, kl_weight_format format, cudaStream_t stream, kl_error *err)
{
    const int64_t blocks = a.w2.rows / STREAM_ROWS;
    a.ahead = stream_ahead(blocks);
    return with_format(format, [&](auto f) {
        return kl_cuda_launch(moe_step_out_kernel<f.value>, static_cast<unsigned>(blocks),
                              OUT_THREADS, 0, stream, err, a);
    });
}

} // namespace

bool kl_cuda_moe_step_takes(const kl_moe_experts *a)
{
    const int64_t inner = a->w1.rows > a->shared_w1.rows ? a->w1.rows : a->shared_w1.rows;
    return a->x.shape[0] == 1 && a->w1.cols < MAX_COLS && inner < MAX_COLS &&
           (!has_shared(a) ||
            (a->shared_w1.format == a->w1.format && a->shared_w2.format == a->w2.format));
}

kl_status kl_cuda_moe_step_run(const kl_moe_experts *a, cudaStream_t stream, kl_error *err)
{
    const step_arguments args = arguments_of(a);
    KL_TRY(run_inner(args, a->w1.format, stream, err));
    return run_out(args, a->w2.format, stream, err);
}
