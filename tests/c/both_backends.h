/*
 * both_backends.h -- one call on the CPU and on CUDA.
 *
 * A case is a call over host memory, outputs poisoned. The CPU runs it there and CUDA on a copy
 * of all of it, and everything that came back is compared: values, and that what one left alone
 * the other did, too.
 *
 *     kl_gather a = {.x = tensor(...), .rows = integers(...), .out = tensor(...)};
 *     parts p = {0};
 *     IN(a.x), IN(a.rows), OUT(a.out, bound);
 *     ON_BOTH(gather, "gather");
 */
#ifndef KL_TESTS_BOTH_BACKENDS_H
#define KL_TESTS_BOTH_BACKENDS_H

#include "operation.h"

#include "base/bf16.h"
#include "base/rng.h"

#include <stdlib.h>

static kl_backend *cpu, *cuda;
static kl_error without_cuda; /* why cuda is NULL */
static bool brief;            /* KL_BRIEF: each kernel, but not each number of everything */

static inline void open_both(void)
{
    const kl_backend_options options = {.threads = 2};
    kl_error err;
    brief = getenv("KL_BRIEF") != NULL;
    EXPECT(kl_backend_open("cpu", NULL, &options, &cpu, &err) == KL_OK);
    if (kl_backend_open("cuda", getenv("KL_CUDA_LIBRARY"), &options, &cuda, &without_cuda) !=
        KL_OK)
        cuda = NULL;
}

/* The program's exit status. */
static inline int close_both(void)
{
    if (cuda == NULL) printf("     CUDA skipped: %s\n", without_cuda.message);
    kl_backend_close(cuda);
    kl_backend_close(cpu);
    return test_failures != 0;
}
static const kl_dtype ACTS[] = {KL_F32, KL_BF16};

/* ---- numbers ----------------------------------------------------------------------------- */

/* Memory until the end of a case. */
static _Alignas(64) unsigned char pool[256u << 20];
static size_t used;

static void *memory_of(size_t bytes)
{
    void *p = pool + used;
    used += (bytes + 63) / 64 * 64;
    if (used > sizeof pool) abort();
    return p;
}

/* The next one in [-1, 1). */
static inline float number(void)
{
    static uint64_t drawn;
    return (float)(2.0 * kl_rng_uniform(7, drawn++) - 1.0);
}

static void put(kl_tensor *t, int64_t i, float x)
{
    if (t->dtype == KL_F32)
        ((float *)t->data)[i] = x;
    else
        ((uint16_t *)t->data)[i] = kl_f32_to_bf16(x);
}

/* Dense and random, or where `poisoned` NaN in floats and -1 in integers. */
static kl_tensor tensor(kl_dtype dtype, bool poisoned, int ndim, int64_t a, int64_t b,
                        int64_t c, int64_t d)
{
    const int64_t shape[] = {a, b, c, d};
    kl_tensor t = kl_tensor_dense(NULL, dtype, ndim, shape);
    const int64_t n = kl_tensor_size(&t);
    t.data = memory_of((size_t)n * kl_dtype_bytes(dtype));
    memset(t.data, 0xff, (size_t)n * kl_dtype_bytes(dtype));
    for (int64_t i = 0; i < n && !poisoned; i++) put(&t, i, number());
    return t;
}

static inline kl_tensor integers(int64_t n, const int32_t *values)
{
    kl_tensor t = tensor(KL_I32, true, 1, n, 1, 1, 1);
    memcpy(t.data, values, (size_t)n * sizeof *values);
    return t;
}

/* Of e4m3, NaN's two bytes left out. */
static kl_weight fp8_weight(kl_weight w)
{
    for (size_t i = 0; i < kl_weight_data_bytes(&w); i++) {
        const uint8_t byte = (uint8_t)(128 * (number() + 1));
        ((uint8_t *)w.data)[i] = (byte & 127) == 127 ? 0 : byte;
    }
    for (size_t i = 0; i < kl_weight_scale_bytes(&w) / 2; i++)
        w.scales[i] = kl_f32_to_bf16((number() + 2) / (100 * sqrtf((float)w.cols)));
    return w;
}

static inline kl_weight weight(kl_weight_format format, int64_t rows, int64_t cols)
{
    kl_weight w = {.format = format, .count = 1, .rows = rows, .cols = cols};
    w.data = memory_of(kl_weight_data_bytes(&w));
    if (kl_weight_groups(format, cols) != 0) w.scales = memory_of(kl_weight_scale_bytes(&w));
    if (format == KL_W_FP8) return fp8_weight(w);
    kl_tensor t = tensor(KL_F32, false, 2, rows, cols, 1, 1);
    for (int64_t i = 0; i < rows * cols; i++) ((float *)t.data)[i] /= sqrtf((float)cols);
    const kl_pack_weight pack = {.src = t, .out = w};
    kl_error err = {KL_OK, ""};
    EXPECT(kl_run_pack_weight(cpu, &pack, &err) == KL_OK);
    return w;
}

static float e4m3(uint8_t bits)
{
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    const float size = exponent == 0 ? ldexpf((float)fraction, -9)
                                     : ldexpf((float)(8 + fraction), exponent - 10);
    return bits >> 7 != 0 ? -size : size;
}

/* The same weight in float32, if the CPU does not read its format. */
static inline kl_weight widened(const kl_weight *w)
{
    if ((cpu->vt->formats & 1u << w->format) != 0) return *w;
    kl_weight wide = {.format = KL_W_F32, .count = 1, .rows = w->rows, .cols = w->cols};
    float *values = wide.data = memory_of(kl_weight_data_bytes(&wide));
    const int64_t groups = kl_weight_groups(w->format, w->cols),
                  group = kl_weight_group(w->format);
    const size_t bytes = kl_weight_row_bytes(w->format, w->cols);
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t i = 0; i < w->cols; i++)
            *values++ = e4m3(((uint8_t *)w->data)[(size_t)r * bytes + (size_t)i]) *
                        kl_bf16_to_f32(w->scales[r * groups + i / group]);
    return wide;
}

/* ---- both backends ----------------------------------------------------------------------- */

enum { MOST = 24 };

/* A pointer within a call's struct, and what it points to. */
typedef struct {
    size_t at, bytes;
    kl_dtype dtype; /* of an output */
    bool written;
    double bound; /* relative RMS; 0: the same bits */
} part;

typedef struct {
    part parts[MOST];
    int n;
} parts;

static void add(parts *p, const void *call, const void *field, size_t bytes, kl_dtype dtype,
                bool written, double bound)
{
    if (bytes == 0) return;
    p->parts[p->n++] = (part){(size_t)((const char *)field - (const char *)call), bytes, dtype,
                              written, bound};
}

#define IN(t)                                                                                  \
    add(&p, &a, &(t).data,                                                                     \
        kl_tensor_absent(&(t)) ? 0 : (size_t)reach(&(t)) * kl_dtype_bytes((t).dtype),          \
        (t).dtype, false, 0)
#define OUT(t, bound)                                                                          \
    add(&p, &a, &(t).data,                                                                     \
        kl_tensor_absent(&(t)) ? 0 : (size_t)reach(&(t)) * kl_dtype_bytes((t).dtype),          \
        (t).dtype, true, bound)
/* CUDA reads scales by words: of an odd number the last one's other half is there, too. */
#define WEIGHT(w)                                                                              \
    do {                                                                                       \
        add(&p, &a, &(w).data, kl_weight_data_bytes(&(w)), KL_U8, false, 0);                   \
        add(&p, &a, &(w).scales, (kl_weight_scale_bytes(&(w)) + 3) / 4 * 4, KL_BF16, false,    \
            0);                                                                                \
    } while (0)

/* Elements from the first to the last of rows that may be strided. */
static int64_t reach(const kl_tensor *t)
{
    if (t->ndim == 0 || kl_tensor_size(t) == 0) return kl_tensor_size(t);
    return (t->shape[0] - 1) * t->stride[0] + kl_tensor_size(t) / t->shape[0];
}

static double value(kl_dtype dtype, const void *data, int64_t i)
{
    if (dtype == KL_F32) return ((const float *)data)[i];
    if (dtype == KL_BF16) return kl_bf16_to_f32(((const uint16_t *)data)[i]);
    return dtype == KL_I32 ? ((const int32_t *)data)[i] : ((const uint8_t *)data)[i];
}

static double difference(const part *p, const void *got, const void *want)
{
    double off = 0, all = 0;
    for (int64_t i = 0; i < (int64_t)(p->bytes / kl_dtype_bytes(p->dtype)); i++) {
        const double g = value(p->dtype, got, i), w = value(p->dtype, want, i);
        if (isnan(g) != isnan(w)) return INFINITY; /* one wrote what the other did not */
        if (isnan(w)) continue;
        off += (g - w) * (g - w), all += w * w;
    }
    return off == 0 ? 0 : sqrt(off / all);
}

static void to_device(const parts *p, const void *call, void *there)
{
    kl_error err;
    for (int i = 0; i < p->n; i++) {
        const part *q = &p->parts[i];
        void *from = *(void *const *)((const char *)call + q->at), *to = NULL;
        EXPECT(cuda->vt->alloc(cuda, q->bytes, &to, &err) == KL_OK);
        EXPECT(cuda->vt->copy_in(cuda, to, from, q->bytes, &err) == KL_OK);
        EXPECT(cuda->vt->sync(cuda, &err) == KL_OK);
        *(void **)((char *)there + q->at) = to;
    }
}

/* Compare with the host's and give back. */
static inline void from_device(const char *name, const parts *p, const void *call,
                               const void *there)
{
    kl_error err;
    for (int i = 0; i < p->n; i++) {
        const part *q = &p->parts[i];
        void *const want = *(void *const *)((const char *)call + q->at);
        void *const on_device = *(void *const *)((const char *)there + q->at);
        void *const got = kl_malloc(q->bytes);
        EXPECT(cuda->vt->copy_out(cuda, got, on_device, q->bytes, &err) == KL_OK);
        EXPECT(cuda->vt->sync(cuda, &err) == KL_OK);
        const double off = q->bound == 0 && q->dtype != KL_U8 ? memcmp(got, want, q->bytes) != 0
                           : q->written                       ? difference(q, got, want)
                                                              : 0;
        if (!(off <= q->bound)) {
            printf("  %s: part %d is off by %.3g (%.3g), at most %.3g\n", name, i, off,
                   difference(q, got, want), q->bound);
            EXPECT(!"equal results");
        }
        kl_free(got);
        cuda->vt->free(cuda, on_device, q->bytes);
    }
}

/* Run `host` on the CPU and `device`, with its parts p, on CUDA, where the workspace is poisoned,
 * too. The two share their outputs' memory. */
#define ON_BOTH_AS(op, host, device, text)                                                     \
    do {                                                                                       \
        kl_##op there_ = device;                                                               \
        kl_error failure_ = {KL_OK, ""};                                                       \
        to_device(&p, &device, &there_);                                                       \
        RUN_OP(op, cpu, host);                                                                 \
        there_.ws.bytes = kl_workspace_##op(cuda, &there_);                                    \
        void *poison_ = memset(kl_malloc(there_.ws.bytes + 1), 0xff, there_.ws.bytes + 1);     \
        EXPECT(cuda->vt->alloc(cuda, there_.ws.bytes, &there_.ws.data, &failure_) == KL_OK);   \
        cuda->vt->copy_in(cuda, there_.ws.data, poison_, there_.ws.bytes, &failure_);          \
        const kl_status status_ = kl_run_##op(cuda, &there_, &failure_);                       \
        EXPECT_TEXT(status_ == KL_OK ? "" : failure_.message, "");                             \
        EXPECT(cuda->vt->sync(cuda, &failure_) == KL_OK);                                      \
        from_device(text, &p, &device, &there_);                                               \
        cuda->vt->free(cuda, there_.ws.data, there_.ws.bytes);                                 \
        kl_free(poison_);                                                                      \
        used = 0;                                                                              \
    } while (0)
#define ON_BOTH(op, text) ON_BOTH_AS(op, a, a, text)

/* Sums of a few hundred products or squares in another order, and what bf16 rounds of them (the
 * bound of the issue for every operation in bf16). */
static inline double bound_of(kl_dtype act)
{
    return act == KL_F32 ? 2e-6 : 4e-3;
}

/* In bf16 CUDA rounds weights of four bits to bf16, where the CPU multiplies what is stored: three
 * roundings on the way through an expert, of 2^-9 / sqrt(3) in the mean square each. */
static inline double bound_of_experts(kl_dtype act, kl_weight_format format)
{
    return bound_of(act) + (act == KL_BF16 && format == KL_W_INT4 ? 3.4e-3 : 0);
}

#endif
