/*
 * mla_decode_fp8_scores.cuh -- mla_decode's scores of a page of 8-bit latents, by a warpgroup:
 * the tokens are rows of operand A, which their codes become in registers; the query lies in
 * shared memory.
 */
#ifndef KL_CUDA_KERNELS_MLA_DECODE_FP8_SCORES_H
#define KL_CUDA_KERNELS_MLA_DECODE_FP8_SCORES_H

#include "../device/latents.cuh"
#include "../device/mla.cuh"
#include "../device/wgmma.cuh"

namespace {

constexpr int RANK = 512, ROPE = 64, WIDTH = RANK + ROPE;
constexpr int HEADS = MLA_TENSOR_HEADS;      /* of a block */
constexpr int WARPS = WARPGROUP / WARP;      /* of a warpgroup */
constexpr int ARRAY_BYTES = 2 * HEADS * 128; /* 64 channels of the query */
constexpr int ARRAYS = WIDTH / 64;

constexpr int CHUNK = 16; /* codes of 16 bytes */
constexpr int ROPE_AT = static_cast<int>(kl_latents_row_of(RANK, ROPE).rope_at);
constexpr int SCALES_AT = static_cast<int>(kl_latents_row_of(RANK, ROPE).scales_at);
constexpr int ROW_BYTES = static_cast<int>(kl_latents_row_of(RANK, ROPE).row_bytes);
static_assert(ROW_BYTES / 16 % 2 == 1); /* eight rows meet all banks */

__device__ int warp_of_group()
{
    return warp_id() % WARPS;
}

/* Rows r and r + 8 of a warp's operand A are tokens 2 r and 2 r + 1 of its sixteen, from r = 4 on
 * the other way round: so eight rows of a load are in other banks each, and a thread's two tokens
 * are neighbours. */
__device__ int token_of_row(int r, int second)
{
    return warp_of_group() * 16 + 2 * r + ((r / 4) ^ second);
}

/* What this lane's tokens multiply their codes by, for each group of channels. */
struct row_factors {
    uint32_t x[2][RANK / KL_LATENTS_GROUP];

    __device__ explicit row_factors(const uint8_t *page)
    {
#pragma unroll
        for (int second = 0; second < 2; second++) {
            const int token = token_of_row(lane_id() / 4, second);
            const float4 s =
                *reinterpret_cast<const float4 *>(page + token * ROW_BYTES + SCALES_AT);
            x[second][0] = code_factors(s.x, s.x), x[second][1] = code_factors(s.y, s.y);
            x[second][2] = code_factors(s.z, s.z), x[second][3] = code_factors(s.w, s.w);
        }
    }
};

constexpr int RAW = 2; /* loads of an array's codes */

/* The codes of an array. `row`: where this lane's loads begin. */
__device__ __forceinline__ void load_codes(const uint8_t *row, int array,
                                           uint32_t (&raw)[RAW][4])
{
#pragma unroll
    for (int i = 0; i < RAW; i++) ldmatrix(raw[i], row + array * 64 + 2 * i * CHUNK);
}

/* Operand A of 64 channels: of 16 channels first those with even numbers. */
__device__ __forceinline__ void unpack_tokens(const uint32_t (&raw)[RAW][4], int array,
                                              const row_factors &factors, uint32_t (&to)[4][4])
{
    const uint32_t first = factors.x[0][array / 2], second = factors.x[1][array / 2];
#pragma unroll
    for (int step = 0; step < 4; step++) {
        const uint32_t *x = raw[step / 2] + step % 2 * 2;
        to[step][0] = even_codes(x[0], first), to[step][1] = even_codes(x[1], second);
        to[step][2] = odd_codes(x[0], first), to[step][3] = odd_codes(x[1], second);
    }
}

/* scores[4 j + i]: row r + 8 (i / 2), column 8 j + 2 (lane % 4) + i % 2: of a head, and 32 further
 * on what its query lacks. The bf16 channels first, which need not be unpacked: while an array is
 * multiplied the next one is, and the codes after it are loaded. */
__device__ __forceinline__ void score_page(const uint8_t *page, const uint8_t *query,
                                           float (&scores)[HEADS])
{
    constexpr int OPERANDS = 3;
    const int lane = lane_id();
    const uint8_t *row =
        page + token_of_row(lane % 8, lane / 8 % 2) * ROW_BYTES + lane / 16 * CHUNK;
    const uint64_t b = wgmma_descriptor(query);
    uint32_t tokens[OPERANDS][4][4], raw[2][RAW][4];
#pragma unroll
    for (int step = 0; step < 4; step++) ldmatrix(tokens[0][step], row + ROPE_AT + step * 32);
    load_codes(row, 0, raw[0]);
    const row_factors factors(page);
#pragma unroll
    for (int i = 0; i < HEADS; i++) scores[i] = 0;
#pragma unroll
    for (int turn = 0; turn < ARRAYS; turn++) {
        const int array = (turn + ARRAYS - 1) % ARRAYS;
        uint32_t(&x)[4][4] = tokens[turn % OPERANDS];
        if (turn > 0 && turn + 1 < ARRAYS) load_codes(row, turn, raw[turn % 2]);
        if (turn >= OPERANDS) wgmma_wait<OPERANDS - 1>(); /* x has been read */
        if (turn > 0) unpack_tokens(raw[array % 2], array, factors, x);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++)
            wgmma<2 * HEADS>(scores, x[step], wgmma_moved(b, array * ARRAY_BYTES + step * 32));
        wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_settle(scores);
}

} // namespace

#endif
