/*
 * linear_f32.cu -- a float32 matrix by several rows, each summed in the order of linear_single.cu:
 * the router of a batch-invariant backend.
 * Computes     out = x w^T
 * Shapes       x [T, in]; w [O, in]; out [T, O]; in a multiple of 8
 * Layout       rows of x and of out strided, those of x and w 16-byte aligned
 * Precision    x bf16; f32 fma; f32 or bf16 out
 * Grid         a block for each 4 rows of the weight, a warp each, and 16 rows of x, which lie in
 *              shared memory, 2304 columns at a time
 * Order        a lane's columns, 4 of every 128, in rising order, then five butterfly steps
 * Roofline     2 T O in flops, with an unpacking for each two, at 67 TFLOP/s
 * Measured     not timed alone; in a model with linear_ordered.cu (2026-11-22)
 */
#include "../device/product.cuh"
#include "../device/ring.cuh"

namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int ROWS = 16;         /* of x in a block */
constexpr int VEC = 4;           /* columns of a lane */
constexpr int STEP = WARP * VEC; /* of a warp */
constexpr int COLS = 18 * STEP;  /* in shared memory: a row of 2304 */
constexpr int PITCH = 2 * COLS;
constexpr int SHARED = ROWS * PITCH;
static_assert(STEP % 128 == 0, "shared_rows has zeros up to the end of a step");

struct f32_arguments {
    const bf16 *x;
    weight_view w;
    void *out;
    int64_t T, x_stride, out_stride;
    unsigned groups; /* of rows of the weight */
    bool out_is_bf16;
};

/* Columns [first, first + COLS) of ROWS rows of x from `row` on; zeros where there is none. */
__device__ void copy_columns(const shared_rows &to, const f32_arguments &a, int64_t row,
                             int64_t first)
{
    constexpr int UNITS = COLS / 8;
    for (int i = threadIdx.x; i < ROWS * UNITS; i += THREADS) {
        const int t = i / UNITS, u = i % UNITS;
        const int64_t column = first + 8 * u;
        const bool inside = row + t < a.T && column < a.w.cols;
        copy_async(to.unit(t, u), a.x + (inside ? (row + t) * a.x_stride + column : 0), inside);
    }
    copy_commit();
    copy_wait<0>();
}

/* sum[t] + the products of the columns in shared memory, `left` of them. */
__device__ void add_columns(float (&sum)[ROWS], const float *w, const shared_rows &x,
                            int64_t left)
{
#pragma unroll 2
    for (int k = lane_id() * VEC, end = left < COLS ? static_cast<int>(left) : COLS;
         k - lane_id() * VEC < end; k += STEP) {
        const float4 v = k < end ? *reinterpret_cast<const float4 *>(w + k) : float4{};
#pragma unroll
        for (int t = 0; t < ROWS; t++) {
            const uint2 h = reinterpret_cast<const uint2 *>(x.unit(t, k / 8))[k / VEC % 2];
            sum[t] = fmaf(low_half(h.x), v.x, sum[t]);
            sum[t] = fmaf(high_half(h.x), v.y, sum[t]);
            sum[t] = fmaf(low_half(h.y), v.z, sum[t]);
            sum[t] = fmaf(high_half(h.y), v.w, sum[t]);
        }
    }
}

__global__
__launch_bounds__(THREADS) void product_f32_kernel(const __grid_constant__ f32_arguments a)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const shared_rows x = {shared, PITCH};
    const int64_t row = int64_t{blockIdx.x / a.groups} * ROWS;
    const int64_t o = int64_t{blockIdx.x % a.groups} * WARPS + warp_id();
    const weight_row w = row_of(a.w, o < a.w.rows ? o : 0);
    float sum[ROWS] = {};
    let_next_start();
    wait_for_inputs();
    for (int64_t first = 0; first < a.w.cols; first += COLS) {
        if (first > 0) __syncthreads();
        copy_columns(x, a, row, first);
        __syncthreads();
        add_columns(sum, reinterpret_cast<const float *>(w.data) + first, x, a.w.cols - first);
    }
    float own = 0;
#pragma unroll
    for (int t = 0; t < ROWS; t++) {
        const float all = warp_sum(sum[t]);
        if (lane_id() == t) own = all;
    }
    if (lane_id() >= ROWS || row + lane_id() >= a.T || o >= a.w.rows) return;
    const int64_t at = (row + lane_id()) * a.out_stride + o;
    if (a.out_is_bf16)
        static_cast<bf16 *>(a.out)[at] = from_float<bf16>(own);
    else
        static_cast<float *>(a.out)[at] = own;
}

} // namespace

kl_status kl_cuda_product_f32(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const int64_t groups = (p->w.rows + WARPS - 1) / WARPS, rows = (p->T + ROWS - 1) / ROWS;
    if (rows > MAX_BLOCKS / groups)
        return kl_fail(err, KL_ERR_VALUE, "linear: %lld x %lld outputs are too many",
                       static_cast<long long>(p->T), static_cast<long long>(p->w.rows));
    const f32_arguments a = {
        .x = static_cast<const bf16 *>(p->x),
        .w = weight_view_of(p->w),
        .out = p->out,
        .T = p->T,
        .x_stride = p->x_stride,
        .out_stride = p->out_stride,
        .groups = static_cast<unsigned>(groups),
        .out_is_bf16 = p->out_dtype == KL_BF16,
    };
    KL_TRY(kl_cuda_allow_shared(product_f32_kernel, SHARED, err));
    return kl_cuda_launch(product_f32_kernel, static_cast<unsigned>(groups * rows), THREADS,
                          SHARED, kl_cuda_stream(be), err, a);
}
