/*
 * test_ends.c -- a norm before a product and a sum after it have the bits of the operations that
 * they stand for: on the CPU and, where KL_CUDA_LIBRARY finds a device, on CUDA, to rounding.
 */
#include "pieces.h"

#include "backend/ends.h"

typedef struct {
    kl_dtype act, x;
    int64_t tokens, in, out;
    bool norms, adds;
} ends_case;

static kl_linear map_of(const ends_case *c, kl_weight_format format)
{
    kl_tensor x = tensor(c->x, false, 2, c->tokens, c->in + 8, 1, 1);
    kl_linear a = {.x = kl_columns(&x, 8, c->in),
                   .w = weight(format, c->out, c->in),
                   .act = c->act,
                   .norm_eps = 1e-5f};
    if (c->norms) a.norm_weight = tensor(KL_F32, false, 1, c->in, 1, 1, 1);
    if (c->adds)
        a.residual = tensor(KL_F32, false, 2, c->tokens, c->out, 1, 1);
    else
        a.out = tensor(c->act, true, 2, c->tokens, c->out, 1, 1);
    return a;
}

static void map_whole(kl_backend *be, void *call)
{
    kl_linear *const a = call;
    RUN_THERE(linear, be, a);
}

static kl_tensor dense_on(kl_backend *be, kl_dtype act, int64_t rows, int64_t cols)
{
    kl_error err;
    kl_tensor t = kl_tensor_2d(NULL, act, rows, cols);
    EXPECT(be->vt->alloc(be, (size_t)(rows * cols) * kl_dtype_bytes(act), &t.data, &err) ==
           KL_OK);
    return t;
}

static void give_back(kl_backend *be, const kl_tensor *t)
{
    be->vt->free(be, t->data, (size_t)kl_tensor_size(t) * kl_dtype_bytes(t->dtype));
}

/* A stream of float32 goes in as a residual, which nothing is added to. */
static void norm_piece(kl_backend *be, kl_tensor x, kl_tensor norm_weight, float eps,
                       kl_tensor h)
{
    kl_rms_norm norm = {.weight = norm_weight, .out = h, .eps = eps};
    if (x.dtype == KL_F32)
        norm.residual = x;
    else
        norm.x = x;
    RUN_THERE(rms_norm, be, &norm);
}

static void sum_piece(kl_backend *be, kl_tensor y, kl_tensor residual)
{
    kl_rms_norm sum = {.x = y, .residual = residual};
    sum.weight = tensor(KL_F32, false, 1, y.shape[1], 1, 1, 1);
    RUN_THERE(rms_norm, be, &sum);
}

static void map_pieces(kl_backend *be, void *call)
{
    const kl_linear *const a = call;
    const bool norms = !kl_tensor_absent(&a->norm_weight);
    const bool adds = !kl_tensor_absent(&a->residual);
    const kl_tensor h = dense_on(be, kl_linear_act(a), a->x.shape[0], a->w.cols);
    const kl_tensor y = dense_on(be, kl_linear_act(a), a->x.shape[0], a->w.rows);
    kl_linear plain = {.x = norms ? h : a->x, .w = a->w, .out = adds ? y : a->out};
    if (norms) norm_piece(be, a->x, a->norm_weight, a->norm_eps, h);
    RUN_THERE(linear, be, &plain);
    if (adds) sum_piece(be, y, a->residual);
    give_back(be, &h);
    give_back(be, &y);
}

static void check_map(const ends_case *c, kl_weight_format format)
{
    parts p = {0};
    kl_linear a = map_of(c, format), wide = a;
    char name[128];
    snprintf(name, sizeof name, "linear: act %d, x %d, format %d, T %lld, [%lld, %lld], %d %d",
             c->act, c->x, format, (long long)c->tokens, (long long)c->out, (long long)c->in,
             c->norms, c->adds);
    wide.w = widened(&a.w);
    IN(a.x);
    IN(a.norm_weight);
    WEIGHT(a.w);
    OUT(a.out, bound_of(c->act));
    OUT(a.residual, bound_of(c->act));
    if (wide.w.data == a.w.data) same_bits(cpu, &p, &a, sizeof a, map_whole, map_pieces, name);
    if (cuda != NULL) ON_BOTH_AS(linear, wide, a, name);
    used = 0;
}

/* The model's stream and its projections; float32 throughout; and what suits no fast kernel. */
static void ends_of_a_product(void)
{
    static const ends_case cases[] = {
        {KL_BF16, KL_F32, 1, 2304, 96, true, false},
        {KL_BF16, KL_F32, 1, 2368, 41, true, true},
        {KL_BF16, KL_BF16, 1, 512, 2304, false, true},
        {KL_BF16, KL_F32, 1, 192, 40, true, true},
        {KL_BF16, KL_BF16, 7, 192, 40, true, true},
        {KL_BF16, KL_F32, 16, 192, 200, true, true},
        {KL_BF16, KL_F32, 3, 37, 21, true, true},
        {KL_F32, KL_F32, 1, 64, 48, true, true},
        {KL_F32, KL_F32, 5, 37, 21, true, true},
        {KL_BF16, KL_F32, 0, 64, 48, true, true},
        {KL_BF16, KL_F32, 260, 64, 40, true, true},
        {KL_BF16, KL_F32, 40, 192, 40, true, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (kl_weight_format f = KL_W_F32; f < KL_N_WEIGHT_FORMATS; f++)
            if (cases[i].act == KL_BF16 || f == KL_W_F32) check_map(&cases[i], f);
}

static void check_ended_pair(const ends_case *first, const ends_case *second, bool same,
                             kl_weight_format format)
{
    parts p = {0};
    kl_linear_pair a = {.first = map_of(first, KL_W_BF16), .second = map_of(second, format)};
    if (same) a.second.x = a.first.x, a.second.norm_weight = a.first.norm_weight;
    kl_linear_pair wide = a;
    char name[96];
    snprintf(name, sizeof name, "pair: ends %d %d, %d %d, same %d, format %d, T %lld",
             first->norms, first->adds, second->norms, second->adds, same, format,
             (long long)first->tokens);
    wide.second.w = widened(&a.second.w);
    IN(a.first.x);
    IN(a.first.norm_weight);
    IN(a.second.x);
    IN(a.second.norm_weight);
    WEIGHT(a.first.w);
    WEIGHT(a.second.w);
    OUT(a.first.out, bound_of(first->act));
    OUT(a.first.residual, bound_of(first->act));
    OUT(a.second.out, bound_of(first->act));
    OUT(a.second.residual, bound_of(first->act));
    if (wide.second.w.data == a.second.w.data)
        same_bits(cpu, &p, &a, sizeof a, pair_whole, pair_pieces, name);
    if (cuda != NULL) ON_BOTH_AS(linear_pair, wide, a, name);
    used = 0;
}

static void ends_of_two_products(void)
{
    static const int64_t tokens[] = {0, 1, 7, 40};
    for (int i = 0; i < 4; i++)
        for (kl_weight_format f = KL_W_F32; f < KL_N_WEIGHT_FORMATS; f++) {
            const int64_t T_ = tokens[i];
            const ends_case low = {KL_BF16, KL_F32, T_, 192, 40, true, false};
            const ends_case wide = {KL_BF16, KL_F32, T_, 192, 200, true, false};
            const ends_case adds = {KL_BF16, KL_BF16, T_, 64, 37, false, true};
            check_ended_pair(&low, &wide, true, f);
            check_ended_pair(&low, &wide, false, f);
            check_ended_pair(&adds, &wide, false, f);
            const ends_case long_low = {KL_BF16, KL_F32, T_, 784, 40, true, false};
            const ends_case long_wide = {KL_BF16, KL_F32, T_, 784, 200, true, false};
            check_ended_pair(&long_low, &long_wide, false, f);
        }
}

static void mlp_in_place(kl_backend *be, void *call)
{
    kl_mlp *const a = call;
    a->residual = a->x;
    RUN_THERE(mlp, be, a);
}

static void mlp_pieces(kl_backend *be, void *call)
{
    const kl_mlp *const a = call;
    const kl_tensor h = dense_on(be, a->act, a->x.shape[0], a->w1.cols);
    const kl_tensor y = dense_on(be, a->act, a->x.shape[0], a->w1.cols);
    kl_mlp plain = {.x = h, .w1 = a->w1, .w3 = a->w3, .w2 = a->w2, .out = y};
    norm_piece(be, a->x, a->norm_weight, a->norm_eps, h);
    RUN_THERE(mlp, be, &plain);
    sum_piece(be, y, a->x);
    give_back(be, &h);
    give_back(be, &y);
}

/* CUDA runs it where the residual is another tensor: a case gives every pointer its own copy. */
static void check_mlp_ends(kl_dtype act, kl_weight_format f, int64_t tokens, int64_t D)
{
    parts p = {0};
    kl_mlp a = {.x = tensor(KL_F32, false, 2, tokens, D, 1, 1),
                .w1 = weight(f, 53, D),
                .w3 = weight(f, 53, D),
                .w2 = weight(f, D, 53),
                .norm_weight = tensor(KL_F32, false, 1, D, 1, 1, 1),
                .act = act,
                .norm_eps = 1e-5f};
    IN(a.norm_weight);
    WEIGHT(a.w1);
    WEIGHT(a.w3);
    WEIGHT(a.w2);
    parts in_place = p;
    add(&in_place, &a, &a.x.data, (size_t)(tokens * D) * sizeof(float), KL_F32, true, 0);
    same_bits(cpu, &in_place, &a, sizeof a, mlp_in_place, mlp_pieces, "mlp with ends");
    if (cuda == NULL) return;
    a.residual = tensor(KL_F32, false, 2, tokens, D, 1, 1);
    IN(a.x);
    OUT(a.residual, bound_of(act));
    ON_BOTH(mlp, "mlp with ends");
}

static void ends_of_an_mlp(void)
{
    static const int64_t tokens[] = {0, 1, 7, 260};
    for (int i = 0; i < 4; i++)
        for (int act = 0; act < 2; act++)
            for (kl_weight_format f = KL_W_F32; f <= KL_W_INT4; f++) {
                used = 0;
                check_mlp_ends(ACTS[act], f, tokens[i], 64);
                check_mlp_ends(ACTS[act], f, tokens[i], 41);
                check_mlp_ends(ACTS[act], f, tokens[i], 784);
            }
    used = 0;
}

int main(void)
{
    open_both();
    RUN(ends_of_a_product);
    RUN(ends_of_two_products);
    RUN(ends_of_an_mlp);
    return close_both();
}
