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
 * Order        out: the columns of all experts one behind the other are cut into a run for each
 *              warp; then warps in order
 * Roofline     the weights of the experts chosen, once: 9 * 14.2 MB for the model in bf16, 42 us
 *              at 3.0 TB/s
 * Measured     H100, 256 experts, 8 chosen and a shared one: bf16 51.8 us, 82 % of roofline; int8
 *              33.1, fp8 34.7, int4 26.7 (benchmarks/bench_ops.py, 2026-11-22)
 */
#include "../device/math.cuh"
#include "../device/moe.cuh"
#include "../device/stream.cuh"

namespace {

constexpr int MAX_EXPERTS = 64;       /* of a token, with the shared one */
constexpr int64_t MAX_COLS = 1 << 28; /* of a token's experts together: an int counts them */
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

template <kl_weight_format format>
__global__
__launch_bounds__(STREAM_THREADS,
                  2) void moe_step_inner_kernel(__grid_constant__ const step_arguments a)
{
    __shared__ float shared[STREAM_FLOATS<1>];
    const int v = static_cast<int>(blockIdx.x / a.groups);
    const int64_t row = blockIdx.x % a.groups * EACH;
    const weight_view &gate = is_shared(a, v) ? a.shared_w1 : a.w1;
    const weight_view &up = is_shared(a, v) ? a.shared_w3 : a.w3;
    let_next_start();
    if (is_shared(a, v) && row < gate.rows && threadIdx.x < STREAM_ROWS)
        stream_prefetch(row_of(threadIdx.x < EACH ? gate : up, row + threadIdx.x % EACH),
                        gate.row_bytes, a.ahead);
    wait_for_inputs();
    if (row >= gate.rows) return;

    const int r = lane_id() / STREAM_LANES;
    const int64_t first = first_row_of(a, v, gate.rows) + row;
    float acc[1][4];
    stream_multiply<format, 1>(acc, {{row_of(gate, first + r), row_of(up, first + r)},
                                     {r == 0 ? a.x : nullptr},
                                     static_cast<int>(gate.cols)});
    stream_share<1>(shared, acc);
    __syncthreads();
    const int i = threadIdx.x;
    if (i < EACH)
        a.inner[inner_of(a, v) + row + i] = from_float<bf16>(
            silu(stream_sum<1>(shared, 0, i)) * stream_sum<1>(shared, 0, i + EACH));
}

/* ---- out ------------------------------------------------------------------------------- */

/* An expert as a block of the out kernel visits it. */
struct visit {
    weight_row first; /* of the block's 16 */
    const bf16 *x;
    float weight;
};

/* A warp's way through the columns of all experts as if they lay one behind the other, each
 * filled up to a whole step. */
template <kl_weight_format format> struct out_walk {
    using F = stream_format<format, 1>;

    const step_arguments &a;
    const visit *visits;
    int v = 0, left = 0; /* columns of expert v, from the warp's next one on */
    float weight = 0;
    stream_place<format, 1> at = {};

    __device__ const weight_view &view() const { return is_shared(a, v) ? a.shared_w2 : a.w2; }

    __device__ static int padded(const weight_view &w)
    {
        return static_cast<int>((w.cols + F::STEP - 1) / F::STEP) * F::STEP;
    }

    /* Where the steps of warp `warp` begin: each has a run of its own, which crosses from one
     * expert to the next as seldom as can be. */
    __device__ static int first_step(const step_arguments &a, int warp)
    {
        const int all = a.n_shared * padded(a.shared_w2) + a.top_k * padded(a.w2);
        return all / F::STEP * warp / STREAM_WARPS;
    }

    /* To column `col` from the start of expert v on. */
    __device__ void go_to(int col)
    {
        for (; v < a.n_shared + a.top_k; v++) {
            left = padded(view()) - col;
            if (left > 0) break;
            col = -left;
        }
        if (v == a.n_shared + a.top_k) return;
        const visit &here = visits[v];
        const weight_view &w = view();
        const int r = lane_id() / STREAM_LANES;
        const weight_row top = {here.first.data + r * w.row_bytes,
                                here.first.scales + r * w.groups};
        const weight_row bottom = {top.data + 8 * w.row_bytes, top.scales + 8 * w.groups};
        at = {{top, bottom}, {r == 0 ? here.x : nullptr}, static_cast<int>(w.cols)};
        at.advance(col + lane_id() % STREAM_LANES * F::PIECE);
        weight = here.weight;
    }

    __device__ void load(stream_step<format, 1> &step, float &its_weight)
    {
        step.load(at, 0);
        its_weight = weight;
        at.advance(F::STEP);
        left -= F::STEP;
        if (left > 0) return;
        v++;
        go_to(-left);
    }
};

/* This warp's share of the 16 sums; column 0 of the fragments is the token. */
template <kl_weight_format format>
__device__ void multiply_experts(float (&acc)[1][4], const step_arguments &a,
                                 const visit *visits)
{
    using walk = out_walk<format>;
    constexpr int DEPTH = walk::F::DEPTH;
    stream_step<format, 1> steps[DEPTH];
    float weights[DEPTH];
    walk next = {a, visits};
    const int first = walk::first_step(a, warp_id());
    const int n = walk::first_step(a, warp_id() + 1) - first;
    next.go_to(first * walk::F::STEP);
#pragma unroll
    for (int e = 0; e < 4; e++) acc[0][e] = 0;
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (d < n) next.load(steps[d], weights[d]);
    for (int i = 0; i < n; i += DEPTH)
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            if (i + d >= n) break;
            float part[1][4] = {};
            steps[d].multiply(part);
#pragma unroll
            for (int e = 0; e < 4; e++) acc[0][e] = fmaf(weights[d], part[0][e], acc[0][e]);
            if (i + d + DEPTH < n) next.load(steps[d], weights[d]);
        }
}

template <kl_weight_format format>
__global__
__launch_bounds__(STREAM_THREADS,
                  2) void moe_step_out_kernel(__grid_constant__ const step_arguments a)
{
    __shared__ float shared[STREAM_FLOATS<1>];
    __shared__ visit visits[MAX_EXPERTS];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * STREAM_ROWS;
    let_next_start();
    if (a.n_shared > 0 && threadIdx.x < STREAM_ROWS)
        stream_prefetch(row_of(a.shared_w2, row + threadIdx.x), a.shared_w2.row_bytes, a.ahead);
    wait_for_inputs();
    for (int v = threadIdx.x; v < a.n_shared + a.top_k; v += STREAM_THREADS) {
        const weight_view &w = is_shared(a, v) ? a.shared_w2 : a.w2;
        visits[v] = {row_of(w, first_row_of(a, v, w.rows) + row), a.inner + inner_of(a, v),
                     is_shared(a, v) ? 1.0f : a.weights[v - a.n_shared]};
    }
    __syncthreads();
    float acc[1][4];
    multiply_experts<format>(acc, a, visits);
    stream_share<1>(shared, acc);
    __syncthreads();
    if (threadIdx.x < STREAM_ROWS)
        a.out[row + threadIdx.x] = from_float<bf16>(stream_sum<1>(shared, 0, threadIdx.x));
}

/* ---- host ------------------------------------------------------------------------------ */

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
        .n_shared = kl_moe_has_shared(a) ? 1 : 0,
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
                              STREAM_THREADS, 0, stream, err, a);
    });
}

} // namespace

bool kl_cuda_moe_step_takes(const kl_moe_experts *a)
{
    const int64_t experts = a->ids.shape[1] + kl_moe_has_shared(a);
    const int64_t inner = a->w1.rows > a->shared_w1.rows ? a->w1.rows : a->shared_w1.rows;
    return a->x.shape[0] == 1 && experts <= MAX_EXPERTS && a->w1.cols <= MAX_COLS &&
           inner <= MAX_COLS / experts &&
           (!kl_moe_has_shared(a) ||
            (a->shared_w1.format == a->w1.format && a->shared_w2.format == a->w2.format));
}

kl_status kl_cuda_moe_step_run(const kl_moe_experts *a, cudaStream_t stream, kl_error *err)
{
    const step_arguments args = arguments_of(a);
    KL_TRY(run_inner(args, a->w1.format, stream, err));
    return run_out(args, a->w2.format, stream, err);
}
