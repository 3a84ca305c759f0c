/*
 * features.c -- which of the kernel tables this machine can run.
 *
 * __builtin_cpu_supports asks the processor and, for the wide registers, whether the operating
 * system saves them (XGETBV): a processor's word alone is not enough in a virtual machine.
 */
#include "cpu/kernels.h"

#include <stdbool.h>
#include <string.h>

typedef struct {
    const kl_cpu_kernels *kernels;
    bool supported;
} candidate;

#if defined(__x86_64__)
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif

kl_status kl_cpu_kernels_choose(const char *wanted, const kl_cpu_kernels **out, kl_error *err)
{
    const candidate widest_first[] = {
#if defined(__x86_64__)
        {&kl_kernels_avx512bf16, has_avx512() && __builtin_cpu_supports("avx512bf16")},
        {&kl_kernels_avx512, has_avx512()},
        {&kl_kernels_avx2, has_avx2()},
#endif
        {&kl_kernels_scalar, true},
    };
    *out = NULL;
    for (size_t i = 0; i < sizeof widest_first / sizeof widest_first[0]; i++) {
        const candidate *c = &widest_first[i];
        if (wanted != NULL && strcmp(wanted, c->kernels->name) != 0) continue;
        if (!c->supported && wanted != NULL)
            return kl_fail(err, KL_ERR_UNAVAILABLE,
                           "cpu_variant: this processor must have '%s', and has not", wanted);
        if (!c->supported) continue;
        *out = c->kernels;
        return KL_OK;
    }
    return kl_fail(err, KL_ERR_VALUE,
                   "cpu_variant: must be 'scalar', 'avx2', 'avx512' or 'avx512bf16', got '%s'",
                   wanted);
}
