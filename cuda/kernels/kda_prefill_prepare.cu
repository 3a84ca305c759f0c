/*
 * kda_prefill_prepare.cu -- chunked KDA prefill, first half: what a chunk of 64 tokens asks of
 * the state and leaves in it, for all chunks at once.
 *
 * Computes     the operands of kda_prefill.cuh: gate, norms, A and M, X = (1 + A)^-1 diag(b),
 *              and k and q times their products of decays
 * Shapes       q, k [T, Hk, 128] bf16; g [T, H, 128]; beta [T, H]; chunks [count, H]
 * Layout       first axes may be strided; q and k in rows of 16-byte pieces
 * Precision    decays are products of exp(log-decay) in f32, never quotients and never
 *              exponentials of differences of sums. That of a whole chunk, whose rounding would
 *              add up over a sequence, is exp of the sum, kept in two f32. A and M: f32 within
 *              octets of tokens, tf32 operands (11 bits) and f32 sums elsewhere. The inverse:
 *              f32. Stored in bf16, X in two: with beta near 2 and repeated keys its large
 *              terms cancel.
 * Grid         one block for each chunk number and head; two blocks on a multiprocessor
 * Roofline     770 B a token and head in (q, k, g), 1,172 out: 170 us for 8,192 tokens of 32
 *              heads on an H100, if nothing stays in the L2
 * Measured     H100, busy with another job: 0.57 ms for 8,192 tokens of 32 heads (2026-11-22)
 */
#include "../device/mma.cuh"
#include "../device/ragged.cuh"
#include "kda_prefill_invert.cuh"

namespace {

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int BLOCKS = KDA_BLOCKS; /* 16-token blocks of a chunk */
constexpr int HALF = KDA_TOKENS / 2;
constexpr int OCTET = 8, OCTETS = KDA_TOKENS / OCTET;
constexpr int PAIRS = BLOCKS * (BLOCKS - 1) / 2;
constexpr int PITCH16 = KDA_K + 8, PITCH32 = KDA_K + 4; /* rows a bank apart */

static_assert(THREADS == 2 * KDA_K, "decays are made by two threads a channel");
static_assert(THREADS == KDA_SOLVERS, "the block inverts");
static_assert(WARPS == 2 * BLOCKS, "diagonal blocks are made by two warps each");
static_assert(WARPS >= PAIRS, "the other blocks are made by one warp a pair");

struct prepare_memory {
    bf16 q[KDA_TOKENS][PITCH16], k[KDA_TOKENS][PITCH16]; /* as given */
    /* First a_l itself; then products over octets; then over blocks: from the start of l's to
     * l, and from l + 1 to its end. */
    float from_start[KDA_TOKENS][PITCH32], to_end[KDA_TOKENS][PITCH32];
    /* First the sums of the log-decays of both halves; then the products of whole blocks. */
    float block[BLOCKS][KDA_K];
    float A[BLOCKS * (BLOCKS + 1) / 2][KDA_BLOCK][KDA_BLOCK];
    float q_factor[KDA_TOKENS], k_factor[KDA_TOKENS], beta[KDA_TOKENS];
};
static_assert(sizeof(kda_inverse) <= sizeof(prepare_memory::to_end));
static_assert(2 * (sizeof(prepare_memory) + 1024) <= 228 * 1024, "two blocks a multiprocessor");

/* ---- inputs ------------------------------------------------------------------------------ */

/* 64 rows of 128 values, zeros past the last token. */
__device__ void fetch_rows(bf16 (*to)[PITCH16], const kda_operand &x, long long token,
                           long long offset, int tokens)
{
    constexpr int PIECES = KDA_K / 8;
    for (int i = threadIdx.x; i < KDA_TOKENS * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        const bool inside = row < tokens;
        const bf16 *from = static_cast<const bf16 *>(x.data) +
                           (token + (inside ? row : 0)) * x.stride + offset + 8 * piece;
        copy_async(&to[row][8 * piece], from, inside);
    }
}

/* Half of the tokens of a thread's channel, all asked for before the first is used. */
template <class T>
__device__ void read_gates(const kda_operand &x, long long token, long long at, int tokens,
                           prepare_memory &m)
{
    const int channel = threadIdx.x % KDA_K, first = threadIdx.x / KDA_K * HALF;
    const T *from = static_cast<const T *>(x.data) + (token + first) * x.stride + at + channel;
    T g[HALF];
#pragma unroll
    for (int i = 0; i < HALF; i++) g[i] = first + i < tokens ? from[i * x.stride] : T(0.0f);
#pragma unroll
    for (int i = 0; i < HALF; i++) m.from_start[first + i][channel] = to_float(g[i]);
}

/* A token that is not there decays nothing, asks nothing and writes nothing. Leaves the sum of a
 * half's log-decays, too. */
__device__ void read_decays(const kda_arguments &a, long long token, long long h, int tokens,
                            prepare_memory &m)
{
    const int channel = threadIdx.x % KDA_K, first = threadIdx.x / KDA_K * HALF;
    if (a.g.is_bf16)
        read_gates<bf16>(a.g, token, h * KDA_K, tokens, m);
    else
        read_gates<float>(a.g, token, h * KDA_K, tokens, m);
    const kda_channel gate = kda_channel_of(a, h, channel);
    float sum = 0;
    /* Unrolled, three gates' code would pass through the instruction cache once a block. */
#pragma unroll 2
    for (int i = first; i < first + HALF; i++) {
        float &x = m.from_start[i][channel];
        const float log_decay = i < tokens ? kda_log_decay(a, gate, x) : 0.0f;
        sum += log_decay;
        x = expf(log_decay);
    }
    m.block[threadIdx.x / KDA_K][channel] = sum;
}

__device__ void write_chunk_decay(const prepare_memory &m, kda_chunk &out)
{
    const int channel = threadIdx.x;
    if (channel >= KDA_K) return;
    const float sum = m.block[0][channel] + m.block[1][channel], decay = expf(sum);
    out.decay[channel] = decay;
    out.decay_low[channel] = kda_decay_low(sum, decay);
}

__device__ void read_betas(const kda_arguments &a, long long token, long long h, int tokens,
                           prepare_memory &m)
{
    if (threadIdx.x >= KDA_TOKENS) return;
    const int i = threadIdx.x;
    const float raw = i < tokens ? kda_load(a.beta, token + i, h) : 0.0f;
    m.beta[i] = i >= tokens ? 0.0f : a.beta_logits ? sigmoid(raw) : raw;
}

__device__ float row_factor(const bf16 *row)
{
    float x[4], sum = 0;
    load_floats(row + 4 * lane_id(), x);
#pragma unroll
    for (int i = 0; i < 4; i++) sum += x[i] * x[i];
    return 1 / sqrtf(warp_sum(sum) + KDA_NORM_EPS);
}

__device__ void find_factors(const kda_arguments &a, prepare_memory &m)
{
    constexpr int ROWS = KDA_TOKENS / WARPS;
    for (int i = warp_id() * ROWS; i < (warp_id() + 1) * ROWS; i++) {
        const float q = a.normalize ? row_factor(m.q[i]) : 1.0f;
        const float k = a.normalize ? row_factor(m.k[i]) : 1.0f;
        if (lane_id() == 0) m.q_factor[i] = q * a.scale, m.k_factor[i] = k;
    }
}

/* ---- A and M ----------------------------------------------------------------------------- */

/* sum_d x_i k_j a_{j+1} ... a_i within the two octets of a diagonal block: a lane has a column
 * j and half of the channels, and lengthens the product of decays as it walks down the rows. */
__device__ void octet_sums(const prepare_memory &m, const bf16 (*x)[PITCH16], int start,
                           float (&sum)[OCTET])
{
    const int j = lane_id() % KDA_BLOCK, half = lane_id() / KDA_BLOCK;
    const int first = start + j / OCTET * OCTET;
#pragma unroll
    for (int i = 0; i < OCTET; i++) sum[i] = 0;
#pragma unroll 2
    for (int quad = 0; quad < KDA_K / 8; quad++) {
        const int d = 8 * quad + 4 * half;
        float kj[4], e[4] = {0, 0, 0, 0};
        load_floats(&m.k[start + j][d], kj);
#pragma unroll
        for (int i = 0; i < OCTET; i++) {
            float xi[4], ai[4];
            load_floats(&x[first + i][d], xi);
            load_floats(&m.from_start[first + i][d], ai);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                e[c] = i == j % OCTET ? kj[c] : e[c] * ai[c];
                sum[i] = fmaf(xi[c], e[c], sum[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < OCTET; i++) sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], KDA_BLOCK);
}

/* One element of the diagonal block b. */
__device__ void put(prepare_memory &m, kda_chunk &out, int b, bool is_M, int i, int j,
                    float sum)
{
    const int row = b * KDA_BLOCK + i, column = b * KDA_BLOCK + j;
    const float k = sum * m.k_factor[column];
    if (is_M)
        out.M[row][8 * kda_swizzle(row, column / 8) + column % 8] =
            from_float<bf16>(j <= i ? k * m.q_factor[row] : 0.0f);
    else
        m.A[kda_block_of(b, b)][i][j] = j < i ? k * m.beta[row] * m.k_factor[row] : 0.0f;
}

/* Two warps a diagonal block: one for A, one for M. What lies above the octets is zero. */
__device__ void diagonal_octets(prepare_memory &m, kda_chunk &out)
{
    const int b = warp_id() / 2, j = lane_id() % KDA_BLOCK;
    const bool is_M = warp_id() % 2;
    float sum[OCTET];
    octet_sums(m, is_M ? m.q : m.k, b * KDA_BLOCK, sum);
    if (lane_id() >= KDA_BLOCK) return;
#pragma unroll
    for (int i = 0; i < OCTET; i++) {
        put(m, out, b, is_M, j / OCTET * OCTET + i, j, sum[i]);
        if (j >= OCTET) put(m, out, b, is_M, i, j, 0.0f);
    }
}

/* Turn the decays of tokens into products from the start and to the end of their octets. */
__device__ void multiply_decays(prepare_memory &m)
{
    const int channel = threadIdx.x % KDA_K;
#pragma unroll
    for (int n = 0; n < OCTETS / 2; n++) {
        const int start = (threadIdx.x / KDA_K * (OCTETS / 2) + n) * OCTET;
        float a[OCTET], product = 1;
#pragma unroll
        for (int i = 0; i < OCTET; i++) a[i] = m.from_start[start + i][channel];
#pragma unroll
        for (int i = 0; i < OCTET; i++) m.from_start[start + i][channel] = product *= a[i];
        product = 1;
#pragma unroll
        for (int i = OCTET - 1; i >= 0; i--) {
            m.to_end[start + i][channel] = product;
            product *= a[i];
        }
    }
}

/* From products over octets to products over blocks. */
__device__ void join_octets(prepare_memory &m)
{
    const int channel = threadIdx.x % KDA_K;
#pragma unroll
    for (int n = 0; n < BLOCKS / 2; n++) {
        const int b = threadIdx.x / KDA_K * (BLOCKS / 2) + n, start = b * KDA_BLOCK;
        const float first = m.from_start[start + OCTET - 1][channel];
        const float second = m.from_start[start + KDA_BLOCK - 1][channel];
#pragma unroll
        for (int i = 0; i < OCTET; i++) {
            m.to_end[start + i][channel] *= second;
            m.from_start[start + OCTET + i][channel] *= first;
        }
        m.block[b][channel] = first * second;
    }
}

__device__ uint32_t to_tf32(float x)
{
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

/* The octet of a diagonal block that lies below its diagonal, by the two warps of the block;
 * the upper half of the tensor core's rows is idle. */
__device__ void lower_octet(prepare_memory &m, kda_chunk &out)
{
    const int b = warp_id() / 2, column = b * KDA_BLOCK + lane_id() / 4, row = column + OCTET;
    const bool is_M = warp_id() % 2;
    const bf16(*x)[PITCH16] = is_M ? m.q : m.k;
    float sum[4] = {};
#pragma unroll 4
    for (int step = 0; step < KDA_K / 8; step++) {
        const int d = 8 * step + lane_id() % 4;
        const uint32_t left[4] = {0, to_tf32(to_float(x[row][d]) * m.from_start[row][d]), 0,
                                  to_tf32(to_float(x[row][d + 4]) * m.from_start[row][d + 4])};
        const uint32_t right[2] = {
            to_tf32(to_float(m.k[column][d]) * m.to_end[column][d]),
            to_tf32(to_float(m.k[column][d + 4]) * m.to_end[column][d + 4])};
        mma_tf32(sum, left, right);
    }
    const int i = OCTET + lane_id() / 4, j = 2 * (lane_id() % 4);
    put(m, out, b, is_M, i, j, sum[2]);
    put(m, out, b, is_M, i, j + 1, sum[3]);
}

/* Block row of a pair 0 .. 5 of blocks below the diagonal, row by row. */
__device__ int pair_row(int pair)
{
    return pair < 1 ? 1 : pair < 3 ? 2 : 3;
}

/* The products of whole blocks between column block b and row block r. */
__device__ float between(const prepare_memory &m, int r, int b, int channel)
{
    float product = 1;
    for (int i = b + 1; i < r; i++) product *= m.block[i][channel];
    return product;
}

/* Sums over channels of a pair of blocks: k_i k_j and q_i k_j, each with the decays from j to
 * the end of its block, between the blocks, and from the start of i's block to i. */
__device__ void pair_sums(const prepare_memory &m, int r, int b, float (&kk)[2][4],
                          float (&qk)[2][4])
{
    const int row = r * KDA_BLOCK + lane_id() / 4, column = b * KDA_BLOCK + lane_id() / 4;
#pragma unroll 2
    for (int step = 0; step < KDA_K / 8; step++) {
        uint32_t k[4], q[4], right[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int d = 8 * step + lane_id() % 4 + i / 2 * 4, y = row + i % 2 * 8;
            const float decay = m.from_start[y][d];
            k[i] = to_tf32(to_float(m.k[y][d]) * decay);
            q[i] = to_tf32(to_float(m.q[y][d]) * decay);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int d = 8 * step + lane_id() % 4 + 4 * i;
            const float middle = between(m, r, b, d);
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const int y = column + 8 * t;
                right[t][i] = to_tf32(to_float(m.k[y][d]) * (m.to_end[y][d] * middle));
            }
        }
#pragma unroll
        for (int t = 0; t < 2; t++) mma_tf32(kk[t], k, right[t]), mma_tf32(qk[t], q, right[t]);
    }
}

__device__ void lower_block(prepare_memory &m, kda_chunk &out, int pair)
{
    const int r = pair_row(pair), b = pair - r * (r - 1) / 2;
    float kk[2][4] = {}, qk[2][4] = {};
    pair_sums(m, r, b, kk, qk);
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int i = lane_id() / 4 + 8 * half, j = 8 * t + 2 * (lane_id() % 4);
            const int row = r * KDA_BLOCK + i, column = b * KDA_BLOCK + j;
            const float x = m.k_factor[column], y = m.k_factor[column + 1];
            const float A = m.beta[row] * m.k_factor[row], M = m.q_factor[row];
            m.A[kda_block_of(r, b)][i][j] = kk[t][2 * half] * A * x;
            m.A[kda_block_of(r, b)][i][j + 1] = kk[t][2 * half + 1] * A * y;
            *reinterpret_cast<uint32_t *>(
                &out.M[row][8 * kda_swizzle(row, column / 8) + column % 8]) =
                pack_bf16(qk[t][2 * half] * M * x, qk[t][2 * half + 1] * M * y);
        }
}

/* ---- results ----------------------------------------------------------------------------- */

__device__ void multiply_by(float (&x)[4], const float *y)
{
    float f[4];
    load_floats(y, f);
#pragma unroll
    for (int c = 0; c < 4; c++) x[c] *= f[c];
}

__device__ void store_scaled(bf16 *to, const bf16 *x, float factor, const float (&decay)[4])
{
    float y[4];
    load_floats(x, y);
#pragma unroll
    for (int c = 0; c < 4; c++) y[c] = y[c] * factor * decay[c];
    store_floats(to, y);
}

/* Four neighbouring channels of one token. */
__device__ void write_operands(const prepare_memory &m, kda_chunk &out, int row, int d)
{
    const int b = row / KDA_BLOCK, at = 8 * kda_swizzle(row, d / 8) + d % 8;
    float E[4], F[4];
    load_floats(&m.from_start[row][d], E);
    load_floats(&m.to_end[row][d], F);
    for (int i = 0; i < b; i++) multiply_by(E, &m.block[i][d]);
    for (int i = b + 1; i < BLOCKS; i++) multiply_by(F, &m.block[i][d]);
    store_scaled(&out.q_decayed[row][at], &m.q[row][d], m.q_factor[row], E);
    store_scaled(&out.k_decayed[row][at], &m.k[row][d], m.k_factor[row], E);
    store_scaled(&out.k_left[row][at], &m.k[row][d], m.k_factor[row], F);
}

__device__ void write_all_operands(const prepare_memory &m, kda_chunk &out)
{
    constexpr int QUADS = KDA_K / 4;
    for (int i = threadIdx.x; i < KDA_TOKENS * QUADS; i += THREADS)
        write_operands(m, out, i / QUADS, i % QUADS * 4);
    if (threadIdx.x < KDA_TOKENS) out.beta[threadIdx.x] = m.beta[threadIdx.x];
}

/* ---- the kernel -------------------------------------------------------------------------- */

/* The sequence that a chunk's number falls to: the last n with kda_first_chunk(n) <= number. */
__device__ long long sequence_of(const int *cu, long long N, long long number)
{
    return last_begun(N, [&](long long n) { return kda_first_chunk(cu, n) <= number; });
}

__global__ __launch_bounds__(THREADS,
                             2) void kda_prepare_kernel(__grid_constant__ const kda_arguments a,
                                                        __grid_constant__ const kda_window w,
                                                        long long N)
{
    extern __shared__ __align__(128) unsigned char bytes[];
    prepare_memory &m = *reinterpret_cast<prepare_memory *>(bytes);
    const long long h = blockIdx.x % a.H, number = w.first + blockIdx.x / a.H;
    const long long n = sequence_of(a.cu, N, number);
    const long long token = a.cu[n] + (number - kda_first_chunk(a.cu, n)) * KDA_TOKENS;
    const long long left = a.cu[n + 1] - token;
    const int tokens = static_cast<int>(left < KDA_TOKENS ? left : KDA_TOKENS);
    if (tokens <= 1) return; /* no chunk, or one that kda_scan takes as a single token */

    const long long offset = h / (a.H / a.Hk) * KDA_K;
    kda_chunk &out = w.chunks[blockIdx.x];
    fetch_rows(m.q, a.q, token, offset, tokens);
    fetch_rows(m.k, a.k, token, offset, tokens);
    copy_commit();
    read_betas(a, token, h, tokens, m);
    read_decays(a, token, h, tokens, m);
    copy_wait<0>();
    __syncthreads();
    find_factors(a, m);
    write_chunk_decay(m, out);
    __syncthreads();
    diagonal_octets(m, out);
    __syncthreads();
    multiply_decays(m);
    __syncthreads();
    lower_octet(m, out);
    __syncthreads();
    join_octets(m);
    __syncthreads();
    if (warp_id() < PAIRS) lower_block(m, out, warp_id());
    __syncthreads();
    write_all_operands(m, out);
    __syncthreads();
    kda_inverse &inverse = *reinterpret_cast<kda_inverse *>(m.to_end); /* no longer needed */
    kda_invert(m.A, m.beta, inverse, out);
}

} // namespace

kl_status kda_prepare_window(const kda_arguments &a, long long N, const kda_window &w,
                             cudaStream_t stream, kl_error *err)
{
    constexpr int bytes = static_cast<int>(sizeof(prepare_memory));
    KL_CUDA_TRY(cudaFuncSetAttribute(kda_prepare_kernel,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                err);
    const unsigned blocks = static_cast<unsigned>(w.count * a.H);
    kda_prepare_kernel<<<blocks, THREADS, bytes, stream>>>(a, w, N);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}
