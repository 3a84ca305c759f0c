/*
 * linear_many.cu -- a matrix product of many tokens on the tensor cores, any weight format.
 * Computes     out = x w^T, or with a second weight silu(x w^T) * (x up^T)
 * Shapes       x [T, in]; w, up [O, in]; out [T, O]
 * Layout       rows of x and of out strided; weights in pieces of 16 bytes
 * Precision    bf16 x; weights rounded to bf16; f32 sums; f32 or bf16 out
 * Grid         a block for each tile of tokens and outputs, tokens fastest: blocks that run
 *              together share their rows of the weight in the L2. A tile with a second weight
 *              holds their rows in turn, so that a thread has both factors of an output
 * Roofline     2 T O in flops at 660 TFLOP/s, what mma.sync reaches of the H100's 989
 * Measured     H100 that another job was using, best of 25: T = 4096, [4096, 2304] bf16 283 us,
 *              273 TFLOP/s; int8 464 us, int4 412 us, fp8 488 us; cuBLASLt takes 105 us in bf16
 */
#include "../device/gemm.cuh"
#include "../device/math.cuh"
#include "../device/product.cuh"

namespace {

using large = gemm_shape<128, 128, 2, 4>;
using small = gemm_shape<32, 64, 2, 2>; /* few tokens: more blocks, less waste */

/* Rows of the tiles: twice the outputs with a second weight. */
template <bool gated> __host__ __device__ int64_t tile_rows(const product_arguments &a)
{
    return gated ? 2 * a.w.rows : a.w.rows;
}

template <class Out> __device__ void store_pair(Out *to, bool pair, bool both, float a, float b)
{
    if (pair) {
        store_floats<2>(to, {a, b});
        return;
    }
    to[0] = from_float<Out>(a);
    if (both) to[1] = from_float<Out>(b);
}

template <class S, bool gated, class Out>
__device__ void store_tile(const product_arguments &a, const float (&acc)[S::MI][S::NI][4],
                           int64_t t, int64_t o)
{
    Out *const out = static_cast<Out *>(a.out);
    const int64_t rows = tile_rows<gated>(a);
    const bool pairs =
        a.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(out) % (2 * sizeof(Out)) == 0;
    gemm_for_pairs<S>(acc, [&](int row, int col, float even, float odd) {
        if (t + row >= a.T || o + col >= rows) return;
        Out *const line = out + (t + row) * a.out_stride;
        if constexpr (gated) {
            line[(o + col) / 2] = from_float<Out>(silu(even) * odd);
        } else {
            const bool both = o + col + 1 < rows;
            store_pair(line + o + col, pairs && both, both, even, odd);
        }
    });
}

template <class S, kl_weight_format format, bool gated, class Out>
__global__
__launch_bounds__(S::THREADS,
                  2) void product_many_kernel(const __grid_constant__ product_arguments a)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const int64_t t = blockIdx.x % a.t_tiles * S::M, o = blockIdx.x / a.t_tiles * S::N;
    const bf16 *const x = static_cast<const bf16 *>(a.x);
    const auto x_row = [&](int i) { return t + i < a.T ? x + (t + i) * a.x_stride : nullptr; };
    const auto w_row = [&](int i) {
        if (o + i >= tile_rows<gated>(a)) return weight_row{nullptr, nullptr};
        if constexpr (gated) return row_of(i % 2 == 0 ? a.w : a.up, (o + i) / 2);
        return row_of(a.w, o + i);
    };
    float acc[S::MI][S::NI][4];
    gemm_tile<S, format>(acc, reinterpret_cast<bf16 *>(shared), x_row, w_row,
                         static_cast<int>(a.w.cols));
    store_tile<S, gated, Out>(a, acc, t, o);
}

template <class S, kl_weight_format format, bool gated, class Out>
kl_status launch(kl_backend *be, product_arguments a, kl_error *err)
{
    const auto kernel = product_many_kernel<S, format, gated, Out>;
    a.t_tiles = (a.T + S::M - 1) / S::M;
    unsigned blocks;
    KL_TRY(product_grid(a, (tile_rows<gated>(a) + S::N - 1) / S::N, &blocks, err));
    KL_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     S::SHARED_BYTES),
                err);
    kernel<<<blocks, S::THREADS, S::SHARED_BYTES, kl_cuda_stream(be)>>>(a);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

template <class S, kl_weight_format format>
kl_status launch_for(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const product_arguments a = product_arguments_of(p);
    return with_output(p, [&](auto gated, auto out) {
        return launch<S, format, gated.value, decltype(out)>(be, a, err);
    });
}

} // namespace

kl_status kl_cuda_product_many(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    return with_format(p->w.format, [&](auto f) {
        if constexpr (f.value == KL_W_F32)
            return kl_fail(err, KL_ERR_VALUE, "linear: no tiles of a float32 weight");
        else if (p->T <= small::M)
            return launch_for<small, f.value>(be, p, err);
        else
            return launch_for<large, f.value>(be, p, err);
    });
}
