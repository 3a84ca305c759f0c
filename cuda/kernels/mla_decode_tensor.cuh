/*
 * mla_decode_tensor.cuh -- what mla_decode_tensor.cu and mla_decode_page.cu share: pages as boxes in
 * shared memory, the scores of one and their softmax.
 */
#ifndef KL_CUDA_KERNELS_MLA_DECODE_TENSOR_H
#define KL_CUDA_KERNELS_MLA_DECODE_TENSOR_H

#include "../device/barrier.cuh"
#include "../device/mla.cuh"
#include "../device/wgmma.cuh"

namespace {

constexpr int RANK = 512, ROPE = 64, WIDTH = RANK + ROPE;
constexpr int TOKENS = KL_PAGE_TOKENS;
constexpr int ROW_BYTES = 128; /* of a box: 64 channels */
constexpr int BOX_BYTES = TOKENS * ROW_BYTES;
constexpr int BOXES = WIDTH / 64, CONTEXT_BOXES = RANK / 64;
constexpr int PAGE_BYTES = BOXES * BOX_BYTES;
constexpr int STEPS = WIDTH / 16;

__device__ int warp_of_group()
{
    return warp_id() % (WARPGROUP / WARP);
}

/* This thread's head among the block's: of its rows of A and of the scores. */
__device__ int head_of_thread()
{
    return warp_of_group() * 8 + lane_id() / 4;
}

/* scores[4 t + i]: of token 8 t + 2 (lane % 4) + i % 2 of the thread's head, i / 2 the half. */
__device__ __forceinline__ void score_page(const uint8_t *page, const uint32_t (&q)[STEPS][4],
                                           float (&scores)[TOKENS / 2])
{
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) scores[i] = 0;
    const uint64_t b = wgmma_descriptor(page);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        wgmma<TOKENS>(scores, q[step], wgmma_moved(b, step / 4 * BOX_BYTES + step % 4 * 32));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(scores);
}

/* A head's maximum, known to its four threads, and a thread's own part of its sum. */
struct softmax_state {
    float max, sum;
};

/* Adds the halves, forgets tokens past `left`, and writes the probabilities. */
__device__ __forceinline__ void softmax_page(float (&scores)[TOKENS / 2], int left,
                                             softmax_state &state, uint8_t *weights,
                                             float *keeps)
{
    const int c = lane_id() % 4, head = head_of_thread();
    float x[TOKENS / 8][2], top = state.max;
#pragma unroll
    for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            x[t][i] = scores[4 * t + i] + scores[4 * t + 2 + i];
            if (8 * t + 2 * c + i >= left) x[t][i] = -INFINITY;
            top = fmaxf(top, x[t][i]);
        }
    top = warp_max<4>(top);
    const float keep = exp2f(state.max - top);
    state.sum *= keep, state.max = top;
#pragma unroll
    for (int t = 0; t < TOKENS / 8; t++) {
        const uint32_t w = pack_bf16(exp2f(x[t][0] - top), exp2f(x[t][1] - top));
        *reinterpret_cast<uint32_t *>(weights + swizzled<ROW_BYTES>(head, t) + c * 4) = w;
        state.sum += low_half(w) + high_half(w);
    }
    if (c == 0) keeps[head] = keep;
}

/* sums += c^T weights of a page: of 64 channels a box, and of so many heads. */
template <int heads>
__device__ __forceinline__ void add_context(const uint8_t *page, const uint8_t *weights,
                                            float (&sums)[CONTEXT_BOXES][heads / 2])
{
    const uint64_t latents = wgmma_descriptor_transposed(page, BOX_BYTES);
    const uint64_t b = wgmma_descriptor(weights);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < TOKENS / 16; step++)
#pragma unroll
        for (int m = 0; m < CONTEXT_BOXES; m++)
            wgmma_of_transposed<heads>(
                sums[m], wgmma_moved(latents, m * BOX_BYTES + step * 16 * ROW_BYTES),
                wgmma_moved(b, step * 32));
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < CONTEXT_BOXES; m++) wgmma_settle(sums[m]);
}

/* Boxes of the matrix of latents that all pages are. */
kl_status map_pages(const mla_arguments &a, box_map *map, kl_error *err)
{
    const box_matrix pages = {
        .data = a.pages,
        .rows = a.P * TOKENS,
        .row_bytes = WIDTH * sizeof(bf16),
        .box_rows = TOKENS,
        .box_bytes = ROW_BYTES,
        .element_bytes = sizeof(bf16),
        .swizzled = true,
    };
    return kl_cuda_map_boxes(pages, map, err);
}

} // namespace

#endif
