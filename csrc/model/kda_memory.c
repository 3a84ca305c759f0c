/*
 * kda_memory.c -- what a KDA layer remembers of a sequence, on its way to the host and back.
 */
#include "base/bf16.h"
#include "base/memory.h"
#include "model/engine_struct.h"

/* Where the memory of one sequence in one layer lies. */
typedef struct {
    void *state, *window;
    size_t state_bytes;
    int64_t window_size;
} place;

static kl_status find(const kl_engine *e, const char *op, kl_seq seq, int64_t layer, place *out,
                      kl_error *err)
{
    const kl_config *c = &e->config;
    int64_t slot, index = 0;
    KL_TRY(kl_cache_find(&e->cache, seq, false, &slot, err));
    if (layer < 0 || layer >= c->n_layers || c->mixer[layer] != KL_MIXER_KDA)
        return kl_fail(err, KL_ERR_VALUE, "%s: layer must be one with KDA, got %lld", op,
                       (long long)layer);
    for (int64_t i = 0; i < layer; i++) index += c->mixer[i] == KL_MIXER_KDA;
    const kl_tensor *states = &e->cache.states[index], *windows = &e->cache.windows[index];
    size_t window_bytes;
    out->state = kl_cache_entry(states, slot, &out->state_bytes);
    out->window = kl_cache_entry(windows, slot, &window_bytes);
    out->window_size = (int64_t)(window_bytes / kl_dtype_bytes(windows->dtype));
    return KL_OK;
}

/* A window crosses in the activations' dtype. */
static kl_status read_window(kl_engine *e, const place *p, float *window, kl_error *err)
{
    const size_t n = (size_t)p->window_size;
    if (e->cache.act == KL_F32)
        return e->be->vt->copy_out(e->be, window, p->window, n * sizeof *window, err);
    uint16_t *narrow = kl_malloc(n * sizeof *narrow);
    if (narrow == NULL) return kl_fail(err, KL_ERR_MEMORY, "no memory for a conv window");
    kl_status status = e->be->vt->copy_out(e->be, narrow, p->window, n * sizeof *narrow, err);
    if (status == KL_OK) status = e->be->vt->sync(e->be, err);
    for (size_t i = 0; status == KL_OK && i < n; i++) window[i] = kl_bf16_to_f32(narrow[i]);
    kl_free(narrow);
    return status;
}

static kl_status write_window(kl_engine *e, const place *p, const float *window, kl_error *err)
{
    const size_t n = (size_t)p->window_size;
    if (e->cache.act == KL_F32)
        return e->be->vt->copy_in(e->be, p->window, window, n * sizeof *window, err);
    uint16_t *narrow = kl_malloc(n * sizeof *narrow);
    if (narrow == NULL) return kl_fail(err, KL_ERR_MEMORY, "no memory for a conv window");
    for (size_t i = 0; i < n; i++) narrow[i] = kl_f32_to_bf16(window[i]);
    kl_status status = e->be->vt->copy_in(e->be, p->window, narrow, n * sizeof *narrow, err);
    if (status == KL_OK) status = e->be->vt->sync(e->be, err);
    kl_free(narrow);
    return status;
}

kl_status kl_seq_read_kda(kl_engine *e, kl_seq seq, int64_t layer, float *state, float *window,
                          kl_error *err)
{
    place p;
    KL_TRY(find(e, "seq_read_kda", seq, layer, &p, err));
    KL_TRY(e->be->vt->copy_out(e->be, state, p.state, p.state_bytes, err));
    KL_TRY(read_window(e, &p, window, err));
    return e->be->vt->sync(e->be, err);
}

kl_status kl_seq_write_kda(kl_engine *e, kl_seq seq, int64_t layer, const float *state,
                           const float *window, kl_error *err)
{
    place p;
    KL_TRY(find(e, "seq_write_kda", seq, layer, &p, err));
    KL_TRY(e->be->vt->copy_in(e->be, p.state, state, p.state_bytes, err));
    KL_TRY(write_window(e, &p, window, err));
    return e->be->vt->sync(e->be, err);
}
