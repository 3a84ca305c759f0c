/*
 * ops_check_mixer.c -- the checks of the operations that mix tokens: convolution, KDA, MLA.
 */
#include "backend/check.h"

#define F32 KL_DTYPE_BIT(KL_F32)
#define I32 KL_DTYPE_BIT(KL_I32)
#define U8  KL_DTYPE_BIT(KL_U8)

#define MAX_CONV_WIDTH 8

/* Sequences of a ragged call; -1, which no shape equals, when cu_seqlens cannot say. */
static int64_t ragged_count(const kl_tensor *cu_seqlens)
{
    return cu_seqlens->shape[0] >= 1 ? cu_seqlens->shape[0] - 1 : -1;
}

/* Positions are int32, and tokens need a sequence to belong to. */
static kl_status check_ragged(const char *op, const kl_tensor *cu_seqlens, int64_t T,
                              kl_error *err)
{
    if (kl_tensor_absent(cu_seqlens))
        return kl_fail(err, KL_ERR_VALUE, "%s: cu_seqlens must be given", op);
    if (cu_seqlens->ndim == 1)
        KL_TRY(kl_require_range(op, "cu_seqlens.shape[0]", cu_seqlens->shape[0], T > 0 ? 2 : 1,
                                INT64_MAX, err));
    return kl_require_range(op, "T", T, 0, INT32_MAX, err);
}

/* Slots are distinct, and without them sequence n uses slot n: either way there are enough. */
static kl_status check_slots(const char *op, const kl_tensor *state, int64_t N, kl_error *err)
{
    return kl_require_range(op, "state.shape[0]", state->shape[0], N, INT64_MAX, err);
}

kl_status kl_check_short_conv(const kl_short_conv *a, kl_error *err)
{
    static const char op[] = "short_conv";
    const int64_t T = a->x.shape[0], C = a->x.shape[1], W = a->weight.shape[1];
    const int64_t S = a->state.shape[0], N = ragged_count(&a->cu_seqlens);
    const unsigned act = kl_act_bit(&a->x);
    KL_TRY(check_ragged(op, &a->cu_seqlens, T, err));
    if (a->weight.ndim == 2)
        KL_TRY(kl_require_range(op, "weight.shape[1]", W, 1, MAX_CONV_WIDTH, err));
    const kl_rule rules[] = {
        {&a->x, "x", KL_ANY_FLOAT, KL_ROWS, 2, {T, C}, NULL},
        {&a->weight, "weight", F32, 0, 2, {C, W}, NULL},
        {&a->state, "state", act, KL_OUT | KL_EMPTY, 3, {S, C, W - 1}, NULL},
        {&a->cu_seqlens, "cu_seqlens", I32, 0, 1, {N + 1}, NULL},
        {&a->slots, "slots", I32, KL_OPT, 1, {N}, NULL},
        {&a->out, "out", act, KL_OUT, 2, {T, C}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    return check_slots(op, &a->state, N, err);
}

/* ---- KDA ------------------------------------------------------------------------------- */

static kl_status check_gate(const char *op, const kl_kda *a, kl_error *err)
{
    const bool has_A = !kl_tensor_absent(&a->A_log), has_bias = !kl_tensor_absent(&a->dt_bias);
    KL_TRY(kl_require_range(op, "gate", a->gate, 0, KL_N_GATES - 1, err));
    if (a->gate == KL_GATE_DIRECT && (has_A || has_bias))
        return kl_fail(err, KL_ERR_VALUE, "%s: %s must be absent with a direct gate", op,
                       has_A ? "A_log" : "dt_bias");
    if (a->gate == KL_GATE_SOFTPLUS && !has_A)
        return kl_fail(err, KL_ERR_VALUE, "%s: A_log must be given with a softplus gate", op);
    if (a->gate != KL_GATE_BOUNDED) return KL_OK;
    KL_TRY(kl_require_finite(op, "lower_bound", a->lower_bound, err));
    if (a->lower_bound < 0) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "%s: lower_bound must be < 0, got %g", op,
                   (double)a->lower_bound);
}

static kl_status check_interval(const char *op, int64_t tokens, kl_error *err)
{
    if (tokens > 0 && tokens % KL_KDA_CHECKPOINT == 0) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "%s: checkpoint_every must be a multiple of %d, got %lld",
                   op, KL_KDA_CHECKPOINT, (long long)tokens);
}

static kl_status check_kda(const char *op, const kl_kda *a, int64_t N, kl_error *err)
{
    const int64_t T = a->q.shape[0], Hk = a->q.shape[1], S = a->state.shape[0];
    const int64_t H = a->state.shape[1], V = a->state.shape[2], K = a->state.shape[3];
    const unsigned act = kl_act_bit(&a->q);
    int64_t rows = 0; /* of checkpoints */
    if (!kl_tensor_absent(&a->checkpoints)) {
        KL_TRY(check_interval(op, a->checkpoint_every, err));
        rows = T / a->checkpoint_every;
    }
    const kl_rule rules[] = {
        {&a->state, "state", F32, KL_OUT, 4, {S, H, V, K}, NULL},
        {&a->q, "q", KL_ANY_FLOAT, KL_ROWS, 3, {T, Hk, K}, NULL},
        {&a->k, "k", act, KL_ROWS, 3, {T, Hk, K}, NULL},
        {&a->v, "v", act, KL_ROWS, 3, {T, H, V}, NULL},
        {&a->g, "g", F32 | act, KL_ROWS, 3, {T, H, K}, NULL},
        {&a->beta, "beta", F32 | act, KL_ROWS, 2, {T, H}, NULL},
        {&a->cu_seqlens, "cu_seqlens", I32, KL_OPT, 1, {N + 1}, NULL},
        {&a->slots, "slots", I32, KL_OPT, 1, {N}, NULL},
        {&a->A_log, "A_log", F32, KL_OPT, 1, {H}, NULL},
        {&a->dt_bias, "dt_bias", F32, KL_OPT, 2, {H, K}, NULL},
        {&a->out, "out", act, KL_OUT, 3, {T, H, V}, NULL},
        {&a->checkpoints, "checkpoints", F32, KL_OUT | KL_OPT, 4, {rows, H, V, K}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_range(op, "state.shape[3]", K, 1, KL_KDA_MAX_K, err));
    if (H % Hk != 0)
        return kl_fail(err, KL_ERR_VALUE,
                       "%s: state.shape[1] must be a multiple of q.shape[1], got %lld and %lld",
                       op, (long long)H, (long long)Hk);
    KL_TRY(check_slots(op, &a->state, N, err));
    KL_TRY(check_gate(op, a, err));
    return kl_require_finite(op, "scale", a->scale, err);
}

kl_status kl_check_kda_prefill(const kl_kda_prefill *a, kl_error *err)
{
    static const char op[] = "kda_prefill";
    KL_TRY(check_ragged(op, &a->cu_seqlens, a->q.shape[0], err));
    return check_kda(op, a, ragged_count(&a->cu_seqlens), err);
}

kl_status kl_check_kda_decode(const kl_kda_decode *a, kl_error *err)
{
    static const char op[] = "kda_decode";
    if (!kl_tensor_absent(&a->cu_seqlens))
        return kl_fail(err, KL_ERR_VALUE, "%s: cu_seqlens must be absent", op);
    if (!kl_tensor_absent(&a->checkpoints))
        return kl_fail(err, KL_ERR_VALUE, "%s: checkpoints must be absent", op);
    return check_kda(op, a, a->q.shape[0], err);
}

static kl_status check_mixer_guesses(const char *op, const kl_kda_mixer *a, kl_error *err)
{
    const bool has_tokens = !kl_tensor_absent(&a->tokens);
    const bool again = !kl_tensor_absent(&a->drawn);
    if (a->guesses && a->single)
        return kl_fail(err, KL_ERR_VALUE, "%s: single must be false with guesses", op);
    if (again != has_tokens)
        return kl_fail(err, KL_ERR_VALUE, "%s: tokens and drawn must come together, got %s", op,
                       again ? "drawn" : "tokens");
    if (!again || a->guesses) return KL_OK;
    return kl_fail(err, KL_ERR_VALUE, "%s: drawn must be absent without guesses", op);
}

static kl_status check_mixer_arriving(const char *op, const kl_kda_mixer *a, kl_error *err)
{
    if (!a->arriving) return KL_OK;
    if (!a->single)
        return kl_fail(err, KL_ERR_VALUE, "%s: single must be true with arriving inputs", op);
    KL_TRY(kl_require_arriving(op, "qkv", &a->qkv, err));
    return kl_require_arriving(op, "beta", &a->beta, err);
}

/* The tensors of the whole; what its gate needs is said of the kl_kda within. */
kl_status kl_check_kda_mixer(const kl_kda_mixer *a, kl_error *err)
{
    static const char op[] = "kda_mixer";
    const int64_t T = a->out.shape[0], S = a->state.shape[0], N = ragged_count(&a->cu_seqlens);
    const int64_t H = a->state.shape[1], V = a->state.shape[2], K = a->state.shape[3];
    const int64_t W = a->conv_weight.shape[1], C = a->qkv.shape[1];
    const unsigned act = kl_act_bit(&a->qkv);
    KL_TRY(check_mixer_guesses(op, a, err));
    KL_TRY(check_ragged(op, &a->cu_seqlens, T, err));
    if (a->conv_weight.ndim == 2)
        KL_TRY(kl_require_range(op, "conv_weight.shape[1]", W, 1, MAX_CONV_WIDTH, err));
    const kl_rule rules[] = {
        {&a->state, "state", F32, KL_OUT, 4, {S, H, V, K}, NULL},
        {&a->qkv, "qkv", KL_ANY_FLOAT, KL_ROWS, 2, {T, C}, NULL},
        {&a->conv_weight, "conv_weight", F32, 0, 2, {C, W}, NULL},
        {&a->conv_state, "conv_state", act, KL_OUT | KL_EMPTY, 3, {S, C, W - 1}, NULL},
        {&a->f_low, "f_low", act, KL_ROWS, 2, {T, a->f_low.shape[1]}, NULL},
        {&a->g_low, "g_low", act, KL_ROWS, 2, {T, a->g_low.shape[1]}, NULL},
        {&a->beta, "beta", F32 | act, KL_ROWS, 2, {T, H}, NULL},
        {&a->slots, "slots", I32, KL_OPT, 1, {N}, NULL},
        {&a->cu_seqlens, "cu_seqlens", I32, 0, 1, {N + 1}, NULL},
        {&a->A_log, "A_log", F32, KL_OPT, 1, {H}, NULL},
        {&a->dt_bias, "dt_bias", F32, KL_OPT, 2, {H, K}, NULL},
        {&a->norm_weight, "norm_weight", F32, 0, 1, {V}, NULL},
        {&a->tokens, "tokens", I32, KL_OPT, 1, {T}, NULL},
        {&a->drawn, "drawn", I32, KL_OPT, 1, {T}, NULL},
        {&a->out, "out", act, KL_OUT, 3, {T, H, V}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_range(op, "state.shape[3]", K, 1, KL_KDA_MAX_K, err));
    if (C % H != 0 || C / H != 2 * K + V)
        return kl_fail(
            err, KL_ERR_VALUE,
            "%s: qkv.shape[1] must be H (2 K + V) of state [S, H, V, K], got %lld with "
            "H %lld, V %lld, K %lld",
            op, (long long)C, (long long)H, (long long)V, (long long)K);
    KL_TRY(
        kl_require_weight(op, "f_b", &a->f_b, 1, H * K, a->f_low.shape[1], KL_ANY_FORMAT, err));
    KL_TRY(
        kl_require_weight(op, "g_b", &a->g_b, 1, H * V, a->g_low.shape[1], KL_ANY_FORMAT, err));
    if (a->single && N != T)
        return kl_fail(err, KL_ERR_VALUE,
                       "%s: single tokens need a sequence each, got %lld tokens of %lld", op,
                       (long long)T, (long long)N);
    KL_TRY(check_slots(op, &a->state, N, err));
    const kl_kda kda = {.A_log = a->A_log,
                        .dt_bias = a->dt_bias,
                        .gate = a->gate,
                        .lower_bound = a->lower_bound};
    KL_TRY(check_gate(op, &kda, err));
    KL_TRY(check_mixer_arriving(op, a, err));
    KL_TRY(kl_require_finite(op, "scale", a->scale, err));
    return kl_require_positive(op, "eps", a->eps, err);
}

/* ---- MLA ------------------------------------------------------------------------------- */

/* Last axis of pages whose rows have these channels. */
static int64_t row_of_pages(const kl_tensor *pages, int64_t rank, int64_t rope)
{
    return kl_latents_are_packed(pages) ? kl_latents_row_of(rank, rope).row_bytes : rank + rope;
}

/* A sequence with a token has a page for it. */
static kl_status check_pages(const char *op, const kl_tensor *pages,
                             const kl_tensor *block_table, int64_t T, kl_error *err)
{
    if (kl_latents_are_packed(pages) && (uintptr_t)pages->data % KL_LATENTS_ALIGN != 0)
        return kl_fail(err, KL_ERR_VALUE,
                       "%s: pages must be aligned to %d bytes as they are %s", op,
                       KL_LATENTS_ALIGN, kl_dtype_name(pages->dtype));
    if (T == 0) return KL_OK;
    KL_TRY(kl_require_range(op, "pages.shape[0]", pages->shape[0], 1, INT32_MAX, err));
    return kl_require_range(op, "block_table.shape[1]", block_table->shape[1], 1, INT32_MAX,
                            err);
}

kl_status kl_check_mla_lay_out(const kl_mla_lay_out *a, kl_error *err)
{
    static const char op[] = "mla_lay_out";
    const int64_t N = ragged_count(&a->cu_seqlens), B = a->block_table.shape[1];
    KL_TRY(check_ragged(op, &a->cu_seqlens, 0, err));
    const kl_rule rules[] = {
        {&a->cu_seqlens, "cu_seqlens", I32, 0, 1, {N + 1}, NULL},
        {&a->cu_past, "cu_past", I32, KL_OPT, 1, {N + 1}, NULL},
        {&a->lengths, "lengths", I32, KL_OUT, 1, {N}, NULL},
        {&a->block_table, "block_table", I32, KL_OUT | KL_EMPTY, 2, {N, B}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    return KL_OK;
}

kl_status kl_check_mla_append(const kl_mla_append *a, kl_error *err)
{
    static const char op[] = "mla_append";
    const int64_t T = a->raw.shape[0], width = a->raw.shape[1], P = a->pages.shape[0];
    const bool ragged = !kl_tensor_absent(&a->cu_seqlens);
    const int64_t N = ragged ? ragged_count(&a->cu_seqlens) : T, B = a->block_table.shape[1];
    const bool packed = kl_latents_are_packed(&a->pages);
    const int64_t rank = packed ? a->rank : a->norm_weight.shape[0];
    if (ragged) KL_TRY(check_ragged(op, &a->cu_seqlens, T, err));
    if (packed) {
        KL_TRY(kl_require_range(op, "raw.shape[1]", width, 1, INT32_MAX, err));
        KL_TRY(kl_require_range(op, "rank", rank, 1, width, err));
    }
    const int64_t row = packed ? row_of_pages(&a->pages, rank, width - rank) : width;
    const kl_rule rules[] = {
        {&a->raw, "raw", KL_ANY_FLOAT, KL_ROWS, 2, {T, width}, NULL},
        {&a->norm_weight, "norm_weight", F32, KL_OPT, 1, {rank}, NULL},
        {&a->cu_seqlens, "cu_seqlens", I32, KL_OPT, 1, {N + 1}, NULL},
        {&a->block_table, "block_table", I32, KL_EMPTY, 2, {N, B}, NULL},
        {&a->lengths, "lengths", I32, 0, 1, {N}, NULL},
        {&a->pages,
         "pages",
         kl_act_bit(&a->raw) | U8,
         KL_OUT,
         3,
         {P, KL_PAGE_TOKENS, row},
         NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(check_pages(op, &a->pages, &a->block_table, T, err));
    if (kl_tensor_absent(&a->norm_weight)) return KL_OK;
    KL_TRY(kl_require_range(op, "norm_weight.shape[0]", rank, 1, width, err));
    return kl_require_positive(op, "eps", a->eps, err);
}

static kl_status check_mla(const char *op, const kl_mla *a, int64_t N, kl_error *err)
{
    const int64_t T = a->q.shape[0], H = a->q.shape[1], B = a->block_table.shape[1];
    const int64_t P = a->pages.shape[0], V = a->out.shape[2];
    const int64_t both = a->w_kv_b.shape[1], rank = a->w_kv_b.shape[2];
    const bool packed = kl_latents_are_packed(&a->pages);
    /* nope, and nope + rope; they wrap on absurd shapes, which the ranges below refuse. */
    const int64_t nope = (int64_t)((uint64_t)both - (uint64_t)V);
    const int64_t rope = (int64_t)(packed ? (uint64_t)a->q.shape[2] - (uint64_t)nope
                                          : (uint64_t)a->pages.shape[2] - (uint64_t)rank);
    const int64_t head = (int64_t)((uint64_t)nope + (uint64_t)rope);
    const int64_t width = (int64_t)((uint64_t)rank + (uint64_t)rope);
    if (packed) {
        KL_TRY(kl_require_range(op, "w_kv_b.shape[2]", rank, 1, INT32_MAX, err));
        KL_TRY(kl_require_range(op, "q.shape[2]", head, nope, INT32_MAX, err));
    }
    const int64_t row = row_of_pages(&a->pages, rank, rope);
    const unsigned act = kl_act_bit(&a->q);
    const unsigned written = kl_tensor_absent(&a->raw) ? 0 : KL_OUT;
    const kl_rule rules[] = {
        {&a->w_kv_b, "w_kv_b", KL_ANY_FLOAT, 0, 3, {H, both, rank}, NULL},
        {&a->out, "out", act, KL_OUT, 3, {T, H, V}, NULL},
        {&a->pages, "pages", act | U8, written, 3, {P, KL_PAGE_TOKENS, row}, NULL},
        {&a->raw, "raw", act, KL_ROWS | KL_OPT, 2, {T, width}, NULL},
        {&a->norm_weight, "norm_weight", F32, KL_OPT, 1, {rank}, NULL},
        {&a->q, "q", KL_ANY_FLOAT, KL_ROWS, 3, {T, H, head}, NULL},
        {&a->cu_seqlens, "cu_seqlens", I32, KL_OPT, 1, {N + 1}, NULL},
        {&a->block_table, "block_table", I32, KL_EMPTY, 2, {N, B}, NULL},
        {&a->lengths, "lengths", I32, 0, 1, {N}, NULL},
    };
    KL_REQUIRE_TENSORS(op, rules, err);
    KL_TRY(kl_require_range(op, "out.shape[2]", V, 1, both - 1, err));
    KL_TRY(kl_require_range(op, "w_kv_b.shape[2]", rank, 1, width, err));
    KL_TRY(check_pages(op, &a->pages, &a->block_table, T, err));
    return kl_require_finite(op, "scale", a->scale, err);
}

/* The inputs that arrive, and what comes with them. */
static kl_status check_mla_arriving(const char *op, const kl_mla *a, kl_error *err)
{
    const kl_rule rules[] = {{&a->blanks, "blanks", U8, KL_OUT, 1, {a->blanks.shape[0]}, NULL}};
    if (kl_tensor_absent(&a->blanks)) return KL_OK;
    KL_REQUIRE_TENSORS(op, rules, err);
    if (kl_tensor_absent(&a->raw))
        return kl_fail(err, KL_ERR_VALUE, "%s: raw must be given with blanks", op);
    return kl_require_arriving(op, "q", &a->q, err);
}

kl_status kl_check_mla_prefill(const kl_mla_prefill *a, kl_error *err)
{
    static const char op[] = "mla_prefill";
    KL_TRY(check_ragged(op, &a->cu_seqlens, a->q.shape[0], err));
    if (!kl_tensor_absent(&a->raw))
        return kl_fail(err, KL_ERR_VALUE, "%s: raw must be absent", op);
    if (!kl_tensor_absent(&a->norm_weight))
        return kl_fail(err, KL_ERR_VALUE, "%s: norm_weight must be absent", op);
    if (!kl_tensor_absent(&a->blanks))
        return kl_fail(err, KL_ERR_VALUE, "%s: blanks must be absent", op);
    return check_mla(op, a, ragged_count(&a->cu_seqlens), err);
}

kl_status kl_check_mla_decode(const kl_mla_decode *a, kl_error *err)
{
    static const char op[] = "mla_decode";
    if (!kl_tensor_absent(&a->cu_seqlens))
        return kl_fail(err, KL_ERR_VALUE, "%s: cu_seqlens must be absent", op);
    if (!kl_tensor_absent(&a->norm_weight)) {
        if (kl_tensor_absent(&a->raw))
            return kl_fail(err, KL_ERR_VALUE, "%s: raw must be given with a norm_weight", op);
        KL_TRY(kl_require_positive(op, "norm_eps", a->norm_eps, err));
    }
    KL_TRY(check_mla(op, a, a->q.shape[0], err));
    return check_mla_arriving(op, a, err);
}
