/*
 * moe_step.cuh -- what the kernels of a single token's experts share: their arguments, and the choice
 * of the experts, which each block makes for itself or hears of.
 */
#ifndef KL_CUDA_DEVICE_MOE_STEP_H
#define KL_CUDA_DEVICE_MOE_STEP_H

#include "load_here.cuh"
#include "moe.cuh"
#include "ring.cuh"
#include "router_sums.cuh"

constexpr int MAX_STEP_EXPERTS = 64;  /* of a token, with the shared one */
constexpr int EACH = STREAM_ROWS / 2; /* rows of a gate or an up in a tile; of w2 in a block */

/* Experts are numbered as they are visited: the shared one, if any, then the token's choices. */
struct moe_step_arguments {
    const bf16 *h; /* with sums before its division by the rms */
    route_rule rule;
    router_sums *sums;   /* of the logits and squares, or null */
    const float *logits; /* [E], or null: then without sums ids and weights are given */
    const int *ids;      /* [top_k], as the weights */
    const float *weights;
    weight_view w1, w3, w2, shared_w1, shared_w3, shared_w2;
    bf16 *inner; /* [shared I', then top_k times I] */
    bf16 *out;
    float *residual; /* or null */
    float norm_eps;
    int D, n_shared, top_k;
    int row_bytes, groups;                      /* of w1 and w3, the shared expert's too */
    unsigned shared_tiles, expert_tiles, tiles; /* of the inner kernel: an expert's, all */
    bool unsettled; /* a weight that is read before the wait: see kl_weight */
};

/* ---- the choice ------------------------------------------------------------------------ */

__device__ inline bool chooses(const moe_step_arguments &a)
{
    return a.sums != nullptr || a.logits != nullptr;
}

/* Before the wait, by a warp: the bias comes from memory, and would come last. */
__device__ inline void prefetch_choice(const moe_step_arguments &a)
{
    if (!chooses(a) || a.rule.bias == nullptr) return;
    if (const int i = lane_id() * 32; i < a.rule.E) prefetch_line(a.rule.bias + i);
}

/* What a block has in shared memory; */
struct chosen_experts {
    int ids[MAX_STEP_EXPERTS];
    float weights[MAX_STEP_EXPERTS];
};

/* of all, where it chooses: what they are chosen by. */
struct choice_keys {
    float scores[FEW_EXPERTS];
    unsigned keys[FEW_EXPERTS];
};

__device__ inline lane_keys keys_of(const unsigned *shared)
{
    lane_keys keys;
#pragma unroll
    for (int i = 0; i < LANE_EXPERTS; i++) keys.key[i] = shared[lane_keys::number(i)];
    return keys;
}

/* Without sums: by STREAM_THREADS threads; a barrier follows. */
__device__ inline void share_keys(const moe_step_arguments &a, choice_keys &to)
{
    static_assert(FEW_EXPERTS == STREAM_THREADS);
    if (a.logits == nullptr) return;
    const int i = threadIdx.x;
    const bool inside = i < a.rule.E;
    const float bias = inside && a.rule.bias != nullptr ? __ldcg(a.rule.bias + i) : 0;
    const float score = sigmoid(inside ? __ldcg(a.logits + i) : 0);
    to.scores[i] = score;
    to.keys[i] = inside ? key_of(a.rule.bias != nullptr ? score + bias : score) : TAKEN;
}

/* Then by a warp; another barrier follows. */
__device__ inline void choose(const moe_step_arguments &a, const choice_keys &from,
                              chosen_experts &to)
{
    if (a.logits == nullptr) {
#pragma unroll 1
        for (int i = lane_id(); i < a.top_k; i += WARP) {
            to.ids[i] = __ldcg(a.ids + i);
            to.weights[i] = __ldcg(a.weights + i);
        }
        return;
    }
    lane_keys keys = keys_of(from.keys);
    const expert_choice choice =
        choose_experts(keys, a.rule, [&](int e) { return from.scores[e]; });
    if (lane_id() >= a.top_k) return;
    to.ids[lane_id()] = choice.id;
    to.weights[lane_id()] = choice.weight;
}

/* By a warp of a kernel that may get sums, with the help of STREAM_THREADS other threads; no
 * further than it is asked for, as others can begin with the first choices. */
struct shared_choice {
    int ids[MAX_STEP_EXPERTS];
    float scores[FEW_EXPERTS];  /* of all, where there is a choice, */
    unsigned keys[FEW_EXPERTS]; /* and what they are chosen by */
    float inverse;              /* what the experts' first products are to be multiplied by */
};

/* After the wait, by the warp that chooses; a barrier with the others follows. */
__device__ inline void share_inverse(const moe_step_arguments &a, shared_choice &to)
{
    const float inverse = a.sums == nullptr ? 1 : inverse_rms_of_sums(*a.sums, a.D, a.norm_eps);
    if (lane_id() == 0) to.inverse = inverse;
}

/* An expert's logit, which a thread of the others reads before that barrier, and makes a key behind
 * it; another barrier follows. The out kernel starts when all blocks of the inner one have waited
 * for what came before: that is complete then, and the out kernel may read it before its own wait,
 * past the L1, which that wait alone would clean. */
struct logit_reading {
    float logit = 0, bias = 0;

    __device__ explicit logit_reading(const moe_step_arguments &a)
    {
        static_assert(FEW_EXPERTS == STREAM_THREADS && MAX_STEP_EXPERTS <= STREAM_THREADS);
        const int e = threadIdx.x;
        const bool inside = e < a.rule.E;
        if (inside && a.rule.bias != nullptr) bias = __ldcg(a.rule.bias + e);
        if (a.sums != nullptr)
            logit = logit_of_sums(*a.sums, e); /* zeros of those that are none */
        else if (inside && a.logits != nullptr)
            logit = __ldcg(a.logits + e);
    }

    __device__ void share(const moe_step_arguments &a, shared_choice &to) const
    {
        const int e = threadIdx.x;
        const float score = sigmoid(logit * to.inverse);
        const unsigned key = key_of(a.rule.bias != nullptr ? score + bias : score);
        to.scores[e] = score;
        to.keys[e] = e < a.rule.E ? key : TAKEN;
        if (!chooses(a) && e < a.top_k) to.ids[e] = __ldcg(a.ids + e);
    }
};

struct warp_choice {
    shared_choice &from;
    lane_keys keys;
    int made = 0; /* choices */

    __device__ explicit warp_choice(shared_choice &of_block) : from(of_block) {}

    /* Behind both barriers. */
    __device__ void begin(const moe_step_arguments &a)
    {
        keys = keys_of(from.keys);
        made = chooses(a) ? 0 : a.top_k;
    }

    /* So many, into from.ids, by all lanes. */
    __device__ void make(int count)
    {
#pragma unroll 1
        for (; made < count; made++) {
            const int best = keys.take_best();
            if (lane_id() == 0) from.ids[made] = best;
        }
        __syncwarp();
    }
};

/* ---- the choice by sums, told ------------------------------------------------------------ */

/* With sums the inner kernel alone chooses, and its last block, which has the fewest tiles, tells
 * the out kernel: a word for each choice, its id + 1 above the bits of its weight, so not 0
 * whatever the weight. Words are zeros as the sums are: who cleared them had ended when the inner
 * kernel's blocks were past their wait. A word says itself that it is there, and stands for nothing
 * else: no order between words, nor with other memory, is needed.
 *
 * The out kernel's blocks look until it is there. That ends: they start only when every block of
 * the inner kernel has (let_next_start()), and the one that tells waits for nothing that comes
 * after it. It lets them start when it has told, so that mostly they look once. */
__device__ inline bool tells(const moe_step_arguments &a)
{
    return a.sums != nullptr && blockIdx.x == gridDim.x - 1;
}

/* By the warp that has chosen. */
__device__ inline void tell(const moe_step_arguments &a, const shared_choice &chosen)
{
    const bool mine = lane_id() < a.top_k;
    const int id = mine ? chosen.ids[lane_id()] : 0;
    const unsigned weight = __float_as_uint(weight_of(a.rule, chosen.scores[id]));
    const unsigned long long word = (id + 1ull) << 32 | weight;
    if (mine)
        asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(a.sums->told + lane_id()),
                     "l"(word)
                     : "memory");
}

/* By a warp; a barrier follows. */
__device__ inline void hear(const moe_step_arguments &a, chosen_experts &to)
{
    const int i = lane_id();
    if (i >= a.top_k) return;
    uint64_t word;
    do word = load_here(a.sums->told + i);
    while (word == 0);
    to.ids[i] = static_cast<int>(word >> 32) - 1;
    to.weights[i] = __uint_as_float(static_cast<unsigned>(word));
}

/* ---- products ---------------------------------------------------------------------------- */

/* The sum of a tile's row over the warps. */
template <int ROWS> __device__ float sum_of_warps(const float *sums, int row)
{
    float sum = 0;
#pragma unroll
    for (int w = 0; w < STREAM_WARPS; w++) sum += sums[w * ROWS + row];
    return sum;
}

/* ---- host -------------------------------------------------------------------------------- */

/* The inner products of all experts, if a block of it finds the shared memory; `apart`: see
 * moe_step. */
bool kl_cuda_moe_step_inner_takes(const moe_step_arguments &a, kl_weight_format format);
kl_status kl_cuda_moe_step_inner(const moe_step_arguments &a, const kl_moe_experts *experts,
                                 bool apart, cudaStream_t stream, kl_error *err);

/* Likewise the sum of the experts, of moe_step::apart. */
bool kl_cuda_moe_step_apart_takes(const moe_step_arguments &a, kl_weight_format format);
kl_status kl_cuda_moe_step_apart(const moe_step_arguments &a, kl_weight_format format,
                                 cudaStream_t stream, kl_error *err);

#endif
