/*
 * test_moe.c -- a layer of experts with its router has the bits of its parts, one after the other:
 * on the CPU and, where KL_CUDA_LIBRARY finds a device, on CUDA, beside the CPU's results. There a
 * linear before it may do the router's work.
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
    const size_t bytes = kl_moe_parts_of(a, NULL).bytes;
    void *const scratch = poisoned(be, bytes);
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

/* ---- a router's work ahead --------------------------------------------------------------- */

/* The layer and the linear before it, whose residual its x is. */
typedef struct {
    kl_linear before;
    kl_moe moe;
} chain;

static double squares(const kl_tensor *t)
{
    double sum = 0;
    for (int64_t i = 0; i < kl_tensor_size(t); i++) sum += pow(value(t->dtype, t->data, i), 2);
    return sum;
}

/* An eps that makes the rms a power of two: CUDA rounds h before its division by the rms, the CPU
 * after it, and so both round the same. With a usual one h's two roundings, and those of all that
 * comes of it, have nothing to do with each other, and results lie 4e-3 apart that are each as
 * far from those in double. */
static float eps_for(const kl_tensor *x)
{
    const double mean = squares(x) / (double)kl_tensor_size(x);
    return isfinite(mean) ? (float)(pow(4, ceil(log2(mean) / 2)) - mean) : 1e-5f;
}

/* On the CPU, with logits of an h that is not rounded and an eps of its own. Returned is how much of
 * the result the experts made. */
static double chain_on_cpu(chain *a)
{
    kl_linear before = a->before;
    RUN_OP(linear, cpu, before);
    a->moe.norm_eps = eps_for(&a->moe.x);
    kl_moe_parts p = kl_moe_parts_of(&a->moe, NULL);
    p = kl_moe_parts_of(&a->moe, memory_of(p.bytes));
    RUN_OP(rms_norm, cpu, p.norm);
    p.norm.out = p.router.x = tensor(KL_F32, true, 2, 1, a->moe.x.shape[1], 1, 1);
    RUN_OP(rms_norm, cpu, p.norm);
    RUN_OP(linear, cpu, p.router);
    RUN_OP(moe_route, cpu, p.route);
    RUN_OP(moe_experts, cpu, p.experts);
    p.add.weight.data = p.router.x.data; /* not read, but looked for */
    RUN_OP(rms_norm, cpu, p.add);
    return sqrt(squares(&p.experts.out) / squares(&a->moe.residual));
}

/* What the experts made is as near as that of every operation. What the linear before rounds is the
 * same on both but where sums, 2e-6 apart, lie on two sides of a middle: one in 2000, by 2^-7. */
static double bound_of_chain(double share)
{
    return share * bound_of(KL_BF16) + sqrt(2e-6 * 256) / 128;
}

/* On CUDA; the result takes the place of the first residual. */
static void chain_on_cuda(chain *there)
{
    kl_error err;
    there->moe.x.data = there->moe.residual.data = there->before.residual.data;
    const size_t bytes = cuda->vt->router_sums(cuda, &there->before.w, &there->moe);
    void *sums = NULL;
    EXPECT(bytes > 0 && cuda->vt->alloc(cuda, bytes, &sums, &err) == KL_OK);
    EXPECT(cuda->vt->zero(cuda, sums, bytes, &err) == KL_OK);
    there->before.ahead = (kl_router_ahead){
        .router = there->moe.router, .norm_weight = there->moe.norm_weight, .sums = sums};
    there->moe.sums = sums;
    RUN_THERE(linear, cuda, &there->before);
    RUN_THERE(moe, cuda, &there->moe);
    cuda->vt->free(cuda, sums, bytes);
}

static chain chain_of(const moe_case *c, int64_t K)
{
    chain a = {.moe = moe_of(c, KL_BF16, true)};
    a.before.x = tensor(KL_BF16, false, 2, 1, K, 1, 1);
    a.before.w = weight(c->format, c->D, K);
    a.before.residual = a.moe.x;
    a.moe.residual = a.moe.x;
    return a;
}

/* The same calls twice, to the bit. */
static void same_residuals(const chain *a, const chain *b)
{
    const size_t bytes = (size_t)a->before.w.rows * sizeof(float);
    void *const x = kl_malloc(bytes), *const y = kl_malloc(bytes);
    kl_error err;
    EXPECT(cuda->vt->copy_out(cuda, x, a->before.residual.data, bytes, &err) == KL_OK);
    EXPECT(cuda->vt->copy_out(cuda, y, b->before.residual.data, bytes, &err) == KL_OK);
    EXPECT(cuda->vt->sync(cuda, &err) == KL_OK && memcmp(x, y, bytes) == 0);
    kl_free(x);
    kl_free(y);
}

/* spoiled: one number of the stream. */
static void check_chain(const moe_case *c, int64_t K, float spoiled)
{
    parts p = {0};
    chain a = chain_of(c, K), wide = a, there[2] = {a, a};
    char name[96];
    snprintf(name, sizeof name, "sums: K %lld, D %lld, E %lld, format %d, %g", (long long)K,
             (long long)c->D, (long long)c->E, c->format, (double)spoiled);
    if (spoiled != 0) put(&a.before.residual, c->D / 2, spoiled);
    wide.before.w = widened(&a.before.w);
    wide.moe = widened_moe(&a.moe, c->shared > 0);
    IN(a.before.x);
    WEIGHT(a.before.w);
    const int result = p.n;
    OUT(a.before.residual, 1);
    IN(a.moe.norm_weight);
    IN(a.moe.bias);
    WEIGHT(a.moe.router);
    WEIGHT(a.moe.w1);
    WEIGHT(a.moe.w3);
    WEIGHT(a.moe.w2);
    if (c->shared > 0) {
        WEIGHT(a.moe.shared_w1);
        WEIGHT(a.moe.shared_w3);
        WEIGHT(a.moe.shared_w2);
    }
    for (int i = 0; i < 2; i++) to_device(&p, &a, &there[i]);
    const double share = chain_on_cpu(&wide);
    p.parts[result].bound = bound_of_chain(spoiled == 0 ? share : 0);
    for (int i = 0; i < 2; i++) {
        there[i].moe.norm_eps = wide.moe.norm_eps;
        chain_on_cuda(&there[i]);
    }
    same_residuals(&there[0], &there[1]);
    from_device(name, &p, &a, &there[0]);
    for (int i = 0; i < p.n; i++) kl_free(back(cuda, &p.parts[i], &there[1]));
    used = 0;
}

/* The model's width and others; rows that the ring holds and, of 8192, blocks with several tiles;
 * what is not finite comes through. A linear of float32 weights leaves no sums. */
static void sums_of_the_linear_before(void)
{
    static const moe_case cases[] = {
        {1, 192, 192, 64, 12, 4, 1, 0, KL_W_F32},
        {1, 64, 64, 0, 256, 8, 1, 0, KL_W_F32},
        {1, 2304, 64, 64, 4, 4, 1, 0, KL_W_F32},
    };
    if (cuda == NULL) return;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (kl_weight_format f = KL_W_BF16; f < KL_N_WEIGHT_FORMATS; f++) {
            moe_case c = cases[i];
            c.format = f;
            check_chain(&c, i == 1 ? 512 : 256, 0);
            if (i == 2) check_chain(&c, 8192, 0);
            if (i == 0) check_chain(&c, 256, NAN);
            if (i == 0) check_chain(&c, 256, INFINITY);
        }
}

/* One number of the stream and the norm's weight of it, both finite; alarm: that they pass what the
 * sums can hold, so that everything is NaN. */
static void check_alarm(float x, float weight, bool alarm)
{
    const moe_case c = {1, 192, 192, 64, 12, 4, 1, KL_W_BF16, KL_W_F32};
    parts p = {0};
    chain a = chain_of(&c, 256), there = a;
    kl_error err;
    int n_nan = 0;
    put(&a.before.residual, c.D / 2, x);
    put(&a.moe.norm_weight, c.D / 2, weight);
    IN(a.before.x);
    WEIGHT(a.before.w);
    OUT(a.before.residual, 0);
    IN(a.moe.norm_weight);
    IN(a.moe.bias);
    WEIGHT(a.moe.router);
    WEIGHT(a.moe.w1);
    WEIGHT(a.moe.w3);
    WEIGHT(a.moe.w2);
    WEIGHT(a.moe.shared_w1);
    WEIGHT(a.moe.shared_w3);
    WEIGHT(a.moe.shared_w2);
    to_device(&p, &a, &there);
    chain_on_cuda(&there);
    const size_t bytes = (size_t)c.D * sizeof(float);
    float *const got = a.before.residual.data;
    EXPECT(cuda->vt->copy_out(cuda, got, there.before.residual.data, bytes, &err) == KL_OK);
    EXPECT(cuda->vt->sync(cuda, &err) == KL_OK);
    for (int64_t i = 0; i < c.D; i++) n_nan += isnan(got[i]);
    EXPECT(n_nan == (alarm ? c.D : 0));
    for (int i = 0; i < p.n; i++) kl_free(back(cuda, &p.parts[i], &there));
    used = 0;
}

/* Shares up to 2^22, with weights of the router up to 0.07; squares up to 2^45. */
static void sums_past_their_range_are_nan(void)
{
    if (cuda == NULL) return;
    check_alarm(1e5f, 1e6f, true);
    check_alarm(1e5f, -1e6f, true);
    check_alarm(1e7f, 1e-6f, true);
    check_alarm(1e5f, 1, false);
}

/* A linear of float32 weights leaves none, a layer in float32 reads none. */
static void sums_are_refused(void)
{
    const moe_case c = {1, 192, 192, 64, 12, 4, 1, KL_W_F32, KL_W_F32};
    chain a = chain_of(&c, 256);
    kl_error err = {KL_OK, ""};
    if (cuda == NULL) return;
    a.before.ahead = (kl_router_ahead){
        .router = a.moe.router, .norm_weight = a.moe.norm_weight, .sums = memory_of(1 << 16)};
    EXPECT(cuda->vt->router_sums(cuda, &a.before.w, &a.moe) == 0);
    EXPECT(cuda->vt->linear(cuda, &a.before, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "linear: ahead.sums must be NULL where router_sums() is 0");
    a.moe.sums = a.before.ahead.sums, a.moe.act = KL_F32;
    EXPECT(cuda->vt->moe(cuda, &a.moe, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "moe: sums must be NULL where router_sums() is 0");
    used = 0;
}

int main(void)
{
    open_both();
    RUN(moes);
    RUN(sums_of_the_linear_before);
    RUN(sums_past_their_range_are_nan);
    RUN(sums_are_refused);
    return close_both();
}
