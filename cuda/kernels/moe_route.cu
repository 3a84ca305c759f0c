/*
 * moe_route.cu -- the choice of each token's experts.
 *
 * Computes     s = sigmoid(logits) or softmax;  ids = top_k of s + bias;  weights from s alone
 * Shapes       logits [T, E]; bias [E]; ids, weights [T, top_k]
 * Layout       dense, row-major
 * Precision    f32; a NaN ranks above every number, so that it is chosen and seen in a weight
 * Grid         one warp a token, expert e of lane e % 32. A choice is two reductions of the warp
 *              and a lane's search for its next best. Up to 256 experts in one group lie in
 *              registers, others in shared memory
 * Order        the sum of softmax: a lane's experts in rising order, then five butterfly steps;
 *              the sum of the weights in the order of the choice
 * Roofline     4 * T * E bytes, 1 KiB a token with 256 experts: a launch, and top_k * 60 cycles
 * Measured     H200, T = 1, 256 experts: 2.2 us; T = 8192: 13.8 us (2026-11-22)
 */
#include "../device/launch.cuh"
#include "../device/math.cuh"
#include "../device/types.cuh"
#include "../device/warp.cuh"

namespace {

constexpr int MAX_WARPS = 4;
constexpr size_t SHARED_LIMIT = 227 * 1024; /* of a block on capability 9.0 */
constexpr unsigned TAKEN = 0;               /* below the key of every float */
constexpr float SUM_FLOOR = 1e-20f;         /* ops.h, under `renormalize` */

struct arguments {
    const float *logits, *bias; /* bias may be null */
    int *ids;
    float *weights;
    int64_t T;
    int E, top_k, groups, top_groups;
    kl_score score;
    float scaling;
    bool renormalize;
};

/* What a warp keeps in shared memory. */
struct scratch {
    float *scores;    /* [E] */
    unsigned *keys;   /* [E] what is chosen by; TAKEN: not to be chosen (again) */
    unsigned *totals; /* [groups] keys of the groups, TAKEN once allowed */
    int *ids;         /* [top_k] */
};

__host__ __device__ inline int64_t scratch_words(const arguments &a)
{
    return 2 * static_cast<int64_t>(a.E) + a.groups + a.top_k;
}

__device__ scratch scratch_of_warp(const arguments &a)
{
    extern __shared__ unsigned words[];
    unsigned *mine = words + warp_id() * scratch_words(a);
    return {reinterpret_cast<float *>(mine), mine + a.E, mine + 2 * a.E,
            reinterpret_cast<int *>(mine + 2 * a.E + a.groups)};
}

/* Unsigned numbers in the order of the floats, NaN at the top with +infinity, zeros equal. */
__device__ unsigned key_of(float x)
{
    if (!(x == x)) x = INFINITY;
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float value_of(unsigned key)
{
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* The best that a lane still has: the largest key, the lowest index on a tie. */
struct candidate {
    unsigned key;
    int at;

    __device__ void search(const unsigned *keys, int n)
    {
        key = TAKEN, at = lane_id();
        for (int i = lane_id(); i < n; i += WARP)
            if (keys[i] > key) key = keys[i], at = i;
    }
};

/* Take the best of keys[0 .. n), the same in every lane; `mine` is this lane's candidate. */
__device__ int take_best(unsigned *keys, int n, candidate &mine)
{
    const unsigned best = __reduce_max_sync(ALL_LANES, mine.key);
    const unsigned at = __reduce_min_sync(
        ALL_LANES, mine.key == best ? static_cast<unsigned>(mine.at) : 0xffffffffu);
    if (static_cast<unsigned>(mine.at) == at && mine.key == best) {
        keys[at] = TAKEN;
        mine.search(keys, n);
    }
    return static_cast<int>(at);
}

__device__ void softmax(const float *logits, int E, float *scores)
{
    float top = -INFINITY, sum = 0;
    for (int e = lane_id(); e < E; e += WARP) top = fmaxf(top, logits[e]);
    top = warp_max(top);
    for (int e = lane_id(); e < E; e += WARP) sum += scores[e] = expf(logits[e] - top);
    sum = warp_sum(sum);
    for (int e = lane_id(); e < E; e += WARP) scores[e] /= sum;
}

__device__ void score_experts(const arguments &a, int64_t t, const scratch &s)
{
    const float *logits = a.logits + t * a.E;
    if (a.score == KL_SCORE_SIGMOID)
        for (int e = lane_id(); e < a.E; e += WARP) s.scores[e] = sigmoid(logits[e]);
    else
        softmax(logits, a.E, s.scores);
    for (int e = lane_id(); e < a.E; e += WARP)
        s.keys[e] = key_of(a.bias == nullptr ? s.scores[e] : s.scores[e] + a.bias[e]);
    __syncwarp();
}

/* The sum of a group's two best, as a key. */
__device__ unsigned total_of(const unsigned *keys, int size)
{
    unsigned first = TAKEN, second = TAKEN;
    for (int e = 0; e < size; e++) {
        if (keys[e] > first)
            second = first, first = keys[e];
        else if (keys[e] > second)
            second = keys[e];
    }
    return key_of(value_of(first) + value_of(second));
}

/* Take the experts of all but the best groups out of the choice. */
__device__ void allow_groups(const arguments &a, const scratch &s)
{
    const int size = a.E / a.groups;
    for (int g = lane_id(); g < a.groups; g += WARP)
        s.totals[g] = total_of(s.keys + g * size, size);
    __syncwarp();
    candidate mine;
    mine.search(s.totals, a.groups);
    for (int i = 0; i < a.top_groups; i++) take_best(s.totals, a.groups, mine);
    __syncwarp();
    for (int e = lane_id(); e < a.E; e += WARP)
        if (s.totals[e / size] != TAKEN) s.keys[e] = TAKEN;
    __syncwarp();
}

__global__
__launch_bounds__(MAX_WARPS *WARP) void moe_route_kernel(__grid_constant__ const arguments a)
{
    const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
    let_next_start();
    wait_for_inputs();
    if (t >= a.T) return;
    const scratch s = scratch_of_warp(a);
    score_experts(a, t, s);
    if (a.groups > 1) allow_groups(a, s);

    candidate mine;
    mine.search(s.keys, a.E);
    float sum = 0;
    for (int j = 0; j < a.top_k; j++) {
        const int e = take_best(s.keys, a.E, mine);
        sum += s.scores[e];
        if (lane_id() == 0) s.ids[j] = e;
    }
    __syncwarp();
    const float whole = a.renormalize ? sum + SUM_FLOOR : 1.0f;
    for (int j = lane_id(); j < a.top_k; j += WARP) {
        a.ids[t * a.top_k + j] = s.ids[j];
        a.weights[t * a.top_k + j] = s.scores[s.ids[j]] / whole * a.scaling;
    }
}

/* ---- up to 256 experts in one group ------------------------------------------------------ */

constexpr int LANE_EXPERTS = 8, FEW_EXPERTS = LANE_EXPERTS * WARP;

/* A lane's experts in registers, e = i * 32 + lane. */
struct lane_scores {
    float score[LANE_EXPERTS];
    unsigned key[LANE_EXPERTS];

    /* In the order of sums and with the bits of softmax() above. */
    __device__ void take_softmax(int E)
    {
        float top = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) top = fmaxf(top, score[i]);
        top = warp_max(top);
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) {
            score[i] = expf(score[i] - top);
            if (i * WARP + lane_id() < E) sum += score[i];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) score[i] /= sum;
    }

    __device__ void load(const arguments &a, int64_t t)
    {
        float bias[LANE_EXPERTS];
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) {
            const int e = i * WARP + lane_id();
            score[i] = e < a.E ? a.logits[t * a.E + e] : -INFINITY;
            bias[i] = e < a.E && a.bias != nullptr ? a.bias[e] : 0.0f;
        }
        if (a.score == KL_SCORE_SOFTMAX) take_softmax(a.E);
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) {
            if (a.score == KL_SCORE_SIGMOID) score[i] = sigmoid(score[i]);
            const bool biased = a.bias != nullptr;
            key[i] = key_of(biased ? score[i] + bias[i] : score[i]);
            if (i * WARP + lane_id() >= a.E) key[i] = TAKEN;
        }
    }

    /* Take the warp's best out of the choice: its number, and its score in every lane. */
    __device__ int take(float *its_score)
    {
        unsigned mine = TAKEN;
        int at = 0;
        float value = 0;
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++)
            if (key[i] > mine) mine = key[i], at = i, value = score[i];
        const unsigned best = __reduce_max_sync(ALL_LANES, mine);
        const int e = at * WARP + lane_id();
        const int first = static_cast<int>(
            __reduce_min_sync(ALL_LANES, mine == best ? static_cast<unsigned>(e) : ~0u));
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++)
            if (first == i * WARP + lane_id()) key[i] = TAKEN;
        *its_score = __shfl_sync(ALL_LANES, value, first % WARP);
        return first;
    }
};

/* The same results as moe_route_kernel's. Little code: it comes from memory for every call. */
__global__ __launch_bounds__(MAX_WARPS *WARP) void moe_route_few_kernel(
    __grid_constant__ const arguments a)
{
    const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
    let_next_start();
    if (a.bias != nullptr && threadIdx.x * WARP < a.E)
        prefetch_line(a.bias + threadIdx.x * WARP);
    wait_for_inputs();
    if (t >= a.T) return;
    lane_scores s;
    s.load(a, t);
    float sum = 0, mine = 0; /* lane j keeps choice j */
    int id = 0;
#pragma unroll 1
    for (int j = 0; j < a.top_k; j++) {
        float score;
        const int e = s.take(&score);
        sum += score;
        if (j == lane_id()) id = e, mine = score;
    }
    const float whole = a.renormalize ? sum + SUM_FLOOR : 1.0f;
    if (lane_id() >= a.top_k) return;
    a.ids[t * a.top_k + lane_id()] = id;
    a.weights[t * a.top_k + lane_id()] = mine / whole * a.scaling;
}

kl_status launch_few(kl_backend *be, const arguments &args, kl_error *err)
{
    const int64_t warps = args.T < MAX_WARPS ? args.T : MAX_WARPS;
    const int64_t blocks = (args.T + warps - 1) / warps;
    return kl_cuda_launch(moe_route_few_kernel, static_cast<unsigned>(blocks),
                          static_cast<unsigned>(warps * WARP), 0, kl_cuda_stream(be), err,
                          args);
}

} // namespace

kl_status kl_cuda_moe_route(kl_backend *be, const kl_moe_route *a, kl_error *err)
{
    /* Two words of shared memory an expert bound E, before it is narrowed to an int. */
    const int64_t E = a->logits.shape[1], most = SHARED_LIMIT / (2 * sizeof(float));
    if (E > most)
        return kl_fail(err, KL_ERR_VALUE, "moe_route: E must be <= %lld, got %lld",
                       static_cast<long long>(most), static_cast<long long>(E));
    const arguments args = {
        .logits = static_cast<const float *>(a->logits.data),
        .bias = static_cast<const float *>(a->bias.data),
        .ids = static_cast<int *>(a->ids.data),
        .weights = static_cast<float *>(a->weights.data),
        .T = a->logits.shape[0],
        .E = static_cast<int>(E),
        .top_k = static_cast<int>(a->ids.shape[1]),
        .groups = a->groups,
        .top_groups = a->top_groups,
        .score = a->score,
        .scaling = a->scaling,
        .renormalize = a->renormalize,
    };
    if (args.T == 0) return KL_OK;
    const size_t bytes = static_cast<size_t>(scratch_words(args)) * sizeof(float);
    const int warps = bytes * MAX_WARPS <= SHARED_LIMIT ? MAX_WARPS : 1;
    const int64_t blocks = (args.T + warps - 1) / warps;
    if (bytes > SHARED_LIMIT || blocks > MAX_BLOCKS)
        return kl_fail(err, KL_ERR_VALUE,
                       "moe_route: 2 E + groups + top_k must be <= %zu and T <= %lld, got %zu "
                       "and %lld",
                       SHARED_LIMIT / sizeof(float), static_cast<long long>(MAX_BLOCKS * warps),
                       bytes / sizeof(float), static_cast<long long>(args.T));
    if (E <= FEW_EXPERTS && args.groups == 1 && args.top_k <= WARP)
        return launch_few(be, args, err);
    const int shared = static_cast<int>(bytes * static_cast<size_t>(warps));
    KL_CUDA_TRY(cudaFuncSetAttribute(moe_route_kernel,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
                err);
    return kl_cuda_launch(moe_route_kernel, static_cast<unsigned>(blocks),
                          static_cast<unsigned>(warps * WARP), static_cast<size_t>(shared),
                          kl_cuda_stream(be), err, args);
}
