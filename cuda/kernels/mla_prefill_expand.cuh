/*
 * mla_prefill_expand.cuh -- mla_prefill's keys and values of a window of the contexts, and the
 * fragments of shared memory that they and the attention are multiplied from.
 *
 * Computes     [k_nope | v] = w_kv_b c for the pages of a window, rounded to bf16; copies k_pe
 * Shapes       pages [P, 64, rank+64] or 8-bit, w_kv_b [H, 256, rank], rank a multiple of 64
 * Order        rank in steps of 16, whatever the window is
 * Rows past what a sequence's queries see become zeros: a weight of zero would not hide NaN.
 */
#ifndef KL_CUDA_KERNELS_MLA_PREFILL_EXPAND_H
#define KL_CUDA_KERNELS_MLA_PREFILL_EXPAND_H

#include "../device/latents.cuh"
#include "../device/mma.cuh"
#include "../device/warp.cuh"
#include "mla_prefill.cuh"

namespace {

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int BLOCKS_PER_SM = 2; /* one computes scores while the other waits for a barrier */
constexpr int PAGE = KL_PAGE_TOKENS;
constexpr int NOPE = 128, ROPE = 64, QK = NOPE + ROPE, V = 128;
constexpr int PIECE = 8; /* elements of 16 bytes */
constexpr float LOG2_E = 1.4426950408889634f;

/* Rows in shared memory hold COLS elements, a multiple of 64. Piece p of row r lies at
 * p ^ (r % 8), so that the eight rows of an ldmatrix touch all banks; neighbours 8 rows or 8
 * pieces apart lie a constant apart. */
template <int COLS> __device__ bf16 *at(bf16 *base, int row, int piece)
{
    return base + row * COLS + ((piece ^ (row % 8)) * PIECE);
}

/* Where a lane's part of an ldmatrix starts. The fragment 2 j pieces on is at
 * (start ^ j % 4 * 32) + j / 4 * 128 bytes: bases are multiples of 128 bytes. */
template <int COLS> __device__ uint32_t start_a(bf16 *base)
{
    const int lane = lane_id();
    return shared_address(at<COLS>(base, lane % 16, lane / 16));
}

/* Of B from rows of B^T. */
template <int COLS> __device__ uint32_t start_b(bf16 *base)
{
    const int lane = lane_id();
    return shared_address(at<COLS>(base, lane % 8 + lane / 16 * 8, lane / 8 % 2));
}

__device__ uint32_t step(uint32_t start, int j)
{
    return (start ^ (j % 4 * 32)) + j / 4 * 128;
}

/* A 16 x 16 of A, or two neighbours 16 x 8 of B whose rows of B^T follow one another. */
__device__ void load_fragment(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

/* Two neighbours 16 x 8 of B from rows of B, found like A. */
__device__ void load_fragment_rows(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[4])
{
    mma_bf16(left, a, {b[0], b[1]});
    mma_bf16(right, a, {b[2], b[3]});
}

/* 2^x; tiny results are 0. */
__device__ float power_of_2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The last sequence whose running number is at or before `number`: those with nothing of their
 * own share it with the next. */
template <int mla_sequence::*member>
__device__ int find_owner(const mla_sequence *sequences, int N, int number)
{
    int low = 0, high = N;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (sequences[middle].*member <= number)
            low = middle;
        else
            high = middle;
    }
    return low;
}

constexpr int TILE = 128; /* tokens and outputs of a tile */
constexpr int DEPTH = 64; /* channels of a stage */
constexpr int STAGES = 3;
constexpr int STAGE = 2 * TILE * DEPTH; /* elements: latents, then weights */

/* A page of the running numbers: where it lies, and how many of its rows are read. */
struct page_rows {
    const char *rows;
    int count;
};

/* Bytes from a row to the next, and to its channels that are not multiplied. */
template <bool packed> __device__ long long row_bytes(const mla_call &a)
{
    return packed ? a.row.row_bytes : 2LL * (a.rank + a.rope);
}

template <bool packed> __device__ long long rope_at(const mla_call &a)
{
    return packed ? a.row.rope_at : 2LL * a.rank;
}

template <bool packed>
__device__ page_rows find_page(const mla_call &a, const mla_plan &plan, int page)
{
    const char *pages = static_cast<const char *>(a.pages);
    const int N = static_cast<int>(a.N);
    if (page >= plan.sequences[N].first_page) return {pages, 0};
    const int n = find_owner<&mla_sequence::first_page>(plan.sequences, N, page);
    const mla_sequence &s = plan.sequences[n];
    const int index = page - s.first_page;
    const long long id = a.block_table[n * a.B + index];
    return {pages + id * PAGE * row_bytes<packed>(a), min(s.end - index * PAGE, PAGE)};
}

/* Eight channels of a row of 8-bit latents. */
__device__ uint4 unpack_piece(const mla_call &a, const char *row, int channel)
{
    const float scale =
        reinterpret_cast<const float *>(row + a.row.scales_at)[channel / KL_LATENTS_GROUP];
    const uint2 codes = *reinterpret_cast<const uint2 *>(row + channel);
    const uint32_t factors = code_factors(scale, scale);
    const uint32_t even[2] = {even_codes(codes.x, factors), even_codes(codes.y, factors)};
    const uint32_t odd[2] = {odd_codes(codes.x, factors), odd_codes(codes.y, factors)};
    return {__byte_perm(even[0], odd[0], 0x5410), __byte_perm(even[0], odd[0], 0x7632),
            __byte_perm(even[1], odd[1], 0x5410), __byte_perm(even[1], odd[1], 0x7632)};
}

/* A piece of a latent to shared memory, zeros where it is not `inside`: by the copy engine's
 * instructions, or once it is unpacked. */
template <bool packed>
__device__ void load_piece(const mla_call &a, const char *row, int channel, bool inside,
                           bf16 *to)
{
    if constexpr (!packed) {
        copy_async(to, row + 2 * channel, inside);
    } else {
        uint4 x = {0, 0, 0, 0};
        if (inside) x = unpack_piece(a, row, channel);
        *reinterpret_cast<uint4 *>(to) = x;
    }
}

/* One stage: 64 channels of 128 latents and 128 rows of weights; zeros past a page's count. */
template <bool packed>
__device__ void load_stage(const mla_call &a, const page_rows (&from)[2], const bf16 *weights,
                           int channel, bf16 *stage)
{
    const int piece = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) {
        const int row = i * 16 + threadIdx.x / 8, in_page = row % PAGE;
        const page_rows &page = from[i * 16 / PAGE];
        const bool inside = in_page < page.count;
        const char *latent = page.rows + (inside ? in_page : 0) * row_bytes<packed>(a);
        load_piece<packed>(a, latent, channel + piece * PIECE, inside,
                           at<DEPTH>(stage, row, piece));
        copy_async(at<DEPTH>(stage + TILE * DEPTH, row, piece),
                   weights + static_cast<long long>(row) * a.rank + channel + piece * PIECE,
                   true);
    }
}

/* A warp's 64 x 64 of the product. */
__device__ void multiply_stage(bf16 *stage, float (&sums)[4][8][4])
{
    constexpr int ROWS = 16 * DEPTH * sizeof(bf16); /* bytes of 16 of them */
    const uint32_t latents = start_a<DEPTH>(stage + warp_id() / 2 * 64 * DEPTH);
    const uint32_t weights = start_b<DEPTH>(stage + (TILE + warp_id() % 2 * 64) * DEPTH);
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) {
        uint32_t x[4][4];
#pragma unroll
        for (int m = 0; m < 4; m++) load_fragment(x[m], step(latents, k) + m * ROWS);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t w[4];
            load_fragment(w, step(weights, k) + n * ROWS);
#pragma unroll
            for (int m = 0; m < 4; m++) mma_pair(sums[m][2 * n], sums[m][2 * n + 1], x[m], w);
        }
    }
}

__device__ void store_tile(const float (&sums)[4][8][4], bf16 *to)
{
    const int lane = lane_id();
    const int row = warp_id() / 2 * 64 + lane / 4, col = warp_id() % 2 * 64 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float(&s)[4] = sums[m][n];
            uint32_t *const at =
                reinterpret_cast<uint32_t *>(to + (row + m * 16) * TILE + col + n * 8);
            at[0] = pack_bf16(s[0], s[1]);
            at[8 * TILE / 2] = pack_bf16(s[2], s[3]);
        }
}

/* to [128, 128] <- the latents of two pages times 128 rows of weights. */
template <bool packed>
__device__ void expand_tile(const mla_call &a, const page_rows (&from)[2], const bf16 *weights,
                            bf16 *to, bf16 *shared)
{
    const int steps = a.rank / DEPTH;
    float sums[4][8][4] = {};
    __syncthreads(); /* the tile before this is done with shared memory */
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) load_stage<packed>(a, from, weights, s * DEPTH, shared + s * STAGE);
        copy_commit();
    }
    for (int s = 0; s < steps; s++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        const int next = s + STAGES - 1;
        if (next < steps)
            load_stage<packed>(a, from, weights, next * DEPTH, shared + next % STAGES * STAGE);
        copy_commit();
        multiply_stage(shared + s % STAGES * STAGE, sums);
    }
    store_tile(sums, to);
}

template <bool packed>
__device__ void copy_k_pe(const mla_call &a, const page_rows (&from)[2], bf16 *to)
{
    for (int i = threadIdx.x; i < TILE * ROPE / PIECE; i += THREADS) {
        const int row = i / (ROPE / PIECE), piece = i % (ROPE / PIECE), in_page = row % PAGE;
        const page_rows &page = row < PAGE ? from[0] : from[1];
        uint4 x = {0, 0, 0, 0};
        if (in_page < page.count)
            x = *reinterpret_cast<const uint4 *>(page.rows + in_page * row_bytes<packed>(a) +
                                                 rope_at<packed>(a) + piece * 2 * PIECE);
        *reinterpret_cast<uint4 *>(to + row * ROPE + piece * PIECE) = x;
    }
}

/* All blocks: pages [first, end) of the running numbers. */
template <bool packed>
__device__ void expand_window(const mla_call &a, const mla_plan &plan, const mla_window &window,
                              int first, int end, bf16 *shared)
{
    const long long pairs = (end - first + 1) / 2, items = pairs * 2 * a.H;
    const long long tokens = window.pages * PAGE;
    for (long long i = blockIdx.x; i < items; i += gridDim.x) {
        const int pair = static_cast<int>(i / (2 * a.H)),
                  part = static_cast<int>(i % (2 * a.H));
        const int h = part / 2, page = first + 2 * pair;
        const page_rows from[2] = {find_page<packed>(a, plan, page),
                                   find_page<packed>(a, plan, page + 1)};
        const long long row = h * tokens + pair * TILE;
        bf16 *to = (part % 2 == 0 ? window.keys : window.values) + row * TILE;
        const bf16 *weights =
            static_cast<const bf16 *>(a.w_kv_b) + static_cast<long long>(part) * TILE * a.rank;
        if (part == 0) copy_k_pe<packed>(a, from, window.k_pe + pair * TILE * ROPE);
        expand_tile<packed>(a, from, weights, to, shared);
    }
}

} // namespace

#endif
