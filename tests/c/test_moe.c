/*
 * test_moe.c -- a layer of experts with its router has the bits of its parts, one after the other:
 * on the CPU and, where KL_CUDA_LIBRARY finds a device, on CUDA, beside the CPU's results.
 */
#include "pieces.h"

#include "backend/moe.h"

static void moe_whole(kl_backend *be, void *call)
{
    kl_moe *const a = call;
    RUN_THERE(moe, be, a);
}

static void moe_pieces(kl_backend *be, void *call)
{
    const kl_moe *const a = call;
    kl_error err;
    void *scratch;
    const size_t bytes = kl_moe_parts_of(a, NULL).bytes;
    EXPECT(be->vt->alloc(be, bytes, &scratch, &err) == KL_OK);
    kl_moe_parts p = kl_moe_parts_of(a, scratch);
    if (!kl_tensor_absent(&a->norm_weight)) RUN_THERE(rms_norm, be, &p.norm);
    RUN_THERE(linear, be, &p.router);
    RUN_THERE(moe_route, be, &p.route);
    RUN_THERE(moe_experts, be, &p.experts);
    p.add.weight.data = scratch; /* not read, but looked for */
    if (!kl_tensor_absent(&a->residual)) RUN_THERE(rms_norm, be, &p.add);
    be->vt->free(be, scratch, bytes);
}

typedef struct {
    int64_t T, D, I, shared, E; /* shared: its width, or 0 without */
    int top_k, groups;
    kl_weight_format format, router;
} moe_case;

static kl_weight stack(kl_weight_format format, int64_t count, int64_t rows, int64_t cols)
{
    kl_weight w = weight(format, count * rows, cols);
    w.count = count, w.rows = rows;
    return w;
}

static kl_moe moe_of(const moe_case *c, kl_dtype act, bool step)
{
    const int64_t n = c->T, D = c->D, E = c->E;
    kl_moe a = {.x = tensor(step ? KL_F32 : act, false, 2, n, D, 1, 1),
                .router = weight(c->router, E, D),
                .bias = tensor(KL_F32, false, 1, E, 1, 1, 1),
                .w1 = stack(c->format, E, c->I, D),
                .w3 = stack(c->format, E, c->I, D),
                .w2 = stack(c->format, E, D, c->I),
                .act = act,
                .score = c->groups > 1 ? KL_SCORE_SOFTMAX : KL_SCORE_SIGMOID,
                .top_k = c->top_k,
                .groups = c->groups,
                .top_groups = c->groups > 1 ? 2 : 1,
                .norm_eps = 1e-5f,
                .scaling = 2.446f,
                .renormalize = true};
    if (step)
        a.norm_weight = tensor(KL_F32, false, 1, D, 1, 1, 1),
        a.residual = tensor(KL_F32, false, 2, n, D, 1, 1);
    else
        a.out = tensor(act, true, 2, n, D, 1, 1);
    if (c->shared == 0) return a;
    a.shared_w1 = weight(c->format, c->shared, D);
    a.shared_w3 = weight(c->format, c->shared, D);
    a.shared_w2 = weight(c->format, D, c->shared);
    return a;
}

static kl_weight widened_stack(const kl_weight *w)
{
    kl_weight flat = *w;
    flat.rows *= flat.count, flat.count = 1;
    flat = widened(&flat);
    flat.rows = w->rows, flat.count = w->count;
    return flat;
}

static kl_moe widened_moe(const kl_moe *a, bool shared)
{
    kl_moe wide = *a;
    wide.w1 = widened_stack(&a->w1), wide.w3 = widened_stack(&a->w3);
    wide.w2 = widened_stack(&a->w2);
    if (!shared) return wide;
    wide.shared_w1 = widened(&a->shared_w1), wide.shared_w3 = widened(&a->shared_w3);
    wide.shared_w2 = widened(&a->shared_w2);
    return wide;
}

/* step: with the norm before and the sum after, as a step of few tokens has it. CUDA's kernel for
 * a single token sums the squares of the norm in an order of its own. */
static void check_moe(const moe_case *c, kl_dtype act, bool step)
{
    parts p = {0};
    kl_moe a = moe_of(c, act, step);
    kl_moe wide = widened_moe(&a, c->shared > 0);
    char name[96];
    snprintf(name, sizeof name, "moe: act %d, step %d, T %lld, D %lld, E %lld, format %d", act,
             step, (long long)c->T, (long long)c->D, (long long)c->E, c->format);
    IN(a.x);
    IN(a.norm_weight);
    IN(a.bias);
    WEIGHT(a.router);
    WEIGHT(a.w1);
    WEIGHT(a.w3);
    WEIGHT(a.w2);
    OUT(a.out, bound_of_experts(act, c->format));
    OUT(a.residual, bound_of_experts(act, c->format));
    if (c->shared > 0) {
        WEIGHT(a.shared_w1);
        WEIGHT(a.shared_w3);
        WEIGHT(a.shared_w2);
    }
    if (wide.w1.data == a.w1.data)
        same_bits(cpu, &p, &a, sizeof a, moe_whole, moe_pieces, name);
    if (cuda != NULL) {
        if (!step || c->T > 1 || act == KL_F32)
            same_bits(cuda, &p, &a, sizeof a, moe_whole, moe_pieces, name);
        ON_BOTH_AS(moe, wide, a, name);
    }
    used = 0;
}

/* Any shape; then a single token in multiples of 64, which CUDA has kernels for: without a shared
 * expert, with a narrower and a wider one, an odd number of 64-byte steps a row, all of 256 experts,
 * more columns than all warps have at a time. */
static void moes(void)
{
    static const moe_case cases[] = {
        {1, 33, 7, 9, 5, 2, 1, KL_W_F32, KL_W_F32},
        {5, 64, 31, 0, 8, 3, 4, KL_W_INT8, KL_W_BF16},
        {40, 24, 10, 20, 6, 4, 1, KL_W_BF16, KL_W_F32},
        {1, 192, 64, 128, 12, 4, 2, KL_W_BF16, KL_W_F32},
    };
    static const moe_case single[] = {
        {1, 192, 192, 64, 12, 4, 1, 0, KL_W_F32}, {1, 64, 64, 128, 12, 3, 1, 0, KL_W_F32},
        {1, 64, 64, 0, 256, 8, 1, 0, KL_W_F32},   {1, 320, 128, 128, 9, 8, 1, 0, KL_W_BF16},
        {1, 1408, 64, 64, 4, 4, 1, 0, KL_W_F32},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int j = 0; j < 2; j++)
            for (int step = 0; step < 2; step++) check_moe(&cases[i], ACTS[j], step == 1);
    for (size_t i = 0; i < sizeof single / sizeof *single; i++)
        for (kl_weight_format f = KL_W_F32; f < KL_N_WEIGHT_FORMATS; f++)
            for (int step = 0; step < 2; step++) {
                moe_case c = single[i];
                c.format = f;
                check_moe(&c, KL_BF16, step == 1);
            }
}

int main(void)
{
    open_both();
    RUN(moes);
    return close_both();
}
