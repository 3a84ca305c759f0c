/*
 * mla_decode_fp8.cu -- mla_decode's attention of the pieces on tensor cores, over 8-bit latents.
 *
 * Computes     max, sum and context of the scores of 32 heads over each piece's pages; see
 *              mla_arguments
 * Shapes       query [N, H, 576]; pages [P, 64, 656] bytes; context [slots, H, 512]
 * Layout       dense, rows of pages as base/latents.h has them, query as mla_query_column()
 * Precision    latents as the bf16 numbers that they stand for, exactly; else as
 *              mla_decode_tensor.cu
 * Grid         a block a multiprocessor, in three warpgroups. The first brings pages as they lie
 *              through a ring of three, 126 KB, and a piece's query. Latents become operands A in
 *              the registers of those that multiply, so that nothing is written back: the second
 *              has tokens as rows and the query in shared memory, the third channels as rows, which
 *              a transposing load gives it with the codes of two tokens side by side. Rows of 656
 *              bytes, 41 times 16, begin in other banks each
 * Order        pages of a piece in turn, within a page the bf16 channels, then the others in
 *              order, or the tokens in order
 * Roofline     656 bytes a token at 2 * 32 * (2 * 576 + 512) flops, 162 flop/byte: memory-bound,
 *              29 us for 128K tokens at 3.0 TB/s
 * Measured     H200, the whole operation, caches cold, in a graph: one row of 1K tokens 18.4 us, 8K
 *              23.9, 128K 61.8, 1M 294 (2.4 TB/s: 2.1 us a page, of which the bytes take 1.4); 32
 *              rows of 8K 109 (2026-11-22)
 */
#include "../device/barrier.cuh"
#include "../device/launch.cuh"
#include "../device/math.cuh"
#include "mla_decode_fp8_scores.cuh"

namespace {

constexpr int TOKENS = KL_PAGE_TOKENS;
constexpr int THREADS = 3 * WARPGROUP;
/* Of a thread, 3 * 168 to hand out: the context takes 128, its operand twice 32. */
constexpr int BRING_REGISTERS = 40, SCORE_REGISTERS = 216, CONTEXT_REGISTERS = 248;

constexpr int PAGE_BYTES = TOKENS * ROW_BYTES;
constexpr int QUERY_BYTES = ARRAYS * ARRAY_BYTES;
constexpr int STAGES = MLA_TENSOR_STAGES; /* pages on their way or in use */
constexpr int WEIGHT_SLOTS = 2;           /* pages whose probabilities are there at a time */
constexpr int EACH = 8;                   /* heads of a thread's scores */

/* Each array of the first two begins at a multiple of 1024 bytes, for the swizzle. */
struct shared_memory {
    uint8_t query[QUERY_BYTES];
    uint8_t weights[WEIGHT_SLOTS][HEADS * 128]; /* a head's 64 tokens a row */
    uint8_t page[STAGES][PAGE_BYTES];
    float tops[WEIGHT_SLOTS][HEADS][WARPS]; /* of a warp's tokens */
    float sums[HEADS][WARPS];
    float keep[WEIGHT_SLOTS][HEADS]; /* factors of the sums before */
    barrier full[STAGES], empty[STAGES], ready[WEIGHT_SLOTS], taken[WEIGHT_SLOTS];
    barrier query_full, query_empty;
};
constexpr int SHARED_BYTES = sizeof(shared_memory) + 1024;
static_assert(SHARED_BYTES <= 227 * 1024 && QUERY_BYTES % 1024 == 0);

/* ---- bringing pages, by one warp ------------------------------------------------------- */

__device__ void bring_page(const mla_arguments &a, long long id, shared_memory &s,
                           const mla_place<STAGES> &at)
{
    barrier_wait(s.empty + at.slot, at.phase ^ 1);
    if (lane_id() != 0) return;
    barrier_arrive_expecting(s.full + at.slot, PAGE_BYTES);
    copy_bytes(s.page[at.slot], static_cast<const uint8_t *>(a.pages) + id * PAGE_BYTES,
               PAGE_BYTES, s.full + at.slot);
}

__device__ void bring_query(const mla_arguments &a, long long n, shared_memory &s,
                            const mla_place<1> &at)
{
    const long long group = n * (mla_padded_heads(a.H) / HEADS) + blockIdx.y;
    barrier_wait(&s.query_empty, at.phase ^ 1);
    if (lane_id() != 0) return;
    barrier_arrive_expecting(&s.query_full, QUERY_BYTES);
    copy_bytes(s.query, reinterpret_cast<const uint8_t *>(a.query) + group * QUERY_BYTES,
               QUERY_BYTES, &s.query_full);
}

/* The first pages before the kernel's inputs are there, and so before the query. A later piece's
 * query also comes once they fill the ring: then the piece before has been read, or will be without
 * them. */
__device__ void bring_pages(const mla_arguments &a, shared_memory &s)
{
    mla_place<STAGES> at;
    mla_place<1> query;
    bool waits = true;
    mla_walk walk(a, blockIdx.x);
    for (mla_piece it; walk.next(&it); query.advance()) {
        mla_page_numbers numbers(a, it);
        for (int i = 0; i <= it.pages; i++) {
            if (i == it.early()) {
                if (waits) wait_for_inputs(), waits = false;
                bring_query(a, it.n, s, query);
            }
            if (i == it.pages) break;
            bring_page(a, numbers.at(i), s, at);
            __syncwarp();
            at.advance();
        }
    }
    if (waits) wait_for_inputs();
}

/* ---- softmax, by the warpgroup of the scores ------------------------------------------- */

__device__ void sync_scores()
{
    asm volatile("bar.sync 1, %0;" ::"n"(WARPGROUP) : "memory");
}

/* Of a thread's eight heads, number 2 j + e is this one. */
__device__ int head_of_thread(int i)
{
    return i / 2 * 8 + lane_id() % 4 * 2 + i % 2;
}

/* Maxima, known to all, and a thread's own parts of the sums. */
struct softmax_state {
    float max[EACH], sum[EACH];
};

/* Over the eight lanes that have the same heads: lane r / 4 gets that of head number r / 4. */
template <class F> __device__ float over_rows(float (&x)[EACH], F f)
{
#pragma unroll
    for (int d = EACH / 2; d > 0; d /= 2) {
        const bool upper = (lane_id() / 4 & d) != 0;
#pragma unroll
        for (int i = 0; i < d; i++) {
            const float mine = upper ? x[i + d] : x[i], given = upper ? x[i] : x[i + d];
            x[i] = f(mine, __shfl_xor_sync(ALL_LANES, given, 4 * d));
        }
    }
    return x[0];
}

/* x[i][t]: of token 2 r + t and head number i, its halves added; what is past `left` forgotten. */
__device__ __forceinline__ void take_scores(const float (&scores)[HEADS], int left,
                                            float (&x)[EACH][2])
{
    const int r = lane_id() / 4, token = warp_of_group() * 16 + 2 * r;
    const bool swapped = r >= 4;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = i / 2 * 4 + i % 2; /* and 16 further on what the query lacks */
        const float first = scores[at] + scores[at + 16];
        const float second = scores[at + 2] + scores[at + 18];
        x[i][0] = token < left ? swapped ? second : first : -INFINITY;
        x[i][1] = token + 1 < left ? swapped ? first : second : -INFINITY;
    }
}

/* Makes the probabilities, and what the sums before are to be multiplied by. */
__device__ __forceinline__ void softmax_page(const float (&x)[EACH][2],
                                             const float (*tops)[WARPS], softmax_state &state,
                                             uint32_t (&probabilities)[EACH],
                                             float (&keep)[EACH])
{
    float4 t[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        t[i] = *reinterpret_cast<const float4 *>(tops[head_of_thread(i)]);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const float most = fmaxf(fmaxf(t[i].x, t[i].y), fmaxf(t[i].z, t[i].w));
        const float top = fmaxf(state.max[i], most);
        keep[i] = exp2_approx(state.max[i] - top);
        probabilities[i] = pack_bf16(exp2_approx(x[i][0] - top), exp2_approx(x[i][1] - top));
        state.max[i] = top;
    }
}

__device__ __forceinline__ void store_weights(const uint32_t (&probabilities)[EACH],
                                              const float (&keep)[EACH], uint8_t *weights,
                                              float *keeps)
{
    const int r = lane_id() / 4, token = warp_of_group() * 16 + 2 * r;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int head = head_of_thread(i);
        uint8_t *to = weights + swizzled<128>(head, token / 8) + token % 8 * 2;
        *reinterpret_cast<uint32_t *>(to) = probabilities[i];
        if (warp_of_group() == 0 && r == 0) keeps[head] = keep[i];
    }
}

__device__ void store_sums(const mla_arguments &a, const mla_piece &it, long long h0,
                           softmax_state &state, float (*sums)[WARPS])
{
    const int r = lane_id() / 4, head = head_of_thread(r);
    sums[head][warp_of_group()] = over_rows(state.sum, [](float x, float y) { return x + y; });
    sync_scores();
    if (warp_of_group() != 0 || h0 + head >= a.H) return;
    const float4 t = *reinterpret_cast<const float4 *>(sums[head]);
    float max = state.max[0];
#pragma unroll
    for (int i = 1; i < EACH; i++)
        if (i == r) max = state.max[i];
    a.max[it.slot * a.H + h0 + head] = max;
    a.sum[it.slot * a.H + h0 + head] = t.x + t.y + t.z + t.w;
}

__device__ void make_weights(const mla_arguments &a, long long h0, shared_memory &s)
{
    mla_place<STAGES> at;
    mla_place<WEIGHT_SLOTS> to;
    mla_place<1> query;
    float scores[HEADS], x[EACH][2], most[EACH], keep[EACH];
    uint32_t w[EACH];
    mla_walk walk(a, blockIdx.x);
    mla_piece it;
    bool some = walk.next(&it);
    wait_for_inputs();
    for (; some; some = walk.next(&it), query.advance()) {
        softmax_state state;
#pragma unroll
        for (int i = 0; i < EACH; i++) state.max[i] = -INFINITY, state.sum[i] = 0;
        barrier_wait(&s.query_full, query.phase);
        for (int i = 0; i < it.pages; i++) {
            barrier_wait(s.full + at.slot, at.phase);
            score_page(s.page[at.slot], s.query, scores);
            if (i + 1 == it.pages && lane_id() == 0) barrier_arrive(&s.query_empty);
            take_scores(scores, it.tokens(i), x);
#pragma unroll
            for (int j = 0; j < EACH; j++) most[j] = fmaxf(x[j][0], x[j][1]);
            const float top = over_rows(most, [](float y, float z) { return fmaxf(y, z); });
            s.tops[to.slot][head_of_thread(lane_id() / 4)][warp_of_group()] = top;
            sync_scores();
            softmax_page(x, s.tops[to.slot], state, w, keep);
            barrier_wait(s.taken + to.slot, to.phase ^ 1);
            store_weights(w, keep, s.weights[to.slot], s.keep[to.slot]);
            fence_async_proxy();
            __syncwarp();
            if (lane_id() == 0) barrier_arrive(s.ready + to.slot);
#pragma unroll
            for (int j = 0; j < EACH; j++)
                state.sum[j] = state.sum[j] * keep[j] + low_half(w[j]) + high_half(w[j]);
            at.advance(), to.advance();
        }
        store_sums(a, it, h0, state, s.sums);
    }
}

/* ---- the context, by a warpgroup ------------------------------------------------------- */

constexpr int TILES = RANK / CHUNK / WARPS; /* of a warp: 16 channels each, of one group */
static_assert(TILES * CHUNK == KL_LATENTS_GROUP);
typedef float context_sums[TILES][HEADS / 2];

/* Of the warp's group, for tokens `token` and the next one; zeros past the sequence's length. */
__device__ uint32_t factors_of(const uint8_t *page, int token, int left)
{
    const uint8_t *at = page + token * ROW_BYTES + SCALES_AT + warp_of_group() * 4;
    const float first = *reinterpret_cast<const float *>(at);
    const float second = *reinterpret_cast<const float *>(at + ROW_BYTES);
    return code_factors(token < left ? first : 0.0f, token + 1 < left ? second : 0.0f);
}

/* Of 16 tokens the codes of the warp's channels, and what multiplies them. */
struct raw_channels {
    uint32_t codes[TILES / 2][4], low, high;

    __device__ __forceinline__ void load(const uint8_t *page, int step, int left)
    {
        const int lane = lane_id(), token = step * 16 + lane % 4 * 2;
        const uint8_t *row = page + (step * 16 + lane % 16) * ROW_BYTES +
                             (warp_of_group() * TILES + lane / 16) * CHUNK;
#pragma unroll
        for (int j = 0; j < TILES / 2; j++) ldmatrix_transposed(codes[j], row + 2 * j * CHUNK);
        low = factors_of(page, token, left), high = factors_of(page, token + 8, left);
    }

    /* As operand A: rows r and r + 8 of tile j are channels 2 r and 2 r + 1 of the warp's chunk j.
     * Codes are finite, so that a factor of zero hides what is past the length. */
    __device__ __forceinline__ void unpack(uint32_t (&to)[TILES][4]) const
    {
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const uint32_t *x = codes[j / 2] + j % 2 * 2;
            to[j][0] = even_codes(x[0], low), to[j][1] = odd_codes(x[0], low);
            to[j][2] = even_codes(x[1], high), to[j][3] = odd_codes(x[1], high);
        }
    }
};

__device__ __forceinline__ void keep_context(const float *keeps, context_sums &acc)
{
#pragma unroll
    for (int j = 0; j < HEADS / 8; j++) {
        const float2 keep =
            *reinterpret_cast<const float2 *>(keeps + 8 * j + lane_id() % 4 * 2);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
            acc[m][4 * j] *= keep.x, acc[m][4 * j + 1] *= keep.y;
            acc[m][4 * j + 2] *= keep.x, acc[m][4 * j + 3] *= keep.y;
        }
    }
}

/* context = keep context + c^T weights; the first tokens are there before the weights are. */
__device__ __forceinline__ void add_page(const uint8_t *page, int left, const uint8_t *weights,
                                         const float *keeps, barrier *ready, uint32_t phase,
                                         context_sums &acc)
{
    uint32_t channels[2][TILES][4];
    raw_channels raw;
    raw.load(page, 0, left);
    raw.unpack(channels[0]);
    barrier_wait(ready, phase);
    keep_context(keeps, acc);
    const uint64_t b = wgmma_descriptor(weights);
#pragma unroll
    for (int step = 0; step < TOKENS / 16; step++) {
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < TILES; m++)
            wgmma<HEADS>(acc[m], channels[step % 2][m], wgmma_moved(b, step * 32));
        wgmma_commit();
        if (step + 1 == TOKENS / 16) break;
        wgmma_wait<1>(); /* the step before has read what the next one takes */
        if (step == 0) raw.load(page, 1, left);
        raw.unpack(channels[(step + 1) % 2]);
        if (step + 2 < TOKENS / 16) raw.load(page, step + 2, left);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < TILES; m++) wgmma_settle(acc[m]);
}

/* acc[m][4 j + i]: channel 16 (8 warp + m) + 2 (lane / 4) + i / 2 of head 8 j + 2 (lane % 4) +
 * i % 2. */
__device__ void store_context(const mla_arguments &a, long long slot, long long h0,
                              const context_sums &acc)
{
    const int channel = warp_of_group() * KL_LATENTS_GROUP + lane_id() / 4 * 2;
#pragma unroll
    for (int j = 0; j < HEADS / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const long long h = h0 + 8 * j + lane_id() % 4 * 2 + i;
            if (h >= a.H) continue;
            float *to = a.context + (slot * a.H + h) * RANK + channel;
#pragma unroll
            for (int m = 0; m < TILES; m++)
                *reinterpret_cast<float2 *>(to + m * CHUNK) = {acc[m][4 * j + i],
                                                               acc[m][4 * j + 2 + i]};
        }
}

__device__ void add_contexts(const mla_arguments &a, long long h0, shared_memory &s)
{
    mla_place<STAGES> at;
    mla_place<WEIGHT_SLOTS> from;
    context_sums acc;
    mla_walk walk(a, blockIdx.x);
    mla_piece it;
    bool some = walk.next(&it);
    wait_for_inputs();
    for (; some; some = walk.next(&it)) {
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < HEADS / 2; i++) acc[m][i] = 0;
        for (int i = 0; i < it.pages; i++) {
            barrier_wait(s.full + at.slot, at.phase);
            add_page(s.page[at.slot], it.tokens(i), s.weights[from.slot], s.keep[from.slot],
                     s.ready + from.slot, from.phase, acc);
            if (lane_id() == 0)
                barrier_arrive(s.empty + at.slot), barrier_arrive(s.taken + from.slot);
            at.advance(), from.advance();
        }
        store_context(a, it.slot, h0, acc);
    }
}

/* ---- the kernel ------------------------------------------------------------------------ */

__device__ void make_barriers(shared_memory &s)
{
    for (int i = 0; i < STAGES; i++)
        barrier_init(s.full + i, 1), barrier_init(s.empty + i, WARPS);
    for (int i = 0; i < WEIGHT_SLOTS; i++)
        barrier_init(s.ready + i, WARPS), barrier_init(s.taken + i, WARPS);
    barrier_init(&s.query_full, 1), barrier_init(&s.query_empty, WARPS);
    barrier_init_done();
}

__global__ __launch_bounds__(THREADS,
                             1) void mla_attend_fp8(__grid_constant__ const mla_arguments a)
{
    extern __shared__ char memory[];
    /* An offset, for the compiler to know that what follows is shared memory. */
    shared_memory &s =
        *reinterpret_cast<shared_memory *>(memory + (0 - shared_address(memory)) % 1024);
    const long long h0 = static_cast<long long>(blockIdx.y) * HEADS;
    let_next_start();
    if (threadIdx.x == 0) make_barriers(s);
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down_to<BRING_REGISTERS>();
        if (warp_id() == 0)
            bring_pages(a, s);
        else
            wait_for_inputs();
    } else if (threadIdx.x < 2 * WARPGROUP) {
        registers_up_to<SCORE_REGISTERS>();
        make_weights(a, h0, s);
    } else {
        registers_up_to<CONTEXT_REGISTERS>();
        add_contexts(a, h0, s);
    }
}

} // namespace

kl_status kl_cuda_mla_attend_fp8(const mla_arguments &a, int blocks, cudaStream_t stream,
                                 kl_error *err)
{
    const long long items = a.shares > 0 ? a.shares : a.N * a.splits;
    const dim3 grid(static_cast<unsigned>(items < blocks ? items : blocks),
                    static_cast<unsigned>(mla_divide_up(a.H, HEADS)));
    KL_CUDA_TRY(cudaFuncSetAttribute(mla_attend_fp8,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES),
                err);
    return kl_cuda_launch(mla_attend_fp8, grid, THREADS, SHARED_BYTES, stream, err, a);
}
