/*
 * mla_decode.cu -- latent attention for single tokens over paged latents, in the absorbed form.
 *
 * Computes     q' = [W_UK^T q_nope | q_pe];  ctx = softmax(scale q' [c | k_pe]^T) c;
 *              out = W_UV ctx: the product before the attention, for any shapes; the attention is
 *              in mla_decode_tensor.cu, mla_decode_fp8.cu and mla_decode_any.cu, piece by piece,
 *              the rest in mla_decode_finish.cu. The model's shapes in bf16 have
 *              mla_decode_absorb_tensor.cu and mla_decode_finish_tensor.cu for the two ends; a
 *              single token whose inputs are arriving (device/arriving.cuh) has, at contexts of up to
 *              MLA_PAGES pages, mla_decode_page.cu and mla_decode_finish_page.cu
 * Shapes       q [N, H, nope+rope]; pages [P, 64, rank+rope]; w_kv_b [H, nope+V, rank];
 *              out [N, H, V]
 * Layout       q's rows strided, the others dense
 * Precision    f32 or bf16 in and out, f32 between the kernels, rounded once
 * Grid         64 channels of a head, for 8 rows; before these blocks those that write the new
 *              tokens' latents, a warp each
 * Order        sums over channels in slices by warp; the cut into pieces follows from all lengths,
 *              on a batch-invariant backend from the row's own
 * Roofline     half of w_kv_b once for all rows: 4.2 MB with the model's shapes, 1.4 us at 3.0 TB/s
 * Measured     H200, the whole operation, caches cold, in a graph: one row of 1K tokens 16.0 us, 8K
 *              21.9, 128K 63.3 (55 % of roofline), 1M 323 (87 %); 32 rows of 8K 115, 64 rows 202,
 *              64 of 1K 75 (2026-11-22)
 */
#include "../device/latents.cuh"
#include "../device/launch.cuh"
#include "../device/mla.cuh"
#include "../device/warp.cuh"
#include "../product.h"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int MAX_ROWS = 8; /* of the batch that share one reading of the weights */

/* Results of pieces that the workspace holds at once: 134 MB with the model's shapes. The rows
 * of larger batches are attended in waves, each of them far more than a GPU can do at once. */
constexpr long long MAX_SLOTS = 2048;
static_assert(MAX_SLOTS >= MLA_MAX_SPLITS && MAX_SLOTS > MLA_MAX_SHARES);

/* ---- q' -------------------------------------------------------------------------------- */

constexpr int ABSORB_COLS = 2 * WARP; /* of a block: two neighbours a lane */
constexpr int ABSORB_STEP = 128;      /* channels of q_nope in shared memory at a time */
constexpr int ABSORB_EACH = ABSORB_STEP / WARPS; /* of a warp: every eighth */

template <int ROWS> struct absorb_memory {
    float q[ROWS][ABSORB_STEP];
    float parts[WARPS][ROWS][ABSORB_COLS];
};

/* A step's weights of a lane, as they are stored; zeros outside. */
template <class W> struct absorb_weights {
    vec<W, 2> x[ABSORB_EACH];

    /* From the lane's first column on, of which `cols` are there. */
    __device__ void load(const W *w, long long rank, long long channels, int cols, bool pairs)
    {
#pragma unroll
        for (int k = 0; k < ABSORB_EACH; k++) {
            const int i = warp_id() + k * WARPS;
            const W *from = w + i * rank;
            x[k] = {};
            if (i >= channels) continue;
            if (pairs && cols == 2) {
                x[k] = *reinterpret_cast<const vec<W, 2> *>(from);
            } else {
                if (cols > 0) x[k].x[0] = from[0];
                if (cols > 1) x[k].x[1] = from[1];
            }
        }
    }
};

template <int ROWS, class W>
__device__ void absorb_step(const absorb_weights<W> &w, const absorb_memory<ROWS> &s,
                            float (&acc)[ROWS][2])
{
#pragma unroll
    for (int k = 0; k < ABSORB_EACH; k++)
#pragma unroll
        for (int n = 0; n < ROWS; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                acc[n][j] =
                    fmaf(s.q[n][warp_id() + k * WARPS], to_float(w.x[k].x[j]), acc[n][j]);
}

__device__ void store_query(const mla_arguments &a, long long n, long long h, long long channel,
                            float x)
{
    if (!a.tensor) {
        a.query[(n * a.H + h) * a.width() + channel] = x;
        return;
    }
    bf16 *to = reinterpret_cast<bf16 *>(a.query) + mla_query_place(a, n, h, channel);
    to[0] = from_float<bf16>(x);
    to[2] = from_float<bf16>(x - to_float(from_float<bf16>(x)));
}

/* The channels that are not absorbed; by the blocks of the first columns. */
template <class T>
__device__ void copy_rope(const mla_arguments &a, long long h, long long n0, int rows)
{
    const float factor = a.scale * LOG2_E;
    for (int n = 0; n < rows; n++) {
        const T *q = static_cast<const T *>(a.q) + (n0 + n) * a.q_stride +
                     h * (a.nope + a.rope) + a.nope;
        for (long long i = threadIdx.x; i < a.rope; i += THREADS)
            store_query(a, n0 + n, h, a.rank + i, to_float(q[i]) * factor);
    }
}

/* The last token of each sequence. */
template <class T>
__device__ void append_rows(const mla_arguments &a, const new_latents &latents)
{
    const long long n = static_cast<long long>(blockIdx.x) * WARPS + warp_id();
    if (n < a.N) write_latents<T>(latents, n, n, a.lengths[n] - 1);
}

template <int ROWS, class T, class W>
__device__ void absorb_rows(const mla_arguments &a, long long block)
{
    __shared__ absorb_memory<ROWS> s;
    const long long tiles = mla_divide_up(a.rank, ABSORB_COLS);
    const long long tile = block % tiles, unit = block / tiles;
    const long long h = unit % a.H, n0 = unit / a.H * ROWS;
    const int rows = static_cast<int>(a.N - n0 < ROWS ? a.N - n0 : ROWS);
    const long long col = tile * ABSORB_COLS + 2 * lane_id(), left = a.rank - col;
    const int cols = left < 0 ? 0 : static_cast<int>(left < 2 ? left : 2);
    const W *w = static_cast<const W *>(a.w_kv_b) + h * (a.nope + a.V) * a.rank + col;
    const T *q = static_cast<const T *>(a.q) + n0 * a.q_stride + h * (a.nope + a.rope);
    const bool pairs =
        a.rank % 2 == 0 && reinterpret_cast<uintptr_t>(a.w_kv_b) % (2 * sizeof(W)) == 0;
    float acc[ROWS][2] = {};
    absorb_weights<W> weights; /* the first of them before q is there */
    if (a.unsettled) wait_for_inputs();
    weights.load(w, a.rank, a.nope, cols, pairs);
    wait_for_inputs();
    let_next_start();

    for (long long i0 = 0; i0 < a.nope; i0 += ABSORB_STEP) {
        if (i0 > 0) weights.load(w + i0 * a.rank, a.rank, a.nope - i0, cols, pairs);
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * ABSORB_STEP; i += THREADS) {
            const int n = i / ABSORB_STEP, c = i % ABSORB_STEP;
            const bool inside = n < rows && i0 + c < a.nope;
            s.q[n][c] = inside ? to_float(q[n * a.q_stride + i0 + c]) : 0.0f;
        }
        __syncthreads();
        absorb_step(weights, s, acc);
    }
    for (int n = 0; n < ROWS; n++)
        for (int j = 0; j < 2; j++) s.parts[warp_id()][n][2 * lane_id() + j] = acc[n][j];
    __syncthreads();
    for (int i = threadIdx.x; i < rows * ABSORB_COLS; i += THREADS) {
        const int n = i / ABSORB_COLS, c = i % ABSORB_COLS;
        float sum = 0;
        for (int g = 0; g < WARPS; g++) sum += s.parts[g][n][c];
        if (tile * ABSORB_COLS + c < a.rank)
            store_query(a, n0 + n, h, tile * ABSORB_COLS + c, sum * (a.scale * LOG2_E));
    }
    if (tile == 0) copy_rope<T>(a, h, n0, rows);
}

/* append_blocks: 0 where nothing is appended. The attention begins with memory that kernels before
 * this one may write: it is not to start before they have ended. */
template <int ROWS, class T, class W>
__global__ __launch_bounds__(THREADS, ROWS == 1 ? 4 : 2) void mla_absorb(
    __grid_constant__ const mla_arguments a, __grid_constant__ const new_latents latents,
    unsigned append_blocks)
{
    if (blockIdx.x >= append_blocks) {
        absorb_rows<ROWS, T, W>(a, blockIdx.x - append_blocks);
    } else {
        wait_for_inputs();
        let_next_start();
        append_rows<T>(a, latents);
    }
}

/* ---- launching ------------------------------------------------------------------------- */

/* A single row has kernels of its own, which have more of the weights on their way. */
int rows_of(const mla_arguments &a)
{
    return a.N == 1 ? 1 : MAX_ROWS;
}

long long absorb_blocks(const mla_arguments &a)
{
    return mla_divide_up(a.N, rows_of(a)) * a.H * mla_divide_up(a.rank, ABSORB_COLS);
}

long long append_blocks(const kl_mla *a)
{
    return kl_tensor_absent(&a->raw) ? 0 : mla_divide_up(a->raw.shape[0], WARPS);
}

template <class T>
kl_status launch_absorb(const mla_arguments &a, const kl_mla *call, cudaStream_t stream,
                        kl_error *err)
{
    const kl_mla_append append = kl_mla_append_of(call);
    const unsigned first = static_cast<unsigned>(append_blocks(call));
    const unsigned blocks = first + static_cast<unsigned>(absorb_blocks(a));
    const new_latents latents = first > 0 ? new_latents_of(&append) : new_latents{};
    return with_float_type(call->w_kv_b.dtype, [&](auto t) {
        using W = decltype(t);
        return kl_cuda_launch(rows_of(a) == 1 ? mla_absorb<1, T, W>
                                              : mla_absorb<MAX_ROWS, T, W>,
                              blocks, THREADS, 0, stream, err, a, latents, first);
    });
}

kl_status absorb(const mla_arguments &a, const kl_mla *call, cudaStream_t stream, kl_error *err)
{
    if (kl_cuda_mla_absorb_tensor_fits(a, call->w_kv_b.dtype))
        return kl_cuda_mla_absorb_tensor(a, call, stream, err);
    return with_float_type(
        a.act, [&](auto t) { return launch_absorb<decltype(t)>(a, call, stream, err); });
}

/* Of q' as mla_arguments has it, in floats. */
long long query_row(const mla_arguments &a)
{
    return (a.tensor ? mla_padded_heads(a.H) : a.H) * a.width();
}

/* The arguments from row `first` on, whose pieces' results lie at the start of the workspace. */
mla_arguments wave_of(const mla_arguments &a, long long first, long long rows)
{
    mla_arguments w = a;
    w.N = a.N - first < rows ? a.N - first : rows;
    w.block_table += first * a.B;
    w.lengths += first;
    w.query += first * query_row(a);
    w.out = static_cast<char *>(a.out) +
            first * a.H * a.V * static_cast<long long>(kl_dtype_bytes(a.act));
    return w;
}

kl_status attend_in_waves(const mla_arguments &a, kl_dtype weight, int blocks,
                          cudaStream_t stream, kl_error *err)
{
    const long long rows = a.splits == 0   ? a.N
                           : a.shares == 0 ? MAX_SLOTS / a.splits
                                           : MAX_SLOTS - a.shares;
    for (long long first = 0; first < a.N; first += rows) {
        const mla_arguments wave = wave_of(a, first, rows);
        const auto attend = !a.tensor  ? kl_cuda_mla_attend_any
                            : a.packed ? kl_cuda_mla_attend_fp8
                                       : kl_cuda_mla_attend_tensor;
        KL_TRY(attend(wave, blocks, stream, err));
        KL_TRY(kl_cuda_mla_finish_tensor_fits(wave, weight)
                   ? kl_cuda_mla_finish_tensor(wave, stream, err)
                   : kl_cuda_mla_finish(wave, weight, stream, err));
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

/* Results of pieces that a call needs room for, however it cuts: never fewer for more rows. */
long long slots_of(const mla_arguments &a)
{
    const long long by_length = a.N * mla_most_splits(a.B), shared_out = a.N + MLA_MAX_SHARES;
    const long long all = by_length > shared_out ? by_length : shared_out;
    return all < MAX_SLOTS ? all : MAX_SLOTS;
}

void layout(taker *memory, mla_arguments *a)
{
    const long long slots = slots_of(*a);
    a->query = memory->floats(a->N * mla_padded_heads(a->H) * a->width());
    a->max = memory->floats(slots * a->H);
    a->sum = memory->floats(slots * a->H);
    a->context = memory->floats(slots * a->H * a->rank);
}

mla_arguments arguments_of(const kl_mla *a)
{
    const int64_t rank = a->w_kv_b.shape[2], V = a->out.shape[2];
    const int64_t nope = a->w_kv_b.shape[1] - V, rope = a->q.shape[2] - nope;
    return {
        .q = a->q.data,
        .pages = a->pages.data,
        .w_kv_b = a->w_kv_b.data,
        .block_table = static_cast<const int *>(a->block_table.data),
        .lengths = static_cast<const int *>(a->lengths.data),
        .out = a->out.data,
        .N = a->q.shape[0],
        .H = a->q.shape[1],
        .B = a->block_table.shape[1],
        .P = a->pages.shape[0],
        .q_stride = a->q.stride[0],
        .nope = nope,
        .rope = rope,
        .rank = rank,
        .V = V,
        .splits = mla_most_splits(a->block_table.shape[1]),
        .unsettled = a->unsettled,
        .packed = kl_latents_are_packed(&a->pages),
        .row = kl_latents_row_of(rank, rope),
        .act = a->q.dtype,
        .scale = a->scale,
    };
}

/* The way a call takes: which kernel attends, and how it cuts. `blocks`: for a group of heads.
 * 8-bit pages' scores on tensor cores want the query as one kernel alone makes it. */
kl_status choose(const kl_backend *be, kl_dtype weight, mla_arguments *a, int *blocks,
                 kl_error *err)
{
    const bool invariant = reinterpret_cast<const kl_cuda_backend *>(be)->batch_invariant;
    int multiprocessors = 0;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    a->tensor = kl_cuda_has_sm_90a(be) && a->splits > 0 && kl_cuda_mla_tensor_fits(*a);
    if (a->packed) a->tensor = a->tensor && kl_cuda_mla_absorb_tensor_fits(*a, weight);
    a->asks = kl_cuda_mla_finish_tensor_fits(*a, weight);
    const long long groups = mla_divide_up(a->H, MLA_TENSOR_HEADS);
    *blocks = static_cast<int>(mla_divide_up(multiprocessors, groups));
    if (a->tensor && !invariant)
        a->shares = *blocks < MLA_MAX_SHARES ? *blocks : MLA_MAX_SHARES;
    return KL_OK;
}

} // namespace

/* A single token's q and raw may be arriving wherever each of the three kernels has one for that. */
static bool hears(const mla_arguments &a, const kl_mla *call)
{
    return a.N == 1 && !a.packed && a.shares > 0 && a.asks &&
           kl_cuda_mla_absorb_tensor_fits(a, call->w_kv_b.dtype) &&
           kl_cuda_mla_attend_page_fits(a, call);
}

static int64_t bytes_of_query(const mla_arguments &a)
{
    return query_row(a) * static_cast<int64_t>(sizeof(float));
}

/* The product after it reads its words wherever the last kernel is that on tensor cores: this lets
 * it start once the first one has had all of its inputs. */
kl_status kl_cuda_mla_arrivals(kl_backend *be, const kl_linear_pair *in, const kl_mla_decode *a,
                               const kl_linear *last, kl_mla_arrivals *out, kl_error *err)
{
    const kl_dtype weight = a->w_kv_b.dtype;
    mla_arguments args = arguments_of(a);
    int blocks = 0;
    *out = {};
    KL_TRY(choose(be, weight, &args, &blocks, err));
    if (args.N != 1 || !args.asks) return KL_OK;
    if (hears(args, a) && kl_cuda_linear_pair_tells(be, in))
        out->blanks = static_cast<size_t>(bytes_of_query(args));
    return kl_cuda_linear_hears(be, last, &out->out, err);
}

/* Longer contexts wait for the end of what they follow. */
static kl_status attend_arriving(mla_arguments a, const kl_mla *call, cudaStream_t stream,
                                 kl_error *err)
{
    a.query = static_cast<float *>(call->blanks.data);
    KL_TRY(kl_cuda_mla_absorb_arriving(a, stream, err));
    KL_TRY(kl_cuda_mla_attend_page(a, call, stream, err));
    return kl_cuda_mla_finish_page(a, stream, err);
}

size_t kl_cuda_mla_decode_workspace(kl_backend *, const kl_mla_decode *a)
{
    mla_arguments args = arguments_of(a);
    taker memory = {};
    layout(&memory, &args);
    return memory.used;
}

kl_status kl_cuda_mla_decode(kl_backend *be, const kl_mla_decode *a, kl_error *err)
{
    const cudaStream_t stream = kl_cuda_stream(be);
    const kl_dtype weight = a->w_kv_b.dtype;
    mla_arguments args = arguments_of(a);
    taker memory = {.base = static_cast<char *>(a->ws.data), .used = 0};
    int blocks = 0;
    layout(&memory, &args);
    if (args.N == 0) return KL_OK;
    if (absorb_blocks(args) + append_blocks(a) > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_decode: N * H must be <= %lld / (rank / %d), got N %lld, H %lld",
                       MAX_BLOCKS, ABSORB_COLS, args.N, args.H);
    KL_TRY(choose(be, weight, &args, &blocks, err));
    if (!kl_tensor_absent(&a->blanks)) {
        if (!hears(args, a) || a->blanks.shape[0] != bytes_of_query(args))
            return kl_fail(
                err, KL_ERR_VALUE,
                "mla_decode: blanks must be absent unless mla_arrivals() asks for them");
        args.arriving = args.B <= MLA_PAGES && args.B <= args.shares;
    }
    if (args.arriving) return attend_arriving(args, a, stream, err);
    KL_TRY(absorb(args, a, stream, err));
    return attend_in_waves(args, weight, blocks, stream, err);
}
