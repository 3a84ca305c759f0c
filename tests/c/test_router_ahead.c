/*
 * test_router_ahead.c -- a backend whose linear does a router's work for the layer behind it: the
 * runner hands over sums that are zeros, to the layer whose x they are made from, in the steps of a
 * single token alone, recorded or not.
 */
#include "recorder.h"

enum { WIDTH = 24, MOE_LAYERS = 2, TOKENS = 40 }; /* of the tiny model */

/* What this backend leaves; any number of bytes. */
typedef struct {
    const void *router, *norm_weight;
    float x[WIDTH];
    char more[70001];
} sums;

static const kl_backend_vtbl *plain;
static int n_left, n_read;

static bool is_zero(const void *data, size_t bytes)
{
    const char *const at = data;
    return at[0] == 0 && memcmp(at, at + 1, bytes - 1) == 0;
}

static kl_status linear_that_adds(kl_backend *be, const kl_linear *a, kl_error *err)
{
    kl_linear bare = *a;
    sums *const s = a->ahead.sums;
    bare.ahead = (kl_router_ahead){0};
    KL_TRY(plain->linear(be, &bare, err));
    if (s == NULL) return KL_OK;
    EXPECT((uintptr_t)s % KL_SUMS_ALIGNMENT == 0 && is_zero(s, sizeof *s));
    s->router = a->ahead.router.data;
    s->norm_weight = a->ahead.norm_weight.data;
    memcpy(s->x, a->residual.data, sizeof s->x);
    memset(s->more, 1, sizeof s->more);
    n_left++;
    return KL_OK;
}

static kl_status moe_that_reads(kl_backend *be, const kl_moe *a, kl_error *err)
{
    kl_moe bare = *a;
    const sums *const s = a->sums;
    bare.sums = NULL;
    if (s != NULL) {
        EXPECT(s->router == a->router.data && s->norm_weight == a->norm_weight.data);
        EXPECT(memcmp(s->x, a->x.data, sizeof s->x) == 0 && s->more[70000] == 1);
        n_read++;
    }
    return plain->moe(be, &bare, err);
}

static size_t bytes_of_sums(kl_backend *be, const kl_weight *before, const kl_moe *a)
{
    (void)be;
    EXPECT(a->x.shape[0] == 1 && before->rows == WIDTH && a->router.cols == WIDTH);
    return sizeof(sums);
}

static kl_backend *open_summing(void)
{
    static kl_backend_vtbl below, table;
    kl_backend *be = open_recording(false);
    plain = cpu;
    below = *cpu;
    below.linear = linear_that_adds;
    below.moe = moe_that_reads;
    cpu = &below;
    table = *be->vt;
    table.router_sums = bytes_of_sums;
    be->vt = &table;
    n_left = n_read = 0;
    return be;
}

/* Of a plan, too, whose largest steps are of two tokens and need less. */
static void a_single_token_has_sums(void)
{
    kl_engine_options options = tiny_options;
    options.max_batch = options.step_tokens = 2;
    int32_t want[2][TOKENS], got[2][TOKENS];
    kl_backend *other = tiny_backend(1), *be = open_summing();
    kl_engine *a = tiny_engine_on(other, &options), *b = tiny_engine_on(be, &options);
    greedy_tokens(a, 1, TOKENS, *want);
    greedy_tokens(b, 1, TOKENS, *got);
    EXPECT(memcmp(want[0], got[0], sizeof want[0]) == 0);
    EXPECT(n_left == n_read && n_read >= MOE_LAYERS * (TOKENS - 1) && n_replayed > TOKENS / 2);
    EXPECT(n_read % MOE_LAYERS == 0);
    const int before = n_left;
    greedy_tokens(a, 2, TOKENS, *want);
    greedy_tokens(b, 2, TOKENS, *got);
    EXPECT(memcmp(want, got, sizeof want) == 0);
    EXPECT(n_left - before < MOE_LAYERS * TOKENS / 2); /* at the ends, where one is alone */
    kl_engine_free(b);
    kl_engine_free(a);
    kl_backend_close(other);
    kl_backend_close(be);
}

/* A backend that says so by 0 has none, and takes no room for them. */
static size_t no_bytes(kl_backend *be, const kl_weight *before, const kl_moe *a)
{
    (void)be, (void)before, (void)a;
    return 0;
}

static void a_layer_may_have_none(void)
{
    kl_backend *be = open_summing();
    kl_backend_vtbl table = *be->vt;
    kl_plan with, without;
    kl_error err = {KL_OK, ""};
    kl_engine_options options = tiny_options;
    options.max_batch = options.step_tokens = 1;
    EXPECT(kl_plan_make(be, &tiny_config, &options, &with, &err) == KL_OK);
    table.router_sums = no_bytes;
    be->vt = &table;
    EXPECT(kl_plan_make(be, &tiny_config, &options, &without, &err) == KL_OK);
    EXPECT(with.scratch_bytes > MOE_LAYERS * sizeof(sums));
    EXPECT(without.scratch_bytes < sizeof(sums));
    int32_t ids[2][TOKENS];
    kl_engine *e = tiny_engine_on(be, &options);
    greedy_tokens(e, 1, TOKENS, *ids);
    EXPECT(n_left == 0 && n_read == 0);
    kl_engine_free(e);
    kl_backend_close(be);
}

/* A layer of experts as large as the router, whose weights are all `square`'s. */
static kl_status run_layer(kl_backend *be, const kl_weight *square, float *x, float *n,
                           void *left, kl_error *err)
{
    kl_weight wide = *square, high = *square;
    wide.count = high.count = WIDTH;
    wide.rows = high.cols = 1;
    kl_moe a = {.x = kl_tensor_2d(x, KL_F32, 1, WIDTH),
                .norm_weight = kl_tensor_1d(n, KL_F32, WIDTH),
                .router = *square,
                .w1 = wide,
                .w3 = wide,
                .w2 = high,
                .residual = kl_tensor_2d(x, KL_F32, 1, WIDTH),
                .act = KL_F32,
                .norm_eps = 1e-5f,
                .score = KL_SCORE_SIGMOID,
                .top_k = 2,
                .groups = 1,
                .top_groups = 1,
                .scaling = 1,
                .sums = left};
    a.ws.bytes = kl_workspace_moe(be, &a);
    a.ws.data = kl_aligned_alloc(a.ws.bytes);
    const kl_status status = kl_run_moe(be, &a, err);
    kl_free(a.ws.data);
    return status;
}

/* The CPU leaves none and reads none, and refuses to. */
static void the_cpu_refuses(void)
{
    static _Alignas(KL_SUMS_ALIGNMENT) float w[WIDTH * WIDTH];
    static float x[WIDTH], r[WIDTH], n[WIDTH];
    kl_backend *be = tiny_backend(1);
    const kl_weight square = {
        .format = KL_W_F32, .count = 1, .rows = WIDTH, .cols = WIDTH, .data = w};
    kl_error err = {KL_OK, ""};
    kl_linear a = {
        .x = kl_tensor_2d(x, KL_F32, 1, WIDTH),
        .w = square,
        .residual = kl_tensor_2d(r, KL_F32, 1, WIDTH),
        .ahead = {.router = square, .norm_weight = kl_tensor_1d(n, KL_F32, WIDTH), .sums = w}};
    EXPECT(be->vt->router_sums == NULL);
    a.ws.bytes = kl_workspace_linear(be, &a);
    a.ws.data = kl_aligned_alloc(a.ws.bytes);
    EXPECT(kl_run_linear(be, &a, &err) == KL_ERR_UNAVAILABLE);
    EXPECT_TEXT(err.message, "linear: ahead.sums must be NULL, the cpu backend leaves none");
    kl_free(a.ws.data);
    EXPECT(run_layer(be, &square, r, n, NULL, &err) == KL_OK);
    EXPECT(run_layer(be, &square, r, n, w, &err) == KL_ERR_UNAVAILABLE);
    EXPECT_TEXT(err.message, "moe: sums must be NULL, the cpu backend reads none");
    kl_backend_close(be);
}

int main(void)
{
    RUN(a_single_token_has_sums);
    RUN(a_layer_may_have_none);
    RUN(the_cpu_refuses);
    return test_failures != 0;
}
