/*
 * kda_prefill_chunked.cu -- chunked KDA prefill of bf16 with K = 128, as one kernel.
 *
 * Computes     what kda_prefill.cuh says: for each chunk of 32 tokens U, O and the next state; in
 *              a fused call the gated norm of O as well (kda_prefill_finish.cuh)
 * Shapes       q, k [T, Hk, 128] bf16; g [T, H, 128]; beta [T, H]; v, out [T, H, V]; 32 | V
 *              <= 1,024; state [S, H, V, 128] f32
 * Layout       first axes may be strided; rows in pieces of 16 bytes
 * Precision    f32 sums, gate, decays, inverse and state; operands of products bf16, those that
 *              errors would last in as sums of two. No exponential of a positive number, but for
 *              factors of at most 2^100 whose product with their partner is at most 1
 * Grid         a block a multiprocessor, all resident (a cooperative launch): groups of four
 *              warps prepare chunks, and in as many blocks as there are pairs and tiles of 64
 *              value rows, eight warps take the state through them. Chunks travel by a ring that
 *              stays in the L2. A block waits only for what earlier chunks need: see
 *              wait_until_ready() and wait_for_room().
 * Roofline     1,282 B a token and head with g in bf16: 112 us for 8,192 tokens of 32 heads on
 *              an H100; bound by what preparing takes, most of the instructions
 * Measured     H100, 8,192 tokens of 32 heads: 398 us (28 % of the roofline), with the softplus
 *              gate 453; H200 366 and 428 (benchmarks/bench_kda.py, 2026-11-22), all of them
 *              before preparing shed a fifth of its instructions
 */
#include "kda_prefill_finish.cuh"

namespace {

using namespace kda;

constexpr int GROUPS = 4; /* warpgroups; in blocks that scan, one prepares */
constexpr int THREADS = GROUPS * GROUP;
/* Roles of the warpgroups of a block that scans. */
enum { CHAIN, OUTPUT, BRING, PREPARE };
/* A chain warp holds its rows of the state beside their operands; the others give up for it. */
constexpr int CHAIN_REGISTERS = 168, OTHER_REGISTERS = 112;
static_assert(SCANNERS == PREPARERS);
static_assert(CHAIN_REGISTERS + (GROUPS - 1) * OTHER_REGISTERS <= 512);
/* Chunks in flight: more than what all groups prepare at once, and 16 MB. */
constexpr int RING = 512;

struct block_memory {
    union {
        scan_memory scan;
        prepare_memory more[GROUPS - 1];
    };
    prepare_memory prepare; /* of the last group */
    kda_lanes_of_call lanes;
};
static_assert(sizeof(block_memory) <= 227 * 1024);

__device__ void find_lanes(const kda_arguments &a, const kda_plan &p, kda_lanes_of_call &to)
{
    const int l = threadIdx.x, N = p.sequences;
    if (l <= p.lanes) {
        const long long all = kda_first_number(a.cu, N);
        int n = l < p.lanes ? 0 : N;
        if (l > 0 && l < p.lanes)
            n = last_begun(
                N, [&](int i) { return kda_first_number(a.cu, i) <= all * l / p.lanes; });
        to.lane[l] = {n, kda_first_number(a.cu, n)};
    }
    __syncthreads();
    if (l > 0) return;
    to.longest = 1;
    for (int i = 0; i < p.lanes; i++)
        to.longest = max(to.longest, to.lane[i + 1].number - to.lane[i].number);
}

__device__ void init_barriers(scan_memory &m)
{
    for (int i = 0; i < STAGES; i++) {
        barrier_init(&m.full[i], WARP + 1);
        barrier_init(&m.empty[i], 2 * SCANNERS);
    }
    for (int i = 0; i < OUTPUTS; i++) {
        barrier_init(&m.has_output[i], SCANNERS);
        barrier_init(&m.took_output[i], FINISHERS);
    }
    for (int w = 0; w < SCANNERS; w++) {
        barrier_init(&m.has_state[w], 1);
        barrier_init(&m.has_update[w], 1);
        barrier_init(&m.took_state[w], 1);
        barrier_init(&m.took_update[w], 1);
    }
    barrier_init_done();
}

__global__ __launch_bounds__(THREADS,
                             1) void kda_chunked_kernel(__grid_constant__ const kda_arguments a,
                                                        __grid_constant__ const kda_plan p,
                                                        __grid_constant__ const kda_fused f)
{
    extern __shared__ __align__(1024) unsigned char bytes[];
    block_memory &m = *reinterpret_cast<block_memory *>(bytes);
    /* From a shuffle, ptxas knows that it is the same for the warp; else it waits for every
     * product of a warpgroup on its own. */
    const int w = __shfl_sync(ALL_LANES, warp_id(), 0);
    const int pair = blockIdx.x / p.tiles, tile = blockIdx.x % p.tiles;
    const bool scans = pair < p.pairs;
    if (scans && threadIdx.x == THREADS - 1) init_barriers(m.scan);
    find_lanes(a, p, m.lanes);
    __syncthreads();

    const int group = w / PREPARERS, l = pair / p.groups;
    const kda_lane none = {};
    const scanner s = {a,
                       p,
                       f,
                       scans ? m.lanes.lane[l] : none,
                       scans ? m.lanes.lane[l + 1] : none,
                       m.lanes.longest,
                       pair,
                       tile};
    if (scans && group == CHAIN) {
        registers_up_to<CHAIN_REGISTERS>();
        run_chain(s, w % PREPARERS, m.scan);
    } else {
        registers_down_to<OTHER_REGISTERS>();
        if (scans && group == OUTPUT)
            run_output(s, w % PREPARERS, m.scan);
        else if (!scans || group == PREPARE)
            prepare_chunks(a, p, f, m.lanes, group,
                           group == PREPARE ? m.prepare : m.more[group]);
        else if (w % PREPARERS == 0)
            bring_chunks(s, m.scan);
        else if (f.weight != nullptr)
            run_finish(s, w % PREPARERS - 1, m.scan);
    }
}

/* ---- host -------------------------------------------------------------------------------- */

size_t flag_bytes(const kda_plan &p)
{
    return sizeof(unsigned) * KDA_FLAG * (1 + p.pairs * (p.slots + p.tiles));
}

/* Behind the flags. */
size_t sum_bytes(const kda_plan &p)
{
    return p.tiles == 2 ? sizeof(uint64_t) * p.pairs * 2 * KDA_SUMS_KEPT * KDA_SUMS : 0;
}

kl_status plan_of(long long N, long long H, long long V, kda_plan *p, kl_error *err)
{
    int multiprocessors;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    const auto parts = [](long long n, long long size) { return (n + size - 1) / size; };
    const long long tiles = parts(V, KDA_V_TILE);
    /* Pairs at once: on half of the device, for most of the work is to prepare. */
    const long long half = multiprocessors / 2 / tiles, most = half > 0 ? half : 1;
    const long long rounds = parts(H, most), groups = parts(H, rounds);
    long long lanes = most / groups < N ? most / groups : N;
    lanes = lanes < KDA_MAX_LANES ? lanes : KDA_MAX_LANES;
    *p = {.sequences = static_cast<int>(N), .lanes = static_cast<int>(lanes)};
    p->groups = static_cast<int>(groups), p->pairs = static_cast<int>(lanes * groups);
    p->rounds = static_cast<int>(rounds), p->tiles = static_cast<int>(tiles);
    /* Eight let as many groups prepare ahead of a pair; more than 64 chunks ahead serve nobody. */
    p->slots = RING / p->pairs < 8 ? 8 : RING / p->pairs < 64 ? RING / p->pairs : 64;
    return KL_OK;
}

} // namespace

size_t kda_chunked_workspace(const kl_kda *a)
{
    kda_plan p;
    kl_error ignored;
    const long long N = a->cu_seqlens.shape[0] - 1;
    if (N <= 0 || plan_of(N, a->state.shape[1], a->state.shape[2], &p, &ignored) != KL_OK)
        return 0;
    return static_cast<size_t>(p.pairs) * p.slots * sizeof(kda_chunk) + flag_bytes(p) +
           sum_bytes(p);
}

kl_status kda_chunked(const kda_arguments &a, const kda_fused &f, const kl_kda *op,
                      cudaStream_t stream, kl_error *err)
{
    constexpr int bytes = static_cast<int>(sizeof(block_memory));
    const auto kernel = kda_chunked_kernel;
    kda_plan p;
    KL_TRY(plan_of(op->cu_seqlens.shape[0] - 1, a.H, a.V, &p, err));
    p.ring = static_cast<kda_chunk *>(op->ws.data);
    p.ticket = reinterpret_cast<unsigned *>(p.ring + static_cast<size_t>(p.pairs) * p.slots);
    p.taken = p.ticket + KDA_FLAG, p.ready = p.taken + p.pairs * p.tiles * KDA_FLAG;
    p.sums = reinterpret_cast<uint64_t *>(p.ticket + flag_bytes(p) / sizeof(unsigned));
    const size_t zeros = flag_bytes(p) + (f.weight == nullptr ? 0 : sum_bytes(p));
    KL_CUDA_TRY(cudaMemsetAsync(p.ticket, 0, zeros, stream), err);

    int multiprocessors;
    KL_TRY(kl_cuda_multiprocessors(&multiprocessors, err));
    KL_CUDA_TRY(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), err);
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(multiprocessors));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &together;
    config.numAttrs = 1;
    KL_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, a, p, f), err);
    return KL_OK;
}
