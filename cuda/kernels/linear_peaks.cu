/*
 * linear_peaks.cu -- the peaks of logits that are in memory, where the kernel of the product has
 * not left them.
 * Computes     of each 16 outputs of a row m = max z, s = sum exp(z - m): kl_linear's peaks
 * Shapes       z [T, O], peaks [T, ceil(O / 16), 2]
 * Layout       rows of z strided, the peaks dense
 * Precision    f32
 * Grid         a block takes ROWS_A_BLOCK outputs of a row, half a warp a peak
 * Roofline     4 T O bytes read, an eighth of that written: T = 16 of 163,840 in 2.8 us of an
 *              H200's bandwidth, less where they are in the L2
 * Measured     H200, in a step, O = 163,840: T = 16 6.9 us, 32 13.5, 64 25.1 (1.7 TB/s)
 *              (2026-11-23)
 */
#include "../device/launch.cuh"
#include "../device/peaks.cuh"
#include "../device/types.cuh"
#include "../peaks.h"

namespace {

constexpr int THREADS = 256, AT_ONCE = 4; /* loads in flight a thread */
constexpr int64_t ROWS_A_BLOCK = THREADS * AT_ONCE;

static_assert(PEAK == KL_PEAK_OUTPUTS);

__global__ __launch_bounds__(THREADS) void peaks_kernel(const float *z, int64_t stride,
                                                        uint32_t O, unsigned pieces,
                                                        peak *peaks)
{
    const int64_t t = blockIdx.x / pieces;
    const uint32_t first = blockIdx.x % pieces * ROWS_A_BLOCK + threadIdx.x;
    const uint32_t count = peaks_of(O);
    let_next_start();
    wait_for_inputs();
    float y[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
        const uint32_t i = first + j * THREADS;
        y[j] = i < O ? z[t * stride + i] : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
        const uint32_t at = (first + j * THREADS) / PEAK;
        const peak p = peak_of(y[j]);
        if (at < count && threadIdx.x % PEAK == 0) peaks[t * count + at] = p;
    }
}

} // namespace

kl_status kl_cuda_find_peaks(kl_backend *be, const kl_tensor *outputs, float *peaks,
                             kl_error *err)
{
    const int64_t T = outputs->shape[0], O = outputs->shape[1];
    const int64_t pieces = (O + ROWS_A_BLOCK - 1) / ROWS_A_BLOCK;
    if (T == 0) return KL_OK;
    if (O > INT32_MAX || T > MAX_BLOCKS / pieces)
        return kl_fail(err, KL_ERR_VALUE, "peaks: %lld x %lld logits are too many",
                       static_cast<long long>(T), static_cast<long long>(O));
    return kl_cuda_launch(peaks_kernel, static_cast<unsigned>(T * pieces), THREADS, 0,
                          kl_cuda_stream(be), err, static_cast<const float *>(outputs->data),
                          outputs->stride[0], static_cast<uint32_t>(O),
                          static_cast<unsigned>(pieces), reinterpret_cast<peak *>(peaks));
}
