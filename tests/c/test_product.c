/*
 * test_product.c -- the dense layer, which has no name in Python; and every operation made of
 * products in workspace of exactly the size asked for, which the sanitizers watch.
 */
#include "operation.h"

#include "base/bf16.h"
#include "base/rng.h"

#include <math.h>

static const char *const variants[] = {"scalar", "avx2", "avx512", "avx512bf16"};
enum { N_VARIANTS = 4 };

/* NULL where this CPU lacks the variant. */
static kl_backend *open_backend(int threads, const char *variant)
{
    const kl_backend_options options = {.threads = threads, .variant = variant};
    kl_backend *be = NULL;
    kl_error err;
    if (kl_backend_open("cpu", NULL, &options, &be, &err) != KL_OK)
        EXPECT(err.status == KL_ERR_UNAVAILABLE);
    return be;
}

/* Numbers in [-1, 1), the same for the same index. */
static void fill(float *x, int64_t n, int64_t first)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)(2.0 * kl_rng_uniform(7, (uint64_t)(first + i)) - 1.0);
}

/* T above a block of 252 tokens; D and I unequal and no multiples of a vector. */
enum { T = 260, D = 41, I = 53, TOP_K = 3, E = 5 };
static float x[T * D], w1[E * I * D], w3[E * I * D], w2[E * D * I], out[T * D];
static const int64_t some_tokens[] = {1, 2, 7, 64, 65, T};
enum { N_TOKENS = 6 };

static kl_weight weight(float *data, int64_t count, int64_t rows, int64_t cols)
{
    return (kl_weight){KL_W_F32, count, rows, cols, data, NULL, false};
}

static void fill_operands(void)
{
    fill(x, T * D, 0);
    fill(w1, E * I * D, 100000);
    fill(w3, E * I * D, 200000);
    fill(w2, E * D * I, 300000);
}

/* ---- the dense layer ------------------------------------------------------------------- */

static double product(const float *row, const float *w, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += (double)row[i] * w[i];
    return sum;
}

/* One token's layer in double. */
static void dense_layer(const float *row, double *y)
{
    double inner[I];
    for (int i = 0; i < I; i++) {
        const double gate = product(row, w1 + i * D, D);
        inner[i] = gate / (1.0 + exp(-gate)) * product(row, w3 + i * D, D);
    }
    for (int d = 0; d < D; d++) {
        y[d] = 0.0;
        for (int i = 0; i < I; i++) y[d] += inner[i] * w2[d * I + i];
    }
}

static void run_mlp(kl_backend *be, int64_t first, int64_t n, float *to)
{
    poison(to, n * D);
    kl_mlp a = {.x = kl_tensor_2d(x + first * D, KL_F32, n, D),
                .w1 = weight(w1, 1, I, D),
                .w3 = weight(w3, 1, I, D),
                .w2 = weight(w2, 1, D, I),
                .out = kl_tensor_2d(to, KL_F32, n, D)};
    RUN_OP(mlp, be, a);
}

static void mlp_matches_double(void)
{
    static float alone[D];
    fill_operands();
    for (int v = 0; v < N_VARIANTS; v++) {
        kl_backend *be = open_backend(3, variants[v]);
        if (be == NULL) continue;
        for (int i = 0; i < N_TOKENS; i++) {
            const int64_t n = some_tokens[i];
            run_mlp(be, 0, n, out);
            double worst = 0.0, y[D];
            for (int64_t t = 0; t < n; t++) {
                dense_layer(x + t * D, y);
                for (int d = 0; d < D; d++) {
                    const double error = fabs(out[t * D + d] - y[d]);
                    worst = error > worst || isnan(error) ? error : worst;
                }
            }
            EXPECT(worst < 1e-4); /* sums of 53 terms of magnitude 50 */
            run_mlp(be, n - 1, 1, alone);
            EXPECT(memcmp(alone, out + (n - 1) * D, sizeof alone) == 0);
        }
        kl_backend_close(be);
    }
}

/* ---- workspaces ------------------------------------------------------------------------ */

/* Rows of x and of the result lie in wider matrices, as fused projections make them. */
static void linear_takes_strided_rows(void)
{
    enum { WIDE = D + 7 };
    static float wide[T * WIDE], to[T * (I + 2)], want[T * I];
    fill_operands();
    poison(wide, T * WIDE);
    for (int t = 0; t < T; t++) memcpy(wide + t * WIDE, x + t * D, D * sizeof *x);
    kl_backend *be = open_backend(2, NULL);
    for (int i = 0; i < N_TOKENS; i++) {
        const int64_t n = some_tokens[i];
        poison(want, n * I);
        kl_linear a = {.x = kl_tensor_2d(x, KL_F32, n, D),
                       .w = weight(w1, 1, I, D),
                       .out = kl_tensor_2d(want, KL_F32, n, I)};
        RUN_OP(linear, be, a);
        poison(to, T * (I + 2));
        a.x = kl_tensor_2d(wide, KL_F32, n, D);
        a.x.stride[0] = WIDE;
        a.out = kl_tensor_2d(to, KL_F32, n, I);
        a.out.stride[0] = I + 2;
        RUN_OP(linear, be, a);
        for (int64_t t = 0; t < n; t++) {
            EXPECT(memcmp(to + t * (I + 2), want + t * I, I * sizeof *to) == 0);
            EXPECT(isnan(to[t * (I + 2) + I]) && isnan(to[t * (I + 2) + I + 1]));
        }
    }
    kl_backend_close(be);
}

static kl_moe_experts experts_args(int64_t n, int32_t *ids, float *weights, bool shared)
{
    kl_moe_experts a = {.x = kl_tensor_2d(x, KL_F32, n, D),
                        .ids = kl_tensor_2d(ids, KL_I32, n, TOP_K),
                        .weights = kl_tensor_2d(weights, KL_F32, n, TOP_K),
                        .w1 = weight(w1, E, I, D),
                        .w3 = weight(w3, E, I, D),
                        .w2 = weight(w2, E, D, I),
                        .out = kl_tensor_2d(out, KL_F32, n, D)};
    if (!shared) return a;
    a.shared_w1 = weight(w3, 1, I, D);
    a.shared_w3 = weight(w1, 1, I, D);
    a.shared_w2 = weight(w2, 1, D, I);
    return a;
}

static void experts_stay_in_their_workspace(void)
{
    static int32_t ids[T * TOP_K];
    static float weights[T * TOP_K];
    fill_operands();
    fill(weights, T * TOP_K, 0);
    for (int threads = 1; threads <= 3; threads += 2)
        for (int i = 0; i < N_TOKENS; i++)
            for (int kind = 0; kind < 4;
                 kind++) { /* spread or all on one expert; shared or not */
                for (int j = 0; j < T * TOP_K; j++) ids[j] = kind % 2 == 0 ? j * 7 % E : E - 1;
                kl_backend *be = open_backend(threads, NULL);
                kl_moe_experts a = experts_args(some_tokens[i], ids, weights, kind < 2);
                poison(out, T * D);
                RUN_OP(moe_experts, be, a);
                int64_t written = 0;
                for (int64_t j = 0; j < T * D; j++) written += !isnan(out[j]);
                EXPECT(written == some_tokens[i] * D);
                kl_backend_close(be);
            }
}

/* 4100 rows of a head, so that its second piece is short. */
static void logprobs_stay_in_their_workspace(void)
{
    enum { VOCAB = 4100, TOP = 7, WIDTH = 9 };
    static float head[VOCAB * WIDTH], logprobs[T], top_logprobs[T * TOP];
    static int32_t targets[T], top_ids[T * TOP];
    static uint8_t greedy[T];
    fill_operands();
    fill(head, VOCAB * WIDTH, 400000);
    kl_backend *be = open_backend(3, NULL);
    for (int i = 0; i < N_TOKENS; i++) {
        const int64_t n = some_tokens[i];
        poison(logprobs, T);
        kl_token_logprobs a = {.hidden = kl_tensor_2d(x, KL_F32, n, WIDTH),
                               .lm_head = weight(head, 1, VOCAB, WIDTH),
                               .targets = kl_tensor_1d(targets, KL_I32, n),
                               .logprobs = kl_tensor_1d(logprobs, KL_F32, n),
                               .greedy = kl_tensor_1d(greedy, KL_U8, n),
                               .top_ids = kl_tensor_2d(top_ids, KL_I32, n, TOP),
                               .top_logprobs = kl_tensor_2d(top_logprobs, KL_F32, n, TOP)};
        RUN_OP(token_logprobs, be, a);
        int64_t written = 0;
        for (int t = 0; t < T; t++) written += logprobs[t] < 0.0f;
        EXPECT(written == n);
    }
    kl_backend_close(be);
}

/* A plan asks for the largest step only. */
static void workspace_grows_with_tokens(void)
{
    static int32_t ids[1];
    static float weights[1];
    kl_backend *be = open_backend(2, NULL);
    size_t linear = 0, experts = 0, whole = 0;
    for (int64_t n = 1; n < 1200; n += n < 300 ? 1 : 97) {
        kl_linear a = {.x = kl_tensor_2d(x, KL_F32, n, D), .w = weight(w1, 1, I, D)};
        const kl_moe_experts b = experts_args(n, ids, weights, true);
        const size_t more_linear = kl_workspace_linear(be, &a);
        const size_t more_experts = kl_workspace_moe_experts(be, &b);
        const kl_moe c = {.x = b.x,
                          .norm_weight = kl_tensor_1d(weights, KL_F32, D),
                          .router = weight(w1, 1, E, D),
                          .w1 = b.w1,
                          .w3 = b.w3,
                          .w2 = b.w2,
                          .residual = b.x,
                          .top_k = TOP_K,
                          .groups = 1,
                          .top_groups = 1};
        const size_t more_whole = kl_workspace_moe(be, &c);
        EXPECT(more_linear >= linear && more_experts >= experts && more_whole >= whole);
        linear = more_linear, experts = more_experts, whole = more_whole;
    }
    kl_backend_close(be);
}

int main(void)
{
    RUN(mlp_matches_double);
    RUN(linear_takes_strided_rows);
    RUN(experts_stay_in_their_workspace);
    RUN(logprobs_stay_in_their_workspace);
    RUN(workspace_grows_with_tokens);
    return test_failures != 0;
}
