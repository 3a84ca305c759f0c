/*
 * mla_decode_tensor.cu -- mla_decode's attention of the pieces on tensor cores.
 *
 * Computes     max, sum and context of the scores of 32 heads over each piece's pages; see
 *              mla_arguments
 * Shapes       query [N, H, 576]; pages [P, 64, 576] bf16; context [slots, H, 512]
 * Layout       dense, pages at multiples of 16 bytes
 * Precision    the query as a sum of two bf16 (16 bits), probabilities in bf16 (and their sum
 *              of the rounded ones), f32 scores, sums and results
 * Grid         a block a multiprocessor, in three warpgroups. The first brings pages, as nine
 *              boxes of 64 tokens by 64 channels, through a ring of three. The second keeps the
 *              query in registers as operand A: of a warp's 16 rows eight are heads and eight what
 *              those lack, so that a thread adds the halves itself, and the softmax stays in
 *              registers. The third keeps the context, transposed: [512 channels, 32 heads]. So
 *              a page's scores are made while the one before it is added
 * Order        pages of a piece in turn, within a page the channels, or the tokens, in order
 * Roofline     1152 bytes a token at 2 * 32 * (2 * 576 + 512) flops, 92 flop/byte: memory-bound,
 *              50 us for 128K tokens at 3.0 TB/s
 * Measured     H200, traced: 1K tokens 8.4 us, 8K 11, 128K 50, 1M 303 (4.0 TB/s), 32 rows of 8K 92;
 *              errors 1.7e-3 to 2.0e-3 of the result (2026-11-22)
 */
#include "mla_decode_tensor.cuh"

namespace {

constexpr int HEADS = MLA_TENSOR_HEADS; /* of a block */
constexpr int THREADS = 3 * WARPGROUP;
/* Of a thread: a block begins with 168 each, and no more can be handed over: 3 * 168 = 504. The
 * query takes 144 and its scores 32; the context 128. */
constexpr int BRING_REGISTERS = 40, SCORE_REGISTERS = 240, CONTEXT_REGISTERS = 224;

constexpr int STAGES = MLA_TENSOR_STAGES; /* pages on their way or in use */
constexpr int WEIGHT_SLOTS = 2;           /* pages whose probabilities are there at a time */

/* Each array of the first two begins at a multiple of 1024 bytes, for the swizzle. */
struct shared_memory {
    uint8_t page[STAGES][PAGE_BYTES];
    uint8_t weights[WEIGHT_SLOTS][HEADS * ROW_BYTES]; /* a head's 64 tokens a row */
    float keep[WEIGHT_SLOTS][HEADS];                  /* factors of the sums before */
    barrier full[STAGES], empty[STAGES], ready[WEIGHT_SLOTS], taken[WEIGHT_SLOTS];
};
constexpr int SHARED_BYTES = sizeof(shared_memory) + 1024;
static_assert(SHARED_BYTES <= 227 * 1024 && PAGE_BYTES % 1024 == 0);

/* ---- bringing pages, by one warp ------------------------------------------------------- */

__device__ void bring_page(const box_map &map, int id, shared_memory &s,
                           const mla_place<STAGES> &at)
{
    barrier_wait(s.empty + at.slot, at.phase ^ 1);
    if (ALL_SPEAK || lane_id() == 0) copies_begin(s.full + at.slot, PAGE_BYTES);
    __syncwarp();
    if (lane_id() < BOXES)
        copy_box(s.page[at.slot] + lane_id() * BOX_BYTES, &map, lane_id() * 64, id * TOKENS,
                 s.full + at.slot);
    if (ALL_SPEAK || lane_id() == 0) copies_end(s.full + at.slot);
}

/* The first pages before the kernel's inputs are there. */
__device__ void bring_pages(const mla_arguments &a, const box_map &map, shared_memory &s)
{
    mla_place<STAGES> at;
    mla_walk walk(a, blockIdx.x);
    bool waits = true;
    for (mla_piece it; walk.next(&it);) {
        mla_page_numbers numbers(a, it);
        for (int i = 0; i < it.pages; i++) {
            if (waits && i == it.early(STAGES)) wait_for_inputs(), waits = false;
            bring_page(map, numbers.at(i), s, at);
            at.advance();
        }
        if (waits) wait_for_inputs(), waits = false;
    }
    if (lane_id() == 0) mla_ask_for_weights(a);
    if (waits) wait_for_inputs();
}

/* ---- scores and softmax, by a warpgroup ------------------------------------------------ */

/* Operand A, which mla_query_place() has in this order. */
__device__ void load_query(const mla_arguments &a, long long n, long long h0,
                           uint32_t (&q)[STEPS][4])
{
    const long long h = h0 + head_of_thread();
    const uint4 *from = reinterpret_cast<const uint4 *>(a.query) +
                        (n * mla_padded_heads(a.H) + h0) * (WIDTH / 4) +
                        warp_of_group() * STEPS * WARP + lane_id();
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        uint4 x = {0, 0, 0, 0};
        if (h < a.H) x = from[step * WARP];
        q[step][0] = x.x, q[step][1] = x.y, q[step][2] = x.z, q[step][3] = x.w;
    }
}

__device__ void make_weights(const mla_arguments &a, long long h0, shared_memory &s)
{
    mla_place<STAGES> at;
    mla_place<WEIGHT_SLOTS> to;
    uint32_t q[STEPS][4];
    float scores[TOKENS / 2];
    mla_walk walk(a, blockIdx.x);
    mla_piece it;
    bool some = walk.next(&it);
    wait_for_inputs();
    for (; some; some = walk.next(&it)) {
        softmax_state state = {-INFINITY, 0};
        load_query(a, it.n, h0, q);
        for (int i = 0; i < it.pages; i++) {
            barrier_wait(s.full + at.slot, at.phase);
            score_page(s.page[at.slot], q, scores);
            barrier_wait(s.taken + to.slot, to.phase ^ 1);
            softmax_page(scores, it.tokens(i), state, s.weights[to.slot], s.keep[to.slot]);
            fence_async_proxy();
            __syncwarp();
            if (ALL_SPEAK || lane_id() == 0) barrier_arrive(s.ready + to.slot);
            at.advance(), to.advance();
        }
        const long long h = h0 + head_of_thread();
        const float sum = warp_sum<4>(state.sum);
        if (lane_id() % 4 == 0 && h < a.H)
            a.max[it.slot * a.H + h] = state.max, a.sum[it.slot * a.H + h] = sum;
    }
}

/* ---- the context, by a warpgroup ------------------------------------------------------- */

typedef float context_sums[CONTEXT_BOXES][HEADS / 2];

/* What lies past a sequence's length may be NaN, which a probability of zero would not stop. */
__device__ void clear_rows(uint8_t *page, int left)
{
    constexpr int PIECES = ROW_BYTES / 16 * CONTEXT_BOXES;
    for (int i = threadIdx.x % WARPGROUP; i < (TOKENS - left) * PIECES; i += WARPGROUP) {
        const int row = left + i / PIECES, piece = i % PIECES;
        uint8_t *at = page + piece / 8 * BOX_BYTES + row * ROW_BYTES + piece % 8 * 16;
        *reinterpret_cast<uint4 *>(at) = {0, 0, 0, 0};
    }
    fence_async_proxy();
    barrier_of_threads<1, WARPGROUP>();
}

/* context = keep context + c^T weights. */
__device__ __forceinline__ void add_page(const uint8_t *page, const uint8_t *weights,
                                         const float *keeps, context_sums &acc)
{
    const int c = lane_id() % 4;
#pragma unroll
    for (int j = 0; j < HEADS / 8; j++) {
        const float2 keep = *reinterpret_cast<const float2 *>(keeps + 8 * j + 2 * c);
#pragma unroll
        for (int m = 0; m < CONTEXT_BOXES; m++) {
            acc[m][4 * j] *= keep.x, acc[m][4 * j + 1] *= keep.y;
            acc[m][4 * j + 2] *= keep.x, acc[m][4 * j + 3] *= keep.y;
        }
    }
    add_context<HEADS>(page, weights, acc);
}

/* acc[m][4 j + i]: channel 64 m + 16 warp + lane / 4 + 8 (i / 2) of head 8 j + 2 (lane % 4) +
 * i % 2. */
__device__ void store_context(const mla_arguments &a, long long slot, long long h0,
                              const context_sums &acc)
{
    const int channel = warp_of_group() * 16 + lane_id() / 4;
#pragma unroll
    for (int j = 0; j < HEADS / 8; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const long long h = h0 + 8 * j + lane_id() % 4 * 2 + i;
            if (h >= a.H) continue;
            float *to = a.context + (slot * a.H + h) * RANK + channel;
#pragma unroll
            for (int m = 0; m < CONTEXT_BOXES; m++)
                to[m * 64] = acc[m][4 * j + i], to[m * 64 + 8] = acc[m][4 * j + 2 + i];
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
        for (int m = 0; m < CONTEXT_BOXES; m++)
#pragma unroll
            for (int i = 0; i < HEADS / 2; i++) acc[m][i] = 0;
        for (int i = 0; i < it.pages; i++) {
            barrier_wait(s.ready + from.slot, from.phase);
            barrier_wait(s.full + at.slot, at.phase);
            if (it.tokens(i) < TOKENS) clear_rows(s.page[at.slot], it.tokens(i));
            add_page(s.page[at.slot], s.weights[from.slot], s.keep[from.slot], acc);
            if (ALL_SPEAK || lane_id() == 0)
                barrier_arrive(s.empty + at.slot), barrier_arrive(s.taken + from.slot);
            at.advance(), from.advance();
        }
        store_context(a, it.slot, h0, acc);
    }
}

/* ---- the kernel ------------------------------------------------------------------------ */

__device__ void make_barriers(shared_memory &s)
{
    constexpr int ALL = WARPGROUP / WARP * WARP_ARRIVALS;
    for (int i = 0; i < STAGES; i++)
        barrier_init(s.full + i, WARP_ARRIVALS), barrier_init(s.empty + i, ALL);
    for (int i = 0; i < WEIGHT_SLOTS; i++)
        barrier_init(s.ready + i, ALL), barrier_init(s.taken + i, ALL);
    barrier_init_done();
}

__global__ __launch_bounds__(THREADS,
                             1) void mla_attend_tensor(__grid_constant__ const mla_arguments a,
                                                       __grid_constant__ const box_map map)
{
    if constexpr (!SM_90A) return stop_here();
    extern __shared__ char memory[];
    shared_memory &s = *reinterpret_cast<shared_memory *>(
        (reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 * 1024);
    const long long h0 = static_cast<long long>(blockIdx.y) * HEADS;
    let_next_start();
    if (threadIdx.x == 0) make_barriers(s), prefetch_map(&map);
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        registers_down_to<BRING_REGISTERS>();
        if (warp_id() == 0)
            bring_pages(a, map, s);
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

bool kl_cuda_mla_tensor_fits(const mla_arguments &a)
{
    return a.act == KL_BF16 && a.rank == RANK && a.rope == ROPE && a.H <= 65535 * HEADS &&
           a.P <= INT_MAX / TOKENS && is_aligned(a.pages, 0, sizeof(bf16), 16);
}

kl_status kl_cuda_mla_attend_tensor(const mla_arguments &a, int blocks, cudaStream_t stream,
                                    kl_error *err)
{
    const long long items = a.shares > 0 ? a.shares : a.N * a.splits;
    const dim3 grid(static_cast<unsigned>(items < blocks ? items : blocks),
                    static_cast<unsigned>(mla_divide_up(a.H, HEADS)));
    box_map map;
    KL_TRY(map_pages(a, &map, err));
    KL_CUDA_TRY(cudaFuncSetAttribute(mla_attend_tensor,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES),
                err);
    return kl_cuda_launch(mla_attend_tensor, grid, THREADS, SHARED_BYTES, stream, err, a, map);
}
