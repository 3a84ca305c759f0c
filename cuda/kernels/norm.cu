/*
 * norm.cu -- rms_norm, with the residual sum before it, and gated_rms_norm.
 *
 * Computes     r = residual + x, stored back;  out = r / sqrt(mean(r^2) + eps) * weight
 *              out = x / sqrt(mean(x^2) + eps) * weight * sigmoid(z), a row for each head
 * Shapes       x, residual, out [T, D];  x, z, out [T, H, D];  weight [D]
 * Layout       the first axis of x, z and residual may have any stride, the rest is dense
 * Precision    f32 or bf16 in and out, the residual f32 too; f32 inside. What is normalised is
 *              the sum as it was stored
 * Grid         rms_norm: a block a row, which stays in registers between the sum and the scaling;
 *              gated: a part of a warp a row. Rows that are not aligned, or longer than the
 *              registers hold, are read twice by a block
 * Order        a function of D and the layout alone: rms_norm's that of wide.cuh, gated rows'
 *              that of gated_norm.cuh; where rows are not aligned, a thread sums its elements in
 *              rising order, then butterflies and warps
 * Roofline     each element once each way: bf16 x, f32 residual, T = 8192, D = 2304 are 226 MB:
 *              memory-bound, 75 us on an H100 (3.0 TB/s); gated, H D = 4096, 201 MB, 67 us
 * Measured     H200, rms_norm of D = 2304: in a step 1.6 us for 8 rows, 3.4 for 32 and 64; with the
 *              sum, T = 8192, before sums had this order, 114 us (2.0 TB/s). gated, H D = 4096:
 *              T = 8192 58.8 us (3.4 TB/s), 2048 16.8, 512 5.0 (2026-11-22)
 */
#include "../device/gated_norm.cuh"
#include "../device/launch.cuh"

namespace {

constexpr int LOOP_THREADS = 256;

/* Absent tensors are null. */
struct rms_arguments {
    const void *x;
    void *residual;
    const float *weight;
    void *out;
    int64_t x_stride, residual_stride, D;
    float eps;
};

struct gated_arguments {
    const void *x, *z;
    const float *weight;
    void *out;
    int64_t x_stride, z_stride, rows, H, D;
    float eps;
};

/* ---- rms_norm -------------------------------------------------------------------------- */

/* As wide.cuh has it, of N times 32 accesses. */
template <int N> __device__ float add_in_order(const float *parts)
{
    float sum = 0;
#pragma unroll
    for (int first = 0; first < NORM_SUMS; first++) {
        float part = 0;
#pragma unroll
        for (int i = first; i < N; i += NORM_SUMS) part += parts[i];
        sum += part;
    }
    return sum;
}

/* The pieces of VEC elements that a thread has of a row, THREADS * VEC apart. */
template <int VEC, int THREADS> __device__ int64_t element_of(int chunk)
{
    return (static_cast<int64_t>(chunk) * THREADS + threadIdx.x) * VEC;
}

/* r of the row, as it is stored; zeros past D. All loads come before the first store. */
template <class A, class R, int VEC, int THREADS, int CHUNKS>
__device__ void read_sum(const rms_arguments &a, int64_t t, float (&r)[CHUNKS][VEC])
{
    const A *x = static_cast<const A *>(a.x) + t * a.x_stride;
    R *residual = static_cast<R *>(a.residual) + t * a.residual_stride;
    float s[CHUNKS][VEC];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int64_t i = element_of<VEC, THREADS>(c);
#pragma unroll
        for (int j = 0; j < VEC; j++) r[c][j] = s[c][j] = 0;
        if (i < a.D && a.x != nullptr) load_wide(x + i, r[c]);
        if (i < a.D && a.residual != nullptr) load_wide(residual + i, s[c]);
    }
    if (a.residual == nullptr) return;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int64_t i = element_of<VEC, THREADS>(c);
#pragma unroll
        for (int j = 0; j < VEC; j++) r[c][j] = to_float(from_float<R>(r[c][j] + s[c][j]));
        if (i < a.D && a.x != nullptr) store_wide(residual + i, r[c]);
    }
}

template <class A, class R, int VEC, int THREADS, int CHUNKS>
__global__
__launch_bounds__(THREADS) void rms_norm_kernel(__grid_constant__ const rms_arguments a)
{
    constexpr int WARPS = THREADS / WARP;
    __shared__ float sums[CHUNKS * WARPS];
    const int64_t t = blockIdx.x;
    float r[CHUNKS][VEC], weight[CHUNKS][VEC];
    let_next_start();
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
        if (a.out != nullptr && element_of<VEC, THREADS>(c) < a.D)
            prefetch_line(a.weight + element_of<VEC, THREADS>(c));
    wait_for_inputs();
    read_sum<A, R, VEC, THREADS>(a, t, r);
    if (a.out == nullptr) return;

        /* Asked for before the barrier: they arrive while the sum is taken. */
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int64_t i = element_of<VEC, THREADS>(c);
        if (i < a.D) load_wide(a.weight + i, weight[c]);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const float part = warp_sum(sum_of_squares(r[c]));
        if (lane_id() == 0) sums[c * WARPS + warp_id()] = part;
    }
    __syncthreads();
    const float inverse = inverse_rms(add_in_order<CHUNKS * WARPS>(sums), a.D, a.eps);

    A *out = static_cast<A *>(a.out) + t * a.D;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int64_t i = element_of<VEC, THREADS>(c);
        if (i >= a.D) continue;
#pragma unroll
        for (int j = 0; j < VEC; j++) r[c][j] = r[c][j] * inverse * weight[c][j];
        store_wide(out + i, r[c]);
    }
}

/* Any layout and length. A thread reads back only what it wrote itself. */
template <class A, class R>
__global__ __launch_bounds__(LOOP_THREADS) void rms_norm_loop_kernel(
    __grid_constant__ const rms_arguments a)
{
    __shared__ float sums[LOOP_THREADS / WARP];
    const int64_t t = blockIdx.x;
    const A *x = static_cast<const A *>(a.x) + t * a.x_stride;
    R *residual = static_cast<R *>(a.residual) + t * a.residual_stride;
    A *out = static_cast<A *>(a.out) + t * a.D;
    float sum = 0;
    let_next_start();
    wait_for_inputs();
    for (int64_t i = threadIdx.x; i < a.D; i += LOOP_THREADS) {
        float r = a.x == nullptr ? 0.0f : to_float(x[i]);
        if (a.residual != nullptr) r = to_float(from_float<R>(r + to_float(residual[i])));
        if (a.residual != nullptr && a.x != nullptr) residual[i] = from_float<R>(r);
        sum = fmaf(r, r, sum);
    }
    if (a.out == nullptr) return;
    const float inverse = inverse_rms(block_sum<LOOP_THREADS>(sum, sums), a.D, a.eps);
    for (int64_t i = threadIdx.x; i < a.D; i += LOOP_THREADS) {
        const float r = a.residual != nullptr ? to_float(residual[i]) : to_float(x[i]);
        out[i] = from_float<A>(r * inverse * a.weight[i]);
    }
}

/* ---- gated_rms_norm -------------------------------------------------------------------- */

/* LANES lanes a row; the others of the warp have rows of their own, so all stay for the sum. */
template <class A, int VEC, int LANES, int CHUNKS>
__global__
__launch_bounds__(LOOP_THREADS) void gated_kernel(__grid_constant__ const gated_arguments a)
{
    constexpr int ROWS = LOOP_THREADS / LANES;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * ROWS + threadIdx.x / LANES;
    const int64_t t = row / a.H, h = row % a.H;
    const A *from = static_cast<const A *>(a.x) + t * a.x_stride + h * a.D;
    const A *gate = static_cast<const A *>(a.z) + t * a.z_stride + h * a.D;
    let_next_start();
    wait_for_inputs();
    gated_row<A, VEC, LANES, CHUNKS>(from, gate, a.weight, static_cast<A *>(a.out) + row * a.D,
                                     threadIdx.x % LANES, row < a.rows, a.D, a.eps);
}

template <class A>
__global__ __launch_bounds__(LOOP_THREADS) void gated_loop_kernel(
    __grid_constant__ const gated_arguments a)
{
    __shared__ float sums[LOOP_THREADS / WARP];
    const int64_t row = blockIdx.x, t = row / a.H, h = row % a.H;
    const A *x = static_cast<const A *>(a.x) + t * a.x_stride + h * a.D;
    const A *z = static_cast<const A *>(a.z) + t * a.z_stride + h * a.D;
    A *out = static_cast<A *>(a.out) + row * a.D;
    float sum = 0;
    let_next_start();
    wait_for_inputs();
    for (int64_t i = threadIdx.x; i < a.D; i += LOOP_THREADS)
        sum = fmaf(to_float(x[i]), to_float(x[i]), sum);
    const float factor = norm_factor<A>(block_sum<LOOP_THREADS>(sum, sums), a.D, a.eps);
    for (int64_t i = threadIdx.x; i < a.D; i += LOOP_THREADS)
        out[i] = from_float<A>(
            gated(to_float(x[i]), factor, a.weight[i], norm_gate<A>(to_float(z[i]))));
}

/* ---- launchers ------------------------------------------------------------------------- */

template <class K, class A>
kl_status launch(const char *op, K kernel, int64_t blocks, int threads, const A &a,
                 cudaStream_t stream, kl_error *err)
{
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE, "%s: needs %lld blocks, at most %lld can be had", op,
                       static_cast<long long>(blocks), MAX_BLOCKS);
    return kl_cuda_launch(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                          0, stream, err, a);
}

template <class A, class R>
kl_status launch_rms(const rms_arguments &a, int64_t T, bool wide, cudaStream_t stream,
                     kl_error *err)
{
    constexpr int VEC = 16 / sizeof(A);
    const int64_t pieces = a.D / VEC;
    const char *op = "rms_norm";
    if (wide && pieces <= 96)
        return launch(op, rms_norm_kernel<A, R, VEC, 96, 1>, T, 96, a, stream, err);
    if (wide && pieces <= 288) /* D = 2304 in bf16 */
        return launch(op, rms_norm_kernel<A, R, VEC, 96, 3>, T, 96, a, stream, err);
    if (wide && pieces <= 1024)
        return launch(op, rms_norm_kernel<A, R, VEC, 256, 4>, T, 256, a, stream, err);
    static_assert(NORM_COLS == 2048 * 16 / sizeof(bf16));
    if (wide && pieces <= 2048)
        return launch(op, rms_norm_kernel<A, R, VEC, 512, 4>, T, 512, a, stream, err);
    return launch(op, rms_norm_loop_kernel<A, R>, T, LOOP_THREADS, a, stream, err);
}

template <class A>
kl_status launch_gated(const gated_arguments &a, bool wide, cudaStream_t stream, kl_error *err)
{
    constexpr int VEC = 16 / sizeof(A);
    const int64_t pieces = a.D / VEC;
    const char *op = "gated_rms_norm";
    const auto blocks = [&](int64_t lanes) {
        return (a.rows * lanes + LOOP_THREADS - 1) / LOOP_THREADS;
    };
    if (wide && pieces <= 16) /* D = 128 in bf16 */
        return launch(op, gated_kernel<A, VEC, 16, 1>, blocks(16), LOOP_THREADS, a, stream,
                      err);
    if (wide && pieces <= 32)
        return launch(op, gated_kernel<A, VEC, 32, 1>, blocks(32), LOOP_THREADS, a, stream,
                      err);
    if (wide && pieces <= 128)
        return launch(op, gated_kernel<A, VEC, 32, 4>, blocks(32), LOOP_THREADS, a, stream,
                      err);
    return launch(op, gated_loop_kernel<A>, a.rows, LOOP_THREADS, a, stream, err);
}

/* Whether rows of D elements allow pieces of n; absent tensors always do. */
bool allows(const kl_tensor &t, int64_t D, int n)
{
    return kl_tensor_absent(&t) || is_wide(t, D, n);
}

} // namespace

kl_status kl_cuda_rms_norm(kl_backend *be, const kl_rms_norm *a, kl_error *err)
{
    const kl_tensor &lead = kl_tensor_absent(&a->x) ? a->residual : a->x;
    const kl_dtype act = kl_tensor_absent(&a->x) ? a->out.dtype : a->x.dtype;
    const int64_t T = lead.shape[0], D = lead.shape[1];
    const rms_arguments args = {
        .x = a->x.data,
        .residual = a->residual.data,
        .weight = static_cast<const float *>(a->weight.data),
        .out = a->out.data,
        .x_stride = a->x.stride[0],
        .residual_stride = a->residual.stride[0],
        .D = D,
        .eps = a->eps,
    };
    if (T == 0 || (args.x == nullptr && args.out == nullptr)) return KL_OK;
    const int n = act == KL_BF16 ? 8 : 4;
    const bool wide = allows(a->x, D, n) && allows(a->residual, D, n) && allows(a->out, D, n) &&
                      allows(a->weight, D, n);
    const kl_dtype sum = args.residual == nullptr ? act : a->residual.dtype;
    return with_float_type(act, [&](auto t) {
        using A = decltype(t);
        return sum == KL_F32 ? launch_rms<A, float>(args, T, wide, kl_cuda_stream(be), err)
                             : launch_rms<A, bf16>(args, T, wide, kl_cuda_stream(be), err);
    });
}

kl_status kl_cuda_gated_rms_norm(kl_backend *be, const kl_gated_rms_norm *a, kl_error *err)
{
    const int64_t D = a->x.shape[2];
    const gated_arguments args = {
        .x = a->x.data,
        .z = a->z.data,
        .weight = static_cast<const float *>(a->weight.data),
        .out = a->out.data,
        .x_stride = a->x.stride[0],
        .z_stride = a->z.stride[0],
        .rows = a->x.shape[0] * a->x.shape[1],
        .H = a->x.shape[1],
        .D = D,
        .eps = a->eps,
    };
    if (args.rows == 0) return KL_OK;
    const int n = a->x.dtype == KL_BF16 ? 8 : 4;
    const bool wide = allows(a->x, D, n) && allows(a->z, D, n) && allows(a->out, D, n) &&
                      allows(a->weight, D, n);
    return with_float_type(a->x.dtype, [&](auto t) {
        return launch_gated<decltype(t)>(args, wide, kl_cuda_stream(be), err);
    });
}
