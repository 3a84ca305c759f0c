/*
 * mla_decode_absorb_tensor.cu -- mla_decode's query on tensor cores, for the shapes of
 * mla_decode_tensor.cu.
 *
 * Computes     q' = [W_UK^T q_nope | q_pe] scale log2(e), as an operand of the scores
 * Shapes       q [N, H, 128+64] bf16; w_kv_b [H, 128+V, 512] bf16; query [N, H, 576]
 * Layout       q's rows strided, both at multiples of 16 bytes; mla_query_place() has query's, of
 *              8-bit pages mla_query_column()
 * Precision    bf16 operands, exact; f32 sums, stored as two bf16 (16 bits), for 8-bit pages as f16
 *              in units of each head and group of 128 channels (11 bits)
 * Grid         64 channels of a head, or a group, for 32 rows, a warp for each 16 channels: the
 *              weights are there before q is, whole lines of them. Before these blocks those that
 *              write the new tokens' latents, a warp each, and those that ask the L2 for the first
 *              pages of every block of the attention
 * Order        the channels of q in order, the same for any N
 * Roofline     half of w_kv_b, 4.2 MB with the model's shapes: 1.4 us at 3.0 TB/s
 * Measured     H200, in a step (bf16, context 1024): 4.6 us, and 1.3 where inputs are
 *              arriving (2026-11-23); the whole operation:
 *              mla_decode.cu
 */
#include "../device/arriving.cuh"
#include "../device/latents.cuh"
#include "../device/launch.cuh"
#include "../device/mla.cuh"
#include "../device/mma.cuh"

namespace {

constexpr int NOPE = 128, ROPE = 64, RANK = 512, WIDTH = RANK + ROPE;
constexpr int ROWS = 32; /* of a block */
constexpr int STEPS = NOPE / 16;
constexpr int Q_PIECES = NOPE / 8; /* of 16 bytes in a row */

/* Of 8-bit pages a block has all channels of a group, which share their unit. */
template <bool packed> struct block {
    static constexpr int COLS = packed ? KL_LATENTS_GROUP : 64; /* channels */
    static constexpr int WARPS = COLS / 16, THREADS = WARPS * WARP;
    static constexpr int TILES = RANK / COLS;
    static constexpr int W_PIECES = COLS / 8;
    static constexpr int PER_MULTIPROCESSOR = packed ? 4 : 8;
};

/* Pieces of a row lie in another order in each of eight rows: ldmatrix meets all banks. */
template <bool packed> struct shared_memory {
    uint4 weights[NOPE][block<packed>::W_PIECES];
    uint4 q[ROWS][Q_PIECES];
};

/* The blocks before those that multiply. */
struct errands {
    unsigned append, ask; /* blocks */
};

/* A block's head, channels and rows. */
template <bool packed> struct tile {
    static constexpr int COLS = block<packed>::COLS, TILES = block<packed>::TILES;
    long long h, n0;
    int first, rows;

    __device__ tile(const mla_arguments &a, long long number)
    {
        const long long unit = number / TILES;
        h = unit % a.H, n0 = unit / a.H * ROWS;
        first = static_cast<int>(number % TILES) * COLS;
        rows = static_cast<int>(a.N - n0 < ROWS ? a.N - n0 : ROWS);
    }
};

template <bool packed>
__device__ void bring_weights(const mla_arguments &a, const tile<packed> &t,
                              shared_memory<packed> &s)
{
    constexpr int W_PIECES = block<packed>::W_PIECES, THREADS = block<packed>::THREADS;
    const bf16 *w = static_cast<const bf16 *>(a.w_kv_b) + t.h * (NOPE + a.V) * RANK + t.first;
#pragma unroll
    for (int i = threadIdx.x; i < NOPE * W_PIECES; i += THREADS) {
        const int row = i / W_PIECES, piece = i % W_PIECES;
        copy_async(&s.weights[row][piece ^ row % 8], w + row * RANK + piece * 8, true);
    }
}

template <bool packed>
__device__ void bring_queries(const mla_arguments &a, const tile<packed> &t,
                              shared_memory<packed> &s)
{
    constexpr int THREADS = block<packed>::THREADS;
    const bf16 *q = static_cast<const bf16 *>(a.q) + t.n0 * a.q_stride + t.h * (NOPE + ROPE);
    for (int i = threadIdx.x; i < t.rows * Q_PIECES; i += THREADS) {
        const int row = i / Q_PIECES, piece = i % Q_PIECES;
        copy_async(&s.q[row][piece ^ row % 8], q + row * a.q_stride + piece * 8, true);
    }
}

/* Operand A: the warp's 16 channels by the channels of q, which are the rows in memory. */
template <bool packed>
__device__ void load_weights(const shared_memory<packed> &s, uint32_t (&w)[STEPS][4])
{
    const int lane = lane_id(), piece = 2 * warp_id() + lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int row = 16 * step + lane / 16 * 8 + lane % 8;
        ldmatrix_transposed(w[step], &s.weights[row][piece ^ row % 8]);
    }
}

/* acc[0], acc[1]: channel lane / 4 of rows 2 (lane % 4) and the next one; then channel + 8. */
template <bool packed>
__device__ void multiply(const shared_memory<packed> &s, int row0,
                         const uint32_t (&w)[STEPS][4], float (&acc)[4])
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

/* Where channels 2 pair, 2 pair + 1 of 16, and these + 8, lie as operand A takes them. */
__device__ uint4 *query_place(const mla_arguments &a, long long n, long long h, int step,
                              int pair)
{
    return reinterpret_cast<uint4 *>(a.query) +
           mla_query_place(a, n, h, 16 * step + 2 * pair) / 8;
}

__device__ void store_query(uint4 *to, const float (&x)[2][2])
{
    const uint2 first = halves(x[0][0], x[0][1]), second = halves(x[1][0], x[1][1]);
    store_arriving(to, {first.x, first.y, second.x, second.y});
}

/* A thread exchanges with that of the next channel: one takes a row, the other the next one.
 * x[i][j]: channel 2 pair + j of the warp's, 8 i further on. */
__device__ void exchange_rows(const mla_arguments &a, const float (&acc)[4], float (&x)[2][2])
{
    const int odd = lane_id() / 4 % 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float mine = odd ? acc[2 * i + 1] : acc[2 * i];
        const float given = odd ? acc[2 * i] : acc[2 * i + 1];
        const float other = __shfl_xor_sync(ALL_LANES, given, 4);
        x[i][0] = (odd ? other : mine) * (a.scale * LOG2_E);
        x[i][1] = (odd ? mine : other) * (a.scale * LOG2_E);
    }
}

/* The bits of the factor, a power of two, that brings a number of the size of `most` to 2^14 and
 * more, and below 2^15; of the smallest numbers less. Its inverse is no smaller than 2^-126. */
__device__ uint32_t factor_of(float most)
{
    const uint32_t exponent = 268 - (__float_as_uint(most) >> 23);
    return min(exponent, 253u) << 23;
}

/* As f16, in the group's unit, which the warps find together. */
__device__ void store_group(const mla_arguments &a, const tile<true> &t, int row0,
                            const float (&x)[2][2])
{
    __shared__ float all[2][8][block<true>::WARPS]; /* of a warp, for rows in turn */
    auto &mosts = all[row0 / 8 % 2];
    const int r = lane_id() / 4, row = lane_id() % 4 * 2 + r % 2;
    float most =
        fmaxf(fmaxf(fabsf(x[0][0]), fabsf(x[0][1])), fmaxf(fabsf(x[1][0]), fabsf(x[1][1])));
    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 8));
    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 16));
    if (r < 2) mosts[row][warp_id()] = most;
    __syncthreads();
    if (row0 + row >= t.rows) return;
#pragma unroll
    for (int w = 0; w < block<true>::WARPS; w++) most = fmaxf(most, mosts[row][w]);
    const uint32_t bits = factor_of(most);
    const float factor = __uint_as_float(bits);
    const long long n = t.n0 + row0 + row;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        *mla_query_column(a, n, t.h, t.first + 16 * warp_id() + r / 2 * 2 + 8 * i) =
            pack_half(x[i][0] * factor, x[i][1] * factor);
    }
    if (warp_id() == 0 && r < 2)
        *mla_query_unit(a, n, t.h, t.first / KL_LATENTS_GROUP) =
            __uint_as_float((254u << 23) - bits);
}

template <bool packed>
__device__ void store_rows(const mla_arguments &a, const tile<packed> &t, int row0,
                           const float (&acc)[4])
{
    const int r = lane_id() / 4, row = row0 + lane_id() % 4 * 2 + r % 2;
    float x[2][2];
    exchange_rows(a, acc, x);
    if constexpr (packed)
        store_group(a, t, row0, x);
    else if (row < t.rows)
        store_query(query_place(a, t.n0 + row, t.h, t.first / 16 + warp_id(), r / 2), x);
}

/* Channels that are not absorbed: the tiles of a head share them. Of 8-bit pages they stay as they
 * are: scores take their factor themselves. */
template <bool packed> __device__ void copy_rope(const mla_arguments &a, const tile<packed> &t)
{
    using B = block<packed>;
    constexpr int EACH = ROPE / 4; /* vectors of a row */
    const float factor = a.scale * LOG2_E;
    for (int i = t.first / B::COLS * B::THREADS + threadIdx.x; i < t.rows * EACH;
         i += B::TILES * B::THREADS) {
        const long long n = t.n0 + i / EACH;
        const int step = i % EACH / 4, pair = i % 4, channel = 16 * step + 2 * pair;
        const bf16 *q = static_cast<const bf16 *>(a.q) + n * a.q_stride + t.h * (NOPE + ROPE) +
                        NOPE + channel;
        if constexpr (packed) {
#pragma unroll
            for (int j = 0; j < 2; j++)
                *mla_query_column(a, n, t.h, RANK + channel + 8 * j) =
                    *reinterpret_cast<const uint32_t *>(q + 8 * j);
        } else {
            float x[2][2];
            load_floats<2>(q, x[0]);
            load_floats<2>(q + 8, x[1]);
#pragma unroll
            for (int j = 0; j < 4; j++) x[j / 2][j % 2] *= factor;
            store_query(query_place(a, n, t.h, RANK / 16 + step, pair), x);
        }
    }
}

template <bool packed> __device__ void absorb(const mla_arguments &a, long long number)
{
    __shared__ shared_memory<packed> s;
    const tile<packed> t(a, number);
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
        store_rows(a, t, row0, acc);
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
    constexpr int MOST = packed ? MLA_PACKED_STAGES : MLA_TENSOR_STAGES;
    const int pages = it.pages < MOST ? it.pages : MOST;
    if (lane_id() >= pages) return;
    const long long page = a.block_table[it.n * a.B + it.first + lane_id()];
    prefetch_l2(static_cast<const char *>(a.pages) + page * BYTES, BYTES);
}

/* The attention begins with memory that kernels before this one may write: it is not to start
 * before they have ended. */
template <bool packed>
__global__ __launch_bounds__(
    block<packed>::THREADS,
    block<packed>::PER_MULTIPROCESSOR) void mla_absorb_tensor(__grid_constant__ const
                                                                  mla_arguments a,
                                                              __grid_constant__ const
                                                                  new_latents latents,
                                                              errands before)
{
    constexpr int WARPS = block<packed>::WARPS;
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

/* ---- a single token whose q is arriving -------------------------------------------------- */

/* What becomes of the pieces is written behind this, by those who see words of this block. */
__device__ void make_blanks(const mla_arguments &a)
{
    constexpr int THREADS = block<false>::THREADS;
    const long long pages = mla_pages_of(__ldcg(a.lengths)), all = pages * a.H * (RANK / 4);
    const long long first = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const long long step = static_cast<long long>(gridDim.x) * THREADS;
    for (long long i = first; i < all; i += step)
        reinterpret_cast<uint4 *>(a.context)[i] = {~0u, ~0u, ~0u, ~0u};
    for (long long i = first; i < a.H * MLA_PAGES; i += step)
        a.max[i] = a.sum[i] = __uint_as_float(BLANK_FLOAT);
    __threadfence();
    __syncthreads();
}

/* The first warp the channels that are absorbed, the second one the others. */
__device__ void receive_query(const mla_arguments &a, const tile<false> &t,
                              shared_memory<false> &s)
{
    const bf16 *q = static_cast<const bf16 *>(a.q) + t.h * (NOPE + ROPE);
    const int lane = lane_id();
    if (warp_id() == 0 && lane < Q_PIECES)
        s.q[0][lane] = await(reinterpret_cast<const uint4 *>(q) + lane);
    if (warp_id() != 1 || t.first > 0 || lane >= ROPE / 4) return;
    const int step = lane / 4, pair = lane % 4;
    const uint32_t *from = reinterpret_cast<const uint32_t *>(q + NOPE + 16 * step + 2 * pair);
    const float factor = a.scale * LOG2_E;
    const uint32_t first = await(from), second = await(from + 4);
    store_query(query_place(a, 0, t.h, RANK / 16 + step, pair),
                {{low_half(first) * factor, high_half(first) * factor},
                 {low_half(second) * factor, high_half(second) * factor}});
}

__global__ __launch_bounds__(
    block<false>::THREADS,
    block<false>::PER_MULTIPROCESSOR) void mla_absorb_arriving(__grid_constant__ const
                                                                   mla_arguments a)
{
    __shared__ shared_memory<false> s;
    const tile<false> t(a, blockIdx.x);
    if (a.unsettled) wait_for_inputs();
    bring_weights(a, t, s);
    copy_commit();
    make_blanks(a);
    let_next_start();
    if (warp_id() == 2) ask_for_pages<false>(a, static_cast<int>(blockIdx.x));
    uint4 *to = query_place(a, 0, t.h, t.first / 16 + warp_id(), lane_id() / 8);
    asm volatile("" : "+l"(to)); /* known before q is there */
    uint32_t w[STEPS][4];
    float acc[4] = {}, x[2][2];
    copy_wait<0>();
    __syncthreads();
    load_weights(s, w);
    receive_query(a, t, s);
    __syncthreads();
    multiply(s, 0, w, acc);
    exchange_rows(a, acc, x);
    if (lane_id() % 8 == 0) store_query(to, x); /* the only row's */
    wait_for_inputs();
}

template <bool packed>
kl_status launch(const mla_arguments &a, const kl_mla *call, cudaStream_t stream, kl_error *err)
{
    using B = block<packed>;
    const bool appends = !kl_tensor_absent(&call->raw);
    const kl_mla_append append = kl_mla_append_of(call);
    const new_latents latents = appends ? new_latents_of(&append) : new_latents{};
    const errands before = {
        .append = appends ? static_cast<unsigned>(mla_divide_up(a.N, B::WARPS)) : 0,
        .ask = static_cast<unsigned>(mla_divide_up(a.shares, B::WARPS)),
    };
    const long long blocks =
        before.append + before.ask + mla_divide_up(a.N, ROWS) * a.H * B::TILES;
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE,
                       "mla_decode: N * H must be <= %lld, got N %lld, H %lld",
                       MAX_BLOCKS / B::TILES, a.N, a.H);
    return kl_cuda_launch(mla_absorb_tensor<packed>, static_cast<unsigned>(blocks), B::THREADS,
                          0, stream, err, a, latents, before);
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
    return a.packed ? launch<true>(a, call, stream, err) : launch<false>(a, call, stream, err);
}

kl_status kl_cuda_mla_absorb_arriving(const mla_arguments &a, cudaStream_t stream,
                                      kl_error *err)
{
    using B = block<false>;
    return kl_cuda_launch(mla_absorb_arriving, static_cast<unsigned>(a.H * B::TILES),
                          B::THREADS, 0, stream, err, a);
}
