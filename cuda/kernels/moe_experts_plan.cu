/*
 * moe_experts_plan.cu -- which rows an expert's products have: pairs sorted by expert, and tiles.
 *
 * Computes     places[p], where pair p = (token, choice) goes in a stable sort by expert;
 *              tokens[places[p]]; the tiles of each expert's rows and of the shared one's
 * Shapes       ids, tokens, places [pairs]; tiles [those of the shared expert + routed_tiles]
 * Layout       dense; an expert's rows lie together
 * Precision    integers
 * Grid         a counting sort: a warp counts a segment of the pairs and later places it. Up to
 *              4096 pairs one block does all; more go to a block each 4096, after a kernel that
 *              only counts them
 * Roofline     16 bytes a pair, 1 MB for 8192 tokens with 8 choices: a launch or two
 * Measured     H100, 65536 pairs by one block: 0.115 ms, by many in an earlier form 12 us
 *              (2026-11-22); this form not timed alone
 */
#include "../device/launch.cuh"
#include "../device/moe.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int MAX_WARPS = 32, MIN_WARPS = 8;
constexpr int64_t BLOCK_PAIRS = 4096;
/* Of a block on capability 9.0, less what the sums of warps take. */
constexpr int64_t MOST_SHARED = 227 * 1024 - 1024;

struct plan_arguments {
    moe_plan p;
    int block_pairs;
    int counters; /* warps of a block that count and place */
    int bits;     /* of an expert's number                 */
};

/* In shared memory, arrays of E. */
struct plan_scratch {
    int *counts; /* [counters][E] pairs of a warp's segment, then where its next pair goes */
    int *totals, *starts, *tile_starts;
    int *before; /* pairs of the blocks before this one */
};

__device__ plan_scratch scratch_of(const plan_arguments &a)
{
    extern __shared__ int arrays[];
    int *const after = arrays + a.counters * a.p.E;
    return {arrays, after, after + a.p.E, after + 2 * a.p.E, after + 3 * a.p.E};
}

/* The lanes with this lane's expert, by a ballot for each bit: eight for 256 experts, where
 * match.any takes its time for each value in the warp, an order of magnitude more. */
__device__ unsigned lanes_with(int e, int bits)
{
    unsigned peers = __ballot_sync(ALL_LANES, e >= 0);
    if (e < 0) peers = ~peers;
    for (int b = 0; b < bits; b++) {
        const bool set = e >> b & 1;
        const unsigned with = __ballot_sync(ALL_LANES, set);
        peers &= set ? with : ~with;
    }
    return peers;
}

/* Call f(pair, expert, peers) for 32 pairs of this warp's segment at a time, in order; peers
 * are the lanes with the same expert. Expert -1 past the end. */
template <class F> __device__ void for_segment(const plan_arguments &a, F f)
{
    const int rounds = ((a.block_pairs + WARP - 1) / WARP + a.counters - 1) / a.counters;
    const int first = warp_id() * rounds * WARP + lane_id(); /* of the block's */
    const int base = static_cast<int>(blockIdx.x) * a.block_pairs;
    const int own = min(a.block_pairs, a.p.pairs - base);
    const auto load = [&](int i) { return i < own ? a.p.ids[base + i] : -1; };
    int next = load(first);
    for (int r = 0; r < rounds; r++) {
        const int i = first + r * WARP, e = next;
        if (r + 1 < rounds) next = load(i + WARP); /* on its way while f works */
        f(base + i, e, lanes_with(e, a.bits));
        __syncwarp();
    }
}

__device__ bool leads(unsigned peers)
{
    return __ffs(static_cast<int>(peers)) - 1 == lane_id();
}

/* The block's pairs of each expert, by warps; then totals. */
__device__ void count_pairs(const plan_arguments &a, const plan_scratch &s)
{
    int *const mine = s.counts + warp_id() * a.p.E;
    for (int i = threadIdx.x; i < a.counters * a.p.E; i += blockDim.x) s.counts[i] = 0;
    __syncthreads();
    if (warp_id() < a.counters)
        for_segment(a, [&](int, int e, unsigned peers) {
            if (e >= 0 && leads(peers)) mine[e] += __popc(peers);
        });
    __syncthreads();
    for (int e = threadIdx.x; e < a.p.E; e += blockDim.x) {
        int total = 0;
        for (int w = 0; w < a.counters; w++) total += s.counts[w * a.p.E + e];
        s.totals[e] = total, s.before[e] = 0;
    }
    __syncthreads();
}

/* From the block's totals to those of all blocks, which moe_count_kernel has left in counts. */
__device__ void add_blocks(const plan_arguments &a, const plan_scratch &s)
{
    for (int e = threadIdx.x; e < a.p.E; e += blockDim.x) {
        int total = 0, before = 0;
        for (unsigned b = 0; b < gridDim.x; b++) {
            if (b == blockIdx.x) before = total;
            total += a.p.counts[b * a.p.E + e];
        }
        s.totals[e] = total, s.before[e] = before;
    }
    __syncthreads();
}

/* Of experts, or of all before one. */
struct pairs_and_tiles {
    int pairs, tiles;

    __device__ void add(const pairs_and_tiles &x) { pairs += x.pairs, tiles += x.tiles; }
};

/* Sums over this warp's experts up to this lane's. */
__device__ pairs_and_tiles scan_warp(pairs_and_tiles x)
{
    for (int d = 1; d < WARP; d *= 2) {
        const pairs_and_tiles below = {__shfl_up_sync(ALL_LANES, x.pairs, d),
                                       __shfl_up_sync(ALL_LANES, x.tiles, d)};
        if (lane_id() >= d) x.add(below);
    }
    return x;
}

/* All threads: the first pair and the first tile of every expert; returns the number of tiles. */
__device__ int scan_experts(const moe_plan &p, const plan_scratch &s)
{
    __shared__ pairs_and_tiles warps[MAX_WARPS];
    pairs_and_tiles before = {0, 0};
    for (int base = 0; base < p.E; base += blockDim.x) {
        const int e = base + threadIdx.x, total = e < p.E ? s.totals[e] : 0;
        const int tiles = (total + p.tile - 1) / p.tile;
        const pairs_and_tiles upto = scan_warp({total, tiles});
        if (lane_id() == WARP - 1) warps[warp_id()] = upto;
        __syncthreads();
        pairs_and_tiles start = before;
        for (int w = 0; w < static_cast<int>(blockDim.x) / WARP; w++) {
            if (w < warp_id()) start.add(warps[w]);
            before.add(warps[w]);
        }
        if (e < p.E) {
            s.starts[e] = start.pairs + upto.pairs - total;
            s.tile_starts[e] = start.tiles + upto.tiles - tiles;
        }
        __syncthreads();
    }
    return before.tiles;
}

/* Rows of each of as few tiles as can be, all of about one size. */
__device__ int even_tile(int rows, int tile)
{
    const int tiles = max((rows + tile - 1) / tile, 1);
    return (rows + tiles - 1) / tiles;
}

__device__ void write_tiles(const moe_plan &p, const plan_scratch &s, int used)
{
    moe_tile *const routed = p.tiles + p.shared_tiles;
    for (int e = threadIdx.x; e < p.E; e += blockDim.x) {
        const int total = s.totals[e], size = even_tile(total, p.tile);
        for (int done = 0, i = s.tile_starts[e]; done < total; done += size, i++)
            routed[i] = {e, s.starts[e] + done, min(size, total - done)};
    }
    for (int i = used + threadIdx.x; i < p.routed_tiles; i += blockDim.x) routed[i] = {0, 0, 0};
    if (threadIdx.x == 0) *p.surplus = p.routed_tiles - used;
    const int size = even_tile(p.shared_rows, p.tile);
    for (int i = threadIdx.x; i < p.shared_tiles; i += blockDim.x)
        p.tiles[i] = {MOE_SHARED, i * size, min(size, p.shared_rows - i * size)};
}

/* The block's pairs to their places, warp after warp of it behind the blocks before. */
__device__ void place_pairs(const plan_arguments &a, const plan_scratch &s)
{
    for (int e = threadIdx.x; e < a.p.E; e += blockDim.x)
        for (int w = 0, next = s.starts[e] + s.before[e]; w < a.counters; w++) {
            const int n = s.counts[w * a.p.E + e];
            s.counts[w * a.p.E + e] = next;
            next += n;
        }
    __syncthreads();
    int *const mine = s.counts + warp_id() * a.p.E;
    if (warp_id() >= a.counters) return;
    for_segment(a, [&](int pair, int e, unsigned peers) {
        const int place = e < 0 ? 0 : mine[e] + __popc(peers & ((1u << lane_id()) - 1));
        __syncwarp();
        if (e < 0) return;
        if (leads(peers)) mine[e] += __popc(peers);
        a.p.tokens[place] = pair / a.p.top_k;
        a.p.places[pair] = place;
    });
}

__global__ __launch_bounds__(MAX_WARPS *WARP) void moe_count_kernel(
    __grid_constant__ const plan_arguments a)
{
    const plan_scratch s = scratch_of(a);
    let_next_start();
    wait_for_inputs();
    count_pairs(a, s);
    for (int e = threadIdx.x; e < a.p.E; e += blockDim.x)
        a.p.counts[blockIdx.x * a.p.E + e] = s.totals[e];
}

__global__ __launch_bounds__(MAX_WARPS *WARP) void moe_plan_kernel(
    __grid_constant__ const plan_arguments a)
{
    const plan_scratch s = scratch_of(a);
    let_next_start();
    wait_for_inputs();
    count_pairs(a, s);
    if (gridDim.x > 1) add_blocks(a, s);
    const int tiles = scan_experts(a.p, s);
    if (blockIdx.x == 0) write_tiles(a.p, s, tiles);
    place_pairs(a, s);
}

int64_t blocks_of(int64_t pairs)
{
    return pairs <= BLOCK_PAIRS ? 1 : (pairs + BLOCK_PAIRS - 1) / BLOCK_PAIRS;
}

template <class K>
kl_status launch(K kernel, const plan_arguments &a, cudaStream_t stream, kl_error *err)
{
    const int warps = a.counters < MIN_WARPS ? MIN_WARPS : a.counters;
    const size_t bytes = (a.counters + 4) * static_cast<size_t>(a.p.E) * sizeof(int);
    KL_TRY(kl_cuda_allow_shared(kernel, MOST_SHARED, err));
    return kl_cuda_launch(kernel, static_cast<unsigned>(blocks_of(a.p.pairs)),
                          static_cast<unsigned>(warps) * WARP, bytes, stream, err, a);
}

} // namespace

int64_t kl_cuda_moe_plan_counts(int64_t pairs, int64_t E)
{
    return blocks_of(pairs) * E;
}

kl_status kl_cuda_moe_plan(const moe_plan &p, cudaStream_t stream, kl_error *err)
{
    const int64_t arrays = MOST_SHARED / 4 / p.E - 4;
    if (arrays < 1)
        return kl_fail(err, KL_ERR_VALUE, "moe_experts: E must be <= %lld, got %d",
                       static_cast<long long>(MOST_SHARED / 20), p.E);
    const bool one = blocks_of(p.pairs) == 1;
    plan_arguments a = {.p = p, .block_pairs = one ? p.pairs : static_cast<int>(BLOCK_PAIRS)};
    const int64_t rounds = (a.block_pairs + WARP - 1) / WARP;
    const int64_t most = arrays < MAX_WARPS ? arrays : MAX_WARPS;
    a.counters = static_cast<int>(rounds < most ? rounds : most);
    while (p.E > int64_t{1} << a.bits) a.bits++;
    if (!one) KL_TRY(launch(moe_count_kernel, a, stream, err));
    return launch(moe_plan_kernel, a, stream, err);
}
