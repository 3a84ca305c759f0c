/*
 * mla_append.cu -- writing the latents of new tokens into their sequences' pages.
 *
 * Computes     row = [ rms_norm(raw[:rank]) * norm_weight | raw[rank:] ], backend/ops.h
 * Shapes       raw [T, rank+rope]; pages [P, 64, rank+rope]; block_table [N, B]
 * Layout       raw's rows strided, the others dense
 * Precision    f32 or bf16 in and out, f32 arithmetic, rounded once
 * Grid         a warp for each token: it finds the token's sequence, sums the squares and writes
 *              the row, whose second reading comes from the L1
 * Roofline     4 bytes a channel of bf16: memory-bound, 0.8 ns a token of 576 at 3.0 TB/s
 * Measured     not timed yet; right on an H100 (2026-11-22)
 */
#include "../device/launch.cuh"
#include "../device/ragged.cuh"
#include "../device/types.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int WARPS = 4;

struct arguments {
    const void *raw;
    void *pages;
    const float *norm_weight; /* or null: the row is copied */
    const int *block_table, *lengths, *cu_seqlens;
    long long T, N, B, stride, width, rank;
    float eps;
};

/* Which row of all pages a token is written to. */
__device__ long long row_of(const arguments &a, long long token)
{
    const long long n = last_begun(a.N, [&](long long i) { return a.cu_seqlens[i] <= token; });
    const long long position = a.lengths[n] - (a.cu_seqlens[n + 1] - token);
    const long long page = a.block_table[n * a.B + position / KL_PAGE_TOKENS];
    return page * KL_PAGE_TOKENS + position % KL_PAGE_TOKENS;
}

template <int VEC, class T> __device__ float sum_of_squares(const T *x, long long count)
{
    float sum = 0;
    for (long long i = lane_id() * VEC; i < count; i += WARP * VEC) {
        float v[VEC];
        load_floats<VEC>(x + i, v);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum = fmaf(v[j], v[j], sum);
    }
    return warp_sum(sum);
}

/* VEC divides rank and width: a vector is normalised or copied as a whole. */
template <int VEC, class T>
__global__
__launch_bounds__(WARPS *WARP) void mla_append_kernel(__grid_constant__ const arguments a)
{
    const long long token = static_cast<long long>(blockIdx.x) * WARPS + warp_id();
    let_next_start();
    wait_for_inputs();
    if (token >= a.T) return;
    const T *from = static_cast<const T *>(a.raw) + token * a.stride;
    T *to = static_cast<T *>(a.pages) + row_of(a, token) * a.width;
    const long long normalised = a.norm_weight == nullptr ? 0 : a.rank;
    float factor = 1;
    if (normalised > 0)
        factor =
            1 / sqrtf(sum_of_squares<VEC>(from, a.rank) / static_cast<float>(a.rank) + a.eps);

    for (long long i = lane_id() * VEC; i < a.width; i += WARP * VEC) {
        float v[VEC];
        load_floats<VEC>(from + i, v);
        if (i < normalised)
            for (int j = 0; j < VEC; j++) v[j] = v[j] * factor * a.norm_weight[i + j];
        store_floats<VEC>(to + i, v);
    }
}

template <class T> kl_status launch(const arguments &a, cudaStream_t stream, kl_error *err)
{
    constexpr int VEC = 16 / sizeof(T);
    const long long blocks = (a.T + WARPS - 1) / WARPS;
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE, "mla_append: T must be <= %lld, got %lld",
                       MAX_BLOCKS * WARPS, a.T);
    const bool vector = a.rank % VEC == 0 && a.width % VEC == 0 &&
                        is_aligned(a.raw, a.stride, sizeof(T), 16) &&
                        is_aligned(a.pages, a.width, sizeof(T), 16);
    return kl_cuda_launch(vector ? mla_append_kernel<VEC, T> : mla_append_kernel<1, T>,
                          static_cast<unsigned>(blocks), WARPS * WARP, 0, stream, err, a);
}

} // namespace

kl_status kl_cuda_mla_append(kl_backend *be, const kl_mla_append *a, kl_error *err)
{
    const bool norm = !kl_tensor_absent(&a->norm_weight);
    const arguments args = {
        .raw = a->raw.data,
        .pages = a->pages.data,
        .norm_weight = static_cast<const float *>(a->norm_weight.data),
        .block_table = static_cast<const int *>(a->block_table.data),
        .lengths = static_cast<const int *>(a->lengths.data),
        .cu_seqlens = static_cast<const int *>(a->cu_seqlens.data),
        .T = a->raw.shape[0],
        .N = a->lengths.shape[0],
        .B = a->block_table.shape[1],
        .stride = a->raw.stride[0],
        .width = a->raw.shape[1],
        .rank = norm ? a->norm_weight.shape[0] : 0,
        .eps = a->eps,
    };
    if (args.T == 0) return KL_OK;
    return with_float_type(a->raw.dtype, [&](auto t) {
        return launch<decltype(t)>(args, kl_cuda_stream(be), err);
    });
}
