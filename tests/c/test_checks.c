/*
 * test_checks.c -- what operations on rows and products refuse; see checks.h.
 */
#include "checks.h"

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
    e.sums = tensor(KL_U8, 1, 3 * KL_SUMS_ALIGNMENT, 1, 1, 1);
    ACCEPTED(embedding, e, NOTHING);
    ACCEPTED(embedding, e, e.sums = none);
    BAD_TYPE(embedding, e, e.sums.dtype = KL_F32, "embedding: sums must be uint8, got float32");
    BAD_VALUE(embedding, e, e.sums.data = (char *)e.sums.data + 16,
              "embedding: sums must be aligned to 64 bytes, got 16 past it");
    BAD_VALUE(embedding, e, e.sums.shape[0]--,
              "embedding: sums.shape[0] must be a multiple of 64, got 191");
    BAD_VALUE(embedding, e, e.sums.data = e.out.data, "embedding: out must not overlap sums");
    BAD_VALUE(embedding, e, e.sums.data = e.ids.data, "embedding: sums must not overlap ids");
    e.blanks = tensor(KL_U8, 1, 2 * KL_SUMS_ALIGNMENT, 1, 1, 1);
    ACCEPTED(embedding, e, NOTHING);
    ACCEPTED(embedding, e, e.sums = none);
    BAD_TYPE(embedding, e, e.blanks.dtype = KL_BF16,
             "embedding: blanks must be uint8, got bfloat16");
    BAD_VALUE(embedding, e, e.blanks.data = (char *)e.blanks.data + 16,
              "embedding: blanks must be aligned to 64 bytes, got 16 past it");
    BAD_VALUE(embedding, e, e.blanks.shape[0]--,
              "embedding: blanks.shape[0] must be a multiple of 64, got 127");
    BAD_VALUE(embedding, e, e.blanks.data = e.sums.data,
              "embedding: sums must not overlap blanks");

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
    a.peaks = f32(3, T, 1, 2, 1);
    ACCEPTED(linear, a, NOTHING);
    ACCEPTED(linear, a, a.x.dtype = KL_BF16);
    BAD_TYPE(linear, a, a.x.dtype = a.out.dtype = KL_BF16,
             "linear: out must be float32, got bfloat16");
    BAD_VALUE(linear, a, a.peaks.shape[1] = 2, "linear: peaks.shape[1] must be 1, got 2");
    BAD_VALUE(linear, a, a.peaks.data = a.out.data, "linear: out must not overlap peaks");
    BAD_VALUE(linear, a, a.peaks.data = (char *)a.peaks.data + 4,
              "linear: peaks must be aligned to 8 bytes, got 4 past it");
    BAD_VALUE(linear, a, (a.residual = a.out, a.out = none),
              "linear: peaks must be absent without an out");
}

/* A router's work for the layer behind: of one token's residual. */
static void linear_ahead(void)
{
    static _Alignas(KL_SUMS_ALIGNMENT) char sums[2 * KL_SUMS_ALIGNMENT];
    kl_linear a = {.x = f32(2, 1, D, 1, 1),
                   .w = weight(KL_W_INT4, 1, I, D),
                   .residual = f32(2, 1, I, 1, 1),
                   .ahead = {.router = weight(KL_W_F32, 1, 7, I),
                             .norm_weight = f32(1, I, 1, 1, 1),
                             .sums = sums}};
    ACCEPTED(linear, a, NOTHING);
    ACCEPTED(linear, a, (a.ahead.sums = NULL, a.x.shape[0] = a.residual.shape[0] = 0));
    BAD_VALUE(linear, a, (a.out = a.residual, a.residual = none),
              "linear: ahead.sums must be NULL without a residual");
    BAD_VALUE(linear, a, (a.x = f32(2, 2, D, 1, 1), a.residual = f32(2, 2, I, 1, 1)),
              "linear: x.shape[0] must be 1 with ahead.sums, got 2");
    BAD_VALUE(linear, a, a.ahead.sums = sums + 8,
              "linear: ahead.sums must be aligned to 64 bytes, got 8 past it");
    BAD_VALUE(linear, a, a.ahead.norm_weight = none, "linear: ahead.norm_weight must be given");
    BAD_VALUE(linear, a, a.ahead.norm_weight.shape[0] = D,
              "linear: ahead.norm_weight.shape[0] must be 12, got 6");
    BAD_TYPE(linear, a, a.ahead.router = weight(KL_W_BF16, 1, 7, I),
             "linear: ahead.router must be float32, got bfloat16");
    BAD_VALUE(linear, a, a.ahead.router.cols = D,
              "linear: ahead.router must be 1 x [7, 12], each at least 1, got 1 x [7, 6]");
    kl_linear_pair pair = {.first = a, .second = a};
    pair.second.residual = f32(2, 1, I, 1, 1);
    BAD_VALUE(linear_pair, pair, NOTHING, "linear_pair: first.ahead.sums must be NULL");
    BAD_VALUE(linear_pair, pair, pair.first.ahead.sums = NULL,
              "linear_pair: second.ahead.sums must be NULL");
}

/* An x that is arriving: of one token, without a norm, not in a pair. */
static void linear_arriving(void)
{
    kl_linear a = {.x = f32(2, 1, D, 1, 1),
                   .w = weight(KL_W_INT4, 1, I, D),
                   .residual = f32(2, 1, I, 1, 1),
                   .arriving = true};
    a.x.dtype = KL_BF16;
    ACCEPTED(linear, a, NOTHING);
    BAD_VALUE(linear, a, a.x.dtype = KL_F32,
              "linear: an arriving x must be bfloat16 of one token, got float32 of 1");
    BAD_VALUE(linear, a,
              (a.x = f32(2, 2, D, 1, 1), a.x.dtype = KL_BF16, a.residual = f32(2, 2, I, 1, 1)),
              "linear: an arriving x must be bfloat16 of one token, got bfloat16 of 2");
    BAD_VALUE(linear, a,
              (a.norm_weight = f32(1, D, 1, 1, 1), a.act = KL_BF16, a.norm_eps = 1e-5f),
              "linear: norm_weight must be absent with an arriving x");
    kl_linear_pair pair = {.first = a, .second = a};
    pair.second.residual = f32(2, 1, I, 1, 1);
    BAD_VALUE(linear_pair, pair, NOTHING, "linear_pair: first.arriving must be false");
    BAD_VALUE(linear_pair, pair, pair.first.arriving = false,
              "linear_pair: second.arriving must be false");
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
    BAD_VALUE(linear_pair, a, a.first.peaks = f32(3, T, 1, 2, 1),
              "linear_pair: first.peaks must be absent");
    BAD_VALUE(linear_pair, a, a.second.peaks = f32(3, T, 1, 2, 1),
              "linear_pair: second.peaks must be absent");
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

int main(void)
{
    RUN(embedding_and_gather);
    RUN(norms);
    RUN(linear);
    RUN(linear_ahead);
    RUN(linear_arriving);
    RUN(linear_pair);
    RUN(ends_of_products);
    RUN(ends_of_pairs_and_mlp);
    RUN(column_slices_interleave);
    RUN(mlp_and_weights);
    return test_failures != 0;
}
