/*
 * moe_experts_few.cu -- the products of moe_experts for few tokens an expert: a decode step.
 *
 * Computes     out = x w^T, or silu(x w^T) * (x up^T), tile by tile (device/moe.cuh)
 * Shapes       x [., K] rows gathered; w, up [E, N, K]; out [., N]; K and N multiples of 64
 * Layout       dense, 16-byte aligned rows; w and up of one format
 * Precision    x bf16; f32 and int4 weights to bf16, int8 and fp8 exact; f32 sums; out bf16
 *              gated, f32 plain
 * Grid         one block for each tile of 8 tokens and 16 rows of the matrix, its warps taking
 *              turns at the columns. Weights go from memory straight into the fragments of the
 *              tensor cores, as A, with the tokens as B: the columns of a product may come in
 *              any order that both share, so a lane reads 16 bytes of a row as they lie
 * Order        an element: a warp's columns in rising order, then the warps in order
 * Roofline     bytes = the weights of the experts chosen, read once for every 8 tokens: 42 us
 *              for a token of the model in bf16 at 3.0 TB/s
 * Measured     H100 with another job beside, bf16, 256 experts: T = 1 2.66 TB/s gated and 2.48
 *              TB/s plain, T = 16 2.86, T = 128 2.8 (2026-11-22)
 */
#include "../device/math.cuh"
#include "../device/moe.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int TILE = 8, ROWS = 16, WARPS = 8, THREADS = WARPS * WARP;
constexpr int LANES = 4; /* that share a row of the fragments             */
constexpr int LOADS = 8; /* of 16 bytes in flight for a lane: 32 KiB a block */

/* PIECE neighbouring values of a token, as pairs. */
template <int PIECE> __device__ void load_pairs(const bf16 *from, uint32_t (&to)[PIECE / 2])
{
    if constexpr (PIECE == 4) {
        const uint2 v = *reinterpret_cast<const uint2 *>(from);
        to[0] = v.x, to[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < PIECE / 8; i++) {
            const uint4 v = reinterpret_cast<const uint4 *>(from)[i];
            to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
        }
    }
}

/* The two rows of a matrix that a lane reads, r and r + 8 of the block's 16. */
struct lane_rows {
    weight_row at[2];

    __device__ lane_rows(const weight_view &w, int64_t row)
        : at{row_of(w, row), row_of(w, row + 8)}
    {
    }
};

/* sum += rows x^T over one piece of each lane. Where the pieces of four lanes are one group,
 * its scale is applied to their f32 sum, so that the weights lose nothing. */
template <kl_weight_format format>
__device__ void multiply(const lane_rows &rows, const uint4 (&raw)[2], int64_t piece,
                         const uint32_t (&x)[weight_codec<format>::PIECE / 2], float (&sum)[4])
{
    using codec = weight_codec<format>;
    constexpr bool whole_group = codec::GROUP == LANES * codec::PIECE;
    float scale[2], part[4] = {};
    uint32_t w[2][codec::PIECE / 2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        scale[i] = scale_at<format>(rows.at[i], piece * codec::PIECE);
        codec::pairs(raw[i], whole_group ? 1.0f : scale[i], w[i]);
    }
    float(&to)[4] = whole_group ? part : sum;
#pragma unroll
    for (int s = 0; s < codec::PIECE / 2; s += 2)
        mma_bf16(to, {w[0][s], w[1][s], w[0][s + 1], w[1][s + 1]}, {x[s], x[s + 1]});
    if constexpr (whole_group)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = fmaf(scale[i / 2], part[i], sum[i]);
}

/* This warp's share of the columns; lane 4 r + c holds rows r, r + 8 and tokens 2c, 2c + 1. */
template <kl_weight_format format, int MATRICES>
__device__ void accumulate(const lane_rows (&rows)[MATRICES], const bf16 *x, int64_t pieces,
                           float (&sum)[MATRICES][4])
{
    using codec = weight_codec<format>;
    constexpr int DEPTH = LOADS / 2 / MATRICES;
    constexpr int64_t TURN = LANES * WARPS; /* pieces that the block takes at a time */
    for (int64_t base = warp_id() * LANES; base < pieces; base += TURN * DEPTH) {
        const int64_t first = base + lane_id() % LANES;
        uint4 raw[DEPTH][MATRICES][2];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int m = 0; m < MATRICES; m++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int64_t piece = first + d * TURN;
                    raw[d][m][i] = piece < pieces ? load_once(rows[m].at[i].data + piece * 16)
                                                  : uint4{0, 0, 0, 0};
                }
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int64_t piece = first + d * TURN;
            uint32_t pairs[codec::PIECE / 2] = {};
            if (x != nullptr && piece < pieces)
                load_pairs<codec::PIECE>(x + piece * codec::PIECE, pairs);
#pragma unroll
            for (int m = 0; m < MATRICES; m++)
                multiply<format>(rows[m], raw[d][m], piece < pieces ? piece : 0, pairs, sum[m]);
        }
    }
}

/* What the warps hold of the block's result, token by token. */
template <int MATRICES> using partial_sums = float[MATRICES][WARPS][TILE][ROWS];

template <int MATRICES>
__device__ void share_sums(const float (&sum)[MATRICES][4], partial_sums<MATRICES> &all)
{
    const int row = lane_id() / LANES, token = lane_id() % LANES * 2;
#pragma unroll
    for (int m = 0; m < MATRICES; m++) {
        all[m][warp_id()][token][row] = sum[m][0];
        all[m][warp_id()][token + 1][row] = sum[m][1];
        all[m][warp_id()][token][row + 8] = sum[m][2];
        all[m][warp_id()][token + 1][row + 8] = sum[m][3];
    }
    __syncthreads();
}

__device__ float add_warps(const float (&all)[WARPS][TILE][ROWS], int token, int row)
{
    float sum = 0;
    for (int w = 0; w < WARPS; w++) sum += all[w][token][row];
    return sum;
}

template <kl_weight_format format, bool gated>
__global__ __launch_bounds__(THREADS) void moe_few_kernel(__grid_constant__ const moe_product p)
{
    constexpr int MATRICES = gated ? 2 : 1;
    __shared__ partial_sums<MATRICES> all;
    const moe_tile tile = tile_of_block(p);
    const moe_operand &o = operand_of(p, tile);
    const int64_t column = group_of_block(p) * ROWS;
    if (tile.n == 0 || column >= o.n) return;
    const int64_t row = first_weight_row(o, tile) + column + lane_id() / LANES;
    const int token = lane_id() / LANES; /* as B, a lane has one token */
    const bf16 *x = token < tile.n
                        ? static_cast<const bf16 *>(o.x) + source_row(o, tile, token) * o.w.cols
                        : nullptr;
    const int64_t pieces = o.w.cols / weight_codec<format>::PIECE;
    float sum[MATRICES][4] = {};
    if constexpr (gated) {
        const lane_rows rows[] = {{o.w, row}, {o.up, row}};
        accumulate<format>(rows, x, pieces, sum);
    } else {
        const lane_rows rows[] = {{o.w, row}};
        accumulate<format>(rows, x, pieces, sum);
    }
    share_sums(sum, all);
    const int i = threadIdx.x % ROWS, t = threadIdx.x / ROWS;
    if (t >= tile.n) return;
    const int64_t at = (tile.first + t) * o.n + column + i;
    const float result = add_warps(all[0], t, i);
    if constexpr (gated)
        static_cast<bf16 *>(o.out)[at] =
            from_float<bf16>(silu(result) * add_warps(all[1], t, i));
    else
        static_cast<float *>(o.out)[at] = result;
}

kl_status run_few(moe_product p, bool gated, kl_dtype, cudaStream_t stream, kl_error *err)
{
    unsigned blocks;
    KL_TRY(moe_grid(p, ROWS, &blocks, err));
    return with_format(p.routed.format, [&](auto f) {
        if (gated)
            moe_few_kernel<f.value, true><<<blocks, THREADS, 0, stream>>>(p);
        else
            moe_few_kernel<f.value, false><<<blocks, THREADS, 0, stream>>>(p);
        KL_CUDA_TRY(cudaGetLastError(), err);
        return KL_OK;
    });
}

} // namespace

const moe_path kl_moe_few = {TILE, run_few};
