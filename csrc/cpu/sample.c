/*
 * sample.c -- drawing the next token of each row. Formulas: backend/ops.h.
 *
 * Computes     p = softmax(z / temperature), cut by top_k, top_p and min_p; one id of it
 * Shapes       logits [N, V], ids and logprobs [N], alternatives [N, n]
 * Precision    exponentials in f32, masses in f64; the softmax's sum from peaks in f32
 * Order        tokens fall in p, lower id first on a tie; every cut keeps a head of that order.
 *              A row is not sorted: its tokens are dealt into buckets of 1/32 nat below the
 *              maximum, and only the buckets where a cut and the draw fall are sorted
 * Tasks        a row; its draw depends on nothing else
 * Roofline     a few passes over 4 V bytes in cache: about 1 ms at V = 163,840
 *
 * A row whose largest logit is not finite yields id -1: NaN, all -inf, and +inf too, for then
 * the softmax is NaN.
 */
#include "cpu/cpu_backend.h"

#include "base/arena.h"
#include "base/rng.h"

#include <math.h>
#include <string.h>

#define BUCKETS_PER_NAT 32 /* about a hundredth of a vocabulary in the fullest bucket */
#define BUCKETS         (88 * BUCKETS_PER_NAT) /* exp(-88) is no normal f32: weight zero */

typedef struct {
    double mass;
    float lowest; /* weight */
    int32_t count;
} bucket;

/* A row while it is drawn from. */
typedef struct {
    float *z;         /* [V] logits after the penalty */
    float *weights;   /* [V] exp((z - max z) / temperature) */
    int32_t *order;   /* [V] ids of one bucket, sorted */
    uint16_t *places; /* [V] the bucket of each id, BUCKETS for none */
    bucket *buckets;  /* [BUCKETS + 1] */
    float *peaks;     /* [kl_peaks_of(V), 2], where the call brings none */
} row_scratch;

typedef struct {
    const kl_sample *a;
    const kl_logits_kernels *kernels;
    int threads;
    size_t scratch_bytes;
} run;

static row_scratch take_scratch(kl_arena *arena, int64_t rows)
{
    const size_t V = (size_t)rows;
    row_scratch s;
    s.z = kl_arena_take(arena, V * sizeof *s.z);
    s.weights = kl_arena_take(arena, V * sizeof *s.weights);
    s.order = kl_arena_take(arena, V * sizeof *s.order);
    s.places = kl_arena_take(arena, V * sizeof *s.places);
    s.buckets = kl_arena_take(arena, (BUCKETS + 1) * sizeof *s.buckets);
    s.peaks = kl_arena_take(arena, 2 * (size_t)kl_peaks_of(rows) * sizeof *s.peaks);
    return s;
}

static size_t measure_scratch(const kl_sample *a)
{
    kl_arena arena;
    kl_arena_init(&arena, NULL, 0);
    take_scratch(&arena, a->logits.shape[1]);
    return arena.used;
}

size_t kl_cpu_sample_workspace(kl_backend *be, const kl_sample *a)
{
    const int64_t N = a->logits.shape[0], threads = kl_pool_size(((const kl_cpu *)be)->pool);
    return (size_t)(N < threads ? N : threads) * measure_scratch(a);
}

/* ---- order ------------------------------------------------------------------------------ */

static bool comes_before(const float *z, int32_t a, int32_t b)
{
    return z[a] > z[b] || (z[a] == z[b] && a < b);
}

/* Let the id at `at` sink in a heap whose root comes last. */
static void sift_down(const float *z, int32_t *heap, int64_t size, int64_t at)
{
    const int32_t id = heap[at];
    for (int64_t child = 2 * at + 1; child < size; child = 2 * at + 1) {
        if (child + 1 < size && comes_before(z, heap[child], heap[child + 1])) child++;
        if (!comes_before(z, id, heap[child])) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = id;
}

static void build_heap(const float *z, int32_t *ids, int64_t size)
{
    for (int64_t i = size / 2 - 1; i >= 0; i--) sift_down(z, ids, size, i);
}

/* From a heap to the order, in place: n log n whatever the values. */
static void unwind_heap(const float *z, int32_t *heap, int64_t size)
{
    while (--size > 0) {
        const int32_t last = heap[0];
        heap[0] = heap[size];
        heap[size] = last;
        sift_down(z, heap, size, 0);
    }
}

/* The first n ids of the order. */
static void find_best(const float *z, int64_t V, int32_t *best, int64_t n)
{
    for (int64_t i = 0; i < n; i++) best[i] = (int32_t)i;
    build_heap(z, best, n);
    for (int64_t i = n; i < V; i++)
        if (z[i] > z[best[0]]) {
            best[0] = (int32_t)i;
            sift_down(z, best, n, 0);
        }
    unwind_heap(z, best, n);
}

static int64_t sort_bucket(const row_scratch *s, int64_t V, int64_t b)
{
    int64_t n = 0;
    bool sorted = true; /* as a bucket of ties is */
    for (int64_t i = 0; i < V; i++)
        if (s->places[i] == b) {
            s->order[n++] = (int32_t)i;
            if (n > 1 && s->z[i] > s->z[s->order[n - 2]]) sorted = false;
        }
    if (sorted) return n;
    build_heap(s->z, s->order, n);
    unwind_heap(s->z, s->order, n);
    return n;
}

/* ---- drawing ---------------------------------------------------------------------------- */

static void deal_into_buckets(const row_scratch *s, int64_t V, float top, float temperature)
{
    memset(s->buckets, 0, (BUCKETS + 1) * sizeof *s->buckets);
    for (int64_t i = 0; i < V; i++) {
        const float depth = (top - s->z[i]) / temperature * BUCKETS_PER_NAT;
        const int64_t b = depth < BUCKETS - 1 ? (int64_t)depth : BUCKETS - 1;
        s->places[i] = (uint16_t)(s->weights[i] > 0.0f ? b : BUCKETS);
        bucket *to = &s->buckets[s->places[i]];
        if (to->count++ == 0 || s->weights[i] < to->lowest) to->lowest = s->weights[i];
        to->mass += (double)s->weights[i];
    }
}

/* What top_k, top_p and min_p leave: all buckets before the last, `inside` ids of that. */
typedef struct {
    int64_t last, inside;
    double mass;
} head;

static head cut(const row_scratch *s, int64_t V, const kl_sampling *p, double total)
{
    const int64_t most = p->top_k > 0 ? p->top_k : V;
    const double enough = p->top_p < 1.0f ? (double)p->top_p * total : INFINITY;
    head h = {0};
    int64_t taken = 0;
    for (int64_t b = 0; b < BUCKETS; b++) {
        const bucket *from = &s->buckets[b];
        if (from->count == 0) continue;
        if (taken + from->count <= most && h.mass + from->mass < enough &&
            from->lowest >= p->min_p) {
            h = (head){b, from->count, h.mass + from->mass};
            taken += from->count;
            continue;
        }
        const int64_t n = sort_bucket(s, V, b);
        for (int64_t i = 0; i < n; i++) {
            const float weight = s->weights[s->order[i]];
            if (taken > 0 && (taken >= most || h.mass >= enough || weight < p->min_p)) return h;
            h = (head){b, i + 1, h.mass + (double)weight};
            taken++;
        }
    }
    return h;
}

/* The first id whose mass and that of all before it exceed `target`; rounding may leave the
 * target at the very end, which is the last id. */
static int32_t find_mass(const row_scratch *s, int64_t V, const head *h, double target)
{
    double before = 0.0;
    int64_t b = 0;
    for (; b < h->last && before + s->buckets[b].mass <= target; b++)
        before += s->buckets[b].mass;
    int64_t n = sort_bucket(s, V, b);
    if (b == h->last) n = h->inside;
    for (int64_t i = 0; i < n; i++) {
        before += (double)s->weights[s->order[i]];
        if (before > target) return s->order[i];
    }
    return s->order[n - 1];
}

static int32_t find_first(const float *z, int64_t V, float value)
{
    for (int64_t i = 0; i < V; i++)
        if (z[i] == value) return (int32_t)i;
    return -1;
}

static int32_t draw(const run *r, const row_scratch *s, const float *z, const kl_sampling *p)
{
    const int64_t V = r->a->logits.shape[1];
    const float top = r->kernels->max(z, V);
    if (!isfinite(top)) return -1; /* the penalty overflowed */
    if (!(p->temperature > 0.0f)) return find_first(z, V, top);
    if (z != s->z) memcpy(s->z, z, (size_t)V * sizeof *z);
    const double total = r->kernels->exp(z, V, top, p->temperature, s->weights);
    deal_into_buckets(s, V, top, p->temperature);
    const head h = cut(s, V, p, total);
    return find_mass(s, V, &h, kl_rng_uniform(p->seed, p->position) * h.mass);
}

static void penalize(const float *logits, const uint32_t *seen, int64_t V, float penalty,
                     float *z)
{
    memcpy(z, logits, (size_t)V * sizeof *z);
    for (int64_t word = 0; word * 32 < V; word++)
        for (uint32_t bits = seen[word]; bits != 0; bits &= bits - 1) {
            const int64_t id = word * 32 + __builtin_ctz(bits);
            if (id < V) z[id] = z[id] > 0.0f ? z[id] / penalty : z[id] * penalty;
        }
}

/* ---- rows ------------------------------------------------------------------------------- */

static void store_best(const run *r, int64_t n, const float *z, double log_sum)
{
    const kl_sample *a = r->a;
    if (kl_tensor_absent(&a->top_ids)) return;
    const int64_t count = a->top_ids.shape[1];
    int32_t *ids = (int32_t *)a->top_ids.data + n * count;
    float *logprobs = (float *)a->top_logprobs.data + n * count;
    if (z != NULL) find_best(z, a->logits.shape[1], ids, count);
    for (int64_t i = 0; i < count; i++) {
        if (z == NULL) ids[i] = -1;
        logprobs[i] = z == NULL ? NAN : (float)((double)z[ids[i]] - log_sum);
    }
}

/* The largest logit of a row, NaN if one is; then, if it is finite, log_sum of all. */
static float find_top(const run *r, int64_t n, const row_scratch *s, double *log_sum)
{
    const kl_sample *a = r->a;
    const int64_t V = a->logits.shape[1], count = kl_peaks_of(V);
    const float *peaks = s->peaks;
    if (kl_tensor_absent(&a->peaks))
        kl_cpu_row_peaks(r->kernels, (const float *)a->logits.data + n * V, V, s->peaks);
    else
        peaks = (const float *)a->peaks.data + n * 2 * count;
    float top = -INFINITY;
    double sum = 0.0;
    for (int64_t i = 0; i < count && !isnan(top); i++)
        if (!(peaks[2 * i] <= top)) top = peaks[2 * i];
    for (int64_t i = 0; i < count && isfinite(top); i++)
        sum += (double)(peaks[2 * i + 1] * expf(peaks[2 * i] - top));
    *log_sum = (double)top + log(sum);
    return top;
}

static void sample_row(const run *r, int64_t n, const row_scratch *s)
{
    const kl_sample *a = r->a;
    const kl_sampling *p = &a->sampling[n];
    const int64_t V = a->logits.shape[1];
    const float *logits = (const float *)a->logits.data + n * V, *z = logits;
    int32_t *id = (int32_t *)a->ids.data + n;
    float *logprob = (float *)a->logprobs.data + n;

    double log_sum;
    if (!isfinite(find_top(r, n, s, &log_sum))) {
        *id = -1;
        *logprob = NAN;
        store_best(r, n, NULL, NAN);
        return;
    }
    if (!kl_tensor_absent(&a->seen) && p->repetition_penalty != 1.0f) {
        penalize(logits, (const uint32_t *)a->seen.data + n * a->seen.shape[1], V,
                 p->repetition_penalty, s->z);
        z = s->z;
    }
    *id = draw(r, s, z, p);
    *logprob = *id < 0 ? NAN : (float)((double)logits[*id] - log_sum);
    store_best(r, n, logits, log_sum);
}

static void sample_task(void *ctx, int64_t task, int worker)
{
    const run *r = ctx;
    /* Fewer rows than threads: then a piece of scratch a row is less than one a thread. */
    const int64_t piece = r->a->logits.shape[0] < r->threads ? task : worker;
    kl_arena arena;
    kl_arena_init(&arena, (char *)r->a->ws.data + (size_t)piece * r->scratch_bytes,
                  r->scratch_bytes);
    const row_scratch s = take_scratch(&arena, r->a->logits.shape[1]);
    sample_row(r, task, &s);
}

kl_status kl_cpu_sample(kl_backend *be, const kl_sample *a, kl_error *err)
{
    (void)err;
    const kl_cpu *cpu = (const kl_cpu *)be;
    run r = {.a = a, .kernels = &cpu->kernels->logits, .threads = kl_pool_size(cpu->pool)};
    r.scratch_bytes = measure_scratch(a);
    kl_pool_run(cpu->pool, a->logits.shape[0], sample_task, &r);
    return KL_OK;
}
