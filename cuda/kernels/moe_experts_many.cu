/*
 * moe_experts_many.cu -- the products of moe_experts for many tokens an expert: a prefill.
 *
 * Computes     out = x w^T, or silu(x w^T) * (x up^T), tile by tile (device/moe.cuh)
 * Shapes       x [., K] rows gathered; w, up [E, N, K]; out [., N]; K and N multiples of 64
 * Layout       dense, 16-byte aligned rows; w and up of one format
 * Precision    x bf16; weights to bf16 unless they are; f32 sums; out bf16 gated, f32 plain
 * Grid         one block for each tile of 64 or 128 tokens and 128 rows of the matrix, or 64 of
 *              w and the same 64 of up, eight and eight in turn: the two halves of an element
 *              of the gated product are then neighbours in one thread's registers. Blocks of a
 *              tile are neighbours, and tiles of an expert: its rows and matrix stay in the L2
 * Order        one chain of mma over the columns, the same for both tiles
 * Roofline     2 * rows * N * K flops; mma.sync reaches about 600 TFLOP/s of an H100's 990.
 *              8192 tokens of the model's experts are 1.04e12 flops, 1.7 ms
 * Measured     H100 with another job beside, bf16, gated: 64 experts of 1024 rows 313 TFLOP/s,
 *              one expert of 8192 rows 317 (cuBLAS, plain 787); 256 experts of 256 rows 129,
 *              not yet understood: the tiles that are not full explain a fifth (2026-11-22)
 */
#include "../device/gemm.cuh"
#include "../device/math.cuh"
#include "../device/moe.cuh"

namespace {

constexpr int N = 128, STRIPE = 8; /* rows of w, then of up: a fragment of the tensor cores */

template <int M> using shape_of = gemm_shape<M, N, M == 64 ? 2 : 4, M == 64 ? 4 : 2>;

template <class S>
__device__ void store_plain(const moe_operand &o, const moe_tile &tile, int64_t column,
                            const float (&acc)[S::MI][S::NI][4])
{
    float *out = static_cast<float *>(o.out) + tile.first * o.n + column;
    gemm_for_pairs<S>(acc, [&](int row, int col, float even, float odd) {
        if (row < tile.n && column + col < o.n)
            *reinterpret_cast<float2 *>(out + row * o.n + col) = {even, odd};
    });
}

/* Fragments 2j are of w, 2j + 1 of up, for the same elements. */
template <class S>
__device__ void store_gated(const moe_operand &o, const moe_tile &tile, int64_t column,
                            float (&acc)[S::MI][S::NI][4])
{
    const int row = warp_id() / S::WN * S::MI * 16 + lane_id() / 4;
    const int col = warp_id() % S::WN * S::NI * STRIPE / 2 + lane_id() % 4 * 2;
    bf16 *out = static_cast<bf16 *>(o.out) + tile.first * o.n + column;
#pragma unroll
    for (int i = 0; i < S::MI; i++)
#pragma unroll
        for (int j = 0; j < S::NI; j += 2)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row + i * 16 + half * 8, c = col + j / 2 * STRIPE;
                if (r >= tile.n) continue;
                const float(&gate)[4] = acc[i][j], (&up)[4] = acc[i][j + 1];
                *reinterpret_cast<uint32_t *>(out + r * o.n + c) =
                    pack_bf16(silu(gate[2 * half]) * up[2 * half],
                              silu(gate[2 * half + 1]) * up[2 * half + 1]);
            }
}

/* Columns of out of a block. */
template <bool gated> constexpr int WIDTH = gated ? N / 2 : N;

/* Whether the block has work, and if so its sums. */
template <kl_weight_format format, bool gated, class S>
__device__ bool multiply_tile(const moe_product &p, bf16 *stages, float (&acc)[S::MI][S::NI][4])
{
    const moe_tile tile = tile_of_block(p);
    const moe_operand &o = operand_of(p, tile);
    const int64_t column = group_of_block(p) * WIDTH<gated>, K = o.w.cols;
    if (tile.n == 0 || column >= o.n) return false;
    const int64_t first = first_weight_row(o, tile) + column;
    const auto x_row = [&](int i) -> const bf16 * {
        return i < tile.n ? static_cast<const bf16 *>(o.x) + source_row(o, tile, i) * K
                          : nullptr;
    };
    const auto w_row = [&](int i) -> weight_row {
        if constexpr (gated)
            return row_of(i / STRIPE % 2 == 0 ? o.w : o.up,
                          first + i / STRIPE / 2 * STRIPE + i % STRIPE);
        else
            return column + i < o.n ? row_of(o.w, first + i) : weight_row{nullptr, nullptr};
    };
    gemm_tile<S, format>(acc, stages, x_row, w_row, static_cast<int>(K));
    return true;
}

template <kl_weight_format format, bool gated, int M>
__global__ __launch_bounds__(
    shape_of<M>::THREADS,
    format == KL_W_BF16 ? 2 : 1) void moe_many_kernel(__grid_constant__ const moe_product p)
{
    using S = shape_of<M>;
    extern __shared__ __align__(128) bf16 stages[];
    float acc[S::MI][S::NI][4];
    if (!multiply_tile<format, gated, S>(p, stages, acc)) return;
    const moe_tile tile = tile_of_block(p); /* again: registers are short in between */
    const moe_operand &o = operand_of(p, tile);
    const int64_t column = group_of_block(p) * WIDTH<gated>;
    if constexpr (gated)
        store_gated<S>(o, tile, column, acc);
    else
        store_plain<S>(o, tile, column, acc);
}

template <kl_weight_format format, bool gated, int M>
kl_status launch(moe_product &p, cudaStream_t stream, kl_error *err)
{
    using S = shape_of<M>;
    unsigned blocks;
    KL_TRY(moe_grid(p, WIDTH<gated>, &blocks, err));
    KL_CUDA_TRY(cudaFuncSetAttribute(moe_many_kernel<format, gated, M>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     S::SHARED_BYTES),
                err);
    moe_many_kernel<format, gated, M><<<blocks, S::THREADS, S::SHARED_BYTES, stream>>>(p);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

template <int M>
kl_status run_many(moe_product p, bool gated, kl_dtype, cudaStream_t stream, kl_error *err)
{
    return with_format(p.routed.format, [&](auto f) {
        return gated ? launch<f.value, true, M>(p, stream, err)
                     : launch<f.value, false, M>(p, stream, err);
    });
}

} // namespace

const moe_path kl_moe_many = {64, run_many<64>}, kl_moe_most = {128, run_many<128>};
