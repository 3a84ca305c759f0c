/*
 * kda_prefill_segments.cu -- KDA prefill of long sequences of few heads by segments, side by side:
 * where sequences are cut, and the states that their segments start from.
 *
 * Computes     a segment takes the state from S to S M + C. Rows of the state never meet, so C is
 *              what the chain makes of value rows that start from zero, and M what it makes of
 *              the unit rows without values: the chunked kernel, in a pass of its own. Then
 *              S_1 = C_0, which started from the call's state, and S_{i+1} = S_i M_i + C_i
 * Shapes       borders [N segments + 1]; summaries [N segments, H, V + 128, 128], C above M
 * Layout       dense; S_i takes the place of C_i
 * Precision    f32. M adds nothing to its roundings: its norm is at most 1 for keys of length 1
 *              and steps up to 2, whatever the decay
 * Grid         four rows of a head's state a block, which walks through the segments
 * Roofline     M from the L2, 64 KB a segment and block: 2 us a segment where blocks are as many
 *              as multiprocessors
 * Measured     not timed yet
 */
#include "kda_prefill.cuh"

namespace {

constexpr int ROWS = 4; /* of a block, and parts of a product */
constexpr int CUT_THREADS = 256, JOIN_THREADS = ROWS * KDA_K;

/* A sequence's tokens go to segments of one size, a multiple of KDA_GRID; a last token by itself
 * stays with those before it. Borders behind its last segment are its end. */
__global__ void kda_cut_kernel(const int *cu, int N, int segments, int *borders)
{
    for (int i = threadIdx.x; i <= N * segments; i += CUT_THREADS) {
        const int n = i / segments;
        if (n == N) {
            borders[i] = cu[N];
            continue;
        }
        const int tokens = cu[n + 1] - cu[n];
        const int parts = max(1, min(segments, tokens / KDA_SEGMENT));
        const int size = ((tokens - 1) / parts / KDA_GRID + 1) * KDA_GRID;
        const long long before = static_cast<long long>(i % segments) * size;
        borders[i] = cu[n] + static_cast<int>(before < max(tokens - 1, 1) ? before : tokens);
    }
}

/* The block's rows times a quarter of M's, a thread's channel of it. Zeros keep out what M may be
 * where nothing bounds it. */
__device__ void multiply(const float (&S)[KDA_K][ROWS], const float *M, int quarter,
                         float (&sum)[ROWS])
{
    constexpr int EACH = KDA_K / ROWS;
    M += quarter * EACH * KDA_K;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
        const float m = M[j * KDA_K];
        float s[ROWS];
        load_floats(S[quarter * EACH + j], s);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (s[r] != 0) sum[r] = fmaf(s[r], m, sum[r]);
    }
}

/* A thread has an element of S_i, in row `part` of the block's, and a quarter of the products. */
__global__
__launch_bounds__(JOIN_THREADS) void kda_join_kernel(__grid_constant__ const kda_arguments a,
                                                     __grid_constant__ const kda_plan p)
{
    __shared__ __align__(16) float S[KDA_K][ROWS], sums[ROWS][KDA_K][ROWS];
    const int d = threadIdx.x % KDA_K, part = threadIdx.x / KDA_K;
    const int tiles = static_cast<int>(a.V) / ROWS, head = blockIdx.x / tiles;
    const int n = head / static_cast<int>(a.H), h = head % static_cast<int>(a.H);
    const int at = (static_cast<int>(blockIdx.x) % tiles * ROWS + part) * KDA_K + d;
    float own = kda_slot(a, n, h)[at];
    for (int i = n * p.segments;; i++) {
        float *C = kda_summary(a, p, i, h), *M = C + a.V * KDA_K;
        const bool ends = kda_ends(p, i);
        float next = ends ? 0.0f : C[at];
        C[at] = own;
        if (ends) break;
        if (i > n * p.segments) {
            float sum[ROWS] = {};
            S[d][part] = own;
            __syncthreads();
            multiply(S, M + d, part, sum);
            store_floats(sums[part][d], sum);
            __syncthreads();
            for (int r = 0; r < ROWS; r++) next += sums[r][d][part];
        }
        own = next;
    }
}

} // namespace

kl_status kda_cut(const int *cu, long long N, int segments, int *borders, cudaStream_t stream,
                  kl_error *err)
{
    kda_cut_kernel<<<1, CUT_THREADS, 0, stream>>>(cu, static_cast<int>(N), segments, borders);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}

kl_status kda_join(const kda_arguments &a, const kda_plan &p, cudaStream_t stream,
                   kl_error *err)
{
    const long long heads = p.sequences / p.segments * a.H;
    const unsigned blocks = static_cast<unsigned>(heads * a.V / ROWS);
    kda_join_kernel<<<blocks, JOIN_THREADS, 0, stream>>>(a, p);
    KL_CUDA_TRY(cudaGetLastError(), err);
    return KL_OK;
}
