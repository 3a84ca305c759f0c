/*
 * linear_single.cu -- a float32 matrix by one row: the router of a token step.
 * Computes     out = h w^T, h being x or norm(x), and stored if somebody wants it
 * Shapes       x [1, in]; w [O, in]; out [1, O]; in a multiple of 8
 * Layout       dense, 16-byte aligned rows
 * Precision    x bf16, before a norm also f32; f32 fma; f32 or bf16 out
 * Grid         a warp for each row of the weight, 4 a block: 256 experts make 64 blocks, where
 *              tiles of 16 rows would make 16, which splitting the weight into bf16 terms binds.
 *              A row of 2304 columns is on its way to shared memory before x is there
 * Order        a lane's columns, 4 of every 128, in rising order, then five butterfly steps
 * Roofline     the bytes of the weight: [256, 2304] are 2.4 MB, 0.8 us at 3.0 TB/s
 * Measured     H200, in a step (bf16, context 1024), with the norm: 3.4 to 4.2 us (2026-11-22)
 */
#include "../device/product.cuh"
#include "../device/ring.cuh"

namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int VEC = 4;           /* columns of a lane */
constexpr int STEP = WARP * VEC; /* of a warp */
constexpr int PIECES = 18;       /* of a lane in shared memory: a row of 2304 columns */
constexpr int ROW_BYTES = PIECES * WARP * 16;
static_assert(STEP % 128 == 0, "shared_rows has zeros up to the end of a step");

struct single_arguments {
    row_source x;
    weight_view w;
    void *out;
    uint4 *h;                    /* or null */
    bool out_is_bf16, unsettled; /* the weight may still be written */
};

/* A lane's pieces of a row from column `first` on; zeros past the end, and no row's where there
 * is none. What it copies only it reads. */
__device__ void copy_pieces(uint4 *own, const single_arguments &a, int64_t row, int first)
{
    const weight_row w = row_of(a.w, row < a.w.rows ? row : 0);
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int k = first + i * STEP + lane_id() * VEC;
        copy_once(own + i * WARP, w.data + k * sizeof(float), row < a.w.rows && k < a.x.cols);
    }
    copy_commit();
}

/* For others who need h. */
__device__ void store_row(uint4 *to, const shared_rows &x, int cols)
{
    for (int u = threadIdx.x; 8 * u < cols; u += THREADS) to[u] = *x.unit(0, u);
}

/* sum + the products of as many pieces. */
__device__ float add_pieces(float sum, const uint4 *own, const shared_rows &x, int first,
                            int cols)
{
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        const int k = first + i * STEP + lane_id() * VEC;
        if (first + i * STEP >= cols) break; /* the same for the whole warp */
        const uint4 w = own[i * WARP];
        const uint2 h = reinterpret_cast<const uint2 *>(x.unit(0, k / 8))[k / VEC % 2];
        sum = fmaf(low_half(h.x), __uint_as_float(w.x), sum);
        sum = fmaf(high_half(h.x), __uint_as_float(w.y), sum);
        sum = fmaf(low_half(h.y), __uint_as_float(w.z), sum);
        sum = fmaf(high_half(h.y), __uint_as_float(w.w), sum);
    }
    return sum;
}

__global__ __launch_bounds__(THREADS) void product_single_kernel(
    const __grid_constant__ single_arguments a)
{
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float sums[NORM_SUMS];
    const shared_rows x = {shared + WARPS * ROW_BYTES, shared_rows::pitch_of(a.x.cols)};
    uint4 *const own = reinterpret_cast<uint4 *>(shared + warp_id() * ROW_BYTES) + lane_id();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + warp_id();
    let_next_start();
    if (a.unsettled) wait_for_inputs();
    copy_pieces(own, a, row, 0);
    const held_norm<THREADS> norm(a.x);
    wait_for_inputs();
    bring_rows<THREADS>(x, a.x, norm, sums);
    __syncthreads();
    if (a.h != nullptr && blockIdx.x == 0) store_row(a.h, x, a.x.cols);
    float sum = 0;
    for (int first = 0; first < a.x.cols; first += PIECES * STEP) {
        if (first > 0) copy_pieces(own, a, row, first);
        copy_wait<0>();
        sum = add_pieces(sum, own, x, first, a.x.cols);
    }
    sum = warp_sum(sum);
    if (lane_id() != 0 || row >= a.w.rows) return;
    if (a.out_is_bf16)
        static_cast<bf16 *>(a.out)[row] = from_float<bf16>(sum);
    else
        static_cast<float *>(a.out)[row] = sum;
}

size_t shared_bytes(const kl_cuda_product *p)
{
    return WARPS * ROW_BYTES + static_cast<size_t>(shared_rows::pitch_of(p->w.cols));
}

} // namespace

bool kl_cuda_product_single_takes(const kl_cuda_product *p)
{
    const bool counts = p->w.cols <= static_cast<int64_t>(RING_MOST_SHARED); /* in an int */
    return counts && p->w.format == KL_W_F32 && p->up.data == nullptr &&
           shared_bytes(p) <= RING_MOST_SHARED;
}

kl_status kl_cuda_product_single(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    const single_arguments a = {
        row_source_of(p),           weight_view_of(p->w),    p->out,
        static_cast<uint4 *>(p->h), p->out_dtype == KL_BF16, p->w.unsettled};
    const int64_t blocks = (p->w.rows + WARPS - 1) / WARPS;
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE, "linear: %lld outputs are too many",
                       static_cast<long long>(p->w.rows));
    KL_TRY(kl_cuda_allow_shared(product_single_kernel, RING_MOST_SHARED, err));
    return kl_cuda_launch(product_single_kernel, static_cast<unsigned>(blocks), THREADS,
                          shared_bytes(p), kl_cuda_stream(be), err, a);
}
