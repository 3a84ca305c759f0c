/*
 * linear_ordered.cu -- products of many rows with weights, each output summed in the order of the
 * kernels for few rows: what a batch-invariant backend multiplies many rows by.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T), tile by tile
 * Shapes       x [., K], rows gathered or not; w, up [E, N, K]; out [., N]; K a multiple of 8
 * Layout       rows of x and out strided; weights in pieces of 16 bytes, both of one format
 * Precision    x bf16; int4 weights to bf16, the others exact; f32 sums; f32 or bf16 out
 * Grid         a block for each tile of up to 128 rows of x and 128 rows of a weight, 64 of each in
 *              the gated product. Steps of both go through a ring in shared memory; a warp has 32
 *              rows of weights by 64 of x
 * Order        that of stream.cuh: the columns that a warp has there, in rising order, one warp
 *              after the other, and the same mma for the same columns; then the sums of these
 *              warps in their order
 * Roofline     2 * rows * N * K flops at 600 TFLOP/s, which mma.sync reaches
 * Measured     H200, in a model (48B, bf16): a prompt of 8192 tokens at 26,250 tok/s, with
 *              linear_tiles.cu and cuBLASLt 52,290 (2026-11-22)
 */
#include "../device/math.cuh"
#include "../device/stream.cuh"
#include "../device/tiles.cuh"

#include <limits.h>

namespace {

constexpr int THREADS = STREAM_THREADS;
constexpr int WARP_ROWS = 2 * STREAM_ROWS;       /* of weights */
constexpr int ROW_WARPS = TILE_ROWS / WARP_ROWS; /* the others have other rows of x */
constexpr int X_ROWS = ORDERED_TILE_ROWS / (THREADS / WARP / ROW_WARPS);
constexpr int FRAGMENTS = X_ROWS / STREAM_TOKENS; /* of rows of x */
constexpr int STEP_BYTES = STREAM_LANES * 16;     /* of a row of a weight */
constexpr int W_STEP_BYTES = TILE_ROWS * STEP_BYTES;

struct ordered_operand {
    weight_view w, up;
    int64_t first, n;
    const bf16 *x;
    int64_t x_stride;
    const int *rows;
    void *out;
    int64_t out_stride;
};

struct ordered_arguments {
    ordered_operand routed, shared;
    const moe_tile *tiles;
    const int *surplus;  /* how many of the last tiles are; null: none */
    int n_tiles, groups; /* blocks of TILE_ROWS for a tile      */
    int tile, T;         /* without `tiles`: rows of each, of all */
};

/* Where a block's rows begin. */
struct block_rows {
    weight_row w[TILE_ROWS];
    const bf16 *x[ORDERED_TILE_ROWS];
};

/* A stage holds a step: of the weights TILE_ROWS rows of 64 bytes, as they lie; of x the columns
 * that meet them. Lane 4 r + c multiplies piece c of its rows by columns c PIECE and on, which are
 * UNITS times 16 bytes: units of one number make a plane, with rows of 64 bytes as well. Planes
 * are so far apart that copies to all of them meet in no bank. */
template <kl_weight_format format> struct ordered_stage {
    static constexpr int PIECE = weight_codec<format>::PIECE, UNITS = PIECE / 8;
    static constexpr int CHUNKS = STREAM_LANES * UNITS; /* of 16 bytes, of a row of x */
    static constexpr int PLANE = ORDERED_TILE_ROWS * STEP_BYTES + 128 / UNITS;
    static constexpr int BYTES = W_STEP_BYTES + UNITS * PLANE;
    static constexpr int COUNT = UNITS == 1 ? 8 : UNITS == 2 ? 6 : 4;
    static constexpr size_t SHARED = size_t{COUNT} * BYTES + sizeof(block_rows);
};

/* Which steps of a row come in which order: every eighth from 0 on, from 1 on, ... */
struct step_order {
    int steps, step = 0;

    __device__ explicit step_order(int count) : steps(count) {}

    /* Whether the step after this one is of another warp. */
    __device__ bool ends() const { return step + STREAM_WARPS >= steps; }

    __device__ void advance() { step = ends() ? step % STREAM_WARPS + 1 : step + STREAM_WARPS; }
};

/* Row i of a block's: of one matrix, or of two those that meet in a fragment. Rows past the end
 * repeat the last one. */
template <bool gated>
__device__ weight_row weight_row_at(const ordered_operand &o, const tile_item &item, int i)
{
    constexpr int HALF = STREAM_ROWS / 2;
    const int64_t matrix = item.tile.expert == MOE_SHARED ? 0 : item.tile.expert;
    const int64_t own = item.column + (gated ? i / STREAM_ROWS * HALF + i % HALF : i);
    const int64_t row = matrix * o.w.rows + o.first + (own < o.n ? own : o.n - 1);
    return row_of(gated && i % STREAM_ROWS >= HALF ? o.up : o.w, row);
}

/* By all threads; a barrier follows. */
template <bool gated>
__device__ void find_rows(block_rows &to, const ordered_operand &o, const tile_item &item)
{
    const int i = threadIdx.x;
    if (i < TILE_ROWS) {
        to.w[i] = weight_row_at<gated>(o, item, i);
    } else {
        const int t = i - TILE_ROWS, row = item.tile.first + min(t, item.tile.n - 1);
        to.x[t] = o.x + int64_t{o.rows == nullptr ? row : o.rows[row]} * o.x_stride;
    }
    static_assert(THREADS == TILE_ROWS + ORDERED_TILE_ROWS);
}

/* A step on its way to its stage; zeros past the end of the rows. */
template <kl_weight_format format>
__device__ void copy_step(unsigned char *stage, const block_rows &rows, const weight_view &w,
                          int step)
{
    using S = ordered_stage<format>;
    const int piece = threadIdx.x % STREAM_LANES;
    const int64_t at = int64_t{step} * STEP_BYTES + piece * 16;
#pragma unroll
    for (int i = 0; i < TILE_ROWS * STREAM_LANES / THREADS; i++) {
        const int row = threadIdx.x / STREAM_LANES + i * (THREADS / STREAM_LANES);
        copy_async(stage + row * STEP_BYTES + piece * 16, rows.w[row].data + at,
                   at < w.row_bytes);
    }
    const int chunk = threadIdx.x % S::CHUNKS;
    const int64_t column = (int64_t{step} * S::CHUNKS + chunk) * 8;
    unsigned char *const plane = stage + W_STEP_BYTES + chunk % S::UNITS * S::PLANE;
#pragma unroll
    for (int i = 0; i < ORDERED_TILE_ROWS * S::CHUNKS / THREADS; i++) {
        const int row = threadIdx.x / S::CHUNKS + i * (THREADS / S::CHUNKS);
        copy_async(plane + row * STEP_BYTES + chunk / S::UNITS * 16, rows.x[row] + column,
                   column < w.cols);
    }
}

/* Sums of a warp: [of 16 rows of weights][of 8 rows of x][the four of a lane]. */
using warp_sums = float[2][FRAGMENTS][4];

__device__ __forceinline__ void clear(warp_sums &sums)
{
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < FRAGMENTS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[m][n][e] = 0;
}

__device__ __forceinline__ void add(warp_sums &to, const warp_sums &sums)
{
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < FRAGMENTS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) to[m][n][e] += sums[m][n][e];
}

/* The scales of a lane's pieces: rows r, r + 8 of both fragments. */
template <kl_weight_format format> struct piece_scales {
    float of[2][2] = {{1, 1}, {1, 1}};

    __device__ void load(const block_rows &rows, const weight_view &w, int step)
    {
        using codec = weight_codec<format>;
        if constexpr (codec::GROUP > 0) {
            const int lane = lane_id(), first = warp_id() % ROW_WARPS * WARP_ROWS + lane / 4;
            const int64_t piece = int64_t{step} * STREAM_LANES + lane % STREAM_LANES;
            const int64_t group = piece * codec::PIECE / codec::GROUP;
#pragma unroll
            for (int i = 0; i < 4; i++)
                of[i / 2][i % 2] =
                    group < w.groups ? to_float(rows.w[first + 8 * i].scales[group]) : 0;
        }
    }
};

/* sums += weights x of a step, in the order of stream_step::multiply_raw(). */
template <kl_weight_format format>
__device__ __forceinline__ void multiply_raw(warp_sums &sums, const unsigned char *stage,
                                             const piece_scales<format> &scales)
{
    using S = ordered_stage<format>;
    using F = stream_format<format, 1>;
    const int lane = lane_id() * 16, warp = warp_id();
    const unsigned char *const w = stage + warp % ROW_WARPS * WARP_ROWS * STEP_BYTES + lane;
    const unsigned char *const x =
        stage + W_STEP_BYTES + warp / ROW_WARPS * X_ROWS * STEP_BYTES + lane;
    uint4 raw[4];
#pragma unroll
    for (int i = 0; i < 4; i++) raw[i] = *reinterpret_cast<const uint4 *>(w + i * 512);
#pragma unroll
    for (int u = 0; u < S::UNITS; u++) {
        /* Of these only the unit's are computed: few registers at a time. */
        uint32_t a[4][1][S::PIECE / 2];
#pragma unroll
        for (int i = 0; i < 4; i++) F::split(raw[i], scales.of[i / 2][i % 2], a[i]);
#pragma unroll
        for (int n = 0; n < FRAGMENTS; n++) {
            const uint4 b = *reinterpret_cast<const uint4 *>(x + u * S::PLANE + n * 512);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const uint32_t *const top = a[2 * m][0] + 4 * u, *const low =
                                                                     a[2 * m + 1][0] + 4 * u;
                mma_bf16(sums[m][n], {top[0], low[0], top[1], low[1]}, {b.x, b.y});
                mma_bf16(sums[m][n], {top[2], low[2], top[3], low[3]}, {b.z, b.w});
            }
        }
    }
}

template <kl_weight_format format>
__device__ __forceinline__ void multiply_step(warp_sums &acc, const unsigned char *stage,
                                              const piece_scales<format> &scales)
{
    if constexpr (stream_format<format, 1>::WHOLE) {
        warp_sums part;
        clear(part);
        multiply_raw(part, stage, scales);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < FRAGMENTS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[m][n][e] = fmaf(scales.of[m][e / 2], part[m][n][e], acc[m][n][e]);
    } else {
        multiply_raw(acc, stage, scales);
    }
}

/* sum = the warp's sums of all steps. */
template <kl_weight_format format>
__device__ __forceinline__ void multiply_rows(warp_sums &sum, unsigned char *stages,
                                              const block_rows &rows, const weight_view &w)
{
    using S = ordered_stage<format>;
    const int steps = static_cast<int>((w.row_bytes + STEP_BYTES - 1) / STEP_BYTES);
    step_order now(steps), ahead(steps); /* multiplied, copied */
    piece_scales<format> scales, coming;
    warp_sums acc;
    clear(sum);
    clear(acc);
    int copied = 0;
    const auto copy = [&]() {
        if (copied < steps) {
            copy_step<format>(stages + copied % S::COUNT * S::BYTES, rows, w, ahead.step);
            ahead.advance();
        }
        copied++;
        copy_commit();
    };
#pragma unroll 1
    for (int i = 0; i < S::COUNT - 1; i++) copy();
    coming.load(rows, w, 0);
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        const bool ends = now.ends();
        now.advance();
        scales = coming;
        if (i + 1 < steps) coming.load(rows, w, now.step);
        copy_wait<S::COUNT - 2>();
        __syncthreads(); /* and the slot that the next copy goes to has been read */
        copy();
        multiply_step(acc, stages + i % S::COUNT * S::BYTES, scales);
        if (!ends) continue;
        add(sum, acc);
        clear(acc);
    }
}

template <bool gated, class Out>
__device__ void store_rows(const warp_sums &sum, const ordered_operand &o,
                           const tile_item &item)
{
    constexpr int EACH = gated ? STREAM_ROWS / 2 : STREAM_ROWS;
    const int lane = lane_id(), warp = warp_id();
    const int64_t column = item.column + warp % ROW_WARPS * 2 * EACH + lane / 4;
    const int first = warp / ROW_WARPS * X_ROWS + lane % 4 * 2;
    Out *const out = static_cast<Out *>(o.out);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < FRAGMENTS; n++)
#pragma unroll
            for (int e = 0; e < (gated ? 2 : 4); e++) {
                const int row = first + n * STREAM_TOKENS + e % 2;
                const int64_t at = column + m * EACH + e / 2 * 8;
                if (row >= item.tile.n || at >= o.n) continue;
                float y = sum[m][n][e];
                if constexpr (gated) y = silu(y) * sum[m][n][e + 2];
                out[(item.tile.first + row) * o.out_stride + at] = from_float<Out>(y);
            }
}

template <kl_weight_format format, bool gated, class Out>
__global__ __launch_bounds__(THREADS,
                             1) void ordered_kernel(__grid_constant__ const ordered_arguments p)
{
    using S = ordered_stage<format>;
    extern __shared__ __align__(128) unsigned char shared[];
    block_rows &rows = *reinterpret_cast<block_rows *>(shared + S::COUNT * S::BYTES);
    wait_for_inputs();
    const int i = static_cast<int>(blockIdx.x), n_tiles = tiles_of(p);
    if (i >= n_tiles * p.groups) return;
    const tile_item item = item_at<gated>(p, n_tiles, i);
    const ordered_operand &o = operand_of(p, item.tile);
    if (!has_work(o, item)) return;
    find_rows<gated>(rows, o, item);
    __syncthreads();
    warp_sums sum;
    multiply_rows<format>(sum, shared, rows, o.w);
    store_rows<gated, Out>(sum, o, item);
}

/* ---- host ------------------------------------------------------------------------------ */

ordered_operand operand_from(const kl_cuda_tile_operand &from)
{
    const bool gated = from.up.data != nullptr;
    return {
        .w = weight_view_of(from.w),
        .up = weight_view_of(gated ? from.up : from.w),
        .first = from.first,
        .n = from.n,
        .x = static_cast<const bf16 *>(from.x),
        .x_stride = from.x_stride,
        .rows = from.rows,
        .out = from.out,
        .out_stride = from.out_stride,
    };
}

kl_status arguments_from(const kl_cuda_tile_product *p, int64_t width, ordered_arguments *a,
                         kl_error *err)
{
    const int64_t widest = p->routed.n > p->shared.n ? p->routed.n : p->shared.n;
    const int64_t groups = (widest + width - 1) / width;
    if (p->n_tiles > INT_MAX / groups || p->T > INT_MAX - ORDERED_TILE_ROWS)
        return kl_fail(err, KL_ERR_VALUE,
                       "linear: tiles * rows / %lld must be < 2^31, got %lld * %lld",
                       static_cast<long long>(width), static_cast<long long>(p->n_tiles),
                       static_cast<long long>(groups));
    *a = {
        .routed = operand_from(p->routed),
        .shared = operand_from(p->shared),
        .tiles = p->tiles,
        .surplus = p->surplus,
        .n_tiles = static_cast<int>(p->n_tiles),
        .groups = static_cast<int>(groups),
        .tile =
            p->tiles != nullptr ? 0 : static_cast<int>((p->T + p->n_tiles - 1) / p->n_tiles),
        .T = static_cast<int>(p->T),
    };
    return KL_OK;
}

template <kl_weight_format format, bool gated, class Out>
kl_status launch(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    const auto kernel = ordered_kernel<format, gated, Out>;
    constexpr size_t SHARED = ordered_stage<format>::SHARED;
    ordered_arguments a;
    KL_TRY(arguments_from(p, TILE_WIDTH<gated>, &a, err));
    KL_TRY(kl_cuda_allow_shared(kernel, SHARED, err));
    return kl_cuda_launch(kernel, static_cast<unsigned>(a.n_tiles * a.groups), THREADS, SHARED,
                          stream, err, a);
}

template <kl_weight_format format>
kl_status launch_for(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    if (p->routed.up.data != nullptr)
        return p->out_dtype == KL_BF16 ? launch<format, true, bf16>(p, stream, err)
                                       : launch<format, true, float>(p, stream, err);
    return p->out_dtype == KL_BF16 ? launch<format, false, bf16>(p, stream, err)
                                   : launch<format, false, float>(p, stream, err);
}

} // namespace

kl_status kl_cuda_ordered_run(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    switch (p->routed.w.format) {
    case KL_W_INT8:
        return launch_for<KL_W_INT8>(p, stream, err);
    case KL_W_INT4:
        return launch_for<KL_W_INT4>(p, stream, err);
    case KL_W_FP8:
        return launch_for<KL_W_FP8>(p, stream, err);
    default:
        return launch_for<KL_W_BF16>(p, stream, err);
    }
}
