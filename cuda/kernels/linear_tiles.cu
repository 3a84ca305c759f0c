/*
 * linear_tiles.cu -- products of many rows with weights: linear, mlp and the experts.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T), tile by tile
 * Shapes       x [., K], rows gathered or not; w, up [E, N, K]; out [., N]; K a multiple of 8
 * Layout       rows of x and out strided; weights in pieces of 16 bytes, both of one format
 * Precision    x bf16; weights rounded to bf16; f32 sums; f32 or bf16 out
 * Grid         a block a multiprocessor, which takes every 132nd item: 128 rows of a weight (64
 *              of each in the gated product) by a tile of up to 320 rows of x, or of 64 where all
 *              are narrow. One warpgroup fills a ring of four steps, of as many as fit beside
 *              narrow tiles; two multiply (device/tiles.cuh)
 * Order        one chain over the columns, 16 at a time, the same for every tile and T
 * Roofline     2 * rows * N * K flops at 800 TFLOP/s, or the weights at 3.0 TB/s: with 256 rows
 *              an expert both take about the same time
 * Measured     H100, 8192 tokens, 8 of 256 experts: gate and up 1.81 ms, down 0.87 ms in bf16;
 *              [12288, 2304] int8 0.82 ms, 567 TFLOP/s (cuBLAS in bf16 756). H200: the layer of
 *              experts 2.55 ms, 409 TFLOP/s; by narrow tiles 64 tokens 755 us (4.2 TB/s), 128 865,
 *              256 897, 1024 995 (2026-11-22)
 */
#include "../device/launch.cuh"
#include "../device/tiles.cuh"
#include "../driver.h"

#include <limits.h>

namespace {

/* ---- results --------------------------------------------------------------------------- */

/* Lane 4 r + c has two neighbours of row r, columns 2 c and 2 c + 1, of an 8 x 8 matrix; then of
 * its transpose. */
__device__ inline uint32_t transpose_pairs(uint32_t pair)
{
    uint32_t to;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(pair));
    return to;
}

/* Sums of eight rows of x, of fragment j: [h][e] is row bases[h] + lane / 4 of the weights, row
 * 8 j + 2 (lane % 4) + e of x. */
template <int N>
__device__ __forceinline__ void store_f32(const float (&acc)[N / 2], const tile_operand &o,
                                          const tile_item &item, const tile_rows<false> &rows)
{
    const int first = lane_id() % 4 * 2;
    const int64_t column = item.column + lane_id() / 4;
    const bool inside[2] = {column + rows.columns[0] < o.n, column + rows.columns[1] < o.n};
    float *line =
        static_cast<float *>(o.out) + (item.tile.first + first) * o.out_stride + column;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (8 * j + first + e >= item.tile.n) continue;
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (inside[h])
                    line[e * o.out_stride + rows.columns[h]] = acc[4 * j + 2 * h + e];
        }
        line += 8 * o.out_stride;
    }
}

/* Two neighbours of a row of out, as many as there are. */
__device__ inline void store_two(bf16 *to, int64_t left, bool pairs, uint32_t two)
{
    if (pairs && left >= 2) {
        *reinterpret_cast<uint32_t *>(to) = two;
        return;
    }
    const __nv_bfloat162 both = *reinterpret_cast<const __nv_bfloat162 *>(&two);
    if (left >= 1) to[0] = both.x;
    if (left >= 2) to[1] = both.y;
}

/* f(j, e, h) is the result of a place of the fragments; h = 0 alone when gated. */
template <int N, bool gated, class F>
__device__ __forceinline__ void store_bf16(const tile_operand &o, const tile_item &item,
                                           const tile_rows<gated> &rows, F f)
{
    const int64_t column = item.column + lane_id() % 4 * 2;
    bf16 *line =
        static_cast<bf16 *>(o.out) + (item.tile.first + lane_id() / 4) * o.out_stride + column;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int h = 0; h < (gated ? 1 : 2); h++) {
            const uint32_t two = transpose_pairs(pack_bf16(f(j, 0, h), f(j, 1, h)));
            if (8 * j + lane_id() / 4 < item.tile.n)
                store_two(line + rows.columns[h], o.n - column - rows.columns[h], o.pairs, two);
        }
        line += 8 * o.out_stride;
    }
}

template <int N, bool gated, class Out>
__device__ __forceinline__ void store_item(const float (&acc)[N / 2], const tile_operand &o,
                                           const tile_item &item)
{
    const tile_rows<gated> rows;
    if constexpr (sizeof(Out) == 4)
        store_f32<N>(acc, o, item, rows);
    else if constexpr (gated)
        store_bf16<N>(o, item, rows, [&](int j, int e, int) {
            return silu(acc[4 * j + e]) * acc[4 * j + 2 + e];
        });
    else
        store_bf16<N>(o, item, rows,
                      [&](int j, int e, int h) { return acc[4 * j + 2 * h + e]; });
}

/* ---- kernel ---------------------------------------------------------------------------- */

template <class S, bool gated, class Out, int N>
__device__ __forceinline__ void multiply_and_store(const tile_operand &o, const tile_item &item,
                                                   const tile_ring<S> &ring, ring_place<S> &at)
{
    float acc[N / 2];
    multiply_item<S, gated, N>(acc, o, item, ring, at);
    store_item<N, gated, Out>(acc, o, item);
}

/* With as many columns of wgmma as the tile has rows, in steps of 32. */
template <class S, bool gated, class Out, int N = 32>
__device__ __forceinline__ void multiply_rows(const tile_operand &o, const tile_item &item,
                                              const tile_ring<S> &ring, ring_place<S> &at)
{
    if constexpr (N == S::MOST_ROWS)
        multiply_and_store<S, gated, Out, N>(o, item, ring, at);
    else if (item.tile.n <= N)
        multiply_and_store<S, gated, Out, N>(o, item, ring, at);
    else
        multiply_rows<S, gated, Out, N + 32>(o, item, ring, at);
}

template <class S> __device__ tile_ring<S> ring_in(uint8_t *shared)
{
    constexpr unsigned ALIGNED = S::ALIGNED;
    tile_ring<S> ring;
    ring.stages = shared + (ALIGNED - shared_address(shared) % ALIGNED) % ALIGNED;
    ring.full = reinterpret_cast<barrier *>(ring.x(S::STAGES));
    ring.empty = ring.full + S::STAGES;
    return ring;
}

/* A phase of `full` ends with every filling thread's pieces and the bytes of the weights, one of
 * `empty` with every multiplying warp. */
template <class S> __device__ void open_ring(const tile_ring<S> &ring)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init(ring.full + i, WARPGROUP + 1);
            barrier_init(ring.empty + i, MULTIPLIERS * WARPGROUP / WARP);
        }
        barrier_init_done();
    }
    __syncthreads();
}

template <class S, bool gated, class Out>
__global__ __launch_bounds__(TILE_THREADS,
                             1) void tiles_kernel(__grid_constant__ const tile_arguments p)
{
    extern __shared__ __align__(1024) uint8_t shared[];
    const tile_ring<S> ring = ring_in<S>(shared);
    open_ring(ring);
    wait_for_inputs();
    let_next_start();
    if (threadIdx.x < WARPGROUP) {
        registers_down_to<FILL_REGISTERS>();
        fill_ring<S, gated>(p, ring);
    } else {
        registers_up_to<MULTIPLY_REGISTERS>();
        ring_place<S> at;
        const int n_tiles = tiles_of(p);
        for (int i = blockIdx.x; i < n_tiles * p.groups; i += gridDim.x) {
            const tile_item item = item_at<gated>(p, n_tiles, i);
            const tile_operand &o = operand_of(p, item.tile);
            if (has_work(o, item)) multiply_rows<S, gated, Out>(o, item, ring, at);
        }
    }
}

/* ---- host ------------------------------------------------------------------------------ */

/* Boxes of 64 rows by a step of the matrix of bytes that the stack is. */
template <kl_weight_format format>
kl_status encode_map(const kl_weight &w, CUtensorMap *map, kl_error *err)
{
    static const auto encode =
        kl_cuda_driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    constexpr int BYTES = step_bytes<format>;
    const uint64_t row_bytes = kl_weight_row_bytes(w.format, w.cols);
    const cuuint64_t sizes[2] = {row_bytes, static_cast<cuuint64_t>(w.count * w.rows)};
    const cuuint64_t strides[1] = {row_bytes};
    const cuuint32_t box[2] = {BYTES, TILE_ROWS / 2}, dense[2] = {1, 1};
    const CUtensorMapSwizzle swizzle = BYTES == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : BYTES == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                     : CU_TENSOR_MAP_SWIZZLE_32B;
    if (encode == nullptr)
        return kl_fail(err, KL_ERR_UNAVAILABLE,
                       "cuda: the driver has no cuTensorMapEncodeTiled: it is too old");
    const CUresult e =
        encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, w.data, sizes, strides, box, dense,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (e == CUDA_SUCCESS) return KL_OK;
    return kl_fail(err, KL_ERR_DEVICE,
                   "cuda: cuTensorMapEncodeTiled: error %d for %lld rows of %lld bytes",
                   static_cast<int>(e), static_cast<long long>(sizes[1]),
                   static_cast<long long>(row_bytes));
}

template <kl_weight_format format>
kl_status operand_from(const kl_cuda_tile_operand &from, kl_dtype out_dtype, tile_operand *to,
                       kl_error *err)
{
    const bool gated = from.up.data != nullptr;
    const kl_weight &second = gated ? from.up : from.w;
    if (from.w.count > INT_MAX / from.w.rows)
        return kl_fail(err, KL_ERR_VALUE,
                       "linear: rows of all matrices must be < 2^31, got %lld",
                       static_cast<long long>(from.w.count * from.w.rows));
    KL_TRY(encode_map<format>(from.w, &to->maps[0], err));
    KL_TRY(encode_map<format>(second, &to->maps[1], err));
    to->scales[0] = reinterpret_cast<const bf16 *>(from.w.scales);
    to->scales[1] = reinterpret_cast<const bf16 *>(second.scales);
    to->matrix_rows = from.w.rows;
    to->first = from.first;
    to->n = from.n;
    to->K = from.w.cols;
    to->groups = kl_weight_groups(format, from.w.cols);
    to->x = static_cast<const bf16 *>(from.x);
    to->x_stride = from.x_stride;
    to->rows = from.rows;
    to->out = from.out;
    to->out_stride = from.out_stride;
    to->pairs =
        is_aligned(from.out, from.out_stride, kl_dtype_bytes(out_dtype), 2 * sizeof(bf16));
    return KL_OK;
}

template <kl_weight_format format>
kl_status arguments_from(const kl_cuda_tile_product *p, int64_t width, tile_arguments *a,
                         kl_error *err)
{
    const int64_t widest = p->routed.n > p->shared.n ? p->routed.n : p->shared.n;
    const int64_t groups = (widest + width - 1) / width;
    /* Tiles of about one size; `tiles` holds such already. */
    const int64_t tile = p->tiles != nullptr ? 0 : (p->T + p->n_tiles - 1) / p->n_tiles;
    if (p->n_tiles > (INT_MAX - 1024) / groups || p->T > INT_MAX - MOST_TILE_ROWS)
        return kl_fail(err, KL_ERR_VALUE,
                       "linear: tiles * rows / %lld must be < 2^31, got %lld * %lld",
                       static_cast<long long>(width), static_cast<long long>(p->n_tiles),
                       static_cast<long long>(groups));
    KL_TRY(operand_from<format>(p->routed, p->out_dtype, &a->routed, err));
    KL_TRY(operand_from<format>(p->shared, p->out_dtype, &a->shared, err));
    a->tiles = p->tiles;
    a->surplus = p->surplus;
    a->n_tiles = static_cast<int>(p->n_tiles);
    a->groups = static_cast<int>(groups);
    a->tile = static_cast<int>(tile);
    a->T = static_cast<int>(p->T);
    return KL_OK;
}

template <class S, bool gated, class Out>
kl_status launch(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    const auto kernel = tiles_kernel<S, gated, Out>;
    constexpr int BYTES = S::SHARED_BYTES;
    tile_arguments a;
    int multiprocessors;
    KL_TRY(arguments_from<S::FORMAT>(p, TILE_WIDTH<gated>, &a, err));
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    KL_TRY(kl_cuda_allow_shared(kernel, BYTES, err));
    const int items = a.n_tiles * a.groups;
    const unsigned blocks =
        static_cast<unsigned>(items < multiprocessors ? items : multiprocessors);
    return kl_cuda_launch(kernel, blocks, TILE_THREADS, BYTES, stream, err, a);
}

template <class S>
kl_status launch_for(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    if (p->routed.up.data != nullptr) return launch<S, true, bf16>(p, stream, err);
    return p->out_dtype == KL_BF16 ? launch<S, false, bf16>(p, stream, err)
                                   : launch<S, false, float>(p, stream, err);
}

template <int ROWS>
kl_status run_tiles(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    switch (p->routed.w.format) {
    case KL_W_INT8:
        return launch_for<tile_shape<KL_W_INT8, ROWS>>(p, stream, err);
    case KL_W_INT4:
        return launch_for<tile_shape<KL_W_INT4, ROWS>>(p, stream, err);
    case KL_W_FP8:
        return launch_for<tile_shape<KL_W_FP8, ROWS>>(p, stream, err);
    default:
        return launch_for<tile_shape<KL_W_BF16, ROWS>>(p, stream, err);
    }
}

} // namespace

kl_status kl_cuda_tiles_run(const kl_cuda_tile_product *p, cudaStream_t stream, kl_error *err)
{
    return p->narrow ? run_tiles<NARROW_TILE_ROWS>(p, stream, err)
                     : run_tiles<MOST_TILE_ROWS>(p, stream, err);
}
