/*
 * token_logprobs.cu -- log-probabilities of given next tokens, without a [T, rows] matrix.
 *
 * Computes     z = hidden lm_head^T;  z[target] - logsumexp(z);  whether the target is the
 *              argmax;  the n largest, all as in backend/ops.h
 * Shapes       hidden [T, D], lm_head [rows, D], targets, logprobs and greedy [T],
 *              alternatives [T, n]
 * Layout       dense
 * Precision    bf16 hidden with a bf16 or quantised head: bf16 operands, f32 sums (a quantised
 *              head is rounded to bf16 once dequantised); else f32 throughout. Exponentials in
 *              f32, their sums over PIECE ids in f32, over the pieces in f64
 * Grid         a block for a tile of tokens and PIECE ids, the tiles of tokens next to each
 *              other so that they share the head's rows in the L2; it keeps maximum, sum,
 *              argmax and the target's logit of its piece. A block a token then takes in the
 *              pieces. With n > 0 the logits of up to TOP_TOKENS tokens at a time are kept as
 *              well, for the selection of device/select.cuh. Long inputs are cut into chunks of
 *              tokens
 * Order        an output is one chain over the columns, a piece one butterfly, the pieces are
 *              added in one order: bits depend on nothing but the token and the head
 * Roofline     2 T D rows flops, 2 D rows bytes of a bf16 head (755 MB, 252 us on an H100 at
 *              3.0 TB/s, for up to 100 tokens or so; then the tensor cores bound it)
 * Measured     not timed alone; right on an H100 (every format, 1 to 1,500 tokens, 2026-11-22)
 */
#include "../device/gemm.cuh"
#include "../device/select.cuh"

namespace {

constexpr int PIECE = 128;        /* ids */
constexpr int PITCH = PIECE + 4;  /* of a tile of logits in shared memory */
constexpr int CHUNK = 1024;       /* tokens: 21 MB of pieces at 163,840 rows */
constexpr int TOP_TOKENS = 64;    /* tokens: 42 MB of logits at 163,840 rows */
constexpr int SLAB = 32;          /* columns in shared memory on the path without mma */
constexpr int JOIN_THREADS = 256; /* of the block that takes in a token's pieces */

/* What a token keeps of PIECE ids. */
struct piece {
    float most, sum; /* sum of exp(z - most) */
    float target;    /* the target's logit, if it is one of these */
    int best;        /* the lowest id whose logit is `most`; NOBODY if all are NaN */
};
constexpr int NOBODY = 0x7fffffff;

/* A chunk of the call. */
struct arguments {
    const void *hidden;
    weight_view head;
    const int *targets;
    float *logprobs;
    uint8_t *greedy;
    int *top_ids;        /* or null */
    float *top_logprobs; /* or null */
    piece *pieces;       /* [n, n_pieces] */
    double *log_sums;    /* [n] */
    float *logits;       /* [n, n_pieces * PIECE], or null */
    int64_t n_pieces;
    int n, D, top;
};

/* ---- a tile of logits to pieces --------------------------------------------------------- */

/* Called by a warp; a lane holds four neighbouring logits, of which `inside` are the head's. */
__device__ piece reduce_piece(const float (&z)[4], int inside, int first_id)
{
    piece p = {-INFINITY, 0, 0, NOBODY};
    for (int i = 0; i < 4; i++)
        if (i < inside) p.most = fmaxf(p.most, z[i]);
    p.most = warp_max(p.most);
    const float shift = p.most == -INFINITY ? 0.0f : p.most;
    for (int i = 3; i >= 0; i--)
        if (i < inside && z[i] == p.most) p.best = first_id + i;
    for (int i = 0; i < 4; i++)
        if (i < inside) p.sum += expf(z[i] - shift);
    p.sum = warp_sum(p.sum);
    for (int d = WARP / 2; d > 0; d /= 2)
        p.best = min(p.best, __shfl_xor_sync(ALL_LANES, p.best, d));
    return p;
}

/* tile [rows, PITCH] holds the logits of tokens first .. and of the ids of piece v. */
template <int WARPS>
__device__ void reduce_tile(const arguments &a, const float *tile, int rows, int first,
                            int64_t v)
{
    const int64_t begin = v * PIECE, left = a.head.rows - begin;
    const int column = 4 * lane_id();
    const int inside = static_cast<int>(left < column + 4 ? left - column : 4);
    for (int r = warp_id(); r < rows && first + r < a.n; r += WARPS) {
        const int64_t t = first + r;
        float z[4];
        load_floats<4>(tile + r * PITCH + column, z);
        piece p = reduce_piece(z, inside, static_cast<int>(begin) + column);
        const int64_t target = a.targets[t] - begin;
        if (target >= 0 && target < PIECE) p.target = tile[r * PITCH + target];
        if (lane_id() == 0) a.pieces[t * a.n_pieces + v] = p;
        if (a.logits != nullptr)
            store_floats<4>(a.logits + (t * a.n_pieces + v) * PIECE + column, z);
    }
}

/* ---- logits on the tensor cores --------------------------------------------------------- */

template <class S> constexpr int tile_bytes()
{
    constexpr int logits = S::M * PITCH * static_cast<int>(sizeof(float));
    return logits > S::SHARED_BYTES ? logits : S::SHARED_BYTES;
}

template <class S, kl_weight_format format>
__global__ __launch_bounds__(S::THREADS) void pieces_kernel(__grid_constant__ const arguments a)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const int tiles = (a.n + S::M - 1) / S::M;
    const int first = static_cast<int>(blockIdx.x % tiles) * S::M;
    const int64_t v = blockIdx.x / tiles;
    const bf16 *hidden = static_cast<const bf16 *>(a.hidden);

    float acc[S::MI][S::NI][4];
    gemm_tile<S, format>(
        acc, reinterpret_cast<bf16 *>(shared),
        [&](int i) {
            return first + i < a.n ? hidden + static_cast<int64_t>(first + i) * a.D : nullptr;
        },
        [&](int i) {
            const int64_t id = v * PIECE + i;
            return id < a.head.rows ? row_of(a.head, id) : weight_row{nullptr, nullptr};
        },
        a.D);
    __syncthreads();
    float *tile = reinterpret_cast<float *>(shared);
    gemm_for_pairs<S>(acc, [&](int row, int column, float even, float odd) {
        *reinterpret_cast<float2 *>(tile + row * PITCH + column) = make_float2(even, odd);
    });
    __syncthreads();
    reduce_tile<S::THREADS / WARP>(a, tile, S::M, first, v);
}

/* ---- logits of any shape and type, in f32 ----------------------------------------------- */

constexpr int PLAIN_THREADS = 256, PLAIN_WARPS = PLAIN_THREADS / WARP;
constexpr int PLAIN_COLUMNS = PIECE / WARP; /* ids of a lane, WARP apart */

/* SLAB columns of the tile's tokens and ids; ids lie transposed: a lane reads its own. */
template <int M> struct slab {
    float x[M][SLAB], w[SLAB][PIECE + 1];
};

template <int M> constexpr int plain_bytes()
{
    constexpr int logits = M * PITCH * static_cast<int>(sizeof(float));
    constexpr int inputs = static_cast<int>(sizeof(slab<M>));
    return logits > inputs ? logits : inputs;
}

template <class T, kl_weight_format format, int M>
__device__ void fill_slab(const arguments &a, slab<M> &s, int first, int64_t v, int k)
{
    const int column = k + lane_id();
    const bool has_column = column < a.D;
    const T *hidden = static_cast<const T *>(a.hidden);
    for (int r = warp_id(); r < M; r += PLAIN_WARPS)
        s.x[r][lane_id()] =
            has_column && first + r < a.n
                ? to_float(hidden[static_cast<int64_t>(first + r) * a.D + column])
                : 0.0f;
    for (int r = warp_id(); r < PIECE; r += PLAIN_WARPS) {
        const int64_t id = v * PIECE + r;
        s.w[lane_id()][r] = has_column && id < a.head.rows
                                ? weight_codec<format>::at(row_of(a.head, id), column)
                                : 0.0f;
    }
}

/* A warp has R tokens, a lane PLAIN_COLUMNS ids of each. */
template <class T, kl_weight_format format, int R>
__global__
__launch_bounds__(PLAIN_THREADS) void plain_pieces_kernel(__grid_constant__ const arguments a)
{
    constexpr int M = PLAIN_WARPS * R;
    extern __shared__ __align__(128) unsigned char shared[];
    slab<M> &s = *reinterpret_cast<slab<M> *>(shared);
    const int tiles = (a.n + M - 1) / M, lane = lane_id(), row = warp_id() * R;
    const int first = static_cast<int>(blockIdx.x % tiles) * M;
    const int64_t v = blockIdx.x / tiles;

    float acc[R][PLAIN_COLUMNS] = {};
    for (int k = 0; k < a.D; k += SLAB) {
        fill_slab<T, format>(a, s, first, v, k);
        __syncthreads();
        for (int i = 0; i < SLAB; i++)
#pragma unroll
            for (int c = 0; c < PLAIN_COLUMNS; c++) {
                const float w = s.w[i][c * WARP + lane];
#pragma unroll
                for (int r = 0; r < R; r++) acc[r][c] = fmaf(s.x[row + r][i], w, acc[r][c]);
            }
        __syncthreads();
    }
    float *tile = reinterpret_cast<float *>(shared);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int c = 0; c < PLAIN_COLUMNS; c++)
            tile[(row + r) * PITCH + c * WARP + lane] = acc[r][c];
    __syncthreads();
    reduce_tile<PLAIN_WARPS>(a, tile, M, first, v);
}

/* ---- pieces to results ------------------------------------------------------------------ */

__device__ double block_sum_f64(double x, double *shared)
{
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL_LANES, x, d);
    if (lane_id() == 0) shared[warp_id()] = x;
    __syncthreads();
    double sum = 0;
    for (int w = 0; w < JOIN_THREADS / WARP; w++) sum += shared[w];
    return sum;
}

/* The lowest id whose logit is the largest. */
__device__ int block_best(const piece *pieces, int64_t n, float most, int *shared)
{
    int best = NOBODY;
    for (int64_t i = threadIdx.x; i < n; i += JOIN_THREADS)
        if (pieces[i].most == most) best = min(best, pieces[i].best);
    best = __reduce_min_sync(ALL_LANES, best);
    if (lane_id() == 0) shared[warp_id()] = best;
    __syncthreads();
    for (int w = 0; w < JOIN_THREADS / WARP; w++) best = min(best, shared[w]);
    return best;
}

__global__ __launch_bounds__(JOIN_THREADS) void join_kernel(__grid_constant__ const arguments a)
{
    __shared__ float maxima[JOIN_THREADS / WARP];
    __shared__ double sums[JOIN_THREADS / WARP];
    __shared__ int ids[JOIN_THREADS / WARP];
    const int64_t t = blockIdx.x;
    const piece *pieces = a.pieces + t * a.n_pieces;

    float most = -INFINITY;
    for (int64_t i = threadIdx.x; i < a.n_pieces; i += JOIN_THREADS)
        most = fmaxf(most, pieces[i].most);
    most = block_max<JOIN_THREADS>(most, maxima);
    /* Without a finite logit the sum is 0, unless there is a NaN: then it is NaN. */
    const double shift = most == -INFINITY ? 0.0 : static_cast<double>(most);
    double sum = 0;
    for (int64_t i = threadIdx.x; i < a.n_pieces; i += JOIN_THREADS) {
        const float of = pieces[i].most == -INFINITY ? 0.0f : pieces[i].most;
        sum += pieces[i].sum * exp(static_cast<double>(of) - shift);
    }
    sum = block_sum_f64(sum, sums);
    const int best = block_best(pieces, a.n_pieces, most, ids);
    if (threadIdx.x != 0) return;
    const int target = a.targets[t];
    const double logit = target < 0 ? NAN : pieces[target / PIECE].target;
    const double log_sum = static_cast<double>(most) + log(sum);
    a.log_sums[t] = log_sum;
    a.logprobs[t] = static_cast<float>(logit - log_sum);
    a.greedy[t] = target >= 0 && target == best && !isnan(sum);
}

/* NaN comes last in the order and has no id, as on the CPU. */
__global__ __cluster_dims__(RANKS, 1, 1)
    __launch_bounds__(SELECT_THREADS, 1) void top_kernel(__grid_constant__ const arguments a)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const int64_t t = blockIdx.x / RANKS;
    const uint64_t order = find_best(a.logits + t * a.n_pieces * PIECE, a.head.rows, a.top,
                                     *reinterpret_cast<select_shared *>(shared));
    const int i = threadIdx.x;
    if (!is_first_rank() || i >= a.top) return;
    const float z = value_of(order);
    a.top_ids[t * a.top + i] = isnan(z) ? -1 : id_of(order);
    a.top_logprobs[t * a.top + i] = static_cast<float>(static_cast<double>(z) - a.log_sums[t]);
}

/* ---- launching -------------------------------------------------------------------------- */

int top_of(const kl_token_logprobs *a)
{
    return kl_tensor_absent(&a->top_ids) ? 0 : static_cast<int>(a->top_ids.shape[1]);
}

/* Tokens of a chunk. */
int64_t chunk_of(const kl_token_logprobs *a)
{
    const int64_t T = a->hidden.shape[0], most = top_of(a) > 0 ? TOP_TOKENS : CHUNK;
    return T < most ? T : most;
}

int64_t pieces_of(const kl_token_logprobs *a)
{
    return (a->lm_head.rows + PIECE - 1) / PIECE;
}

template <class Kernel>
kl_status launch_pieces(Kernel kernel, const arguments &a, int M, int threads, int bytes,
                        cudaStream_t stream, kl_error *err)
{
    const int64_t blocks = (a.n + M - 1) / M * a.n_pieces;
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE, "token_logprobs: lm_head has too many rows: %lld",
                       static_cast<long long>(a.head.rows));
    KL_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), err);
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(a);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

template <class S, kl_weight_format format>
kl_status launch_tensor(const arguments &a, cudaStream_t stream, kl_error *err)
{
    return launch_pieces(pieces_kernel<S, format>, a, S::M, S::THREADS, tile_bytes<S>(), stream,
                         err);
}

template <class T, kl_weight_format format, int R>
kl_status launch_plain(const arguments &a, cudaStream_t stream, kl_error *err)
{
    return launch_pieces(plain_pieces_kernel<T, format, R>, a, PLAIN_WARPS * R, PLAIN_THREADS,
                         plain_bytes<PLAIN_WARPS * R>(), stream, err);
}

/* A call's tokens are cut into chunks, but a chunk's tile may be any: an output's bits do not
 * depend on it. */
template <kl_weight_format format>
kl_status launch_format(const arguments &a, kl_dtype act, bool tensor, cudaStream_t stream,
                        kl_error *err)
{
    if constexpr (format != KL_W_F32)
        if (tensor) {
            if (a.n <= 16)
                return launch_tensor<gemm_shape<16, PIECE, 1, 4>, format>(a, stream, err);
            if (a.n <= 64)
                return launch_tensor<gemm_shape<64, PIECE, 2, 4>, format>(a, stream, err);
            return launch_tensor<gemm_shape<128, PIECE, 2, 4>, format>(a, stream, err);
        }
    return with_float_type(act, [&](auto t) {
        using T = decltype(t);
        if (a.n <= 2 * PLAIN_WARPS) return launch_plain<T, format, 2>(a, stream, err);
        return launch_plain<T, format, 8>(a, stream, err);
    });
}

kl_status launch_results(const arguments &a, cudaStream_t stream, kl_error *err)
{
    join_kernel<<<static_cast<unsigned>(a.n), JOIN_THREADS, 0, stream>>>(a);
    KL_CUDA_TRY(cudaGetLastError(), err);
    if (a.top == 0) return KL_OK;
    KL_CUDA_TRY(cudaFuncSetAttribute(top_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     sizeof(select_shared)),
                err);
    top_kernel<<<static_cast<unsigned>(a.n * RANKS), SELECT_THREADS, sizeof(select_shared),
                 stream>>>(a);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

/* The chunk of n tokens that starts at `first`. */
arguments arguments_of(const kl_token_logprobs *a, int64_t first, int64_t n)
{
    const int64_t D = a->hidden.shape[1], chunk = chunk_of(a), pieces = pieces_of(a);
    const int top = top_of(a);
    arguments args = {
        .hidden = static_cast<const char *>(a->hidden.data) +
                  first * D * static_cast<int64_t>(kl_dtype_bytes(a->hidden.dtype)),
        .head = weight_view_of(a->lm_head),
        .targets = static_cast<const int *>(a->targets.data) + first,
        .logprobs = static_cast<float *>(a->logprobs.data) + first,
        .greedy = static_cast<uint8_t *>(a->greedy.data) + first,
        .pieces = static_cast<piece *>(a->ws.data),
        .n_pieces = pieces,
        .n = static_cast<int>(n),
        .D = static_cast<int>(D),
        .top = top,
    };
    args.log_sums = reinterpret_cast<double *>(args.pieces + chunk * pieces);
    if (top == 0) return args;
    args.top_ids = static_cast<int *>(a->top_ids.data) + first * top;
    args.top_logprobs = static_cast<float *>(a->top_logprobs.data) + first * top;
    args.logits = reinterpret_cast<float *>(args.log_sums + (chunk + 1) / 2 * 2);
    return args;
}

} // namespace

/* Pieces, sums (an even number of them: the logits are 16-byte aligned), logits. */
size_t kl_cuda_token_logprobs_workspace(kl_backend *, const kl_token_logprobs *a)
{
    const size_t chunk = static_cast<size_t>(chunk_of(a));
    const size_t pieces = static_cast<size_t>(pieces_of(a));
    const size_t logits = top_of(a) > 0 ? chunk * pieces * PIECE * sizeof(float) : 0;
    return chunk * pieces * sizeof(piece) + (chunk + 1) / 2 * 2 * sizeof(double) + logits;
}

kl_status kl_cuda_token_logprobs(kl_backend *be, const kl_token_logprobs *a, kl_error *err)
{
    const int64_t T = a->hidden.shape[0], D = a->hidden.shape[1], chunk = chunk_of(a);
    if (D > 0x7fffffff - PIECE)
        return kl_fail(err, KL_ERR_VALUE, "token_logprobs: hidden has too many columns: %lld",
                       static_cast<long long>(D));
    const bool tensor = a->hidden.dtype == KL_BF16 && D % GEMM_CHUNK == 0 &&
                        is_aligned(a->hidden.data, D, 2, 16) &&
                        has_pieces(weight_view_of(a->lm_head));
    for (int64_t first = 0; first < T; first += chunk) {
        const arguments args = arguments_of(a, first, T - first < chunk ? T - first : chunk);
        KL_TRY(with_format(a->lm_head.format, [&](auto format) {
            return launch_format<format.value>(args, a->hidden.dtype, tensor,
                                               kl_cuda_stream(be), err);
        }));
        KL_TRY(launch_results(args, kl_cuda_stream(be), err));
    }
    return KL_OK;
}
