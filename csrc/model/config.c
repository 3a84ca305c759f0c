/*
 * config.c -- the bounds that every later product of two dimensions relies on.
 *
 * The largest tensor is a layer's stack of experts: at most 2^14 experts of 2^18 x 2^16 values
 * of 4 bytes, 2^50 bytes; three of them in 512 layers stay below 2^61. So sums and products of
 * sizes that come from a checked configuration cannot wrap an int64_t or a size_t.
 */
#include "model/config.h"

#include <math.h>

#define MAX_VOCAB        (INT64_C(1) << 24)
#define MAX_HIDDEN       (INT64_C(1) << 16)
#define MAX_HEADS        (INT64_C(1) << 12)
#define MAX_RANK         (INT64_C(1) << 14)
#define MAX_INNER        (INT64_C(1) << 20)
#define MAX_EXPERT_INNER (INT64_C(1) << 18)
#define MAX_EXPERTS      (INT64_C(1) << 14)
#define MAX_WIDTH        (INT64_C(1) << 20) /* heads * channels, the widest row of a matrix */

typedef struct {
    const char *name;
    int64_t value, low, high;
} bound;

static kl_status check_bounds(const bound *bounds, int n, kl_error *err)
{
    for (int i = 0; i < n; i++) {
        const bound *b = &bounds[i];
        if (b->value < b->low || b->value > b->high)
            return kl_fail(err, KL_ERR_CONFIG, "config: %s must be in [%lld, %lld], got %lld",
                           b->name, (long long)b->low, (long long)b->high, (long long)b->value);
    }
    return KL_OK;
}

#define CHECK_BOUNDS(bounds, err)                                                              \
    KL_TRY(check_bounds((bounds), (int)(sizeof(bounds) / sizeof(bounds)[0]), (err)))

static kl_status check_positive(const char *name, double value, kl_error *err)
{
    if (!(isfinite(value) && value > 0.0))
        return kl_fail(err, KL_ERR_CONFIG, "config: %s must be finite and > 0, got %g", name,
                       value);
    return KL_OK;
}

static kl_status check_width(const char *name, int64_t heads, int64_t channels, kl_error *err)
{
    if (heads * channels > MAX_WIDTH)
        return kl_fail(err, KL_ERR_CONFIG, "config: %s must be at most %lld, got %lld * %lld",
                       name, (long long)MAX_WIDTH, (long long)heads, (long long)channels);
    return KL_OK;
}

static kl_status check_layers(const kl_config *c, kl_error *err)
{
    for (int64_t i = 0; i < c->n_layers; i++) {
        if (c->mixer[i] != KL_MIXER_KDA && c->mixer[i] != KL_MIXER_MLA)
            return kl_fail(err, KL_ERR_CONFIG, "config: mixer[%lld] must be kda or mla, got %d",
                           (long long)i, c->mixer[i]);
        if (c->ffn[i] != KL_FFN_DENSE && c->ffn[i] != KL_FFN_MOE)
            return kl_fail(err, KL_ERR_CONFIG, "config: ffn[%lld] must be dense or moe, got %d",
                           (long long)i, c->ffn[i]);
    }
    return KL_OK;
}

static kl_status check_kda(const kl_config *c, kl_error *err)
{
    const bound bounds[] = {
        {"kda_heads", c->kda_heads, 1, MAX_HEADS},
        {"kda_head_dim", c->kda_head_dim, 1, KL_KDA_MAX_K},
        {"conv_width", c->conv_width, 1, 8},
    };
    CHECK_BOUNDS(bounds, err);
    if (c->gate != KL_GATE_SOFTPLUS && c->gate != KL_GATE_BOUNDED)
        return kl_fail(err, KL_ERR_CONFIG, "config: gate must be softplus or bounded, got %d",
                       (int)c->gate);
    if (c->gate == KL_GATE_BOUNDED &&
        !(isfinite(c->gate_lower_bound) && c->gate_lower_bound < 0.0f))
        return kl_fail(err, KL_ERR_CONFIG,
                       "config: gate_lower_bound must be finite and < 0, got %g",
                       (double)c->gate_lower_bound);
    return check_width("kda_heads * kda_head_dim", c->kda_heads, c->kda_head_dim, err);
}

static kl_status check_mla(const kl_config *c, kl_error *err)
{
    const bound bounds[] = {
        {"mla_heads", c->mla_heads, 1, MAX_HEADS}, {"q_rank", c->q_rank, 0, MAX_RANK},
        {"kv_rank", c->kv_rank, 1, MAX_RANK},      {"nope_dim", c->nope_dim, 1, MAX_RANK},
        {"rope_dim", c->rope_dim, 0, MAX_RANK},    {"v_dim", c->v_dim, 1, MAX_RANK},
    };
    CHECK_BOUNDS(bounds, err);
    KL_TRY(check_width("mla_heads * (nope_dim + rope_dim)", c->mla_heads,
                       c->nope_dim + c->rope_dim, err));
    KL_TRY(check_width("mla_heads * (nope_dim + v_dim)", c->mla_heads, c->nope_dim + c->v_dim,
                       err));
    if (c->q_rank > 0) KL_TRY(check_positive("q_norm_eps", (double)c->q_norm_eps, err));
    return check_positive("kv_norm_eps", (double)c->kv_norm_eps, err);
}

static kl_status check_moe(const kl_config *c, kl_error *err)
{
    const bound bounds[] = {
        {"n_experts", c->n_experts, 1, MAX_EXPERTS},
        {"top_k", c->top_k, 1, c->n_experts},
        {"moe_inner", c->moe_inner, 1, MAX_EXPERT_INNER},
        {"n_shared", c->n_shared, 0, 64},
        {"groups", c->groups, 1, c->n_experts},
        {"top_groups", c->top_groups, 1, c->groups},
    };
    CHECK_BOUNDS(bounds, err);
    if (c->n_experts % c->groups != 0)
        return kl_fail(err, KL_ERR_CONFIG,
                       "config: n_experts must be a multiple of groups, got %lld and %lld",
                       (long long)c->n_experts, (long long)c->groups);
    if (c->top_k > c->top_groups * (c->n_experts / c->groups))
        return kl_fail(err, KL_ERR_CONFIG,
                       "config: top_k must be at most the experts of top_groups groups, got "
                       "%lld of %lld groups of %lld",
                       (long long)c->top_k, (long long)c->top_groups,
                       (long long)(c->n_experts / c->groups));
    if (c->score != KL_SCORE_SIGMOID && c->score != KL_SCORE_SOFTMAX)
        return kl_fail(err, KL_ERR_CONFIG, "config: score must be sigmoid or softmax, got %d",
                       (int)c->score);
    KL_TRY(check_width("moe_inner * n_shared", c->moe_inner, c->n_shared, err));
    return check_positive("routed_scaling", (double)c->routed_scaling, err);
}

static int64_t count_ffn(const kl_config *c, kl_ffn ffn)
{
    int64_t n = 0;
    for (int64_t i = 0; i < c->n_layers; i++) n += c->ffn[i] == ffn;
    return n;
}

kl_status kl_config_check(const kl_config *c, kl_error *err)
{
    const bound bounds[] = {
        {"vocab_size", c->vocab_size, 1, MAX_VOCAB},
        {"hidden_size", c->hidden_size, 1, MAX_HIDDEN},
        {"n_layers", c->n_layers, 1, KL_MAX_LAYERS},
        {"max_length", c->max_length, 1, INT32_MAX},
    };
    CHECK_BOUNDS(bounds, err);
    KL_TRY(check_layers(c, err));
    KL_TRY(check_positive("rms_eps", (double)c->rms_eps, err));
    if (kl_config_count(c, KL_MIXER_KDA) > 0) KL_TRY(check_kda(c, err));
    if (kl_config_count(c, KL_MIXER_MLA) > 0) KL_TRY(check_mla(c, err));
    if (count_ffn(c, KL_FFN_MOE) > 0) KL_TRY(check_moe(c, err));
    if (count_ffn(c, KL_FFN_DENSE) == 0) return KL_OK;
    const bound dense[] = {{"dense_inner", c->dense_inner, 1, MAX_INNER}};
    CHECK_BOUNDS(dense, err);
    return KL_OK;
}
