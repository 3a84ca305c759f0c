/*
 * kda_prefill_chunked.cu -- chunked KDA prefill of bf16 with K = 128, as one kernel.
 *
 * Computes     what kda_prefill.cuh says: for each chunk of 32 tokens U, O and the next state;
 *              where the call has a norm, that of O as well (kda_prefill_norm.cuh)
 * Shapes       q, k [T, Hk, 128] bf16; g [T, H, 128]; beta [T, H]; v, out [T, H, V]; 32 | V
 *              <= 1,024; state [S, H, V, 128] f32
 * Layout       first axes may be strided; rows in pieces of 16 bytes
 * Convolution  with raw rows instead, K = V: q, k and v by the groups that prepare (four taps,
 *              SiLU: kda_prefill_convolve.cuh), v by way of device memory
 * Precision    f32 sums, gate, decays, inverse and state; operands of products bf16, those that
 *              errors would last in as sums of two. No exponential of a positive number, but for
 *              factors of at most 2^100 whose product with their partner is at most 1
 * Grid         a block a multiprocessor, all resident (a cooperative launch): groups of four
 *              warps prepare chunks, and in as many blocks as there are pairs and tiles of 64
 *              value rows, eight warps take the state through them. Chunks travel by a ring that
 *              stays in the L2. A block waits only for what earlier chunks need: see
 *              wait_until_ready() and wait_for_room(). Few heads and long sequences: twice, for
 *              the summaries of segments (both warpgroups take rows, 64 of C and 64 of M), then
 *              for the outputs
 * Roofline     1,282 B a token and head with g in bf16: 112 us for 8,192 tokens of 32 heads on
 *              an H100; 256 more with a norm. Preparing and the chain alone take four fifths of
 *              the whole each
 * Measured     8,192 tokens of 32 heads: H200 320 us with given log-decays, 317 with the softplus
 *              gate (25 % of its roofline of 78 us), 490 with convolution and norm
 *              (benchmarks/bench_kda.py, 2026-11-23)
 */
#include "kda_prefill_norm.cuh"

namespace {

using namespace kda;

constexpr int GROUPS = 4; /* warpgroups; in blocks that scan, one prepares */
constexpr int THREADS = GROUPS * GROUP;
/* Roles of the warpgroups of a block that scans. */
enum { CHAIN, OUTPUT, BRING, PREPARE };
/* Registers of a thread: at first, and those of a chain warp, which holds its rows of the state
 * beside their operands; the other two roles of a block that scans give up for it. */
constexpr int REGISTERS = 128, CHAIN_REGISTERS = 168;
constexpr int OUTPUT_REGISTERS = 112, BRING_REGISTERS = 48;
static_assert(SCANNERS == PREPARERS);
static_assert(REGISTERS * THREADS == 64 * 1024);
static_assert(2 * CHAIN_REGISTERS + BRING_REGISTERS + REGISTERS <= 4 * REGISTERS);
/* Chunks in flight: more than what all groups prepare at once, and 16 MB. Of a pair: as many let
 * as many groups prepare ahead of it; more than 64 chunks ahead serve nobody. */
constexpr int RING = 512, FEWEST_SLOTS = 8, MOST_SLOTS = 64;
/* Segments of a sequence: two would take as long in two passes as one does in one. */
constexpr int FEWEST_SEGMENTS = 3, MOST_SEGMENTS = 16;

struct block_memory {
    union {
        scan_memory scan;
        prepare_memory more[GROUPS - 1];
    };
    prepare_memory prepare; /* of the last group */
    kda_lanes_of_call lanes;
    norm_memory norm;
};
static_assert(sizeof(block_memory) <= 227 * 1024);

__device__ void find_lanes(const kda_plan &p, kda_lanes_of_call &to)
{
    const int l = threadIdx.x, N = p.sequences;
    if (l <= p.lanes) {
        const long long all = kda_first_number(p.cu, N);
        int n = l < p.lanes ? 0 : N;
        if (p.lanes == N)
            n = l;
        else if (l > 0 && l < p.lanes)
            n = last_begun(
                N, [&](int i) { return kda_first_number(p.cu, i) <= all * l / p.lanes; });
        to.lane[l] = {n, kda_first_number(p.cu, n)};
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
        barrier_init(&m.full[i], WARP + WARP_ARRIVALS);
        barrier_init(&m.empty[i], (2 * SCANNERS + 1) * WARP_ARRIVALS); /* and who publishes */
    }
    for (int w = 0; w < SCANNERS; w++) {
        barrier_init(&m.has_state[w], WARP_ARRIVALS);
        barrier_init(&m.has_update[w], WARP_ARRIVALS);
        barrier_init(&m.took_state[w], WARP_ARRIVALS);
        barrier_init(&m.took_update[w], WARP_ARRIVALS);
    }
    barrier_init_done();
}

/* What a warpgroup of a block that scans does there. */
template <kda_pass pass, bool convolved, bool normed>
__device__ void scan_chunks(const scanner &s, const kda_norm &norm, int group, int w,
                            block_memory &m)
{
    constexpr bool outputs = pass == KDA_OUTPUTS;
    if (group == CHAIN) {
        registers_up_to<CHAIN_REGISTERS>();
        run_chain<outputs ? OF_OUTPUT : OF_VALUES>(s, w, m.scan);
    } else if (group == BRING) {
        registers_down_to<BRING_REGISTERS>();
        bring_chunks<convolved, normed>(s, norm, w, m.scan);
    } else if constexpr (outputs) {
        registers_down_to<OUTPUT_REGISTERS>();
        if constexpr (normed)
            run_normed_output(s, norm, w, m.scan, m.norm);
        else
            run_output(s, w, m.scan);
    } else {
        registers_up_to<CHAIN_REGISTERS>();
        run_chain<OF_UNITS>(s, w, m.scan);
    }
}

/* The same memory. An address that ptxas knows it keeps for all roles in one register, which all of
 * them spill where the kernel has most in it; this one it takes for a variable. */
__device__ block_memory &hidden(block_memory &m)
{
    const int address = made_here(static_cast<int>(shared_address(&m)));
    return *static_cast<block_memory *>(__cvta_shared_to_generic(address));
}

template <kda_pass pass, bool normed, kl_gate kind, class Rows>
__global__ __launch_bounds__(THREADS,
                             1) void kda_chunked_kernel(__grid_constant__ const kda_arguments a,
                                                        __grid_constant__ const kda_plan p,
                                                        __grid_constant__ const Rows rows,
                                                        __grid_constant__ const kda_norm norm)
{
    if constexpr (!SM_90A) return stop_here();
    extern __shared__ __align__(1024) unsigned char bytes[];
    block_memory &own = *reinterpret_cast<block_memory *>(bytes);
    block_memory &m = hidden(own);
    /* From a shuffle, ptxas knows that it is the same for the warp; else it waits for every
     * product of a warpgroup on its own. */
    const int w = __shfl_sync(ALL_LANES, warp_id(), 0), group = w / PREPARERS;
    const int pair = blockIdx.x / p.tiles, tile = blockIdx.x % p.tiles, l = pair / p.groups;
    const bool owns = pair < p.pairs;
    find_lanes(p, m.lanes);
    __syncthreads();

    const kda_lane none = {};
    const scanner s = {a,
                       p,
                       owns ? m.lanes.lane[l] : none,
                       owns ? m.lanes.lane[l + 1] : none,
                       m.lanes.longest,
                       pair,
                       tile};
    const bool scans = __shfl_sync(ALL_LANES, walk(s).valid, 0);
    if (scans && threadIdx.x == THREADS - 1) init_barriers(m.scan);
    __syncthreads();
    if (scans && group != PREPARE) {
        scan_chunks<pass, Rows::IS_THERE, normed>(s, norm, group, w % PREPARERS, own);
    } else {
        prepare_chunks<kind>(a, p, rows, m.lanes, group, w % PREPARERS,
                             group == PREPARE ? m.prepare : m.more[group]);
    }
}

/* ---- host: who does what ------------------------------------------------------------------ */

long long parts(long long n, long long size)
{
    return (n + size - 1) / size;
}

/* What the plans of a call are made from. */
struct call_sizes {
    long long N, T, H, V;
    int multiprocessors;
    bool invariant;

    /* Blocks that take a head through the chunks. */
    long long tiles(kda_pass pass) const
    {
        const long long n = parts(V, KDA_V_TILE);
        return pass == KDA_SUMMARIES && n < KDA_UNIT_TILES ? KDA_UNIT_TILES : n;
    }

    /* Pairs at once: on half of the device, for most of the work is to prepare. */
    long long most_pairs(kda_pass pass) const
    {
        const long long half = multiprocessors / 2 / tiles(pass);
        return half > 0 ? half : 1;
    }

    /* Of each of so many sequences: as many as have pairs of their own, and tokens enough on
     * average. */
    int segments(long long sequences) const
    {
        const long long room = most_pairs(KDA_SUMMARIES) / (sequences * H);
        const long long long_enough = T / (sequences * KDA_SEGMENT);
        const long long n = room < long_enough ? room : long_enough;
        if (invariant || n < FEWEST_SEGMENTS) return 1;
        return static_cast<int>(n < MOST_SEGMENTS ? n : MOST_SEGMENTS);
    }
};

kl_status sizes_of(const kl_kda *a, bool invariant, call_sizes *s, kl_error *err)
{
    *s = {.N = a->cu_seqlens.shape[0] - 1,
          .T = a->q.shape[0],
          .H = a->state.shape[1],
          .V = a->state.shape[2],
          .invariant = invariant};
    return kl_cuda_multiprocessors(&s->multiprocessors, err);
}

kda_plan plan_of(const call_sizes &s, kda_pass pass)
{
    const int segments = s.segments(s.N);
    const long long most = s.most_pairs(pass), N = s.N * segments;
    const long long rounds = parts(s.H, most), groups = parts(s.H, rounds);
    long long lanes = most / groups < N ? most / groups : N;
    lanes = lanes < KDA_MAX_LANES ? lanes : KDA_MAX_LANES;
    kda_plan p = {.pass = pass, .segments = segments, .sequences = static_cast<int>(N)};
    p.lanes = static_cast<int>(lanes), p.groups = static_cast<int>(groups);
    p.pairs = static_cast<int>(lanes * groups), p.rounds = static_cast<int>(rounds);
    p.tiles = static_cast<int>(s.tiles(pass));
    p.slots = RING / p.pairs < MOST_SLOTS ? RING / p.pairs : MOST_SLOTS;
    if (p.slots < FEWEST_SLOTS) p.slots = FEWEST_SLOTS;
    return p;
}

/* ---- host: the workspace ------------------------------------------------------------------ */

/* Bytes of its parts, in their order: enough for fewer sequences and tokens as well. */
struct layout {
    size_t ring, summaries, more_flags, flags, sums, borders;
};

layout layout_of(const call_sizes &s)
{
    const bool may_cut = s.segments(1) > 1;
    const size_t most = s.most_pairs(KDA_SUMMARIES), own = plan_of(s, KDA_OUTPUTS).pairs;
    const size_t pairs = may_cut && own < most ? most : own;
    const size_t few = FEWEST_SLOTS * pairs, many = MOST_SLOTS * pairs;
    const size_t slots = many < RING ? many : few > RING ? few : RING;
    layout l = {.ring = slots * sizeof(kda_chunk)};
    l.flags = sizeof(unsigned) * KDA_FLAG * (1 + slots + pairs * s.tiles(KDA_SUMMARIES));
    l.sums = sizeof(uint64_t) * KDA_TOKENS * KDA_SUMS_KEPT * 2 * pairs;
    if (!may_cut) return l;
    l.summaries = most * (s.V + KDA_K) * KDA_K * sizeof(float);
    l.more_flags = l.flags, l.borders = (most + 1) * sizeof(int);
    return l;
}

/* Where they lie. */
struct places {
    char *ring, *summaries, *more_flags, *flags, *sums, *borders;

    places(const layout &l, void *memory)
        : ring(static_cast<char *>(memory)), summaries(ring + l.ring),
          more_flags(summaries + l.summaries), flags(more_flags + l.more_flags),
          sums(flags + l.flags), borders(sums + l.sums)
    {
    }

    void put(kda_plan &p, char *its_flags) const
    {
        p.ring = reinterpret_cast<kda_chunk *>(ring);
        p.summaries = reinterpret_cast<float *>(summaries);
        p.ticket = reinterpret_cast<unsigned *>(its_flags);
        p.taken = p.ticket + KDA_FLAG, p.ready = p.taken + p.pairs * p.tiles * KDA_FLAG;
    }
};

/* ---- host: launches ------------------------------------------------------------------------ */

template <kda_pass pass, bool normed, class Rows> auto kernel_of(kl_gate kind)
{
    return kind == KL_GATE_SOFTPLUS  ? kda_chunked_kernel<pass, normed, KL_GATE_SOFTPLUS, Rows>
           : kind == KL_GATE_BOUNDED ? kda_chunked_kernel<pass, normed, KL_GATE_BOUNDED, Rows>
                                     : kda_chunked_kernel<pass, normed, KL_GATE_DIRECT, Rows>;
}

template <kda_pass pass, bool normed, class Rows>
kl_status launch(const kda_arguments &a, const kda_plan &p, const Rows &rows,
                 const kda_norm &norm, int multiprocessors, cudaStream_t stream, kl_error *err)
{
    constexpr int bytes = static_cast<int>(sizeof(block_memory));
    const auto kernel = kernel_of<pass, normed, Rows>(a.gate);
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
    KL_CUDA_TRY(cudaLaunchKernelEx(&config, kernel, a, p, rows, norm), err);
    return KL_OK;
}

template <class Rows>
kl_status launch_outputs(const kda_arguments &a, const kda_plan &p, const Rows &rows,
                         const kl_gated_rms_norm *norm, uint64_t *sums, int multiprocessors,
                         cudaStream_t stream, kl_error *err)
{
    if (norm == nullptr)
        return launch<KDA_OUTPUTS, false>(a, p, rows, {}, multiprocessors, stream, err);
    const kda_norm n = {
        .z = static_cast<const bf16 *>(norm->z.data),
        .weight = static_cast<const float *>(norm->weight.data),
        .z_stride = norm->z.stride[0],
        .eps = norm->eps,
        .sums = sums,
    };
    return launch<KDA_OUTPUTS, true>(a, p, rows, n, multiprocessors, stream, err);
}

} // namespace

size_t kda_chunked_workspace(const kl_kda *a, bool invariant)
{
    call_sizes s;
    kl_error ignored;
    if (sizes_of(a, invariant, &s, &ignored) != KL_OK || s.N <= 0) return 0;
    const layout l = layout_of(s);
    return l.ring + l.summaries + l.more_flags + l.flags + l.sums + l.borders;
}

bool kda_has_segments(const kl_kda *a, bool invariant)
{
    call_sizes s;
    kl_error ignored;
    return sizes_of(a, invariant, &s, &ignored) == KL_OK && s.segments(s.N) > 1;
}

kl_status kda_chunked(const kda_arguments &a, const kl_short_conv *conv, const kl_kda *op,
                      const kl_gated_rms_norm *norm, bool invariant, cudaStream_t stream,
                      kl_error *err)
{
    call_sizes s;
    KL_TRY(sizes_of(op, invariant, &s, err));
    const places at(layout_of(s), op->ws.data);
    kda_plan outputs = plan_of(s, KDA_OUTPUTS), summaries = plan_of(s, KDA_SUMMARIES);
    const bool is_cut = outputs.segments > 1;
    at.put(outputs, at.flags), at.put(summaries, at.more_flags);
    char *zeros = is_cut ? at.more_flags : at.flags;
    char *end = norm != nullptr ? at.borders : at.sums;
    KL_CUDA_TRY(cudaMemsetAsync(zeros, 0, static_cast<size_t>(end - zeros), stream), err);
    outputs.cu = a.cu;
    const int mps = s.multiprocessors;
    if (is_cut) {
        int *borders = reinterpret_cast<int *>(at.borders);
        outputs.cu = summaries.cu = borders;
        KL_TRY(kda_cut(a.cu, s.N, outputs.segments, borders, stream, err));
        KL_TRY((launch<KDA_SUMMARIES, false>(a, summaries, kda_no_convolution{}, {}, mps,
                                             stream, err)));
        KL_TRY(kda_join(a, summaries, stream, err));
    }
    uint64_t *const sums = reinterpret_cast<uint64_t *>(at.sums);
    if (conv == nullptr)
        return launch_outputs(a, outputs, kda_no_convolution{}, norm, sums, mps, stream, err);
    const kda_convolution rows = {.x = kda_operand_of(conv->x),
                                  .taps = static_cast<const float *>(conv->weight.data),
                                  .windows = static_cast<const bf16 *>(conv->state.data)};
    return launch_outputs(a, outputs, rows, norm, sums, mps, stream, err);
}
