/*
 * test_peaks.c -- the peaks that linear leaves of logits, and draws from them: on the CPU and,
 * where KL_CUDA_LIBRARY finds a device, on CUDA.
 */
#include "pieces.h"

/* ---- what linear leaves ------------------------------------------------------------------ */

static void linear_whole(kl_backend *be, void *call)
{
    kl_linear *const a = call;
    RUN_THERE(linear, be, a);
}

/* The largest of each 16 to the bit, and the weights beside it: of the outputs that came with
 * them. */
static void check_peaks(const char *name, const kl_linear *a, const float *out,
                        const float *peaks)
{
    const int64_t T = a->x.shape[0], O = a->w.rows, count = kl_peaks_of(O);
    for (int64_t i = 0; i < T * count; i++) {
        const float *z = out + i / count * a->out.stride[0];
        float top = -INFINITY;
        double sum = 0;
        const int64_t first = i % count * KL_PEAK_OUTPUTS, end = first + KL_PEAK_OUTPUTS;
        for (int64_t o = first; o < end && o < O; o++) top = fmaxf(top, z[o]);
        for (int64_t o = first; o < end && o < O; o++) sum += exp((double)z[o] - (double)top);
        if (peaks[2 * i] == top && fabs((double)peaks[2 * i + 1] / sum - 1) < 1e-6) continue;
        printf("  %s: peak %lld is %.9g, %.9g instead of %.9g, %.9g\n", name, (long long)i,
               (double)peaks[2 * i], (double)peaks[2 * i + 1], (double)top, sum);
        EXPECT(!"peaks of the outputs");
        return;
    }
}

/* What a backend leaves, beside the outputs that it has without peaks. */
static void check_linear(kl_backend *be, const kl_linear *a, const parts *p, const char *name)
{
    kl_linear with, without;
    kl_backend *const other = cuda;
    cuda = be; /* to_device() means this one */
    to_device(p, a, memcpy(&with, a, sizeof with));
    to_device(p, a, memcpy(&without, a, sizeof without));
    cuda = other;
    void *const unused = without.peaks.data;
    without.peaks = (kl_tensor){0};
    linear_whole(be, &with);
    linear_whole(be, &without);
    without.peaks.data = unused;
    const int last = p->n - 1; /* the outputs, and behind them the peaks */
    for (int i = 0; i < last - 1; i++) {
        kl_free(back(be, &p->parts[i], &with));
        kl_free(back(be, &p->parts[i], &without));
    }
    float *out = back(be, &p->parts[last - 1], &with);
    float *plain = back(be, &p->parts[last - 1], &without);
    float *peaks = back(be, &p->parts[last], &with);
    kl_free(back(be, &p->parts[last], &without));
    EXPECT(memcmp(out, plain, p->parts[last - 1].bytes) == 0);
    check_peaks(name, a, out, peaks);
    kl_free(out);
    kl_free(plain);
    kl_free(peaks);
}

static void check_of_linear(kl_dtype act, kl_weight_format format, int64_t tokens, int64_t O,
                            int64_t D, bool normed)
{
    parts p = {0};
    char name[80];
    snprintf(name, sizeof name, "peaks: act %d, format %d, T %lld, O %lld, D %lld, norm %d",
             act, format, (long long)tokens, (long long)O, (long long)D, normed);
    kl_tensor wide = tensor(KL_F32, true, 2, tokens, O + 3, 1, 1);
    kl_linear a = {.x = tensor(normed ? KL_F32 : act, false, 2, tokens, D, 1, 1),
                   .w = weight(format, O, D),
                   .out = kl_columns(&wide, 3, O),
                   .peaks = tensor(KL_F32, true, 3, tokens, kl_peaks_of(O), 2, 1),
                   .act = act,
                   .norm_eps = 1e-5f};
    if (normed) a.norm_weight = tensor(KL_F32, false, 1, D, 1, 1, 1);
    IN(a.x);
    WEIGHT(a.w);
    IN(a.norm_weight);
    OUT(a.out, 0);
    OUT(a.peaks, 0);
    if ((cpu->vt->formats & 1u << format) != 0) check_linear(cpu, &a, &p, name);
    if (cuda != NULL) check_linear(cuda, &a, &p, name);
    used = 0;
}

/* Widths within a tile and past it; all the ways in which CUDA computes products of so many. */
static void of_linear(void)
{
    static const int64_t tokens[] = {1, 3, 8, 9, 16, 40};
    static const int64_t widths[] = {1, 16, 37, 300};
    for (int i = 0; i < 6; i++)
        for (int o = brief ? 2 + i % 2 : 0; o < (brief ? 3 + i % 2 : 4); o++) {
            const bool normed = (i + o) % 2 == 1;
            for (kl_weight_format f = KL_W_F32; f < KL_N_WEIGHT_FORMATS; f++)
                check_of_linear(KL_BF16, f, tokens[i], widths[o], 512, normed);
            check_of_linear(KL_F32, KL_W_F32, tokens[i], widths[o], 48, normed);
            check_of_linear(KL_BF16, KL_W_BF16, tokens[i], widths[o], 37, !normed);
        }
}

/* ---- draws ------------------------------------------------------------------------------- */

enum { ROWS = 16, TOP = 3, LONG = 100000 };

/* Rows of logits on a backend, with the peaks that its linear has left of them: row t is what is
 * asked for, by 2^-(t % 3), which rounds nothing. */
typedef struct {
    kl_backend *be;
    kl_tensor logits, peaks;
    float *host; /* the logits */
} drawn_rows;

static void *fetched(kl_backend *be, const void *from, size_t bytes)
{
    kl_error err;
    void *const to = kl_malloc(bytes);
    EXPECT(be->vt->copy_out(be, to, from, bytes, &err) == KL_OK);
    EXPECT(be->vt->sync(be, &err) == KL_OK);
    return to;
}

static size_t bytes_of(const kl_tensor *t)
{
    return (size_t)kl_tensor_size(t) * kl_dtype_bytes(t->dtype);
}

/* z: V numbers of bf16, a weight's first column, which x alone meets. */
static drawn_rows make_rows(kl_backend *be, int64_t N, int64_t V, const float *z)
{
    enum { IN_COLS = 8 };
    uint16_t *w = kl_malloc((size_t)V * IN_COLS * 2), x[ROWS * IN_COLS] = {0};
    memset(w, 0, (size_t)V * IN_COLS * 2);
    for (int64_t i = 0; i < V; i++) w[i * IN_COLS] = kl_f32_to_bf16(z[i]);
    for (int64_t t = 0; t < N; t++) x[t * IN_COLS] = kl_f32_to_bf16(ldexpf(1, -(int)(t % 3)));
    kl_linear a = {.x = kl_tensor_2d(NULL, KL_BF16, N, IN_COLS),
                   .w = {KL_W_BF16, 1, V, IN_COLS, NULL, NULL, false},
                   .out = kl_tensor_2d(NULL, KL_F32, N, V),
                   .peaks = kl_tensor_3d(NULL, KL_F32, N, kl_peaks_of(V), 2)};
    float *const nothing = memset(kl_malloc(bytes_of(&a.out)), 0xff, bytes_of(&a.out));
    a.x.data = sent(be, x, bytes_of(&a.x));
    a.w.data = sent(be, w, (size_t)V * IN_COLS * 2);
    a.out.data = sent(be, nothing, bytes_of(&a.out));
    float *const no_peaks = memset(kl_malloc(bytes_of(&a.peaks)), 0xff, bytes_of(&a.peaks));
    a.peaks.data = sent(be, no_peaks, bytes_of(&a.peaks));
    RUN_THERE(linear, be, &a);
    be->vt->free(be, a.x.data, bytes_of(&a.x));
    be->vt->free(be, a.w.data, (size_t)V * IN_COLS * 2);
    kl_free(w);
    kl_free(nothing);
    kl_free(no_peaks);
    return (drawn_rows){be, a.out, a.peaks, fetched(be, a.out.data, bytes_of(&a.out))};
}

static void free_rows(drawn_rows *r)
{
    r->be->vt->free(r->be, r->logits.data, bytes_of(&r->logits));
    r->be->vt->free(r->be, r->peaks.data, bytes_of(&r->peaks));
    kl_free(r->host);
}

typedef struct {
    int32_t ids[ROWS], top_ids[ROWS * TOP];
    float logprobs[ROWS], top_logprobs[ROWS * TOP];
} draws;

typedef struct {
    bool peaks, greedy, tops, seen;
} how;

static draws draw(const drawn_rows *r, const kl_sampling *sampling, how h)
{
    const int64_t N = r->logits.shape[0], V = r->logits.shape[1], words = (V + 31) / 32;
    const int64_t top = V < TOP ? V : TOP;
    draws d;
    memset(&d, 0xff, sizeof d);
    uint32_t *const bits = kl_malloc((size_t)(N * words) * 4);
    memset(bits, 0x55, (size_t)(N * words) * 4);
    char *const there = sent(r->be, &d, sizeof d);
    kl_sample a = {.logits = r->logits,
                   .ids = kl_tensor_1d(there + offsetof(draws, ids), KL_I32, N),
                   .logprobs = kl_tensor_1d(there + offsetof(draws, logprobs), KL_F32, N),
                   .greedy = h.greedy};
    if (h.peaks) a.peaks = r->peaks;
    if (h.tops) {
        a.top_ids = kl_tensor_2d(there + offsetof(draws, top_ids), KL_I32, N, top);
        a.top_logprobs = kl_tensor_2d(there + offsetof(draws, top_logprobs), KL_F32, N, top);
    }
    if (h.seen)
        a.seen = kl_tensor_2d(sent(r->be, bits, (size_t)(N * words) * 4), KL_I32, N, words);
    a.sampling = sent(r->be, sampling, (size_t)N * sizeof *sampling);
    RUN_THERE(sample, r->be, &a);
    draws *const got = fetched(r->be, there, sizeof d);
    d = *got;
    kl_free(got);
    kl_free(bits);
    r->be->vt->free(r->be, there, sizeof d);
    if (h.seen) r->be->vt->free(r->be, a.seen.data, (size_t)(N * words) * 4);
    r->be->vt->free(r->be, (void *)a.sampling, (size_t)N * sizeof *sampling);
    return d;
}

/* The lowest id of the largest logit, -1 where that is no number; and its log-probability. */
static void check_greedy(const char *name, const drawn_rows *r, const draws *d)
{
    const int64_t N = r->logits.shape[0], V = r->logits.shape[1];
    for (int64_t t = 0; t < N; t++) {
        const float *z = r->host + t * V;
        int32_t id = 0;
        double sum = 0;
        for (int64_t i = 1; i < V; i++)
            if (z[i] > z[id]) id = (int32_t)i;
        for (int64_t i = 0; i < V; i++) sum += exp((double)z[i] - (double)z[id]);
        const bool known = isfinite(sum);
        const double off = fabs((double)d->logprobs[t] + log(sum));
        if (d->ids[t] == (known ? id : -1) &&
            (known ? off <= 1e-6 + 1e-6 * log(sum) : isnan(d->logprobs[t])))
            continue;
        printf("  %s on %s: row %lld has id %d, %.9g instead of %d, %.9g\n", name,
               r->be->vt->name, (long long)t, d->ids[t], (double)d->logprobs[t],
               known ? id : -1, -log(sum));
        EXPECT(!"a greedy draw");
        return;
    }
}

#define EXPECT_SAME(x, y, text)                                                                \
    do {                                                                                       \
        if (memcmp(&(x), &(y), sizeof(x)) != 0) {                                              \
            printf("  %s on %s: %s\n", name, r.be->vt->name, text);                            \
            EXPECT(!"equal bits");                                                             \
        }                                                                                      \
    } while (0)

/* Greedy rows alone and beside others, with alternatives, from peaks and without: the same bits. */
static void check_draws(kl_backend *be, const char *name, int64_t N, int64_t V, const float *z)
{
    drawn_rows r = make_rows(be, N, V, z);
    kl_sampling same[ROWS], mixed[ROWS];
    for (int64_t t = 0; t < N; t++) {
        same[t] = (kl_sampling){.top_p = 1, .repetition_penalty = 1};
        mixed[t] = same[t];
        mixed[t].position = (uint64_t)t;
        if (t % 2 == 1) mixed[t].temperature = 0.75f;
        if (t % 4 == 3) mixed[t].repetition_penalty = 1.25f;
    }
    const draws alone = draw(&r, same, (how){.peaks = true, .greedy = true});
    const draws bare = draw(&r, same, (how){.greedy = true});
    const draws beside = draw(&r, same, (how){.peaks = true});
    check_greedy(name, &r, &alone);
    EXPECT_SAME(alone, bare, "peaks of its own are others");
    EXPECT_SAME(alone, beside, "greedy rows that nobody calls so are others");
    for (int i = brief ? 3 : 0; i < (brief && V > LONG ? 0 : 4); i++) {
        how h = {.peaks = true, .tops = i % 2 == 1, .seen = i / 2 == 1};
        const draws given = draw(&r, mixed, h);
        h.peaks = false;
        const draws found = draw(&r, mixed, h);
        EXPECT_SAME(given, found, "draws without peaks are others");
        for (int64_t t = 0; t < N; t += 2)
            EXPECT(given.ids[t] == alone.ids[t] &&
                   memcmp(&given.logprobs[t], &alone.logprobs[t], sizeof(float)) == 0);
    }
    free_rows(&r);
}

/* Numbers that bf16 holds, and a third of which it holds, too. */
static void fill(float *z, int64_t V, int kind)
{
    const int64_t middle = V / 2;
    for (int64_t i = 0; i < V; i++)
        z[i] = kind == 1 ? -3 : kl_bf16_to_f32(kl_f32_to_bf16(8 * number()));
    if (kind == 2) z[0] = z[middle] = z[V - 1] = 9; /* the first of three */
    if (kind == 3) z[middle] = z[V - 1] = 9;
    if (kind == 4) z[V - 1] = NAN;
    if (kind == 5) z[0] = NAN, z[V - 1] = 9;
    if (kind == 7) z[middle] = INFINITY;
    for (int64_t i = 0; i < V && kind >= 6 && kind != 7; i++) z[i] = -INFINITY;
    if (kind == 8) z[V - 1] = -5, z[middle] = -6; /* all others masked */
    for (int64_t i = 0; i < V && kind == 9; i++) z[i] = i % 2 == 0 ? -0.0f : 0.0f;
}

enum { KINDS = 10 };

/* A row shorter than a peak; of whole peaks; with a rest; of more peaks than CUDA's threads read
 * at once. */
static void of_rows(void)
{
    static const int64_t sizes[] = {1, 15, 16, 17, 4099, 170001};
    static const int64_t rows[] = {1, 2, 8, 9, ROWS};
    for (int s = 0; s < 6; s++) {
        const bool large = s == 5;
        const int first = large ? 2 : brief ? s % 3 : 0;
        float *const z = kl_malloc((size_t)sizes[s] * sizeof *z);
        for (int i = first; i < (large && brief ? 3 : KINDS); i += large || brief ? 3 : 1) {
            const int64_t N = large ? 2 : rows[(i + s) % 5];
            char name[64];
            snprintf(name, sizeof name, "kind %d, %lld rows of %lld", i, (long long)N,
                     (long long)sizes[s]);
            fill(z, sizes[s], i);
            check_draws(cpu, name, N, sizes[s], z);
            if (cuda != NULL) check_draws(cuda, name, N, sizes[s], z);
        }
        kl_free(z);
    }
}

int main(void)
{
    open_both();
    RUN(of_linear);
    RUN(of_rows);
    return close_both();
}
