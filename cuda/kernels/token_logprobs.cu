/*
 * token_logprobs.cu -- log-probabilities of given next tokens, without a [T, rows] matrix.
 *
 * Computes     z = hidden lm_head^T;  z[target] - logsumexp(z);  whether the target is the
 *              argmax;  the n largest, all as in backend/ops.h
 * Shapes       hidden [T, D], lm_head [rows, D], targets, logprobs and greedy [T],
 *              alternatives [T, n]
 * Layout       dense
 * Precision    logits that of linear.cu, in f32. Exponentials in f32, their sums over PIECE ids in
 *              f32, over the pieces in f64
 * Grid         a chunk of tokens by a slice of the head at a time: linear.cu makes its logits, a
 *              warp takes each PIECE of a token's to maximum, sum, argmax and the target's logit. A
 *              block a token then takes in the pieces. With n > 0 a slice is the whole head, for
 *              the selection of device/select.cuh
 * Order        a piece one butterfly, the pieces are added in one order; that of the logits is
 *              linear.cu's
 * Roofline     2 T D rows flops, 2 D rows bytes of a bf16 head (755 MB, 252 us on an H100 at
 *              3.0 TB/s, for up to 100 tokens or so; then the tensor cores bound it), and 8 T rows
 *              bytes of logits, most of them in the L2
 * Measured     not timed alone. H200, 131,072 tokens of a model (48B, bf16, n = 5) in 7.2 s, where
 *              prefill takes 6.3 (2026-11-22)
 */
#include "../device/select.cuh"
#include "../device/types.cuh"
#include "../product.h"

namespace {

constexpr int PIECE = 128;        /* ids: four a lane */
constexpr int CHUNK = 1024;       /* tokens: 21 MB of pieces at 163,840 rows */
constexpr int TOP_TOKENS = 64;    /* tokens of a chunk with alternatives */
constexpr int PIECE_WARPS = 8;    /* of a block that makes pieces */
constexpr int JOIN_THREADS = 256; /* of the block that takes in a token's pieces */

/* Logits that are held at a time: 42 MB, what 64 tokens have at 163,840 rows. */
constexpr int64_t LOGITS = 10 << 20;
static_assert(LOGITS >= CHUNK * PIECE, "a slice of a whole chunk has a piece at least");

/* What a token keeps of PIECE ids. */
struct piece {
    float most, sum; /* sum of exp(z - most) */
    float target;    /* the target's logit, if it is one of these */
    int best;        /* the lowest id whose logit is `most`; NOBODY if all are NaN */
};
constexpr int NOBODY = 0x7fffffff;

/* A chunk of the call. */
struct arguments {
    const int *targets;
    float *logprobs;
    uint8_t *greedy;
    int *top_ids;        /* or null */
    float *top_logprobs; /* or null */
    float *logits;       /* [n, stride], of a slice's ids */
    piece *pieces;       /* [n, n_pieces] */
    double *log_sums;    /* [n] */
    int64_t n_pieces, stride, rows;
    int64_t first, count; /* pieces of the slice */
    int n, top;
};

/* ---- logits to pieces ------------------------------------------------------------------- */

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

/* A lane's four logits; of those past the head's last id, which nobody has written, none is read. */
__device__ void load_logits(const float *from, int inside, float (&z)[4])
{
    if (inside >= 4) return load_floats<4>(from, z);
#pragma unroll
    for (int i = 0; i < 4; i++) z[i] = i < inside ? from[i] : 0;
}

/* A warp for each token and piece of the slice. */
__global__
__launch_bounds__(PIECE_WARPS *WARP) void pieces_kernel(__grid_constant__ const arguments a)
{
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * PIECE_WARPS + warp_id();
    const int64_t t = unit / a.count, v = unit % a.count;
    if (t >= a.n) return;
    const int64_t begin = (a.first + v) * PIECE, left = a.rows - begin;
    const int column = 4 * lane_id();
    const int inside = static_cast<int>(left < column + 4 ? left - column : 4);
    const float *const logits = a.logits + t * a.stride + v * PIECE;
    float z[4];
    load_logits(logits + column, inside, z);
    piece p = reduce_piece(z, inside, static_cast<int>(begin) + column);
    const int64_t target = a.targets[t] - begin;
    if (target >= 0 && target < PIECE) p.target = logits[target];
    if (lane_id() == 0) a.pieces[t * a.n_pieces + a.first + v] = p;
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
    const uint64_t order = find_best(part_of(a.logits + t * a.stride, a.rows), a.top,
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

/* How a call is cut, and where its workspace's parts lie. */
struct cut {
    int64_t chunk, n_pieces;
    int64_t slice; /* pieces whose logits are held at a time */
    size_t product, pieces, sums, end;
};

size_t align_up(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

/* Tokens [first, first + n) by rows [row, row + rows) of the head. */
kl_cuda_product product_of(const kl_token_logprobs *a, int64_t first, int64_t n, int64_t row,
                           int64_t rows, void *out, int64_t stride)
{
    const int64_t D = a->hidden.shape[1];
    const size_t skipped = static_cast<size_t>(first * D) * kl_dtype_bytes(a->hidden.dtype);
    return {
        .x = static_cast<const char *>(a->hidden.data) + skipped,
        .act = a->hidden.dtype,
        .x_dtype = a->hidden.dtype,
        .T = n,
        .x_stride = D,
        .w = kl_weight_slice(&a->lm_head, 0, row, rows),
        .up = {},
        .out = out,
        .out_dtype = KL_F32,
        .out_stride = stride,
        .norms = false,
        .adds = false,
        .norm_weight = nullptr,
        .norm_eps = 0,
        .residual = nullptr,
    };
}

/* Every part grows with T. */
cut cut_of(const kl_token_logprobs *a)
{
    const int64_t T = a->hidden.shape[0], most = top_of(a) > 0 ? TOP_TOKENS : CHUNK;
    cut c = {};
    c.chunk = T < most ? T : most;
    c.n_pieces = (a->lm_head.rows + PIECE - 1) / PIECE;
    const int64_t all = c.chunk * c.n_pieces * PIECE;
    const bool whole = top_of(a) > 0 || all <= LOGITS;
    c.slice = whole ? c.n_pieces : LOGITS / (c.chunk * PIECE);
    const kl_cuda_product p =
        product_of(a, 0, c.chunk, 0, a->lm_head.rows, nullptr, c.n_pieces * PIECE);
    c.product = align_up(static_cast<size_t>(whole ? all : LOGITS) * sizeof(float));
    c.pieces = c.product + align_up(kl_cuda_product_workspace(&p));
    c.sums = c.pieces + align_up(static_cast<size_t>(c.chunk * c.n_pieces) * sizeof(piece));
    c.end = c.sums + align_up(static_cast<size_t>(c.chunk) * sizeof(double));
    return c;
}

arguments arguments_of(const kl_token_logprobs *a, const cut &c, int64_t first, int64_t n)
{
    const int top = top_of(a);
    char *const ws = static_cast<char *>(a->ws.data);
    arguments args = {
        .targets = static_cast<const int *>(a->targets.data) + first,
        .logprobs = static_cast<float *>(a->logprobs.data) + first,
        .greedy = static_cast<uint8_t *>(a->greedy.data) + first,
        .logits = reinterpret_cast<float *>(ws),
        .pieces = reinterpret_cast<piece *>(ws + c.pieces),
        .log_sums = reinterpret_cast<double *>(ws + c.sums),
        .n_pieces = c.n_pieces,
        .stride = c.slice * PIECE,
        .rows = a->lm_head.rows,
        .n = static_cast<int>(n),
        .top = top,
    };
    if (top == 0) return args;
    args.top_ids = static_cast<int *>(a->top_ids.data) + first * top;
    args.top_logprobs = static_cast<float *>(a->top_logprobs.data) + first * top;
    return args;
}

/* Pieces of the slice that begins at piece `at`. */
kl_status run_slice(kl_backend *be, const kl_token_logprobs *a, const cut &c, arguments args,
                    int64_t first, int64_t at, kl_error *err)
{
    const int64_t row = at * PIECE, left = args.rows - row;
    const kl_cuda_product p =
        product_of(a, first, args.n, row, left < args.stride ? left : args.stride, args.logits,
                   args.stride);
    const kl_workspace ws = {static_cast<char *>(a->ws.data) + c.product, c.pieces - c.product};
    args.first = at;
    args.count = c.n_pieces - at < c.slice ? c.n_pieces - at : c.slice;
    KL_TRY(kl_cuda_product_run(be, &p, ws, err));
    const int64_t blocks = (args.n * args.count + PIECE_WARPS - 1) / PIECE_WARPS;
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE, "token_logprobs: lm_head has too many rows: %lld",
                       static_cast<long long>(args.rows));
    pieces_kernel<<<static_cast<unsigned>(blocks), PIECE_WARPS * WARP, 0, kl_cuda_stream(be)>>>(
        args);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
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

} // namespace

size_t kl_cuda_token_logprobs_workspace(kl_backend *, const kl_token_logprobs *a)
{
    return cut_of(a).end;
}

kl_status kl_cuda_token_logprobs(kl_backend *be, const kl_token_logprobs *a, kl_error *err)
{
    const int64_t T = a->hidden.shape[0];
    const cut c = cut_of(a);
    for (int64_t first = 0; first < T; first += c.chunk) {
        const arguments args =
            arguments_of(a, c, first, T - first < c.chunk ? T - first : c.chunk);
        for (int64_t at = 0; at < c.n_pieces; at += c.slice)
            KL_TRY(run_slice(be, a, c, args, first, at, err));
        KL_TRY(launch_results(args, kl_cuda_stream(be), err));
    }
    return KL_OK;
}
