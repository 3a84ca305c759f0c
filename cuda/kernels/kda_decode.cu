/*
 * kda_decode.cu -- Kimi Delta Attention, one token for each of N sequences.
 *
 * Computes     S <- S diag(a);  u = b (v - S k);  S <- S + u k^T;  o = scale S q, with a, b and
 *              the normalised q, k of backend/ops.h
 * Shapes       state [S, H, V, K]; q, k [N, Hk, K]; v, out [N, H, V]; g [N, H, K]; beta [N, H]
 * Layout       the state dense with K contiguous; of the others the first axis may be strided
 * Precision    f32 or bf16 in, f32 arithmetic and state, out as q
 * Grid         one block for each sequence, head and tile of state rows. The block prepares
 *              decay, k and q of its head once in shared memory; then a warp owns R rows at a
 *              time, a lane the same channels of each, in registers: the state crosses device
 *              memory once each way, R rows in flight, and rows never exchange anything.
 * Order        a lane sums its channels in rising order, then five butterfly steps: the same
 *              whatever N, H, V and the place in the batch
 * Roofline     bytes ~ 2 * 4 * N*H*V*K. With H = 32 and V = K = 128 that is 4 MiB a sequence
 *              at 0.9 flop/byte: memory-bound, 1.41 us on an H100 (3.0 TB/s)
 * Measured     H100, H = 32, K = V = 128: N = 1 6.4 us, N = 32 80 us, 57 % of roofline
 *              (benchmarks/bench_ops.py, 2026-11-22)
 */
#include "../device/kda.cuh"
#include "../device/launch.cuh"

namespace {

/* Many warps with few rows each: what a warp does once is little code, and code that runs once
 * costs what it takes to come from memory. */
constexpr int DECODE_WARPS = 16, DECODE_THREADS = DECODE_WARPS * WARP;

template <int VEC, int CHUNKS, int ROWS>
__global__ __launch_bounds__(DECODE_THREADS) void kda_decode_kernel(
    __grid_constant__ const kda_arguments a)
{
    using warp_rows = kda_rows<VEC, CHUNKS, ROWS>;
    __shared__ __align__(16) kda_head s;
    let_next_start();
    wait_for_inputs();
    const auto [n, h, first, state] = kda_place_of<ROWS, DECODE_WARPS>(a);

    /* The rows are asked for first: they arrive while the head is prepared. */
    warp_rows rows;
    float v[ROWS];
    rows.read(a, state, first);
    warp_rows::read_v(a, n, h, first, v);
    kda_prepare(a, n, h, s);
    rows.step(a, n, h, first, s, v);
    rows.write(a, state, first);
}

} // namespace

kl_status kl_cuda_kda_decode(kl_backend *be, const kl_kda_decode *a, kl_error *err)
{
    kda_arguments args = kda_arguments_of(a);
    const long long N = a->q.shape[0];
    if (N == 0) return KL_OK;
    const cudaStream_t stream = kl_cuda_stream(be);
    return kda_with_lanes(args, [&](auto lanes) {
        using L = decltype(lanes);
        unsigned blocks;
        constexpr int ROWS = L::ROWS / 4;
        KL_TRY(kda_grid("kda_decode", args, N, DECODE_WARPS * ROWS, &blocks, err));
        return kl_cuda_launch(kda_decode_kernel<L::VEC, L::CHUNKS, ROWS>, blocks,
                              DECODE_THREADS, 0, stream, err, args);
    });
}
