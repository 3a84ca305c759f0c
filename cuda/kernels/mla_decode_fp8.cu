/*
 * mla_decode_fp8.cu -- mla_decode's attention of the pieces on tensor cores, over 8-bit latents.
 *
 * Computes     max, sum and context of the scores of 32 heads over each piece's pages; see
 *              mla_arguments
 * Shapes       query [N, H, 576]; pages [P, 64, 656] bytes; context [slots, H, 512]
 * Layout       dense, rows of pages as base/latents.h has them, query as mla_query_column()
 * Precision    codes in f16, exactly, their scales apart; the query in f16 (11 bits) in units of
 *              each head and group of 128 channels, its other channels exactly; probabilities in
 *              f16 (and their sum of the rounded ones) times scales over the largest one so far,
 *              in full down to 2^-29 of that; f32 scores, sums and results
 * Grid         a block a multiprocessor, in three warpgroups. The first brings pages as they lie
 *              through a ring of four, 168 KB, and a piece's query. Codes become operands A in
 *              the registers of those that multiply, so that nothing is written back: the second
 *              has tokens as rows and the query in shared memory, the third channels as rows, which
 *              a transposing load gives it with the codes of two tokens side by side. Rows of 656
 *              bytes, 41 times 16, begin in other banks each
 * Order        pages of a piece in turn, within a page the bf16 channels, then the others' groups
 *              in order, or the tokens by sixteens
 * Roofline     656 bytes a token at 2 * 32 * (576 + 512) flops, 106 flop/byte: memory-bound, 29 us
 *              for 128K tokens at 3.0 TB/s
 * Measured     H200, caches cold, the whole operation for one row: 1K tokens 16.6 us, 128K 52.7, 1M
 *              235.5 (2.96 TB/s) (2026-11-22)
 */
#include "../device/barrier.cuh"
#include "../device/launch.cuh"
#include "mla_decode_fp8_softmax.cuh"

namespace {

constexpr int TOKENS = KL_PAGE_TOKENS;
constexpr int THREADS = 3 * WARPGROUP;
/* Of a thread, 3 * 168 to hand out: the context takes 128, its operand twice 32. */
constexpr int BRING_REGISTERS = 40, SCORE_REGISTERS = 224, CONTEXT_REGISTERS = 240;

constexpr int PAGE_BYTES = TOKENS * ROW_BYTES;
constexpr int QUERY_BYTES = sizeof(query_memory);
constexpr int STAGES = MLA_PACKED_STAGES; /* pages on their way or in use */
constexpr int WEIGHT_SLOTS = 1;           /* pages whose probabilities are there at a time */

/* The arrays of both begin at multiples of 1024 bytes, for the swizzle. */
struct shared_memory {
    page_weights weights[WEIGHT_SLOTS];
    query_memory query;
    uint8_t page[STAGES][PAGE_BYTES];
    float tops[2][HEADS][WARPS];        /* of a warp's tokens */
    uint32_t largest[2][WARPS][GROUPS]; /* bits of the scales of a warp's tokens */
    float sums[HEADS][WARPS];
    barrier full[STAGES], empty[STAGES], ready[WEIGHT_SLOTS], taken[WEIGHT_SLOTS];
    barrier query_full, query_empty;
};
constexpr int SHARED_BYTES = sizeof(shared_memory) + 1024;
static_assert(SHARED_BYTES <= 227 * 1024 && sizeof(page_weights) % 1024 == 0);
static_assert(QUERY_BYTES % 16 == 0 && PAGE_BYTES % 16 == 0);

/* ---- bringing pages, by one warp ------------------------------------------------------- */

__device__ void bring_page(const mla_arguments &a, long long id, shared_memory &s,
                           const mla_place<STAGES> &at)
{
    barrier_wait(s.empty + at.slot, at.phase ^ 1);
    if (!ALL_SPEAK && lane_id() != 0) return;
    copies_begin(s.full + at.slot, PAGE_BYTES);
    copy_bytes(s.page[at.slot], static_cast<const uint8_t *>(a.pages) + id * PAGE_BYTES,
               PAGE_BYTES, s.full + at.slot);
    copies_end(s.full + at.slot);
}

__device__ void bring_query(const mla_arguments &a, long long n, shared_memory &s,
                            const mla_place<1> &at)
{
    const long long h0 = static_cast<long long>(blockIdx.y) * HEADS;
    barrier_wait(&s.query_empty, at.phase ^ 1);
    if (!ALL_SPEAK && lane_id() != 0) return;
    copies_begin(&s.query_full, QUERY_BYTES);
    copy_bytes(&s.query, mla_packed_query(a, n, h0), QUERY_BYTES, &s.query_full);
    copies_end(&s.query_full);
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
            if (i == it.early(STAGES)) {
                if (waits) wait_for_inputs(), waits = false;
                bring_query(a, it.n, s, query);
            }
            if (i == it.pages) break;
            bring_page(a, numbers.at(i), s, at);
            __syncwarp();
            at.advance();
        }
    }
    if (lane_id() == 0) mla_ask_for_weights(a);
    if (waits) wait_for_inputs();
}

/* ---- scores and softmax, by a warpgroup ------------------------------------------------ */

__device__ void sync_scores()
{
    barrier_of_threads<1, WARPGROUP>();
}

__device__ void store_sums(const mla_arguments &a, const mla_piece &it, long long h0,
                           softmax_state &state, float (*sums)[WARPS])
{
    const int head = head_of_thread(lane_id() / 4);
    sums[head][warp_of_group()] = over_rows(state.sum, [](float x, float y) { return x + y; });
    sync_scores();
    if (warp_of_group() != 0 || h0 + head >= a.H) return;
    const float4 t = *reinterpret_cast<const float4 *>(sums[head]);
    a.max[it.slot * a.H + h0 + head] = state.max;
    a.sum[it.slot * a.H + h0 + head] = (t.x + t.y + t.z + t.w) * PART;
}

__device__ void make_weights(const mla_arguments &a, long long h0, shared_memory &s)
{
    mla_place<STAGES> at;
    mla_place<WEIGHT_SLOTS> to;
    mla_place<2> told;
    mla_place<1> query;
    score_sums scores;
    uint32_t probabilities[EACH], factors[GROUPS];
    mla_walk walk(a, blockIdx.x);
    mla_piece it;
    bool some = walk.next(&it);
    wait_for_inputs();
    for (; some; some = walk.next(&it), query.advance()) {
        softmax_state state;
        barrier_wait(&s.query_full, query.phase);
        for (int i = 0; i < it.pages; i++) {
            const int left = it.tokens(i);
            barrier_wait(s.full + at.slot, at.phase);
            const token_scales scales(s.page[at.slot], left);
            score_page(s.page[at.slot], s.query, a.scale * LOG2_E, scales, scores);
            if (i + 1 == it.pages && (ALL_SPEAK || lane_id() == 0))
                barrier_arrive(&s.query_empty);
            if (left < TOKENS) cut_scores(scores, left);
            tell_page(scores, scales, s.tops[told.slot], s.largest[told.slot]);
            sync_scores();
            const float keep = softmax_page(scores, s.tops[told.slot], state, probabilities);
            weigh_groups(scales, s.largest[told.slot], state, factors);
            barrier_wait(s.taken + to.slot, to.phase ^ 1);
            store_weights(probabilities, factors, keep, state, s.weights[to.slot]);
            fence_async_proxy();
            __syncwarp();
            if (ALL_SPEAK || lane_id() == 0) barrier_arrive(s.ready + to.slot);
            at.advance(), to.advance(), told.advance();
        }
        store_sums(a, it, h0, state, s.sums);
    }
}

/* ---- the context, by a warpgroup ------------------------------------------------------- */

constexpr int TILES = RANK / CHUNK / WARPS; /* of a warp: 16 channels each, 64 of the four */
typedef float context_sums[TILES][HEADS / 2];

__device__ int group_of_tile(int m)
{
    return m * WARPS * CHUNK / KL_LATENTS_GROUP;
}

/* Of 16 tokens the codes of the warp's channels. */
struct raw_channels {
    uint32_t codes[TILES / 2][4];

    __device__ __forceinline__ void load(const uint8_t *page, int step)
    {
        const int lane = lane_id(), place = lane % 16;
        const uint8_t *row = page + (step * 16 + token_of(place / 2, place % 2)) * ROW_BYTES +
                             (lane / 16 * WARPS + warp_of_group()) * CHUNK;
#pragma unroll
        for (int j = 0; j < TILES / 2; j++)
            ldmatrix_transposed(codes[j], row + 2 * j * WARPS * CHUNK);
    }

    /* As operand A: rows r and r + 8 of tile j are channels 2 r and 2 r + 1 of the warp's chunk
     * j. */
    __device__ __forceinline__ void unpack(uint32_t (&to)[TILES][4]) const
    {
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            const uint32_t *x = codes[j / 2] + j % 2 * 2;
            const uint32_t first = sorted_codes(x[0]), second = sorted_codes(x[1]);
            pairs_of_fp8(first, to[j][0], to[j][1]);
            pairs_of_fp8(second, to[j][2], to[j][3]);
        }
    }
};

__device__ void sync_contexts()
{
    barrier_of_threads<2, WARPGROUP>();
}

/* What lies past a sequence's length may be a NaN, which a probability of zero would not stop. */
__device__ void clear_rows(uint8_t *page, int left)
{
    constexpr int PIECES = RANK / 16;
    for (int i = threadIdx.x % WARPGROUP; i < (TOKENS - left) * PIECES; i += WARPGROUP)
        *reinterpret_cast<uint4 *>(page + (left + i / PIECES) * ROW_BYTES +
                                   i % PIECES * 16) = {0, 0, 0, 0};
    fence_async_proxy(); /* before the copy engine writes there again */
    sync_contexts();
}

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

/* The sums so far in the units of the page, which are rarely others than before. */
__device__ __forceinline__ void change_units(const float *to, float (&units)[GROUPS],
                                             context_sums &acc)
{
    const float4 x = *reinterpret_cast<const float4 *>(to);
    if (x.x == units[0] && x.y == units[1] && x.z == units[2] && x.w == units[3]) return;
    const float now[GROUPS] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        const int g = group_of_tile(m);
        const float factor = units[g] * inverse_of(__float_as_uint(now[g]));
#pragma unroll
        for (int i = 0; i < HEADS / 2; i++) acc[m][i] *= factor;
    }
#pragma unroll
    for (int g = 0; g < GROUPS; g++) units[g] = now[g];
}

/* context = keep context + c^T weights; the first tokens are there before the weights are. */
__device__ __forceinline__ void add_page(const uint8_t *page, const page_weights &weights,
                                         barrier *ready, uint32_t phase, float (&units)[GROUPS],
                                         context_sums &acc)
{
    uint32_t channels[2][TILES][4];
    raw_channels raw;
    raw.load(page, 0);
    raw.unpack(channels[0]);
    raw.load(page, 1);
    barrier_wait(ready, phase);
    change_units(weights.units, units, acc);
    keep_context(weights.keep, acc);
    const uint64_t b = wgmma_descriptor(weights.x);
#pragma unroll
    for (int step = 0; step < TOKENS / 16; step++) {
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < TILES; m++)
            wgmma_half<HEADS>(acc[m], channels[step % 2][m],
                              wgmma_moved(b, group_of_tile(m) * WEIGHT_BYTES + step * 32));
        wgmma_commit();
        if (step + 1 == TOKENS / 16) break;
        wgmma_wait<1>(); /* the step before has read what the next one takes */
        raw.unpack(channels[(step + 1) % 2]);
        if (step + 2 < TOKENS / 16) raw.load(page, step + 2);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < TILES; m++) wgmma_settle(acc[m]);
}

/* acc[m][4 j + i]: channel 16 (4 m + warp) + 2 (lane / 4) + i / 2 of head 8 j + 2 (lane % 4) +
 * i % 2. */
__device__ void store_context(const mla_arguments &a, long long slot, long long h0,
                              const float (&units)[GROUPS], const context_sums &acc)
{
    const int channel = warp_of_group() * CHUNK + lane_id() / 4 * 2;
#pragma unroll
    for (int j = 0; j < HEADS / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const long long h = h0 + 8 * j + lane_id() % 4 * 2 + i;
            if (h >= a.H) continue;
            float *to = a.context + (slot * a.H + h) * RANK + channel;
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                const float unit = units[group_of_tile(m)] * PART;
                *reinterpret_cast<float2 *>(to + m * WARPS * CHUNK) = {
                    acc[m][4 * j + i] * unit, acc[m][4 * j + 2 + i] * unit};
            }
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
        float units[GROUPS] = {1, 1, 1, 1};
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < HEADS / 2; i++) acc[m][i] = 0;
        for (int i = 0; i < it.pages; i++) {
            uint8_t *page = s.page[at.slot];
            barrier_wait(s.full + at.slot, at.phase);
            if (it.tokens(i) < TOKENS) {
                barrier_wait(s.ready + from.slot, from.phase); /* its scores are there */
                clear_rows(page, it.tokens(i));
            }
            add_page(page, s.weights[from.slot], s.ready + from.slot, from.phase, units, acc);
            if (ALL_SPEAK || lane_id() == 0)
                barrier_arrive(s.empty + at.slot), barrier_arrive(s.taken + from.slot);
            at.advance(), from.advance();
        }
        store_context(a, it.slot, h0, units, acc);
    }
}

/* ---- the kernel ------------------------------------------------------------------------ */

__device__ void make_barriers(shared_memory &s)
{
    constexpr int ALL = WARPS * WARP_ARRIVALS;
    for (int i = 0; i < STAGES; i++)
        barrier_init(s.full + i, WARP_ARRIVALS), barrier_init(s.empty + i, ALL);
    for (int i = 0; i < WEIGHT_SLOTS; i++)
        barrier_init(s.ready + i, ALL), barrier_init(s.taken + i, ALL);
    barrier_init(&s.query_full, WARP_ARRIVALS), barrier_init(&s.query_empty, ALL);
    barrier_init_done();
}

__global__ __launch_bounds__(THREADS,
                             1) void mla_attend_fp8(__grid_constant__ const mla_arguments a)
{
    if constexpr (!SM_90A) return stop_here();
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
