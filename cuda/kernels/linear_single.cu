/*
 * linear_single.cu -- a float32 matrix by one row of bf16: the router of a token step.
 * Computes     out = x w^T
 * Shapes       x [1, in]; w [O, in]; out [1, O]; in a multiple of 8
 * Layout       dense, 16-byte aligned rows
 * Precision    f32 fma; f32 or bf16 out
 * Grid         a warp for each row of the weight, 4 a block: 256 experts make 64 blocks, where
 *              tiles of 16 rows would make 16, which splitting the weight into bf16 terms binds
 * Order        a lane's columns, 4 of every 128, in rising order, then five butterfly steps
 * Roofline     the bytes of the weight: [256, 2304] are 2.4 MB, 0.8 us at 3.0 TB/s
 * Measured     H100, [256, 2304] in a model (benchmarks/bench_step.py, int8, context 1024): 3.0 us
 *              (2026-11-22)
 */
#include "../device/launch.cuh"
#include "../device/product.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int VEC = 4;   /* columns of a lane */
constexpr int AHEAD = 9; /* of them on their way: half a row of 2304 columns */

/* A lane's columns k .. k + VEC - 1; zeros past the end. */
struct piece {
    uint4 w;
    uint2 x;

    __device__ void load(const uint8_t *ws, const bf16 *xs, int k, int cols)
    {
        w = k < cols ? load_once(ws + k * sizeof(float)) : uint4{};
        x = k < cols ? *reinterpret_cast<const uint2 *>(xs + k) : uint2{};
    }

    __device__ float add_to(float sum) const
    {
        const float xs[VEC] = {low_half(x.x), high_half(x.x), low_half(x.y), high_half(x.y)};
        const uint32_t ws[VEC] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int j = 0; j < VEC; j++) sum = fmaf(xs[j], __uint_as_float(ws[j]), sum);
        return sum;
    }
};

/* A piece is asked for again as soon as it is used, so that AHEAD stay on their way. */
__device__ float dot(const uint8_t *w, const bf16 *x, int cols)
{
    constexpr int STEP = WARP * VEC;
    float sum = 0;
    piece pieces[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) pieces[i].load(w, x, i * STEP + lane_id() * VEC, cols);
    for (int first = 0; first < cols; first += AHEAD * STEP) {
        const int next = first + AHEAD * STEP + lane_id() * VEC;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            sum = pieces[i].add_to(sum);
            pieces[i].load(w, x, next + i * STEP, cols);
        }
    }
    return warp_sum(sum);
}

__global__ __launch_bounds__(THREADS) void product_single_kernel(
    const __grid_constant__ product_arguments a)
{
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + warp_id();
    const weight_row w = row_of(a.w, row < a.w.rows ? row : 0);
    let_next_start();
    if (lane_id() == 0 && row < a.w.rows)
        prefetch_l2(w.data, static_cast<uint32_t>(a.w.row_bytes));
    wait_for_inputs();
    if (row >= a.w.rows) return;
    const float sum = dot(w.data, static_cast<const bf16 *>(a.x), static_cast<int>(a.w.cols));
    if (lane_id() != 0) return;
    if (a.out_is_bf16)
        static_cast<bf16 *>(a.out)[row] = from_float<bf16>(sum);
    else
        static_cast<float *>(a.out)[row] = sum;
}

} // namespace

kl_status kl_cuda_product_single(kl_backend *be, const kl_cuda_product *p, kl_error *err)
{
    product_arguments a = product_arguments_of(p);
    a.t_tiles = 1;
    unsigned blocks;
    KL_TRY(product_grid(a, (p->w.rows + WARPS - 1) / WARPS, &blocks, err));
    return kl_cuda_launch(product_single_kernel, blocks, THREADS, 0, kl_cuda_stream(be), err,
                          a);
}
