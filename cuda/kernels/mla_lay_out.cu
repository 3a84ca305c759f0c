/*
 * mla_lay_out.cu -- pages for the contexts of a ragged batch, where only the device knows it.
 *
 * Computes     lengths[n] = past + new tokens; block_table[n, b] = (tokens before sequence n) / 64
 *              + n + b, backend/ops.h
 * Shapes       cu_past, cu_seqlens [N+1]; lengths [N]; block_table [N, B]
 * Layout       dense
 * Precision    int32
 * Grid         a block for each sequence
 * Roofline     4 bytes an entry of the table: a launch's time
 * Measured     not timed yet
 */
#include "../cuda_backend.h"
#include "../device/types.cuh"

namespace {

constexpr int THREADS = 256;

struct arguments {
    const int *past, *cu; /* past: or null */
    int *lengths, *table;
    long long B;
};

__global__
__launch_bounds__(THREADS) void mla_lay_out_kernel(__grid_constant__ const arguments a)
{
    const long long n = blockIdx.x;
    const long long before = a.past == nullptr ? 0 : a.past[n];
    const long long first = (before + a.cu[n]) / KL_PAGE_TOKENS + n;
    if (threadIdx.x == 0)
        a.lengths[n] =
            (a.past == nullptr ? 0 : a.past[n + 1] - a.past[n]) + a.cu[n + 1] - a.cu[n];
    for (long long b = threadIdx.x; b < a.B; b += THREADS)
        a.table[n * a.B + b] = static_cast<int>(first + b);
}

} // namespace

kl_status kl_cuda_mla_lay_out(kl_backend *be, const kl_mla_lay_out *a, kl_error *err)
{
    const arguments args = {
        .past = static_cast<const int *>(a->cu_past.data),
        .cu = static_cast<const int *>(a->cu_seqlens.data),
        .lengths = static_cast<int *>(a->lengths.data),
        .table = static_cast<int *>(a->block_table.data),
        .B = a->block_table.shape[1],
    };
    const long long N = a->lengths.shape[0];
    if (N == 0) return KL_OK;
    if (N > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE, "mla_lay_out: N must be <= %lld, got %lld",
                       MAX_BLOCKS, N);
    mla_lay_out_kernel<<<static_cast<unsigned>(N), THREADS, 0, kl_cuda_stream(be)>>>(args);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}
