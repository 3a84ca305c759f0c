/*
 * test_fused.c -- operations that stand for several others have the bits of these, one after the
 * other: on the CPU and, where KL_CUDA_LIBRARY finds a device, on CUDA, beside the CPU's results.
 */
#include "pieces.h"

#include "backend/kda_mixer.h"

/* ---- two products ------------------------------------------------------------------------ */

static void check_pair(kl_dtype act, kl_weight_format first, kl_weight_format second,
                       int64_t tokens, int64_t D)
{
    parts p = {0};
    kl_tensor x = tensor(act, false, 2, tokens, 2 * D, 1, 1);
    kl_linear_pair a = {.first = {.x = kl_columns(&x, 0, D),
                                  .w = weight(first, 40, D),
                                  .out = tensor(KL_F32, true, 2, tokens, 40, 1, 1)},
                        .second = {.x = kl_columns(&x, D, D),
                                   .w = weight(second, 200, D),
                                   .out = tensor(act, true, 2, tokens, 200, 1, 1)}};
    kl_linear_pair wide = a;
    wide.first.w = widened(&a.first.w), wide.second.w = widened(&a.second.w);
    char name[64];
    snprintf(name, sizeof name, "pair: act %d, formats %d %d, T %lld, D %lld", act, first,
             second, (long long)tokens, (long long)D);
    IN(a.first.x);
    IN(a.second.x);
    WEIGHT(a.first.w);
    WEIGHT(a.second.w);
    OUT(a.first.out, bound_of(act));
    OUT(a.second.out, bound_of(act));
    const bool on_cpu =
        wide.first.w.data == a.first.w.data && wide.second.w.data == a.second.w.data;
    if (on_cpu) same_bits(cpu, &p, &a, sizeof a, pair_whole, pair_pieces, name);
    if (cuda != NULL) {
        same_bits(cuda, &p, &a, sizeof a, pair_whole, pair_pieces, name);
        ON_BOTH_AS(linear_pair, wide, a, name);
    }
    used = 0;
}

/* A step's own pairs: of one format, and bf16 beside another; others too, and no multiple of 8. */
static void two_products(void)
{
    static const int64_t tokens[] = {0, 1, 7, 16, 40};
    for (int i = 0; i < 5; i++)
        for (kl_weight_format f = KL_W_F32; f < KL_N_WEIGHT_FORMATS; f++) {
            check_pair(KL_BF16, f, f, tokens[i], 192);
            check_pair(KL_BF16, KL_W_BF16, f, tokens[i], 192);
            if (i % 2 == 1) check_pair(KL_BF16, f, KL_W_BF16, tokens[i], 37);
            if (i % 2 == 1) check_pair(KL_F32, f, KL_W_F32, tokens[i], 64);
        }
}

/* ---- a KDA layer between its input's projections and its output's ------------------------ */

static void mixer_whole(kl_backend *be, void *call)
{
    kl_kda_mixer *const a = call;
    RUN_THERE(kda_mixer, be, a);
}

static void mixer_pieces(kl_backend *be, void *call)
{
    kl_kda_mixer *const a = call;
    a->ws.bytes = kl_workspace_kda_mixer(be, a);
    a->ws.data = poisoned(be, a->ws.bytes);
    kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    RUN_THERE(linear, be, &p.gates.first);
    RUN_THERE(linear, be, &p.gates.second);
    RUN_THERE(short_conv, be, &p.conv);
    if (a->single)
        RUN_THERE(kda_decode, be, &p.kda);
    else
        RUN_THERE(kda_prefill, be, &p.kda);
    RUN_THERE(gated_rms_norm, be, &p.norm);
    be->vt->free(be, a->ws.data, a->ws.bytes);
}

enum { N = 5, T = 90, SLOTS = 9 };
static const int32_t RAGGED[N + 1] = {0, 70, 70, 71, 74, T}, SLOTS_OF[N] = {8, 3, 0, 5, 1};
/* On CUDA more chunks than are on their way at once, and a last token beyond them. */
static const int32_t LONGER[N + 1] = {0, 200, 200, 201, 266, 330};
/* Fewer tokens than a window has, the ends of octets, of chunks and of 64 tokens. */
static const int32_t ENDS[][N + 1] = {{0, 2, 67, 68, 164, 330},
                                      {0, 3, 11, 43, 106, 235},
                                      {0, 1, 32, 65, 129, 258},
                                      {0, 4, 4, 68, 133, 229}};

typedef struct {
    int64_t H, K, V, W;
    kl_gate gate;
    int single; /* so many tokens, each of its own sequence; 0: ragged sequences */
    int64_t R;  /* columns of f_low; g_low has as many, or two more where they are odd */
    kl_weight_format format;
} mixer_case;

/* So that no decay is above 1. */
static void make_gates_negative(kl_kda_mixer *a)
{
    for (int64_t t = 0; t < a->f_low.shape[0]; t++)
        for (int64_t i = 0; i < a->f_low.shape[1]; i++)
            put(&a->f_low, t * a->f_low.stride[0] + i, fabsf(number()));
    for (int64_t i = 0; i < a->f_b.rows * a->f_b.cols; i++)
        ((uint16_t *)a->f_b.data)[i] |= 0x8000;
}

/* Sequences of a call. The first tokens' rows may be so short that a chunk's products might leave
 * float32's range. */
typedef struct {
    int n;
    const int32_t *ragged; /* [n + 1]                                            */
    int64_t beside;        /* columns of the rows that qkv is in, beside its own */
    int64_t short_rows;
} prompt;

static kl_kda_mixer mixer_of(const mixer_case *c, kl_dtype act, const prompt *at)
{
    static const int32_t ones[N + 1] = {0, 1, 2, 3, 4, 5};
    const int n = c->single ? c->single : at->n;
    const int64_t tokens = c->single ? n : at->ragged[n], C = c->H * (2 * c->K + c->V);
    const int64_t more = c->R + c->R % 2 * 2;
    kl_tensor qkv = tensor(act, false, 2, tokens, C + at->beside, 1, 1);
    kl_tensor low = tensor(act, false, 2, tokens, c->R + more + 8, 1, 1);
    kl_kda_mixer a = {.qkv = kl_columns(&qkv, 4, C),
                      .conv_weight = tensor(KL_F32, false, 2, C, c->W, 1, 1),
                      .conv_state = tensor(act, false, 3, SLOTS, C, c->W - 1, 1),
                      .f_low = kl_columns(&low, 8, c->R),
                      .f_b = weight(c->format, c->H * c->K, c->R),
                      .g_low = kl_columns(&low, 8 + c->R, more),
                      .g_b = weight(c->format, c->H * c->V, more),
                      .beta = tensor(act, false, 2, tokens, c->H, 1, 1),
                      .state = tensor(KL_F32, false, 4, SLOTS, c->H, c->V, c->K),
                      .slots = integers(n, SLOTS_OF),
                      .cu_seqlens = integers(n + 1, c->single ? ones : at->ragged),
                      .norm_weight = tensor(KL_F32, false, 1, c->V, 1, 1, 1),
                      .out = tensor(act, true, 3, tokens, c->H, c->V, 1),
                      .gate = c->gate,
                      .lower_bound = -5,
                      .scale = 0.1f,
                      .eps = 1e-5f,
                      .single = c->single > 0};
    if (c->gate == KL_GATE_DIRECT) make_gates_negative(&a);
    a.g_b.unsettled = c->gate == KL_GATE_BOUNDED; /* changes no bit */
    if (c->gate == KL_GATE_SOFTPLUS) a.A_log = tensor(KL_F32, false, 1, c->H, 1, 1, 1);
    if (c->gate != KL_GATE_DIRECT) a.dt_bias = tensor(KL_F32, false, 2, c->H, c->K, 1, 1);
    return a;
}

static void make_rows_short(kl_kda_mixer *a, int64_t tokens)
{
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < a->qkv.shape[1]; i++)
            put(&a->qkv, t * a->qkv.stride[0] + i, 1e-7f * number());
}

static void check_mixer(const mixer_case *c, kl_dtype act, const prompt *at)
{
    parts p = {0};
    kl_kda_mixer a = mixer_of(c, act, at);
    make_rows_short(&a, at->short_rows);
    kl_kda_mixer wide = a;
    wide.f_b = widened(&a.f_b), wide.g_b = widened(&a.g_b);
    char name[128];
    snprintf(name, sizeof name,
             "kda_mixer: act %d, K %lld, V %lld, W %lld, gate %d, single %d, R %lld, format %d",
             act, (long long)c->K, (long long)c->V, (long long)c->W, c->gate, c->single,
             (long long)c->R, c->format);
    const kl_tensor *const in[] = {&a.qkv,     &a.conv_weight, &a.f_low,      &a.g_low,
                                   &a.beta,    &a.slots,       &a.cu_seqlens, &a.A_log,
                                   &a.dt_bias, &a.norm_weight};
    for (size_t j = 0; j < sizeof in / sizeof *in; j++) IN(*in[j]);
    WEIGHT(a.f_b);
    WEIGHT(a.g_b);
    /* Inputs of KDA are rounded to bf16 after the convolution; the chunked form, too, rounds. */
    const double bound = act == KL_F32 ? 5e-6 : 6e-3;
    OUT(a.conv_state, 0);
    OUT(a.state, bound);
    OUT(a.out, bound);
    if (wide.f_b.data == a.f_b.data)
        same_bits(cpu, &p, &a, sizeof a, mixer_whole, mixer_pieces, name);
    if (cuda != NULL) {
        same_bits(cuda, &p, &a, sizeof a, mixer_whole, mixer_pieces, name);
        ON_BOTH_AS(kda_mixer, wide, a, name);
    }
    used = 0;
}

/* The model's sizes, smaller ones, and those that no kernel of the whole takes. */
static void mixers(void)
{
    static const mixer_case cases[] = {
        {3, 128, 128, 4, KL_GATE_SOFTPLUS, 4, 128, KL_W_BF16},
        {2, 128, 128, 4, KL_GATE_SOFTPLUS, 5, 128, KL_W_BF16},
        {2, 128, 128, 4, KL_GATE_SOFTPLUS, 5, 128, KL_W_INT8},
        {2, 128, 128, 4, KL_GATE_SOFTPLUS, 4, 128, KL_W_INT8},
        {2, 128, 128, 4, KL_GATE_SOFTPLUS, 4, 128, KL_W_INT4},
        {2, 128, 128, 4, KL_GATE_SOFTPLUS, 4, 128, KL_W_FP8},
        {2, 128, 128, 4, KL_GATE_SOFTPLUS, 4, 128, KL_W_F32},
        {2, 128, 128, 4, KL_GATE_SOFTPLUS, 4, 64, KL_W_BF16},
        {2, 128, 128, 4, KL_GATE_DIRECT, 4, 128, KL_W_BF16},
        {2, 128, 128, 4, KL_GATE_BOUNDED, 4, 128, KL_W_BF16},
        {3, 128, 72, 4, KL_GATE_SOFTPLUS, 4, 128, KL_W_BF16},
        {3, 64, 128, 4, KL_GATE_SOFTPLUS, 4, 64, KL_W_INT8},
        {2, 20, 40, 4, KL_GATE_SOFTPLUS, 4, 32, KL_W_BF16},
        {2, 20, 36, 4, KL_GATE_SOFTPLUS, 4, 19, KL_W_BF16},
        {2, 19, 21, 4, KL_GATE_SOFTPLUS, 4, 19, KL_W_INT8},
        {2, 64, 160, 4, KL_GATE_SOFTPLUS, 4, 64, KL_W_BF16},
        {2, 136, 64, 4, KL_GATE_SOFTPLUS, 4, 64, KL_W_BF16},
        {2, 64, 64, 3, KL_GATE_SOFTPLUS, 4, 64, KL_W_BF16},
        {2, 128, 128, 4, KL_GATE_SOFTPLUS, 0, 128, KL_W_BF16},
        {2, 19, 21, 1, KL_GATE_BOUNDED, 0, 19, KL_W_BF16},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int j = 0; j < 2; j++) check_mixer(&cases[i], ACTS[j], &(prompt){N, LONGER, 6, 0});
}

/* What CUDA's recurrence of bf16 takes in where K = V = 128: the norm, and the convolution where
 * rows are aligned, which they are with 8 columns beside them and not with 6. */
static void check_prompt(const mixer_case *c, prompt at)
{
    for (at.beside = 6; at.beside <= 8; at.beside += 2) check_mixer(c, KL_BF16, &at);
}

/* All gates and ends; more heads than it takes at once; a sequence that it cuts into segments, with
 * a last token past them, which it does not convolve; one token. */
static void prompts(void)
{
    static const int32_t few[N + 1] = {0, 33, 33, 34, 36, 100}, one[] = {0, 3329},
                                 token[] = {0, 1};
    if (cuda == NULL) return; /* to the CPU they are mixers() */
    for (kl_gate gate = 0; gate < KL_N_GATES; gate++) {
        const mixer_case c = {1 + gate, 128, 128, 4, gate, 0, 128, KL_W_BF16};
        check_prompt(&c, (prompt){N, LONGER, 0, 0});
        check_prompt(&c, (prompt){N, LONGER, 0, 40});
        for (size_t j = 0; j < sizeof ENDS / sizeof *ENDS; j++)
            check_prompt(&c, (prompt){N, ENDS[j], 0, j == 2 ? 40 : 0});
    }
    static const mixer_case many = {40, 128, 128, 4, KL_GATE_SOFTPLUS, 0, 16, KL_W_BF16};
    check_prompt(&many, (prompt){N, few, 0, 0});
    static const mixer_case single = {1, 128, 128, 4, KL_GATE_SOFTPLUS, 0, 16, KL_W_BF16};
    if (!brief) check_prompt(&single, (prompt){1, one, 0, 0});
    check_prompt(&single, (prompt){1, token, 0, 0});
}

/* ---- the same of guesses ----------------------------------------------------------------- */

static int32_t tokens[T], drawn[T];

/* Of each sequence some are right: none, all, or those before a wrong one. */
static void deal_guesses(int wrong)
{
    for (int t = 0; t < T; t++) tokens[t] = t % 7;
    for (int t = 0; t + 1 < T; t++) drawn[t] = t % wrong == wrong - 1 ? 7 : tokens[t + 1];
    drawn[T - 1] = 0;
}

static void guesses_whole(kl_backend *be, void *call)
{
    kl_kda_mixer *const again = call;
    kl_kda_mixer first = *again;
    first.tokens = first.drawn = (kl_tensor){0};
    RUN_THERE(kda_mixer, be, &first);
    RUN_THERE(kda_mixer, be, again);
}

/* What single tokens need beside the parts of all. */
typedef struct {
    kl_tensor one;           /* [2]: 0, 1 */
    kl_tensor state, window; /* a copy    */
    kl_tensor out;           /* of a token that is read a second time */
} beside;

static void token_pieces(kl_backend *be, const kl_kda_mixer_parts *p, int64_t t,
                         kl_tensor state, kl_tensor window, const beside *b, bool again)
{
    kl_short_conv conv = p->conv;
    conv.x = kl_row_slice(&conv.x, t, 1), conv.out = kl_row_slice(&conv.out, t, 1);
    conv.state = window, conv.slots = (kl_tensor){0}, conv.cu_seqlens = b->one;
    RUN_THERE(short_conv, be, &conv);
    kl_kda kda = p->kda;
    kl_tensor *const rows[] = {&kda.q, &kda.k, &kda.v, &kda.g, &kda.beta, &kda.out};
    for (int i = 0; i < 6; i++) *rows[i] = kl_row_slice(rows[i], t, 1);
    if (again) kda.out = b->out;
    kda.state = state, kda.slots = kda.cu_seqlens = (kl_tensor){0};
    RUN_THERE(kda_decode, be, &kda);
    kl_gated_rms_norm norm = p->norm;
    norm.x = norm.out = kda.out, norm.z = kl_row_slice(&norm.z, t, 1);
    RUN_THERE(gated_rms_norm, be, &norm);
}

static kl_tensor taken_like(kl_backend *be, const kl_tensor *t)
{
    kl_tensor row = kl_row_slice(t, 0, 1);
    kl_error err;
    EXPECT(be->vt->alloc(be, (size_t)t->stride[0] * kl_dtype_bytes(t->dtype), &row.data,
                         &err) == KL_OK);
    return row;
}

static void copy_there(kl_backend *be, const kl_tensor *to, const kl_tensor *from)
{
    kl_error err;
    EXPECT(be->vt->copy(be, to->data, from->data,
                        (size_t)from->stride[0] * kl_dtype_bytes(from->dtype), &err) == KL_OK);
}

static void sequence_pieces(kl_backend *be, const kl_kda_mixer *a, const kl_kda_mixer_parts *p,
                            int64_t n, const beside *b)
{
    const kl_tensor state = kl_row_slice(&a->state, SLOTS_OF[n], 1);
    const kl_tensor window = kl_row_slice(&a->conv_state, SLOTS_OF[n], 1);
    const int64_t begin = RAGGED[n], end = RAGGED[n + 1];
    if (begin == end) return;
    token_pieces(be, p, begin, state, window, b, false);
    copy_there(be, &b->state, &state);
    copy_there(be, &b->window, &window);
    for (int64_t t = begin + 1; t < end; t++)
        token_pieces(be, p, t, b->state, b->window, b, false);
    for (int64_t t = begin + 1; t < end && tokens[t] == drawn[t - 1]; t++)
        token_pieces(be, p, t, state, window, b, true);
}

static void guesses_pieces(kl_backend *be, void *call)
{
    static const int32_t zero_one[2] = {0, 1};
    kl_kda_mixer *const a = call;
    kl_error err;
    kl_kda_mixer plain = *a;
    plain.guesses = false;
    plain.tokens = plain.drawn = (kl_tensor){0};
    const size_t bytes = kl_workspace_kda_mixer(be, &plain);
    plain.ws = (kl_workspace){poisoned(be, bytes), bytes};
    kl_kda_mixer_parts p = kl_kda_mixer_parts_of(&plain);
    RUN_THERE(linear, be, &p.gates.first);
    RUN_THERE(linear, be, &p.gates.second);
    beside b = {.one = kl_tensor_1d(NULL, KL_I32, 2),
                .state = taken_like(be, &a->state),
                .window = taken_like(be, &a->conv_state),
                .out = taken_like(be, &a->out)};
    EXPECT(be->vt->alloc(be, sizeof zero_one, &b.one.data, &err) == KL_OK);
    EXPECT(be->vt->copy_in(be, b.one.data, zero_one, sizeof zero_one, &err) == KL_OK);
    for (int64_t n = 0; n < N; n++) sequence_pieces(be, a, &p, n, &b);
    EXPECT(be->vt->sync(be, &err) == KL_OK);
    const kl_tensor *const taken[] = {&b.state, &b.window, &b.out};
    for (int i = 0; i < 3; i++)
        be->vt->free(be, taken[i]->data,
                     (size_t)taken[i]->stride[0] * kl_dtype_bytes(taken[i]->dtype));
    be->vt->free(be, b.one.data, sizeof zero_one);
    be->vt->free(be, plain.ws.data, bytes);
}

static void check_guesses(const mixer_case *c, kl_dtype act, int wrong)
{
    parts p = {0};
    char name[128];
    kl_kda_mixer a = mixer_of(c, act, &(prompt){N, RAGGED, 6, 0});
    deal_guesses(wrong);
    a.guesses = true;
    a.tokens = integers(T, tokens);
    a.drawn = integers(T, drawn);
    snprintf(name, sizeof name, "guesses: act %d, K %lld, V %lld, W %lld, gate %d, wrong %d",
             act, (long long)c->K, (long long)c->V, (long long)c->W, c->gate, wrong);
    const kl_tensor *const in[] = {&a.qkv,     &a.conv_weight, &a.f_low,      &a.g_low,
                                   &a.beta,    &a.slots,       &a.cu_seqlens, &a.A_log,
                                   &a.dt_bias, &a.norm_weight, &a.tokens,     &a.drawn};
    for (size_t j = 0; j < sizeof in / sizeof *in; j++) IN(*in[j]);
    WEIGHT(a.f_b);
    WEIGHT(a.g_b);
    OUT(a.conv_state, 0);
    OUT(a.state, 0);
    OUT(a.out, 0);
    const bool there = c->W == 4 && c->K % 4 == 0 && c->V % 8 == 0;
    if (c->format != KL_W_FP8)
        same_bits(cpu, &p, &a, sizeof a, guesses_whole, guesses_pieces, name);
    if (cuda != NULL && there)
        same_bits(cuda, &p, &a, sizeof a, guesses_whole, guesses_pieces, name);
    used = 0;
}

/* One slot: nobody has to set the stride of its axis. */
static void unset_strides_whole(kl_backend *be, void *call)
{
    kl_kda_mixer *const a = call;
    a->state.stride[0] = a->conv_state.stride[0] = 3;
    guesses_whole(be, call);
}

static void unset_strides(void)
{
    static const mixer_case c = {2, 16, 8, 4, KL_GATE_SOFTPLUS, 0, 8, KL_W_BF16};
    static const int32_t all[2] = {0, T};
    parts p = {0};
    kl_kda_mixer a = mixer_of(&c, KL_BF16, &(prompt){N, RAGGED, 6, 0});
    deal_guesses(6);
    a.guesses = true;
    a.tokens = integers(T, tokens);
    a.drawn = integers(T, drawn);
    a.cu_seqlens = integers(2, all);
    a.slots = (kl_tensor){0};
    a.state.shape[0] = a.conv_state.shape[0] = 1;
    const kl_tensor *const in[] = {&a.qkv,        &a.conv_weight, &a.f_low,      &a.g_low,
                                   &a.beta,       &a.A_log,       &a.dt_bias,    &a.tokens,
                                   &a.cu_seqlens, &a.drawn,       &a.norm_weight};
    for (size_t j = 0; j < sizeof in / sizeof *in; j++) IN(*in[j]);
    WEIGHT(a.f_b);
    WEIGHT(a.g_b);
    OUT(a.conv_state, 0);
    OUT(a.state, 0);
    OUT(a.out, 0);
    same_bits(cpu, &p, &a, sizeof a, unset_strides_whole, guesses_whole, "unset strides");
    used = 0;
}

static void guesses(void)
{
    static const mixer_case cases[] = {
        {3, 128, 128, 4, KL_GATE_SOFTPLUS, 0, 128, KL_W_BF16},
        {2, 128, 72, 4, KL_GATE_BOUNDED, 0, 128, KL_W_INT8},
        {2, 20, 40, 4, KL_GATE_DIRECT, 0, 32, KL_W_BF16},
        {2, 8, 8, 4, KL_GATE_SOFTPLUS, 0, 8, KL_W_F32},
        {2, 19, 21, 3, KL_GATE_SOFTPLUS, 0, 19, KL_W_BF16},
        {2, 19, 21, 1, KL_GATE_BOUNDED, 0, 19, KL_W_BF16},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (int j = 0; j < 2; j++)
            for (int wrong = 1; wrong < 100; wrong = wrong * 6)
                check_guesses(&cases[i], ACTS[j], wrong);
}

int main(void)
{
    open_both();
    RUN(two_products);
    RUN(mixers);
    RUN(prompts);
    RUN(guesses);
    RUN(unset_strides);
    return close_both();
}
