/*
 * test_arriving_mla.c -- an MLA layer's inputs read as they arrive (backend/arrivals.h): its three
 * operations have the bits that they have one after the other, at contexts from one token on, also
 * of numbers that are none. Skips CUDA where KL_CUDA_LIBRARY finds no device; steps are in
 * test_arriving.c.
 */
#include "pieces.h"

enum { NOPE = 128, ROPE = 64, RANK = 512, WIDTH = RANK + ROPE, V = 128 };

typedef struct {
    kl_linear_pair in;
    kl_mla_decode a;
    kl_linear last;
} layer;

/* What operations share, in whatever memory it lies. */
static void connect(layer *l)
{
    const int64_t H = l->a.w_kv_b.shape[0];
    l->in.second.x = l->last.residual = l->in.first.x;
    l->in.second.norm_weight = l->in.first.norm_weight;
    l->a.raw = l->in.first.out;
    l->a.q = kl_heads(l->in.second.out, H, NOPE + ROPE);
    l->a.out = kl_heads(l->last.x, H, V);
}

/* Numbers in all rows of tokens before the last one; that and what lies behind are none. */
static kl_tensor pages_of(int64_t length, int64_t B)
{
    kl_tensor pages = tensor(KL_BF16, true, 3, B, KL_PAGE_TOKENS, WIDTH, 1);
    for (int64_t i = 0; i < (length - 1) * WIDTH; i++) {
        const int64_t page = B - 1 - i / (KL_PAGE_TOKENS * WIDTH);
        put(&pages, page * KL_PAGE_TOKENS * WIDTH + i % (KL_PAGE_TOKENS * WIDTH), number());
    }
    return pages;
}

/* Of a token of a layer with H heads, whose stream is D wide. Results are blank. */
static layer layer_of(int64_t H, int64_t D, int32_t length, int32_t B, kl_weight_format format)
{
    int32_t table[256];
    for (int32_t i = 0; i < B; i++) table[i] = B - 1 - i;
    layer l = {0};
    l.in.first = (kl_linear){.x = tensor(KL_F32, false, 2, 1, D, 1, 1),
                             .norm_weight = tensor(KL_F32, false, 1, D, 1, 1, 1),
                             .act = KL_BF16,
                             .norm_eps = 1e-5f,
                             .w = weight(format, WIDTH, D),
                             .out = tensor(KL_BF16, true, 2, 1, WIDTH, 1, 1)};
    l.in.second = l.in.first;
    l.in.second.w = weight(format, H * (NOPE + ROPE), D);
    l.in.second.out = tensor(KL_BF16, true, 2, 1, H * (NOPE + ROPE), 1, 1);
    l.a = (kl_mla_decode){.pages = pages_of(length, B),
                          .block_table = integers(B, table),
                          .lengths = integers(1, &length),
                          .w_kv_b = tensor(KL_BF16, false, 3, H, NOPE + V, RANK, 1),
                          .norm_weight = tensor(KL_F32, false, 1, RANK, 1, 1, 1),
                          .norm_eps = 1e-5f,
                          .scale = 0.02f};
    l.a.block_table = kl_tensor_2d(l.a.block_table.data, KL_I32, 1, B);
    l.last.x = tensor(KL_BF16, true, 2, 1, H * V, 1, 1);
    l.last.w = weight(format, D, H * V);
    connect(&l);
    return l;
}

/* On a backend without it, where all is complete, any. */
static kl_mla_arrivals arrivals_of(kl_backend *be, const layer *l)
{
    kl_mla_arrivals all = {64, true};
    kl_error err = {KL_OK, ""};
    if (be->vt->mla_arrivals == NULL) return all;
    EXPECT(be->vt->mla_arrivals(be, &l->in, &l->a, &l->last, &all, &err) == KL_OK);
    return all;
}

/* Workspace that is not blank. */
static kl_workspace written(kl_backend *be, size_t bytes)
{
    void *const here = memset(kl_malloc(bytes + 1), 0x3f, bytes + 1);
    const kl_workspace ws = {sent(be, here, bytes), bytes};
    kl_free(here);
    return ws;
}

/* All of it is on its way before one waits. */
static void run_layer(kl_backend *be, layer *l, kl_mla_arrivals how)
{
    kl_error err = {KL_OK, ""};
    void *const blanks = poisoned(be, how.blanks);
    connect(l);
    if (how.blanks > 0) l->a.blanks = kl_tensor_1d(blanks, KL_U8, (int64_t)how.blanks);
    l->last.arriving = how.out;
    l->in.ws = written(be, kl_workspace_linear_pair(be, &l->in));
    l->a.ws = written(be, kl_workspace_mla_decode(be, &l->a));
    l->last.ws = written(be, kl_workspace_linear(be, &l->last));
    EXPECT(kl_run_linear_pair(be, &l->in, &err) == KL_OK);
    EXPECT(kl_run_mla_decode(be, &l->a, &err) == KL_OK);
    EXPECT(kl_run_linear(be, &l->last, &err) == KL_OK);
    EXPECT(be->vt->sync(be, &err) == KL_OK);
    EXPECT_TEXT(err.message, "");
    be->vt->free(be, blanks, how.blanks);
    be->vt->free(be, l->in.ws.data, l->in.ws.bytes);
    be->vt->free(be, l->a.ws.data, l->a.ws.bytes);
    be->vt->free(be, l->last.ws.data, l->last.ws.bytes);
}

static void run_arriving(kl_backend *be, void *call)
{
    run_layer(be, call, arrivals_of(be, call));
}

static void run_out_arriving(kl_backend *be, void *call)
{
    run_layer(be, call, (kl_mla_arrivals){0, arrivals_of(be, call).out});
}

static void run_in_turn(kl_backend *be, void *call)
{
    run_layer(be, call, (kl_mla_arrivals){0});
}

/* spoiled: one number of the stream, or 0. */
static void check_layer(int64_t H, int32_t length, int32_t B, kl_weight_format format,
                        float spoiled)
{
    enum { D = 512 };
    parts p = {0};
    layer a = layer_of(H, D, length, B, format);
    char name[64];
    snprintf(name, sizeof name, "layer: H %lld, length %d of %d pages, format %d, %g",
             (long long)H, length, B, format, (double)spoiled);
    if (spoiled != 0) put(&a.in.first.x, D / 2, spoiled);
    OUT(a.in.first.x, 0);
    IN(a.in.first.norm_weight);
    WEIGHT(a.in.first.w);
    WEIGHT(a.in.second.w);
    OUT(a.in.first.out, 0);
    OUT(a.in.second.out, 0);
    OUT(a.a.pages, 0);
    IN(a.a.block_table);
    IN(a.a.lengths);
    IN(a.a.w_kv_b);
    IN(a.a.norm_weight);
    OUT(a.last.x, 0);
    WEIGHT(a.last.w);
    if (length < 100 && (cpu->vt->formats & 1u << format) != 0)
        same_bits(cpu, &p, &a, sizeof a, run_arriving, run_in_turn, name);
    if (cuda != NULL) {
        const kl_mla_arrivals both = arrivals_of(cuda, &a);
        EXPECT(both.blanks > 0 && both.out);
        same_bits(cuda, &p, &a, sizeof a, run_arriving, run_in_turn, name);
        same_bits(cuda, &p, &a, sizeof a, run_out_arriving, run_in_turn, name);
    }
    used = 0;
}

/* A NaN is a word like others: nobody waits for it. */
static void layers(void)
{
    static const float spoils[] = {0, NAN, INFINITY};
    for (kl_weight_format f = KL_W_BF16; f < KL_N_WEIGHT_FORMATS; f++)
        for (int i = 0; i < 3; i++) check_layer(f == KL_W_BF16 ? 32 : 4, 70, 4, f, spoils[i]);
}

/* The last of them are too long for a block a page. */
static void contexts(void)
{
    static const int32_t lengths[][2] = {{1, 1},     {2, 1},     {63, 1},    {64, 1},
                                         {65, 2},    {129, 4},   {1023, 16}, {1025, 32},
                                         {4096, 64}, {4096, 65}, {4097, 128}};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i += brief ? 3 : 1) {
        check_layer(4, lengths[i][0], lengths[i][1], KL_W_BF16, 0);
        check_layer(32, lengths[i][0], lengths[i][1], KL_W_BF16, 0);
    }
}

/* Other shapes wait for the end of what they follow, and cannot be told otherwise. */
static void others_are_refused(void)
{
    kl_error err = {KL_OK, ""};
    if (cuda == NULL) return;
    layer l = layer_of(4, 512, 5, 1, KL_W_BF16);
    l.a.norm_weight = (kl_tensor){0};
    EXPECT(arrivals_of(cuda, &l).blanks == 0 && arrivals_of(cuda, &l).out);
    l.a.blanks = tensor(KL_U8, true, 1, 64, 1, 1, 1);
    const size_t bytes = kl_workspace_mla_decode(cuda, &l.a);
    l.a.ws = (kl_workspace){poisoned(cuda, bytes), bytes};
    EXPECT(kl_run_mla_decode(cuda, &l.a, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message,
                "mla_decode: blanks must be absent unless mla_arrivals() asks for them");
    cuda->vt->free(cuda, l.a.ws.data, bytes);
    l.a.w_kv_b.dtype = KL_F32;
    EXPECT(!arrivals_of(cuda, &l).out);
    used = 0;
}

int main(void)
{
    open_both();
    RUN(layers);
    RUN(contexts);
    RUN(others_are_refused);
    return close_both();
}
