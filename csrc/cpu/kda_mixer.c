/*
 * kda_mixer.c -- what kl_kda_mixer stands for on the CPU: one operation after the other; guesses
 * token by token, on a copy of their sequence's state.
 */
#include "backend/kda_mixer.h"
#include "base/arena.h"
#include "cpu/cpu_backend.h"

#include <string.h>

static size_t parts_workspace(kl_backend *be, const kl_kda_mixer *a)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    const size_t kda = a->single ? kl_cpu_kda_decode_workspace(be, &p.kda)
                                 : kl_cpu_kda_prefill_workspace(be, &p.kda);
    return kl_kda_mixer_bytes(a, kl_cpu_linear_pair_workspace(be, &p.gates), kda);
}

static kl_status run_parts(kl_backend *be, const kl_kda_mixer *a, kl_error *err)
{
    const kl_kda_mixer_parts p = kl_kda_mixer_parts_of(a);
    KL_TRY(kl_cpu_linear_pair(be, &p.gates, err));
    KL_TRY(kl_cpu_short_conv(be, &p.conv, err));
    KL_TRY(a->single ? kl_cpu_kda_decode(be, &p.kda, err)
                     : kl_cpu_kda_prefill(be, &p.kda, err));
    return kl_cpu_gated_rms_norm(be, &p.norm, err);
}

/* ---- guesses --------------------------------------------------------------------------- */

/* What a call of guesses has in its workspace. */
typedef struct {
    kl_tensor state, window; /* a sequence's copy                      */
    kl_tensor out;           /* of a token that is read a second time  */
    int32_t *one;            /* 0, 1: the cu_seqlens of a single token */
    kl_workspace ws;         /* of a single token                      */
} guessing;

/* Token t by itself; its sequence's memory is the first of `state` and `window`. */
static kl_kda_mixer token_of(const kl_kda_mixer *a, const guessing *g, int64_t t,
                             kl_tensor state, kl_tensor window)
{
    kl_kda_mixer one = *a;
    one.qkv = kl_row_slice(&a->qkv, t, 1);
    one.f_low = kl_row_slice(&a->f_low, t, 1);
    one.g_low = kl_row_slice(&a->g_low, t, 1);
    one.beta = kl_row_slice(&a->beta, t, 1);
    one.out = kl_row_slice(&a->out, t, 1);
    one.state = state;
    one.conv_state = window;
    one.slots = (kl_tensor){0};
    one.cu_seqlens = kl_tensor_1d(g->one, KL_I32, 2);
    one.guesses = false;
    one.single = true;
    one.ws = g->ws;
    return one;
}

/* Of a dense tensor; not its stride, which nobody has to set where there is one row. */
static size_t row_bytes(const kl_tensor *t)
{
    const kl_tensor row = kl_row_slice(t, 0, 1);
    return (size_t)kl_tensor_size(&row) * kl_dtype_bytes(t->dtype);
}

static kl_tensor take_like(kl_arena *arena, const kl_tensor *t)
{
    kl_tensor row = kl_row_slice(t, 0, 1);
    row.data = kl_arena_take(arena, row_bytes(t));
    return row;
}

/* Lay it out; returns the bytes. */
static size_t take_guessing(kl_backend *be, const kl_kda_mixer *a, guessing *g)
{
    kl_arena arena;
    kl_arena_init(&arena, a->ws.data, a->ws.data == NULL ? 0 : a->ws.bytes);
    *g = (guessing){.state = take_like(&arena, &a->state),
                    .window = take_like(&arena, &a->conv_state),
                    .out = take_like(&arena, &a->out),
                    .one = kl_arena_take(&arena, 2 * sizeof *g->one)};
    const kl_kda_mixer one = token_of(a, g, 0, g->state, g->window);
    g->ws.bytes = parts_workspace(be, &one);
    g->ws.data = kl_arena_take(&arena, g->ws.bytes);
    if (g->one != NULL) g->one[0] = 0, g->one[1] = 1;
    return arena.used;
}

static void copy_row(const kl_tensor *to, const kl_tensor *from)
{
    const size_t bytes = row_bytes(from);
    if (bytes > 0) memcpy(to->data, from->data, bytes);
}

/* The certain token, then the guesses on a copy. */
static kl_status guess(kl_backend *be, const kl_kda_mixer *a, const guessing *g, int64_t slot,
                       int64_t begin, int64_t end, kl_error *err)
{
    const kl_tensor state = kl_row_slice(&a->state, slot, 1);
    const kl_tensor window = kl_row_slice(&a->conv_state, slot, 1);
    for (int64_t t = begin; t < end; t++) {
        const bool certain = t == begin;
        if (t == begin + 1) copy_row(&g->state, &state), copy_row(&g->window, &window);
        const kl_kda_mixer one =
            token_of(a, g, t, certain ? state : g->state, certain ? window : g->window);
        KL_TRY(run_parts(be, &one, err));
    }
    return KL_OK;
}

/* The guesses that were right. */
static kl_status advance(kl_backend *be, const kl_kda_mixer *a, const guessing *g, int64_t slot,
                         int64_t begin, int64_t end, kl_error *err)
{
    const int32_t *tokens = a->tokens.data, *drawn = a->drawn.data;
    for (int64_t t = begin + 1; t < end && tokens[t] == drawn[t - 1]; t++) {
        kl_kda_mixer one = token_of(a, g, t, kl_row_slice(&a->state, slot, 1),
                                    kl_row_slice(&a->conv_state, slot, 1));
        one.out = g->out;
        KL_TRY(run_parts(be, &one, err));
    }
    return KL_OK;
}

static kl_status run_guesses(kl_backend *be, const kl_kda_mixer *a, kl_error *err)
{
    const int32_t *cu = a->cu_seqlens.data, *slots = a->slots.data;
    const int64_t N = a->cu_seqlens.shape[0] - 1;
    guessing g;
    take_guessing(be, a, &g);
    for (int64_t n = 0; n < N; n++) {
        const int64_t slot = kl_tensor_absent(&a->slots) ? n : slots[n];
        KL_TRY(kl_tensor_absent(&a->drawn) ? guess(be, a, &g, slot, cu[n], cu[n + 1], err)
                                           : advance(be, a, &g, slot, cu[n], cu[n + 1], err));
    }
    return KL_OK;
}

/* ---- the operation --------------------------------------------------------------------- */

size_t kl_cpu_kda_mixer_workspace(kl_backend *be, const kl_kda_mixer *a)
{
    guessing g;
    return a->guesses ? take_guessing(be, a, &g) : parts_workspace(be, a);
}

kl_status kl_cpu_kda_mixer(kl_backend *be, const kl_kda_mixer *a, kl_error *err)
{
    return a->guesses ? run_guesses(be, a, err) : run_parts(be, a, err);
}
