/*
 * mla_decode_page.cu -- mla_decode's attention for a single token whose inputs are arriving
 * (device/arriving.cuh), a page a block.
 *
 * Computes     the token's latents into their page; max, sum and context of the scores of 8 heads
 *              over each page; see mla_arguments
 * Shapes       query [H, 576]; raw [576]; pages [P, 64, 576] bf16; max, sum [H, 64]; context
 *              [pages, H, 512]
 * Layout       dense, pages at multiples of 16 bytes
 * Precision    that of mla_decode_tensor.cu, with its bits
 * Grid         a block of a warpgroup for each page and 8 heads, of the first page first: the page
 *              is in shared memory before the query is there, of which a block needs 18 KB instead
 *              of 74. The first warp looks for the query and has the softmax, the second one makes
 *              the token's own row
 * Order        that of mla_decode_tensor.cu
 * Roofline     1152 bytes a token: 0.4 us for 1K tokens at 3.0 TB/s
 * Measured     H200, in a step (bf16, context 1024), from the end of mla_absorb_arriving, which is
 *              3.3 us earlier than that of the kernel without words: 7.9 us (2026-11-23)
 */
#include "../device/arriving.cuh"
#include "../device/latents.cuh"
#include "mla_decode_tensor.cuh"

namespace {

constexpr int HEADS = 8; /* of a block: the rows of a warp's operand A */
constexpr int WARPS = WARPGROUP / WARP;
constexpr int ROW_PIECES = WIDTH / 8; /* of 16 bytes */

/* Each array of the first two begins at a multiple of 1024 bytes, for the swizzle. */
struct shared_memory {
    uint8_t page[PAGE_BYTES];
    uint8_t weights[HEADS * ROW_BYTES]; /* a head's 64 tokens a row */
    uint4 raw[ROW_PIECES], row[ROW_PIECES];
    float norm[RANK];
    float keep[HEADS]; /* of sums before, of which there are none */
    barrier full;
};
constexpr int SHARED_BYTES = sizeof(shared_memory) + 1024;
static_assert(PAGE_BYTES % 1024 == 0);

/* By a warp. */
__device__ void bring_page(const box_map &map, int id, shared_memory &s)
{
    if (ALL_SPEAK || lane_id() == 0) copies_begin(&s.full, PAGE_BYTES);
    __syncwarp();
    if (lane_id() < BOXES)
        copy_box(s.page + lane_id() * BOX_BYTES, &map, lane_id() * 64, id * TOKENS, &s.full);
    if (ALL_SPEAK || lane_id() == 0) copies_end(&s.full);
}

__device__ uint4 *piece_of(shared_memory &s, int row, int piece)
{
    return reinterpret_cast<uint4 *>(s.page + piece / 8 * BOX_BYTES +
                                     swizzled<ROW_BYTES>(row, piece % 8));
}

/* The token's own row, the last one of the last page: over what has been brought, and to memory. By
 * a warp. */
__device__ void append_row(const new_latents &latents, long long page, long long length,
                           shared_memory &s)
{
    constexpr int EACH = (ROW_PIECES + WARP - 1) / WARP;
    const int lane = lane_id();
    const long long row = (length - 1) % TOKENS;
    new_latents own = latents;
    uint4 raw[EACH];
    float norm[RANK / WARP]; /* on its way before raw is there */
#pragma unroll
    for (int i = 0; i < RANK / WARP; i++)
        norm[i] = __ldcg(latents.norm_weight + i * WARP + lane);
    await_all<bf16_pairs>(static_cast<const uint4 *>(latents.raw) + lane, WARP,
                          (ROW_PIECES - lane + WARP - 1) / WARP, raw);
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (i * WARP + lane < ROW_PIECES) s.raw[i * WARP + lane] = raw[i];
#pragma unroll
    for (int i = 0; i < RANK / WARP; i++) s.norm[i * WARP + lane] = norm[i];
    own.norm_weight = s.norm;
    __syncwarp();
    write_latents_by<8>(own, reinterpret_cast<const bf16 *>(s.raw),
                        reinterpret_cast<bf16 *>(s.row));
    __syncwarp();
    barrier_wait(&s.full, 0);
    for (int i = lane; i < ROW_PIECES; i += WARP) {
        *piece_of(s, static_cast<int>(row), i) = s.row[i];
        if (blockIdx.x == 0)
            static_cast<uint4 *>(latents.pages)[(page * TOKENS + row) * ROW_PIECES + i] =
                s.row[i];
    }
}

/* What lies past a sequence's length may be NaN, which a probability of zero would not stop. By the
 * other two warps. */
__device__ void clear_rows(int left, shared_memory &s)
{
    constexpr int PIECES = RANK / 8;
    barrier_wait(&s.full, 0);
    for (int i = threadIdx.x - WARPGROUP / 2; i < (TOKENS - left) * PIECES; i += WARPGROUP / 2)
        *piece_of(s, left + i / PIECES, i % PIECES) = {};
}

/* Operand A of the block's heads, by a warp; past the last head this one's again. Before it can be
 * there, q is: until then words of that are looked at, for all of the query again and again would
 * keep the L2 from others. */
__device__ void receive_query(const mla_arguments &a, long long h0, uint32_t (&q)[STEPS][4])
{
    const long long own = h0 + lane_id() / 4, h = own < a.H ? own : a.H - 1;
    const long long width = a.nope + a.rope;
    const int quarter = lane_id() % 4, lane = static_cast<int>(h - h0) * 4 + quarter;
    const uint4 *from =
        reinterpret_cast<const uint4 *>(a.query) + h0 / 8 * (STEPS * WARP) + lane;
    uint4 x[STEPS];
    await(static_cast<const bf16 *>(a.q) + h * width + quarter * (width / 4));
    __syncwarp();
    await_all<bf16_pairs>(from, WARP, STEPS, x);
#pragma unroll
    for (int i = 0; i < STEPS; i++)
        q[i][0] = x[i].x, q[i][1] = x[i].y, q[i][2] = x[i].z, q[i][3] = x[i].w;
}

/* By a warp, whose lanes have two scores of 8 tokens' each. The fence would wait for the stores. */
__device__ void make_weights(const mla_arguments &a, long long h0, int left,
                             float (&scores)[TOKENS / 2], shared_memory &s)
{
    softmax_state state = {-INFINITY, 0};
    softmax_page(scores, left, state, s.weights, s.keep);
    fence_async_proxy();
    const long long h = h0 + head_of_thread(), at = h * MLA_PAGES + blockIdx.y;
    const float sum = warp_sum<4>(state.sum);
    if (lane_id() % 4 == 0 && h < a.H)
        store_arriving(a.max + at, state.max), store_arriving(a.sum + at, sum);
}

typedef float context_sums[CONTEXT_BOXES][HEADS / 2];

/* acc[m][i]: channel 64 m + 16 warp + lane / 4 + 8 (i / 2) of head 2 (lane % 4) + i % 2. */
__device__ void store_context(const mla_arguments &a, long long h0, const context_sums &acc)
{
    const int channel = warp_id() * 16 + lane_id() / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const long long h = h0 + lane_id() % 4 * 2 + i;
        if (h >= a.H) continue;
        float *to = a.context + (blockIdx.y * a.H + h) * RANK + channel;
#pragma unroll
        for (int m = 0; m < CONTEXT_BOXES; m++) {
            store_arriving(to + m * 64, acc[m][i]);
            store_arriving(to + m * 64 + 8, acc[m][2 + i]);
        }
    }
}

/* The page as the products read it: all rows of tokens, of which one may be this one's, and zeros.
 * Not by the first warp, which looks for the query meanwhile. */
__device__ void prepare_page(const new_latents &latents, const box_map &map, int id,
                             long long length, int left, shared_memory &s)
{
    if (warp_id() == WARPS - 1) bring_page(map, id, s);
    if (warp_id() == 1 && (blockIdx.y + 1) * TOKENS >= length)
        append_row(latents, id, length, s);
    if (warp_id() >= WARPS / 2 && left < TOKENS) clear_rows(left, s);
}

/* Two fit a multiprocessor. A block without a page ends at once, but for the first: one that waits
 * is enough for the end of all to mean what it has to. */
__global__ __launch_bounds__(WARPGROUP, 2) void mla_attend_page(
    __grid_constant__ const mla_arguments a, __grid_constant__ const new_latents latents,
    __grid_constant__ const box_map map)
{
    if constexpr (!SM_90A) return stop_here();
    extern __shared__ char memory[];
    /* An offset, for the compiler to know that what follows is shared memory. */
    shared_memory &s =
        *reinterpret_cast<shared_memory *>(memory + (0 - shared_address(memory)) % 1024);
    const long long h0 = static_cast<long long>(blockIdx.x) * HEADS;
    let_next_start();
    if (threadIdx.x == 0) prefetch_map(&map);
    /* Both at once: the block may have found room late. */
    const int id = load_here(a.block_table + blockIdx.y);
    const long long length = load_here(a.lengths), left = length - blockIdx.y * TOKENS;
    if (left <= 0) {
        if (blockIdx.y == 0) wait_for_inputs();
        return;
    }
    const int tokens = static_cast<int>(left < TOKENS ? left : TOKENS);
    if (threadIdx.x == 0) {
        barrier_init(&s.full, WARP_ARRIVALS);
        barrier_init_done();
    }
    __syncthreads();
    uint32_t q[STEPS][4] = {};
    float scores[TOKENS / 2];
    context_sums acc = {};
    prepare_page(latents, map, id, length, tokens, s);
    if (warp_id() == 0) receive_query(a, h0, q);
    barrier_wait(&s.full, 0);
    fence_async_proxy();
    __syncthreads();
    score_page(s.page, q, scores);
    if (warp_id() == 0) make_weights(a, h0, tokens, scores, s);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < CONTEXT_BOXES; m++) wgmma_settle(acc[m]);
    add_context<HEADS>(s.page, s.weights, acc);
    store_context(a, h0, acc);
    wait_for_inputs();
}

} // namespace

bool kl_cuda_mla_attend_page_fits(const mla_arguments &a, const kl_mla *call)
{
    const kl_mla_append append = kl_mla_append_of(call);
    if (kl_tensor_absent(&call->raw) || !kl_cuda_mla_tensor_fits(a)) return false;
    return new_latents_of(&append).vectors && !kl_tensor_absent(&call->norm_weight);
}

kl_status kl_cuda_mla_attend_page(const mla_arguments &a, const kl_mla *call,
                                  cudaStream_t stream, kl_error *err)
{
    const kl_mla_append append = kl_mla_append_of(call);
    const dim3 grid(static_cast<unsigned>(mla_divide_up(a.H, HEADS)),
                    static_cast<unsigned>(a.B));
    box_map map;
    KL_TRY(map_pages(a, &map, err));
    KL_TRY(kl_cuda_allow_shared(mla_attend_page, SHARED_BYTES, err));
    return kl_cuda_launch(mla_attend_page, grid, WARPGROUP, SHARED_BYTES, stream, err, a,
                          new_latents_of(&append), map);
}
