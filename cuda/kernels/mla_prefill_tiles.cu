/*
 * mla_prefill_tiles.cu -- latent attention of many new tokens in the plain form.
 *
 * Computes     k = [W_UK c | k_pe],  v = W_UV c,  o = softmax(scale q k^T) v, causal
 * Shapes       q [T, H, 128+64], pages [P, 64, rank+64], w_kv_b [H, 256, rank],
 *              out [T, H, 128]; rank a multiple of 64
 * Layout       rows of q may be strided, everything else dense; 16-byte pieces
 * Precision    bf16 in; k, v and the softmax's weights are rounded to bf16, sums are f32
 * Grid         as many blocks as fit the device at once. The pages of all contexts, one after
 *              the other, pass in windows: the blocks make k and v of a window (tiles of 128 x
 *              128), wait for each other, and attend to it: a block takes 128 queries of a head
 *              from a counter, head by head, so that a head's window stays in the L2. Where a
 *              context goes on, the maxima and sums wait in f32 for the next window
 * Order        32 keys at a time from position 0 on, whatever the windows and the batch are. A
 *              latent that is not finite spoils the queries before it in its run of 32, too
 * Roofline     640 flops for each query, head and key it sees, 512 rank for each key of a head:
 *              0.69 TFLOP for 8192 tokens and 32 heads, 0.70 ms on an H100 at 990 TFLOP/s, of
 *              which mma.sync reaches about 60 %
 * Measured     H100, H = 32, before 8-bit pages: 8192 tokens alone in 2.43 ms (311 TFLOP/s); on
 *              24576 14.8 ms (326 TFLOP/s, 33 % of roofline), beside another job (2026-11-22)
 */
#include "mla_prefill_expand.cuh"

#include <cooperative_groups.h>
#include <math.h>

namespace {

constexpr int QUERIES = MLA_QUERIES;
constexpr int WARP_ROWS = QUERIES / WARPS; /* two fragments: each key read feeds both */
constexpr int KEYS = 32;                   /* a softmax's: 64 leave no register to load ahead */

typedef float score_sums[2][KEYS / 8][4];

/* Shared memory: queries, two pages of keys, one of values. */
constexpr int KEYS_AT = QUERIES * QK;
constexpr int VALUES_AT = KEYS_AT + 2 * PAGE * QK;
constexpr int SHARED = VALUES_AT + PAGE * V; /* elements */
static_assert(STAGES * STAGE <= SHARED, "the expansion fits what attention needs");

/* A tile of queries of one head against a run of pages. */
struct task {
    int base;       /* position of its first row, a multiple of QUERIES */
    int begin, end; /* positions that exist: [begin, end)               */
    int token_shift;
    int h;
    int page, page_end; /* of the sequence's pages, those in this window    */
    int in_window;      /* number of `page` there                           */
    bool resumed, ends;
};

/* A lane's rows r, r + 8 of both fragments of its warp: index 2 m + half. */
struct rows_state {
    float x[2][16][4];
    float max[4], sum[4];
};

__device__ int row_of(int i)
{
    return warp_id() * WARP_ROWS + i / 2 * 16 + i % 2 * 8 + lane_id() / 4;
}

__device__ void load_queries(const mla_call &a, const task &t, bf16 *shared)
{
    const bf16 *q = static_cast<const bf16 *>(a.q) + t.h * QK;
    for (int i = threadIdx.x; i < QUERIES * (QK / PIECE); i += THREADS) {
        const int row = i / (QK / PIECE), piece = i % (QK / PIECE), position = t.base + row;
        const bool inside = position >= t.begin && position < t.end;
        const long long token = inside ? position + t.token_shift : 0;
        copy_async(at<QK>(shared, row, piece), q + token * a.q_stride + piece * PIECE, inside);
    }
}

/* Page number `page` of the window. */
__device__ void load_keys(const mla_window &window, int h, int page, bf16 *to)
{
    const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    const bf16 *key =
        window.keys + ((h * window.pages + page) * PAGE + row) * NOPE + piece * PIECE;
    const bf16 *k_pe =
        window.k_pe + (static_cast<long long>(page) * PAGE + row) * ROPE + piece * PIECE;
    to = at<QK>(to, row, piece);
#pragma unroll
    for (int i = 0; i < PAGE; i += 16) {
        copy_async(to + i * QK, key + i * NOPE, true);
        copy_async(to + i * QK + 8 * PIECE, key + i * NOPE + 8 * PIECE, true);
        copy_async(to + i * QK + 16 * PIECE, k_pe + i * ROPE, true);
    }
}

__device__ void load_values(const mla_window &window, int h, int page, bf16 *to)
{
    const int row = threadIdx.x / 16, piece = threadIdx.x % 16;
    const bf16 *value =
        window.values + ((h * window.pages + page) * PAGE + row) * V + piece * PIECE;
    to = at<V>(to, row, piece);
#pragma unroll
    for (int i = 0; i < PAGE; i += 8) copy_async(to + i * V, value + i * V, true);
}

/* scores <- q k^T, a warp's 32 queries by KEYS keys. */
__device__ void score(bf16 *queries, bf16 *keys, score_sums &scores)
{
    constexpr int ROWS = 16 * QK * sizeof(bf16); /* bytes of 16 of them */
    const uint32_t q_start = start_a<QK>(queries + warp_id() * WARP_ROWS * QK);
    const uint32_t k_start = start_b<QK>(keys);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) scores[m][n][j] = 0;
#pragma unroll
    for (int k = 0; k < QK / 16; k++) {
        uint32_t q[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) load_fragment(q[m], step(q_start, k) + m * ROWS);
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            uint32_t b[4];
            load_fragment(b, step(k_start, k) + n * ROWS);
#pragma unroll
            for (int m = 0; m < 2; m++)
                mma_pair(scores[m][2 * n], scores[m][2 * n + 1], q[m], b);
        }
    }
}

/* Positions after a query's own: no weight, whatever the score. */
__device__ void mask(int base, int first_key, score_sums &scores)
{
    const int column = first_key + lane_id() % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (column + n * 8 + j % 2 > base + row_of(2 * m + j / 2))
                    scores[m][n][j] = -INFINITY;
}

/* Late in a context maxima seldom change: then there is nothing to do, and nothing changes. */
__device__ void scale_rows(const float (&keep)[4], rows_state &s)
{
    const bool changes = keep[0] != 1 || keep[1] != 1 || keep[2] != 1 || keep[3] != 1;
    if (!__any_sync(ALL_LANES, changes)) return;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int n = 0; n < 16; n++)
            s.x[i / 2][n][i % 2 * 2] *= keep[i], s.x[i / 2][n][i % 2 * 2 + 1] *= keep[i];
}

/* Scores become weights 2^(factor (score - max)); what was summed before is scaled down. */
__device__ void soften(float factor, score_sums &scores, rows_state &s)
{
    float keeps[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int m = i / 2, half = i % 2 * 2;
        float best = s.max[i], sum = 0;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
            best = fmaxf(best, fmaxf(scores[m][n][half], scores[m][n][half + 1]));
        best = warp_max<4>(best);
        const float keep = power_of_2((s.max[i] - best) * factor), shift = best * factor;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = half; j < half + 2; j++) {
                scores[m][n][j] = power_of_2(fmaf(scores[m][n][j], factor, -shift));
                sum += scores[m][n][j];
            }
        s.sum[i] = fmaf(s.sum[i], keep, warp_sum<4>(sum));
        s.max[i] = best;
        keeps[i] = keep;
    }
    scale_rows(keeps, s);
}

/* x += weights v. */
__device__ void gather(bf16 *values, const score_sums &weights, rows_state &s)
{
    constexpr int ROWS = 16 * V * sizeof(bf16);
    const uint32_t start = start_a<V>(values);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        uint32_t p[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float(&w)[4] = weights[m][2 * k + j / 2];
                p[m][j] = pack_bf16(w[j % 2 * 2], w[j % 2 * 2 + 1]);
            }
#pragma unroll
        for (int n = 0; n < V / 16; n++) {
            uint32_t b[4];
            load_fragment_rows(b, step(start, n) + k * ROWS);
#pragma unroll
            for (int m = 0; m < 2; m++) mma_pair(s.x[m][2 * n], s.x[m][2 * n + 1], p[m], b);
        }
    }
}

/* ---- what waits between windows, and the result ------------------------------------------ */

__device__ void start_rows(rows_state &s)
{
#pragma unroll
    for (int i = 0; i < 4; i++) s.max[i] = -INFINITY, s.sum[i] = 0;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) s.x[m][n][j] = 0;
}

/* Number of a row in [T, H], or -1 where the tile has no token. */
__device__ long long find_row(const mla_call &a, const task &t, int i)
{
    const int position = t.base + row_of(i);
    if (position < t.begin || position >= t.end) return -1;
    return static_cast<long long>(position + t.token_shift) * a.H + t.h;
}

__device__ void resume_rows(const mla_call &a, const task &t, const mla_window &window,
                            rows_state &s)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const long long row = find_row(a, t, i);
        if (row < 0) continue;
        const float2 *x = reinterpret_cast<const float2 *>(window.x + row * V) + lane_id() % 4;
        /* Past the L1: another block may have written them. */
        s.max[i] = __ldcg(window.max_sum + 2 * row);
        s.sum[i] = __ldcg(window.max_sum + 2 * row + 1);
#pragma unroll
        for (int n = 0; n < 16; n++) {
            const float2 pair = __ldcg(x + n * 4);
            s.x[i / 2][n][i % 2 * 2] = pair.x, s.x[i / 2][n][i % 2 * 2 + 1] = pair.y;
        }
    }
}

__device__ void suspend_rows(const mla_call &a, const task &t, const mla_window &window,
                             const rows_state &s)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const long long row = find_row(a, t, i);
        if (row < 0) continue;
        float2 *x = reinterpret_cast<float2 *>(window.x + row * V) + lane_id() % 4;
        if (lane_id() % 4 == 0) {
            window.max_sum[2 * row] = s.max[i];
            window.max_sum[2 * row + 1] = s.sum[i];
        }
#pragma unroll
        for (int n = 0; n < 16; n++)
            x[n * 4] = {s.x[i / 2][n][i % 2 * 2], s.x[i / 2][n][i % 2 * 2 + 1]};
    }
}

__device__ void finish_rows(const mla_call &a, const task &t, const rows_state &s)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const long long row = find_row(a, t, i);
        if (row < 0) continue;
        uint32_t *out =
            reinterpret_cast<uint32_t *>(static_cast<bf16 *>(a.out) + row * V) + lane_id() % 4;
        const float inverse = 1 / s.sum[i];
#pragma unroll
        for (int n = 0; n < 16; n++)
            out[n * 4] = pack_bf16(s.x[i / 2][n][i % 2 * 2] * inverse,
                                   s.x[i / 2][n][i % 2 * 2 + 1] * inverse);
    }
}

/* ---- one task, one window, all of them --------------------------------------------------- */

/* One page, from `position` on. Its values may still be on their way. */
__device__ void attend_page(int base, int position, float factor, bf16 *queries, bf16 *keys,
                            bf16 *values, rows_state &s)
{
    const int first_row = base + warp_id() * WARP_ROWS, last_row = first_row + WARP_ROWS - 1;
#pragma unroll
    for (int i = 0; i < PAGE; i += KEYS) {
        score_sums scores;
        const bool seen = position + i <= last_row; /* by any row of this warp */
        if (seen) {
            score(queries, keys + i * QK, scores);
            if (position + i + KEYS - 1 > first_row) mask(base, position + i, scores);
            soften(factor, scores, s);
        }
        if (i == 0) {
            copy_wait<1>();
            __syncthreads();
        }
        if (seen) gather(values + i * V, scores, s);
    }
}

/* Keys are asked for a page ahead, values while the scores are computed. */
__device__ void attend(const mla_call &a, const task &t, const mla_window &window, bf16 *shared)
{
    bf16 *const values = shared + VALUES_AT;
    const float factor = a.scale * LOG2_E;
    rows_state s;
    load_queries(a, t, shared);
    load_keys(window, t.h, t.in_window, shared + KEYS_AT);
    copy_commit();
    start_rows(s);
    if (t.resumed) resume_rows(a, t, window, s);
    for (int page = t.page; page < t.page_end; page++) {
        const int number = t.in_window + page - t.page, turn = (page - t.page) % 2;
        copy_wait<0>();
        __syncthreads(); /* keys are there; the last page's values and keys are free */
        load_values(window, t.h, number, values);
        copy_commit();
        if (page + 1 < t.page_end)
            load_keys(window, t.h, number + 1, shared + KEYS_AT + (1 - turn) * PAGE * QK);
        copy_commit();
        attend_page(t.base, page * PAGE, factor, shared, shared + KEYS_AT + turn * PAGE * QK,
                    values, s);
    }
    if (t.ends)
        finish_rows(a, t, s);
    else
        suspend_rows(a, t, window, s);
}

/* Tile number `tile` against pages [first, end) of the running numbers: all but the head. */
__device__ void find_task(const mla_call &a, const mla_plan &plan, int tile, int first, int end,
                          task &t)
{
    const int n =
        find_owner<&mla_sequence::first_tile>(plan.sequences, static_cast<int>(a.N), tile);
    const mla_sequence s = plan.sequences[n];
    t.begin = s.begin, t.end = s.end, t.token_shift = s.token_shift;
    t.base = (s.begin / QUERIES + tile - s.first_tile) * QUERIES;
    const int pages = (min(t.base + QUERIES, s.end) - 1) / PAGE + 1;
    t.page = max(0, first - s.first_page);
    t.page_end = min(pages, end - s.first_page);
    t.in_window = s.first_page + t.page - first;
    t.resumed = t.page > 0;
    t.ends = t.page_end == pages;
}

/* The tiles of the sequences that have pages in [first, end). */
struct tile_range {
    int first;
    unsigned count;
};

__device__ tile_range find_tiles(const mla_call &a, const mla_plan &plan, int first, int end)
{
    const mla_sequence *all = plan.sequences;
    const int N = static_cast<int>(a.N);
    const int tile = all[find_owner<&mla_sequence::first_page>(all, N, first)].first_tile;
    const int last = find_owner<&mla_sequence::first_page>(all, N, end - 1);
    return {tile, static_cast<unsigned>(all[last + 1].first_tile - tile)};
}

/* All blocks. What a task is lies in shared memory: registers are for the sums. */
__device__ void attend_window(const mla_call &a, const mla_plan &plan, const mla_window &window,
                              int first, int end, unsigned *next_item, bf16 *shared)
{
    __shared__ task t;
    const tile_range tiles = find_tiles(a, plan, first, end);
    for (;;) {
        __syncthreads(); /* everybody is done with the last task */
        if (threadIdx.x == 0) {
            const unsigned item = atomicAdd(next_item, 1u);
            const unsigned h = item / tiles.count, back = item % tiles.count;
            t.h = static_cast<int>(h);
            /* Late tiles first: they see most. */
            if (t.h < a.H)
                find_task(a, plan, tiles.first + static_cast<int>(tiles.count - 1 - back),
                          first, end, t);
        }
        __syncthreads();
        if (t.h >= a.H) return;
        if (t.page < t.page_end) attend(a, t, window, shared);
    }
}

template <bool packed>
__global__ __launch_bounds__(THREADS, BLOCKS_PER_SM) void mla_prefill_kernel(
    __grid_constant__ const mla_call a, __grid_constant__ const mla_plan plan,
    __grid_constant__ const mla_window window)
{
    extern __shared__ __align__(128) bf16 memory[];
    const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
    const int pages = plan.sequences[a.N].first_page, step = static_cast<int>(window.pages);
    int turn = 0;
    for (int first = 0; first < pages; first += step, turn = 1 - turn) {
        const int end = min(first + step, pages);
        if (first > 0) grid.sync(); /* the last window's keys and values are read */
        if (blockIdx.x == 0 && threadIdx.x == 0) plan.next_item[1 - turn] = 0;
        expand_window<packed>(a, plan, window, first, end, memory);
        grid.sync();
        attend_window(a, plan, window, first, end, plan.next_item + turn, memory);
    }
}

} // namespace

kl_status mla_prefill_tiles(const mla_call &call, const mla_plan &plan,
                            const mla_window &window, cudaStream_t stream, kl_error *err)
{
    constexpr int bytes = SHARED * static_cast<int>(sizeof(bf16));
    const auto kernel = call.packed ? mla_prefill_kernel<true> : mla_prefill_kernel<false>;
    int units, blocks;
    KL_TRY(kl_cuda_multiprocessors(&units, err));
    KL_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), err);
    KL_CUDA_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, THREADS, bytes),
                err);
    void *args[] = {const_cast<mla_call *>(&call), const_cast<mla_plan *>(&plan),
                    const_cast<mla_window *>(&window)};
    const dim3 grid(static_cast<unsigned>(units * blocks));
    KL_CUDA_TRY(cudaLaunchCooperativeKernel(kernel, grid, dim3(THREADS), args, bytes, stream),
                err);
    return KL_OK;
}
