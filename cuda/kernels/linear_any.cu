/*
 * linear_any.cu -- a matrix product of any shape, alignment and type.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T)
 * Shapes       x [T, in]; w, up [O, in]; out [T, O]
 * Layout       rows of x and of out strided; nothing is assumed of alignment
 * Precision    f32 or bf16 x; weights as they are; f32 fma in the order of the columns
 * Grid         a block for each 32 tokens and 32 outputs, tokens fastest; a thread holds 2 x 2
 *              sums. Columns pass through shared memory, 32 at a time
 * Roofline     2 T O in flops at 67 TFLOP/s; the float32 models of tests come here, not speed
 * Measured     not timed yet
 */
#include "../device/math.cuh"
#include "../device/product.cuh"

namespace {

constexpr int TILE = 32, SIDE = TILE / 2; /* SIDE x SIDE threads */
constexpr int THREADS = SIDE * SIDE;
constexpr int PITCH = TILE + 1; /* a column of the tile in different banks */

/* A tile of 32 columns of 32 rows, zeros outside; value(row, col) reads one. */
template <class F>
__device__ void fill(float (&tile)[TILE][PITCH], int64_t rows, int64_t cols, F value)
{
    for (int at = threadIdx.x; at < TILE * TILE; at += THREADS) {
        const int row = at / TILE, col = at % TILE;
        tile[row][col] = row < rows && col < cols ? value(row, col) : 0.0f;
    }
}

__device__ inline void multiply(float (&acc)[2][2], const float (&x)[TILE][PITCH],
                                const float (&w)[TILE][PITCH])
{
    const int t = threadIdx.x / SIDE, o = threadIdx.x % SIDE;
#pragma unroll
    for (int k = 0; k < TILE; k++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                acc[i][j] = fmaf(x[t + i * SIDE][k], w[o + j * SIDE][k], acc[i][j]);
}

template <kl_weight_format format, bool gated, class Act, class Out>
__global__
__launch_bounds__(THREADS) void product_any_kernel(const __grid_constant__ product_arguments a)
{
    using codec = weight_codec<format>;
    __shared__ float xs[TILE][PITCH], ws[TILE][PITCH], ups[gated ? TILE : 1][PITCH];
    const int64_t t = blockIdx.x % a.t_tiles * TILE, o = blockIdx.x / a.t_tiles * TILE;
    const Act *const x = static_cast<const Act *>(a.x);
    float acc[2][2] = {}, up[2][2] = {};
    for (int64_t k = 0; k < a.w.cols; k += TILE) {
        const int64_t cols = a.w.cols - k;
        fill(xs, a.T - t, cols,
             [&](int i, int c) { return to_float(x[(t + i) * a.x_stride + k + c]); });
        fill(ws, a.w.rows - o, cols,
             [&](int i, int c) { return codec::at(row_of(a.w, o + i), k + c); });
        if constexpr (gated)
            fill(ups, a.w.rows - o, cols,
                 [&](int i, int c) { return codec::at(row_of(a.up, o + i), k + c); });
        __syncthreads();
        multiply(acc, xs, ws);
        if constexpr (gated) multiply(up, xs, ups);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int64_t row = t + threadIdx.x / SIDE + i * SIDE;
            const int64_t col = o + threadIdx.x % SIDE + j * SIDE;
            if (row >= a.T || col >= a.w.rows) continue;
            const float y = gated ? silu(acc[i][j]) * up[i][j] : acc[i][j];
            static_cast<Out *>(a.out)[row * a.out_stride + col] = from_float<Out>(y);
        }
}

template <kl_weight_format format, bool gated, class Act, class Out>
kl_status launch(kl_backend *be, const product_arguments &a, unsigned blocks, kl_error *err)
{
    product_any_kernel<format, gated, Act, Out><<<blocks, THREADS, 0, kl_cuda_stream(be)>>>(a);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

} // namespace

kl_status kl_cuda_product_any(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    product_arguments a = product_arguments_of(p);
    a.t_tiles = (p->T + TILE - 1) / TILE;
    unsigned blocks;
    KL_TRY(product_grid(a, (p->w.rows + TILE - 1) / TILE, &blocks, err));
    return with_format(p->w.format, [&](auto f) {
        return with_float_type(p->act, [&](auto act) {
            return with_output(p, [&](auto gated, auto out) {
                return launch<f.value, gated.value, decltype(act), decltype(out)>(be, a, blocks,
                                                                                  err);
            });
        });
    });
}
