/*
 * fill_normal.cu -- normally distributed numbers by their index.
 *
 * Computes     out[2p], out[2p + 1] = mean + std * (the pair p of fill_normal in backend/ops.h)
 * Shapes       out of any shape, as size elements
 * Layout       dense
 * Precision    double, rounded to f32 and from there to bf16, as on the CPU
 * Grid         a thread a pair; no pair needs another one
 * Roofline     about 200 instructions a pair, half of them double: bound by these, some 2 ns
 *              for a thousand numbers
 * Measured     not timed yet; right on an H100, beside the CPU's results (2026-11-22)
 */
#include "../device/types.cuh"

#include "base/rng.h"

namespace {

constexpr int THREADS = 256;

/* 53 random bits as a double in [0, 1). */
__device__ double uniform(uint32_t high, uint32_t low)
{
    return static_cast<double>((static_cast<uint64_t>(high) << 32 | low) >> 11) * 0x1p-53;
}

template <class T>
__global__ __launch_bounds__(THREADS) void fill_normal_kernel(T *out, int64_t size,
                                                              uint64_t seed, double mean,
                                                              double std)
{
    const int64_t pair = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (2 * pair >= size) return;
    uint32_t r[4];
    kl_philox(seed, static_cast<uint64_t>(pair), r);
    const double radius = sqrt(-2.0 * log1p(-uniform(r[0], r[1])));
    double sine, cosine;
    sincospi(2 * uniform(r[2], r[3]), &sine, &cosine);
    out[2 * pair] = from_float<T>(static_cast<float>(mean + std * (radius * cosine)));
    if (2 * pair + 1 < size)
        out[2 * pair + 1] = from_float<T>(static_cast<float>(mean + std * (radius * sine)));
}

} // namespace

kl_status kl_cuda_fill_normal(kl_backend *be, const kl_fill_normal *a, kl_error *err)
{
    const int64_t size = kl_tensor_size(&a->out);
    const int64_t blocks = (size + 2 * THREADS - 1) / (2 * THREADS);
    if (size == 0) return KL_OK;
    if (blocks > MAX_BLOCKS)
        return kl_fail(
            err, KL_ERR_VALUE, "fill_normal: out must have <= %lld elements, got %lld",
            static_cast<long long>(MAX_BLOCKS * 2 * THREADS), static_cast<long long>(size));
    return with_float_type(a->out.dtype, [&](auto t) {
        using T = decltype(t);
        fill_normal_kernel<<<static_cast<unsigned>(blocks), THREADS, 0, kl_cuda_stream(be)>>>(
            static_cast<T *>(a->out.data), size, a->seed, static_cast<double>(a->mean),
            static_cast<double>(a->std));
        KL_CUDA_TRY(cudaGetLastError(), err);
        return KL_OK;
    });
}
