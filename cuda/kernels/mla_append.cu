/*
 * mla_append.cu -- writing the latents of new tokens into their sequences' pages.
 *
 * Computes     row = [ rms_norm(raw[:rank]) * norm_weight | raw[rank:] ], backend/ops.h
 * Shapes       raw [T, rank+rope]; pages [P, 64, rank+rope]; block_table [N, B]
 * Layout       raw's rows strided, the others dense
 * Precision    f32 or bf16 in and out, f32 arithmetic, rounded once
 * Grid         a warp for each token: it finds the token's sequence, sums the squares and writes
 *              the row
 * Roofline     4 bytes a channel of bf16: memory-bound, 0.8 ns a token of 576 at 3.0 TB/s
 * Measured     not timed yet; right on an H100 (2026-11-22)
 */
#include "../device/latents.cuh"
#include "../device/launch.cuh"
#include "../device/ragged.cuh"

namespace {

constexpr int WARPS = 4;

struct arguments {
    new_latents latents;
    const int *cu_seqlens; /* or null: a token each */
    long long T, N;
};

template <class T>
__global__
__launch_bounds__(WARPS *WARP) void mla_append_kernel(__grid_constant__ const arguments a)
{
    const long long token = static_cast<long long>(blockIdx.x) * WARPS + warp_id();
    const int *cu = a.cu_seqlens;
    let_next_start();
    wait_for_inputs();
    if (token >= a.T) return;
    const long long n =
        cu == nullptr ? token : last_begun(a.N, [&](long long i) { return cu[i] <= token; });
    const long long left = cu == nullptr ? 1 : cu[n + 1] - token;
    write_latents<T>(a.latents, token, n, a.latents.lengths[n] - left);
}

} // namespace

kl_status kl_cuda_mla_append(kl_backend *be, const kl_mla_append *a, kl_error *err)
{
    const arguments args = {
        .latents = new_latents_of(a),
        .cu_seqlens = static_cast<const int *>(a->cu_seqlens.data),
        .T = a->raw.shape[0],
        .N = a->lengths.shape[0],
    };
    if (args.T == 0) return KL_OK;
    const long long blocks = (args.T + WARPS - 1) / WARPS;
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE, "mla_append: T must be <= %lld, got %lld",
                       MAX_BLOCKS * WARPS, args.T);
    return with_float_type(a->raw.dtype, [&](auto t) {
        return kl_cuda_launch(mla_append_kernel<decltype(t)>, static_cast<unsigned>(blocks),
                              WARPS * WARP, 0, kl_cuda_stream(be), err, args);
    });
}
