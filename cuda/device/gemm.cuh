/*
 * gemm.cuh -- one tile of x w^T on the tensor cores: bf16 rows of x, rows of a weight in any
 * format, f32 sums.
 *
 * A tile is M rows of x by N rows of the weight. Both are brought to shared memory as bf16,
 * GEMM_K columns at a time, GEMM_STAGES of them in flight: x and bf16 weights by cp.async;
 * other weights through registers, dequantised on the way. An output is one chain of mma over k
 * = 0, 16, ..., the same in every shape of tile, so its bits depend on its own row of x only.
 *
 * Rows are named by functors, for gathered rows and for two weights in one tile:
 *     const bf16 *x_row(int i)       row i of the tile, or nullptr: zeros
 *     weight_row w_row(int i)        with data nullptr: zeros
 * The number of columns is a multiple of 8, rows of x are 16-byte aligned, has_pieces() holds.
 */
#ifndef KL_CUDA_DEVICE_GEMM_H
#define KL_CUDA_DEVICE_GEMM_H

#include "mma.cuh"
#include "warp.cuh"
#include "weight.cuh"

/* 64 columns of bf16 are 128 bytes, one pass over the banks, and a whole group of each
 * format. */
constexpr int GEMM_K = 64, GEMM_STAGES = 3;
constexpr int GEMM_CHUNK = 8; /* bf16 in 16 bytes */
constexpr int GEMM_CHUNKS = GEMM_K / GEMM_CHUNK;

/* M x N outputs by WM x WN warps. */
template <int M_, int N_, int WM_, int WN_> struct gemm_shape {
    static constexpr int M = M_, N = N_, WM = WM_, WN = WN_;
    static constexpr int THREADS = WM * WN * WARP;
    static constexpr int MI = M / WM / 16, NI = N / WN / 8; /* fragments of a warp */
    static constexpr int STAGE = (M + N) * GEMM_K;          /* bf16 of a stage */
    static constexpr int SHARED_BYTES = GEMM_STAGES * STAGE * 2;
    static_assert(MI * WM * 16 == M && NI * WN * 8 == N && NI % 2 == 0);
};

/* Chunks of a row are permuted by its number, so that neither eight rows of a column nor eight
 * chunks of a row meet in a bank. */
__device__ inline int gemm_offset(int row, int chunk)
{
    return row * GEMM_K + (chunk ^ (row % GEMM_CHUNKS)) * GEMM_CHUNK;
}

/* What a thread copies by cp.async of ROWS rows of bf16: chunks threadIdx.x, + THREADS, ... */
template <int ROWS, int THREADS> struct gemm_copier {
    static constexpr int TOTAL = ROWS * GEMM_CHUNKS;
    static constexpr int EACH = (TOTAL + THREADS - 1) / THREADS;
    const bf16 *from[EACH];

    template <class Row> __device__ void aim(Row row_at)
    {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = static_cast<int>(threadIdx.x) + i * THREADS;
            from[i] = at < TOTAL ? row_at(at / GEMM_CHUNKS) : nullptr;
        }
    }

    __device__ void copy(bf16 *tile, int k, int K) const
    {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = static_cast<int>(threadIdx.x) + i * THREADS;
            const int chunk = at % GEMM_CHUNKS, col = k + chunk * GEMM_CHUNK;
            if (TOTAL % THREADS == 0 || at < TOTAL)
                copy_async(tile + gemm_offset(at / GEMM_CHUNKS, chunk), from[i] + col,
                           from[i] != nullptr && col < K);
        }
    }
};

/* What a thread brings of N rows of a weight that is not bf16: fetch() loads pieces to
 * registers, store() dequantises them to shared memory. */
template <kl_weight_format format, int N, int THREADS> struct gemm_pieces {
    using codec = weight_codec<format>;
    static constexpr int PIECE = codec::PIECE, PER_ROW = GEMM_K / PIECE, TOTAL = N * PER_ROW;
    static constexpr int EACH = (TOTAL + THREADS - 1) / THREADS;
    weight_row rows[EACH];
    uint4 raw[EACH];
    float scale[EACH];

    template <class Row> __device__ void aim(Row row_at)
    {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = static_cast<int>(threadIdx.x) + i * THREADS;
            rows[i] = at < TOTAL ? row_at(at / PER_ROW) : weight_row{nullptr, nullptr};
        }
    }

    __device__ void fetch(int k, int K)
    {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = static_cast<int>(threadIdx.x) + i * THREADS;
            const int col = k + at % PER_ROW * PIECE;
            raw[i] = make_uint4(0, 0, 0, 0);
            scale[i] = 0;
            if (rows[i].data == nullptr || col >= K) continue;
            raw[i] = *reinterpret_cast<const uint4 *>(rows[i].data + col / PIECE * 16);
            scale[i] = scale_at<format>(rows[i], col);
        }
    }

    __device__ void store(bf16 *tile) const
    {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = static_cast<int>(threadIdx.x) + i * THREADS;
            if (TOTAL % THREADS != 0 && at >= TOTAL) continue;
            uint32_t pairs[PIECE / 2];
            codec::pairs(raw[i], scale[i], pairs);
            store_pairs(tile, at / PER_ROW, at % PER_ROW * PIECE, pairs);
        }
    }

    static __device__ void store_pairs(bf16 *tile, int row, int col,
                                       const uint32_t (&pairs)[PIECE / 2])
    {
        if constexpr (PIECE < GEMM_CHUNK) {
            bf16 *to = tile + gemm_offset(row, col / GEMM_CHUNK) + col % GEMM_CHUNK;
            *reinterpret_cast<uint2 *>(to) = make_uint2(pairs[0], pairs[1]);
        } else {
#pragma unroll
            for (int j = 0; j < PIECE / GEMM_CHUNK; j++)
                *reinterpret_cast<uint4 *>(tile + gemm_offset(row, col / GEMM_CHUNK + j)) =
                    make_uint4(pairs[4 * j], pairs[4 * j + 1], pairs[4 * j + 2],
                               pairs[4 * j + 3]);
        }
    }
};

/* bf16 weights need no registers: the same two steps, by cp.async. */
template <int N, int THREADS> struct gemm_pieces<KL_W_BF16, N, THREADS> {
    gemm_copier<N, THREADS> copier;

    template <class Row> __device__ void aim(Row row_at)
    {
        copier.aim([&](int i) { return reinterpret_cast<const bf16 *>(row_at(i).data); });
    }
};

/* The products of one stage: acc += x w^T over GEMM_K columns. */
template <class S>
__device__ void gemm_multiply(float (&acc)[S::MI][S::NI][4], const bf16 *x, const bf16 *w)
{
    const int lane = lane_id(), m = warp_id() / S::WN * S::MI * 16,
              n = warp_id() % S::WN * S::NI * 8;
#pragma unroll
    for (int k = 0; k < GEMM_K / 16; k++) {
        uint32_t a[S::MI][4], b[S::NI / 2][4];
#pragma unroll
        for (int i = 0; i < S::MI; i++)
            ldmatrix(a[i], x + gemm_offset(m + i * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int j = 0; j < S::NI / 2; j++)
            ldmatrix(b[j], w + gemm_offset(n + j * 16 + lane % 8 + lane / 16 * 8,
                                           2 * k + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < S::MI; i++)
#pragma unroll
            for (int j = 0; j < S::NI; j++)
                mma_bf16(acc[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
    }
}

/* acc = x w^T over K columns; `shared` holds S::SHARED_BYTES, 128-byte aligned. All threads of
 * the block call it; after a barrier `shared` may be used again. */
template <class S, kl_weight_format format, class XRow, class WRow>
__device__ void gemm_tile(float (&acc)[S::MI][S::NI][4], bf16 *shared, XRow x_row, WRow w_row,
                          int K)
{
    gemm_copier<S::M, S::THREADS> xs;
    gemm_pieces<format, S::N, S::THREADS> ws;
    xs.aim(x_row);
    ws.aim(w_row);
    const int steps = (K + GEMM_K - 1) / GEMM_K;
    const auto x_at = [&](int step) { return shared + step % GEMM_STAGES * S::STAGE; };
    const auto w_at = [&](int step) { return x_at(step) + S::M * GEMM_K; };
    const auto fetch = [&](int step) {
        if (step < steps) {
            xs.copy(x_at(step), step * GEMM_K, K);
            if constexpr (format == KL_W_BF16)
                ws.copier.copy(w_at(step), step * GEMM_K, K);
            else
                ws.fetch(step * GEMM_K, K);
        }
        copy_commit(); /* an empty group keeps the count of those to wait for */
    };
    const auto land = [&](int step) {
        if constexpr (format != KL_W_BF16)
            if (step < steps) ws.store(w_at(step));
    };
#pragma unroll
    for (int i = 0; i < S::MI; i++)
#pragma unroll
        for (int j = 0; j < S::NI; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0;
    for (int s = 0; s < GEMM_STAGES - 1; s++) {
        fetch(s);
        land(s);
    }
    for (int s = 0; s < steps; s++) {
        copy_wait<GEMM_STAGES - 2>();
        __syncthreads(); /* stage s is there, and stage s - 1, which is filled next, was read */
        fetch(s + GEMM_STAGES - 1);
        gemm_multiply<S>(acc, x_at(s), w_at(s));
        land(s + GEMM_STAGES - 1);
    }
}

/* f(row, column, even, odd) for each pair of neighbouring outputs of this thread; row and
 * column count from the tile's corner, columns are even. */
template <class S, class F>
__device__ void gemm_for_pairs(const float (&acc)[S::MI][S::NI][4], F f)
{
    const int lane = lane_id(), m = warp_id() / S::WN * S::MI * 16 + lane / 4,
              n = warp_id() % S::WN * S::NI * 8 + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < S::MI; i++)
#pragma unroll
        for (int j = 0; j < S::NI; j++) {
            f(m + i * 16, n + j * 8, acc[i][j][0], acc[i][j][1]);
            f(m + i * 16 + 8, n + j * 8, acc[i][j][2], acc[i][j][3]);
        }
}

#endif
