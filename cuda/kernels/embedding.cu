/*
 * embedding.cu -- picking rows: embedding and gather.
 *
 * Computes     out[n, :] = from[rows[n], :], in the dtype of out; zeros where rows[n] is -1; an
 *              embedding also sets sums and blanks, so that no other kernel has to
 * Shapes       from [R, D]; rows [N] i32; out [N, D]
 * Layout       dense, row-major
 * Precision    a copy, widened or rounded to the dtype of out
 * Grid         one block a row; a thread asks for UNROLL pieces before it stores the first. Behind
 *              them blocks that set SET pieces a thread
 * Roofline     N * D * (2 + 2) bytes for bf16: memory-bound, 12.6 us at N = 8192, D = 2304 on an
 *              H100 (3.0 TB/s)
 * Measured     H200, in a step (D = 2304, bf16 to f32): 1.9 us for one row, 2.7 for 256
 *              (2026-11-22)
 */
#include "../device/launch.cuh"
#include "../device/types.cuh"

namespace {

constexpr int THREADS = 96; /* D = 2304 in bf16 is three pieces for each */
constexpr int UNROLL = 3;
constexpr int SET =
    4; /* what a token of the model needs so, 238 KB and 1.3 MB, by 256 blocks */
constexpr int64_t SET_PIECES = int64_t{THREADS} * SET; /* of a block */

/* Memory to set, as one row of pieces of 16 bytes: sums, behind them blanks. */
struct setting {
    uint4 *sums, *blanks;
    int64_t n_sums, n; /* of the sums, of both */

    int64_t blocks() const { return (n + SET_PIECES - 1) / SET_PIECES; }

    __device__ void run(int64_t block) const
    {
        static_assert(KL_BLANK == 0xffff);
        const int64_t first = block * SET_PIECES + threadIdx.x;
#pragma unroll
        for (int i = 0; i < SET; i++) {
            const int64_t at = first + i * THREADS;
            if (at < n_sums)
                sums[at] = uint4{};
            else if (at < n)
                blanks[at - n_sums] = uint4{~0u, ~0u, ~0u, ~0u};
        }
    }
};

/* The same type is copied bit by bit, so that a NaN stays what it is. */
template <class To, class From> __device__ To convert(From x)
{
    if constexpr (sizeof(To) == sizeof(From))
        return x;
    else
        return from_float<To>(to_float(x));
}

template <class From, class To, int VEC>
__global__ __launch_bounds__(THREADS) void pick_kernel(const From *from, const int *rows,
                                                       To *to, int64_t N, int64_t D,
                                                       setting memory)
{
    const int64_t n = blockIdx.x;
    let_next_start();
    wait_for_inputs(); /* who used the memory in the step before may not have ended either; who uses
                          it in this one waits for its own inputs, or starts behind one that has */
    if (n >= N) return memory.run(n - N);
    const int row = rows[n];
    if (row >= 0) from += row * D;
    to += n * D;
    for (int64_t first = threadIdx.x * VEC; first < D; first += THREADS * VEC * UNROLL) {
        vec<From, VEC> x[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int64_t i = first + u * THREADS * VEC;
            if (i < D) x[u] = *reinterpret_cast<const vec<From, VEC> *>(from + i);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int64_t i = first + u * THREADS * VEC;
            vec<To, VEC> y;
#pragma unroll
            for (int j = 0; j < VEC; j++)
                y.x[j] = row < 0 ? from_float<To>(0.0f) : convert<To>(x[u].x[j]);
            if (i < D) *reinterpret_cast<vec<To, VEC> *>(to + i) = y;
        }
    }
}

template <class From, class To>
kl_status launch(const char *op, const kl_tensor &from, const kl_tensor &rows,
                 const kl_tensor &out, const setting &memory, cudaStream_t stream,
                 kl_error *err)
{
    constexpr int VEC =
        16 / static_cast<int>(sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
    const int64_t N = out.shape[0], D = out.shape[1];
    const int64_t blocks = N + memory.blocks();
    if (blocks == 0) return KL_OK;
    if (blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE, "%s: rows must be <= %lld, got %lld", op,
                       static_cast<long long>(MAX_BLOCKS - (blocks - N)),
                       static_cast<long long>(N));
    const bool wide = D % VEC == 0 && reinterpret_cast<uintptr_t>(from.data) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(out.data) % 16 == 0;
    const auto kernel = wide ? pick_kernel<From, To, VEC> : pick_kernel<From, To, 1>;
    return kl_cuda_launch(kernel, static_cast<unsigned>(blocks), THREADS, 0, stream, err,
                          static_cast<const From *>(from.data),
                          static_cast<const int *>(rows.data), static_cast<To *>(out.data), N,
                          D, memory);
}

kl_status pick(kl_backend *be, const char *op, const kl_tensor &from, const kl_tensor &rows,
               const kl_tensor &out, const setting &memory, kl_error *err)
{
    return with_float_type(from.dtype, [&](auto f) {
        return with_float_type(out.dtype, [&](auto t) {
            return launch<decltype(f), decltype(t)>(op, from, rows, out, memory,
                                                    kl_cuda_stream(be), err);
        });
    });
}

int64_t pieces_of(const kl_tensor &bytes)
{
    return kl_tensor_absent(&bytes) ? 0 : bytes.shape[0] / static_cast<int64_t>(sizeof(uint4));
}

} // namespace

kl_status kl_cuda_embedding(kl_backend *be, const kl_embedding *a, kl_error *err)
{
    const kl_dtype dtype = a->table.format == KL_W_F32 ? KL_F32 : KL_BF16;
    const kl_tensor table = kl_tensor_2d(a->table.data, dtype, a->table.rows, a->table.cols);
    const int64_t n_sums = pieces_of(a->sums);
    const setting memory = {static_cast<uint4 *>(a->sums.data),
                            static_cast<uint4 *>(a->blanks.data), n_sums,
                            n_sums + pieces_of(a->blanks)};
    return pick(be, "embedding", table, a->ids, a->out, memory, err);
}

kl_status kl_cuda_gather(kl_backend *be, const kl_gather *a, kl_error *err)
{
    return pick(be, "gather", a->x, a->rows, a->out, setting{}, err);
}
