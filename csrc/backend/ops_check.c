/*
 * ops_check.c -- the checks promised by ops.h, shared by every backend: rows, products, weights.
 * The mixers are in ops_check_mixer.c, experts and sampling in ops_check_head.c.
 */
#include "backend/check.h"

#define F32 KL_DTYPE_BIT(KL_F32)
#define I32 KL_DTYPE_BIT(KL_I32)

kl_status kl_check_embedding(const kl_embedding *a, kl_error *err)
{
    static const char op[] = "embedding";
    const int64_t T = a->out.shape[0], D = a->out.shape[1];
    const kl_rule rules[] = {
        {&a->out, "out", KL_ANY_FLOAT, KL_OUT, 2, {T, D}, NULL},
        {&a->ids, "ids", I32, 0, 1, {T}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    return kl_require_weight(op, "table", &a->table, 1, a->table.rows, D, KL_FLOAT_FORMATS,
                             err);
}

kl_status kl_check_gather(const kl_gather *a, kl_error *err)
{
    static const char op[] = "gather";
    const int64_t T = a->x.shape[0], D = a->x.shape[1], N = a->rows.shape[0];
    const kl_rule rules[] = {
        {&a->x, "x", KL_ANY_FLOAT, 0, 2, {T, D}, NULL},
        {&a->rows, "rows", I32, 0, 1, {N}, NULL},
        {&a->out, "out", kl_act_bit(&a->x), KL_OUT, 2, {N, D}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    return kl_require_range(op, "x.shape[0]", T, N > 0 ? 1 : 0, INT64_MAX, err);
}

kl_status kl_check_rms_norm(const kl_rms_norm *a, kl_error *err)
{
    static const char op[] = "rms_norm";
    const bool has_x = !kl_tensor_absent(&a->x);
    const kl_tensor *lead = has_x ? &a->x : &a->residual;
    const int64_t T = lead->shape[0], D = lead->shape[1];
    if (!has_x && kl_tensor_absent(&a->residual))
        return kl_fail(err, KL_ERR_VALUE, "%s: x or residual must be given", op);
    if (kl_tensor_absent(&a->out) && kl_tensor_absent(&a->residual))
        return kl_fail(err, KL_ERR_VALUE, "%s: out or residual must be given", op);
    const unsigned act = has_x                       ? kl_act_bit(&a->x)
                         : kl_tensor_absent(&a->out) ? KL_ANY_FLOAT
                                                     : kl_act_bit(&a->out);
    const kl_rule rules[] = {
        {&a->x, "x", KL_ANY_FLOAT, KL_ROWS | KL_OPT, 2, {T, D}, NULL},
        {&a->residual, "residual", F32 | act, KL_OPT | KL_OUT, 2, {T, D}, NULL},
        {&a->weight, "weight", F32, 0, 1, {D}, NULL},
        {&a->out, "out", act, KL_OPT | KL_OUT, 2, {T, D}, &a->x},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    return kl_tensor_absent(&a->out) ? KL_OK : kl_require_positive(op, "eps", a->eps, err);
}

kl_status kl_check_gated_rms_norm(const kl_gated_rms_norm *a, kl_error *err)
{
    static const char op[] = "gated_rms_norm";
    const int64_t T = a->x.shape[0], H = a->x.shape[1], D = a->x.shape[2];
    const unsigned act = kl_act_bit(&a->x);
    const kl_rule rules[] = {
        {&a->x, "x", KL_ANY_FLOAT, KL_ROWS, 3, {T, H, D}, NULL},
        {&a->z, "z", act, KL_ROWS, 3, {T, H, D}, NULL},
        {&a->weight, "weight", F32, 0, 1, {D}, NULL},
        {&a->out, "out", act, KL_OUT, 3, {T, H, D}, &a->x},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    return kl_require_positive(op, "eps", a->eps, err);
}

kl_status kl_check_linear(const kl_linear *a, kl_error *err)
{
    static const char op[] = "linear";
    const int64_t T = a->x.shape[0], in = a->x.shape[1], O = a->out.shape[1];
    const kl_rule rules[] = {
        {&a->x, "x", KL_ANY_FLOAT, KL_ROWS, 2, {T, in}, NULL},
        {&a->out, "out", F32 | kl_act_bit(&a->x), KL_ROWS | KL_OUT, 2, {T, O}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    return kl_require_weight(op, "w", &a->w, 1, O, in, KL_ANY_FORMAT, err);
}

kl_status kl_check_linear_pair(const kl_linear_pair *a, kl_error *err)
{
    static const char op[] = "linear_pair";
    const kl_linear *f = &a->first, *s = &a->second;
    const int64_t T = f->x.shape[0], O[] = {f->out.shape[1], s->out.shape[1]};
    const kl_rule rules[] = {
        {&f->x, "first.x", KL_ANY_FLOAT, KL_ROWS, 2, {T, f->x.shape[1]}, NULL},
        {&s->x, "second.x", kl_act_bit(&f->x), KL_ROWS, 2, {T, s->x.shape[1]}, NULL},
        {&f->out, "first.out", F32 | kl_act_bit(&f->x), KL_ROWS | KL_OUT, 2, {T, O[0]}, NULL},
        {&s->out, "second.out", F32 | kl_act_bit(&f->x), KL_ROWS | KL_OUT, 2, {T, O[1]}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_weight(op, "first.w", &f->w, 1, O[0], f->x.shape[1], KL_ANY_FORMAT, err));
    return kl_require_weight(op, "second.w", &s->w, 1, O[1], s->x.shape[1], KL_ANY_FORMAT, err);
}

kl_status kl_check_mlp(const kl_mlp *a, kl_error *err)
{
    static const char op[] = "mlp";
    const int64_t T = a->x.shape[0], D = a->x.shape[1], inner = a->w1.rows;
    const kl_rule rules[] = {
        {&a->x, "x", KL_ANY_FLOAT, 0, 2, {T, D}, NULL},
        {&a->out, "out", kl_act_bit(&a->x), KL_OUT, 2, {T, D}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_weight(op, "w1", &a->w1, 1, inner, D, KL_ANY_FORMAT, err));
    KL_TRY(kl_require_weight(op, "w3", &a->w3, 1, inner, D, KL_ANY_FORMAT, err));
    return kl_require_weight(op, "w2", &a->w2, 1, D, inner, KL_ANY_FORMAT, err);
}

kl_status kl_check_pack_weight(const kl_pack_weight *a, kl_error *err)
{
    static const char op[] = "pack_weight";
    const int64_t rows = a->src.shape[0], cols = a->src.shape[1];
    const kl_rule rules[] = {
        {&a->src, "src", KL_ANY_FLOAT, KL_ROWS, 2, {rows, cols}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    return kl_require_weight(op, "out", &a->out, 1, rows, cols, KL_ANY_FORMAT, err);
}

kl_status kl_check_fill_normal(const kl_fill_normal *a, kl_error *err)
{
    static const char op[] = "fill_normal";
    KL_TRY(kl_require_range(op, "out.ndim", a->out.ndim, 0, KL_MAX_NDIM, err));
    kl_rule rule = {&a->out, "out", KL_ANY_FLOAT, KL_OUT | KL_EMPTY, a->out.ndim, {0}, NULL};
    for (int i = 0; i < a->out.ndim; i++) rule.shape[i] = a->out.shape[i];
    KL_TRY(kl_require_tensors(op, &rule, 1, err));
    KL_TRY(kl_require_finite(op, "mean", a->mean, err));
    if (a->std < 0)
        return kl_fail(err, KL_ERR_VALUE, "%s: std must be >= 0, got %g", op, (double)a->std);
    return kl_require_finite(op, "std", a->std, err);
}
