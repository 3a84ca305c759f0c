/*
 * kda_mixer.c -- a KDA layer between its projections on the CPU: three operations in turn.
 */
#include "backend/kda_mixer.h"
#include "cpu/cpu_backend.h"

static size_t kda_workspace(kl_backend *be, const kl_kda_mixer *a, const kl_kda *kda)
{
    return a->single ? kl_cpu_kda_decode_workspace(be, kda)
                     : kl_cpu_kda_prefill_workspace(be, kda);
}

size_t kl_cpu_kda_mixer_workspace(kl_backend *be, const kl_kda_mixer *a)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a, NULL);
    return kl_kda_mixer_convolved_bytes(a) + kda_workspace(be, a, &p.kda);
}

kl_status kl_cpu_kda_mixer(kl_backend *be, const kl_kda_mixer *a, kl_error *err)
{
    const size_t convolved = kl_kda_mixer_convolved_bytes(a);
    kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a, a->ws.data);
    p.kda.ws = (kl_workspace){(char *)a->ws.data + convolved, a->ws.bytes - convolved};
    KL_TRY(kl_cpu_short_conv(be, &p.conv, err));
    KL_TRY(a->single ? kl_cpu_kda_decode(be, &p.kda, err)
                     : kl_cpu_kda_prefill(be, &p.kda, err));
    return kl_cpu_gated_rms_norm(be, &p.norm, err);
}
