/*
 * test_memory.c -- allocation, its injected failures, arithmetic on sizes, bfloat16, errors,
 * and what the CPU backend makes of it all.
 */
#include "test.h"

#include "backend/backend.h"
#include "base/bf16.h"
#include "base/memory.h"

#include <stdint.h>

static void blocks_are_usable(void)
{
    static const size_t sizes[] = {
        0, 1, 63, 4096, ((size_t)4 << 20) - 1, ((size_t)5 << 20) + 3};
    for (int i = 0; i < 6; i++) {
        char *plain = kl_malloc(sizes[i]), *aligned = kl_aligned_alloc(sizes[i]);
        char *zero = kl_calloc(sizes[i], 1);
        EXPECT(plain != NULL && aligned != NULL && zero != NULL);
        EXPECT((uintptr_t)aligned % 64 == 0);
        memset(plain, 1, sizes[i]);
        memset(aligned, 2, sizes[i]);
        for (size_t j = 0; j < sizes[i]; j += 997) EXPECT(zero[j] == 0);
        plain = kl_realloc(plain, sizes[i] + 1);
        EXPECT(plain != NULL && (sizes[i] == 0 || plain[sizes[i] - 1] == 1));
        kl_free(plain);
        kl_free(aligned);
        kl_free(zero);
    }
    kl_free(NULL);
}

static void impossible_sizes_fail(void)
{
    volatile size_t huge = SIZE_MAX / 2; /* volatile: the compiler warns about constants */
    EXPECT(kl_malloc(huge) == NULL);
    EXPECT(kl_aligned_alloc(huge) == NULL);
    EXPECT(kl_calloc(huge, 4) == NULL);
    EXPECT(kl_realloc(NULL, huge) == NULL);
}

static void *allocate(int kind)
{
    switch (kind) {
    case 0:
        return kl_malloc(8);
    case 1:
        return kl_calloc(2, 8);
    case 2:
        return kl_aligned_alloc(8);
    default:
        return kl_realloc(NULL, 8);
    }
}

static void the_kth_allocation_fails(void)
{
    for (int k = 1; k <= 4; k++) {
        kl_fault_arm(k);
        for (int i = 0; i < 4; i++) {
            void *p = allocate(i);
            EXPECT((p == NULL) == (i == k - 1));
            kl_free(p);
        }
        EXPECT(kl_fault_count() == 4);
    }
    kl_fault_arm(0);
    for (int i = 0; i < 4; i++) {
        void *p = allocate(i);
        EXPECT(p != NULL);
        kl_free(p);
    }
    EXPECT(kl_fault_count() == 4);
}

static void a_failed_realloc_keeps_the_block(void)
{
    char *p = kl_malloc(4);
    memcpy(p, "abc", 4);
    kl_fault_arm(1);
    EXPECT(kl_realloc(p, 100) == NULL);
    kl_fault_arm(0);
    EXPECT_TEXT(p, "abc");
    kl_free(p);
}

static void sizes_are_checked(void)
{
    size_t out;
    EXPECT(kl_mul_size(SIZE_MAX / 2, 2, &out) && out == SIZE_MAX - 1);
    EXPECT(!kl_mul_size(SIZE_MAX / 2 + 1, 2, &out));
    EXPECT(kl_add_size(SIZE_MAX - 1, 1, &out) && out == SIZE_MAX);
    EXPECT(!kl_add_size(SIZE_MAX, 1, &out));
    EXPECT(kl_align_up(0, 64) == 0 && kl_align_up(1, 64) == 64 && kl_align_up(64, 64) == 64);
}

static void bf16_rounds_to_even(void)
{
    EXPECT(kl_f32_to_bf16(1.0f) == 0x3f80);
    EXPECT(kl_f32_to_bf16(1.00390625f) == 0x3f80); /* half way, down to the even one */
    EXPECT(kl_f32_to_bf16(1.01171875f) == 0x3f82); /* half way, up to the even one */
    EXPECT(kl_f32_to_bf16(3.4e38f) == 0x7f80);     /* past the largest */
    EXPECT(kl_f32_to_bf16(-0.0f) == 0x8000);
    const float nan = kl_bf16_to_f32(kl_f32_to_bf16(__builtin_nanf("")));
    EXPECT(nan != nan);
    for (uint32_t b = 0; b < 0x7f80; b += 3)
        EXPECT(kl_f32_to_bf16(kl_bf16_to_f32((uint16_t)b)) == b);
}

static void long_messages_are_cut(void)
{
    kl_error err;
    EXPECT(kl_fail(&err, KL_ERR_IO, "%0600d", 1) == KL_ERR_IO);
    EXPECT(err.status == KL_ERR_IO && strlen(err.message) == sizeof err.message - 1);
    kl_error_set(NULL, KL_ERR_IO, "nobody listens");
}

/* ---- the CPU backend -------------------------------------------------------------------- */

static kl_status open_cpu(const kl_backend_options *options, kl_backend **be, kl_error *err)
{
    return kl_backend_open("cpu", NULL, options, be, err);
}

static void backend_copies(void)
{
    const kl_backend_options options = {.threads = 2, .variant = "scalar"};
    kl_backend *be = NULL;
    kl_error err;
    void *a = NULL, *b = NULL;
    char out[8] = "";
    EXPECT(open_cpu(&options, &be, &err) == KL_OK);
    EXPECT(be->vt->alloc(be, 8, &a, &err) == KL_OK && be->vt->alloc(be, 8, &b, &err) == KL_OK);
    EXPECT(be->vt->copy_in(be, a, "12345678", 8, &err) == KL_OK);
    EXPECT(be->vt->zero(be, (char *)a + 2, 2, &err) == KL_OK);
    EXPECT(be->vt->copy(be, b, a, 8, &err) == KL_OK);
    EXPECT(be->vt->copy_out(be, out, b, 8, &err) == KL_OK);
    EXPECT(be->vt->sync(be, &err) == KL_OK);
    EXPECT(memcmp(out, "12\0\0005678", 8) == 0);
    be->vt->free(be, a, 8);
    be->vt->free(be, b, 8);
    kl_backend_close(be);
    kl_backend_close(NULL);
}

static void backend_tells_about_itself(void)
{
    const kl_backend_options options = {.threads = 2, .variant = "scalar"};
    kl_backend *be = NULL;
    kl_backend_info info;
    kl_error err;
    EXPECT(open_cpu(&options, &be, &err) == KL_OK);
    EXPECT(be->vt->info(be, &info, &err) == KL_OK);
    EXPECT(info.threads == 2 && info.name[0] != '\0');
    EXPECT_TEXT(info.variant, "scalar");
    EXPECT(info.total_bytes >= (size_t)64 << 20 && info.free_bytes > 0);
    EXPECT(info.free_bytes <= info.total_bytes);
    kl_backend_close(be);
}

static void backend_refuses_bad_options(void)
{
    static const struct {
        kl_backend_options options;
        const char *message;
    } cases[] = {
        {{.device = 1}, "cpu: device must be 0, got 1"},
        {{.threads = -3}, "threads: must be in 0 .. 256, got -3"},
        {{.variant = "sse9"},
         "cpu_variant: must be 'scalar', 'avx2', 'avx512' or 'avx512bf16', got 'sse9'"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        kl_backend *be = NULL;
        kl_error err;
        EXPECT(open_cpu(&cases[i].options, &be, &err) == KL_ERR_VALUE && be == NULL);
        EXPECT_TEXT(err.message, cases[i].message);
    }
    const kl_backend_options plain = {.threads = 1};
    kl_backend *be = NULL;
    kl_error err;
    EXPECT(kl_backend_open("tpu", NULL, &plain, &be, &err) == KL_ERR_VALUE);
    EXPECT_TEXT(err.message, "backend must be 'cpu' or 'cuda', got 'tpu'");
    EXPECT(kl_backend_open("cuda", "/nonexistent.so", &plain, &be, &err) == KL_ERR_UNAVAILABLE);
    EXPECT(be == NULL);
}

static void backend_survives_failed_allocations(void)
{
    const kl_backend_options options = {.threads = 2};
    kl_backend *be = NULL;
    kl_error err;
    for (int k = 1; k <= 2; k++) {
        kl_fault_arm(k);
        EXPECT(open_cpu(&options, &be, &err) == KL_ERR_MEMORY && be == NULL);
    }
    kl_fault_arm(0);
    EXPECT(open_cpu(&options, &be, &err) == KL_OK && kl_fault_count() == 2);
    void *block = NULL;
    kl_fault_arm(1);
    EXPECT(be->vt->alloc(be, 100, &block, &err) == KL_ERR_MEMORY && block == NULL);
    EXPECT_TEXT(err.message, "cpu: no 100 bytes of memory to be had");
    kl_fault_arm(0);
    kl_backend_close(be);
}

int main(void)
{
    RUN(blocks_are_usable);
    RUN(impossible_sizes_fail);
    RUN(the_kth_allocation_fails);
    RUN(a_failed_realloc_keeps_the_block);
    RUN(sizes_are_checked);
    RUN(bf16_rounds_to_even);
    RUN(long_messages_are_cut);
    RUN(backend_copies);
    RUN(backend_tells_about_itself);
    RUN(backend_refuses_bad_options);
    RUN(backend_survives_failed_allocations);
    return test_failures != 0;
}
