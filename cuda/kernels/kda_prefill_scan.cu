/*
 * kda_prefill_scan.cu -- chunked KDA prefill, second half: the state through prepared chunks.
 *
 * Computes     U = X (V - (E k) S^T);  O = scale (E q) S^T + M U;
 *              S <- S diag(E_last) + U^T (F k), for each chunk in turn: see kda_prefill.cuh
 * Shapes       chunks [count, H] of 64 tokens; v, out [T, H, V]; state [S, H, V, 128]; 32 | V
 * Layout       everything transposed, [V, tokens] and [V, K]: then the accumulators of one
 *              product are, register for register, the left operand of the next
 * Precision    state and sums f32. The state enters products as the sum of two bf16, which keep
 *              16 bits of it, and so does U on its way into the state, where errors last. X
 *              is in two parts as well, its diagonal, beta, applied in f32.
 * Grid         one block for each sequence, head and 16 * WARPS rows of the state. A warp owns
 *              16 rows from the first chunk to the last, in registers; warps share operands and
 *              nothing else. Chunks arrive in two stages, each by one bulk copy.
 * Roofline     operands 75,008 B a chunk and head, from L2 once a block: 1.2 KB a token and
 *              head; the chain is 444 m16n8k16 a chunk and warp, about 1.6 us
 * Measured     H100, busy with another job: 0.34 ms for 8,192 tokens of 32 heads (2026-11-22,
 *              before U had a second part)
 */
#include "../device/mma.cuh"
#include "kda_prefill.cuh"

namespace {

constexpr int STAGES = 2;
constexpr int ROWS = 16;        /* of the state, a warp's                            */
constexpr int PITCH = ROWS + 8; /* of a token's values; 48 bytes: no bank conflicts  */
constexpr int TOKEN_TILES = KDA_TOKENS / 8, K_TILES = KDA_K / 8;
constexpr int STEPS = KDA_TOKENS / 16, K_STEPS = KDA_K / 16; /* of a product, 16 deep */

using values = bf16[KDA_TOKENS][PITCH];

template <int WARPS> struct scan_memory {
    kda_chunk chunk[STAGES];
    values v[STAGES][WARPS]; /* a warp's columns of v, then of out */
    kda_head head;           /* of a last chunk of one token */
    unsigned long long full[STAGES];
};

/* The chunks of a sequence that lie in a window. */
struct span {
    long long begin, end;      /* tokens of the sequence in this call */
    long long first, count;    /* chunks, from the sequence's own first */
    const kda_chunk *prepared; /* chunk `first`; the next are `step` apart */
    long long step;
    bool single; /* a chunk of one token follows them, within the window */
};

__device__ span span_of(const kda_arguments &a, const kda_window &w, long long n, long long h)
{
    const long long number = kda_first_chunk(a.cu, n);
    span s = {.begin = a.cu[n], .end = a.cu[n + 1]};
    const long long tokens = s.end - s.begin;
    const long long chunks = (tokens + KDA_TOKENS - 1) / KDA_TOKENS;
    s.first = w.first > number ? w.first - number : 0;
    const long long stop = w.first + w.count - number; /* of the window */
    const long long last = chunks < stop ? chunks : stop;
    s.single = tokens % KDA_TOKENS == 1 && last == chunks && s.first < chunks;
    s.count = last - s.first - (s.single ? 1 : 0);
    s.prepared = w.chunks + (number + s.first - w.first) * a.H + h;
    s.step = a.H;
    return s;
}

/* ---- copies ------------------------------------------------------------------------------ */

__device__ void barrier_init(unsigned long long *barrier)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
}

/* One thread: announce the bytes, then start the copy that brings them. */
__device__ void fetch_chunk(kda_chunk *to, const kda_chunk *from, unsigned long long *barrier)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(static_cast<unsigned>(sizeof(kda_chunk)))
        : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(static_cast<unsigned>(sizeof(kda_chunk))),
                 "r"(shared_address(barrier))
                 : "memory");
}

__device__ void barrier_wait(unsigned long long *barrier, unsigned parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

/* A warp's 16 columns of up to 64 tokens; zeros past the last token. */
__device__ void fetch_values(values &to, const bf16 *from, long long stride, int tokens)
{
#pragma unroll
    for (int i = 0; i < 2 * KDA_TOKENS / WARP; i++) {
        const int piece = i * WARP + lane_id(), row = piece / 2, half = piece % 2;
        const bool inside = row < tokens;
        copy_async(&to[row][8 * half], from + (inside ? row : 0) * stride + 8 * half, inside);
    }
}

__device__ void store_values(bf16 *to, long long stride, const values &from, int tokens)
{
#pragma unroll
    for (int i = 0; i < 2 * KDA_TOKENS / WARP; i++) {
        const int piece = i * WARP + lane_id(), row = piece / 2, half = piece % 2;
        if (row < tokens)
            *reinterpret_cast<uint4 *>(to + row * stride + 8 * half) =
                *reinterpret_cast<const uint4 *>(&from[row][8 * half]);
    }
}

/* ---- fragments --------------------------------------------------------------------------- */

/* Right operands of two tiles of 8 columns (n), 16 deep (k), of a matrix stored [n, k]. */
template <int COLUMNS>
__device__ void load_right(uint32_t (&b)[4], const bf16 (*m)[COLUMNS], int n, int k)
{
    const int i = lane_id() % 8, part = lane_id() / 8;
    const int row = n + part / 2 * 8 + i;
    ldmatrix(b, &m[row][8 * kda_swizzle(row, k / 8 + part % 2)]);
}

/* The same of a matrix stored [k, n]. */
template <int COLUMNS>
__device__ void load_right_transposed(uint32_t (&b)[4], const bf16 (*m)[COLUMNS], int n, int k)
{
    const int i = lane_id() % 8, part = lane_id() / 8;
    const int row = k + part % 2 * 8 + i;
    ldmatrix_transposed(b, &m[row][8 * kda_swizzle(row, n / 8 + part / 2)]);
}

__device__ void multiply(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[4])
{
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
    mma_bf16(c0, a, b0);
    mma_bf16(c1, a, b1);
}

/* Accumulators of two neighbouring tiles as a left operand, 16 deep. */
__device__ void to_left(uint32_t (&a)[4], const float (&c0)[4], const float (&c1)[4])
{
    a[0] = pack_bf16(c0[0], c0[1]);
    a[1] = pack_bf16(c0[2], c0[3]);
    a[2] = pack_bf16(c1[0], c1[1]);
    a[3] = pack_bf16(c1[2], c1[3]);
}

__device__ float low_half(uint32_t x)
{
    return __uint_as_float(x << 16);
}

__device__ float high_half(uint32_t x)
{
    return __uint_as_float(x & 0xffff0000u);
}

/* The same as a sum of two operands: the second is what the first rounds away. */
__device__ void to_left_pair(uint32_t (&high)[4], uint32_t (&low)[4], const float (&c0)[4],
                             const float (&c1)[4])
{
    to_left(high, c0, c1);
    low[0] = pack_bf16(c0[0] - low_half(high[0]), c0[1] - high_half(high[0]));
    low[1] = pack_bf16(c0[2] - low_half(high[1]), c0[3] - high_half(high[1]));
    low[2] = pack_bf16(c1[0] - low_half(high[2]), c1[1] - high_half(high[2]));
    low[3] = pack_bf16(c1[2] - low_half(high[3]), c1[3] - high_half(high[3]));
}

/* Where a lane finds, for 16 tokens from `token`, its row of the four 8 x 8 matrices that are
 * two tiles of a [V, tokens] accumulator. */
__device__ bf16 *tile_row(values &v, int token)
{
    const int i = lane_id() % 8, part = lane_id() / 8;
    return &v[token + part / 2 * 8 + i][part % 2 * 8];
}

__device__ void store_transposed(bf16 *row, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* ---- one chunk --------------------------------------------------------------------------- */

/* A warp's 16 rows of the state: tile t holds channels 8 t .. 8 t + 7. */
struct warp_state {
    float S[K_TILES][4];

    __device__ static float *at(float *state, int tile, int half)
    {
        return state + (lane_id() / 4 + 8 * half) * KDA_K + 8 * tile + 2 * (lane_id() % 4);
    }

    __device__ void read(float *state)
    {
#pragma unroll
        for (int t = 0; t < K_TILES; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 x = *reinterpret_cast<const float2 *>(at(state, t, half));
                S[t][2 * half] = x.x, S[t][2 * half + 1] = x.y;
            }
    }

    __device__ void write(float *state) const
    {
#pragma unroll
        for (int t = 0; t < K_TILES; t++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<float2 *>(at(state, t, half)) =
                    float2{S[t][2 * half], S[t][2 * half + 1]};
    }

    /* old = S (E k)^T, out = S (scale E q)^T. */
    __device__ void answer(const kda_chunk &c, float (&old)[TOKEN_TILES][4],
                           float (&out)[TOKEN_TILES][4]) const
    {
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
            uint32_t high[4], low[4], b[4];
            to_left_pair(high, low, S[2 * k], S[2 * k + 1]);
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; t += 2) {
                load_right(b, c.k_decayed, 8 * t, 16 * k);
                multiply(old[t], old[t + 1], high, b);
                multiply(old[t], old[t + 1], low, b);
                load_right(b, c.q_decayed, 8 * t, 16 * k);
                multiply(out[t], out[t + 1], high, b);
                multiply(out[t], out[t + 1], low, b);
            }
        }
    }

    /* S <- S diag(E_last) + U^T (F k), U as the sum of two operands. */
    __device__ void update(const kda_chunk &c, const uint32_t (&U)[STEPS][4],
                           const uint32_t (&U_low)[STEPS][4])
    {
#pragma unroll
        for (int t = 0; t < K_TILES; t += 2) {
#pragma unroll
            for (int j = t; j < t + 2; j++) {
                const int channel = 8 * j + 2 * (lane_id() % 4);
                const float2 d = *reinterpret_cast<const float2 *>(&c.decay[channel]);
                const float2 low = *reinterpret_cast<const float2 *>(&c.decay_low[channel]);
                S[j][0] = fmaf(S[j][0], d.x, S[j][0] * low.x);
                S[j][1] = fmaf(S[j][1], d.y, S[j][1] * low.y);
                S[j][2] = fmaf(S[j][2], d.x, S[j][2] * low.x);
                S[j][3] = fmaf(S[j][3], d.y, S[j][3] * low.y);
            }
#pragma unroll
            for (int k = 0; k < STEPS; k++) {
                uint32_t b[4];
                load_right_transposed(b, c.k_left, 8 * t, 16 * k);
                multiply(S[t], S[t + 1], U[k], b);
                multiply(S[t], S[t + 1], U_low[k], b);
            }
        }
    }
};

/* x <- V - x, the values as they lie in shared memory. */
__device__ void subtract_from_values(float (&x)[TOKEN_TILES][4], values &v)
{
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t += 2) {
        uint32_t r[4];
        ldmatrix_transposed(r, tile_row(v, 8 * t));
#pragma unroll
        for (int j = 0; j < 2; j++) {
            x[t + j][0] = low_half(r[2 * j]) - x[t + j][0];
            x[t + j][1] = high_half(r[2 * j]) - x[t + j][1];
            x[t + j][2] = low_half(r[2 * j + 1]) - x[t + j][2];
            x[t + j][3] = high_half(r[2 * j + 1]) - x[t + j][3];
        }
    }
}

__device__ void scale_by_beta(float (&x)[TOKEN_TILES][4], const kda_chunk &c)
{
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t++) {
        const float2 b =
            *reinterpret_cast<const float2 *>(&c.beta[8 * t + 2 * (lane_id() % 4)]);
        x[t][0] *= b.x, x[t][1] *= b.y, x[t][2] *= b.x, x[t][3] *= b.y;
    }
}

__device__ void to_left_operands(uint32_t (&a)[STEPS][4], const float (&x)[TOKEN_TILES][4])
{
#pragma unroll
    for (int k = 0; k < STEPS; k++) to_left(a[k], x[2 * k], x[2 * k + 1]);
}

/* x += a m^T, with m lower triangular in blocks of 16. */
__device__ void add_lower(float (&x)[TOKEN_TILES][4], const uint32_t (&a)[STEPS][4],
                          const bf16 (*m)[KDA_TOKENS])
{
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
        for (int t = 2 * k; t < TOKEN_TILES; t += 2) {
            uint32_t b[4];
            load_right(b, m, 8 * t, 16 * k);
            multiply(x[t], x[t + 1], a[k], b);
        }
}

__device__ void put_values(values &v, const float (&x)[TOKEN_TILES][4])
{
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; t += 2) {
        const uint32_t r[4] = {pack_bf16(x[t][0], x[t][1]), pack_bf16(x[t][2], x[t][3]),
                               pack_bf16(x[t + 1][0], x[t + 1][1]),
                               pack_bf16(x[t + 1][2], x[t + 1][3])};
        store_transposed(tile_row(v, 8 * t), r);
    }
}

/* A warp takes its rows through a chunk; `v` holds its values and then its outputs. */
__device__ void run_chunk(warp_state &state, const kda_chunk &c, values &v)
{
    float U[TOKEN_TILES][4] = {}, out[TOKEN_TILES][4] = {};
    uint32_t operand[STEPS][4], low[STEPS][4];
    state.answer(c, U, out);
    subtract_from_values(U, v);
    to_left_operands(operand, U);
    scale_by_beta(U, c);
    add_lower(U, operand, c.X);
    add_lower(U, operand, c.X_low);
#pragma unroll
    for (int k = 0; k < STEPS; k++) to_left_pair(operand[k], low[k], U[2 * k], U[2 * k + 1]);
    add_lower(out, operand, c.M);
    __syncwarp();
    put_values(v, out);
    state.update(c, operand, low);
    __syncwarp();
}

/* ---- the kernel -------------------------------------------------------------------------- */

template <int WARPS>
__device__ void run_chunks(const kda_arguments &a, const span &s, long long h, long long row,
                           float *state, scan_memory<WARPS> &m)
{
    const bf16 *v = static_cast<const bf16 *>(a.v.data) + h * a.V + row;
    bf16 *out = static_cast<bf16 *>(a.out) + h * a.V + row;
    const auto token = [&](long long c) { return s.begin + (s.first + c) * KDA_TOKENS; };
    const auto tokens = [&](long long c) {
        const long long left = s.end - token(c);
        return static_cast<int>(left < KDA_TOKENS ? left : KDA_TOKENS);
    };
    const auto fetch = [&](long long c) {
        const int stage = static_cast<int>(c % STAGES);
        if (c < s.count && threadIdx.x == 0)
            fetch_chunk(&m.chunk[stage], s.prepared + c * s.step, &m.full[stage]);
        if (c < s.count)
            fetch_values(m.v[stage][warp_id()], v + token(c) * a.v.stride, a.v.stride,
                         tokens(c));
        copy_commit();
    };

    for (int c = 0; c < STAGES; c++) fetch(c);
    warp_state warp;
    warp.read(state);
    for (long long c = 0; c < s.count; c++) {
        const int stage = static_cast<int>(c % STAGES);
        copy_wait<STAGES - 1>();
        __syncwarp();
        barrier_wait(&m.full[stage], static_cast<unsigned>(c / STAGES % 2));
        run_chunk(warp, m.chunk[stage], m.v[stage][warp_id()]);
        store_values(out + token(c) * a.H * a.V, a.H * a.V, m.v[stage][warp_id()], tokens(c));
        __syncthreads(); /* every warp has read the stage */
        fetch(c + STAGES);
    }
    warp.write(state);
}

/* A last chunk of one token: kda_decode's arithmetic. */
template <int WARPS>
__device__ void run_single(const kda_arguments &a, long long token, long long h,
                           long long first, float *state, kda_head &head)
{
    using warp_rows = kda_rows<4, 1, 8>;
    kda_prepare(a, token, h, head);
    for (int half = 0; half < 2; half++) {
        const long long row = first + 8 * half;
        warp_rows rows;
        float v[8];
        rows.read(a, state, row);
        warp_rows::read_v(a, token, h, row, v);
        rows.step(a, token, h, row, head, v);
        rows.write(a, state, row);
    }
}

template <int WARPS>
__global__
__launch_bounds__(WARPS *WARP) void kda_scan_kernel(__grid_constant__ const kda_arguments a,
                                                    __grid_constant__ const kda_window w)
{
    extern __shared__ __align__(128) unsigned char bytes[];
    scan_memory<WARPS> &m = *reinterpret_cast<scan_memory<WARPS> *>(bytes);
    const long long tile = blockIdx.x % a.tiles, unit = blockIdx.x / a.tiles;
    const long long n = unit / a.H, h = unit % a.H;
    const span s = span_of(a, w, n, h);
    if (s.count <= 0 && !s.single) return;

    const long long slot = a.slots == nullptr ? n : a.slots[n];
    const long long row = (tile * WARPS + warp_id()) * ROWS;
    float *state = a.state + (slot * a.H + h) * a.V * a.K;
    if (s.count > 0) {
        if (threadIdx.x == 0)
            for (int i = 0; i < STAGES; i++) barrier_init(&m.full[i]);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        __syncthreads();
        run_chunks<WARPS>(a, s, h, row, state + row * a.K, m);
    }
    if (!s.single) return;
    __syncthreads(); /* the state in memory is whole */
    run_single<WARPS>(a, s.end - 1, h, row, state, m.head);
}

template <int WARPS>
kl_status launch(kda_arguments a, long long N, const kda_window &w, cudaStream_t stream,
                 kl_error *err)
{
    const auto kernel = kda_scan_kernel<WARPS>;
    constexpr int bytes = static_cast<int>(sizeof(scan_memory<WARPS>));
    unsigned blocks;
    KL_TRY(kda_grid("kda_prefill", a, N, WARPS * ROWS, &blocks, err));
    KL_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), err);
    kernel<<<blocks, WARPS * WARP, bytes, stream>>>(a, w);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

} // namespace

/* Two warps a block spread one sequence of 32 heads over 128 multiprocessors; with more heads
 * or sequences, four read each prepared chunk half as often. A row's bits are the same. */
kl_status kda_scan_window(const kda_arguments &a, long long N, const kda_window &w,
                          cudaStream_t stream, kl_error *err)
{
    constexpr long long MANY = 64; /* units that fill half of the device */
    if (a.V % (4 * ROWS) == 0 && N * a.H >= MANY) return launch<4>(a, N, w, stream, err);
    return launch<2>(a, N, w, stream, err);
}
