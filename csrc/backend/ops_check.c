/*
 * ops_check.c -- the checks promised by ops.h, shared by every backend: rows, products, weights.
 * The mixers are in ops_check_mixer.c, experts and sampling in ops_check_head.c.
 */
#include "backend/check.h"

#define F32 KL_DTYPE_BIT(KL_F32)
#define I32 KL_DTYPE_BIT(KL_I32)
#define U8  KL_DTYPE_BIT(KL_U8)

/* Memory that an embedding sets. */
static kl_status check_set(const char *op, const char *name, const kl_tensor *t, kl_error *err)
{
    KL_TRY(kl_require_aligned(op, name, t->data, KL_SUMS_ALIGNMENT, err));
    if (t->shape[0] % KL_SUMS_ALIGNMENT == 0) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "%s: %s.shape[0] must be a multiple of %d, got %lld", op,
                   name, KL_SUMS_ALIGNMENT, (long long)t->shape[0]);
}

kl_status kl_check_embedding(const kl_embedding *a, kl_error *err)
{
    static const char op[] = "embedding";
    const int64_t T = a->out.shape[0], D = a->out.shape[1];
    const kl_rule rules[] = {
        {&a->out, "out", KL_ANY_FLOAT, KL_OUT, 2, {T, D}, NULL},
        {&a->ids, "ids", I32, 0, 1, {T}, NULL},
        {&a->sums, "sums", U8, KL_OPT | KL_OUT, 1, {a->sums.shape[0]}, NULL},
        {&a->blanks, "blanks", U8, KL_OPT | KL_OUT, 1, {a->blanks.shape[0]}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(check_set(op, "sums", &a->sums, err));
    KL_TRY(check_set(op, "blanks", &a->blanks, err));
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
        {&a->residual, "residual", F32 | act, KL_ROWS | KL_OPT | KL_OUT, 2, {T, D}, NULL},
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

/* ---- products -------------------------------------------------------------------------- */

/* Names of a map's arguments, as messages have them. */
typedef struct {
    const char *x, *w, *out, *norm_weight, *residual, *act, *norm_eps, *peaks;
} map_names;

static const map_names ALONE = {"x",        "w",   "out",      "norm_weight",
                                "residual", "act", "norm_eps", "peaks"};
static const map_names FIRST = {"first.x",           "first.w",        "first.out",
                                "first.norm_weight", "first.residual", "first.act",
                                "first.norm_eps",    "first.peaks"};
static const map_names SECOND = {"second.x",           "second.w",        "second.out",
                                 "second.norm_weight", "second.residual", "second.act",
                                 "second.norm_eps",    "second.peaks"};

enum { MAP_RULES = 4 };

static int64_t width_of(const kl_linear *a)
{
    return kl_tensor_absent(&a->out) ? a->residual.shape[1] : a->out.shape[1];
}

/* The tensors of a map from T tokens: `act` bit of its activations, flags of x and out. */
static void map_rules(const kl_linear *a, const map_names *n, int64_t T, unsigned act,
                      unsigned flags, kl_rule rules[MAP_RULES])
{
    const int64_t in = a->x.shape[1], O = width_of(a);
    const bool norms = !kl_tensor_absent(&a->norm_weight);
    const unsigned x = norms ? F32 | act : KL_ANY_FLOAT, out = KL_OUT | KL_OPT;
    rules[0] = (kl_rule){&a->x, n->x, x, flags, 2, {T, in}, NULL};
    rules[1] = (kl_rule){&a->norm_weight, n->norm_weight, F32, KL_OPT, 1, {in}, NULL};
    rules[2] = (kl_rule){&a->out, n->out, F32 | act, flags | out, 2, {T, O}, NULL};
    rules[3] = (kl_rule){&a->residual, n->residual, F32, out, 2, {T, O}, NULL};
}

/* What tables do not say of a map: its norm's numbers, and one place for the result. */
static kl_status check_ends(const char *op, const kl_linear *a, const map_names *n,
                            kl_error *err)
{
    const bool norms = !kl_tensor_absent(&a->norm_weight);
    const bool has_out = !kl_tensor_absent(&a->out);
    if (has_out && !kl_tensor_absent(&a->residual))
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must be absent with a residual", op, n->out);
    if (!has_out && kl_tensor_absent(&a->residual))
        return kl_fail(err, KL_ERR_VALUE, "%s: %s or %s must be given", op, n->out,
                       n->residual);
    if (!norms) return KL_OK;
    if (a->act != KL_F32 && a->act != KL_BF16)
        return kl_fail(err, KL_ERR_TYPE, "%s: %s must be float32 or bfloat16, got %s", op,
                       n->act, (unsigned)a->act < KL_N_DTYPES ? kl_dtype_name(a->act) : "?");
    return kl_require_positive(op, n->norm_eps, a->norm_eps, err);
}

/* Of one of two maps. */
static kl_status check_no_peaks(const char *op, const kl_linear *a, const map_names *n,
                                kl_error *err)
{
    if (kl_tensor_absent(&a->peaks)) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "%s: %s must be absent", op, n->peaks);
}

/* x as it arrives, which a norm would have to read twice. */
static kl_status check_arriving(const char *op, const kl_linear *a, kl_error *err)
{
    if (!a->arriving) return KL_OK;
    if (kl_tensor_absent(&a->norm_weight)) return kl_require_arriving(op, "x", &a->x, err);
    return kl_fail(err, KL_ERR_VALUE, "%s: norm_weight must be absent with an arriving x", op);
}

/* The act of a map whose x may still be anything. */
static unsigned act_bit_of(const kl_linear *a)
{
    if (kl_tensor_absent(&a->norm_weight)) return kl_act_bit(&a->x);
    return KL_DTYPE_BIT(a->act);
}

/* After the map's own tensors. */
static kl_status check_ahead(const char *op, const kl_linear *a, kl_error *err)
{
    const kl_router_ahead *const ahead = &a->ahead;
    const int64_t D = width_of(a);
    const kl_rule rules[] = {
        {&ahead->norm_weight, "ahead.norm_weight", F32, 0, 1, {D}, NULL},
    };
    if (ahead->sums == NULL) return KL_OK;
    if (kl_tensor_absent(&a->residual))
        return kl_fail(err, KL_ERR_VALUE, "%s: ahead.sums must be NULL without a residual", op);
    if (a->x.shape[0] != 1)
        return kl_fail(err, KL_ERR_VALUE, "%s: x.shape[0] must be 1 with ahead.sums, got %lld",
                       op, (long long)a->x.shape[0]);
    KL_TRY(kl_require_aligned(op, "ahead.sums", ahead->sums, KL_SUMS_ALIGNMENT, err));
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_weight(op, "ahead.router", &ahead->router, 1, ahead->router.rows, D,
                             KL_ANY_FORMAT, err));
    if (ahead->router.format == KL_W_F32) return KL_OK;
    return kl_fail(err, KL_ERR_TYPE, "%s: ahead.router must be float32, got %s", op,
                   kl_weight_format_name(ahead->router.format));
}

kl_status kl_check_linear(const kl_linear *a, kl_error *err)
{
    static const char op[] = "linear";
    const int64_t T = a->x.shape[0];
    kl_rule rules[MAP_RULES + 1];
    KL_TRY(check_ends(op, a, &ALONE, err));
    map_rules(a, &ALONE, T, act_bit_of(a), KL_ROWS, rules);
    rules[MAP_RULES] = (kl_rule){
        &a->peaks, ALONE.peaks, F32, KL_OUT | KL_OPT, 3, {T, kl_peaks_of(width_of(a)), 2},
        NULL};
    if (!kl_tensor_absent(&a->peaks)) {
        if (kl_tensor_absent(&a->out))
            return kl_fail(err, KL_ERR_VALUE, "%s: peaks must be absent without an out", op);
        rules[2].dtypes = F32;
    }
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_aligned(op, "peaks", a->peaks.data, 2 * sizeof(float), err));
    KL_TRY(
        kl_require_weight(op, "w", &a->w, 1, width_of(a), a->x.shape[1], KL_ANY_FORMAT, err));
    KL_TRY(check_arriving(op, a, err));
    return check_ahead(op, a, err);
}

kl_status kl_check_linear_pair(const kl_linear_pair *a, kl_error *err)
{
    static const char op[] = "linear_pair";
    const kl_linear *f = &a->first, *s = &a->second;
    kl_rule rules[2 * MAP_RULES];
    KL_TRY(check_ends(op, f, &FIRST, err));
    KL_TRY(check_ends(op, s, &SECOND, err));
    if (f->ahead.sums != NULL || s->ahead.sums != NULL)
        return kl_fail(err, KL_ERR_VALUE, "%s: %s.ahead.sums must be NULL", op,
                       f->ahead.sums != NULL ? "first" : "second");
    if (f->arriving || s->arriving)
        return kl_fail(err, KL_ERR_VALUE, "%s: %s.arriving must be false", op,
                       f->arriving ? "first" : "second");
    KL_TRY(check_no_peaks(op, f, &FIRST, err));
    KL_TRY(check_no_peaks(op, s, &SECOND, err));
    const unsigned act = act_bit_of(f);
    if (!kl_tensor_absent(&s->norm_weight) && KL_DTYPE_BIT(s->act) != act)
        return kl_fail(err, KL_ERR_TYPE, "%s: second.act must be the first's, got %s", op,
                       kl_dtype_name(s->act));
    map_rules(f, &FIRST, f->x.shape[0], act, KL_ROWS, rules);
    map_rules(s, &SECOND, f->x.shape[0], act, KL_ROWS, rules + MAP_RULES);
    if (kl_tensor_absent(&s->norm_weight)) rules[MAP_RULES].dtypes = act;
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_weight(op, FIRST.w, &f->w, 1, width_of(f), f->x.shape[1], KL_ANY_FORMAT,
                             err));
    return kl_require_weight(op, SECOND.w, &s->w, 1, width_of(s), s->x.shape[1], KL_ANY_FORMAT,
                             err);
}

/* Its ends are those of one map. */
kl_status kl_check_mlp(const kl_mlp *a, kl_error *err)
{
    static const char op[] = "mlp";
    const int64_t T = a->x.shape[0], D = a->x.shape[1], inner = a->w1.rows;
    const kl_linear ends = {.x = a->x,
                            .out = a->out,
                            .norm_weight = a->norm_weight,
                            .residual = a->residual,
                            .act = a->act,
                            .norm_eps = a->norm_eps};
    kl_rule rules[MAP_RULES];
    KL_TRY(check_ends(op, &ends, &ALONE, err));
    map_rules(&ends, &ALONE, T, act_bit_of(&ends), 0, rules);
    rules[2].dtypes = act_bit_of(&ends);
    rules[2].shape[1] = rules[3].shape[1] = D;
    rules[3].may_be = &ends.x;
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_weight(op, "w1", &a->w1, 1, inner, D, KL_ANY_FORMAT, err));
    KL_TRY(kl_require_weight(op, "w3", &a->w3, 1, inner, D, KL_ANY_FORMAT, err));
    return kl_require_weight(op, "w2", &a->w2, 1, D, inner, KL_ANY_FORMAT, err);
}

/* ---- weights and their making ---------------------------------------------------------- */

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
