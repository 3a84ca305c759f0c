/*
 * test_checks_head.c -- what experts and sampling refuse, see checks.h; costs of some calls.
 */
#include "checks.h"

static kl_moe_experts experts_of(kl_weight_format format, int64_t tokens)
{
    return (kl_moe_experts){.x = f32(2, tokens, D, 1, 1),
                            .ids = i32(2, tokens, TOP),
                            .weights = f32(2, tokens, TOP, 1, 1),
                            .w1 = weight(format, E, I, D),
                            .w3 = weight(format, E, I, D),
                            .w2 = weight(format, E, D, I),
                            .out = f32(2, tokens, D, 1, 1)};
}

/* The layer around them, added to a stream. */
static kl_moe layer_of(const kl_moe_experts *m)
{
    return (kl_moe){.x = m->x,
                    .norm_weight = f32(1, D, 1, 1, 1),
                    .router = weight(KL_W_F32, 1, E, D),
                    .w1 = m->w1,
                    .w3 = m->w3,
                    .w2 = m->w2,
                    .residual = f32(2, m->x.shape[0], D, 1, 1),
                    .act = KL_BF16,
                    .top_k = TOP,
                    .groups = 1,
                    .top_groups = 1,
                    .norm_eps = 1e-5f,
                    .scaling = 1};
}

static void moe(void)
{
    kl_moe_route r = {.logits = f32(2, T, E, 1, 1),
                      .bias = f32(1, E, 1, 1, 1),
                      .ids = i32(2, T, TOP),
                      .weights = f32(2, T, TOP, 1, 1),
                      .score = KL_SCORE_SIGMOID,
                      .groups = 1,
                      .top_groups = 1,
                      .scaling = 1};
    ACCEPTED(moe_route, r, NOTHING);
    ACCEPTED(moe_route, r, (r.groups = 4, r.top_groups = 2));
    BAD_VALUE(moe_route, r, r.groups = 3, "moe_route: groups must divide the 8 experts, got 3");
    BAD_VALUE(moe_route, r, r.groups = 0, "moe_route: groups must be in 1 .. 8, got 0");
    BAD_VALUE(moe_route, r, (r.groups = 4, r.top_groups = 1),
              "moe_route: ids.shape[1] must be in 1 .. 2, got 3");
    BAD_VALUE(moe_route, r, r.top_groups = 2, "moe_route: top_groups must be in 1 .. 1, got 2");
    BAD_VALUE(moe_route, r, (r.groups = 8, r.top_groups = 8),
              "moe_route: experts of a group must be >= 2, got 1");
    BAD_VALUE(moe_route, r, (r.ids = i32(2, T, E + 1), r.weights = f32(2, T, E + 1, 1, 1)),
              "moe_route: ids.shape[1] must be in 1 .. 8, got 9");
    BAD_VALUE(moe_route, r, r.score = KL_N_SCORES, "moe_route: score must be in 0 .. 1, got 2");
    BAD_VALUE(moe_route, r, r.scaling = NAN, "moe_route: scaling must be finite, got nan");

    kl_moe_experts a = experts_of(KL_W_INT8, T);
    a.shared_w1 = a.shared_w3 = weight(KL_W_BF16, 1, 3, D);
    a.shared_w2 = weight(KL_W_BF16, 1, D, 3);
    const kl_weight no_weight = {0};
    ACCEPTED(moe_experts, a, NOTHING);
    ACCEPTED(moe_experts, a, a.shared_w1 = a.shared_w2 = a.shared_w3 = no_weight);
    BAD_VALUE(moe_experts, a, a.shared_w3 = no_weight,
              "moe_experts: shared_w1, shared_w3 and shared_w2 must come together, got 2 of 3");
    BAD_VALUE(moe_experts, a, a.w2.count = E - 1,
              "moe_experts: w2 must be 8 x [6, 12], each at least 1, got 7 x [6, 12]");
    BAD_VALUE(moe_experts, a, a.shared_w2.cols = 4,
              "moe_experts: shared_w2 must be 1 x [6, 3], each at least 1, got 1 x [6, 4]");
    BAD_VALUE(moe_experts, a, a.out = a.x, "moe_experts: out must not overlap x");
    BAD_VALUE(moe_experts, a, a.w1.count = a.w3.count = a.w2.count = 2,
              "moe_experts: ids.shape[1] must be in 1 .. 2, got 3");
}

static void moe_whole(void)
{
    const kl_moe_experts experts = experts_of(KL_W_INT8, T);
    kl_moe a = layer_of(&experts);
    a.bias = f32(1, E, 1, 1, 1);
    a.shared_w1 = a.shared_w3 = weight(KL_W_BF16, 1, 3, D);
    a.shared_w2 = weight(KL_W_BF16, 1, D, 3);
    const kl_tensor out = tensor(KL_BF16, 2, T, D, 1, 1);
    ACCEPTED(moe, a, NOTHING);
    ACCEPTED(moe, a, a.residual = a.x);
    ACCEPTED(moe, a, a.bias = none);
    ACCEPTED(moe, a, (a.residual = none, a.out = out));
    ACCEPTED(moe, a, (a.norm_weight = none, a.norm_eps = 0, a.act = KL_U8));
    BAD_VALUE(moe, a, a.residual = none, "moe: out or residual must be given");
    BAD_VALUE(moe, a, a.out = out, "moe: out must be absent with a residual");
    BAD_TYPE(moe, a, (a.residual = none, a.out = f32(2, T, D, 1, 1)),
             "moe: out must be bfloat16, got float32");
    BAD_VALUE(moe, a, (a.residual = none, a.act = KL_F32, a.out = a.x),
              "moe: out must not overlap x");
    BAD_TYPE(moe, a, a.act = KL_U8, "moe: act must be float32 or bfloat16, got uint8");
    BAD_VALUE(moe, a, a.norm_eps = 0, "moe: norm_eps must be finite and > 0, got 0");
    BAD_VALUE(moe, a, a.router.rows = E - 1,
              "moe: router must be 1 x [8, 6], each at least 1, got 1 x [7, 6]");
    BAD_VALUE(moe, a, a.top_k = E + 1, "moe: top_k must be in 1 .. 8, got 9");
    BAD_VALUE(moe, a, a.groups = 3, "moe: groups must divide the 8 experts, got 3");
    BAD_VALUE(moe, a, a.scaling = NAN, "moe: scaling must be finite, got nan");
    BAD_VALUE(moe, a, a.shared_w3.data = NULL,
              "moe: shared_w1, shared_w3 and shared_w2 must come together, got 2 of 3");
    BAD_VALUE(moe, a, a.w2.count = E - 1,
              "moe: w2 must be 8 x [6, 12], each at least 1, got 7 x [6, 12]");
    BAD_VALUE(moe, a, a.sums = a.router.data, "moe: x.shape[0] must be 1 with sums, got 5");
    BAD_VALUE(moe, a, (a.sums = a.router.data, a.norm_weight = none),
              "moe: sums must be NULL without a norm_weight");
}

static void logprobs_and_sampling(void)
{
    kl_token_logprobs l = {.hidden = f32(2, T, D, 1, 1),
                           .lm_head = weight(KL_W_BF16, 1, ROWS, D),
                           .targets = i32(1, T, 1),
                           .logprobs = f32(1, T, 1, 1, 1),
                           .greedy = tensor(KL_U8, 1, T, 1, 1, 1),
                           .top_ids = i32(2, T, TOP),
                           .top_logprobs = f32(2, T, TOP, 1, 1)};
    ACCEPTED(token_logprobs, l, NOTHING);
    ACCEPTED(token_logprobs, l, l.top_ids = l.top_logprobs = none);
    BAD_VALUE(token_logprobs, l, l.top_logprobs = none,
              "token_logprobs: top_ids and top_logprobs must come together");
    BAD_VALUE(token_logprobs, l,
              (l.top_ids = i32(2, T, ROWS + 1), l.top_logprobs = f32(2, T, ROWS + 1, 1, 1)),
              "token_logprobs: top_ids.shape[1] must be in 1 .. 70, got 71");
    BAD_TYPE(token_logprobs, l, l.greedy.dtype = KL_I32,
             "token_logprobs: greedy must be uint8, got int32");
    BAD_VALUE(token_logprobs, l, l.lm_head.rows = 0,
              "token_logprobs: lm_head.rows must be in 1 .. 2147483647, got 0");

    static const kl_sampling sampling[N];
    kl_sample s = {.logits = f32(2, N, 300, 1, 1),
                   .sampling = sampling,
                   .seen = i32(2, N, 10),
                   .ids = i32(1, N, 1),
                   .logprobs = f32(1, N, 1, 1, 1)};
    ACCEPTED(sample, s, NOTHING);
    ACCEPTED(sample, s, s.seen = none);
    BAD_VALUE(sample, s, s.sampling = NULL, "sample: sampling must be given, got NULL");
    BAD_VALUE(sample, s, s.seen.shape[1] = 9, "sample: seen.shape[1] must be 10, got 9");
    ACCEPTED(sample, s, s.peaks = f32(3, N, 19, 2, 1));
    BAD_VALUE(sample, s, s.peaks = f32(3, N, 18, 2, 1),
              "sample: peaks.shape[1] must be 19, got 18");
    BAD_VALUE(sample, s, (s.top_ids = i32(2, N, 257), s.top_logprobs = f32(2, N, 257, 1, 1)),
              "sample: top_ids.shape[1] must be in 1 .. 256, got 257");
    BAD_VALUE(sample, s, s.ids.data = s.logprobs.data, "sample: ids must not overlap logprobs");
}

/* ---- costs ------------------------------------------------------------------------------ */

static void costs_of_known_calls(void)
{
    const kl_linear l = {
        .x = f32(2, T, D, 1, 1), .w = weight(KL_W_INT8, 1, I, D), .out = f32(2, T, I, 1, 1)};
    EXPECT(kl_cost_linear(&l).flops == 2 * T * D * I);
    EXPECT(kl_cost_linear(&l).bytes == 4 * T * D + I * (64 + 2) + 4 * T * I);
    kl_linear ends = l;
    ends.out = none, ends.residual = l.out, ends.norm_weight = f32(1, D, 1, 1, 1);
    EXPECT(kl_cost_linear(&ends).flops == 2 * T * D * I + 4 * T * D + T * I);
    EXPECT(kl_cost_linear(&ends).bytes == 4 * T * D + 4 * D + I * (64 + 2) + 8 * T * I);

    const kl_kda d = right_kda(N);
    const double bytes = 4.0 * (2 * N * HK * K + N * H * V + N * H * K + N * H + N * H * V + N);
    EXPECT(kl_cost_kda_decode(&d).flops == 7.0 * N * H * V * K);
    EXPECT(kl_cost_kda_decode(&d).bytes == bytes + 2.0 * 4 * N * H * V * K);

    /* One token reads TOP of the E experts. */
    const kl_moe_experts m = experts_of(KL_W_F32, 1);
    EXPECT(kl_cost_moe_experts(&m).bytes == 4.0 * (2 * D + 2 * TOP + 3 * TOP * I * D));

    kl_moe w = layer_of(&m);
    w.residual = w.x;
    EXPECT(kl_cost_moe(&w).bytes == 4.0 * (D + D + E * D + 3 * TOP * I * D + 2 * D));
    EXPECT(kl_cost_moe(&w).flops ==
           4 * D + 2 * E * D + 5 * E + kl_cost_moe_experts(&m).flops + D);
}

static void cost_of_an_embedding_with_memory_to_set(void)
{
    kl_embedding e = {
        .ids = i32(1, T, 1), .table = weight(KL_W_BF16, 1, ROWS, D), .out = f32(2, T, D, 1, 1)};
    const double bytes = kl_cost_embedding(&e).bytes;
    EXPECT(bytes == 4 * T + 2 * T * D + 4 * T * D);
    e.sums = tensor(KL_U8, 1, 3 * KL_SUMS_ALIGNMENT, 1, 1, 1);
    EXPECT(kl_cost_embedding(&e).bytes == bytes + 3 * KL_SUMS_ALIGNMENT);
    e.blanks = tensor(KL_U8, 1, 2 * KL_SUMS_ALIGNMENT, 1, 1, 1);
    EXPECT(kl_cost_embedding(&e).bytes == bytes + 5 * KL_SUMS_ALIGNMENT);
}

/* Greedy rows with peaks read no more than 16 logits; a penalty or alternatives all of them. */
static void cost_of_greedy_rows(void)
{
    enum { VOCAB = 300, PEAKS = 19 };
    kl_sample s = {.logits = f32(2, N, VOCAB, 1, 1),
                   .peaks = f32(3, N, PEAKS, 2, 1),
                   .ids = i32(1, N, 1),
                   .logprobs = f32(1, N, 1, 1, 1),
                   .greedy = true};
    const double peaks = 8.0 * N * PEAKS, out = 4.0 * (N + N);
    const double all = 4.0 * N * VOCAB + N * sizeof(kl_sampling) + out;
    EXPECT(kl_cost_sample(&s).bytes == 4.0 * N * KL_PEAK_OUTPUTS + peaks + out);
    EXPECT(kl_cost_sample(&s).flops == 3.0 * N * (KL_PEAK_OUTPUTS + PEAKS));
    s.logits.shape[1] = 7, s.peaks.shape[1] = 1;
    EXPECT(kl_cost_sample(&s).bytes == 4.0 * N * 7 + 8.0 * N + out);
    s.logits.shape[1] = VOCAB, s.peaks.shape[1] = PEAKS;
    s.greedy = false;
    EXPECT(kl_cost_sample(&s).bytes == all + peaks &&
           kl_cost_sample(&s).flops == 3.0 * N * VOCAB);
    s.greedy = true, s.peaks = none;
    EXPECT(kl_cost_sample(&s).bytes == all && kl_cost_sample(&s).flops == 3.0 * N * VOCAB);
    s.peaks = f32(3, N, PEAKS, 2, 1), s.seen = i32(2, N, 10);
    EXPECT(kl_cost_sample(&s).bytes == all + peaks + 4.0 * N * 10);
    s.seen = none, s.top_ids = i32(2, N, 5), s.top_logprobs = f32(2, N, 5, 1, 1);
    EXPECT(kl_cost_sample(&s).bytes == all + peaks + 8.0 * N * 5);
}

int main(void)
{
    RUN(moe);
    RUN(moe_whole);
    RUN(logprobs_and_sampling);
    RUN(costs_of_known_calls);
    RUN(cost_of_an_embedding_with_memory_to_set);
    RUN(cost_of_greedy_rows);
    return test_failures != 0;
}
