/*
 * kda_mixer_prefill.cu -- a KDA layer between its projections, of any number of tokens a sequence.
 *
 * Computes     q, k, v = silu(conv(qkv));  o = kda_prefill(q, k, v, g, beta);
 *              out = o / sqrt(mean(o^2) + eps) * weight * sigmoid(z), as backend/ops.h has it
 * Shapes       qkv [T, H (2 K + V)]; g [T, H, K]; beta [T, H]; z, out [T, H, V]; state
 *              [S, H, V, K]; windows [S, C, 3]; any, but what is said below is for K = V = 128
 * Layout       the states and windows dense; of the others the first axis may be strided
 * Precision    that of the three operations, to the bit; q, k and v are rounded between them
 * Grid         the convolution also takes the norms of q and k, which then need not be found again
 *              by each chunk, and kda_prefill's blocks the gated norm (kda_prefill_finish.cuh); a
 *              last token that kda_prefill leaves to kda_decode's arithmetic is normed here, 16
 *              lanes a head. Other shapes are three operations
 * Roofline     convolution 4 * 3 H K, recurrence 1,538 H, gates 256 H bytes a token: 8,192 tokens of
 *              32 heads 873 MB, 291 us on an H100 (3.0 TB/s)
 * Measured     not timed yet
 */
#include "kda_mixer_prefill.cuh"

#include "../device/launch.cuh"
#include "../device/wide.cuh"
#include "kda_prefill.cuh"
#include "short_conv.cuh"

namespace {

constexpr int THREADS = 256, VEC = 8, LANES = KDA_FINISHED_V / VEC;

struct last_arguments {
    bf16 *out;
    const bf16 *z;
    const float *weight;
    const int *cu;
    long long z_stride, N, H;
    float eps;
};

/* gated_rms_norm of the last tokens past a multiple of KDA_GRID, in its order. */
__global__
__launch_bounds__(THREADS) void finish_last_kernel(__grid_constant__ const last_arguments a)
{
    const long long row =
        static_cast<long long>(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
    const long long n = row / a.H, h = row % a.H;
    const int column = threadIdx.x % LANES * VEC;
    float x[VEC] = {}, z[VEC], weight[VEC], sum = 0;
    let_next_start();
    wait_for_inputs();
    const bool inside = n < a.N && (a.cu[n + 1] - a.cu[n]) % KDA_GRID == 1;
    const long long t = inside ? a.cu[n + 1] - 1 : 0;
    bf16 *const out = a.out + (t * a.H + h) * KDA_FINISHED_V + column;
    if (inside) {
        load_wide(out, x);
        load_wide(a.z + t * a.z_stride + h * KDA_FINISHED_V + column, z);
    }
#pragma unroll
    for (int j = 0; j < VEC; j++) sum = fmaf(x[j], x[j], sum);
    const float inverse = inverse_rms(warp_sum<LANES>(sum), KDA_FINISHED_V, a.eps);
    if (!inside) return;
    load_wide(a.weight + column, weight);
#pragma unroll
    for (int j = 0; j < VEC; j++) x[j] = x[j] * inverse * weight[j] * sigmoid(z[j]);
    store_wide(out, x);
}

kl_status finish_last(kl_backend *be, const kl_kda_mixer_parts &p, kl_error *err)
{
    const last_arguments a = {
        .out = static_cast<bf16 *>(p.norm.out.data),
        .z = static_cast<const bf16 *>(p.norm.z.data),
        .weight = static_cast<const float *>(p.norm.weight.data),
        .cu = static_cast<const int *>(p.kda.cu_seqlens.data),
        .z_stride = p.norm.z.stride[0],
        .N = p.kda.cu_seqlens.shape[0] - 1,
        .H = p.kda.state.shape[1],
        .eps = p.norm.eps,
    };
    const long long blocks = (a.N * a.H * LANES + THREADS - 1) / THREADS;
    return kl_cuda_launch(finish_last_kernel, static_cast<unsigned>(blocks), THREADS, 0,
                          kl_cuda_stream(be), err, a);
}

/* Before there are tensors, by their shapes. */
size_t unit_bytes(const kl_kda &a)
{
    const size_t n = static_cast<size_t>(a.q.shape[0] * a.state.shape[1]) * 2 * sizeof(float);
    return (n + 255) / 256 * 256;
}

bool is_fused(const kl_kda_mixer_parts &p)
{
    const kl_kda &a = p.kda;
    return kda_chunked_applies(&a) && a.state.shape[2] == KDA_FINISHED_V &&
           a.q.shape[1] == a.state.shape[1] && a.normalize && short_conv_is_wide(&p.conv) &&
           is_wide(p.norm.z, KDA_FINISHED_V, VEC) &&
           is_wide(p.norm.weight, KDA_FINISHED_V, VEC);
}

} // namespace

size_t kda_mixer_prefill_workspace(kl_backend *be, const kl_kda_mixer_parts &p)
{
    return unit_bytes(p.kda) + kl_cuda_kda_prefill_workspace(be, &p.kda);
}

kl_status kda_mixer_prefill(kl_backend *be, const kl_kda_mixer_parts &p, kl_error *err)
{
    if (!is_fused(p)) {
        KL_TRY(kl_cuda_short_conv(be, &p.conv, err));
        KL_TRY(kl_cuda_kda_prefill(be, &p.kda, err));
        return kl_cuda_gated_rms_norm(be, &p.norm, err);
    }
    kl_kda kda = p.kda;
    float *const units = static_cast<float *>(kda.ws.data);
    kda.ws.data = static_cast<char *>(kda.ws.data) + unit_bytes(kda);
    kda.ws.bytes -= unit_bytes(kda);
    const kda_fused f = {
        .units = units,
        .z = static_cast<const bf16 *>(p.norm.z.data),
        .weight = static_cast<const float *>(p.norm.weight.data),
        .z_stride = p.norm.z.stride[0],
        .eps = p.norm.eps,
    };
    KL_TRY(short_conv_with_units(be, &p.conv, {units, 2 * kda.state.shape[1]}, err));
    KL_TRY(kda_prefill_with(be, &kda, f, err));
    return kda_leaves_last_tokens(&kda) ? finish_last(be, p, err) : KL_OK;
}
