/*
 * test_cuda.c -- what Python cannot call by itself, on CUDA beside the CPU: operations and
 * arguments that only the runner uses, memory, marks and recordings. Skips where KL_CUDA_LIBRARY
 * names no library that finds a device.
 */
#include "both_backends.h"

/* ---- rows -------------------------------------------------------------------------------- */

static const int32_t IDS[] = {3, 0, 49, 49, 7, 12, 31, 2, 48, -1};
enum { PICKED = 9, ROWS = 50 };

/* Sums and blanks by one block or more, not all of them whole, some of both; or one of them; with
 * rows and without. */
static void sets_memory(void)
{
    static const int64_t sums[] = {64, 6144, 20480 - 64, 0, 6144 + 64};
    static const int64_t blanks[] = {0, 6144, 6144 + 64, 20480 - 64, 64};
    for (int i = 0; i < 10; i++) {
        const int64_t zeros = sums[i / 2], blank = blanks[i / 2];
        parts p = {0};
        kl_embedding a = {.ids = integers(i % 2, IDS),
                          .table = weight(KL_W_BF16, ROWS, 64),
                          .out = tensor(KL_F32, true, 2, i % 2, 64, 1, 1),
                          .sums = tensor(KL_U8, true, 1, zeros + 64, 1, 1, 1),
                          .blanks = tensor(KL_U8, true, 1, blank + 64, 1, 1, 1)};
        memset(a.blanks.data, 7, (size_t)blank + 64); /* for poison looks like them */
        IN(a.ids);
        WEIGHT(a.table);
        OUT(a.out, 0);
        OUT(a.sums, 0); /* and what lies behind them */
        OUT(a.blanks, 0);
        a.sums.shape[0] = zeros;
        a.blanks.shape[0] = blank;
        ON_BOTH(embedding, "embedding: memory to set");
    }
}

static void embedding_and_gather(void)
{
    static const int64_t widths[] = {1, 37, 64, 2304};
    for (int i = 0; i < 16; i++) {
        parts p = {0};
        kl_embedding a = {.ids = integers(PICKED + 1, IDS),
                          .table =
                              weight(i % 2 == 0 ? KL_W_F32 : KL_W_BF16, ROWS, widths[i / 4])};
        a.out = tensor(ACTS[i / 2 % 2], true, 2, PICKED + 1, widths[i / 4], 1, 1);
        IN(a.ids);
        WEIGHT(a.table);
        OUT(a.out, 0);
        ON_BOTH(embedding, "embedding");
    }
    sets_memory();
    for (int i = 0; i < 8; i++) {
        parts p = {0};
        kl_gather a = {.x = tensor(ACTS[i % 2], false, 2, ROWS, widths[i / 2], 1, 1),
                       .rows = integers(PICKED, IDS)};
        a.out = tensor(ACTS[i % 2], true, 2, PICKED, widths[i / 2], 1, 1);
        IN(a.x);
        IN(a.rows);
        OUT(a.out, 0);
        ON_BOTH(gather, "gather");
    }
}

/* In place, as the residual stream is kept: with and without x, with and without out. */
static void norms_of_a_residual_stream(void)
{
    for (int i = 0; i < 16; i++) {
        parts p = {0};
        const kl_dtype act = ACTS[i % 2];
        const int64_t D = i < 8 ? 2304 : 37;
        const bool has_x = i / 4 % 2 == 0, has_out = i != 2 && i != 3;
        kl_rms_norm a = {.residual =
                             tensor(i / 2 % 2 == 0 ? KL_F32 : act, false, 2, 70, D, 1, 1),
                         .weight = tensor(KL_F32, false, 1, D, 1, 1, 1),
                         .eps = 1e-5f};
        if (has_x) a.x = tensor(act, false, 2, 70, D + 3, 1, 1), a.x.shape[1] = D;
        if (has_out) a.out = tensor(act, true, 2, 70, D, 1, 1);
        IN(a.x);
        IN(a.weight);
        OUT(a.residual, 0);
        OUT(a.out, bound_of(act));
        ON_BOTH(rms_norm, "rms_norm");
    }
}

/* ---- sequences --------------------------------------------------------------------------- */

/* Five sequences, two of them empty, in slots out of order. */
enum { N = 5, T = 274, SLOTS = 9, B = 5 };
static const int32_t CU[N + 1] = {0, 70, 70, 71, 274, 274}, SLOT[N] = {8, 3, 0, 5, 1};
static const int32_t PAST[N + 1] = {0, 60, 65, 128, 130, 130};

static void states_in_slots(void)
{
    for (int i = 0; i < 4; i++) {
        parts p = {0};
        const kl_dtype act = ACTS[i % 2];
        const int64_t C = i < 2 ? 256 : 37;
        kl_short_conv a = {.x = tensor(act, false, 2, T, C, 1, 1),
                           .weight = tensor(KL_F32, false, 2, C, 4, 1, 1),
                           .state = tensor(act, false, 3, SLOTS, C, 3, 1),
                           .slots = integers(N, SLOT),
                           .cu_seqlens = integers(N + 1, CU),
                           .out = tensor(act, true, 2, T, C, 1, 1),
                           .silu = true};
        IN(a.x);
        IN(a.weight);
        IN(a.slots);
        IN(a.cu_seqlens);
        OUT(a.state, 0);
        OUT(a.out, bound_of(act));
        ON_BOTH(short_conv, "short_conv");
    }
    for (int i = 0; i < 2; i++) {
        parts p = {0};
        enum { H = 3, K = 128, V = 32 };
        const kl_dtype act = ACTS[i];
        kl_kda_prefill a = {.q = tensor(act, false, 3, T, H, K, 1),
                            .k = tensor(act, false, 3, T, H, K, 1),
                            .v = tensor(act, false, 3, T, H, V, 1),
                            .g = tensor(KL_F32, false, 3, T, H, K, 1),
                            .beta = tensor(act, false, 2, T, H, 1, 1),
                            .state = tensor(KL_F32, false, 4, SLOTS, H, V, K),
                            .slots = integers(N, SLOT),
                            .cu_seqlens = integers(N + 1, CU),
                            .A_log = tensor(KL_F32, false, 1, H, 1, 1, 1),
                            .out = tensor(act, true, 3, T, H, V, 1),
                            .gate = KL_GATE_SOFTPLUS,
                            .scale = 0.1f,
                            .normalize = true,
                            .beta_logits = true};
        kl_tensor *const in[] = {&a.q,    &a.k,     &a.v,          &a.g,
                                 &a.beta, &a.slots, &a.cu_seqlens, &a.A_log};
        for (size_t j = 0; j < sizeof in / sizeof *in; j++) IN(*in[j]);
        /* The chunked form rounds its operands to bf16: no further off than test_kda.py allows. */
        OUT(a.state, i == 0 ? 2e-6 : 5e-3);
        OUT(a.out, i == 0 ? 2e-6 : 5e-3);
        ON_BOTH(kda_prefill, "kda_prefill");
    }
}

static void latents_in_pages(void)
{
    for (int i = 0; i < 2; i++) {
        parts p = {0};
        kl_mla_lay_out a = {.cu_seqlens = integers(N + 1, CU),
                            .lengths = tensor(KL_I32, true, 1, N, 1, 1, 1),
                            .block_table = tensor(KL_I32, true, 2, N, B, 1, 1)};
        if (i == 0) a.cu_past = integers(N + 1, PAST);
        IN(a.cu_past);
        IN(a.cu_seqlens);
        OUT(a.lengths, 0);
        OUT(a.block_table, 0);
        ON_BOTH(mla_lay_out, "mla_lay_out");
    }
    for (int i = 0; i < 12; i++) {
        parts p = {0};
        const kl_dtype act = ACTS[i % 2];
        const bool packed = i >= 8, norm = !packed && i / 2 % 2 == 0,
                   large = i / 4 == 0 || i > 9;
        const int64_t rank = large ? 512 : 19, width = rank + (large ? 64 : 5), P = 14;
        const int64_t row = packed ? kl_latents_row_of(rank, width - rank).row_bytes : width;
        int32_t lengths[N], table[N * B], page = 0;
        for (int n = 0; n < N; n++) lengths[n] = PAST[n + 1] - PAST[n] + CU[n + 1] - CU[n];
        for (int j = 0; j < N * B;
             j++) /* out of order; what is not used must not be followed */
            table[j] = j % B * KL_PAGE_TOKENS < lengths[j / B] ? 5 * page++ % P : 1 << 30;
        kl_mla_append a = {.raw = tensor(act, false, 2, T, width + 7, 1, 1),
                           .pages =
                               tensor(packed ? KL_U8 : act, true, 3, P, KL_PAGE_TOKENS, row, 1),
                           .block_table = integers(N * B, table),
                           .lengths = integers(N, lengths),
                           .cu_seqlens = integers(N + 1, CU),
                           .rank = rank,
                           .eps = 1e-5f};
        a.raw.shape[1] = width;
        a.block_table = kl_tensor_2d(a.block_table.data, KL_I32, N, B);
        if (norm) a.norm_weight = tensor(KL_F32, false, 1, rank, 1, 1, 1);
        IN(a.raw);
        IN(a.norm_weight);
        IN(a.block_table);
        IN(a.lengths);
        IN(a.cu_seqlens);
        OUT(a.pages, norm ? bound_of(act) : 0);
        ON_BOTH(mla_append, "mla_append");
    }
}

/* ---- the dense layer --------------------------------------------------------------------- */

static void check_mlp(kl_dtype act, kl_weight_format format, int64_t tokens, int64_t D,
                      int64_t I)
{
    parts p = {0};
    kl_mlp a = {.x = tensor(act, false, 2, tokens, D, 1, 1),
                .w1 = weight(format, I, D),
                .w3 = weight(format, I, D),
                .w2 = weight(format, D, I),
                .out = tensor(act, true, 2, tokens, D, 1, 1)};
    kl_mlp wide = a;
    wide.w1 = widened(&a.w1), wide.w3 = widened(&a.w3), wide.w2 = widened(&a.w2);
    IN(a.x);
    WEIGHT(a.w1);
    WEIGHT(a.w3);
    WEIGHT(a.w2);
    /* The CPU, too, rounds the inner product and the result to bf16: 1.7e-3 each. */
    OUT(a.out, bound_of(act) + (act == KL_BF16 ? 2.4e-3 : 0));
    char name[64];
    snprintf(name, sizeof name, "mlp: act %d, format %d, T %lld, D %lld", act, format,
             (long long)tokens, (long long)D);
    ON_BOTH_AS(mlp, wide, a, name);
}

static void mlp_of_every_format(void)
{
    static const int64_t tokens[] = {1, 3, 9, 40, 200};
    for (int i = 0; i < 5; i++)
        for (int act = brief && i != 1 ? 1 : 0; act < 2; act++) /* float32 has one kernel */
            for (kl_weight_format f = KL_W_F32; f < KL_N_WEIGHT_FORMATS; f++) {
                check_mlp(ACTS[act], f, tokens[i], 192, 320);
                if (tokens[i] < 10) check_mlp(ACTS[act], f, tokens[i], 37, 21);
            }
}

/* ---- numbers made on the device ---------------------------------------------------------- */

/* Of a row that a cluster's shared memory holds and of one that it does not: the largest, one of
 * all, and one of few; without what has been seen and the best ids, and with them. */
static void draws(void)
{
    enum { DRAWN = 4, TOP = 5, PAST_SHARED_MEMORY = 262144 + 37 };
    static const int64_t sizes[] = {37, 5000, PAST_SHARED_MEMORY};
    static const kl_sampling sampling[DRAWN] = {
        {.top_p = 1, .repetition_penalty = 1},
        {.temperature = 1, .top_p = 1, .repetition_penalty = 1, .seed = 3},
        {.temperature = 0.7f, .top_k = 20, .top_p = 0.9f, .repetition_penalty = 1.25f},
        {.temperature = 2, .top_p = 0.5f, .min_p = 0.125f, .repetition_penalty = 1, .seed = 9},
    };
    for (int i = 0; i < 6; i++) {
        if (brief && i == 4) continue; /* the next one asks for more */
        parts p = {0};
        const int64_t V = sizes[i / 2], words = (V + 31) / 32;
        const int64_t rows = brief && i == 5 ? 1 : DRAWN;
        kl_sample a = {.logits = tensor(KL_F32, false, 2, rows, V, 1, 1),
                       .sampling = memcpy(memory_of(sizeof sampling), sampling + DRAWN - rows,
                                          (size_t)rows * sizeof *sampling),
                       .ids = tensor(KL_I32, true, 1, rows, 1, 1, 1),
                       .logprobs = tensor(KL_F32, true, 1, rows, 1, 1, 1)};
        if (i % 2 == 1) {
            a.seen = tensor(KL_I32, true, 2, rows, words, 1, 1);
            memset(a.seen.data, 0x55, (size_t)(rows * words) * sizeof(int32_t));
            a.top_ids = tensor(KL_I32, true, 2, rows, TOP, 1, 1);
            a.top_logprobs = tensor(KL_F32, true, 2, rows, TOP, 1, 1);
        }
        IN(a.logits);
        add(&p, &a, &a.sampling, (size_t)rows * sizeof *sampling, KL_U8, false, 0);
        IN(a.seen);
        OUT(a.ids, 0);
        OUT(a.logprobs, 2e-6);
        OUT(a.top_ids, 0);
        OUT(a.top_logprobs, 2e-6);
        ON_BOTH(sample, "sample");
        used = 0;
    }
}

static void normal_numbers(void)
{
    for (int i = 0; i < 4; i++) {
        parts p = {0};
        kl_fill_normal a = {.out = tensor(ACTS[i % 2], true, 1, i < 2 ? 200001 : 1, 1, 1, 1),
                            .seed = 77,
                            .mean = 0.5f,
                            .std = 2.0f};
        /* A logarithm or a sine that is an ulp off in double may round to the other bf16. */
        OUT(a.out, i % 2 == 0 ? 1e-7 : 1e-5);
        ON_BOTH(fill_normal, "fill_normal");
    }
}

/* ---- memory ------------------------------------------------------------------------------ */

static void *host_block(size_t bytes)
{
    void *block = NULL;
    kl_error err;
    EXPECT(cuda->vt->alloc_host(cuda, bytes, &block, &err) == KL_OK && block != NULL);
    EXPECT((uintptr_t)block % 64 == 0);
    return block;
}

/* Copies in the order of the stream, of sizes that travel in different ways. */
static void copies_and_marks(void)
{
    static const size_t sizes[] = {1, 2048, 2049, 3u << 20};
    const kl_backend_vtbl *vt = cuda->vt;
    kl_mark *mark = NULL;
    kl_error err;
    EXPECT(vt->new_mark(cuda, &mark, &err) == KL_OK);
    EXPECT(vt->wait_mark(cuda, mark, &err) == KL_OK); /* never set */
    for (int i = 0; i < 4; i++) {
        const size_t n = sizes[i];
        unsigned char *from = host_block(n), *to = host_block(n);
        void *a, *b;
        for (size_t j = 0; j < n; j++) from[j] = (unsigned char)(j * 7 + 1);
        memset(to, 0, n);
        EXPECT(vt->alloc(cuda, n, &a, &err) == KL_OK && vt->alloc(cuda, n, &b, &err) == KL_OK);
        EXPECT(vt->copy_in(cuda, a, from, n, &err) == KL_OK);
        EXPECT(vt->copy(cuda, b, a, n, &err) == KL_OK);
        EXPECT(vt->zero(cuda, a, n, &err) == KL_OK);
        EXPECT(vt->copy_out(cuda, to, b, n, &err) == KL_OK);
        EXPECT(vt->set_mark(cuda, mark, &err) == KL_OK);
        EXPECT(vt->wait_mark(cuda, mark, &err) == KL_OK);
        EXPECT(memcmp(from, to, n) == 0);
        EXPECT(vt->copy_out(cuda, to, a, n, &err) == KL_OK && vt->sync(cuda, &err) == KL_OK);
        EXPECT(to[0] == 0 && to[n - 1] == 0);
        vt->free(cuda, a, n);
        vt->free(cuda, b, n);
        vt->free_host(cuda, from, n);
        vt->free_host(cuda, to, n);
    }
    vt->free_mark(cuda, mark);
    vt->free_mark(cuda, NULL);
}

/* What is recorded runs at replay, as often as that is asked for. */
static void recordings(void)
{
    enum { COUNT = 6 };
    const kl_backend_vtbl *vt = cuda->vt;
    const size_t bytes = COUNT * sizeof(float);
    float x[COUNT] = {1, 2, 3, 4, 5, 6}, ones[COUNT] = {1, 1, 1, 1, 1, 1}, got[COUNT];
    void *there[3];
    kl_recording *recording = NULL;
    kl_error err;
    for (int i = 0; i < 3; i++) EXPECT(vt->alloc(cuda, bytes, &there[i], &err) == KL_OK);
    vt->copy_in(cuda, there[0], x, bytes, &err);
    vt->copy_in(cuda, there[1], ones, bytes, &err);
    vt->zero(cuda, there[2], bytes, &err);
    /* residual += x */
    kl_rms_norm add = {.x = kl_tensor_2d(there[0], KL_F32, 1, COUNT),
                       .residual = kl_tensor_2d(there[2], KL_F32, 1, COUNT),
                       .weight = kl_tensor_1d(there[1], KL_F32, COUNT)};
    EXPECT(vt->record_begin(cuda, &err) == KL_OK);
    EXPECT(kl_run_rms_norm(cuda, &add, &err) == KL_OK);
    EXPECT(vt->record_end(cuda, &recording, &err) == KL_OK);
    for (int i = 0; i < 3; i++) EXPECT(vt->replay(cuda, recording, &err) == KL_OK);
    vt->copy_out(cuda, got, there[2], bytes, &err);
    EXPECT(vt->sync(cuda, &err) == KL_OK);
    for (int i = 0; i < COUNT; i++) EXPECT(got[i] == 3 * x[i]);
    vt->free_recording(cuda, recording);
    vt->free_recording(cuda, NULL);
    for (int i = 0; i < 3; i++) vt->free(cuda, there[i], bytes);
}

/* ------------------------------------------------------------------------------------------ */

static void finds_no_device(void) {}

int main(void)
{
    const kl_backend_options options = {0};
    kl_error err;
    EXPECT(kl_backend_open("cpu", NULL, &options, &cpu, &err) == KL_OK);
    if (kl_backend_open("cuda", getenv("KL_CUDA_LIBRARY"), &options, &cuda, &err) != KL_OK) {
        RUN(finds_no_device);
        printf("     skipped: %s\n", err.message);
        kl_backend_close(cpu);
        return 0;
    }
    RUN(embedding_and_gather);
    RUN(norms_of_a_residual_stream);
    RUN(states_in_slots);
    RUN(latents_in_pages);
    RUN(mlp_of_every_format);
    RUN(draws);
    RUN(normal_numbers);
    RUN(copies_and_marks);
    RUN(recordings);
    kl_backend_close(cuda);
    kl_backend_close(cpu);
    return test_failures != 0;
}
