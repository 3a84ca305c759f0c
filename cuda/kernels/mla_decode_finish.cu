/*
 * mla_decode_finish.cu -- mla_decode's last step, for any shapes: its pieces merged, the product
 * after them.
 *
 * Computes     ctx = the sum of a row's pieces, each times 2^(its max - the largest) / whole sum;
 *              out = W_UV ctx
 * Shapes       context [slots, H, rank]; w_kv_b [H, nope+V, rank]; out [N, H, V]
 * Layout       dense
 * Precision    f32 or bf16 weights and outputs, f32 between and in sums, rounded once
 * Grid         a cluster of four blocks for a head, for one row or eight. A block merges a quarter
 *              of the channels, a warp every eighth piece, and hands them to all four; then it
 *              takes a quarter of the outputs, four a warp at a time. The first weights are on
 *              their way to registers before the pieces are there
 * Order        pieces in eight interleaved runs; channels in slices by lane, then the lanes
 * Roofline     half of w_kv_b once for all rows, 4.2 MB with the model's shapes: 1.4 us at 3.0
 *              TB/s; 66 KB a piece, out of the L2
 * Measured     H200, traced: 12 to 15 us, 61 for 32 rows of 8K tokens, 101 for 64 (2026-11-22,
 *              062dbec)
 */
#include "../device/launch.cuh"
#include "../device/mla.cuh"

#include <cooperative_groups.h>

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int CLUSTER = 4;
constexpr int MAX_ROWS = 8; /* that share one reading of the weights; a warp weighs one */
static_assert(MAX_ROWS <= WARPS);
constexpr int MOST_PIECES = MLA_MAX_SHARES > MLA_MAX_SPLITS ? MLA_MAX_SHARES : MLA_MAX_SPLITS;
constexpr int MERGE_COLS = 4 * WARP; /* of a block at a time: four a lane */
constexpr int OUTS = 4;              /* of a warp at a time */
template <int ROWS>
constexpr int BATCH = ROWS == 1 ? 4 : 2; /* slices of weights on their way */
constexpr long long MAX_SHARED = 200 * 1024;

template <int ROWS> struct shared_memory {
    long long first[ROWS]; /* slot of a row's first piece */
    int count[ROWS];
    float weights[ROWS][MOST_PIECES];
    alignas(16) float parts[WARPS][ROWS][MERGE_COLS];
    alignas(16) float merged[4]; /* [ROWS][rank] */
};

__device__ cooperative_groups::cluster_group cluster()
{
    return cooperative_groups::this_cluster();
}

/* Where a block of the cluster begins among `count` channels or outputs; groups of four. */
__device__ long long quarter(long long count, long long block)
{
    const long long begin = mla_divide_up(count, 4 * CLUSTER) * 4 * block;
    return begin < count ? begin : count;
}

/* ---- merging the pieces ---------------------------------------------------------------- */

/* Where a row's pieces are, and the factor of each: to the common maximum, and divided by the
 * whole sum. By one warp. */
template <int ROWS>
__device__ void weigh_pieces(const mla_arguments &a, long long n0, int row, long long h,
                             shared_memory<ROWS> &s)
{
    const mla_pieces pieces(a, n0 + row);
    float *weights = s.weights[row];
    if (lane_id() == 0)
        s.first[row] = pieces.first, s.count[row] = static_cast<int>(pieces.count);
    const float *max = a.max + pieces.first * a.H + h, *sum = a.sum + pieces.first * a.H + h;
    float top = -INFINITY, total = 0;
    for (int p = lane_id(); p < pieces.count; p += WARP) top = fmaxf(top, max[p * a.H]);
    top = warp_max(top);
    for (int p = lane_id(); p < pieces.count; p += WARP) {
        weights[p] = exp2f(max[p * a.H] - top);
        total = fmaf(weights[p], sum[p * a.H], total);
    }
    total = warp_sum(total);
    for (int p = lane_id(); p < pieces.count; p += WARP) weights[p] /= total;
}

/* Four neighbours of a lane, of which those from `rank` on are not there. */
template <int VEC>
__device__ void load_context(const float *from, long long col, long long rank, float (&to)[4])
{
    if constexpr (VEC == 4) {
        load_floats<4>(from + col, to);
    } else {
#pragma unroll
        for (int j = 0; j < 4; j++) to[j] = col + j < rank ? from[col + j] : 0.0f;
    }
}

/* Channels col .. col + 3 of this warp's pieces. */
template <int ROWS, int VEC>
__device__ void add_pieces(const mla_arguments &a, int most, long long h, long long col,
                           const shared_memory<ROWS> &s, float (&acc)[ROWS][4])
{
    if (col >= a.rank) return;
#pragma unroll(ROWS == 1 ? 16 : 1)
    for (int p = warp_id(); p < most; p += WARPS) {
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            float x[4] = {};
            const bool inside = p < s.count[n];
            if (inside)
                load_context<VEC>(a.context + ((s.first[n] + p) * a.H + h) * a.rank, col,
                                  a.rank, x);
            const float weight = inside ? s.weights[n][p] : 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) acc[n][j] = fmaf(weight, x[j], acc[n][j]);
        }
    }
}

/* The sums of the warps, to every block of the cluster. */
template <int ROWS>
__device__ void hand_out(const mla_arguments &a, long long first, long long end,
                         shared_memory<ROWS> &s)
{
    for (int i = threadIdx.x; i < ROWS * MERGE_COLS; i += THREADS) {
        const int n = i / MERGE_COLS, c = i % MERGE_COLS;
        if (first + c >= end) continue;
        float sum = 0;
        for (int g = 0; g < WARPS; g++) sum += s.parts[g][n][c];
        for (int b = 0; b < CLUSTER; b++)
            cluster().map_shared_rank(s.merged, b)[n * a.rank + first + c] = sum;
    }
}

template <int ROWS, int VEC>
__device__ void merge_rows(const mla_arguments &a, long long n0, int rows, long long h,
                           shared_memory<ROWS> &s)
{
    const long long block = cluster().block_rank();
    const long long begin = quarter(a.rank, block), end = quarter(a.rank, block + 1);
    const int row = warp_id();
    if (row < rows)
        weigh_pieces(a, n0, row, h, s);
    else if (row < ROWS)
        s.count[row] = 0;
    __syncthreads();
    int most = 0;
    for (int n = 0; n < rows; n++) most = max(most, s.count[n]);
    for (long long first = begin; first < end; first += MERGE_COLS) {
        float acc[ROWS][4] = {};
        add_pieces<ROWS, VEC>(a, most, h, first + lane_id() * 4, s, acc);
#pragma unroll
        for (int n = 0; n < ROWS; n++)
            store_floats<4>(&s.parts[warp_id()][n][lane_id() * 4], acc[n]);
        __syncthreads();
        hand_out(a, first, end, s);
        __syncthreads();
    }
}

/* ---- out = W_UV ctx -------------------------------------------------------------------- */

/* Slices of the weights of OUTS outputs, as they are stored. */
template <int SLICES, int VEC, class W> struct weight_batch {
    vec<W, VEC> x[SLICES][OUTS];

    __device__ void load(const W *w, long long r0, long long rank, int outs)
    {
#pragma unroll
        for (int i = 0; i < SLICES; i++)
#pragma unroll
            for (int o = 0; o < OUTS; o++) {
                const long long r = r0 + (i * WARP + lane_id()) * VEC;
                x[i][o] = {};
                if (o < outs && r < rank)
                    x[i][o] = *reinterpret_cast<const vec<W, VEC> *>(w + o * rank + r);
            }
    }
};

/* Outputs of a warp: `outs` of them from `v` on. */
struct warp_outs {
    long long v;
    int outs;

    __device__ warp_outs(const mla_arguments &a, long long turn)
    {
        const long long block = cluster().block_rank(), end = quarter(a.V, block + 1);
        v = quarter(a.V, block) + (turn * WARPS + warp_id()) * OUTS;
        outs = v >= end ? 0 : static_cast<int>(end - v < OUTS ? end - v : OUTS);
    }
};

template <int ROWS, int VEC, class W>
__device__ void multiply(const mla_arguments &a, const weight_batch<BATCH<ROWS>, VEC, W> &w,
                         long long r0, const shared_memory<ROWS> &s, float (&acc)[OUTS][ROWS])
{
#pragma unroll
    for (int i = 0; i < BATCH<ROWS>; i++) {
        const long long r = r0 + (i * WARP + lane_id()) * VEC;
        if (r >= a.rank) return;
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
            float x[VEC];
            load_floats<VEC>(s.merged + n * a.rank + r, x);
#pragma unroll
            for (int o = 0; o < OUTS; o++)
#pragma unroll
                for (int j = 0; j < VEC; j++)
                    acc[o][n] = fmaf(to_float(w.x[i][o].x[j]), x[j], acc[o][n]);
        }
    }
}

/* A lane takes VEC neighbouring channels at a time. Two blocks fit a multiprocessor: one each, and
 * an H100 would hold no more than 30 clusters of four. */
template <int ROWS, int VEC, class T, class W>
__global__ __cluster_dims__(CLUSTER, 1, 1)
    __launch_bounds__(THREADS, 2) void mla_finish(__grid_constant__ const mla_arguments a)
{
    extern __shared__ __align__(16) char memory[];
    shared_memory<ROWS> &s = *reinterpret_cast<shared_memory<ROWS> *>(memory);
    const long long unit = blockIdx.x / CLUSTER, h = unit % a.H, n0 = unit / a.H * ROWS;
    const int rows = static_cast<int>(a.N - n0 < ROWS ? a.N - n0 : ROWS);
    const W *w = static_cast<const W *>(a.w_kv_b) + (h * (a.nope + a.V) + a.nope) * a.rank;
    constexpr int STEP = BATCH<ROWS> * WARP * VEC;
    weight_batch<BATCH<ROWS>, VEC, W> batch;
    let_next_start();
    if (a.unsettled) wait_for_inputs();
    warp_outs mine(a, 0);
    batch.load(w + mine.v * a.rank, 0, a.rank, mine.outs);
    cluster().sync(); /* all four blocks are there to be handed channels */
    wait_for_inputs();
    merge_rows<ROWS, VEC>(a, n0, rows, h, s);
    cluster().sync();

    for (int turn = 0;; turn++) {
        mine = warp_outs(a, turn);
        if (mine.outs == 0) break;
        float acc[OUTS][ROWS] = {};
        for (long long r = 0; r < a.rank; r += STEP) {
            if (turn > 0 || r > 0) batch.load(w + mine.v * a.rank, r, a.rank, mine.outs);
            multiply<ROWS>(a, batch, r, s, acc);
        }
#pragma unroll
        for (int o = 0; o < OUTS; o++)
#pragma unroll
            for (int n = 0; n < ROWS; n++) {
                const float sum = warp_sum(acc[o][n]);
                if (lane_id() == 0 && o < mine.outs && n < rows)
                    static_cast<T *>(a.out)[((n0 + n) * a.H + h) * a.V + mine.v + o] =
                        from_float<T>(sum);
            }
    }
}

/* ---- launching ------------------------------------------------------------------------- */

template <int ROWS> long long shared_bytes(const mla_arguments &a)
{
    return static_cast<long long>(sizeof(shared_memory<ROWS>)) +
           ROWS * a.rank * static_cast<long long>(sizeof(float));
}

template <int ROWS, int VEC, class T, class W>
kl_status launch(const mla_arguments &a, cudaStream_t stream, kl_error *err)
{
    const long long blocks = mla_divide_up(a.N, ROWS) * a.H * CLUSTER;
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_decode: N * H must be <= %lld, got N %lld, H %lld",
                       MAX_BLOCKS / CLUSTER, a.N, a.H);
    const auto kernel = mla_finish<ROWS, VEC, T, W>;
    KL_TRY(kl_cuda_allow_shared(kernel, MAX_SHARED, err));
    return kl_cuda_launch(kernel, static_cast<unsigned>(blocks), THREADS,
                          static_cast<size_t>(shared_bytes<ROWS>(a)), stream, err, a);
}

/* A single row has a kernel of its own, which has more of the pieces on their way; and ranks whose
 * eight rows do not fit the shared memory take it too. A row's bits are the same in both. */
template <int VEC, class T, class W>
kl_status launch_rows(const mla_arguments &a, cudaStream_t stream, kl_error *err)
{
    if (shared_bytes<1>(a) > MAX_SHARED)
        return kl_fail(err, KL_ERR_VALUE, "mla_decode: rank must be <= %lld, got %lld",
                       (MAX_SHARED - shared_bytes<1>(mla_arguments{})) / 4, a.rank);
    if (a.N == 1 || shared_bytes<MAX_ROWS>(a) > MAX_SHARED)
        return launch<1, VEC, T, W>(a, stream, err);
    return launch<MAX_ROWS, VEC, T, W>(a, stream, err);
}

} // namespace

kl_status kl_cuda_mla_finish(const mla_arguments &a, kl_dtype weight, cudaStream_t stream,
                             kl_error *err)
{
    return with_float_type(a.act, [&](auto t) {
        return with_float_type(weight, [&](auto u) {
            using T = decltype(t);
            using W = decltype(u);
            if (a.rank % 4 == 0 && is_aligned(a.w_kv_b, a.rank, sizeof(W), 4 * sizeof(W)))
                return launch_rows<4, T, W>(a, stream, err);
            return launch_rows<1, T, W>(a, stream, err);
        });
    });
}
