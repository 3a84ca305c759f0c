/*
 * mla_decode_fp8_scores.cuh -- mla_decode's scores of a page of 8-bit latents, by a warpgroup:
 * the tokens are rows of operand A, which their codes become in registers; the query lies in
 * shared memory. Codes are f16 exactly; what their group's scale and the query's unit are is
 * multiplied to the group's sums.
 */
#ifndef KL_CUDA_KERNELS_MLA_DECODE_FP8_SCORES_H
#define KL_CUDA_KERNELS_MLA_DECODE_FP8_SCORES_H

#include "../device/barrier.cuh"
#include "../device/latents.cuh"
#include "../device/mla.cuh"
#include "../device/wgmma.cuh"

namespace {

constexpr int RANK = 512, ROPE = 64, WIDTH = RANK + ROPE;
constexpr int HEADS = MLA_TENSOR_HEADS; /* of a block */
constexpr int WARPS = WARPGROUP / WARP; /* of a warpgroup */
constexpr int ARRAYS = WIDTH / 64;      /* of the query, 64 channels each */
constexpr int GROUPS = RANK / KL_LATENTS_GROUP;
constexpr int MOST_TURNS = 7; /* arrays of a page's scores before the context's turn comes */

constexpr int CHUNK = 16; /* codes of 16 bytes */
constexpr int ROPE_AT = static_cast<int>(kl_latents_row_of(RANK, ROPE).rope_at);
constexpr int SCALES_AT = static_cast<int>(kl_latents_row_of(RANK, ROPE).scales_at);
constexpr int ROW_BYTES = static_cast<int>(kl_latents_row_of(RANK, ROPE).row_bytes);
static_assert(ROW_BYTES / 16 % 2 == 1); /* eight rows meet all banks */

/* As mla_query_column() has it. */
struct query_memory {
    uint8_t arrays[ARRAYS][MLA_QUERY_ARRAY];
    float units[GROUPS][HEADS];
};

__device__ int warp_of_group()
{
    return warp_id() % WARPS;
}

/* Of a warp's sixteen, in the order of the probabilities: rows r and r + 8 of its operand A are
 * neighbours there. Eight rows that are loaded together, of one half or of four neighbours each,
 * are in other banks. */
__device__ int token_of(int r, int second)
{
    return second ? 8 + (r ^ 4) : r;
}

/* The scales of this thread's two tokens; those past the length have none. */
struct token_scales {
    float x[2][GROUPS];

    __device__ token_scales(const uint8_t *page, int left)
    {
#pragma unroll
        for (int second = 0; second < 2; second++) {
            const int token = warp_of_group() * 16 + token_of(lane_id() / 4, second);
            const float4 s =
                *reinterpret_cast<const float4 *>(page + token * ROW_BYTES + SCALES_AT);
            const bool inside = token < left;
            x[second][0] = inside ? s.x : 0.0f, x[second][1] = inside ? s.y : 0.0f;
            x[second][2] = inside ? s.z : 0.0f, x[second][3] = inside ? s.w : 0.0f;
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

/* Operand A of 64 channels: of every four channels the first two, and eight columns further on
 * the others. */
__device__ __forceinline__ void unpack_tokens(const uint32_t (&raw)[RAW][4],
                                              uint32_t (&to)[4][4])
{
#pragma unroll
    for (int step = 0; step < 4; step++) {
        const uint32_t *x = raw[step / 2] + step % 2 * 2;
        pairs_of_fp8(x[0], to[step][0], to[step][2]);
        pairs_of_fp8(x[1], to[step][1], to[step][3]);
    }
}

typedef float score_sums[HEADS / 2];

/* scores += the sums of a group, in its units. */
__device__ __forceinline__ void add_group(score_sums &sums, const float *units, float first,
                                          float second, score_sums &scores)
{
    wgmma_settle(sums);
#pragma unroll
    for (int j = 0; j < HEADS / 8; j++) {
        const float2 unit =
            *reinterpret_cast<const float2 *>(units + 8 * j + lane_id() % 4 * 2);
        scores[4 * j] = fmaf(sums[4 * j], unit.x * first, scores[4 * j]);
        scores[4 * j + 1] = fmaf(sums[4 * j + 1], unit.y * first, scores[4 * j + 1]);
        scores[4 * j + 2] = fmaf(sums[4 * j + 2], unit.x * second, scores[4 * j + 2]);
        scores[4 * j + 3] = fmaf(sums[4 * j + 3], unit.y * second, scores[4 * j + 3]);
    }
    wgmma_settle(scores); /* now, beside the products of the next group */
}

/* scores[4 j + i]: row r + 8 (i / 2), column 8 j + 2 (lane % 4) + i % 2, a head. The bf16 channels
 * first, which need not be unpacked: while an array is multiplied the next one is, and the codes
 * after it are loaded. Sums of a group are added while the next one's are made. `most`: told when
 * most products have been given out. */
__device__ __forceinline__ void score_page(const uint8_t *page, const query_memory &query,
                                           float factor, const token_scales &scales,
                                           barrier *most, score_sums &scores)
{
    constexpr int OPERANDS = 3, SUMS = 2;
    const int lane = lane_id();
    const uint8_t *row = page +
                         (warp_of_group() * 16 + token_of(lane % 8, lane / 8 % 2)) * ROW_BYTES +
                         lane / 16 * CHUNK;
    const uint64_t b = wgmma_descriptor(query.arrays);
    uint32_t tokens[OPERANDS][4][4], raw[2][RAW][4];
    score_sums sums[SUMS];
#pragma unroll
    for (int step = 0; step < 4; step++) ldmatrix(tokens[0][step], row + ROPE_AT + step * 32);
    load_codes(row, 0, raw[0]);
#pragma unroll
    for (int turn = 0; turn < ARRAYS; turn++) {
        const int array = (turn + ARRAYS - 1) % ARRAYS, group = array / 2;
        uint32_t(&x)[4][4] = tokens[turn % OPERANDS];
        score_sums &sum = sums[turn == 0 ? 0 : (group + 1) % SUMS];
        if (turn > 0 && turn + 1 < ARRAYS) load_codes(row, turn, raw[turn % 2]);
        if (turn >= OPERANDS) wgmma_wait<OPERANDS - 1>(); /* x has been read */
        if (turn > 0) unpack_tokens(raw[array % 2], x);
        if (turn == 3) {
            wgmma_settle(sum);
#pragma unroll
            for (int i = 0; i < HEADS / 2; i++) scores[i] = sum[i] * factor;
        } else if (turn > 3 && turn % 2 == 1) {
            add_group(sum, query.units[group - 2], scales.x[0][group - 2],
                      scales.x[1][group - 2], scores);
        }
        if (turn == 0 || turn % 2 == 1)
#pragma unroll
            for (int i = 0; i < HEADS / 2; i++) sum[i] = 0;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const uint64_t columns = wgmma_moved(b, array * MLA_QUERY_ARRAY + step * 32);
            if (turn == 0)
                wgmma<HEADS>(sum, x[step], columns);
            else
                wgmma_half<HEADS>(sum, x[step], columns);
        }
        wgmma_commit();
        if (turn + 1 == MOST_TURNS && lane_id() == 0) barrier_arrive(most);
    }
    wgmma_wait<2>();
    add_group(sums[1], query.units[2], scales.x[0][2], scales.x[1][2], scores);
    wgmma_wait<0>();
    add_group(sums[0], query.units[3], scales.x[0][3], scales.x[1][3], scores);
}

} // namespace

#endif
