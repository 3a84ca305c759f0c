/*
 * test_checks_mixer.c -- what convolutions, KDA and MLA refuse; see checks.h.
 */
#include "checks.h"

static void short_conv(void)
{
    kl_short_conv a = {.x = f32(2, T, C, 1, 1),
                       .weight = f32(2, C, W, 1, 1),
                       .state = f32(3, S, C, W - 1, 1),
                       .slots = i32(1, N, 1),
                       .cu_seqlens = i32(1, N + 1, 1),
                       .out = f32(2, T, C, 1, 1)};
    ACCEPTED(short_conv, a, NOTHING);
    ACCEPTED(short_conv, a, a.slots = none);
    ACCEPTED(short_conv, a, (a.weight = f32(2, C, 1, 1, 1), a.state = f32(3, S, C, 0, 1)));
    BAD_VALUE(short_conv, a, (a.weight.shape[1] = 9, a.state.shape[2] = 8),
              "short_conv: weight.shape[1] must be in 1 .. 8, got 9");
    BAD_VALUE(short_conv, a, a.weight.shape[1] = 0,
              "short_conv: weight.shape[1] must be in 1 .. 8, got 0");
    BAD_VALUE(short_conv, a, a.state = f32(3, S, C, W, 1),
              "short_conv: state.shape[2] must be 3, got 4");
    BAD_VALUE(short_conv, a, a.state.shape[0] = 2,
              "short_conv: state.shape[0] must be >= 3, got 2");
    BAD_VALUE(short_conv, a, a.cu_seqlens = none, "short_conv: cu_seqlens must be given");
    BAD_VALUE(short_conv, a, a.cu_seqlens.shape[0] = 1,
              "short_conv: cu_seqlens.shape[0] must be >= 2, got 1");
    BAD_VALUE(short_conv, a, a.slots.shape[0] = 2,
              "short_conv: slots.shape[0] must be 3, got 2");
    BAD_VALUE(short_conv, a, a.out = a.x, "short_conv: out must not overlap x");
    BAD_TYPE(short_conv, a, a.weight.dtype = KL_BF16,
             "short_conv: weight must be float32, got bfloat16");
}

static void kda_shapes(void)
{
    kl_kda a = right_kda(T);
    a.cu_seqlens = i32(1, N + 1, 1);
    ACCEPTED(kda_prefill, a, NOTHING);
    ACCEPTED(kda_prefill, a, a.slots = none);
    ACCEPTED(kda_prefill, a, a.q.stride[0] = 3 * HK * K);
    BAD_VALUE(kda_prefill, a, a.q = f32(3, T, HK, K - 1, 1),
              "kda_prefill: q.shape[2] must be 8, got 7");
    BAD_VALUE(kda_prefill, a, a.state = f32(4, S, H, K, V), /* transposed */
              "kda_prefill: q.shape[2] must be 10, got 8");
    BAD_VALUE(kda_prefill, a, a.k = f32(3, T, H, K, 1),
              "kda_prefill: k.shape[1] must be 2, got 4");
    BAD_VALUE(kda_prefill, a, (a.q = f32(3, T, 3, K, 1), a.k = f32(3, T, 3, K, 1)),
              "kda_prefill: state.shape[1] must be a multiple of q.shape[1], got 4 and 3");
    BAD_VALUE(kda_prefill, a,
              (a.q.shape[2] = a.k.shape[2] = a.g.shape[2] = a.state.shape[3] = 257,
               a.q.shape[0] = a.k.shape[0] = a.v.shape[0] = a.g.shape[0] = 0,
               a.beta.shape[0] = a.out.shape[0] = a.state.shape[0] = 0,
               a.q.stride[1] = a.k.stride[1] = a.g.stride[1] = a.state.stride[2] = 257,
               a.state.stride[1] = 257 * V, a.cu_seqlens.shape[0] = 1, a.slots.shape[0] = 0),
              "kda_prefill: state.shape[3] must be in 1 .. 256, got 257");
    BAD_VALUE(kda_prefill, a, a.cu_seqlens = none, "kda_prefill: cu_seqlens must be given");
    BAD_VALUE(kda_prefill, a, a.state.shape[0] = 2,
              "kda_prefill: state.shape[0] must be >= 3, got 2");
    BAD_TYPE(kda_prefill, a, a.state.dtype = KL_BF16,
             "kda_prefill: state must be float32, got bfloat16");
    BAD_TYPE(kda_prefill, a, a.v.dtype = KL_BF16,
             "kda_prefill: v must be float32, got bfloat16");
    BAD_VALUE(kda_prefill, a, a.out = a.v, "kda_prefill: out must not overlap v");
    BAD_VALUE(kda_prefill, a, a.k.data = a.state.data, "kda_prefill: state must not overlap k");
    BAD_VALUE(kda_prefill, a, a.scale = INFINITY, "kda_prefill: scale must be finite, got inf");
}

static void kda_checkpoints(void)
{
    kl_kda a = right_kda(T);
    a.cu_seqlens = i32(1, N + 1, 1);
    ACCEPTED(kda_prefill, a, (a.checkpoints = f32(4, 0, H, V, K), a.checkpoint_every = 64));
    BAD_VALUE(kda_prefill, a, (a.checkpoints = f32(4, 0, H, V, K), a.checkpoint_every = 72),
              "kda_prefill: checkpoint_every must be a multiple of 64, got 72");
    BAD_VALUE(kda_prefill, a, (a.checkpoints = f32(4, 0, H, V, K), a.checkpoint_every = 0),
              "kda_prefill: checkpoint_every must be a multiple of 64, got 0");
    BAD_VALUE(kda_prefill, a, (a.checkpoints = f32(4, 1, H, V, K), a.checkpoint_every = 64),
              "kda_prefill: checkpoints.shape[0] must be 0, got 1");
    a = right_kda(N);
    BAD_VALUE(kda_decode, a, (a.checkpoints = f32(4, 0, H, V, K), a.checkpoint_every = 64),
              "kda_decode: checkpoints must be absent");
}

static void kda_mixer(void)
{
    const int64_t all = H * (2 * K + V);
    kl_kda_mixer a = {.qkv = f32(2, T, all, 1, 1),
                      .conv_weight = f32(2, all, W, 1, 1),
                      .conv_state = f32(3, S, all, W - 1, 1),
                      .f_low = f32(2, T, RANK, 1, 1),
                      .f_b = weight(KL_W_BF16, 1, H * K, RANK),
                      .g_low = f32(2, T, D, 1, 1),
                      .g_b = weight(KL_W_INT8, 1, H * V, D),
                      .beta = f32(2, T, H, 1, 1),
                      .state = f32(4, S, H, V, K),
                      .slots = i32(1, N, 1),
                      .cu_seqlens = i32(1, N + 1, 1),
                      .norm_weight = f32(1, V, 1, 1, 1),
                      .out = f32(3, T, H, V, 1),
                      .gate = KL_GATE_DIRECT,
                      .scale = 0.5f,
                      .eps = 1e-5f};
    ACCEPTED(kda_mixer, a, NOTHING);
    ACCEPTED(kda_mixer, a, a.slots = none);
    BAD_VALUE(kda_mixer, a, a.state = f32(4, S, H, K, V), /* transposed */
              "kda_mixer: norm_weight.shape[0] must be 8, got 10");
    BAD_VALUE(kda_mixer, a, a.f_low.shape[0] = T - 1,
              "kda_mixer: f_low.shape[0] must be 5, got 4");
    BAD_VALUE(kda_mixer, a, a.f_b.rows--,
              "kda_mixer: f_b must be 1 x [32, 9], each at least 1, got 1 x [31, 9]");
    BAD_VALUE(kda_mixer, a, a.g_b.cols--,
              "kda_mixer: g_b must be 1 x [40, 6], each at least 1, got 1 x [40, 5]");
    BAD_VALUE(
        kda_mixer, a,
        (a.qkv = f32(2, T, all - H, 1, 1), a.conv_weight.shape[0] = all - H,
         a.conv_state = f32(3, S, all - H, W - 1, 1)),
        "kda_mixer: qkv.shape[1] must be H (2 K + V) of state [S, H, V, K], got 100 with H 4, "
        "V 10, K 8");
    ACCEPTED(kda_mixer, a, a.guesses = true);
    ACCEPTED(kda_mixer, a, (a.guesses = true, a.tokens = i32(1, T, 1), a.drawn = i32(1, T, 1)));
    BAD_VALUE(kda_mixer, a, (a.guesses = true, a.drawn = i32(1, T, 1)),
              "kda_mixer: tokens and drawn must come together, got drawn");
    BAD_VALUE(kda_mixer, a, (a.tokens = i32(1, T, 1), a.drawn = i32(1, T, 1)),
              "kda_mixer: drawn must be absent without guesses");
    BAD_VALUE(kda_mixer, a, a.guesses = a.single = true,
              "kda_mixer: single must be false with guesses");
    BAD_VALUE(kda_mixer, a, (a.guesses = true, a.tokens = i32(1, T, 1), a.drawn = i32(1, N, 1)),
              "kda_mixer: drawn.shape[0] must be 5, got 3");
    BAD_VALUE(kda_mixer, a, a.single = true,
              "kda_mixer: single tokens need a sequence each, got 5 tokens of 3");
    BAD_VALUE(kda_mixer, a, a.arriving = true,
              "kda_mixer: single must be true with arriving inputs");
    BAD_VALUE(kda_mixer, a,
              (a.arriving = a.single = true, a.cu_seqlens = i32(1, T + 1, 1), a.slots = none,
               a.state = f32(4, T, H, V, K), a.conv_state = f32(3, T, all, W - 1, 1)),
              "kda_mixer: an arriving qkv must be bfloat16 of one token, got float32 of 5");
    BAD_VALUE(kda_mixer, a, a.gate = KL_GATE_SOFTPLUS,
              "kda_mixer: A_log must be given with a softplus gate");
    BAD_VALUE(kda_mixer, a, a.conv_weight.shape[1] = 9,
              "kda_mixer: conv_weight.shape[1] must be in 1 .. 8, got 9");
    BAD_VALUE(kda_mixer, a, a.cu_seqlens = none, "kda_mixer: cu_seqlens must be given");
    BAD_VALUE(kda_mixer, a, a.out.data = a.g_low.data, "kda_mixer: out must not overlap g_low");
    BAD_VALUE(kda_mixer, a, a.eps = 0, "kda_mixer: eps must be finite and > 0, got 0");
}

static void kda_gates(void)
{
    kl_kda a = right_kda(N);
    const kl_tensor A_log = f32(1, H, 1, 1, 1), bias = f32(2, H, K, 1, 1);
    ACCEPTED(kda_decode, a, NOTHING);
    ACCEPTED(kda_decode, a, (a.gate = KL_GATE_SOFTPLUS, a.A_log = A_log, a.dt_bias = bias));
    ACCEPTED(kda_decode, a, (a.gate = KL_GATE_SOFTPLUS, a.A_log = A_log));
    ACCEPTED(kda_decode, a, (a.gate = KL_GATE_BOUNDED, a.lower_bound = -5));
    BAD_VALUE(kda_decode, a, a.gate = KL_GATE_SOFTPLUS,
              "kda_decode: A_log must be given with a softplus gate");
    BAD_VALUE(kda_decode, a, a.A_log = A_log,
              "kda_decode: A_log must be absent with a direct gate");
    BAD_VALUE(kda_decode, a, a.dt_bias = bias,
              "kda_decode: dt_bias must be absent with a direct gate");
    BAD_VALUE(kda_decode, a, a.gate = KL_GATE_BOUNDED,
              "kda_decode: lower_bound must be < 0, got 0");
    BAD_VALUE(kda_decode, a, (a.gate = KL_GATE_BOUNDED, a.lower_bound = -INFINITY),
              "kda_decode: lower_bound must be finite, got -inf");
    BAD_VALUE(kda_decode, a, a.gate = KL_N_GATES, "kda_decode: gate must be in 0 .. 2, got 3");
    BAD_VALUE(kda_decode, a,
              (a.gate = KL_GATE_SOFTPLUS, a.A_log = A_log, a.dt_bias = f32(2, H, V, 1, 1)),
              "kda_decode: dt_bias.shape[1] must be 8, got 10");
    BAD_VALUE(kda_decode, a, a.cu_seqlens = i32(1, N + 1, 1),
              "kda_decode: cu_seqlens must be absent");
    BAD_VALUE(kda_decode, a, a.slots.shape[0] = 2,
              "kda_decode: slots.shape[0] must be 3, got 2");
}

static kl_mla_append append_to(kl_tensor pages)
{
    return (kl_mla_append){.raw = f32(2, T, RANK + ROPE, 1, 1),
                           .norm_weight = f32(1, RANK, 1, 1, 1),
                           .pages = pages,
                           .block_table = i32(2, N, B),
                           .lengths = i32(1, N, 1),
                           .cu_seqlens = i32(1, N + 1, 1),
                           .eps = 1e-5f};
}

static void mla_append(void)
{
    kl_mla_append a = append_to(f32(3, P, KL_PAGE_TOKENS, RANK + ROPE, 1));
    ACCEPTED(mla_append, a, NOTHING);
    ACCEPTED(mla_append, a, (a.norm_weight = none, a.eps = 0));
    ACCEPTED(mla_append, a,
             (a.cu_seqlens = none, a.lengths = i32(1, T, 1), a.block_table = i32(2, T, B)));
    BAD_VALUE(mla_append, a, a.eps = -1, "mla_append: eps must be finite and > 0, got -1");
    BAD_VALUE(mla_append, a, a.norm_weight = f32(1, RANK + ROPE + 1, 1, 1, 1),
              "mla_append: norm_weight.shape[0] must be in 1 .. 12, got 13");
    BAD_VALUE(mla_append, a, a.pages.shape[1] = 32,
              "mla_append: pages.shape[1] must be 64, got 32");
    BAD_VALUE(mla_append, a, a.pages.shape[0] = 0,
              "mla_append: pages.shape[0] must be in 1 .. 2147483647, got 0");
    BAD_VALUE(mla_append, a, a.lengths.shape[0] = 2,
              "mla_append: lengths.shape[0] must be 3, got 2");
}

/* 8-bit pages of 9 codes, 3 other channels and a scale: rows of 48 bytes. */
static kl_tensor packed_pages(void)
{
    const kl_latents_row row = kl_latents_row_of(RANK, ROPE);
    kl_tensor pages = f32(3, P, KL_PAGE_TOKENS, row.row_bytes, 1);
    pages.dtype = KL_U8;
    return pages;
}

static void mla_append_of_8_bits(void)
{
    kl_mla_append a = append_to(packed_pages());
    a.rank = RANK;
    ACCEPTED(mla_append, a, NOTHING);
    ACCEPTED(mla_append, a, (a.norm_weight = none, a.eps = 0));
    BAD_VALUE(mla_append, a, a.rank = 0, "mla_append: rank must be in 1 .. 12, got 0");
    BAD_VALUE(mla_append, a, a.rank = RANK + ROPE + 1,
              "mla_append: rank must be in 1 .. 12, got 13");
    BAD_VALUE(mla_append, a, a.norm_weight.shape[0] = RANK - 1,
              "mla_append: norm_weight.shape[0] must be 9, got 8");
    BAD_VALUE(mla_append, a, a.pages.shape[2] -= 16,
              "mla_append: pages.shape[2] must be 48, got 32");
    BAD_VALUE(mla_append, a, a.pages.data = (char *)a.pages.data + 8,
              "mla_append: pages must be aligned to 16 bytes as they are uint8");
}

static kl_tensor bytes_of(int64_t n)
{
    static _Alignas(64) uint8_t some[64];
    return kl_tensor_1d(some, KL_U8, n);
}

static kl_mla attend_to(kl_tensor pages)
{
    return (kl_mla){.q = f32(3, N, H, NOPE + ROPE, 1),
                    .pages = pages,
                    .block_table = i32(2, N, B),
                    .lengths = i32(1, N, 1),
                    .w_kv_b = f32(3, H, NOPE + V, RANK, 1),
                    .out = f32(3, N, H, V, 1),
                    .scale = 0.1f};
}

/* q and raw that are arriving: of one token, in mla_decode. */
static void mla_arriving(void)
{
    kl_mla a = attend_to(f32(3, P, KL_PAGE_TOKENS, RANK + ROPE, 1));
    BAD_VALUE(mla_decode, a, a.blanks = bytes_of(64),
              "mla_decode: raw must be given with blanks");
    BAD_VALUE(mla_decode, a, (a.blanks = bytes_of(64), a.raw = f32(2, N, RANK + ROPE, 1, 1)),
              "mla_decode: an arriving q must be bfloat16 of one token, got float32 of 3");
    a.q = f32(3, T, H, NOPE + ROPE, 1), a.out = f32(3, T, H, V, 1);
    a.cu_seqlens = i32(1, N + 1, 1);
    BAD_VALUE(mla_prefill, a, a.blanks = bytes_of(64), "mla_prefill: blanks must be absent");
}

static void mla_of_8_bits(void)
{
    kl_mla a = attend_to(packed_pages());
    ACCEPTED(mla_decode, a, NOTHING);
    ACCEPTED(mla_decode, a, a.raw = f32(2, N, RANK + ROPE, 1, 1));
    BAD_VALUE(mla_decode, a, a.raw = f32(2, N, RANK + ROPE + 1, 1, 1),
              "mla_decode: raw.shape[1] must be 12, got 13");
    BAD_VALUE(mla_decode, a, a.q = f32(3, N, H, NOPE - 1, 1),
              "mla_decode: q.shape[2] must be in 5 .. 2147483647, got 4");
    BAD_VALUE(mla_decode, a, a.pages.shape[2] -= 16,
              "mla_decode: pages.shape[2] must be 48, got 32");
}

static void mla_lay_out(void)
{
    kl_mla_lay_out a = {.cu_past = i32(1, N + 1, 1),
                        .cu_seqlens = i32(1, N + 1, 1),
                        .lengths = i32(1, N, 1),
                        .block_table = i32(2, N, B)};
    ACCEPTED(mla_lay_out, a, NOTHING);
    ACCEPTED(mla_lay_out, a, a.cu_past = none);
    BAD_VALUE(mla_lay_out, a, a.cu_seqlens = none, "mla_lay_out: cu_seqlens must be given");
    BAD_VALUE(mla_lay_out, a, a.cu_past.shape[0] = 2,
              "mla_lay_out: cu_past.shape[0] must be 4, got 2");
    BAD_VALUE(mla_lay_out, a, a.lengths.shape[0] = 2,
              "mla_lay_out: lengths.shape[0] must be 3, got 2");
}

static void mla(void)
{
    kl_mla a = attend_to(f32(3, P, KL_PAGE_TOKENS, RANK + ROPE, 1));
    ACCEPTED(mla_decode, a, NOTHING);
    ACCEPTED(mla_decode, a, a.w_kv_b.dtype = KL_BF16);
    BAD_VALUE(mla_decode, a, a.q = f32(3, N, H, NOPE + ROPE + 1, 1),
              "mla_decode: q.shape[2] must be 8, got 9");
    BAD_VALUE(mla_decode, a, a.out = f32(3, N, H, NOPE + V, 1),
              "mla_decode: q.shape[2] must be 3, got 8");
    BAD_VALUE(mla_decode, a, (a.q = f32(3, N, H, ROPE, 1), a.out = f32(3, N, H, NOPE + V, 1)),
              "mla_decode: out.shape[2] must be in 1 .. 14, got 15");
    BAD_VALUE(mla_decode, a, a.block_table.shape[1] = 0,
              "mla_decode: block_table.shape[1] must be in 1 .. 2147483647, got 0");
    BAD_VALUE(mla_decode, a, a.scale = NAN, "mla_decode: scale must be finite, got nan");
    BAD_VALUE(mla_decode, a, a.cu_seqlens = i32(1, N + 1, 1),
              "mla_decode: cu_seqlens must be absent");
    ACCEPTED(mla_decode, a, a.raw = f32(2, N, RANK + ROPE, 1, 1));
    BAD_VALUE(mla_decode, a, a.raw = f32(2, N, RANK, 1, 1),
              "mla_decode: raw.shape[1] must be 12, got 9");
    BAD_VALUE(mla_decode, a, a.norm_weight = f32(1, RANK, 1, 1, 1),
              "mla_decode: raw must be given with a norm_weight");
    BAD_VALUE(mla_decode, a,
              (a.raw = f32(2, N, RANK + ROPE, 1, 1), a.norm_weight = f32(1, RANK, 1, 1, 1)),
              "mla_decode: norm_eps must be finite and > 0, got 0");
    BAD_VALUE(mla_prefill, a, NOTHING, "mla_prefill: cu_seqlens must be given");
    BAD_VALUE(mla_prefill, a,
              (a.cu_seqlens = i32(1, N + 1, 1), a.raw = f32(2, N, RANK + ROPE, 1, 1)),
              "mla_prefill: raw must be absent");
    BAD_VALUE(mla_prefill, a,
              (a.cu_seqlens = i32(1, N + 1, 1), a.norm_weight = f32(1, RANK, 1, 1, 1)),
              "mla_prefill: norm_weight must be absent");
    ACCEPTED(mla_prefill, a, a.cu_seqlens = i32(1, N + 1, 1));
    BAD_TYPE(mla_prefill, a, (a.cu_seqlens = i32(1, N + 1, 1), a.pages.dtype = KL_BF16),
             "mla_prefill: pages must be float32 or uint8, got bfloat16");
    a.w_kv_b.shape[1] = INT64_MIN, a.out.shape[2] = INT64_MAX; /* must not overflow */
    kl_error err;
    EXPECT(kl_check_mla_decode(&a, &err) == KL_ERR_VALUE);
}

int main(void)
{
    RUN(short_conv);
    RUN(kda_shapes);
    RUN(kda_checkpoints);
    RUN(kda_mixer);
    RUN(kda_gates);
    RUN(mla_append);
    RUN(mla_append_of_8_bits);
    RUN(mla_arriving);
    RUN(mla_of_8_bits);
    RUN(mla_lay_out);
    RUN(mla);
    return test_failures != 0;
}
