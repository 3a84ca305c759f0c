/*
 * mla_decode.cu -- latent attention for single tokens over paged latents, in the absorbed form.
 *
 * Computes     q' = [W_UK^T q_nope | q_pe];  ctx = softmax(scale q' [c | k_pe]^T) c;
 *              out = W_UV ctx: the products before and after the attention, which
 *              mla_decode_tensor.cu and mla_decode_any.cu do, and the merging of its splits
 * Shapes       q [N, H, nope+rope]; pages [P, 64, rank+rope]; w_kv_b [H, nope+V, rank];
 *              out [N, H, V]
 * Layout       q's rows strided, the others dense
 * Precision    f32 or bf16 in and out, f32 between the kernels, rounded once
 * Grid         absorb: 64 channels of a head, for 8 rows; merge: 128 channels of a row and head;
 *              finish: 32 outputs of a head, for 8 rows
 * Order        sums over channels in slices by lane or warp, splits in eight interleaved runs; the
 *              cut into splits follows from the length, and from N where that may be
 * Roofline     w_kv_b once for all rows: 8.4 MB with the model's shapes, 2.8 us at 3.0 TB/s
 * Measured     H100 beside another job, N = 1: absorb 5.8 us, finish 3.8 us, merge 3.2 us at 1K
 *              tokens and 6.9 us at 128K (2026-11-22)
 */
#include "../device/launch.cuh"
#include "../device/mla.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int MAX_ROWS = 8; /* of the batch that share one reading of the weights */

/* Results of splits that the workspace holds at once: 134 MB with the model's shapes. The rows
 * of larger batches are attended in waves, each of them far more than a GPU can do at once. */
constexpr long long MAX_PARTIALS = 2048;
static_assert(MAX_PARTIALS >= MLA_MAX_SPLITS);

/* ---- q' -------------------------------------------------------------------------------- */

constexpr int ABSORB_COLS = 2 * WARP; /* of a block: two a lane */
constexpr int ABSORB_STEP = 128;      /* channels of q_nope in shared memory at a time */

template <int ROWS> struct absorb_memory {
    float q[ROWS][ABSORB_STEP];
    float parts[WARPS][ROWS][ABSORB_COLS];
};

template <int ROWS, class W>
__device__ void absorb_step(const W *w, long long rank, int channels, bool first_inside,
                            bool second_inside, const absorb_memory<ROWS> &s,
                            float (&acc)[ROWS][2])
{
#pragma unroll(ROWS == 1 ? 16 : 4)
    for (int i = warp_id(); i < channels; i += WARPS) {
        const float w0 = first_inside ? to_float(w[i * rank]) : 0.0f;
        const float w1 = second_inside ? to_float(w[i * rank + WARP]) : 0.0f;
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            acc[n][0] = fmaf(s.q[n][i], w0, acc[n][0]);
            acc[n][1] = fmaf(s.q[n][i], w1, acc[n][1]);
        }
    }
}

/* The channels that are not absorbed; by the blocks of the first columns. */
template <class T>
__device__ void copy_rope(const mla_arguments &a, long long h, long long n0, int rows)
{
    const float factor = a.scale * LOG2_E;
    for (int n = 0; n < rows; n++) {
        const T *q = static_cast<const T *>(a.q) + (n0 + n) * a.q_stride +
                     h * (a.nope + a.rope) + a.nope;
        float *to = a.query + ((n0 + n) * a.H + h) * a.width() + a.rank;
        for (long long i = threadIdx.x; i < a.rope; i += THREADS)
            to[i] = to_float(q[i]) * factor;
    }
}

template <int ROWS, class T, class W>
__global__ __launch_bounds__(THREADS) void mla_absorb(__grid_constant__ const mla_arguments a)
{
    __shared__ absorb_memory<ROWS> s;
    const long long tiles = mla_divide_up(a.rank, ABSORB_COLS);
    const long long tile = blockIdx.x % tiles, unit = blockIdx.x / tiles;
    const long long h = unit % a.H, n0 = unit / a.H * ROWS;
    const int rows = static_cast<int>(a.N - n0 < ROWS ? a.N - n0 : ROWS);
    const long long col = tile * ABSORB_COLS + lane_id();
    const W *w = static_cast<const W *>(a.w_kv_b) + h * (a.nope + a.V) * a.rank + col;
    const T *q = static_cast<const T *>(a.q) + n0 * a.q_stride + h * (a.nope + a.rope);
    float acc[ROWS][2] = {};
    let_next_start();
    for (long long i = threadIdx.x; i < a.nope; i += THREADS)
        if (col < a.rank) prefetch_line(w + i * a.rank);
    wait_for_inputs();

    for (long long i0 = 0; i0 < a.nope; i0 += ABSORB_STEP) {
        const int channels =
            static_cast<int>(a.nope - i0 < ABSORB_STEP ? a.nope - i0 : ABSORB_STEP);
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * ABSORB_STEP; i += THREADS) {
            const int n = i / ABSORB_STEP, c = i % ABSORB_STEP;
            const bool inside = n < rows && c < channels;
            s.q[n][c] = inside ? to_float(q[n * a.q_stride + i0 + c]) : 0.0f;
        }
        __syncthreads();
        absorb_step(w + i0 * a.rank, a.rank, channels, col < a.rank, col + WARP < a.rank, s,
                    acc);
    }
    for (int n = 0; n < ROWS; n++)
        for (int j = 0; j < 2; j++) s.parts[warp_id()][n][lane_id() + j * WARP] = acc[n][j];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * ABSORB_COLS; i += THREADS) {
        const int n = i / ABSORB_COLS, c = i % ABSORB_COLS;
        float sum = 0;
        for (int g = 0; g < WARPS; g++) sum += s.parts[g][n][c];
        if (tile * ABSORB_COLS + c < a.rank)
            a.query[((n0 + n) * a.H + h) * a.width() + tile * ABSORB_COLS + c] =
                sum * (a.scale * LOG2_E);
    }
    if (tile == 0) copy_rope<T>(a, h, n0, rows);
}

/* ---- merging the splits ---------------------------------------------------------------- */

constexpr int MERGE_COLS =
    4 * WARP; /* of a block: four a lane; a warp owns every eighth split */

struct merge_memory {
    float weights[MLA_MAX_SPLITS];
    float parts[WARPS][MERGE_COLS];
};

/* The factor of each split: to the common maximum, and divided by the whole sum. By one warp. */
__device__ void split_weights(const float *max, const float *sum, long long stride, int count,
                              float *weights)
{
    float top = -INFINITY, total = 0;
    for (int p = lane_id(); p < count; p += WARP) top = fmaxf(top, max[p * stride]);
    top = warp_max(top);
    for (int p = lane_id(); p < count; p += WARP) {
        weights[p] = exp2f(max[p * stride] - top);
        total = fmaf(weights[p], sum[p * stride], total);
    }
    total = warp_sum(total);
    for (int p = lane_id(); p < count; p += WARP) weights[p] /= total;
}

__global__ __launch_bounds__(THREADS) void mla_merge(__grid_constant__ const mla_arguments a)
{
    __shared__ merge_memory s;
    const long long tiles = mla_divide_up(a.rank, MERGE_COLS);
    const long long tile = blockIdx.x % tiles, unit = blockIdx.x / tiles;
    const long long n = unit / a.H, h = unit % a.H;
    let_next_start();
    wait_for_inputs();
    const int count = static_cast<int>(mla_cut(a.lengths[n], a.fine).count);
    const long long first = n * a.splits * a.H + h, col = tile * MERGE_COLS + lane_id();
    if (warp_id() == 0) split_weights(a.max + first, a.sum + first, a.H, count, s.weights);
    __syncthreads();

    float acc[4] = {};
#pragma unroll 8
    for (int p = warp_id(); p < count; p += WARPS) {
        const float *from = a.context + (first + p * a.H) * a.rank + col;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (col + j * WARP < a.rank) acc[j] = fmaf(s.weights[p], from[j * WARP], acc[j]);
    }
    for (int j = 0; j < 4; j++) s.parts[warp_id()][lane_id() + j * WARP] = acc[j];
    __syncthreads();
    const int c = threadIdx.x;
    if (c >= MERGE_COLS || tile * MERGE_COLS + c >= a.rank) return;
    float sum = 0;
    for (int g = 0; g < WARPS; g++) sum += s.parts[g][c];
    a.merged[unit * a.rank + tile * MERGE_COLS + c] = sum;
}

/* ---- out = W_UV ctx -------------------------------------------------------------------- */

constexpr int FINISH_OUTS = 4; /* of a warp */
constexpr int FINISH_TILE = FINISH_OUTS * WARPS;

/* A lane takes VEC neighbouring channels at a time. */
template <int ROWS, int VEC, class T, class W>
__global__ __launch_bounds__(THREADS) void mla_finish(__grid_constant__ const mla_arguments a)
{
    constexpr int LINE = 128 / sizeof(W);
    const long long tiles = mla_divide_up(a.V, FINISH_TILE);
    const long long tile = blockIdx.x % tiles, unit = blockIdx.x / tiles;
    const long long h = unit % a.H, n0 = unit / a.H * ROWS;
    const long long v = tile * FINISH_TILE + warp_id() * FINISH_OUTS;
    const int rows = static_cast<int>(a.N - n0 < ROWS ? a.N - n0 : ROWS);
    const int outs = static_cast<int>(a.V - v < FINISH_OUTS ? a.V - v : FINISH_OUTS);
    const W *w = static_cast<const W *>(a.w_kv_b) + (h * (a.nope + a.V) + a.nope + v) * a.rank;
    const float *merged = a.merged + (n0 * a.H + h) * a.rank;
    let_next_start();
    for (long long r = lane_id() * LINE; r < outs * a.rank; r += WARP * LINE)
        prefetch_line(w + r);
    wait_for_inputs();
    float acc[FINISH_OUTS][ROWS] = {};

#pragma unroll(ROWS == 1 ? 4 : 2)
    for (long long r = lane_id() * VEC; r < a.rank; r += WARP * VEC) {
        float weight[FINISH_OUTS][VEC] = {};
#pragma unroll
        for (int o = 0; o < FINISH_OUTS; o++)
            if (o < outs) load_floats<VEC>(w + o * a.rank + r, weight[o]);
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            float x[VEC] = {};
            if (n < rows) load_floats<VEC>(merged + n * a.H * a.rank + r, x);
#pragma unroll
            for (int o = 0; o < FINISH_OUTS; o++)
#pragma unroll
                for (int i = 0; i < VEC; i++) acc[o][n] = fmaf(weight[o][i], x[i], acc[o][n]);
        }
    }
#pragma unroll
    for (int o = 0; o < FINISH_OUTS; o++)
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            const float sum = warp_sum(acc[o][n]);
            if (lane_id() == 0 && o < outs && n < rows)
                static_cast<T *>(a.out)[((n0 + n) * a.H + h) * a.V + v + o] =
                    from_float<T>(sum);
        }
}

/* ---- launching ------------------------------------------------------------------------- */

/* A single row has kernels of its own, which have more of the weights on their way. */
int rows_of(const mla_arguments &a)
{
    return a.N == 1 ? 1 : MAX_ROWS;
}

struct blocks_of {
    long long absorb, merge, finish;

    explicit blocks_of(const mla_arguments &a)
        : absorb(mla_divide_up(a.N, rows_of(a)) * a.H * mla_divide_up(a.rank, ABSORB_COLS)),
          merge(a.N * a.H * mla_divide_up(a.rank, MERGE_COLS)),
          finish(mla_divide_up(a.N, rows_of(a)) * a.H * mla_divide_up(a.V, FINISH_TILE))
    {
    }
};

template <class T>
kl_status launch_absorb(const mla_arguments &a, kl_dtype w, unsigned blocks,
                        cudaStream_t stream, kl_error *err)
{
    return with_float_type(w, [&](auto t) {
        using W = decltype(t);
        return kl_cuda_launch(rows_of(a) == 1 ? mla_absorb<1, T, W>
                                              : mla_absorb<MAX_ROWS, T, W>,
                              blocks, THREADS, 0, stream, err, a);
    });
}

template <int VEC, class T, class W>
kl_status launch_finish_of(const mla_arguments &a, unsigned blocks, cudaStream_t stream,
                           kl_error *err)
{
    return kl_cuda_launch(rows_of(a) == 1 ? mla_finish<1, VEC, T, W>
                                          : mla_finish<MAX_ROWS, VEC, T, W>,
                          blocks, THREADS, 0, stream, err, a);
}

template <class T>
kl_status launch_finish(const mla_arguments &a, kl_dtype w, unsigned blocks,
                        cudaStream_t stream, kl_error *err)
{
    return with_float_type(w, [&](auto t) {
        using W = decltype(t);
        if (a.rank % 4 == 0 && is_aligned(a.w_kv_b, a.rank, sizeof(W), 4 * sizeof(W)))
            return launch_finish_of<4, T, W>(a, blocks, stream, err);
        return launch_finish_of<1, T, W>(a, blocks, stream, err);
    });
}

/* The arguments from row `first` on, whose partial results lie at the start of the workspace. */
mla_arguments wave_of(const mla_arguments &a, long long first, long long rows)
{
    mla_arguments w = a;
    w.N = a.N - first < rows ? a.N - first : rows;
    w.block_table += first * a.B;
    w.lengths += first;
    w.query += first * a.H * a.width();
    w.merged += first * a.H * a.rank;
    return w;
}

kl_status attend(const mla_arguments &a, kl_dtype act, cudaStream_t stream, kl_error *err)
{
    if (a.splits == 0 || !kl_cuda_mla_tensor_fits(a, act))
        return kl_cuda_mla_attend_any(a, act, stream, err);
    int multiprocessors = 0;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    return kl_cuda_mla_attend_tensor(a, multiprocessors, stream, err);
}

kl_status attend_in_waves(const mla_arguments &a, kl_dtype act, cudaStream_t stream,
                          kl_error *err)
{
    const long long rows = a.splits == 0 ? a.N : MAX_PARTIALS / a.splits;
    for (long long first = 0; first < a.N; first += rows) {
        const mla_arguments wave = wave_of(a, first, rows);
        KL_TRY(attend(wave, act, stream, err));
        KL_TRY(kl_cuda_launch(mla_merge, static_cast<unsigned>(blocks_of(wave).merge), THREADS,
                              0, stream, err, wave));
    }
    return KL_OK;
}

/* A bump allocator over the workspace; with base null it only measures. */
struct taker {
    char *base;
    size_t used;

    float *floats(long long count)
    {
        float *p = base == nullptr ? nullptr : reinterpret_cast<float *>(base + used);
        used += (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
        return p;
    }
};

/* Results of splits that a call needs room for: never fewer for more rows, whatever `fine`. */
long long partials_of(const mla_arguments &a)
{
    const long long coarse = a.N * mla_most_splits(a.B, 0), each_page = a.N * a.B;
    long long all = coarse > MLA_MAX_SPLITS ? coarse : MLA_MAX_SPLITS;
    all = all < each_page ? all : each_page;
    return all < MAX_PARTIALS ? all : MAX_PARTIALS;
}

void layout(taker *memory, mla_arguments *a)
{
    const long long partials = partials_of(*a);
    a->query = memory->floats(a->N * a->H * a->width());
    a->merged = memory->floats(a->N * a->H * a->rank);
    a->max = memory->floats(partials * a->H);
    a->sum = memory->floats(partials * a->H);
    a->context = memory->floats(partials * a->H * a->rank);
}

mla_arguments arguments_of(const kl_backend *be, const kl_mla *a)
{
    const bool invariant = reinterpret_cast<const kl_cuda_backend *>(be)->batch_invariant;
    const int64_t rank = a->w_kv_b.shape[2], V = a->out.shape[2], N = a->q.shape[0];
    const long long fine = invariant || N == 0 ? 0 : MLA_MAX_SPLITS / N;
    return {
        .q = a->q.data,
        .pages = a->pages.data,
        .w_kv_b = a->w_kv_b.data,
        .block_table = static_cast<const int *>(a->block_table.data),
        .lengths = static_cast<const int *>(a->lengths.data),
        .out = a->out.data,
        .N = N,
        .H = a->q.shape[1],
        .B = a->block_table.shape[1],
        .q_stride = a->q.stride[0],
        .nope = a->w_kv_b.shape[1] - V,
        .rope = a->pages.shape[2] - rank,
        .rank = rank,
        .V = V,
        .splits = mla_most_splits(a->block_table.shape[1], fine),
        .fine = fine,
        .scale = a->scale,
    };
}

} // namespace

size_t kl_cuda_mla_decode_workspace(kl_backend *be, const kl_mla_decode *a)
{
    mla_arguments args = arguments_of(be, a);
    taker memory = {};
    layout(&memory, &args);
    return memory.used;
}

kl_status kl_cuda_mla_decode(kl_backend *be, const kl_mla_decode *a, kl_error *err)
{
    const cudaStream_t stream = kl_cuda_stream(be);
    const kl_dtype act = a->q.dtype, weight = a->w_kv_b.dtype;
    mla_arguments args = arguments_of(be, a);
    taker memory = {.base = static_cast<char *>(a->ws.data), .used = 0};
    layout(&memory, &args);
    const blocks_of blocks(args);
    if (blocks.absorb > MAX_BLOCKS || blocks.merge > MAX_BLOCKS || blocks.finish > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_decode: N * H must be <= %lld / (rank / %d), got N %lld, H %lld",
                       MAX_BLOCKS, MERGE_COLS, args.N, args.H);
    if (args.N == 0) return KL_OK;
    KL_TRY(with_float_type(act, [&](auto t) {
        return launch_absorb<decltype(t)>(args, weight, static_cast<unsigned>(blocks.absorb),
                                          stream, err);
    }));
    KL_TRY(attend_in_waves(args, act, stream, err));
    return with_float_type(act, [&](auto t) {
        return launch_finish<decltype(t)>(args, weight, static_cast<unsigned>(blocks.finish),
                                          stream, err);
    });
}
