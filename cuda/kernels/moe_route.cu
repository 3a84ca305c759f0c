/*
 * moe_route.cu -- the choice of each token's experts.
 *
 * Computes     s = sigmoid(logits) or softmax;  ids = top_k of s + bias;  weights from s alone
 * Shapes       logits [T, E]; bias [E]; ids, weights [T, top_k]
 * Layout       dense, row-major
 * Precision    f32; a NaN ranks above every number, so that it is chosen and seen in a weight
 * Grid         one warp a token, expert e of lane e % 32. Up to 256 experts in one group lie in
 *              registers, in order: a choice is a reduction of the warp and a vote. Others lie in
 *              shared memory: two reductions, and a lane's search for its next best
 * Order        the sum of softmax: a lane's experts in rising order, then five butterfly steps;
 *              the sum of the weights in the order of the choice
 * Roofline     4 * T * E bytes, 1 KiB a token with 256 experts: a launch, and top_k * 60 cycles
 * Measured     H200, 256 experts: T = 8 to 64 in a step 2.6 to 2.7 us (2026-11-23); T = 8192
 *              13.8, before the experts in registers were put in order (2026-11-22). A token
 *              step of the 48B has none: moe_step.cuh
 */
#include "../device/launch.cuh"
#include "../device/route.cuh"
#include "../device/types.cuh"

namespace {

constexpr int MAX_WARPS = 4;
constexpr size_t SHARED_LIMIT = 227 * 1024; /* of a block on capability 9.0 */

struct arguments {
    route_rule rule;
    const float *logits;
    int *ids;
    float *weights;
    int64_t T;
    int groups, top_groups;
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
    return 2 * static_cast<int64_t>(a.rule.E) + a.groups + a.rule.top_k;
}

__device__ scratch scratch_of_warp(const arguments &a)
{
    extern __shared__ unsigned words[];
    unsigned *mine = words + warp_id() * scratch_words(a);
    return {reinterpret_cast<float *>(mine), mine + a.rule.E, mine + 2 * a.rule.E,
            reinterpret_cast<int *>(mine + 2 * a.rule.E + a.groups)};
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
    const float *logits = a.logits + t * a.rule.E;
    if (a.rule.score == KL_SCORE_SIGMOID)
        for (int e = lane_id(); e < a.rule.E; e += WARP) s.scores[e] = sigmoid(logits[e]);
    else
        softmax(logits, a.rule.E, s.scores);
    for (int e = lane_id(); e < a.rule.E; e += WARP)
        s.keys[e] = key_of(a.rule.bias == nullptr ? s.scores[e] : s.scores[e] + a.rule.bias[e]);
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
    const int size = a.rule.E / a.groups;
    for (int g = lane_id(); g < a.groups; g += WARP)
        s.totals[g] = total_of(s.keys + g * size, size);
    __syncwarp();
    candidate mine;
    mine.search(s.totals, a.groups);
    for (int i = 0; i < a.top_groups; i++) take_best(s.totals, a.groups, mine);
    __syncwarp();
    for (int e = lane_id(); e < a.rule.E; e += WARP)
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
    mine.search(s.keys, a.rule.E);
    float sum = 0;
    for (int j = 0; j < a.rule.top_k; j++) {
        const int e = take_best(s.keys, a.rule.E, mine);
        sum += s.scores[e];
        if (lane_id() == 0) s.ids[j] = e;
    }
    __syncwarp();
    const float whole = a.rule.renormalize ? sum + SUM_FLOOR : 1.0f;
    for (int j = lane_id(); j < a.rule.top_k; j += WARP) {
        a.ids[t * a.rule.top_k + j] = s.ids[j];
        a.weights[t * a.rule.top_k + j] = s.scores[s.ids[j]] / whole * a.rule.scaling;
    }
}

/* ---- up to 256 experts in one group ------------------------------------------------------ */

/* A lane's experts in registers. */
struct lane_scores {
    float score[LANE_EXPERTS];

    __device__ void load(const arguments &a, int64_t t, lane_keys &keys)
    {
        const route_rule &r = a.rule;
        float bias[LANE_EXPERTS];
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) {
            const int e = lane_keys::number(i);
            score[i] = e < r.E ? a.logits[t * r.E + e] : -INFINITY;
            bias[i] = e < r.E && r.bias != nullptr ? r.bias[e] : 0.0f;
        }
        if (r.score == KL_SCORE_SOFTMAX) take_softmax(r.E);
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) {
            if (r.score == KL_SCORE_SIGMOID) score[i] = sigmoid(score[i]);
            const unsigned key = key_of(r.bias != nullptr ? score[i] + bias[i] : score[i]);
            keys.key[i] = lane_keys::number(i) < r.E ? key : TAKEN;
        }
    }

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
            if (lane_keys::number(i) < E) sum += score[i];
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) score[i] /= sum;
    }

    /* Of an expert of each lane's own. */
    __device__ float of(int e) const
    {
        float found = 0;
#pragma unroll
        for (int i = 0; i < LANE_EXPERTS; i++) {
            const float x = __shfl_sync(ALL_LANES, score[i], e % WARP);
            if (e / WARP == i) found = x;
        }
        return found;
    }
};

/* The same results as moe_route_kernel's. */
__global__ __launch_bounds__(MAX_WARPS *WARP) void moe_route_few_kernel(
    __grid_constant__ const arguments a)
{
    const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP) + warp_id();
    let_next_start();
    if (a.rule.bias != nullptr && threadIdx.x * WARP < a.rule.E)
        prefetch_line(a.rule.bias + threadIdx.x * WARP);
    wait_for_inputs();
    if (t >= a.T) return;
    lane_keys keys;
    lane_scores scores;
    scores.load(a, t, keys);
    const expert_choice choice =
        choose_experts(keys, a.rule, [&](int e) { return scores.of(e); });
    if (lane_id() >= a.rule.top_k) return;
    a.ids[t * a.rule.top_k + lane_id()] = choice.id;
    a.weights[t * a.rule.top_k + lane_id()] = choice.weight;
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
        .rule = {.bias = static_cast<const float *>(a->bias.data),
                 .E = static_cast<int>(E),
                 .top_k = static_cast<int>(a->ids.shape[1]),
                 .score = a->score,
                 .scaling = a->scaling,
                 .renormalize = a->renormalize},
        .logits = static_cast<const float *>(a->logits.data),
        .ids = static_cast<int *>(a->ids.data),
        .weights = static_cast<float *>(a->weights.data),
        .T = a->logits.shape[0],
        .groups = a->groups,
        .top_groups = a->top_groups,
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
    if (E <= FEW_EXPERTS && args.groups == 1 && args.rule.top_k <= WARP)
        return launch_few(be, args, err);
    KL_TRY(kl_cuda_allow_shared(moe_route_kernel, SHARED_LIMIT, err));
    return kl_cuda_launch(moe_route_kernel, static_cast<unsigned>(blocks),
                          static_cast<unsigned>(warps * WARP),
                          bytes * static_cast<size_t>(warps), kl_cuda_stream(be), err, args);
}
