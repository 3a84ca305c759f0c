/*
 * sample_greedy.cu -- the next token of each row where all are greedy, from the peaks of its
 * logits alone.
 * Computes     ids = argmax z, lowest id on a tie;  logprobs = max z - log sum exp z
 * Shapes       logits [N, V], peaks [N, ceil(V / 16), 2], ids and logprobs [N]
 * Layout       dense
 * Precision    exponentials and a thread's sums in f32, the threads' in f64
 * Grid         a block a row, small enough to be there while the last product runs: of the logits
 *              it reads the 16 of one peak. What runs once waits for its instructions, so they are
 *              few
 * Roofline     V / 2 bytes, 82 KB at V = 163,840: 0.8 us for one multiprocessor
 * Measured     V = 163,840, in a step: H200 4.3 us (2026-11-23), H100 4.1 (2026-11-22)
 */
#include "../device/launch.cuh"
#include "../device/peaks.cuh"
#include "../peaks.h"

namespace {

__global__ __launch_bounds__(PEAK_THREADS,
                             2) void sample_greedy_kernel(const float *logits,
                                                          const peak *peaks, int *ids,
                                                          float *logprobs, uint32_t V)
{
    __shared__ peaks_shared s;
    const int64_t n = blockIdx.x;
    let_next_start();
    wait_for_inputs();
    const row_top top = find_top(logits + n * V, peaks + n * peaks_of(V), V, s);
    if (threadIdx.x != 0) return;
    const bool known = isfinite(top.value);
    ids[n] = known ? top.id : -1;
    logprobs[n] =
        known ? static_cast<float>(static_cast<double>(top.value) - top.log_sum) : NAN;
}

} // namespace

kl_status kl_cuda_sample_greedy(kl_backend *be, const kl_sample *a, kl_error *err)
{
    return kl_cuda_launch(
        sample_greedy_kernel, static_cast<unsigned>(a->logits.shape[0]), PEAK_THREADS, 0,
        kl_cuda_stream(be), err, static_cast<const float *>(a->logits.data),
        static_cast<const peak *>(a->peaks.data), static_cast<int *>(a->ids.data),
        static_cast<float *>(a->logprobs.data), static_cast<uint32_t>(a->logits.shape[1]));
}
