/*
 * test_fill_normal.c -- the numbers are those of the formula, by index alone, on any number of
 * threads and in either dtype; and they are normal.
 */
#include "test.h"

#include "backend/backend.h"
#include "base/bf16.h"
#include "base/memory.h"
#include "base/rng.h"

#include <math.h>

#define N 200001 /* odd: half a pair at the end, several tasks */

static bool fill(int threads, kl_dtype dtype, void *out, int64_t n)
{
    const kl_backend_options options = {.threads = threads};
    kl_backend *be;
    if (kl_backend_open("cpu", NULL, &options, &be, NULL) != KL_OK) return false;
    const kl_fill_normal a = {
        .out = kl_tensor_1d(out, dtype, n), .seed = 77, .mean = 0.5f, .std = 2.0f};
    const kl_status status = kl_run_fill_normal(be, &a, NULL);
    kl_backend_close(be);
    return status == KL_OK;
}

/* Box-Muller, written a second time. */
static double expected(uint64_t i)
{
    uint32_t r[4];
    kl_philox(77, i / 2, r);
    const double u = (r[0] * 0x1p32 + (r[1] & ~0x7ffu)) * 0x1p-64;
    const double w = (r[2] * 0x1p32 + (r[3] & ~0x7ffu)) * 0x1p-64;
    const double radius = sqrt(-2 * log(1 - u)), angle = 2 * acos(-1.0) * w;
    return 0.5 + 2 * radius * (i % 2 == 0 ? cos(angle) : sin(angle));
}

static void numbers_are_those_of_the_formula(void)
{
    float *x = kl_malloc(N * sizeof *x);
    EXPECT(fill(1, KL_F32, x, N));
    for (uint64_t i = 0; i < N; i++) {
        const double want = expected(i);
        if (fabs(x[i] - want) > 1e-6 * (1 + fabs(want))) {
            EXPECT(fabs(x[i] - want) <= 1e-6 * (1 + fabs(want)));
            break;
        }
    }
    kl_free(x);
}

static void threads_length_and_dtype_change_nothing(void)
{
    float *one = kl_malloc(N * sizeof *one), *other = kl_malloc(N * sizeof *other);
    uint16_t *half = kl_malloc(N * sizeof *half);
    EXPECT(fill(1, KL_F32, one, N) && fill(3, KL_F32, other, N) && fill(2, KL_BF16, half, N));
    EXPECT(memcmp(one, other, N * sizeof *one) == 0);
    int64_t differ = 0;
    for (int64_t i = 0; i < N; i++) differ += half[i] != kl_f32_to_bf16(one[i]);
    EXPECT(differ == 0);
    memset(other, 0xff, N * sizeof *other);
    EXPECT(fill(2, KL_F32, other, 7) && memcmp(one, other, 7 * sizeof *one) == 0);
    EXPECT(isnan(other[7])); /* nothing past the end */
    kl_free(one);
    kl_free(other);
    kl_free(half);
}

/* Each sample moment lies within 4 standard deviations of its mean. */
static void numbers_are_normal(void)
{
    float *x = kl_malloc(N * sizeof *x);
    EXPECT(fill(1, KL_F32, x, N));
    double sum = 0, squares = 0, fourth = 0, neighbours = 0, last = 0;
    for (int64_t i = 0; i < N; i++) {
        const double z = (x[i] - 0.5) / 2;
        sum += z;
        squares += z * z;
        fourth += z * z * z * z;
        neighbours += z * last;
        last = z;
    }
    EXPECT(fabs(sum / sqrt(N)) < 4);
    EXPECT(fabs((squares - N) / sqrt(2.0 * N)) < 4);
    EXPECT(fabs((fourth - 3.0 * N) / sqrt(96.0 * N)) < 4);
    EXPECT(fabs(neighbours / sqrt(N)) < 4);
    kl_free(x);
}

int main(void)
{
    RUN(numbers_are_those_of_the_formula);
    RUN(threads_length_and_dtype_change_nothing);
    RUN(numbers_are_normal);
    return test_failures != 0;
}
