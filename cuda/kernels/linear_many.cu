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
#include "../product.h"

namespace {

using large = gemm_shape<128, 128, 2, 4>;
using small = gemm_shape<32, 64, 2, 2>; /* few tokens: more blocks, less waste */

constexpr int64_t MAX_BLOCKS = 0x7fffffff;

struct arguments {
    const bf16 *x;
    weight_view w, up;
    void *out;
    int64_t T, x_stride, out_stride;
    int64_t t_tiles, O; /* O counts rows of the tiles: twice the outputs with a second weight */
};

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
__device__ void store_tile(const arguments &a, const float (&acc)[S::MI][S::NI][4], int64_t t,
                           int64_t o)
{
    Out *const out = static_cast<Out *>(a.out);
    const bool pairs =
        a.out_stride % 2 == 0 && reinterpret_cast<uintptr_t>(out) % (2 * sizeof(Out)) == 0;
    gemm_for_pairs<S>(acc, [&](int row, int col, float even, float odd) {
        if (t + row >= a.T || o + col >= a.O) return;
        Out *const line = out + (t + row) * a.out_stride;
        if constexpr (gated) {
            line[(o + col) / 2] = from_float<Out>(silu(even) * odd);
        } else {
            const bool both = o + col + 1 < a.O;
            store_pair(line + o + col, pairs && both, both, even, odd);
        }
    });
}

template <class S, kl_weight_format format, bool gated, class Out>
__global__ __launch_bounds__(S::THREADS,
                             2) void product_many_kernel(const __grid_constant__ arguments a)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const int64_t t = blockIdx.x % a.t_tiles * S::M, o = blockIdx.x / a.t_tiles * S::N;
    const auto x_row = [&](int i) {
        return t + i < a.T ? a.x + (t + i) * a.x_stride : nullptr;
    };
    const auto w_row = [&](int i) {
        if (o + i >= a.O) return weight_row{nullptr, nullptr};
        if constexpr (gated) return row_of(i % 2 == 0 ? a.w : a.up, (o + i) / 2);
        return row_of(a.w, o + i);
    };
    float acc[S::MI][S::NI][4];
    gemm_tile<S, format>(acc, reinterpret_cast<bf16 *>(shared), x_row, w_row,
                         static_cast<int>(a.w.cols));
    store_tile<S, gated, Out>(a, acc, t, o);
}

template <class S, kl_weight_format format, bool gated, class Out>
kl_status launch(kl_backend *be, arguments a, kl_error *err)
{
    const auto kernel = product_many_kernel<S, format, gated, Out>;
    a.t_tiles = (a.T + S::M - 1) / S::M;
    const int64_t o_tiles = (a.O + S::N - 1) / S::N;
    if (a.t_tiles > MAX_BLOCKS / o_tiles)
        return kl_fail(err, KL_ERR_VALUE, "linear: %lld x %lld outputs are too many",
                       static_cast<long long>(a.T), static_cast<long long>(a.O));
    KL_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     S::SHARED_BYTES),
                err);
    const unsigned blocks = static_cast<unsigned>(a.t_tiles * o_tiles);
    kernel<<<blocks, S::THREADS, S::SHARED_BYTES, kl_cuda_stream(be)>>>(a);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

template <class S, kl_weight_format format>
kl_status launch_for(kl_backend *be, const kl_cuda_product *p, const arguments &a,
                     kl_error *err)
{
    const bool gated = p->up.data != nullptr;
    return with_float_type(p->out_dtype, [&](auto out) {
        using Out = decltype(out);
        return gated ? launch<S, format, true, Out>(be, a, err)
                     : launch<S, format, false, Out>(be, a, err);
    });
}

} // namespace

kl_status kl_cuda_product_many(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const bool gated = p->up.data != nullptr;
    const arguments a = {
        .x = static_cast<const bf16 *>(p->x),
        .w = weight_view_of(p->w),
        .up = gated ? weight_view_of(p->up) : weight_view{},
        .out = p->out,
        .T = p->T,
        .x_stride = p->x_stride,
        .out_stride = p->out_stride,
        .O = gated ? 2 * p->w.rows : p->w.rows,
    };
    return with_format(p->w.format, [&](auto f) {
        if constexpr (f.value == KL_W_F32)
            return kl_fail(err, KL_ERR_VALUE, "linear: no tiles of a float32 weight");
        else if (p->T <= small::M)
            return launch_for<small, f.value>(be, p, a, err);
        else
            return launch_for<large, f.value>(be, p, a, err);
    });
}
