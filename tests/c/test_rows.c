/*
 * test_rows.c -- picking rows (embedding, gather) and writing latents into pages (mla_append),
 * which have no name in Python; and attention over pages whose unused parts are poison, in
 * workspace of exactly the size asked for, which the sanitizers watch.
 */
#include "operation.h"

#include "base/bf16.h"
#include "base/rng.h"

#include <math.h>

#define ABSURD (1 << 30) /* a table entry that must not be followed */

static kl_backend *open_backend(int threads, const char *variant)
{
    const kl_backend_options options = {.threads = threads, .variant = variant};
    kl_backend *be = NULL;
    kl_error err;
    if (kl_backend_open("cpu", NULL, &options, &be, &err) != KL_OK)
        printf("  %s\n", err.message);
    return be;
}

/* Numbers in [-1, 1), the same for the same index. */
static float number(int64_t i)
{
    return (float)(2.0 * kl_rng_uniform(7, (uint64_t)i) - 1.0);
}

static void fill(float *x, int64_t n, int64_t first)
{
    for (int64_t i = 0; i < n; i++) x[i] = number(first + i);
}

/* ---- embedding and gather -------------------------------------------------------------- */

enum { ROWS = 50, D = 37, PICKED = 4000 }; /* enough rows for several tasks */

static void check_embedding(kl_backend *be, kl_weight_format format, kl_dtype out_dtype)
{
    static float before_table[(ROWS + 1) * D], out[PICKED * D];
    static uint16_t before_half[(ROWS + 1) * D]; /* no id picks their first rows */
    float *const table = before_table + D;
    uint16_t *const half_table = before_half + D;
    static int32_t ids[PICKED];
    fill(table, ROWS * D, 0);
    memset(before_table, 0xff, D * sizeof *before_table);
    memset(before_half, 0xff, D * sizeof *before_half);
    for (int i = 0; i < ROWS * D; i++) half_table[i] = kl_f32_to_bf16(table[i]);
    for (int i = 0; i < PICKED; i++) ids[i] = (i * 16 + 3) % (ROWS + 1) - 1;
    poison(out, PICKED * D);

    kl_embedding a = {.ids = kl_tensor_1d(ids, KL_I32, PICKED),
                      .table = {format, 1, ROWS, D, NULL, NULL},
                      .out = kl_tensor_2d(out, out_dtype, PICKED, D)};
    a.table.data = format == KL_W_F32 ? (void *)table : (void *)half_table;
    RUN_OP(embedding, be, a);
    int wrong = 0;
    for (int i = 0; i < PICKED * D; i++) {
        const int from = ids[i / D] < 0 ? -1 : ids[i / D] * D + i % D;
        const float rounded = from < 0 ? 0.0f : kl_bf16_to_f32(half_table[from]);
        const float exact = from < 0 ? 0.0f : table[from];
        const bool rounds = format != KL_W_F32 || out_dtype != KL_F32;
        const float got =
            out_dtype == KL_F32 ? out[i] : kl_bf16_to_f32(((const uint16_t *)out)[i]);
        wrong += got != (rounds ? rounded : exact);
    }
    EXPECT(wrong == 0);
}

static void embedding_converts(void)
{
    kl_backend *be = open_backend(3, NULL);
    check_embedding(be, KL_W_F32, KL_F32);
    check_embedding(be, KL_W_F32, KL_BF16);
    check_embedding(be, KL_W_BF16, KL_F32);
    check_embedding(be, KL_W_BF16, KL_BF16);
    kl_backend_close(be);
}

/* Sums 0, blanks 0xff, all of them and no byte beside, also where there are no rows. */
static void embedding_sets_memory(void)
{
    enum { AROUND = KL_SUMS_ALIGNMENT, SUMS = 40 * AROUND, BLANKS = 20 * AROUND };
    static _Alignas(KL_SUMS_ALIGNMENT) unsigned char memory[SUMS + BLANKS + 3 * AROUND];
    unsigned char *const sums = memory + AROUND, *const blanks = sums + SUMS + AROUND;
    kl_backend *be = open_backend(3, NULL);
    float values[ROWS * D], out[D];
    int32_t id = 7;
    fill(values, ROWS * D, 0);
    for (int n = 0; n < 2; n++) {
        int wrong = 0;
        memset(memory, 7, sizeof memory);
        kl_embedding a = {.ids = kl_tensor_1d(&id, KL_I32, n),
                          .table = {KL_W_F32, 1, ROWS, D, values, NULL},
                          .out = kl_tensor_2d(out, KL_F32, n, D),
                          .sums = kl_tensor_1d(sums, KL_U8, SUMS),
                          .blanks = kl_tensor_1d(blanks, KL_U8, BLANKS)};
        RUN_OP(embedding, be, a);
        for (unsigned char *at = memory; at < memory + sizeof memory; at++) {
            const bool zero = at >= sums && at < sums + SUMS;
            const bool blank = at >= blanks && at < blanks + BLANKS;
            wrong += *at != (zero ? 0 : blank ? 0xff : 7);
        }
        EXPECT(wrong == 0);
    }
    kl_backend_close(be);
}

static void gather_picks_rows(void)
{
    kl_backend *be = open_backend(2, NULL);
    float x[5 * 3], out[4 * 3];
    int32_t rows[] = {4, 0, 0, 2};
    fill(x, 15, 0);
    poison(out, 12);
    kl_gather a = {.x = kl_tensor_2d(x, KL_F32, 5, 3),
                   .rows = kl_tensor_1d(rows, KL_I32, 4),
                   .out = kl_tensor_2d(out, KL_F32, 4, 3)};
    RUN_OP(gather, be, a);
    for (int i = 0; i < 4; i++)
        EXPECT(memcmp(out + 3 * i, x + 3 * rows[i], 3 * sizeof *x) == 0);
    kl_backend_close(be);
}

/* ---- writing latents ------------------------------------------------------------------- */

/* Four sequences: new tokens 70, 0, 1 and 3, behind 60, 5, 63 and 0 earlier ones. The raw rows
 * lie in a wider matrix, as the projection that makes them does. */
enum { N = 4, T = 74, B = 4, P = 9, RANK = 19, ROPE = 5, WIDTH = RANK + ROPE, STRIDE = 31 };
static int32_t cu[N + 1] = {0, 70, 70, 71, 74};
static int32_t lengths[N] = {130, 5, 64, 3};
static int32_t table[N * B] = {8, 1,      5,      ABSURD, 0, ABSURD, ABSURD, ABSURD,
                               3, ABSURD, ABSURD, ABSURD, 7, ABSURD, ABSURD, ABSURD};

static kl_mla_append append_args(float *raw, float *weight, float *pages)
{
    kl_mla_append a = {.pages = kl_tensor_3d(pages, KL_F32, P, KL_PAGE_TOKENS, WIDTH),
                       .block_table = kl_tensor_2d(table, KL_I32, N, B),
                       .lengths = kl_tensor_1d(lengths, KL_I32, N),
                       .cu_seqlens = kl_tensor_1d(cu, KL_I32, N + 1),
                       .eps = 1e-3f};
    a.raw = kl_tensor_2d(raw, KL_F32, T, WIDTH);
    a.raw.stride[0] = STRIDE;
    if (weight != NULL) a.norm_weight = kl_tensor_1d(weight, KL_F32, RANK);
    return a;
}

/* Where token t was to go, or NULL. */
static const float *place_of(const float *pages, int t)
{
    int n = 0;
    while (cu[n + 1] <= t) n++;
    const int position = lengths[n] - (cu[n + 1] - t);
    const int page = table[n * B + position / KL_PAGE_TOKENS];
    return pages + (page * KL_PAGE_TOKENS + position % KL_PAGE_TOKENS) * WIDTH;
}

static void check_append(const char *variant, int threads)
{
    static float raw[T * STRIDE], weight[RANK], pages[P * KL_PAGE_TOKENS * WIDTH];
    kl_backend *be = open_backend(threads, variant);
    if (be == NULL) return; /* this CPU lacks the variant */
    fill(raw, T * STRIDE, 0);
    fill(weight, RANK, 9999);
    poison(pages, P * KL_PAGE_TOKENS * WIDTH);
    kl_mla_append a = append_args(raw, weight, pages);
    RUN_OP(mla_append, be, a);

    double worst = 0.0;
    for (int t = 0; t < T; t++) {
        const float *from = raw + t * STRIDE, *to = place_of(pages, t);
        double squares = 0.0;
        for (int i = 0; i < RANK; i++) squares += (double)from[i] * from[i];
        const double factor = 1.0 / sqrt(squares / RANK + 1e-3);
        for (int i = 0; i < RANK; i++)
            worst = fmax(worst, fabs(to[i] - from[i] * factor * weight[i]));
        EXPECT(memcmp(to + RANK, from + RANK, ROPE * sizeof *to) == 0);
    }
    EXPECT(worst < 1e-6);
    int written = 0;
    for (int i = 0; i < P * KL_PAGE_TOKENS * WIDTH; i++) written += pages[i] == pages[i];
    EXPECT(written == T * WIDTH); /* and nothing else */
    kl_backend_close(be);
}

static void append_normalises_into_pages(void)
{
    check_append("scalar", 1);
    check_append(NULL, 1);
    check_append(NULL, 3);
}

static void append_copies_without_weight(void)
{
    static float raw[T * STRIDE], pages[P * KL_PAGE_TOKENS * WIDTH];
    kl_backend *be = open_backend(1, NULL);
    fill(raw, T * STRIDE, 0);
    poison(pages, P * KL_PAGE_TOKENS * WIDTH);
    kl_mla_append a = append_args(raw, NULL, pages);
    RUN_OP(mla_append, be, a);
    for (int t = 0; t < T; t++)
        EXPECT(memcmp(place_of(pages, t), raw + t * STRIDE, WIDTH * sizeof *raw) == 0);
    kl_backend_close(be);
}

/* ---- laying out pages ------------------------------------------------------------------- */

/* Every context has pages enough, of its own, below the bound that the host knows. */
static void contexts_share_no_page(void)
{
    enum { SEQUENCES = 7, WIDEST = 5 };
    static const int32_t counts[SEQUENCES] = {70, 0, 1, 64, 63, 130, 0};
    static const int32_t pasts[SEQUENCES] = {60, 5, 63, 0, 2, 128, 0};
    int32_t new[SEQUENCES + 1] = {0}, past[SEQUENCES + 1] = {0};
    int32_t found[SEQUENCES], places[SEQUENCES * WIDEST], users[SEQUENCES + 20] = {0};
    for (int n = 0; n < SEQUENCES; n++) new[n + 1] = new[n] + counts[n];
    for (int n = 0; n < SEQUENCES; n++) past[n + 1] = past[n] + pasts[n];
    kl_backend *be = open_backend(1, NULL);
    kl_mla_lay_out a = {.cu_past = kl_tensor_1d(past, KL_I32, SEQUENCES + 1),
                        .cu_seqlens = kl_tensor_1d(new, KL_I32, SEQUENCES + 1),
                        .lengths = kl_tensor_1d(found, KL_I32, SEQUENCES),
                        .block_table = kl_tensor_2d(places, KL_I32, SEQUENCES, WIDEST)};
    RUN_OP(mla_lay_out, be, a);
    for (int n = 0; n < SEQUENCES; n++) {
        EXPECT(found[n] == counts[n] + pasts[n]);
        for (int b = 0; b * KL_PAGE_TOKENS < found[n]; b++) {
            const int page = places[n * WIDEST + b];
            EXPECT(page >= 0 && page < (past[SEQUENCES] + new[SEQUENCES]) / 64 + SEQUENCES);
            EXPECT(users[page]++ == 0);
        }
    }
    a.cu_past = (kl_tensor){0};
    RUN_OP(mla_lay_out, be, a);
    for (int n = 0; n < SEQUENCES; n++) EXPECT(found[n] == counts[n]);
    kl_backend_close(be);
}

/* ---- attention over poisoned pages ----------------------------------------------------- */

enum { H = 3, NOPE = 7, V = 5, QK = NOPE + ROPE };

/* Attend to the pages that append filled, after filling what came before the new tokens. */
static void attend(int threads, float *out)
{
    static float raw[T * STRIDE], pages[P * KL_PAGE_TOKENS * WIDTH];
    static float q[T * H * QK], w[H * (NOPE + V) * RANK];
    kl_backend *be = open_backend(threads, NULL);
    fill(raw, T * STRIDE, 0);
    fill(q, T * H * QK, 20000);
    fill(w, H * (NOPE + V) * RANK, 50000);
    poison(pages, P * KL_PAGE_TOKENS * WIDTH);
    for (int n = 0; n < N; n++)
        for (int p = 0; p < lengths[n] - (cu[n + 1] - cu[n]); p++)
            fill(pages + (table[n * B + p / 64] * 64 + p % 64) * WIDTH, WIDTH,
                 90000 + (n * 200 + p) * WIDTH);
    kl_mla_append append = append_args(raw, NULL, pages);
    RUN_OP(mla_append, be, append);
    poison(out, T * H * V);
    kl_mla_prefill a = {.q = kl_tensor_3d(q, KL_F32, T, H, QK),
                        .pages = append.pages,
                        .block_table = append.block_table,
                        .lengths = append.lengths,
                        .cu_seqlens = append.cu_seqlens,
                        .w_kv_b = kl_tensor_3d(w, KL_F32, H, NOPE + V, RANK),
                        .out = kl_tensor_3d(out, KL_F32, T, H, V),
                        .scale = 0.3f};
    RUN_OP(mla_prefill, be, a);
    kl_backend_close(be);
}

static void attention_reads_no_poison(void)
{
    static float one[T * H * V], five[T * H * V];
    attend(1, one);
    attend(5, five);
    for (int i = 0; i < T * H * V; i++) EXPECT(isfinite(one[i]));
    EXPECT(memcmp(one, five, sizeof one) == 0);
}

/* ---- workspace ------------------------------------------------------------------------- */

static size_t prefill_bytes(kl_backend *be, int64_t tokens, int64_t sequences, int64_t pages)
{
    const kl_mla a = {.q = kl_tensor_3d(NULL, KL_F32, tokens, H, QK),
                      .pages = kl_tensor_3d(NULL, KL_F32, P, KL_PAGE_TOKENS, WIDTH),
                      .block_table = kl_tensor_2d(NULL, KL_I32, sequences, pages),
                      .lengths = kl_tensor_1d(NULL, KL_I32, sequences),
                      .w_kv_b = kl_tensor_3d(NULL, KL_F32, H, NOPE + V, RANK)};
    const size_t prefill = kl_workspace_mla_prefill(be, &a);
    return sequences == tokens ? prefill + kl_workspace_mla_decode(be, &a) : prefill;
}

/* A plan asks for the largest call only. */
static void workspace_grows_with_the_call(void)
{
    kl_backend *be = open_backend(3, NULL);
    for (int64_t n = 1; n < 300; n++) {
        EXPECT(prefill_bytes(be, 10 * n, 3, 9) <= prefill_bytes(be, 10 * n + 10, 3, 9));
        EXPECT(prefill_bytes(be, 300, n, 9) <= prefill_bytes(be, 300, n + 1, 9));
        EXPECT(prefill_bytes(be, n, n, 9) <= prefill_bytes(be, n + 1, n + 1, 9));
        EXPECT(prefill_bytes(be, 4, 4, n) <= prefill_bytes(be, 4, 4, n + 1));
        EXPECT(prefill_bytes(be, 400, 4, n) <= prefill_bytes(be, 400, 4, n + 1));
    }
    kl_backend_close(be);
}

int main(void)
{
    RUN(embedding_converts);
    RUN(embedding_sets_memory);
    RUN(gather_picks_rows);
    RUN(append_normalises_into_pages);
    RUN(append_copies_without_weight);
    RUN(contexts_share_no_page);
    RUN(attention_reads_no_poison);
    RUN(workspace_grows_with_the_call);
    return test_failures != 0;
}
