/*
 * test_checks.c -- what each operation refuses, and in which words.
 *
 * Every case starts from a call that is right, spoils one thing and expects one message. The
 * calls have unequal sizes throughout (K != V, H != Hk), so that no shape fits by chance.
 */
#include "test.h"

#include "backend/ops.h"

#include <math.h>
#include <stdint.h>

enum { T = 5, N = 3, S = 4, D = 6, H = 4, HK = 2, K = 8, V = 10, C = 7, W = 4, E = 8, I = 12 };
enum { RANK = 9, ROPE = 3, NOPE = 5, P = 6, B = 2, TOP = 3, ROWS = 70 };

/* Memory that nobody reads: each tensor gets a piece of its own. */
static _Alignas(64) char memory[1 << 20];
static size_t used;
static const kl_tensor none;

static void *piece(size_t bytes)
{
    void *p = memory + used;
    used += (bytes + 63) / 64 * 64;
    return p;
}

static kl_tensor tensor(kl_dtype dtype, int ndim, int64_t a, int64_t b, int64_t c, int64_t d)
{
    const int64_t shape[] = {a, b, c, d};
    kl_tensor t = kl_tensor_dense(NULL, dtype, ndim, shape);
    t.data = piece((size_t)kl_tensor_size(&t) * kl_dtype_bytes(dtype));
    return t;
}

static kl_tensor f32(int ndim, int64_t a, int64_t b, int64_t c, int64_t d)
{
    return tensor(KL_F32, ndim, a, b, c, d);
}

static kl_tensor i32(int ndim, int64_t a, int64_t b)
{
    return tensor(KL_I32, ndim, a, b, 1, 1);
}

static kl_weight weight(kl_weight_format format, int64_t count, int64_t rows, int64_t cols)
{
    kl_weight w = {.format = format, .count = count, .rows = rows, .cols = cols};
    w.data = piece(kl_weight_data_bytes(&w));
    if (kl_weight_groups(format, cols) != 0) w.scales = piece(kl_weight_scale_bytes(&w));
    return w;
}

/* Spoil a right call, expect a message, and put everything back. */
#define REFUSED(op, call, spoil, expected_status, text)                                        \
    do {                                                                                       \
        const __typeof__(call) good_ = (call);                                                 \
        kl_error err_ = {KL_OK, ""};                                                           \
        spoil;                                                                                 \
        EXPECT(kl_check_##op(&(call), &err_) == (expected_status));                            \
        EXPECT(err_.status == (expected_status));                                              \
        EXPECT_TEXT(err_.message, text);                                                       \
        (call) = good_;                                                                        \
    } while (0)
#define BAD_VALUE(op, call, spoil, text) REFUSED(op, call, spoil, KL_ERR_VALUE, text)
#define BAD_TYPE(op, call, spoil, text)  REFUSED(op, call, spoil, KL_ERR_TYPE, text)

#define ACCEPTED(op, call, change)                                                             \
    do {                                                                                       \
        const __typeof__(call) good_ = (call);                                                 \
        kl_error err_ = {KL_OK, ""};                                                           \
        change;                                                                                \
        EXPECT(kl_check_##op(&(call), &err_) == KL_OK);                                        \
        EXPECT_TEXT(err_.message, "");                                                         \
        const kl_cost cost_ = kl_cost_##op(&(call));                                           \
        EXPECT(isfinite(cost_.flops) && cost_.flops >= 0);                                     \
        EXPECT(isfinite(cost_.bytes) && cost_.bytes >= 0);                                     \
        (call) = good_;                                                                        \
    } while (0)

#define NOTHING ((void)0)

/* ---- rows and products ------------------------------------------------------------------ */

static void embedding_and_gather(void)
{
    kl_embedding e = {
        .ids = i32(1, T, 1), .table = weight(KL_W_BF16, 1, ROWS, D), .out = f32(2, T, D, 1, 1)};
    ACCEPTED(embedding, e, NOTHING);
    ACCEPTED(embedding, e, e.ids.shape[0] = e.out.shape[0] = 0);
    BAD_TYPE(embedding, e, e.table.format = KL_W_INT8,
             "embedding: table must be float32 or bfloat16, got int8");
    BAD_VALUE(embedding, e, e.table.cols = D + 1,
              "embedding: table must be 1 x [70, 6], each at least 1, got 1 x [70, 7]");
    BAD_TYPE(embedding, e, e.ids.dtype = KL_F32, "embedding: ids must be int32, got float32");
    BAD_VALUE(embedding, e, e.table.data = NULL, "embedding: table must have data, got NULL");

    kl_gather g = {.x = f32(2, T, D, 1, 1), .rows = i32(1, N, 1), .out = f32(2, N, D, 1, 1)};
    ACCEPTED(gather, g, NOTHING);
    BAD_TYPE(gather, g, g.out.dtype = KL_BF16, "gather: out must be float32, got bfloat16");
    BAD_VALUE(gather, g, g.out.shape[1] = 5, "gather: out.shape[1] must be 6, got 5");
    BAD_VALUE(gather, g, g.x.shape[0] = 0, "gather: x.shape[0] must be >= 1, got 0");
    BAD_VALUE(gather, g, g.out.data = g.x.data, "gather: out must not overlap x");
}

static void norms(void)
{
    kl_rms_norm n = {.x = f32(2, T, D, 1, 1),
                     .residual = f32(2, T, D, 1, 1),
                     .weight = f32(1, D, 1, 1, 1),
                     .out = f32(2, T, D, 1, 1),
                     .eps = 1e-5f};
    ACCEPTED(rms_norm, n, NOTHING);
    ACCEPTED(rms_norm, n, n.out = n.x);
    ACCEPTED(rms_norm, n, n.residual = none);
    ACCEPTED(rms_norm, n, n.x = none);
    ACCEPTED(rms_norm, n, (n.out = none, n.eps = 0));
    BAD_VALUE(rms_norm, n, n.residual = n.x = none, "rms_norm: x or residual must be given");
    BAD_VALUE(rms_norm, n, n.residual = n.out = none,
              "rms_norm: out or residual must be given");
    BAD_VALUE(rms_norm, n, n.eps = 0, "rms_norm: eps must be finite and > 0, got 0");
    BAD_VALUE(rms_norm, n, n.eps = NAN, "rms_norm: eps must be finite and > 0, got nan");
    BAD_VALUE(rms_norm, n, n.eps = INFINITY, "rms_norm: eps must be finite and > 0, got inf");
    BAD_VALUE(rms_norm, n, n.weight = none, "rms_norm: weight must be given");
    BAD_VALUE(rms_norm, n, n.out.data = (char *)n.x.data + 4,
              "rms_norm: out must not overlap x");
    ACCEPTED(rms_norm, n, (n.residual = f32(2, T, 2 * D, 1, 1), n.residual.shape[1] = D));
    BAD_VALUE(rms_norm, n, n.residual.stride[0] = D - 1,
              "rms_norm: rows of residual must not overlap: stride[0] must be >= 6, got 5");

    kl_gated_rms_norm g = {.x = f32(3, T, H, V, 1),
                           .z = f32(3, T, H, V, 1),
                           .weight = f32(1, V, 1, 1, 1),
                           .out = f32(3, T, H, V, 1),
                           .eps = 1e-5f};
    ACCEPTED(gated_rms_norm, g, NOTHING);
    ACCEPTED(gated_rms_norm, g, g.out = g.x);
    BAD_VALUE(gated_rms_norm, g, g.out = g.z, "gated_rms_norm: out must not overlap z");
    BAD_VALUE(gated_rms_norm, g, g.weight.shape[0] = H,
              "gated_rms_norm: weight.shape[0] must be 10, got 4");
    BAD_VALUE(gated_rms_norm, g, g.x.stride[1] = V + 1,
              "gated_rms_norm: x must be dense past its first axis: stride[1] must be 10, got "
              "11");
}

static void linear(void)
{
    kl_linear a = {
        .x = f32(2, T, D, 1, 1), .w = weight(KL_W_INT4, 1, I, D), .out = f32(2, T, I, 1, 1)};
    ACCEPTED(linear, a, NOTHING);
    ACCEPTED(linear, a, a.x.shape[0] = a.out.shape[0] = 0);
    ACCEPTED(linear, a, a.x.stride[0] = -D);
    ACCEPTED(linear, a, a.x.dtype = KL_BF16); /* the product may be stored in f32 */
    ACCEPTED(linear, a, a.x.dtype = a.out.dtype = KL_BF16);
    BAD_TYPE(linear, a, a.x.dtype = KL_I32, "linear: x must be float32 or bfloat16, got int32");
    BAD_TYPE(linear, a, a.x.dtype = (kl_dtype)77,
             "linear: x must be float32 or bfloat16, got ?");
    BAD_TYPE(linear, a, a.out.dtype = KL_BF16, "linear: out must be float32, got bfloat16");
    BAD_VALUE(linear, a, a.x = none, "linear: x must be given");
    BAD_VALUE(linear, a, a.x.ndim = 3, "linear: x must have 2 axes, got 3");
    BAD_VALUE(linear, a, a.x.shape[0] = a.out.shape[0] = -1,
              "linear: x.shape[0] must be >= 0, got -1");
    BAD_VALUE(linear, a, a.x.shape[1] = a.w.cols = 0, "linear: x.shape[1] must be >= 1, got 0");
    BAD_VALUE(linear, a, a.x.data = NULL, "linear: x must have data, got NULL");
    BAD_VALUE(linear, a, a.x.data = (char *)a.x.data + 2,
              "linear: x must be aligned to its 4-byte elements");
    BAD_VALUE(linear, a, a.x.stride[1] = 2,
              "linear: x must be dense past its first axis: stride[1] must be 1, got 2");
    BAD_VALUE(linear, a, a.out.stride[0] = I - 1,
              "linear: rows of out must not overlap: stride[0] must be >= 12, got 11");
    BAD_VALUE(linear, a, a.x.shape[0] = a.out.shape[0] = INT64_MAX / 4,
              "linear: x must have fewer than 2^60 elements");
    BAD_VALUE(linear, a, a.w.scales = NULL,
              "linear: w must have scales as it is int4, got NULL");
    BAD_VALUE(linear, a, a.w.count = 2,
              "linear: w must be 1 x [12, 6], each at least 1, got 2 x [12, 6]");
    BAD_TYPE(linear, a, a.w.format = (kl_weight_format)9,
             "linear: w must be float32 or bfloat16, int8, int4 or fp8, got ?");
}

/* Column slices of one buffer may be operand and result; shared columns may not. */
static void linear_pair(void)
{
    kl_linear_pair a = {
        .first = {.x = f32(2, T, D, 1, 1),
                  .w = weight(KL_W_INT4, 1, I, D),
                  .out = f32(2, T, I, 1, 1)},
        .second = {.x = f32(2, T, I, 1, 1),
                   .w = weight(KL_W_BF16, 1, D, I),
                   .out = f32(2, T, D, 1, 1)},
    };
    ACCEPTED(linear_pair, a, NOTHING);
    ACCEPTED(linear_pair, a, (a.second = a.first, a.second.out = f32(2, T, I, 1, 1)));
    BAD_VALUE(linear_pair, a, a.second.x = a.first.out,
              "linear_pair: first.out must not overlap second.x");
    BAD_VALUE(linear_pair, a, a.second = a.first,
              "linear_pair: first.out must not overlap second.out");
    BAD_VALUE(linear_pair, a, a.second.x.shape[0] = T - 1,
              "linear_pair: second.x.shape[0] must be 5, got 4");
    BAD_VALUE(linear_pair, a, a.second.w.rows = D + 1,
              "linear_pair: second.w must be 1 x [6, 12], each at least 1, got 1 x [7, 12]");
    BAD_TYPE(linear_pair, a, a.second.x.dtype = KL_BF16,
             "linear_pair: second.x must be float32, got bfloat16");
}

/* The stream is float32, what comes of its norm bf16. */
static void ends_of_products(void)
{
    kl_linear a = {.x = f32(2, T, D, 1, 1),
                   .w = weight(KL_W_F32, 1, I, D),
                   .norm_weight = f32(1, D, 1, 1, 1),
                   .residual = f32(2, T, I, 1, 1),
                   .act = KL_BF16,
                   .norm_eps = 1e-5f};
    ACCEPTED(linear, a, NOTHING);
    ACCEPTED(linear, a, a.x.dtype = KL_BF16);
    ACCEPTED(linear, a, (a.out = a.residual, a.out.dtype = KL_BF16, a.residual = none));
    BAD_TYPE(linear, a, (a.x.dtype = KL_BF16, a.act = KL_F32),
             "linear: x must be float32, got bfloat16");
    BAD_TYPE(linear, a, a.act = KL_U8, "linear: act must be float32 or bfloat16, got uint8");
    BAD_TYPE(linear, a, a.act = (kl_dtype)77, "linear: act must be float32 or bfloat16, got ?");
    BAD_TYPE(linear, a, a.norm_weight.dtype = KL_BF16,
             "linear: norm_weight must be float32, got bfloat16");
    BAD_TYPE(linear, a, a.residual.dtype = KL_BF16,
             "linear: residual must be float32, got bfloat16");
    BAD_VALUE(linear, a, a.norm_weight.shape[0] = D + 1,
              "linear: norm_weight.shape[0] must be 6, got 7");
    BAD_VALUE(linear, a, a.norm_eps = 0, "linear: norm_eps must be finite and > 0, got 0");
    BAD_VALUE(linear, a, a.residual.shape[0] = T + 1,
              "linear: residual.shape[0] must be 5, got 6");
    BAD_VALUE(linear, a, a.residual.stride[0] = I + 1,
              "linear: residual must be dense: stride[0] must be 12, got 13");
    BAD_VALUE(linear, a, a.residual.data = a.x.data, "linear: residual must not overlap x");
    BAD_VALUE(linear, a, a.out = f32(2, T, I, 1, 1),
              "linear: out must be absent with a residual");
    BAD_VALUE(linear, a, a.residual = none, "linear: out or residual must be given");
}

static void ends_of_pairs_and_mlp(void)
{
    kl_linear_pair a = {.first = {.x = f32(2, T, D, 1, 1),
                                  .w = weight(KL_W_F32, 1, I, D),
                                  .norm_weight = f32(1, D, 1, 1, 1),
                                  .out = f32(2, T, I, 1, 1),
                                  .act = KL_BF16,
                                  .norm_eps = 1e-5f}};
    a.second = a.first, a.second.out = f32(2, T, I, 1, 1);
    ACCEPTED(linear_pair, a, NOTHING);
    ACCEPTED(linear_pair, a, (a.second.norm_weight = none, a.second.x.dtype = KL_BF16));
    BAD_TYPE(linear_pair, a, a.second.norm_weight = none,
             "linear_pair: second.x must be bfloat16, got float32");
    BAD_TYPE(linear_pair, a, a.second.act = KL_F32,
             "linear_pair: second.act must be the first's, got float32");
    BAD_VALUE(linear_pair, a, a.second.norm_eps = -1,
              "linear_pair: second.norm_eps must be finite and > 0, got -1");
    BAD_VALUE(linear_pair, a, (a.first.out = none, a.first.residual = a.second.out),
              "linear_pair: first.residual must not overlap second.out");

    kl_mlp m = {.x = f32(2, T, D, 1, 1),
                .w1 = weight(KL_W_F32, 1, I, D),
                .w3 = weight(KL_W_F32, 1, I, D),
                .w2 = weight(KL_W_F32, 1, D, I),
                .norm_weight = f32(1, D, 1, 1, 1),
                .act = KL_BF16,
                .norm_eps = 1e-5f};
    m.residual = m.x;
    ACCEPTED(mlp, m, NOTHING);
    BAD_VALUE(mlp, m, m.residual.data = (float *)m.x.data + 1,
              "mlp: residual must not overlap x");
    BAD_VALUE(mlp, m, m.residual = none, "mlp: out or residual must be given");
    BAD_TYPE(mlp, m, (m.residual = none, m.out = f32(2, T, D, 1, 1)),
             "mlp: out must be bfloat16, got float32");
}

static void column_slices_interleave(void)
{
    enum { WIDTH = 40 };
    float *buffer = piece(T * WIDTH * sizeof *buffer);
    kl_linear a = {.x = kl_tensor_2d(buffer, KL_F32, T, D),
                   .w = weight(KL_W_F32, 1, I, D),
                   .out = kl_tensor_2d(buffer + D, KL_F32, T, I)};
    a.x.stride[0] = a.out.stride[0] = WIDTH;
    ACCEPTED(linear, a, NOTHING);
    ACCEPTED(linear, a, (a.out.data = buffer, a.x.data = buffer + I));
    ACCEPTED(linear, a, a.out.data = buffer + WIDTH - I);
    BAD_VALUE(linear, a, a.out.data = buffer + D - 1, "linear: out must not overlap x");
    BAD_VALUE(linear, a, a.out.data = buffer + WIDTH - I + 1, "linear: out must not overlap x");
    BAD_VALUE(linear, a, a.x.stride[0] = WIDTH - 1, "linear: out must not overlap x");
    ACCEPTED(linear, a, a.out.data = buffer + T * WIDTH);
}

static void mlp_and_weights(void)
{
    kl_mlp m = {.x = f32(2, T, D, 1, 1),
                .w1 = weight(KL_W_BF16, 1, I, D),
                .w3 = weight(KL_W_INT8, 1, I, D),
                .w2 = weight(KL_W_F32, 1, D, I),
                .out = f32(2, T, D, 1, 1)};
    ACCEPTED(mlp, m, NOTHING);
    BAD_VALUE(mlp, m, m.out = m.x, "mlp: out must not overlap x");
    BAD_VALUE(mlp, m, m.w2.cols = I - 1,
              "mlp: w2 must be 1 x [6, 12], each at least 1, got 1 x [6, 11]");
    BAD_VALUE(mlp, m, m.w3.rows = I - 1,
              "mlp: w3 must be 1 x [12, 6], each at least 1, got 1 x [11, 6]");

    kl_pack_weight p = {.src = f32(2, I, D, 1, 1), .out = weight(KL_W_INT8, 1, I, D)};
    ACCEPTED(pack_weight, p, NOTHING);
    ACCEPTED(pack_weight, p, p.src.stride[0] = 3 * D);
    BAD_VALUE(pack_weight, p, p.out.scales = NULL,
              "pack_weight: out must have scales as it is int8, got NULL");
    BAD_VALUE(pack_weight, p, p.out.rows = p.src.shape[0] = 0,
              "pack_weight: out must be 1 x [0, 6], each at least 1, got 1 x [0, 6]");

    kl_fill_normal f = {.out = f32(3, T, D, H, 1), .std = 1};
    ACCEPTED(fill_normal, f, NOTHING);
    ACCEPTED(fill_normal, f, f.out.ndim = 0);
    ACCEPTED(fill_normal, f, f.out.shape[1] = 0);
    BAD_VALUE(fill_normal, f, f.std = -1, "fill_normal: std must be >= 0, got -1");
    BAD_VALUE(fill_normal, f, f.std = NAN, "fill_normal: std must be finite, got nan");
    BAD_VALUE(fill_normal, f, f.mean = -INFINITY, "fill_normal: mean must be finite, got -inf");
    BAD_VALUE(fill_normal, f, f.out.ndim = 6, "fill_normal: out.ndim must be in 0 .. 5, got 6");
    BAD_TYPE(fill_normal, f, f.out.dtype = KL_U8,
             "fill_normal: out must be float32 or bfloat16, got uint8");
}

/* ---- mixers ----------------------------------------------------------------------------- */

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

static kl_kda right_kda(int64_t tokens)
{
    return (kl_kda){.q = f32(3, tokens, HK, K, 1),
                    .k = f32(3, tokens, HK, K, 1),
                    .v = f32(3, tokens, H, V, 1),
                    .g = f32(3, tokens, H, K, 1),
                    .beta = f32(2, tokens, H, 1, 1),
                    .state = f32(4, S, H, V, K),
                    .slots = i32(1, N, 1),
                    .out = f32(3, tokens, H, V, 1),
                    .gate = KL_GATE_DIRECT,
                    .scale = 0.5f};
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

/* ---- experts and sampling --------------------------------------------------------------- */

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

int main(void)
{
    RUN(embedding_and_gather);
    RUN(norms);
    RUN(linear);
    RUN(linear_pair);
    RUN(ends_of_products);
    RUN(ends_of_pairs_and_mlp);
    RUN(column_slices_interleave);
    RUN(mlp_and_weights);
    RUN(short_conv);
    RUN(kda_shapes);
    RUN(kda_mixer);
    RUN(kda_gates);
    RUN(kda_checkpoints);
    RUN(mla_lay_out);
    RUN(mla_append);
    RUN(mla_append_of_8_bits);
    RUN(mla_of_8_bits);
    RUN(mla);
    RUN(moe);
    RUN(moe_whole);
    RUN(logprobs_and_sampling);
    RUN(costs_of_known_calls);
    return test_failures != 0;
}
