/*
 * ops_check_head.c -- the checks of experts, log-probabilities and sampling.
 */
#include "backend/check.h"

#define F32 KL_DTYPE_BIT(KL_F32)
#define I32 KL_DTYPE_BIT(KL_I32)
#define U8  KL_DTYPE_BIT(KL_U8)

#define MAX_TOP 256

/* ---- experts --------------------------------------------------------------------------- */

/* How E experts are chosen from; `name` is where the call says how many. */
static kl_status check_choice(const char *op, const kl_moe_route *a, int64_t E,
                              const char *name, int64_t top_k, kl_error *err)
{
    KL_TRY(kl_require_range(op, "score", a->score, 0, KL_N_SCORES - 1, err));
    KL_TRY(kl_require_finite(op, "scaling", a->scaling, err));
    KL_TRY(kl_require_range(op, "groups", a->groups, 1, E, err));
    KL_TRY(kl_require_range(op, "top_groups", a->top_groups, 1, a->groups, err));
    if (E % a->groups != 0)
        return kl_fail(err, KL_ERR_VALUE, "%s: groups must divide the %lld experts, got %d", op,
                       (long long)E, a->groups);
    const int64_t size = E / a->groups;
    if (a->groups > 1) /* a group is ranked by its two best */
        KL_TRY(kl_require_range(op, "experts of a group", size, 2, INT64_MAX, err));
    return kl_require_range(op, name, top_k, 1, size * a->top_groups, err);
}

kl_status kl_check_moe_route(const kl_moe_route *a, kl_error *err)
{
    static const char op[] = "moe_route";
    const int64_t T = a->logits.shape[0], E = a->logits.shape[1], top_k = a->ids.shape[1];
    const kl_rule rules[] = {
        {&a->logits, "logits", F32, 0, 2, {T, E}, NULL},
        {&a->bias, "bias", F32, KL_OPT, 1, {E}, NULL},
        {&a->ids, "ids", I32, KL_OUT, 2, {T, top_k}, NULL},
        {&a->weights, "weights", F32, KL_OUT, 2, {T, top_k}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    return check_choice(op, a, E, "ids.shape[1]", top_k, err);
}

static kl_status check_shared(const char *op, const kl_moe_experts *a, int64_t D, kl_error *err)
{
    const int n =
        (a->shared_w1.data != NULL) + (a->shared_w3.data != NULL) + (a->shared_w2.data != NULL);
    const int64_t inner = a->shared_w1.rows;
    if (n == 0) return KL_OK;
    if (n != 3)
        return kl_fail(err, KL_ERR_VALUE,
                       "%s: shared_w1, shared_w3 and shared_w2 must come together, got %d of 3",
                       op, n);
    KL_TRY(kl_require_weight(op, "shared_w1", &a->shared_w1, 1, inner, D, KL_ANY_FORMAT, err));
    KL_TRY(kl_require_weight(op, "shared_w3", &a->shared_w3, 1, inner, D, KL_ANY_FORMAT, err));
    return kl_require_weight(op, "shared_w2", &a->shared_w2, 1, D, inner, KL_ANY_FORMAT, err);
}

static kl_status check_experts(const char *op, const kl_moe_experts *a, int64_t D,
                               kl_error *err)
{
    const int64_t E = a->w1.count, inner = a->w1.rows;
    KL_TRY(kl_require_weight(op, "w1", &a->w1, E, inner, D, KL_ANY_FORMAT, err));
    KL_TRY(kl_require_weight(op, "w3", &a->w3, E, inner, D, KL_ANY_FORMAT, err));
    KL_TRY(kl_require_weight(op, "w2", &a->w2, E, D, inner, KL_ANY_FORMAT, err));
    return check_shared(op, a, D, err);
}

kl_status kl_check_moe_experts(const kl_moe_experts *a, kl_error *err)
{
    static const char op[] = "moe_experts";
    const int64_t T = a->x.shape[0], D = a->x.shape[1], top_k = a->ids.shape[1];
    const kl_rule rules[] = {
        {&a->x, "x", KL_ANY_FLOAT, 0, 2, {T, D}, NULL},
        {&a->ids, "ids", I32, 0, 2, {T, top_k}, NULL},
        {&a->weights, "weights", F32, 0, 2, {T, top_k}, NULL},
        {&a->out, "out", kl_act_bit(&a->x), KL_OUT, 2, {T, D}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(check_experts(op, a, D, err));
    return kl_require_range(op, "ids.shape[1]", top_k, 1, a->w1.count, err);
}

/* The dtype of h, and one place for the result. */
static kl_status check_moe_ends(const char *op, const kl_moe *a, kl_error *err)
{
    const bool has_out = !kl_tensor_absent(&a->out);
    if (has_out && !kl_tensor_absent(&a->residual))
        return kl_fail(err, KL_ERR_VALUE, "%s: out must be absent with a residual", op);
    if (!has_out && kl_tensor_absent(&a->residual))
        return kl_fail(err, KL_ERR_VALUE, "%s: out or residual must be given", op);
    if (a->sums != NULL && kl_tensor_absent(&a->norm_weight))
        return kl_fail(err, KL_ERR_VALUE, "%s: sums must be NULL without a norm_weight", op);
    if (a->sums != NULL && a->x.shape[0] != 1)
        return kl_fail(err, KL_ERR_VALUE, "%s: x.shape[0] must be 1 with sums, got %lld", op,
                       (long long)a->x.shape[0]);
    KL_TRY(kl_require_aligned(op, "sums", a->sums, KL_SUMS_ALIGNMENT, err));
    if (kl_tensor_absent(&a->norm_weight) || a->act == KL_F32 || a->act == KL_BF16)
        return KL_OK;
    return kl_fail(err, KL_ERR_TYPE, "%s: act must be float32 or bfloat16, got %s", op,
                   (unsigned)a->act < KL_N_DTYPES ? kl_dtype_name(a->act) : "?");
}

kl_status kl_check_moe(const kl_moe *a, kl_error *err)
{
    static const char op[] = "moe";
    const int64_t T = a->x.shape[0], D = a->x.shape[1], E = a->w1.count;
    const bool normed = !kl_tensor_absent(&a->norm_weight);
    KL_TRY(check_moe_ends(op, a, err));
    const unsigned act = normed ? KL_DTYPE_BIT(a->act) : kl_act_bit(&a->x);
    const kl_rule rules[] = {
        {&a->x, "x", normed ? F32 | act : KL_ANY_FLOAT, 0, 2, {T, D}, NULL},
        {&a->norm_weight, "norm_weight", F32, KL_OPT, 1, {D}, NULL},
        {&a->bias, "bias", F32, KL_OPT, 1, {E}, NULL},
        {&a->residual, "residual", F32, KL_OPT | KL_OUT, 2, {T, D}, &a->x},
        {&a->out, "out", act, KL_OPT | KL_OUT, 2, {T, D}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    if (normed) KL_TRY(kl_require_positive(op, "norm_eps", a->norm_eps, err));
    KL_TRY(kl_require_weight(op, "router", &a->router, 1, E, D, KL_ANY_FORMAT, err));
    const kl_moe_experts experts = {.w1 = a->w1,
                                    .w3 = a->w3,
                                    .w2 = a->w2,
                                    .shared_w1 = a->shared_w1,
                                    .shared_w3 = a->shared_w3,
                                    .shared_w2 = a->shared_w2};
    KL_TRY(check_experts(op, &experts, D, err));
    const kl_moe_route route = {.score = a->score,
                                .groups = a->groups,
                                .top_groups = a->top_groups,
                                .scaling = a->scaling};
    return check_choice(op, &route, E, "top_k", a->top_k, err);
}

/* ---- log-probabilities and sampling ---------------------------------------------------- */

/* The alternatives' width n, after the tables have made both arrays [rows, n]. */
static kl_status check_top(const char *op, const kl_tensor *ids, const kl_tensor *logprobs,
                           int64_t vocab, kl_error *err)
{
    if (kl_tensor_absent(ids) != kl_tensor_absent(logprobs))
        return kl_fail(err, KL_ERR_VALUE, "%s: top_ids and top_logprobs must come together",
                       op);
    if (kl_tensor_absent(ids)) return KL_OK;
    const int64_t most = vocab < MAX_TOP ? vocab : MAX_TOP;
    return kl_require_range(op, "top_ids.shape[1]", ids->shape[1], 1, most, err);
}

kl_status kl_check_token_logprobs(const kl_token_logprobs *a, kl_error *err)
{
    static const char op[] = "token_logprobs";
    const int64_t T = a->hidden.shape[0], D = a->hidden.shape[1], n = a->top_ids.shape[1];
    const kl_rule rules[] = {
        {&a->hidden, "hidden", KL_ANY_FLOAT, 0, 2, {T, D}, NULL},
        {&a->targets, "targets", I32, 0, 1, {T}, NULL},
        {&a->logprobs, "logprobs", F32, KL_OUT, 1, {T}, NULL},
        {&a->greedy, "greedy", U8, KL_OUT, 1, {T}, NULL},
        {&a->top_ids, "top_ids", I32, KL_OPT | KL_OUT, 2, {T, n}, NULL},
        {&a->top_logprobs, "top_logprobs", F32, KL_OPT | KL_OUT, 2, {T, n}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    const int64_t rows = a->lm_head.rows;
    KL_TRY(kl_require_range(op, "lm_head.rows", rows, 1, INT32_MAX, err));
    KL_TRY(kl_require_weight(op, "lm_head", &a->lm_head, 1, rows, D, KL_ANY_FORMAT, err));
    return check_top(op, &a->top_ids, &a->top_logprobs, rows, err);
}

kl_status kl_check_sample(const kl_sample *a, kl_error *err)
{
    static const char op[] = "sample";
    const int64_t N = a->logits.shape[0], rows = a->logits.shape[1], n = a->top_ids.shape[1];
    const int64_t words = rows / 32 + (rows % 32 != 0);
    const kl_rule rules[] = {
        {&a->logits, "logits", F32, 0, 2, {N, rows}, NULL},
        {&a->peaks, "peaks", F32, KL_OPT, 3, {N, kl_peaks_of(rows), 2}, NULL},
        {&a->seen, "seen", I32, KL_OPT, 2, {N, words}, NULL},
        {&a->ids, "ids", I32, KL_OUT, 1, {N}, NULL},
        {&a->logprobs, "logprobs", F32, KL_OUT, 1, {N}, NULL},
        {&a->top_ids, "top_ids", I32, KL_OPT | KL_OUT, 2, {N, n}, NULL},
        {&a->top_logprobs, "top_logprobs", F32, KL_OPT | KL_OUT, 2, {N, n}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_aligned(op, "peaks", a->peaks.data, 2 * sizeof(float), err));
    KL_TRY(kl_require_range(op, "logits.shape[1]", rows, 1, INT32_MAX, err));
    if (N > 0 && a->sampling == NULL)
        return kl_fail(err, KL_ERR_VALUE, "%s: sampling must be given, got NULL", op);
    return check_top(op, &a->top_ids, &a->top_logprobs, rows, err);
}
