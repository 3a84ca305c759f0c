/*
 * kda_mixer.c -- what kl_kda_mixer stands for on the CPU: one operation after the other.
 */
#include "backend/kda_mixer.h"
#include "cpu/cpu_backend.h"

size_t kl_cpu_kda_mixer_workspace(kl_backend *be, const kl_kda_mixer *a)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    const size_t kda = a->single ? kl_cpu_kda_decode_workspace(be, &p.kda)
                                 : kl_cpu_kda_prefill_workspace(be, &p.kda);
    return kl_kda_mixer_bytes(a, kl_cpu_linear_pair_workspace(be, &p.gates), kda);
}

kl_status kl_cpu_kda_mixer(kl_backend *be, const kl_kda_mixer *a, kl_error *err)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    KL_TRY(kl_cpu_linear_pair(be, &p.gates, err));
    KL_TRY(kl_cpu_short_conv(be, &p.conv, err));
    KL_TRY(a->single ? kl_cpu_kda_decode(be, &p.kda, err)
                     : kl_cpu_kda_prefill(be, &p.kda, err));
    return kl_cpu_gated_rms_norm(be, &p.norm, err);
}
