/*
 * mla_decode_tensor.cu -- mla_decode's attention of the splits on tensor cores.
 *
 * Computes     max, sum and context of the scores of 32 heads over each split's pages; see
 *              mla_arguments
 * Shapes       query [N, H, 576]; pages [P, 64, 576] bf16; context [N, splits, H, 512]
 * Layout       dense, pages at multiples of 16 bytes
 * Precision    the query as a sum of two bf16 (16 bits), probabilities in bf16 (and their sum
 *              of the rounded ones), f32 scores, sums and results
 * Grid         persistent blocks, one a multiprocessor, take (row, split) items in turn. Two
 *              pages in shared memory: one is used, one on its way. Of a page's scores a warp
 *              makes 32 tokens over a quarter of the channels, its query's fragments staying in
 *              registers; 8 threads a head add the quarters and take the softmax; of the context
 *              a warp keeps 64 channels in registers
 * Order        pages of a split in turn; within a page the quarters in order
 * Roofline     1152 bytes a token at 2 * 32 * (2 * 576 + 512) flops, 92 flop/byte: memory-bound,
 *              50 us for 128K tokens at 3.0 TB/s
 * Measured     H100 beside another job: 77 us (best 72) for 128K tokens of one sequence, 2.0 TB/s,
 *              65 % of roofline; 14 us for 1K; 377 us for 64 sequences of 8K (2026-11-22)
 */
#include "../device/launch.cuh"
#include "../device/mla.cuh"
#include "../device/mma.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int RANK = 512, ROPE = 64, WIDTH = RANK + ROPE;
constexpr int HEADS = 32; /* of a block: two tiles of 16 rows */
constexpr int TOKENS = KL_PAGE_TOKENS;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int QUARTERS = 4;                  /* of the channels of a score */
constexpr int STEPS = WIDTH / 16 / QUARTERS; /* of 16 channels, in a quarter */
constexpr int SCORE_TOKENS = TOKENS / 2;     /* of a warp: eight warps, four quarters */
constexpr int CONTEXT_COLS = RANK / WARPS;   /* of a warp */
constexpr int ROW_THREADS = THREADS / HEADS; /* that share the softmax of a head */
constexpr int PIECES = WIDTH / 8;            /* of 16 bytes, in a row of a page */

/* Rows are padded so that the eight rows of an ldmatrix, and the lanes of a fragment's store,
 * meet different banks. */
struct shared_memory {
    bf16 page[2][TOKENS][WIDTH + 8];
    float scores[QUARTERS][HEADS][TOKENS + 8];
    bf16 weights[HEADS][TOKENS + 8];
    uint4 query_low[QUARTERS][STEPS][2][WARP]; /* fragments of the query's lower half */
    float keep[HEADS];
};
static_assert(sizeof(shared_memory) <= 227 * 1024);

/* One block's part of the work: pages first .. end - 1 of row n. */
struct item {
    long long n, split, first, end, length;
};

/* Items are numbered row by row. The rows before `n` hold `base` of them; the search goes on
 * from there, 32 rows at a time, and every warp makes it for itself. */
struct item_search {
    long long n, base;

    __device__ bool find(const mla_arguments &a, long long number, item *out)
    {
        for (; n < a.N; n += WARP) {
            const long long row = n + lane_id();
            const mla_cut cut(row < a.N ? a.lengths[row] : 0, a.fine);
            int before = static_cast<int>(cut.count);
#pragma unroll
            for (int d = 1; d < WARP; d *= 2) {
                const int left = __shfl_up_sync(ALL_LANES, before, d);
                if (lane_id() >= d) before += left;
            }
            const int all = __shfl_sync(ALL_LANES, before, WARP - 1);
            const unsigned found = __ballot_sync(ALL_LANES, number < base + before);
            if (found != 0) {
                take(cut, row, number - (base + before - cut.count), __ffs(found) - 1, out);
                return true;
            }
            base += all;
        }
        return false;
    }

    /* Lane `from` has the row and the split. */
    static __device__ void take(const mla_cut &cut, long long row, long long split, int from,
                                item *out)
    {
        const long long first = split * cut.size;
        const long long end = first + cut.size < cut.pages ? first + cut.size : cut.pages;
        out->n = __shfl_sync(ALL_LANES, row, from);
        out->split = __shfl_sync(ALL_LANES, split, from);
        out->first = __shfl_sync(ALL_LANES, first, from);
        out->end = __shfl_sync(ALL_LANES, end, from);
        out->length = __shfl_sync(ALL_LANES, cut.length, from);
    }
};

/* Rows past the length become zeros: what lies there may be NaN. */
__device__ void copy_page(const mla_arguments &a, const item &it, long long p,
                          bf16 (*to)[WIDTH + 8])
{
    const long long id = a.block_table[it.n * a.B + p];
    const long long left = it.length - p * TOKENS;
    const bf16 *from = static_cast<const bf16 *>(a.pages) + id * TOKENS * WIDTH;
#pragma unroll 6
    for (int i = threadIdx.x; i < TOKENS * PIECES; i += THREADS) {
        const int token = i / PIECES, piece = i % PIECES;
        copy_async(&to[token][piece * 8], from + token * WIDTH + piece * 8, token < left);
    }
}

struct query_fragments {
    uint32_t high[STEPS][2][4];
};

__device__ uint32_t lower_half(float2 x, uint32_t high)
{
    const __nv_bfloat162 h = *reinterpret_cast<const __nv_bfloat162 *>(&high);
    return pack_bf16(x.x - __low2float(h), x.y - __high2float(h));
}

/* The fragments of this warp's quarter; the lower half, which two warps share, to memory. */
__device__ void load_query(const mla_arguments &a, long long n, long long h0,
                           query_fragments &q, shared_memory &s)
{
    const int quarter = warp_id() % QUARTERS;
#pragma unroll
    for (int step = 0; step < STEPS; step++)
#pragma unroll
        for (int m = 0; m < 2; m++) {
            uint32_t low[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const long long h = h0 + m * 16 + i % 2 * 8 + lane_id() / 4;
                const int k = (quarter * STEPS + step) * 16 + i / 2 * 8 + lane_id() % 4 * 2;
                float2 x = {0, 0};
                if (h < a.H)
                    x = *reinterpret_cast<const float2 *>(a.query + (n * a.H + h) * WIDTH + k);
                q.high[step][m][i] = pack_bf16(x.x, x.y);
                low[i] = lower_half(x, q.high[step][m][i]);
            }
            if (warp_id() < QUARTERS)
                s.query_low[quarter][step][m][lane_id()] = {low[0], low[1], low[2], low[3]};
        }
}

/* Scores of 32 heads and 32 tokens over a quarter of the channels. */
__device__ void score_page(const bf16 (*page)[WIDTH + 8], const query_fragments &q,
                           shared_memory &s)
{
    const int quarter = warp_id() % QUARTERS, lane = lane_id();
    const int first = warp_id() / QUARTERS * SCORE_TOKENS;
    const bf16 *from =
        &page[first + lane / 16 * 8 + lane % 8][quarter * STEPS * 16 + lane / 8 % 2 * 8];
    float acc[2][SCORE_TOKENS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        uint32_t low[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const uint4 l = s.query_low[quarter][step][m][lane];
            low[m][0] = l.x, low[m][1] = l.y, low[m][2] = l.z, low[m][3] = l.w;
        }
#pragma unroll
        for (int t = 0; t < SCORE_TOKENS / 16; t++) {
            uint32_t r[4];
            ldmatrix(r, from + t * 16 * (WIDTH + 8) + step * 16);
            const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    mma_bf16(acc[m][t * 2 + j], low[m], b[j]);
                    mma_bf16(acc[m][t * 2 + j], q.high[step][m], b[j]);
                }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int t = 0; t < SCORE_TOKENS / 8; t++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                *reinterpret_cast<float2 *>(&s.scores[quarter][m * 16 + i * 8 + lane / 4]
                                                     [first + t * 8 + lane % 4 * 2]) =
                    float2{acc[m][t][2 * i], acc[m][t][2 * i + 1]};
}

/* What the threads of a head carry from page to page, each of them the same. */
struct softmax_state {
    float max, sum;
};

/* A thread's tokens are 4 l .. 4 l + 3 and 32 more, l its place among the eight of its head. */
__device__ void softmax_page(long long left, softmax_state &state, shared_memory &s)
{
    const int row = threadIdx.x / ROW_THREADS, l = threadIdx.x % ROW_THREADS;
    float x[2][4];
    float top = state.max;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int token = j * 32 + l * 4;
        float4 sum = {0, 0, 0, 0};
#pragma unroll
        for (int g = 0; g < QUARTERS; g++) {
            const float4 y = *reinterpret_cast<const float4 *>(&s.scores[g][row][token]);
            sum.x += y.x, sum.y += y.y, sum.z += y.z, sum.w += y.w;
        }
        x[j][0] = sum.x, x[j][1] = sum.y, x[j][2] = sum.z, x[j][3] = sum.w;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (token + i >= left) x[j][i] = -INFINITY;
            top = fmaxf(top, x[j][i]);
        }
    }
    top = warp_max<ROW_THREADS>(top);
    const float keep = exp2f(state.max - top);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const __nv_bfloat162 w =
                __floats2bfloat162_rn(exp2f(x[j][i] - top), exp2f(x[j][i + 1] - top));
            *reinterpret_cast<__nv_bfloat162 *>(&s.weights[row][j * 32 + l * 4 + i]) = w;
            sum += __low2float(w) + __high2float(w);
        }
    state.sum = state.sum * keep + warp_sum<ROW_THREADS>(sum);
    state.max = top;
    if (l == 0) s.keep[row] = keep;
}

typedef float context_sums[2][CONTEXT_COLS / 8][4];

/* context = keep context + weights c, for 32 heads and this warp's 64 channels. */
__device__ void add_context(const bf16 (*page)[WIDTH + 8], const shared_memory &s,
                            context_sums &acc)
{
    const int lane = lane_id(), first = warp_id() * CONTEXT_COLS;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const float keep[2] = {s.keep[m * 16 + lane / 4], s.keep[m * 16 + 8 + lane / 4]};
#pragma unroll
        for (int c = 0; c < CONTEXT_COLS / 8; c++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][c][i] *= keep[i / 2];
    }
    const bf16 *latents = &page[lane % 16][first + lane / 16 * 8];
    const bf16 *weights = &s.weights[lane % 16][lane / 16 * 8];
#pragma unroll
    for (int step = 0; step < TOKENS / 16; step++) {
        uint32_t w[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) ldmatrix(w[m], weights + m * 16 * (TOKENS + 8) + step * 16);
#pragma unroll
        for (int c = 0; c < CONTEXT_COLS / 16; c++) {
            uint32_t r[4];
            ldmatrix_transposed(r, latents + step * 16 * (WIDTH + 8) + c * 16);
            const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int j = 0; j < 2; j++) mma_bf16(acc[m][c * 2 + j], w[m], b[j]);
        }
    }
}

__device__ void store_results(const mla_arguments &a, const item &it, long long h0,
                              const softmax_state &state, const context_sums &acc)
{
    const long long at = (it.n * a.splits + it.split) * a.H;
    const long long mine = h0 + threadIdx.x / ROW_THREADS;
    if (threadIdx.x % ROW_THREADS == 0 && mine < a.H)
        a.max[at + mine] = state.max, a.sum[at + mine] = state.sum;
    const int col = warp_id() * CONTEXT_COLS + lane_id() % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const long long h = h0 + m * 16 + i * 8 + lane_id() / 4;
            if (h >= a.H) continue;
            float *to = a.context + (at + h) * RANK + col;
#pragma unroll
            for (int c = 0; c < CONTEXT_COLS / 8; c++)
                *reinterpret_cast<float2 *>(to + c * 8) =
                    float2{acc[m][c][2 * i], acc[m][c][2 * i + 1]};
        }
}

/* The first two pages are on their way while the query is made into fragments. A page's place
 * is filled again as soon as it is done with, while the other page may still be arriving. */
__device__ void attend_item(const mla_arguments &a, const item &it, long long h0,
                            shared_memory &s)
{
    query_fragments q;
    context_sums acc = {};
    softmax_state state = {-INFINITY, 0};
    for (int i = 0; i < 2; i++) {
        if (it.first + i < it.end) copy_page(a, it, it.first + i, s.page[i]);
        copy_commit();
    }
    load_query(a, it.n, h0, q, s);
    for (long long p = it.first; p < it.end; p++) {
        const int buffer = static_cast<int>(p - it.first) % 2;
        copy_wait<1>();
        __syncthreads(); /* the page is there for all */
        score_page(s.page[buffer], q, s);
        __syncthreads();
        softmax_page(it.length - p * TOKENS, state, s);
        __syncthreads();
        add_context(s.page[buffer], s, acc);
        __syncthreads(); /* nobody needs it any more */
        if (p + 2 < it.end) copy_page(a, it, p + 2, s.page[buffer]);
        copy_commit();
    }
    store_results(a, it, h0, state, acc);
}

__global__ __launch_bounds__(THREADS,
                             1) void mla_attend_tensor(__grid_constant__ const mla_arguments a)
{
    extern __shared__ __align__(16) char memory[];
    shared_memory &s = *reinterpret_cast<shared_memory *>(memory);
    const long long h0 = static_cast<long long>(blockIdx.y) * HEADS;
    item_search search = {0, 0};
    item it;
    let_next_start();
    wait_for_inputs();
    for (long long i = blockIdx.x; search.find(a, i, &it); i += gridDim.x)
        attend_item(a, it, h0, s);
}

} // namespace

bool kl_cuda_mla_tensor_fits(const mla_arguments &a, kl_dtype act)
{
    return act == KL_BF16 && a.rank == RANK && a.rope == ROPE && a.H <= 65535 * HEADS &&
           is_aligned(a.pages, 0, sizeof(bf16), 16);
}

kl_status kl_cuda_mla_attend_tensor(const mla_arguments &a, int multiprocessors,
                                    cudaStream_t stream, kl_error *err)
{
    const long long groups = mla_divide_up(a.H, HEADS), items = a.N * a.splits;
    const long long share = mla_divide_up(multiprocessors, groups);
    const dim3 grid(static_cast<unsigned>(items < share ? items : share),
                    static_cast<unsigned>(groups));
    constexpr int bytes = sizeof(shared_memory);
    KL_CUDA_TRY(cudaFuncSetAttribute(mla_attend_tensor,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                err);
    return kl_cuda_launch(mla_attend_tensor, grid, THREADS, bytes, stream, err, a);
}
