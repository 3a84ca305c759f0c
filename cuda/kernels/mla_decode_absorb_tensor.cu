/*
 * mla_decode_absorb_tensor.cu -- mla_decode's query on tensor cores, for the shapes of
 * mla_decode_tensor.cu.
 *
 * Computes     q' = [W_UK^T q_nope | q_pe] scale log2(e), as an operand of the scores
 * Shapes       q [N, H, 128+64] bf16; w_kv_b [H, 128+V, 512] bf16; query [N, H, 576]
 * Layout       q's rows strided, both at multiples of 16 bytes; mla_query_place() has query's, of
 *              8-bit pages mla_query_column()
 * Precision    bf16 operands, exact; f32 sums, stored as two bf16 (16 bits)
 * Grid         64 channels of a head for 32 rows, four warps with 16 channels each: the weights
 *              are there before q is, whole lines of them. Before these blocks those that write
 *              the new tokens' latents, a warp each, and those that ask the L2 for the first pages
 *              of every block of the attention
 * Order        the channels of q in order, the same for any N
 * Roofline     half of w_kv_b, 4.2 MB with the model's shapes: 1.4 us at 3.0 TB/s
 * Measured     H200, in a step (bf16, context 1024): 4.1 us (2026-11-22); the whole operation:
 *              mla_decode.cu
 */
#include "../device/latents.cuh"
#include "../device/launch.cuh"
#include "../device/mla.cuh"
#include "../device/mma.cuh"

namespace {

constexpr int NOPE = 128, ROPE = 64, RANK = 512, WIDTH = RANK + ROPE;
constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int COLS = 16 * WARPS; /* channels of a block */
constexpr int TILES = RANK / COLS;
constexpr int ROWS = 32; /* of a block */
constexpr int STEPS = NOPE / 16;
constexpr int W_PIECES = COLS / 8, Q_PIECES = NOPE / 8; /* of 16 bytes in a row */

/* Pieces of a row lie in another order in each of eight rows: ldmatrix meets all banks. */
struct shared_memory {
    uint4 weights[NOPE][W_PIECES];
    uint4 q[ROWS][Q_PIECES];
};

/* The blocks before those that multiply. */
struct errands {
    unsigned append, ask; /* blocks */
};

/* A block's head, channels and rows. */
struct tile {
    long long h, n0;
    int first, rows;

    __device__ tile(const mla_arguments &a, long long block)
    {
        const long long unit = block / TILES;
        h = unit % a.H, n0 = unit / a.H * ROWS;
        first = static_cast<int>(block % TILES) * COLS;
        rows = static_cast<int>(a.N - n0 < ROWS ? a.N - n0 : ROWS);
    }
};

__device__ void bring_weights(const mla_arguments &a, const tile &t, shared_memory &s)
{
    const bf16 *w = static_cast<const bf16 *>(a.w_kv_b) + t.h * (NOPE + a.V) * RANK + t.first;
#pragma unroll
    for (int i = threadIdx.x; i < NOPE * W_PIECES; i += THREADS) {
        const int row = i / W_PIECES, piece = i % W_PIECES;
        copy_async(&s.weights[row][piece ^ row % 8], w + row * RANK + piece * 8, true);
    }
}

__device__ void bring_queries(const mla_arguments &a, const tile &t, shared_memory &s)
{
    const bf16 *q = static_cast<const bf16 *>(a.q) + t.n0 * a.q_stride + t.h * (NOPE + ROPE);
    for (int i = threadIdx.x; i < t.rows * Q_PIECES; i += THREADS) {
        const int row = i / Q_PIECES, piece = i % Q_PIECES;
        copy_async(&s.q[row][piece ^ row % 8], q + row * a.q_stride + piece * 8, true);
    }
}

/* Operand A: the warp's 16 channels by the channels of q, which are the rows in memory. */
__device__ void load_weights(const shared_memory &s, uint32_t (&w)[STEPS][4])
{
    const int lane = lane_id(), piece = 2 * warp_id() + lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int row = 16 * step + lane / 16 * 8 + lane % 8;
        ldmatrix_transposed(w[step], &s.weights[row][piece ^ row % 8]);
    }
}

/* acc[0], acc[1]: channel lane / 4 of rows 2 (lane % 4) and the next one; then channel + 8. */
__device__ void multiply(const shared_memory &s, int row0, const uint32_t (&w)[STEPS][4],
                         float (&acc)[4])
{
    const int lane = lane_id(), row = row0 + lane % 8;
#pragma unroll
    for (int step = 0; step < STEPS; step += 2) {
        uint32_t q[4];
        ldmatrix(q, &s.q[row][(2 * step + lane / 8) ^ row % 8]);
        mma_bf16(acc, w[step], {q[0], q[1]});
        mma_bf16(acc, w[step + 1], {q[2], q[3]});
    }
}

/* A bf16 of each of two neighbours, and of what they lack. */
__device__ uint2 halves(float x, float y)
{
    const uint32_t high = pack_bf16(x, y);
    return {high, pack_bf16(x - low_half(high), y - high_half(high))};
}

/* Channels 2 pair, 2 pair + 1 of 16, and these + 8. Operand A takes them as they are; of operand
 * B each has a place of its own. */
template <bool packed>
__device__ void store_query(const mla_arguments &a, long long n, long long h, int step,
                            int pair, uint2 first, uint2 second)
{
    const int channel = 16 * step + 2 * pair;
    if constexpr (!packed) {
        reinterpret_cast<uint4 *>(a.query)[mla_query_place(a, n, h, channel) / 8] = {
            first.x, first.y, second.x, second.y};
    } else {
        const uint32_t x[2] = {first.x, second.x}, lack[2] = {first.y, second.y};
        uint16_t *query = reinterpret_cast<uint16_t *>(a.query);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const long long at = mla_query_column(a, n, h, channel + i / 2 * 8 + i % 2);
            query[at] = static_cast<uint16_t>(x[i / 2] >> i % 2 * 16);
            query[at + MLA_QUERY_LACK] = static_cast<uint16_t>(lack[i / 2] >> i % 2 * 16);
        }
    }
}

/* A thread exchanges with that of the next channel: one takes a row, the other the next one. */
template <bool packed>
__device__ void store_rows(const mla_arguments &a, const tile &t, int row0, float (&acc)[4])
{
    const int r = lane_id() / 4, odd = r % 2, n = row0 + lane_id() % 4 * 2 + odd;
    float x[2][2]; /* [channel + 8][of two neighbours] */
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float mine = odd ? acc[2 * i + 1] : acc[2 * i];
        const float given = odd ? acc[2 * i] : acc[2 * i + 1];
        const float other = __shfl_xor_sync(ALL_LANES, given, 4);
        x[i][0] = (odd ? other : mine) * (a.scale * LOG2_E);
        x[i][1] = (odd ? mine : other) * (a.scale * LOG2_E);
    }
    if (n >= t.rows) return;
    store_query<packed>(a, t.n0 + n, t.h, t.first / 16 + warp_id(), r / 2,
                        halves(x[0][0], x[0][1]), halves(x[1][0], x[1][1]));
}

/* Channels that are not absorbed: the tiles of a head share them. */
template <bool packed> __device__ void copy_rope(const mla_arguments &a, const tile &t)
{
    constexpr int EACH = ROPE / 4; /* vectors of a row */
    const float factor = a.scale * LOG2_E;
    for (int i = t.first / COLS * THREADS + threadIdx.x; i < t.rows * EACH;
         i += TILES * THREADS) {
        const long long n = t.n0 + i / EACH;
        const int step = i % EACH / 4, pair = i % 4;
        const bf16 *q = static_cast<const bf16 *>(a.q) + n * a.q_stride + t.h * (NOPE + ROPE) +
                        NOPE + 16 * step + 2 * pair;
        float x[2], y[2];
        load_floats<2>(q, x);
        load_floats<2>(q + 8, y);
        store_query<packed>(a, n, t.h, RANK / 16 + step, pair,
                            halves(x[0] * factor, x[1] * factor),
                            halves(y[0] * factor, y[1] * factor));
    }
}

template <bool packed> __device__ void absorb(const mla_arguments &a, long long block)
{
    __shared__ shared_memory s;
    const tile t(a, block);
    if (a.unsettled) wait_for_inputs();
    bring_weights(a, t, s);
    wait_for_inputs();
    let_next_start();
    bring_queries(a, t, s);
    copy_commit();
    copy_rope<packed>(a, t);
    copy_wait<0>();
    __syncthreads();
    uint32_t w[STEPS][4];
    load_weights(s, w);
    for (int row0 = 0; row0 < t.rows; row0 += 8) {
        float acc[4] = {};
        multiply(s, row0, w, acc);
        store_rows<packed>(a, t, row0, acc);
    }
}

/* ---- errands --------------------------------------------------------------------------- */

/* The first pages of a share, which its block of the attention waits for; a warp a share. */
template <bool packed> __device__ void ask_for_pages(const mla_arguments &a, int share)
{
    constexpr uint32_t ROW =
        packed ? kl_latents_row_of(RANK, ROPE).row_bytes : WIDTH * sizeof(bf16);
    constexpr uint32_t BYTES = KL_PAGE_TOKENS * ROW;
    mla_walk walk(a, share);
    mla_piece it;
    if (share >= a.shares || !walk.next(&it)) return;
    const int pages = it.pages < MLA_TENSOR_STAGES ? it.pages : MLA_TENSOR_STAGES;
    if (lane_id() >= pages) return;
    const long long page = a.block_table[it.n * a.B + it.first + lane_id()];
    prefetch_l2(static_cast<const char *>(a.pages) + page * BYTES, BYTES);
}

/* The attention begins with memory that kernels before this one may write: it is not to start
 * before they have ended. */
template <bool packed>
__global__ __launch_bounds__(THREADS, 8) void mla_absorb_tensor(
    __grid_constant__ const mla_arguments a, __grid_constant__ const new_latents latents,
    errands before)
{
    if (blockIdx.x >= before.append + before.ask) {
        absorb<packed>(a, blockIdx.x - before.append - before.ask);
        return;
    }
    wait_for_inputs();
    let_next_start();
    if (blockIdx.x < before.append) {
        const long long n = static_cast<long long>(blockIdx.x) * WARPS + warp_id();
        if (n < a.N) write_latents_as<bf16, packed>(latents, n, n, a.lengths[n] - 1);
    } else {
        ask_for_pages<packed>(a, (blockIdx.x - before.append) * WARPS + warp_id());
    }
}

} // namespace

bool kl_cuda_mla_absorb_tensor_fits(const mla_arguments &a, kl_dtype weight)
{
    return a.tensor && a.nope == NOPE && weight == KL_BF16 &&
           is_aligned(a.q, a.q_stride, sizeof(bf16), 16) &&
           is_aligned(a.w_kv_b, 0, sizeof(bf16), 16);
}

kl_status kl_cuda_mla_absorb_tensor(const mla_arguments &a, const kl_mla *call,
                                    cudaStream_t stream, kl_error *err)
{
    const bool appends = !kl_tensor_absent(&call->raw);
    const kl_mla_append append = kl_mla_append_of(call);
    const new_latents latents = appends ? new_latents_of(&append) : new_latents{};
    const errands before = {
        .append = appends ? static_cast<unsigned>(mla_divide_up(a.N, WARPS)) : 0,
        .ask = static_cast<unsigned>(mla_divide_up(a.shares, WARPS)),
    };
    const long long blocks =
        before.append + before.ask + mla_divide_up(a.N, ROWS) * a.H * TILES;
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_decode: N * H must be <= %lld, got N %lld, H %lld",
                       MAX_BLOCKS / TILES, a.N, a.H);
    return kl_cuda_launch(a.packed ? mla_absorb_tensor<true> : mla_absorb_tensor<false>,
                          static_cast<unsigned>(blocks), THREADS, 0, stream, err, a, latents,
                          before);
}
